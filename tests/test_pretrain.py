"""Smoke runs of the pretraining scripts: each end to end at a tiny size, on pictures made here."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parent.parent / "pipelines" / "pretrain"
sys.path.insert(0, str(SCRIPTS))

import autoencoder  # noqa: E402
import contrastive  # noqa: E402
import evaluate  # noqa: E402
import loop  # noqa: E402
import publish  # noqa: E402
import stable_diffusion  # noqa: E402
import teacher  # noqa: E402
import tokenizer  # noqa: E402
import trainer  # noqa: E402
import vit  # noqa: E402
from muon import orthogonalise  # noqa: E402

from vismodal.data import emoji as data  # noqa: E402
from vismodal.errors import InputError  # noqa: E402

NAMES = ("red ball", "blue box", "apple", "scissors", "green_leaf", "house")


@pytest.fixture(scope="module")
def photos(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with photos of three classes in CIFAR-100's layout, and one transfer set."""
    root = tmp_path_factory.mktemp("photos")
    (root / "emoji").symlink_to(folder / "emoji")
    r = np.random.default_rng(1)
    for part, count in (("train", 40), ("test", 12)):
        files = []
        for i in range(count):
            stored = io.BytesIO()
            colour = np.eye(3)[i % 3] * 200 + r.integers(0, 55, (32, 32, 3))
            Image.fromarray(colour.astype(np.uint8)).save(stored, "JPEG")
            files.append(stored.getvalue())
        np.savez(
            root / f"cifar100_{part}.npz",
            jpeg=np.frombuffer(b"".join(files), np.uint8),
            offsets=np.cumsum([0, *map(len, files)]),
            label=np.arange(count) % 3,
            classes=np.array(["red_thing", "grass", "sky"]),
        )
    for part in ("train", "val", "test"):
        for name in ("dark", "light"):
            place = root / "transfer" / "shades" / part / name
            place.mkdir(parents=True)
            for i in range(4):
                shade = r.integers(0, 100, (40, 48, 3)) + (150 if name == "light" else 0)
                Image.fromarray(shade.astype(np.uint8)).save(place / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with six emoji in both styles and no photos."""
    root = tmp_path_factory.mktemp("data")
    r = np.random.default_rng(0)
    for style, ending, side in (("noto", "png", 64), ("fluent", "webp", 96)):
        place = root / "emoji" / style
        place.mkdir(parents=True)
        rows = []
        for i, name in enumerate(NAMES):
            rgba = np.zeros((side, side, 4), np.uint8)
            rgba[8:-8, 8:-8] = (*r.integers(0, 255, 3), 255)
            Image.fromarray(rgba).save(place / f"{i}.{ending}")
            rows.append(
                {"file_name": f"{i}.{ending}", "text": name, "keywords": [name, "thing"], "category": "Objects"}
            )
        (place / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def autoencoder_config(folder: Path, out: Path, steps: int = 2) -> autoencoder.Config:
    """A model of a few thousand weights."""
    return autoencoder.Config(
        data=folder,
        out=out,
        steps=steps,
        batch=2,
        widths=(8, 8, 8, 16),
        groups=4,
        latent_channels=4,
        evaluate=4,
        warmup=1,
        workers=2,
    )


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a trained tokenizer and autoencoder."""
    out = tmp_path_factory.mktemp("runs")
    tokenizer.main(tokenizer.Config(data=folder, out=out / "tokenizer", size=700, length=16))
    figures = autoencoder.main(autoencoder_config(folder, out / "autoencoder"))
    assert np.isfinite(figures["psnr_noto"])
    return out


def diffusion_config(
    folder: Path, runs: Path, out: Path, steps: int = 2, **settings: object
) -> stable_diffusion.Config:
    """A pipeline of some ten thousand weights."""
    return stable_diffusion.Config(
        data=folder,
        out=out,
        autoencoder=runs / "autoencoder" / "model",
        tokenizer=runs / "tokenizer",
        assets=out / "assets",
        steps=steps,
        batch=4,
        widths=(16, 16),
        text_width=16,
        text_layers=1,
        views=2,
        clip=out / "tiny-clip",
        judged=6,
        evaluate=6,
        warmup=1,
        workers=2,
        **settings,  # type: ignore[arg-type]
    )


def test_composites_are_keyed_by_seed_and_step(folder: Path) -> None:
    emoji = data.load_emoji(folder, "noto")
    assert [e.names[0] for e in emoji] == ["red ball", "blue box", "apple", "scissors", "green leaf", "house"]
    draws = [data.draw_layout(data.rng(0, "test", step, 3), 1) for step in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    assert (data.compose(emoji[1], draws[0]) == data.compose(emoji[1], draws[1])).all()
    for i in range(200):
        layout = data.draw_layout(data.rng(0, "inside", 0, i), 0)
        assert 0 <= layout.left <= data.SIZE - layout.size and 0 <= layout.top <= data.SIZE - layout.size


def test_background_and_caption_say_what_is_drawn(folder: Path) -> None:
    emoji = data.load_emoji(folder, "noto")
    layout = data.Layout(2, "blue", "blue", 48, 8, 8)
    assert tuple(data.compose(emoji[2], layout)[0, 0]) == data.COLOURS["blue"]
    assert data.plain_caption(emoji[2], layout) == "a drawing of an apple on a blue background"
    assert data.with_article("scissors") == "scissors"
    texts = {data.caption(data.rng(0, "caption", 0, i), emoji[2], layout) for i in range(300)}
    assert "a photo of an apple" in texts and len(texts) > 20


def test_missing_data_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be the folder that holds"):
        data.load_emoji(tmp_path, "noto")


def test_tokenizer_encodes_any_text(trained: Path) -> None:
    from transformers import CLIPTokenizer

    loaded = CLIPTokenizer.from_pretrained(trained / "tokenizer")
    for text in ("a photo of sks dog", "größe 日本 🍓 ~\\^", "zyx"):
        ids = loaded(text).input_ids
        assert loaded.unk_token_id not in ids[1:-1]
        assert loaded.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert (trained / "tokenizer" / "vocab.json").exists() and (trained / "tokenizer" / "merges.txt").exists()
    assert loaded("", padding="max_length", return_tensors="pt").input_ids.shape == (1, 16)


def test_autoencoder_resumes_exactly(folder: Path, trained: Path, tmp_path: Path) -> None:
    whole = autoencoder.main(autoencoder_config(folder, tmp_path / "whole", steps=4))
    in_two_runs(lambda: autoencoder.main(autoencoder_config(folder, tmp_path / "parts", steps=4)))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert autoencoder.main(autoencoder_config(folder, tmp_path / "parts", steps=4)) == whole
    assert not list(tmp_path.rglob("*.tmp"))


def in_two_runs(run: Callable[[], object]) -> None:
    """Stops a run of four steps as SIGTERM does, after the second; the next may make three steps at most, which are
    too few for one that begins anew."""
    for steps in (2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "Stop", partial(AskedAfter, steps))
            run()


class AskedAfter(loop.Stop):
    """A stop that is asked for after n looks."""

    def __init__(self, n: int) -> None:
        self.left = n

    @property
    def asked(self) -> bool:  # type: ignore[override]
        self.left -= 1
        return self.left < 0


def test_stable_diffusion_trains_exports_and_loads(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr(stable_diffusion.sd_card, "SHEET", ("an apple on blue", "a house"))
    monkeypatch.setattr(stable_diffusion.sd_card, "STEPS", 2)
    config = diffusion_config(folder, trained, tmp_path)
    figures = stable_diffusion.main(config)
    assert 0 <= figures["ground_by_colour"] <= 1 and np.isfinite(figures["psnr_fluent"])
    pipe = StableDiffusionPipeline.from_pretrained(config.assets, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("an apple", num_inference_steps=2, height=64, width=64, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()
    assert pipe.vae.config.scaling_factor != 0.18215
    assert {"README.md", "samples.png", "model_index.json"} <= {f.name for f in config.assets.iterdir()}
    assert {"vocab.json", "merges.txt"} <= {f.name for f in (config.assets / "tokenizer").iterdir()}
    assert not any(str(tmp_path) in f.read_text() for f in config.assets.rglob("*.json"))
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.tmp"))


def vit_config(photos: Path, out: Path, **settings: object) -> vit.Config:
    """A ViT of some ten thousand weights."""
    return vit.Config(
        data=photos,
        out=out,
        assets=out / "tiny-vit",
        batch=8,
        width=24,
        depth=1,
        held_out=4,
        scratch_epochs=1,
        warmup=1,
        **settings,  # type: ignore[arg-type]
    )


@pytest.fixture
def small_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained ViT of one block in place of the data folder's."""
    size = {"img_size": 98, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_small_patch14_dinov2", **size).eval()
    monkeypatch.setattr(teacher, "dino", lambda data: SimpleNamespace(model=model))


def test_vit_learns_exports_and_resumes_exactly(photos: Path, tmp_path: Path, small_teacher: None) -> None:
    torch.manual_seed(0)
    whole = vit.main(vit_config(photos, tmp_path / "whole", steps=4))
    assert {"top1", "teacher_test", "probe_shades", "scratch_shades", "probe_mean"} <= whole.keys()
    model = timm.create_model(f"local-dir:{tmp_path / 'whole' / 'tiny-vit'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["red thing", "grass", "sky"]
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", ignore=lambda _, names: {"state.safetensors"} & set(names))
    parts = vit_config(photos, tmp_path / "parts", steps=4)
    in_two_runs(lambda: vit.main(parts))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_contrastive_trains_exports_and_resumes_exactly(photos: Path, trained: Path, tmp_path: Path) -> None:
    import open_clip

    def config(out: Path) -> contrastive.Config:
        return contrastive.Config(
            data=photos,
            out=out,
            tokenizer=trained / "tokenizer",
            vit=None,
            assets=out / "tiny-clip",
            steps=4,
            emoji=4,
            photos=4,
            warmup=1,
            width=24,
            depth=1,
            text_width=20,
            text_depth=1,
            joint=16,
            held_out=4,
            evaluate=5,
        )

    figures = contrastive.main(config(tmp_path / "whole"))
    assert {"caption_to_picture", "ground", "zero_shot"} <= figures.keys()
    folder = tmp_path / "whole" / "tiny-clip"
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(["An apple", "größe"])
    assert torch.isfinite(model(torch.rand(2, 3, 64, 64), ids)[0]).all()
    in_two_runs(lambda: contrastive.main(config(tmp_path / "parts")))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs ended in the same state."""
    a, b = (load_file(run / "state.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_image_tower_starts_where_the_vit_stands(tmp_path: Path) -> None:
    """Token by token: a ViT on a picture, and the tower on the picture with every pixel doubled."""
    import open_clip

    size = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "pre_norm": True}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **size).eval()
    tower = {"image_size": 64, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8}
    clip = open_clip.CLIP(16, tower, {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1})
    for p in model.parameters():  # large, or the class token, which is read, would see nothing of the patches
        torch.nn.init.normal_(p, std=0.3)
    torch.nn.init.normal_(model.pos_embed)  # and as large as the patches, whose scale would be lost in the norm
    contrastive.start_from(model, clip.visual)
    x = torch.randn(2, 3, 32, 32)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    got = clip.visual(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    # timm's layer norm adds 1e-6 to the variance, open_clip's 1e-5
    torch.testing.assert_close(got, expected @ clip.visual.proj, rtol=2e-3, atol=2e-3)


def test_captions_fit_every_picture_that_they_describe(photos: Path, trained: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    c = contrastive.Config(photos, tmp_path, vit=None, emoji=8, photos=12, held_out=4)
    pairs = contrastive.Pairs(c, CLIPTokenizer.from_pretrained(trained / "tokenizer"))
    x, ids, fits = pairs.batch(3, 1)
    assert x.shape == (14, 3, 64, 64) and ids.shape == (14, 16) and fits.shape == (14, 14)
    assert fits.diagonal().eq(1).all(), "a caption fits its own picture"
    assert not fits[:8, 8:].any() and not fits[8:, :8].any(), "emoji and photos are told apart"
    assert fits[8:, 8:].sum() > 6, "photos of one class fit one another's captions"
    others = torch.stack([pairs.batch(step, 0)[2][:4, 4:8].diagonal() for step in range(20)])
    assert 0.1 < others.mean() < 0.9, (
        "the other picture of an emoji fits where the caption does not name another ground"
    )
    again = pairs.batch(3, 1)
    assert all(torch.equal(a, b) for a, b in zip((x, ids, fits), again, strict=True))


def test_evaluation_names_what_the_card_has_wrong(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = {"top1": 0.5, "psnr_noto": 28.0}
    monkeypatch.setattr(evaluate, "asset", lambda name: tmp_path)
    monkeypatch.setitem(evaluate.MEASURE, "tiny-vit", lambda c: now)
    config = evaluate.Config(data=photos, models=("tiny-vit",))
    publish.write_figures(tmp_path, {"step": 7, "top1": 0.504, "psnr_noto": 28.05})
    assert evaluate.main(config) == 0, "within what machines may differ by"
    publish.write_figures(tmp_path, {"step": 7, "top1": 0.51, "psnr_noto": 28.05})
    assert evaluate.main(config) == 1
    assert "differs" in capsys.readouterr().out
    publish.write_figures(tmp_path, {"top1": 0.5})
    assert evaluate.main(config) == 1, "a figure that the card keeps quiet about"
    with pytest.raises(InputError, match="no embedded model tiny-gan"):
        evaluate.main(evaluate.Config(data=photos, models=("tiny-gan",)))


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with publish.replacing(folder) as place:
        (place / "a").write_text("1")
    with pytest.raises(RuntimeError), publish.replacing(folder) as place:
        (place / "b").write_text("2")
        raise RuntimeError("no space")
    assert [f.name for f in folder.iterdir()] == ["a"]
    with publish.replacing(folder) as place:
        (place / "c").write_text("3")
    assert [f.name for f in folder.iterdir()] == ["c"] and [f.name for f in tmp_path.iterdir()] == ["model"]


def test_orthogonalise_flattens_the_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((2, 8, 40), (2, 40, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3
