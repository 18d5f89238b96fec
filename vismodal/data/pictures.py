"""Pictures of many files: decoded in parallel, and kept in memory as far as they fit.

Kept(paths, cut, size)              what one makes of each picture, by number: what `Pictures` and `Views` stand on
Pictures(paths, preprocess)         3 h w of each, as a model reads them
usable(paths)                       which files hold a picture, and why the others do not
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from vismodal.data.decode import Unusable
from vismodal.data.photos import Rejected, read_picture
from vismodal.draw import seed_of
from vismodal.errors import InputError, one_line

A = TypeVar("A")
B = TypeVar("B")
KEEP = 2 << 30  # bytes of pictures that stay in memory
_THREADS = 16  # at most: Pillow lets others run while it decodes


class Kept(Generic[A]):
    """What `make` makes of the pictures in files, by number.

    Args:
        paths: their files, all of which can be read; `usable` says which can.
        make: what is to be made of a PIL picture. Called in several threads: it may draw nothing at random.
        size: bytes of one result.
        keep: bytes of memory that they may fill; what does not fit is made anew.
    """

    def __init__(
        self, paths: Sequence[Path], make: Callable[[Image.Image], A], size: Callable[[A], int], keep: int = KEEP
    ) -> None:
        self.paths, self.make, self.size, self.left = list(paths), make, size, keep
        self.kept: dict[int, A] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, items: Iterable[int]) -> list[A]:
        """Those of these numbers, in this order."""
        items = list(items)
        missing = [i for i in dict.fromkeys(items) if i not in self.kept]
        made = in_parallel(self._made, missing)
        new = dict(zip(missing, made, strict=True))
        for i, result in new.items():
            size = self.size(result)
            if size <= self.left:
                self.kept[i], self.left = result, self.left - size
        return [self.kept[i] if i in self.kept else new[i] for i in items]

    def _made(self, number: int) -> A:
        return self.make(self._read(number))

    def _read(self, number: int) -> Image.Image:
        try:
            return read_picture(self.paths[number])
        except Unusable as error:
            raise InputError(
                f"{self.paths[number]} was a picture when the run began, and is so no more: {error}"
            ) from error


class Pictures(Kept[Tensor]):
    """The pictures of files, by number, 3 h w each.

    Args:
        paths: their files, all of which can be read; `usable` says which can.
        preprocess: a PIL picture -> 3 h w.
        keep: bytes of memory that they may fill; what does not fit is decoded anew.
    """

    def __init__(self, paths: Sequence[Path], preprocess: Callable[[Image.Image], Tensor], keep: int = KEEP):
        super().__init__(paths, preprocess, lambda picture: picture.numel() * picture.element_size(), keep)
        self.preprocess = preprocess

    def batch(self, items: Iterable[int]) -> Tensor:
        """n 3 h w."""
        return torch.stack(self.get(items))

    def augmented(self, items: Sequence[int], keys: Sequence[tuple[int | str, ...]], size: int) -> Tensor:
        """n 3 h w: of each a random part, mirrored half of the times, as its key has it."""
        images = in_parallel(self._read, items)
        return torch.stack([self.preprocess(cropped(im, size, *key)) for im, key in zip(images, keys, strict=True)])


def cropped(image: Image.Image, size: int, *key: int | str) -> Image.Image:
    """A square of `size` pixels made of half of the picture or more, mirrored or not, drawn by the key alone: what
    CoOp's and Tip-Adapter's official code trains on."""
    transform = v2.Compose([
        v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.default_generator.manual_seed(seed_of(*key))
        changed: Image.Image = transform(image)
    return changed


def usable(paths: Sequence[Path]) -> tuple[list[int], list[Rejected]]:
    """The places of the files that hold a picture, and the others with the reason. Every file is decoded once."""
    reasons = in_parallel(_why_not, paths)
    good = [i for i, reason in enumerate(reasons) if reason is None]
    return good, [Rejected(p, one_line(r)) for p, r in zip(paths, reasons, strict=True) if r is not None]


def _why_not(path: Path) -> str | None:
    try:
        read_picture(path)
    except Unusable as error:
        return str(error)
    return None


def in_parallel(run: Callable[[A], B], items: Sequence[A], doing: str | None = None) -> list[B]:
    """`run` of each item, in order, in several threads; with a bar where `doing` says what takes so long."""
    bar = partial(
        tqdm, total=len(items), desc=doing, unit="file", delay=2, leave=False, disable=None if doing else True
    )
    with ThreadPoolExecutor(max(1, min(_THREADS, os.cpu_count() or 1, len(items)))) as pool:
        return list(bar(pool.map(run, items) if len(items) > 1 else map(run, items)))
