"""The file of a classifier's adapter: beside the tensors, all that predicting needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vismodal.adapter import Adapter
from vismodal.checkpoint import read, save
from vismodal.classification.vision import Source, Vision, as_json
from vismodal.errors import InputError

HEADER = "classification"  # entry of an adapter file's header


@dataclass(frozen=True)
class Classifier:
    """What the file of a classifier's adapter says of the model that it belongs to."""

    source: Source
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any]


def save_classifier(adapter: Adapter, path: Path, source: Source, vision: Vision, classes: Sequence[str]) -> Path:
    """The adapter with its base model's name, its classes and the preprocessing: all that `predict` needs."""
    entry = {**as_json(source), "classes": list(classes), "preprocessing": dict(vision.config)}
    return save(adapter, path, {HEADER: json.dumps(entry, ensure_ascii=False)})


def read_classifier(path: Path) -> Classifier:
    """Raises `InputError` where the file is no adapter, or not that of a classifier."""
    header, _ = read(path)
    if HEADER not in header:
        raise InputError(f"{path} is no classifier: it was not written by vismodal classify, but by another pipeline")
    return classifier_of(header[HEADER])


def classifier_of(text: str) -> Classifier:
    """What the header's entry says."""
    entry = json.loads(text)
    source = Source(**{name: entry[name] for name in asdict(Source()) if name in entry})
    return Classifier(source, tuple(entry["classes"]), entry["preprocessing"])
