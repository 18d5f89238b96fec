"""How well a ViT's features transfer: a linear probe on small image folders, against training the same architecture on
them from scratch.

    python pipelines/pretrain/transfer.py --data ../shared/data --model assets/tiny-vit

The probe is a softmax regression on the standardised class token; its strength of regularisation is chosen on `val`,
and `test` is reported. From scratch: `epochs` rounds by Muon with shifts and mirroring, the rate falling by a cosine.
"""

import json
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

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
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


@torch.no_grad()
def outputs(model: VisionTransformer, pictures: Tensor, tokens: bool, workers: int = 2) -> Tensor:
    """Class tokens [n, d] or logits [n, classes] of uint8 pictures, in fp32."""

    def compute(part: Tensor) -> Tensor:
        with torch.no_grad():  # a thread's own
            return model.forward_head(model.forward_features(normalise(part)), pre_logits=tokens)

    with single_core_threads(workers) as pool:
        return torch.cat(list(pool.map(compute, pictures.split(125))))


def probe(model: VisionTransformer, parts: dict[str, Labelled], workers: int) -> float:
    """Test accuracy of the linear probe."""
    features = {name: outputs(model, part.pictures, True, workers).double().numpy() for name, part in parts.items()}
    mean, deviation = features["train"].mean(0), features["train"].std(0) + 1e-6
    scaled = {name: (f - mean) / deviation for name, f in features.items()}
    labels = {name: part.labels.numpy() for name, part in parts.items()}
    fitted = [LogisticRegression(C=c, max_iter=2000).fit(scaled["train"], labels["train"]) for c in STRENGTHS]
    best = max(fitted, key=lambda f: f.score(scaled["val"], labels["val"]))
    return float(best.score(scaled["test"], labels["test"]))


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
    logits = outputs(model.eval(), parts["test"].pictures, False, c.workers)
    return (logits.argmax(1) == parts["test"].labels).float().mean().item()


def classify(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with label smoothing 0.1."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)


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
