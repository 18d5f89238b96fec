"""Trains tiny-vit: a timm `VisionTransformer` of 32 px on CIFAR-100, taught by labels and by a larger ViT.

    python pipelines/pretrain/vit.py --data ../shared/data --assets assets/tiny-vit

Knowledge distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531): the teacher is the ViT-S/14 of the data
folder with a linear probe; its features of a few views of each picture are cached first (`teacher.py`). The student
learns the labels, the probe's softened answers and the teacher's features. The class token is read and the stream is
normalised before the first block, as in CLIP, so that tiny-clip's image tower can start from these weights. Run again
with the same `--out` to resume; `--export_only true` writes the newest checkpoint to `--assets` and ends.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
import transfer
import vit_card
from cifar import hold_out, jitter, load_cifar, normalise
from jsonargparse import auto_cli
from loop import Schedule, Workers
from muon import Muon, split
from teacher import cache_features, fit_probe, view_of
from timm.models import VisionTransformer
from torch import Tensor, nn
from trainer import Trainer

from vismodal.data.emoji import rng

ARCHITECTURE = "vit_tiny_patch16_224"
OUTER = ("patch_embed", "pos_embed", "cls_token", "vit.head", "to_teacher")  # trained by Adam, not by Muon


@dataclass(frozen=True)
class Config:
    """Settings of the run.

    The share `small` of it is on pictures of `small_side` px, which costs half. `views` of each picture are shown to
    the teacher; `labels` is the weight of the labels against the teacher's answers, `features` that of its features.
    `scratch_epochs` is what the card's models from scratch get; `most` takes fewer pictures, for a trial.
    """

    data: Path
    out: Path = Path("runs/pretrain/tiny-vit")
    assets: Path = Path("assets/tiny-vit")
    seed: int = 0
    steps: int = 20000
    minutes: float = 60
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 100
    small: float = 0.6
    small_side: int = 24
    width: int = 192
    depth: int = 6
    heads: int = 3
    views: int = 2
    labels: float = 0.5
    features: float = 1.0
    temperature: float = 1.5
    held_out: int = 1000
    scratch_epochs: int = transfer.Config.epochs
    most: int | None = None
    export_only: bool = False
    workers: int = 2


def model_args(c: Config) -> dict[str, Any]:
    """What distinguishes the model from timm's `vit_tiny_patch16_224`."""
    return {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": c.width,
        "depth": c.depth,
        "num_heads": c.heads,
        "pre_norm": True,
    }


class Student(nn.Module):
    """The ViT, and a linear map from its class token to the teacher's features, which is not exported."""

    def __init__(self, c: Config, classes: int, teacher: int) -> None:
        super().__init__()
        vit = timm.create_model(ARCHITECTURE, num_classes=classes, dynamic_img_size=True, **model_args(c))
        self.vit = cast(VisionTransformer, vit)
        self.to_teacher = nn.Linear(c.width, teacher)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b, classes] and guessed features [b, teacher] of normalised pictures."""
        token = self.vit.forward_head(self.vit.forward_features(x), pre_logits=True)
        return self.vit.head(token), self.to_teacher(token)


def loss_of(c: Config, model: nn.Module, x: Tensor, labels: Tensor, answers: Tensor, features: Tensor) -> Tensor:
    """labels * CE(label) + (1 - labels) * T^2 * KL(teacher || student) + features * (1 - cos)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, guessed = model(x)
    logits, t = logits.float(), c.temperature
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1)
    soft = F.kl_div((logits / t).log_softmax(1), (answers / t).log_softmax(1), log_target=True, reduction="batchmean")
    alike = F.cosine_similarity(guessed.float(), features, dim=1).mean()
    return c.labels * hard + (1 - c.labels) * t * t * soft + c.features * (1 - alike)


class Lessons:
    """Batches of (pictures, labels, the teacher's answers and features) keyed by step."""

    def __init__(self, c: Config) -> None:
        self.c = c
        everything = load_cifar(c.data, "train", c.most)
        rows, held = hold_out(len(everything), c.held_out, c.seed)
        self.train, self.validation = everything.subset(rows), everything.subset(held)
        shown = [view_of(everything.pictures, k, c.seed) for k in range(c.views)]
        cached = [
            cache_features(c.data, view, c.out / f"teacher-train-{k}.safetensors", c.workers)
            for k, view in enumerate(shown)
        ]
        if any(len(features) != len(everything) for features in cached):
            raise ValueError(f"cached features of other pictures: delete {c.out}/teacher-*.safetensors")
        self.views, self.features = [view[rows] for view in shown], [features[rows] for features in cached]
        torch.set_num_threads(c.workers)
        self.probe = fit_probe(self.features, self.train.labels, len(everything.classes), c.seed)
        test = load_cifar(c.data, "test", c.most)
        answers = self.probe(cache_features(c.data, test.pictures, c.out / "teacher-test.safetensors", c.workers))
        self.teacher = accuracy(answers, test.labels)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All pictures in turn, in a new order each time round, each as one of its views."""
        place = np.arange(step * self.c.batch, (step + 1) * self.c.batch)
        turns, within = np.divmod(place, len(self.train))
        orders = {t: rng(self.c.seed, "order", int(t)).permutation(len(self.train)) for t in np.unique(turns)}
        rows = [int(orders[t][k]) for t, k in zip(turns, within, strict=True)]
        r = rng(self.c.seed, "lesson", step)
        views = r.integers(self.c.views, size=len(rows))
        pictures = torch.stack([self.views[k][i] for k, i in zip(views, rows, strict=True)])
        features = torch.stack([self.features[k][i] for k, i in zip(views, rows, strict=True)]).float()
        return normalise(jitter(pictures, r, 3)), self.train.labels[rows], self.probe(features), features


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels).float().mean().item()


class VitTrainer(Trainer[Student]):
    """The run of tiny-vit."""

    def __init__(self, c: Config) -> None:
        torch.manual_seed(c.seed)
        self.c, self.lessons = c, Lessons(c)
        model = Student(c, len(self.lessons.train.classes), self.lessons.features[0].shape[1])
        workers = Workers(model, c.workers)
        optimizer = Muon(*split(model, OUTER), lr=c.lr, pool=workers.pool)
        super().__init__("tiny-vit", c.out, model, workers, optimizer, Schedule(c.lr, c.steps, c.minutes, c.warmup))

    def losses(self, step: int) -> list[Callable[[], Tensor]]:
        """Consecutive parts of the batch, at first in few pixels."""
        x, *rest = self.lessons.batch(step)
        if self.schedule.progress < self.c.small:
            x = F.interpolate(x, (self.c.small_side,) * 2, mode="bicubic", antialias=True)
        parts = zip(*(t.chunk(self.c.workers) for t in (x, *rest)), strict=True)
        return [partial(loss_of, self.c, self.model, *part) for part in parts]

    def measure(self) -> dict[str, float]:
        """Accuracy on the held-out pictures."""
        held = self.lessons.validation
        return {"validation": accuracy(transfer.logits(self.average.copy.vit, held.pictures), held.labels)}

    def write_assets(self) -> dict[str, float]:
        """Measured as they are loaded from there."""
        c, run = self.c, self.figures | {"teacher_test": self.lessons.teacher}
        classes = self.lessons.train.classes
        return vit_card.write_assets(self.average.copy.vit, classes, run, c.data, c.scratch_epochs, c.assets)


def main(c: Config) -> dict[str, float]:
    """Trains, or only exports."""
    trainer = VitTrainer(c)
    return trainer.export() if c.export_only else trainer.train()


if __name__ == "__main__":
    print(json.dumps(main(auto_cli(Config, as_positional=False)), indent=1))
