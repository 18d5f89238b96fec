"""Labelled pictures as a model sees them while it learns: plain, or augmented, each view drawn by its own key.

A view is (picture, version). Version 0 of an unaugmented picture is what evaluation sees. Augmented ones have a new
version in every epoch, or `copies` of them in turn; a view depends on the seed and its key alone, so that a run which
is resumed, cached or shared among processes sees the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vismodal.data.folder import Item
from vismodal.data.pictures import KEEP, Kept
from vismodal.draw import seed_of, shuffled
from vismodal.errors import InputError


class View(NamedTuple):
    """A picture's number, and which of its versions."""

    picture: int
    version: int = 0


@dataclass(frozen=True)
class Augment:
    """What changes a training picture.

    Args:
        crop: least share of the picture's area that a random crop shows; 1 shows it as evaluation does.
        flip: mirror half of them.
        randaugment: magnitude, 1 to 30, of two operations of RandAugment (arXiv 1909.13719); 0 is off.
        copies: how many augmented versions of each picture there are; 0 makes a new one for every epoch.
    """

    crop: float = 1.0
    flip: bool = False
    randaugment: int = 0
    copies: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise InputError(f"crop must be above 0 and at most 1, not {self.crop}")
        if not 0 <= self.randaugment <= 30:
            raise InputError(f"randaugment must be from 0 to 30, not {self.randaugment}")
        if self.copies < 0:
            raise InputError(f"copies must be at least 0, not {self.copies}")

    @property
    def random(self) -> bool:
        return self.crop < 1 or self.flip or self.randaugment > 0


PLAIN = Augment()


class Views:
    """The views of some items, with their labels (n).

    Args:
        items: labelled files.
        config: the model's preprocessing, in timm's terms.
        augment: what changes them; `PLAIN` for evaluation.
        seed: of the changes.
        keep: bytes of memory that pictures may fill; those that do not fit are decoded at every use.
    """

    def __init__(
        self,
        items: Sequence[Item],
        config: Mapping[str, Any],
        augment: Augment = PLAIN,
        seed: int = 0,
        keep: int = KEEP,
    ) -> None:
        self.items, self.augment, self.seed = tuple(items), augment, seed
        self.labels = torch.tensor([item.label for item in items])
        cut, self.finish = evaluation(config)
        self.change = training(config, augment, cut) if augment.random else None
        # what is the same for all views of a picture is done once, and kept
        once: Callable[[Image.Image], Image.Image] = cut if self.change is None else lambda image: image
        self.pictures = Kept([item.path for item in items], once, lambda p: 3 * p.width * p.height, keep)

    def __len__(self) -> int:
        return len(self.items)

    def at(self, seed: int, position: int) -> View:
        """What an endless reading in shuffled epochs shows at a position."""
        epoch, picture = position // len(self), shuffled(seed, "pictures", len(self), position)
        if not self.augment.random:
            return View(picture)
        return View(picture, epoch % self.augment.copies if self.augment.copies else epoch)

    def key(self, view: View) -> tuple[str | int, ...]:
        """What a view's pixels follow from, besides the preprocessing: the file's content, and what changes it."""
        content = self.items[view.picture].content
        return (content, self.seed, *view) if self.augment.random else (content,)

    def pixels(self, views: Sequence[View]) -> Tensor:
        """b 3 h w."""
        pictures = self.pictures.get(view.picture for view in views)
        return torch.stack([self._finished(view, p) for view, p in zip(views, pictures, strict=True)])

    def _finished(self, view: View, picture: Image.Image) -> Tensor:
        if self.change is not None:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator of the CPU
                torch.default_generator.manual_seed(seed_of(self.seed, "augment", *view))
                picture = self.change(picture)
        return self.finish(picture)


def evaluation(
    config: Mapping[str, Any],
) -> tuple[Callable[[Image.Image], Image.Image], Callable[[Image.Image], Tensor]]:
    """timm's transform for evaluation in two steps: to a picture of the model's size, and from there to 3 h w."""
    from timm.data import create_transform
    from timm.data.transforms import MaybeToTensor
    from torchvision.transforms import Compose

    steps = create_transform(**config, is_training=False).transforms
    first = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
    return Compose(steps[:first]), Compose(steps[first:])


def training(
    config: Mapping[str, Any], augment: Augment, cut: Callable[[Image.Image], Image.Image]
) -> Callable[[Image.Image], Image.Image]:
    """The random changes, of a PIL picture to one of the model's size."""
    from timm.data.transforms import str_to_interp_mode
    from torchvision.transforms import v2

    size, mode = list(config["input_size"][1:]), str_to_interp_mode(config["interpolation"])
    random_crop = v2.RandomResizedCrop(size, scale=(augment.crop, 1.0), interpolation=mode)
    steps: list[Callable[[Any], Any]] = [random_crop if augment.crop < 1 else cut]
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.randaugment:
        grey = [round(255 * mean) for mean in config["mean"]]  # what moves in from outside the picture
        steps.append(v2.RandAugment(2, augment.randaugment, fill=grey))
    return v2.Compose(steps)
