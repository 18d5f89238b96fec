"""The benchmark of all methods, end to end with a few updates on pictures of its own, and its verdicts by hand."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vismodal as vm
from vismodal.data.emoji import HELD_OUT_MODULUS
from vismodal.methods import METHODS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "assets" / "tiny-vit").is_dir(), reason="needs the embedded models")
SIZES = {"tiny-vit": {"name": "two"}, "tiny-clip": {"name": "two", "shots": 2}}
SIZES["tiny-sd"] = {"emoji": 2, "held_out": 3, "val": 1, "views": 1}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import methods

    return methods


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of random pictures, and emoji of which some are held out."""
    root, r = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for name in ("cat", "dog"):
            folder = root / "transfer" / "two" / part / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(r.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    stems = [f"{i:04x}" for i in range(200)]
    held = [s for s in stems if zlib.crc32(s.encode()) % HELD_OUT_MODULUS == 0][:3]
    stems = [*held, *[s for s in stems if zlib.crc32(s.encode()) % HELD_OUT_MODULUS][:4]]
    for style in ("noto", "fluent"):
        folder, rows = root / "emoji" / style, []
        folder.mkdir(parents=True)
        for i, stem in enumerate(stems):
            rgba = r.integers(0, 255, (64, 64, 4), np.uint8)
            Image.fromarray(rgba).save(folder / f"{stem}.png")
            text = "penguin" if i == len(stems) - 1 else f"thing {i}"
            rows.append({"file_name": f"{stem}.png", "text": text, "keywords": [], "category": "Objects"})
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def config(bench: Any, data: Path, out: Path, **more: Any) -> Any:
    chosen = {"quick": True, "jobs": 1, "threads": 1, "rounds": 1, "sizes": SIZES, **more}
    return bench.Config(data=data, out=out / "methods", **chosen)


def test_every_model_is_measured_once_and_the_page_tells(
    bench: Any, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    bench.main(config(bench, data, tmp_path, methods=("LoRA", "Tip-Adapter")))
    rows = [r for r in bench.read(tmp_path / "methods.jsonl") if "method" in r]
    assert [(r["model"], r["label"]) for r in rows] == [
        ("tiny-vit", "LoRA"), ("tiny-clip", "LoRA"), ("tiny-clip", "Tip-Adapter"), ("tiny-sd", "LoRA"),
    ]  # fmt: skip
    assert not any("failed" in r for r in rows)
    lora, tip = rows[0], rows[2]
    assert lora["parameters"] == 6 * 2 * (192 + 192) * 8 and lora["bytes"] > 4 * lora["parameters"]
    assert lora["kept"] > 0 and lora["ms"] > 0 and len(lora["tried"]) >= 2
    assert lora["lr"] == float(min(lora["tried"], key=lora["tried"].get))
    assert tip["parameters"] == 0 and tip["lr"] is None and tip["ms"] is None
    page = (tmp_path / "methods.md").read_text()
    assert all(f"## {name}" in page for name in bench.NAMES) and "| LoRA | reparameterised" in page
    with Image.open(tmp_path / "methods.png") as picture:
        assert picture.width > 1000
    monkeypatch.setattr(bench, "measured", lambda job: pytest.fail(f"{job.label} was measured again"))
    bench.main(config(bench, data, tmp_path, methods=("LoRA", "Tip-Adapter")))


def test_a_method_that_fails_is_shown_and_tried_again(bench: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    settings = {"models": ("tiny-vit",), "methods": ("VPT", "LinearProbe"), "rounds": 0}
    with monkeypatch.context() as patch:
        patch.setattr(vm.VPT, "build", lambda self, sites: 1 / 0)
        bench.main(config(bench, data, tmp_path, **settings))
    page = (tmp_path / "methods.md").read_text()
    assert "| VPT |" in page and "failed: ZeroDivisionError" in page and "| LinearProbe |" in page
    bench.main(config(bench, data, tmp_path, **settings))
    assert "failed" not in (tmp_path / "methods.md").read_text()


def test_everything_in_the_registry_runs_somewhere(bench: Any) -> None:
    everywhere = [c.method for name in bench.NAMES for c in bench.contestants(name).values()]
    # nothing steers a contestant, and no task has a prompt whose words could learn
    assert {type(m) for m in everywhere if m} == {m for m in METHODS if not m.conditioned} - {vm.TextualInversion}


def test_unknown_names_and_missing_data_are_told(bench: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(vm.InputError, match="no method 'lorax'"):
        bench.main(config(bench, data, tmp_path, methods=("lorax",)))
    with pytest.raises(vm.InputError, match="write --data FOLDER"):
        bench.main(config(bench, tmp_path / "nowhere", tmp_path, models=("tiny-vit",)))


def test_the_rate_is_climbed_to_from_both_sides(bench: Any) -> None:
    from contest import RATES, TRIALS, climb

    def loss(best: float) -> Any:
        return lambda rate: abs(RATES.index(rate) - RATES.index(best))

    assert climb(1e-3, loss(1e-2)) == {1e-3: 2, 3e-3: 1, 1e-2: 0, 3e-2: 1}  # upwards while it falls
    assert climb(1e-2, loss(1e-3)) == {1e-2: 2, 3e-2: 3, 3e-3: 1, 1e-3: 0, 3e-4: 1}  # or else downwards
    assert climb(1e-3, loss(1e-3)).keys() == {1e-3, 3e-3, 3e-4}
    assert climb(3e-1, loss(3e-1)).keys() == {3e-1, 1e-1}
    assert climb(1e-3, lambda rate: float("inf")).keys() == {1e-3, 3e-3, 3e-4}
    assert len(climb(1e-5, lambda rate: -rate)) == TRIALS


def test_lift_and_its_error_are_of_pairs(bench: Any) -> None:
    from contest import compared
    from page import learns
    from tasks import Judged

    base, mine = torch.tensor([0.0, 0, 1, 1]), torch.tensor([1.0, 1, 1, 0])
    row = compared({"_": Judged(0.0, mine)}, Judged(0.0, base))
    assert row["lift"] == 0.25
    assert row["error"] == pytest.approx(np.std([1, 1, 0, -1], ddof=1) / 2)
    assert not learns(row) and learns({"lift": 0.21, "error": 0.1})


def test_a_probe_is_fitted_to_features_and_chosen_on_validation(bench: Any) -> None:
    from tasks import Classes, Labelled

    class Points(Classes):
        pass

    r = torch.Generator().manual_seed(0)
    x = torch.randn(60, 1, 1, 4, generator=r)
    y = (x[:, 0, 0, 0] > 0).long()
    each = Points()
    each.parts = {p: Labelled(x[i::3], y[i::3], ("a", "b")) for i, p in enumerate(("train", "val", "test"))}
    head, found = each.probe(lambda x: x.flatten(1))
    assert found["test"].scores.mean() > 0.8 and len(found["test"].scores) == 20
    test = each.parts["test"]  # the layer takes features as they are, not standardised ones
    right = (head(test.x.flatten(1).double()).argmax(1) == test.y).float()
    assert torch.equal(right, found["test"].scores) and head.weight[:, 0].abs().sum() > head.weight[:, 1:].abs().sum()
