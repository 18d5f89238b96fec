"""`vismodal control` end to end on a tiny random pipeline, and `vismodal generate` with what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_diffusion import photo_folder, tiny_pipeline
from torch import Tensor
from torch.nn import functional as F

import vismodal as vm
from vismodal import cli
from vismodal.callbacks import read_log
from vismodal.data.edges import edges
from vismodal.data.photos import pixels, read_photos
from vismodal.diffusion import control
from vismodal.diffusion.control import Edges, Likeness, Steered, control_of, steering
from vismodal.diffusion.denoise import Prompts, Weights, denoising
from vismodal.diffusion.load import load_pipeline
from vismodal.draw import generator, seed_of, shuffled
from vismodal.evaluation.encoders import Encoder
from vismodal.methods import Condition
from vismodal.train import Micro

pipeline, generate = cli.load_pipeline("control"), cli.load_pipeline("generate")
Config, main = pipeline.Config, pipeline.main


def colours(images: Tensor) -> Tensor:
    """An encoder: pictures b 3 8 8 -> b 6."""
    return torch.cat((images.mean((2, 3)), images[:, :, 4, 4]), 1)


ENCODER = Encoder("colours", colours, lambda image: pixels(image.convert("RGB"), 8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos") / "things", 4, p1="one", p2="two", p4="four")


@pytest.fixture
def settings(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(control, "clip_encoders", lambda name: (ENCODER, None))
    return Config(
        photos=photos, model=str(model), output=tmp_path / "run", steps=4, batch=2, held_out=1,
        drop=0.2, learning_rate=1e-2, sample_steps=2, save_every=3,
    )  # fmt: skip


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# -- what steers -------------------------------------------------------------------------------------------------------


def test_edges_equal_sobel_by_hand() -> None:
    x = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    p = F.pad((x + 1) / 2, (1, 1, 1, 1), mode="replicate")
    want = torch.zeros(2, 1, 5, 6)
    for b in range(2):
        for i in range(5):
            for j in range(6):
                w = p[b, :, i : i + 3, j : j + 3]
                gx = w[:, 0, 2] + 2 * w[:, 1, 2] + w[:, 2, 2] - w[:, 0, 0] - 2 * w[:, 1, 0] - w[:, 2, 0]
                gy = w[:, 2, 0] + 2 * w[:, 2, 1] + w[:, 2, 2] - w[:, 0, 0] - 2 * w[:, 0, 1] - w[:, 0, 2]
                want[b, 0, i, j] = ((gx**2 + gy**2).sqrt() / 4).max().clamp(max=1)
    torch.testing.assert_close(edges(x), want)
    step = torch.cat((-torch.ones(1, 3, 4, 3), torch.ones(1, 3, 4, 3)), 3)
    assert torch.equal(edges(step)[0, 0], torch.tensor([0.0, 0, 1, 1, 0, 0]).expand(4, 6))


def test_agreement_is_a_correlation_or_a_cosine(photos: Path) -> None:
    images = [photo.image for photo in read_photos(photos).photos]
    by_edges, by_likeness = Edges(16, 2), Likeness(ENCODER, None, 16)
    rows = by_edges.rows(images)
    shifted = [images[1], images[0], images[2], images[3]]
    pairs = zip(rows.flatten(1), by_edges.rows(shifted).flatten(1), strict=True)
    want = np.mean([np.corrcoef(a.numpy(), b.numpy())[0, 1] for a, b in pairs])
    assert by_edges.agreement(rows, shifted) == pytest.approx(want, abs=1e-5)
    assert by_edges.agreement(rows, images) == pytest.approx(1, abs=1e-5)
    features = F.normalize(colours(torch.stack([pixels(image, 8) for image in images])), dim=-1)
    torch.testing.assert_close(by_likeness.rows(images), features * 6**0.5)
    assert by_likeness.agreement(by_likeness.rows(images), images) == pytest.approx(1, abs=1e-5)
    assert by_likeness.method() == vm.IPAdapter(width=6)


def test_a_picture_s_condition_does_not_depend_on_its_neighbours(photos: Path) -> None:
    """What `vismodal generate` draws by one picture is then to the bit what samples of several showed."""
    likeness = control_of({"control": "picture"}, None, 16)
    assert likeness is not None
    images = [photo.image for photo in read_photos(photos).photos]
    rows = likeness.rows(images)
    assert len(rows) == 4 and all(
        torch.equal(row, likeness.rows([im])[0]) for row, im in zip(rows, images, strict=True)
    )


def test_each_row_has_the_condition_of_its_picture_and_what_is_dropped_is_drawn_by_key(
    model: Path, photos: Path
) -> None:
    found = read_photos(photos).photos
    given = Condition(torch.arange(4.0)[:, None], torch.full((4, 1), -1.0))
    said = [str(i) for i in range(4)]
    pipe = load_pipeline(model)
    pictures = Steered(pipe, "p", [p.image for p in found], said, given, size=16, drop=0.2)
    micro = Micro(seed=3, step=0, index=5)
    places = micro.positions(40)
    rows = pictures.conditions(micro, places)
    kinds = set()
    for place, row in zip(places, rows, strict=True):
        u = torch.rand((), generator=generator(3, "p drop", place)).item()
        case = "text" if u < 0.2 else "both" if u < 0.4 else "condition" if u < 0.6 else ""
        index = shuffled(3, "p", 4, place)
        assert row.item() == (-1 if case in ("condition", "both") else index)
        assert pictures.draw(micro, place).prompt == ("" if case in ("text", "both") else str(index))
        kinds.add(case)
    assert len(kinds) == 4
    adapter, prompts = vm.adapt(pipe.unet, vm.IPAdapter(width=1)), Prompts(pipe, cache=True)
    seen: list[tuple[Tensor, Tensor]] = []
    pipe.unet.register_forward_pre_hook(lambda m, a, k: seen.append((adapter.condition, k)), with_kwargs=True)
    steering(adapter, pictures, 3, denoising(pipe, [pictures], prompts, 3, Weights()))(micro)
    (condition, arguments), places = seen[0], micro.positions(3)
    assert torch.equal(condition, pictures.conditions(micro, places))
    texts = prompts([pictures.draw(micro, place).prompt for place in places])
    assert torch.equal(arguments["encoder_hidden_states"], texts["encoder_hidden_states"])


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["edges", "picture"])
def test_a_run_and_its_resume_and_pictures_drawn_with_it(
    kind: Any, settings: Any, model: Path, photos: Path, tmp_path: Path
) -> None:
    config = replace(settings, control=kind)
    result = main(config)
    out = config.output
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter.safetensors", "checkpoints", "config.yaml", "loss.png", "metrics.jsonl",
        "samples", "sheet.png",
    ]  # fmt: skip
    assert result.step == 4 and f"{result.agreement[1]:.3f}" in (out / "README.md").read_text()
    assert str(photos.parent) not in (out / "README.md").read_text()
    with safe_open(out / "adapter.safetensors", "pt") as file:
        assert file.metadata()["control"] == kind

    half = replace(config, output=tmp_path / "half")
    main(replace(half, steps=2))
    before = load_file(tmp_path / "half" / "adapter.safetensors")
    main(replace(half, resume=True))
    whole, resumed = (load_file(folder / "adapter.safetensors") for folder in (out, tmp_path / "half"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert all(not torch.equal(before[name], tensor) for name, tensor in whole.items())

    # what samples show is what a fresh load of the file draws, and what `vismodal generate` does
    asked = generate.Config(
        prompts=("four",), adapters=(str(out),), conditions=(str(photos / "4.png"),), model=str(model), steps=2,
        seeds=tuple(seed_of(0, "sample", i) for i in range(2)), guidance=7.5, output=tmp_path / "drawn",
    )  # fmt: skip
    drawn = generate.main(asked).pictures
    row = picture(out / "samples" / "step-0000004.png")
    assert np.array_equal(np.concatenate([picture(path) for path in drawn], 1), row)
    again = generate.main(generate.Config(like=drawn[1], output=tmp_path / "again")).pictures[0]
    alone = generate.main(replace(asked, seeds=asked.seeds[1:], output=tmp_path / "alone")).pictures[0]
    assert np.array_equal(picture(again), picture(alone))
    apart = picture(again).astype(int) - picture(drawn[1])  # which was one of a batch of two: rounded otherwise
    assert np.abs(apart).max() <= 1
    by_another = replace(asked, conditions=(str(photos / "1.png"),), output=tmp_path / "another")
    assert not np.array_equal(picture(generate.main(by_another).pictures[0]), picture(drawn[0]))


def test_checkpointing_changes_nothing(settings: Any, tmp_path: Path) -> None:
    short = replace(settings, control="picture", steps=2, sample_count=1, sample_steps=1)
    main(short)
    main(replace(short, output=tmp_path / "less", gradient_checkpointing=True))
    more, less = (read_log(folder / "metrics.jsonl") for folder in (settings.output, tmp_path / "less"))
    assert [row["loss"] for row in less] == pytest.approx([row["loss"] for row in more], rel=1e-5)


WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda c: replace(c, data=Path("x")), "photos and data are given"),
    (lambda c: replace(c, encoder="ViT-B-32/openai"), "an encoder is for --control picture"),
    (lambda c: replace(c, held_out=4), "4 pictures, of which 4 are held out, leave none to learn from"),
    (lambda c: replace(c, drop=0.5), "at most 1/3, not 0.5"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_bad_settings_leave_no_trace(change: Callable[[Any], Any], message: str, settings: Any) -> None:
    with pytest.raises(vm.InputError, match=message):
        main(change(settings))
    assert not settings.output.exists()


def test_generate_tells_what_steers_what(model: Path, photos: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(model)
    steered = vm.adapt(pipe.unet, vm.T2IAdapter(factor=2), "edges")
    vm.save(steered, tmp_path / "edges.safetensors", {"control": "edges"})
    vm.save(steered, tmp_path / "new.safetensors", {"control": "depth"})
    vm.save(steered, tmp_path / "mute.safetensors")
    steered.detach()
    vm.save(vm.adapt(pipe.unet, vm.LoRA(rank=2), "style"), tmp_path / "style.safetensors")

    def error(*names: str, conditions: tuple[str, ...] = (str(photos / "1.png"),)) -> str:
        files = tuple(str(tmp_path / f"{name}.safetensors") for name in names)
        config = generate.Config(prompts=("x",), model=str(model), output=tmp_path / "out", adapters=files)
        with pytest.raises(vm.InputError) as caught:
            generate.main(replace(config, steps=1, conditions=conditions))
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "is steered beside the prompt; write vismodal generate --conditions PICTURE" in error("edges", conditions=())
    assert "steers no adapter; those that something steers are: none" in error("style")
    assert "style=" in error("edges", "style", conditions=(f"style={photos / '1.png'}",))
    assert "there is no control 'depth'; write edges or picture" in error("new")
    assert "mute.safetensors is steered beside the prompt" in error("mute", conditions=())
    assert "cannot steer: not a jpg" in error("edges", conditions=(str(photos / "1.txt"),))
