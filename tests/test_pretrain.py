"""Smoke runs of the pretraining scripts: each end to end at a tiny size, on pictures made here."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).parent.parent / "pipelines" / "pretrain"
sys.path.insert(0, str(SCRIPTS))

import autoencoder  # noqa: E402
import loop  # noqa: E402
import stable_diffusion  # noqa: E402
import tokenizer  # noqa: E402
from muon import orthogonalise  # noqa: E402

from vismodal.data import emoji as data  # noqa: E402
from vismodal.errors import InputError  # noqa: E402

NAMES = ("red ball", "blue box", "apple", "scissors", "green_leaf", "house")


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
    figures = autoencoder.train(autoencoder_config(folder, out / "autoencoder"))
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
    whole = autoencoder.train(autoencoder_config(folder, tmp_path / "whole", steps=4))
    config = autoencoder_config(folder, tmp_path / "parts", steps=4)
    with pytest.MonkeyPatch.context() as patch:
        # stops as SIGTERM does, after the second step
        patch.setattr(autoencoder, "Stop", lambda: AskedAfter(2))
        autoencoder.train(config)
    assert autoencoder.train(config) == whole
    assert not list(tmp_path.rglob("*.tmp"))


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

    monkeypatch.setattr(stable_diffusion.card, "SHEET", ("an apple on blue", "a house"))
    monkeypatch.setattr(stable_diffusion.card, "STEPS", 2)
    config = diffusion_config(folder, trained, tmp_path)
    figures = stable_diffusion.main(config)
    assert 0 <= figures["background_accuracy"] <= 1
    pipe = StableDiffusionPipeline.from_pretrained(config.assets, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("an apple", num_inference_steps=2, height=64, width=64, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()
    assert pipe.vae.config.scaling_factor != 0.18215
    assert {"README.md", "samples.png", "model_index.json"} <= {f.name for f in config.assets.iterdir()}
    assert {"vocab.json", "merges.txt"} <= {f.name for f in (config.assets / "tokenizer").iterdir()}
    assert not any(str(tmp_path) in f.read_text() for f in config.assets.rglob("*.json"))
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.tmp"))


def test_orthogonalise_flattens_the_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((2, 8, 40), (2, 40, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3
