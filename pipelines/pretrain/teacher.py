"""What the data folder's ViT-S says of CIFAR-100: features of a few views of each picture, computed once, and a linear
probe on them.

Distillation from cached outputs needs teacher and student to see the same view (Beyer et al. 2022,
https://arxiv.org/abs/2106.05237), so the views are drawn beforehand: the whole picture, and mirrored crops.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from loop import single_core_threads
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from vismodal.data.emoji import rng
from vismodal.evaluation.judge import dino

SIDE = 98
CHUNK = 64  # pictures a forward
PART = 1024  # pictures a file is extended by


def view_of(pictures: Tensor, k: int, seed: int) -> Tensor:
    """View `k` of uint8 pictures [n, 3, s, s], in the same size: the whole for k = 0, else a crop of 50 to 100% of the
    area, mirrored half of the time; the same for the same number of pictures and seed."""
    if k == 0:
        return pictures
    n, _, _, side = pictures.shape
    r = rng(seed, "view", k)
    sides = np.round(side * np.sqrt(r.uniform(0.5, 1, n))).astype(int)
    views = []
    for picture, crop, mirrored, (u, v) in zip(pictures, sides, r.random(n) < 0.5, r.random((n, 2)), strict=True):
        y, x = int(u * (side - crop + 1)), int(v * (side - crop + 1))
        part = picture[None, :, y : y + crop, x : x + crop].float()
        part = F.interpolate(part, (side, side), mode="bilinear", antialias=False)[0].round().to(torch.uint8)
        views.append(part.flip(2) if mirrored else part)
    return torch.stack(views)


@torch.no_grad()
def features_of(model: nn.Module, pictures: Tensor) -> Tensor:
    """Class token and mean patch token, half precision [n, 768], of uint8 pictures of any size."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows = []
    for part in pictures.split(CHUNK):
        x = F.interpolate(part.float() / 255, (SIDE, SIDE), mode="bicubic").clamp(0, 1)
        # inside the thread that computes: autocast and no_grad are a thread's own
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            tokens = model.forward_features((x - mean) / std)  # type: ignore[operator]
        rows.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1).half())
    return torch.cat(rows)


def cache_features(data: Path, pictures: Tensor, file: Path, workers: int) -> Tensor:
    """`features_of` the pictures, kept in `file`, in parts of its own beside it until it is whole."""
    if file.exists():
        return load_file(file)["features"]
    file.parent.mkdir(parents=True, exist_ok=True)
    model = dino(data).model

    def compute(i: int) -> Tensor:
        part = file.with_name(f"{file.stem}-{i:03d}.part")
        if not part.exists():
            _write(part, features_of(model, pictures[i * PART : (i + 1) * PART]))
        return load_file(part)["features"]

    count = -(-len(pictures) // PART)
    with single_core_threads(workers) as pool:
        features = torch.cat(list(tqdm(pool.map(compute, range(count)), file.stem, count, mininterval=5)))
    _write(file, features)
    for part in file.parent.glob(f"{file.stem}-*.part"):
        part.unlink()
    return features


def _write(file: Path, features: Tensor) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    save_file({"features": features}, temporary)
    os.replace(temporary, file)


@dataclass(frozen=True)
class Probe:
    """Linear classifier on standardised features: logits = ((f - mean) / std) weight^T + bias."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return F.linear((features.float() - self.mean) / self.std, self.weight, self.bias)


def fit_probe(views: list[Tensor], labels: Tensor, classes: int, seed: int, epochs: int = 12) -> Probe:
    """Softmax regression by AdamW over all views, the rate falling linearly to zero."""
    features = torch.cat(views).float()
    targets = labels.repeat(len(views))
    mean, std = features.mean(0), features.std(0) + 1e-3
    features = (features - mean) / std
    layer = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-3, weight_decay=0.05)
    batches = -(-len(targets) // 512)
    for step in tqdm(range(epochs * batches), "probe", mininterval=5):
        epoch, i = divmod(step, batches)
        rows = torch.from_numpy(rng(seed, "probe", epoch).permutation(len(targets))[i * 512 : (i + 1) * 512])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / (epochs * batches))
        optimizer.zero_grad()
        F.cross_entropy(layer(features[rows]), targets[rows], label_smoothing=0.1).backward()
        optimizer.step()
    return Probe(mean, std, layer.weight.detach(), layer.bias.detach())
