"""Learning to classify pictures: the loss, the scores, and the epoch that is kept.

Selection sees validation data only: `Validation` scores them after every epoch and keeps the adapter of the best one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vismodal.adapter import Adapter
from vismodal.callbacks import Callback, Log, read_log
from vismodal.checkpoint import read, save
from vismodal.classification.vision import logits_of
from vismodal.data.views import View, Views
from vismodal.draw import seed_of
from vismodal.errors import InputError
from vismodal.files import write_file
from vismodal.methods import Method
from vismodal.prefix.frozen import FrozenPrefix
from vismodal.train import Micro

BEST = "best.safetensors"
EPOCHS = "validation.jsonl"
RESULT = "result.json"


# -- from pictures to a loss -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """Each row with its neighbour: row i becomes share_i x_i + (1 - share_i) x_{other_i}. mixup, arXiv 1710.09412."""

    share: Tensor  # b
    other: Tensor  # b

    def __call__(self, x: Tensor) -> Tensor:
        share = self.share.to(x).view(-1, *[1] * (x.dim() - 1))
        return share * x + (1 - share) * x[self.other.to(x.device)]


Run = nn.Module | FrozenPrefix


def see(run: Run, views: Views, seen: Sequence[View], mix: Mix | None = None) -> Tensor:
    """Logits, b C: the one place where pictures meet the model, or what keeps the output of its frozen part."""
    device = next(model_of(run).parameters()).device
    if isinstance(run, FrozenPrefix) and mix is None:
        keys: list[Hashable] = [views.key(view) for view in seen]
        by_key: dict[Hashable, View] = dict(zip(keys, seen, strict=True))
        return logits_of(run(lambda missing: views.pixels([by_key[key] for key in missing]).to(device), keys))
    pixels = views.pixels(seen).to(device)
    return logits_of(model_of(run)(pixels if mix is None else mix(pixels)))


def model_of(run: Run) -> nn.Module:
    """The model itself."""
    return run.model if isinstance(run, FrozenPrefix) else run


@torch.no_grad()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """b C of pixels b 3 h w, in fp32 on the CPU, of a model in eval mode."""
    return logits_of(model(pixels.to(next(model.parameters()).device))).float().cpu()


@dataclass(frozen=True)
class Objective:
    """Cross-entropy.

    Args:
        classes: C.
        batch: pictures of a micro-batch on each process.
        smoothing: share of the target that all classes get alike.
        mixup: alpha of mixup's Beta(alpha, alpha); 0 is off.
    """

    classes: int
    batch: int
    smoothing: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if self.mixup and self.batch % 2:
            raise InputError(f"mixup mixes pairs, so batch must be even, not {self.batch}")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"label_smoothing must be at least 0 and below 1, not {self.smoothing}")

    def loss(self, run: Run, views: Views) -> Callable[[Micro], Mapping[str, Tensor]]:
        """The loss of a micro-batch, for `fit`; its accuracy beside it, unless pictures are mixed."""

        def of(micro: Micro) -> Mapping[str, Tensor]:
            places = micro.positions(self.batch)
            seen = [views.at(micro.seed, place) for place in places]
            labels = views.labels[[view.picture for view in seen]]
            mix = self._mix(micro.seed, places) if self.mixup else None
            targets = F.one_hot(labels, self.classes).float()
            logits = see(run, views, seen, mix).float()
            targets = (targets if mix is None else mix(targets)).to(logits.device)
            values = {"loss": F.cross_entropy(logits, targets, label_smoothing=self.smoothing)}
            if mix is None:
                values["accuracy"] = (logits.detach().argmax(1) == labels.to(logits.device)).float().mean()
            return values

        return of

    def _mix(self, seed: int, places: range) -> Mix:
        """Pairs of neighbours, so that the number of processes does not matter; each row draws its own share."""
        shares = [np.random.default_rng(seed_of(seed, "mixup", p)).beta(self.mixup, self.mixup) for p in places]
        return Mix(torch.tensor(shares, dtype=torch.float32), torch.tensor([i ^ 1 for i in range(len(places))]))


def calibrate(adapter: Adapter, loss: Callable[[Micro], Mapping[str, Tensor]], seed: int, batches: int = 8) -> None:
    """Shows the first batches to methods that choose by data (SparseMask), all of them on every process."""
    if all(type(method).calibrating is Method.calibrating for method in adapter.methods.values()):
        return
    with torch.random.fork_rng(devices=[]), adapter.calibrating():
        for index in range(batches):
            torch.default_generator.manual_seed(seed_of(seed, "calibrating", index))
            loss(Micro(seed, 0, index))["loss"].backward()
    for parameter in adapter.parameters():
        parameter.grad = None


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Share of right answers, mean of the classes' F1, mean cross-entropy, and counts by true and given class."""

    accuracy: float
    macro_f1: float
    loss: float
    confusion: list[list[int]]


@torch.no_grad()
def answers(
    run: Run, views: Views, batch: int, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Tensor:
    """Logits, n C, in eval mode, in fp32 on the CPU."""
    model, parts = model_of(run), []
    training = model.training
    model.eval()
    try:
        for start in tqdm(
            range(0, len(views), batch), desc="scoring", unit="batch", delay=5, leave=False, disable=None
        ):
            seen = [View(i) for i in range(start, min(start + batch, len(views)))]
            with autocast():
                parts.append(see(run, views, seen).float().cpu())
    finally:
        model.train(training)
    return torch.cat(parts)


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Counted by torchmetrics."""
    from torchmetrics.functional import classification as counted

    classes = logits.shape[1]
    return Scores(
        accuracy=float(counted.multiclass_accuracy(logits, labels, classes, average="micro")),
        macro_f1=float(counted.multiclass_f1_score(logits, labels, classes, average="macro")),
        loss=float(F.cross_entropy(logits, labels)),
        confusion=counted.multiclass_confusion_matrix(logits, labels, classes).tolist(),
    )


class Validation(Callback):
    """Scores validation data after every `every` steps and after the last, and keeps the adapter where it was best.

    `folder` gets a line for each in validation.jsonl, and best.safetensors: highest accuracy, of equal ones the lowest
    loss, of these the first. After a resume, lines of steps that are to be made again are dropped.
    """

    def __init__(self, scores: Callable[[], Scores], adapter: Adapter, folder: Path, every: int, epoch: int) -> None:
        self.scores, self.adapter, self.folder, self.every, self.epoch = scores, adapter, folder, every, epoch

    def begin(self, step: int, total: int) -> None:
        self.total = total
        self.log = Log(self.folder / EPOCHS, step)
        if step and not any(row["step"] == step for row in read_log(self.folder / EPOCHS)):
            self._maybe(step)

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        self._maybe(step)

    def _maybe(self, step: int) -> None:
        if step % self.every and step != self.total:
            return
        found = self.scores()
        row = {"epoch": step / self.epoch, "accuracy": found.accuracy, "macro_f1": found.macro_f1, "loss": found.loss}
        before = read_log(self.folder / EPOCHS)
        if not before or _rank(row) > max(map(_rank, before)):
            save(self.adapter, self.folder / BEST)
        self.log.write(step, row)


def best_epoch(folder: Path) -> dict[str, float]:
    """The line of validation.jsonl whose adapter was kept."""
    return max(read_log(folder / EPOCHS), key=_rank)  # the first of equal ones, as in `Validation`


def restore_best(adapter: Adapter, folder: Path) -> None:
    """The best epoch's tensors."""
    adapter.load_state_dict(read(folder / BEST)[1])


def finished(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The figures of a run that came to its end here with the same settings; None where there is none."""
    file = folder / RESULT
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return cast("dict[str, Any]", told["figures"]) if told.get("identity") == identity else None


def finish(folder: Path, identity: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Leaves what `finished` finds."""
    write_file(folder / RESULT, json.dumps({"identity": identity, "figures": figures}, indent=1) + "\n")


def _rank(row: Mapping[str, float]) -> tuple[float, float]:
    return row["accuracy"], -row["loss"]
