"""Say what is in pictures, by an adapter that `vismodal classify` made. Its file knows its base model and its classes.

    vismodal predict --adapter runs/classify-1/adapter.safetensors a.jpg b.png
    vismodal predict --adapter pets.safetensors --json photos/ > answers.json
    vismodal predict --adapter pets.safetensors --data newer_pets    # labelled: how many are right

The same from Python: `main(Config(adapter=Path("pets.safetensors"), images=(Path("a.jpg"),)))`.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator

import vismodal as vm
from vismodal import runs
from vismodal.classification.classifier import Classifier, read_classifier
from vismodal.classification.learning import answers, logits, score
from vismodal.classification.vision import EMBEDDED, Vision, load_vision
from vismodal.data.decode import Unusable
from vismodal.data.folder import read_labelled
from vismodal.data.photos import listing, read_picture
from vismodal.data.views import Views
from vismodal.errors import InputError, one_line
from vismodal.table import table


@dataclass(frozen=True)
class Config:
    """Say what is in pictures, by an adapter of vismodal classify.

    Args:
        adapter: file that vismodal classify wrote: adapter.safetensors.
        images: pictures, or folders of pictures.
        data: folder DIR/CLASS/*.jpg instead: how many are right. Its classes must be the adapter's.
        model: base model, where it is not to be found as the file names it; with `weights`, if it needs any.
        weights: checkpoint file of the base model, where it is not to be found as the file names it.
        top: how many classes to name for each picture, the likeliest first.
        json: print JSON instead of a table.
        batch: pictures in a forward pass.
        threads: of the CPU; torch's own choice, or 1 with the embedded model.
    """

    adapter: Path | None = None
    images: tuple[Path, ...] = ()
    data: Path | None = None
    model: str | None = None
    weights: str | None = None
    top: int = 1
    json: bool = False
    batch: int = 32
    threads: int | None = None

    POSITIONAL: ClassVar[str] = "images"


Answer = dict[str, Any]


def main(config: Config) -> list[Answer]:
    """Prints and gives the answers: for each picture its file and the likeliest classes with their probabilities."""
    if config.adapter is None:
        raise InputError("the adapter is missing; write --adapter FILE, the adapter.safetensors of vismodal classify")
    if not config.images and config.data is None:
        raise InputError("no pictures; write their files, such as a.jpg, or --data FOLDER with a folder for each class")
    if config.images and config.data is not None:
        raise InputError(f"--data {config.data} is for labelled pictures and {config.images[0]} for others; give one")
    runs.at_least(config, 1, "top", "batch", *(["threads"] if config.threads is not None else []))
    file = read_classifier(config.adapter)
    if config.model or config.weights:
        source = replace(file.source, model=config.model or file.source.model, weights=config.weights)
        file = replace(file, source=source)
    threads = config.threads or (1 if file.source.model == EMBEDDED else torch.get_num_threads())
    with runs.cpu_threads(threads):
        vision = load(config.adapter, file)
        return check(config, file, vision) if config.data else predict(config, file, vision)


def load(adapter: Path, file: Classifier) -> Vision:
    """The base model with the adapter on it, and the file's preprocessing."""
    vision = load_vision(file.source, len(file.classes))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        vm.load(vision.model, adapter, "predict")
    for warning in caught:  # the base has other values than the one that the adapter was made on
        print(f"warning: {warning.message}; the answers may be wrong", file=sys.stderr)
    vision.model.to(Accelerator().device).eval()
    return Vision(vision.model, file.preprocessing)


def predict(config: Config, file: Classifier, vision: Vision) -> list[Answer]:
    """The likeliest classes of each picture. Files that cannot be used are named on stderr."""
    found: list[Answer] = []
    waiting: list[tuple[Path, torch.Tensor]] = []
    for path in files(config):
        try:
            waiting.append((path, vision.preprocess(read_picture(path))))
        except Unusable as error:
            print(one_line(f"skipped {path}: {error}"), file=sys.stderr)
        if len(waiting) == config.batch:
            found += answered(waiting, config.top, file, vision)
            waiting = []
    if waiting:
        found += answered(waiting, config.top, file, vision)
    if not found:
        raise InputError("none of the files is a usable picture")
    tell(config, found)
    return found


def answered(pictures: list[tuple[Path, torch.Tensor]], top: int, file: Classifier, vision: Vision) -> list[Answer]:
    """The answers to a batch."""
    shares = logits(vision.model, torch.stack([pixels for _, pixels in pictures])).softmax(1)
    shares, given = shares.topk(min(top, len(file.classes)))
    return [
        {
            "file": str(path),
            "classes": [
                {"class": file.classes[c], "probability": p} for c, p in zip(names.tolist(), row.tolist(), strict=True)
            ],
        }
        for (path, _), row, names in zip(pictures, shares, given, strict=True)
    ]


def files(config: Config) -> Iterator[Path]:
    """The pictures: those that are named, and those directly in a folder that is named."""
    for path in (image.expanduser() for image in config.images):
        if os.path.isdir(path):
            yield from (inside for inside in listing(path) if not os.path.isdir(inside))
        else:
            yield path


def tell(config: Config, found: list[Answer]) -> None:
    """The answers as a table, a line for each class that is named, or as JSON."""
    if config.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    rows = [
        [one_line(answer["file"]) if i == 0 else "", each["class"], f"{100 * each['probability']:.1f}%"]
        for answer in found
        for i, each in enumerate(answer["classes"])
    ]
    print(table(["file", "class", "probability"], rows))


def check(config: Config, file: Classifier, vision: Vision) -> list[Answer]:
    """How many labelled pictures are right. Raises `InputError` if the classes are not the adapter's."""
    assert config.data is not None
    items, notes = read_labelled(config.data.expanduser(), file.classes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    views = Views(items, vision.config)
    given = answers(vision.model, views, config.batch)
    scores = score(given, views.labels)
    right = {"pictures": len(items), "accuracy": scores.accuracy, "macro_f1": scores.macro_f1}
    if config.json:
        print(
            json.dumps({**right, "classes": file.classes, "confusion": scores.confusion}, indent=1, ensure_ascii=False)
        )
    else:
        figures = f"{100 * scores.accuracy:.1f}% right, macro-F1 {100 * scores.macro_f1:.1f}%"
        print(f"{config.data}: {len(items)} pictures in {len(file.classes)} classes, {figures}")
    return [right]


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["predict", *sys.argv[1:]]))
