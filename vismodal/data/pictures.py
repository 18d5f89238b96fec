"""Pictures of many files as a model reads them, decoded in parallel and kept in memory as far as they fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from vismodal.data.decode import Unusable
from vismodal.data.photos import Rejected, read_picture
from vismodal.draw import seed_of
from vismodal.errors import one_line

A = TypeVar("A")
B = TypeVar("B")
KEEP = 2 << 30  # bytes of pictures that stay in memory
_FREE = 16  # decoding threads at most: Pillow lets others run


class Pictures:
    """The pictures of files, by number, 3 h w each.

    Args:
        paths: their files, all of which can be read; `usable` says which can.
        preprocess: a PIL picture -> 3 h w.
        keep: bytes of memory that they may fill; what does not fit is decoded anew.
    """

    def __init__(self, paths: Sequence[Path], preprocess: Callable[[Image.Image], Tensor], keep: int = KEEP):
        self.paths, self.preprocess, self.left = list(paths), preprocess, keep
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, items: Iterable[int]) -> Tensor:
        """n 3 h w."""
        items = list(items)
        missing = [i for i in dict.fromkeys(items) if i not in self.kept]
        made = _in_parallel(lambda i: self.preprocess(read_picture(self.paths[i])), missing)
        new = dict(zip(missing, made, strict=True))
        for i, picture in new.items():
            size = picture.numel() * picture.element_size()
            if size <= self.left:
                self.kept[i], self.left = picture, self.left - size
        return torch.stack([self.kept[i] if i in self.kept else new[i] for i in items])

    def augmented(self, items: Sequence[int], keys: Sequence[tuple[int | str, ...]], size: int) -> Tensor:
        """n 3 h w: of each a random part, mirrored half of the times, as its key has it."""
        images = _in_parallel(lambda i: read_picture(self.paths[i]), items)
        return torch.stack([self.preprocess(cropped(im, size, *key)) for im, key in zip(images, keys, strict=True)])


def cropped(image: Image.Image, size: int, *key: int | str) -> Image.Image:
    """A square of `size` pixels made of half of the picture or more, mirrored or not, drawn by the key alone: what
    CoOp's and Tip-Adapter's official code trains on."""
    transform = v2.Compose([
        v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(seed_of(*key))
        changed: Image.Image = transform(image)
    return changed


def usable(paths: Sequence[Path]) -> tuple[list[int], list[Rejected]]:
    """The places of the files that hold a picture, and the others with the reason. Every file is decoded once."""
    reasons = _in_parallel(_why_not, paths)
    good = [i for i, reason in enumerate(reasons) if reason is None]
    return good, [Rejected(p, one_line(r)) for p, r in zip(paths, reasons, strict=True) if r is not None]


def _why_not(path: Path) -> str | None:
    try:
        read_picture(path)
    except Unusable as error:
        return str(error)
    return None


def _in_parallel(run: Callable[[A], B], items: Sequence[A]) -> list[B]:
    if len(items) < 2:
        return [run(item) for item in items]
    with ThreadPoolExecutor(min(_FREE, os.cpu_count() or 1, len(items))) as pool:
        return list(pool.map(run, items))
