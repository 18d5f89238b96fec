"""CIFAR-100 as the data folder holds it: JPEG files in a row, with labels and class names."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vismodal.data.emoji import rng
from vismodal.errors import InputError

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@dataclass(frozen=True)
class Labelled:
    """Pictures uint8 [n, 3, 32, 32], labels int64 [n] and the names of the classes."""

    pictures: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: Tensor) -> "Labelled":
        """The rows with these numbers."""
        return Labelled(self.pictures[rows], self.labels[rows], self.classes)


def load_cifar(data: Path, part: str, most: int | None = None) -> Labelled:
    """The `train` or `test` part, or `most` pictures spread over it; class names in plain words.

    Raises InputError where the file is missing.
    """
    file = data / f"cifar100_{part}.npz"
    if not file.exists():
        raise InputError(f"{file} is missing: `data` must be the folder that holds cifar100_train.npz and its test")
    stored = np.load(file)
    blob, offsets = stored["jpeg"].tobytes(), stored["offsets"]
    total = len(offsets) - 1
    rows = np.arange(total) if most is None else np.linspace(0, total - 1, min(most, total)).astype(int)
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]]))) for i in rows])
    labels = torch.from_numpy(stored["label"][rows].astype(np.int64))
    classes = tuple(str(name).replace("_", " ") for name in stored["classes"])
    return Labelled(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), labels, classes)


def hold_out(total: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of the pictures to train on, and of `count` that are held out, each in order."""
    order = torch.from_numpy(rng(seed, "held out").permutation(total))
    return order[count:].sort().values, order[:count].sort().values


def normalise(pictures: Tensor) -> Tensor:
    """uint8 [b, 3, h, w] to float with CIFAR-100's mean and deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pictures.float() / 255 - mean) / std


def jitter(pictures: Tensor, r: np.random.Generator, most: int, mirror: bool = True) -> Tensor:
    """Each picture moved by up to `most` pixels over reflected edges, and, with `mirror`, mirrored half of the time."""
    side = pictures.shape[-1]
    padded = torch.nn.functional.pad(pictures.float(), (most,) * 4, mode="reflect").to(pictures.dtype)
    corners, mirrored = r.integers(0, 2 * most + 1, (len(pictures), 2)), r.random(len(pictures)) < mirror / 2
    moved = [
        p[:, y : y + side, x : x + side].flip(2) if m else p[:, y : y + side, x : x + side]
        for p, (y, x), m in zip(padded, corners, mirrored, strict=True)
    ]
    return torch.stack(moved)
