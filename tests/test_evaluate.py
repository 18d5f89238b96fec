"""`vismodal evaluate personalisation`: the figures by hand on small tensors, DreamBench's prompts, and whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_diffusion import photo_folder, tiny_pipeline

import vismodal as vm
from vismodal import cli
from vismodal.diffusion.adapters import AdapterFile
from vismodal.diffusion.load import load_pipeline
from vismodal.evaluation import personalisation as p13n
from vismodal.evaluation.dreambench import TEMPLATES, prompts_of
from vismodal.evaluation.encoders import clip_encoders, vision_encoder
from vismodal.evaluation.personalisation import Seen

pipeline = cli.load_pipeline("evaluate_personalisation")
Config, main = pipeline.Config, pipeline.main
X, Y = [1.0, 0.0], [0.0, 1.0]
DIAGONAL = [3.0, 3.0]  # cosine 1/sqrt 2 with both; lengths do not count
HALF = 0.5**0.5


# -- the definitions, by hand ------------------------------------------------------------------------------------------


def test_similarity_is_the_mean_over_all_pairs() -> None:
    generated, real = torch.tensor([X, DIAGONAL]), torch.tensor([X, Y, [-2.0, 0.0]])
    assert p13n.similarity(generated, real) == pytest.approx((1 + 0 - 1 + HALF + HALF - HALF) / 6)


def test_among_leaves_out_a_picture_with_itself() -> None:
    features = torch.tensor([X, Y, DIAGONAL])
    assert p13n.among(features) == pytest.approx((0 + HALF + HALF) / 3)
    assert p13n.diversity(features) == pytest.approx(1 - 2 * HALF / 3)
    assert p13n.diversity(torch.tensor([X, X])) == pytest.approx(0)
    assert p13n.among(torch.tensor([X])) is None
    assert p13n.diversity(torch.tensor([X])) is None


def test_own_pairs_each_picture_with_its_own_prompt() -> None:
    pictures, texts = torch.tensor([X, DIAGONAL]), torch.tensor([Y, [0.0, 5.0]])
    assert p13n.own(pictures, texts) == pytest.approx((0 + HALF) / 2)
    assert p13n.drift(pictures, texts) == pytest.approx(1 - HALF / 2)
    assert p13n.drift(pictures, 2 * pictures) == pytest.approx(0, abs=1e-6)


def test_all_scores_of_a_model() -> None:
    real = Seen(dino=torch.tensor([X, DIAGONAL]), clip=torch.tensor([Y, Y]))
    base = Seen(torch.tensor([Y]), torch.tensor([Y]), plain=torch.tensor([X, Y]))
    seen = Seen(
        dino=torch.tensor([X, X]),
        clip=torch.tensor([DIAGONAL, Y]),
        asked=torch.tensor([X, Y]),
        kind=torch.tensor([X, Y]),
        plain=torch.tensor([DIAGONAL, Y]),
    )
    assert p13n.scores(seen, real, base) == pytest.approx(
        {
            "dino": (1 + HALF) / 2,
            "clip_i": (HALF + 1) / 2,
            "clip_t": (HALF + 1) / 2,
            "pres": (1 + HALF + 0 + HALF) / 4,
            "div": 1.0,
            "drift": (1 - HALF) / 2,
        }
    )
    bare = p13n.scores(Seen(seen.dino, seen.clip), real, base)
    assert [bare[k] for k in ("clip_t", "pres", "div", "drift")] == [None] * 4
    assert p13n.real_scores(real) | {"dino": None} == dict.fromkeys(p13n.SCORES) | {"clip_i": pytest.approx(1.0)}
    assert p13n.real_scores(real)["dino"] == pytest.approx(HALF)
    rows = p13n.by_prompt(seen, real, ["a", "b"])
    assert [row["prompt"] for row in rows] == ["a", "b"]
    assert [row["clip_t"] for row in rows] == pytest.approx([HALF, 1.0])
    assert [row["clip_i"] for row in rows] == pytest.approx([HALF, 1.0])


def test_the_prompts_of_dreambench() -> None:
    for kind, templates in TEMPLATES.items():
        assert len(set(templates)) == len(templates) == 25
        assert all(t.count("{}") == 2 for t in templates)
        assert all("sks dog" in prompt and "{" not in prompt for prompt in prompts_of(kind, "sks", "dog"))
    assert len(set(TEMPLATES["object"]) & set(TEMPLATES["live"])) == 15
    assert prompts_of("live", "sks", "dog")[15] == "a sks dog in a firefighter outfit"
    assert (
        prompts_of("object", "sks", "stuffed animal")[12]
        == "a sks stuffed animal with the Eiffel Tower in the background"
    )
    with pytest.raises(vm.InputError, match="need the subject's word and its class"):
        prompts_of("live", "sks", " ")


# -- encoders ----------------------------------------------------------------------------------------------------------


def test_the_embedded_encoders_are_the_models_themselves() -> None:
    images = [Image.effect_noise((40 + 9 * i, 50), 90).convert("RGB") for i in range(3)]
    vit, clip = vm.models.load("tiny-vit"), vm.models.load("tiny-clip")
    pictures, texts = clip_encoders()
    vision = vision_encoder()
    with torch.no_grad():
        x = torch.stack([vision.preprocess(image) for image in images])
        pooled = vit.forward_head(vit.forward_features(x), pre_logits=True)
        assert torch.allclose(vision.features(images), torch.nn.functional.normalize(pooled, dim=-1), atol=1e-5)
        x = torch.stack([clip.preprocess(image) for image in images])
        assert torch.allclose(pictures.features(images), clip.model.encode_image(x, normalize=True), atol=1e-5)
        ids = clip.tokenizer(["a dog", "a red cup", "a dog"])
        truth = clip.model.encode_text(ids, normalize=True)
    assert torch.allclose(texts.features(["a dog", "a red cup", "a dog"]), truth, atol=1e-5)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    pipe = load_pipeline(model)
    made = vm.adapt({"unet": pipe.unet}, vm.LoRA(sites=("attn.*", "conv"), rank=2), "a", seed=0)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return vm.save(made, model.parent / "dog.safetensors", {"prompt": "a photo of zwx dog", "subject": "zwx"})


@pytest.fixture
def config(model: Path, adapter: Path, tmp_path: Path) -> Config:
    return Config(
        (str(adapter),), photos=photo_folder(tmp_path / "photos"), prompts=("a zwx dog", "a red zwx dog"), count=2,
        class_count=2, model=str(model), steps=1, output=tmp_path / "out",
    )  # fmt: skip


def test_the_base_and_each_adapter_are_measured(config: Config, adapter: Path, capsys: pytest.CaptureFixture) -> None:
    result = main(replace(config, adapters=(str(adapter), f"off={adapter}"), strengths=(1.0, 0.0)))
    assert list(result.scores) == ["real", "base", "dog", "off"]
    off, base = dict(result.scores["off"]), dict(result.scores["base"])
    assert off.pop("drift") == pytest.approx(0, abs=1e-6)
    assert base.pop("drift") is None
    assert off == pytest.approx(base)  # at strength 0 the same pictures of the same seeds
    dog = result.scores["dog"]
    assert None not in dog.values()
    assert dog["drift"] > 1e-5
    assert dog["dino"] != pytest.approx(base["dino"], abs=1e-5)
    written = json.loads((result.output / "metrics.json").read_text())
    assert written["scores"] == result.scores
    assert written["encoders"] == {"vision": "tiny-vit", "clip": "tiny-clip"}
    assert [row["prompt"] for row in written["by_prompt"]["dog"]] == ["a zwx dog", "a red zwx dog"]
    mean = sum(row["clip_t"] for row in written["by_prompt"]["dog"]) / 2
    assert mean == pytest.approx(dog["clip_t"])
    assert {p.name for p in (result.output / "pictures").iterdir()} >= {"base.png", "dog.png", "dog-class.png"}
    with Image.open(result.output / "sheet.png") as sheet:
        assert sheet.height > 4 * 16
    said = capsys.readouterr().out
    assert all(name in said for name in ("DINO", "CLIP-I", "CLIP-T", "PRES", "DIV", "drift"))


def test_figures_are_those_of_the_pictures_that_are_left(config: Config) -> None:
    """From the files alone, with the encoders by hand: rows are pictures in the order of prompts."""
    result = main(config)
    with Image.open(result.output / "pictures" / "dog.png") as page:
        pictures = [page.crop((16 * (i % 2), 16 * (i // 2), 16 * (i % 2) + 16, 16 * (i // 2) + 16)) for i in range(4)]
    with Image.open(result.output / "pictures" / "dog-class.png") as page:
        of_class = [page.crop((16 * i, 0, 16 * i + 16, 16)) for i in range(2)]
    photos = [Image.open(path).convert("RGB") for path in sorted(config.photos.glob("*.png"))]
    vision, (clip, texts) = vision_encoder(), clip_encoders()
    found, real = result.scores["dog"], vision.features(photos)
    assert found["dino"] == pytest.approx((vision.features(pictures) @ real.T).mean().item(), abs=1e-5)
    assert found["pres"] == pytest.approx((vision.features(of_class) @ real.T).mean().item(), abs=1e-5)
    a, b = vision.features(of_class)
    assert found["div"] == pytest.approx(1 - (a @ b).item(), abs=1e-5)
    asked = texts.features(["a dog", "a dog", "a red dog", "a red dog"])
    assert found["clip_t"] == pytest.approx((clip.features(pictures) * asked).sum(1).mean().item(), abs=1e-5)


def test_what_the_file_says_is_taken(config: Config) -> None:
    filled, _ = pipeline.checked(replace(config, prompts=(), kind="live"))
    assert filled.subject == "zwx"
    assert filled.prompts == tuple(prompts_of("live", "zwx", "dog"))
    assert filled.class_prompt == "a photo of a dog"
    assert filled.drift_prompts[0] == "a dog in the jungle"
    other, _ = pipeline.checked(replace(config, prompts=(), class_name="red wolf"))
    assert other.prompts[24] == "a cube shaped zwx red wolf"


def test_pictures_drawn_elsewhere(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outer = replace(
        config, adapters=(), model=None, generated=photo_folder(tmp_path / "made", 2, p1="a zwx dog", p2="b")
    )
    result = main(replace(outer, subject="zwx"))
    assert list(result.scores) == ["real", "made"]
    assert result.scores["made"]["clip_t"] is not None
    assert result.scores["made"]["drift"] is None
    bare = main(replace(outer, generated=photo_folder(tmp_path / "bare", 2, p1="a dog"), output=tmp_path / "b"))
    assert bare.scores["bare"]["clip_t"] is None
    assert "1 pictures have no prompt" in capsys.readouterr().err
    generate = cli.load_pipeline("generate")
    generate.main(
        generate.Config(("a dog",), model=config.model, steps=1, count=2, output=tmp_path / "mine", seeds=(1,))
    )
    for extra in ("sheet.png", "config.yaml"):
        (tmp_path / "mine" / extra).unlink()
    mine = main(replace(outer, generated=tmp_path / "mine", output=tmp_path / "c"))
    assert mine.scores["mine"]["clip_t"] is not None  # by the settings that the pictures carry


def test_one_real_picture_is_told(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = photo_folder(tmp_path / "made", 1, p1="a dog")
    result = main(replace(config, adapters=(), model=None, generated=made, photos=made))
    assert result.scores["real"]["dino"] is None
    assert result.scores["made"]["dino"] == pytest.approx(1.0, abs=1e-4)  # the same picture
    assert "one real picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"adapters": ()}, "give adapters to be measured"),
        ({"generated": Path("pictures")}, "give adapters to be measured"),
        ({"photos": None}, "write --photos FOLDER"),
        ({"photos": Path("lacking")}, "lacking"),
        ({"class_count": 1}, "class_count must be at least 2"),
        ({"count": 0}, "count must be at least 1"),
        ({"strengths": (1.0, 0.5)}, "1 adapters have 2 strengths"),
        ({"prompts": ("a dog",)}, "lacks the subject's word 'zwx'"),
        ({"prompts": (), "subject": "sks"}, "write e.g. --class_name dog"),
        ({"class_prompt": "a zwx dog"}, "without 'zwx'"),
        ({"drift_prompts": ("a cup", "a zwx cup")}, "names the subject"),
        ({"resolution": 17}, "multiple of 2"),
        ({"vision": "no_such_vit"}, "no model 'no_such_vit'"),
        ({"vision_size": 64}, "write --vision NAME"),
        ({"clip": "/lacking"}, "lacking"),
    ],
)
def test_bad_input_leaves_nothing(config: Config, change: dict, why: str) -> None:
    with pytest.raises(vm.InputError, match=why):
        main(replace(config, **change))
    assert not config.output.exists()


def test_a_folder_without_pictures(config: Config, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(vm.InputError, match="is empty"):
        main(replace(config, photos=tmp_path / "empty"))


def test_on_the_command_line(config: Config, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["evaluate", "personalisation", str(adapter), "--photos", str(config.photos), "--model", config.model]
    line += ["--prompts", "a zwx dog", "--count", "1", "--class-count", "2", "--steps", "1"]
    assert cli.main([*line, "--output", str(config.output)]) == 0
    assert "tiny-clip" in capsys.readouterr().out
    assert cli.main(["evaluate"]) == 0
    assert "evaluate personalisation" in capsys.readouterr().out


def test_adapters_of_several_words_are_not_measured_by_the_first_one_s(tmp_path: Path) -> None:
    files = {n: AdapterFile(n, tmp_path, "", {"subject": word}, {}) for n, word in (("a", "sks"), ("b", "zwx"))}
    config = Config(tuple(files), photos=tmp_path, class_name="dog", model="m")
    with pytest.raises(vm.InputError, match="several subjects: sks, zwx; write --subject WORD"):
        pipeline.asked(config, files)
    with pytest.raises(vm.InputError, match="several subjects: sks, cat"):  # of one adapter with two
        pipeline.asked(config, {"a": AdapterFile("a", tmp_path, "", {"subject": "sks, cat"}, {})})
    assert pipeline.asked(replace(config, subject="zwx"), files).prompts[0] == "a zwx dog in the jungle"
    assert pipeline.asked(config, {"b": files["b"]}).subject == "zwx"
