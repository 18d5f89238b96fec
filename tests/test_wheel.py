"""The wheel carries the pipelines and the embedded files: installed outside the checkout, the main job runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, ROOT, cwd=out)
    (path,) = out.glob("vismodal-*.whl")
    return path


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    models = ("tiny-sd/model_index.json", "tiny-clip/open_clip_config.json", "tiny-vit/config.json")
    for wanted in (
        "pipelines/dreambooth.py",
        "apps/studio/app.py",
        "assets/subject/1.png",
        *(f"assets/{m}" for m in models),
        "adapter.py",
    ):
        assert f"vismodal/{wanted}" in names
    assert not [n for n in names if n.startswith(("tests", "runs", "benchmarks")) or "__pycache__" in n]


def test_what_is_embedded_stays_small() -> None:
    size = sum(f.stat().st_size for f in (ROOT / "assets").rglob("*") if f.is_file())
    assert size <= 40e6, f"assets/ holds {size / 1e6:.1f} MB; at most 40 are promised"


def test_installed_elsewhere_it_trains(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    small = ("--steps", "2", "--sample_steps", "2", "--sample_count", "1", "--output", "out")
    said = run("-m", "vismodal.cli", "dreambooth", *small, cwd=tmp_path, PYTHONPATH=str(site))
    assert "sheet.png" in said
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    where = run("-c", "import vismodal; print(vismodal.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert where.startswith(str(site))  # not the checkout
