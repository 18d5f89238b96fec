"""A photographed subject comes closer on the embedded model, by the features of a real pretrained ViT."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not (DATA / "dreambooth").is_dir(), reason="needs the data folder beside the checkout")
@pytest.mark.skipif(not (ROOT / "assets" / "tiny-sd").is_dir(), reason="needs the embedded tiny-sd")
def test_dog6_comes_closer_and_the_base_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.spec_from_file_location("subject", ROOT / "benchmarks" / "subject.py")
    assert spec is not None
    assert spec.loader is not None
    subject = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "subject", subject)
    spec.loader.exec_module(subject)
    found = subject.measure(subject.Config(data=DATA), tmp_path / "run")  # raises if the base has changed
    assert found["adapter"] > found["base"], found
