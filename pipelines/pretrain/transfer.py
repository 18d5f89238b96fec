"""How well a ViT's features transfer: a linear probe on small image folders, against training the same architecture on
them from scratch.

    python pipelines/pretrain/transfer.py --data ../shared/data --model assets/tiny-vit

The probe is DINOv2's (Oquab et al. 2023, https://arxiv.org/abs/2304.07193, appendix B.3): a softmax regression on the
class tokens of the last block or the last four, with or without the mean patch tokens, standardised; which of them,
and the strength of regularisation, is chosen on `val`, and `test` is reported. From scratch: `epochs` rounds by Muon
with shifts and mirroring, the rate falling by a cosine.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from cifar import Labelled, jitter, normalise
from jsonargparse import auto_cli
from loop import Schedule, Workers, single_core_threads
from muon import Muon, split
from sklearn.linear_model import LogisticRegression
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from vismodal.data.emoji import rng

STRENGTHS = (0.0001, 0.001, 0.01, 0.1, 1.0)
CHOICES: tuple[Callable[[Tensor], Tensor], ...] = (  # of features [n, blocks, 2, d]
    lambda f: f[:, -1, :1],
    lambda f: f[:, -1],
    lambda f: f[:, -4:, :1],
    lambda f: f[:, -4:],
)
OUTER = ("patch_embed", "pos_embed", "cls_token", "head")  # trained by Adam, not by Muon


@dataclass(frozen=True)
class Config:
    """Which model on which data; `epochs` of training from scratch, 0 to leave it out."""

    data: Path
    model: Path = Path("assets/tiny-vit")
    epochs: int = 30
    batch: int = 32
    lr: float = 1e-3
    seed: int = 0
    workers: int = 2


def load_vit(folder: Path) -> VisionTransformer:
    """The model in evaluation mode, fp32, as timm loads it."""
    return cast(VisionTransformer, timm.create_model(f"local-dir:{folder}", pretrained=True).eval())


def load_folder(folder: Path, side: int) -> Labelled:
    """A folder of one folder a class, the middle square of each picture in `side` px."""
    to_square = v2.Compose([v2.Resize(side, v2.InterpolationMode.BICUBIC), v2.CenterCrop(side), v2.PILToTensor()])
    found = ImageFolder(str(folder), transform=to_square)
    pictures, labels = zip(*found, strict=True)
    return Labelled(torch.stack(pictures), torch.tensor(labels), tuple(found.classes))


def logits(model: VisionTransformer, pictures: Tensor, workers: int = 2) -> Tensor:
    """fp32 [n, classes] of uint8 pictures."""
    return mapped(model, pictures, workers)


def features(model: VisionTransformer, pictures: Tensor, workers: int = 2) -> Tensor:
    """fp32 [n, blocks, 2, d]: after each block, and the last norm, the class token and the mean patch token."""

    def blocks(x: Tensor) -> Tensor:
        found = model.get_intermediate_layers(x, n=len(model.blocks), return_prefix_tokens=True, norm=True)
        return torch.stack([torch.stack([prefix[:, 0], patches.mean(1)], 1) for patches, prefix in found], 1)

    return mapped(blocks, pictures, workers)


def mapped(model: Callable[[Tensor], Tensor], pictures: Tensor, workers: int) -> Tensor:
    """What the model says of all pictures."""

    def compute(part: Tensor) -> Tensor:
        with torch.no_grad():  # a thread's own
            return model(normalise(part))

    with single_core_threads(workers) as pool:
        return torch.cat(list(pool.map(compute, pictures.split(125))))


def probe(model: VisionTransformer, parts: dict[str, Labelled], workers: int) -> float:
    """Test accuracy of the linear probe that is best on `val`, of all strengths on each choice of features."""
    seen = {name: features(model, part.pictures, workers) for name, part in parts.items()}
    labels = {name: part.labels.numpy() for name, part in parts.items()}
    tried = []
    for choose in CHOICES:
        chosen = {name: choose(f).flatten(1).double().numpy() for name, f in seen.items()}
        mean, deviation = chosen["train"].mean(0), chosen["train"].std(0) + 1e-6
        scaled = {name: (f - mean) / deviation for name, f in chosen.items()}
        for strength in STRENGTHS:
            fitted = LogisticRegression(C=strength, max_iter=1000).fit(scaled["train"], labels["train"])
            tried.append(tuple(float(fitted.score(scaled[part], labels[part])) for part in ("val", "test")))
    return max(tried, key=lambda scores: scores[0])[1]


def from_scratch(c: Config, parts: dict[str, Labelled], mirror: bool) -> float:
    """Test accuracy of the same architecture after training on `train` alone."""
    torch.manual_seed(c.seed)
    train = parts["train"]
    fresh = timm.create_model(f"local-dir:{c.model}", pretrained=False, num_classes=len(train.classes))
    model = cast(VisionTransformer, fresh)
    workers = Workers(model, c.workers)
    optimizer = Muon(*split(model, OUTER), lr=c.lr, pool=workers.pool)
    steps = c.epochs * (len(train) // c.batch)
    schedule = Schedule(c.lr, steps, minutes=1e9, warmup=50)
    for step in tqdm(range(steps), "from scratch", mininterval=5, leave=False):
        turn, k = divmod(step, len(train) // c.batch)
        rows = torch.from_numpy(rng(c.seed, "order", turn).permutation(len(train))[k * c.batch : (k + 1) * c.batch])
        x = normalise(jitter(train.pictures[rows], rng(c.seed, "shift", step), 3, mirror))
        schedule.step = step
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate()
        pieces = zip(x.chunk(c.workers), train.labels[rows].chunk(c.workers), strict=True)
        workers.backward([partial(classify, model, *piece) for piece in pieces])
        optimizer.step()
    answers = logits(model.eval(), parts["test"].pictures, c.workers).argmax(1)
    return (answers == parts["test"].labels).float().mean().item()


def classify(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with label smoothing 0.1."""
    with torch.autocast("cpu", torch.bfloat16):
        answers = model(x)
    return F.cross_entropy(answers.float(), labels, label_smoothing=0.1)


def measure(c: Config) -> dict[str, dict[str, float]]:
    """Accuracy on the test part of every folder of `transfer/`: {name: {probe, scratch}}, and their means."""
    model = load_vit(c.model)
    side, result = model.patch_embed.img_size[0], {}
    for folder in sorted((c.data / "transfer").iterdir()):
        parts = {part: load_folder(folder / part, side) for part in ("train", "val", "test")}
        result[folder.name] = {"probe": probe(model, parts, c.workers)}
        if c.epochs:
            # a mirrored 3 or a mirrored arrow is another class
            mirror = not folder.name.startswith(("handdigits", "signs"))
            result[folder.name]["scratch"] = from_scratch(c, parts, mirror)
    columns = {k for row in result.values() for k in row}
    return result | {"mean": {k: float(np.mean([row[k] for row in result.values()])) for k in sorted(columns)}}


if __name__ == "__main__":
    print(json.dumps(measure(auto_cli(Config, as_positional=False)), indent=1))
