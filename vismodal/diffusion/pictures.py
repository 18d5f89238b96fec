"""Pictures as a training reads them: an endless reading whose every row is drawn by key, cut, mirrored and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from vismodal.data.masks import mask_values
from vismodal.data.photos import cut
from vismodal.data.shapes import bucket, cut_box
from vismodal.diffusion.encode import draw_latents, encode_images
from vismodal.diffusion.kinds import Frame, Pipe
from vismodal.draw import shuffled
from vismodal.errors import InputError
from vismodal.train import Micro

Crop = Literal["center", "random"]


class Row(NamedTuple):
    """One row of a batch: its latent (1, c, h, w), prompt and frame, and what each place of it counts (1, 1, h, w)."""

    latent: Tensor
    prompt: str
    frame: Frame
    mask: Tensor | None = None


@dataclass(frozen=True)
class Masks:
    """Grey pictures, one for each picture or None: what is white counts 1, what is black `floor`."""

    images: Sequence[Image.Image | None]
    floor: float = 0.0


class Reading(Protocol):
    """An endless reading of rows."""

    name: str

    def draw(self, micro: Micro, place: int) -> Row: ...


class Pictures:
    """An endless shuffled reading of pictures: which one comes when, how it is cut, and its latent are drawn by key.

    Args:
        name: of the set ("instance", "class"), part of every key: two sets draw independently.
        prompts: one for each picture.
        size: side of the square in pixels.
        cache: encode once, keeping mean and deviation (for a picture and its mirror image), where `crop` allows it.
        sizes: (width, height) of each picture as it was found, where it has been resized since.
        grid: where it is given, pictures keep their shape: as many pixels as the square, the sides multiples of this.
        masks: what of the pictures counts.
        drop: share of the rows that have the empty prompt instead of theirs.

    Raises `InputError` for a mask of which the part that is cut is black.
    """

    def __init__(
        self,
        pipe: Pipe,
        name: str,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        *,
        size: int,
        crop: Crop = "center",
        flip: bool = False,
        cache: bool = True,
        sizes: Sequence[tuple[int, int]] | None = None,
        grid: int | None = None,
        masks: Masks | None = None,
        drop: float = 0.0,
    ) -> None:
        self.pipe, self.name, self.images, self.prompts = pipe, name, images, prompts
        self.sizes = sizes or [image.size for image in images]
        self.crop, self.flip, self.masks, self.drop = crop, flip, masks, drop
        self.shapes = [bucket(*image.size, size, grid) if grid else (size, size) for image in images]  # height, width
        self.cached: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        if crop == "center":
            self._check_masks()
        if cache and crop == "center":
            for index in range(len(images)):
                for mirrored in (False, True)[: 1 + flip]:
                    self.cached[index, mirrored] = self._encode(index, self._box(index), mirrored)

    def draw(self, micro: Micro, place: int) -> Row:
        """The row at one place of the reading."""
        index = shuffled(micro.seed, self.name, len(self.images), place)
        mirrored = self.flip and bool(torch.randint(2, (), generator=micro.generator(f"{self.name} flip", place)))
        box = self._box(index, micro.generator(f"{self.name} crop", place) if self.crop == "random" else None)
        if (index, mirrored) in self.cached:
            mean, std = self.cached[index, mirrored]
        else:
            mean, std = self._encode(index, box, mirrored)
        noise = torch.randn(mean.shape, generator=micro.generator(f"{self.name} latent", place))
        latent = draw_latents(self.pipe, mean, std, noise.to(mean))
        mask = self._mask(index, box, mirrored, latent.shape[-2:]).to(latent.device) if self.masks else None
        return Row(latent, self._prompt(micro, place, index), self._frame(index, box, mirrored), mask)

    def _box(self, index: int, generator: torch.Generator | None = None) -> tuple[float, float, float, float]:
        """What is cut out of a picture, in its pixels: left, top, right, bottom."""
        return cut_box(*self.images[index].size, self.shapes[index], generator)

    def _prompt(self, micro: Micro, place: int, index: int) -> str:
        if self.drop and torch.rand((), generator=micro.generator(f"{self.name} drop", place)) < self.drop:
            return ""
        return self.prompts[index]

    def _frame(self, index: int, box: tuple[float, float, float, float], mirrored: bool) -> Frame:
        left, top, right, bottom = box
        original, scale = self.sizes[index], self.shapes[index][0] / (bottom - top)
        across = self.images[index].width - right if mirrored else left
        return Frame((original[1], original[0]), (round(top * scale), round(across * scale)), self.shapes[index])

    def _mask(self, index: int, box: tuple[float, float, float, float], mirrored: bool, shape: Sequence[int]) -> Tensor:
        """What each place of the latent counts, 1 1 h w."""
        assert self.masks is not None
        image, (h, w) = self.masks.images[index], shape
        if image is None:
            return torch.ones(1, 1, h, w)
        values = mask_values(image, (h, w), box)
        counts = self.masks.floor + (1 - self.masks.floor) * (values.flip(-1) if mirrored else values)
        return counts[None, None]

    def _check_masks(self) -> None:
        for index in range(len(self.images) if self.masks else 0):
            if not self._mask(index, self._box(index), False, self.shapes[index]).any():
                raise InputError(
                    f"the mask of picture {index + 1} is black in the square that is cut out of its middle; write "
                    "--crop random, --buckets true, or a --mask_floor above 0"
                )

    def _encode(self, index: int, box: tuple[float, float, float, float], mirrored: bool) -> tuple[Tensor, Tensor]:
        """One at a time: what a picture becomes does not depend on its neighbours in a batch."""
        image = cut(self.images[index], self.shapes[index], box)
        return encode_images(self.pipe, (image.flip(-1) if mirrored else image)[None])


class Mixed:
    """Several readings as one: of as many rows in a row as there are readings each gives one, in an order drawn by key.

    It is the same order for every name, so that subjects and their classes come together.
    """

    def __init__(self, name: str, parts: Sequence[Reading]) -> None:
        self.name, self.parts = name, parts

    def draw(self, micro: Micro, place: int) -> Row:
        """The row at one place of the reading."""
        part = shuffled(micro.seed, "subject", len(self.parts), place)
        return self.parts[part].draw(micro, place // len(self.parts))
