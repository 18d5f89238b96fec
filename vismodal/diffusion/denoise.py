"""The training of a latent denoiser: keyed rows of pictures, noise and noise levels, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from vismodal.data.masks import mask_values
from vismodal.data.photos import cut
from vismodal.data.shapes import bucket, cut_box
from vismodal.diffusion import losses
from vismodal.diffusion.encode import draw_latents, encode_images, encode_prompts
from vismodal.diffusion.generate import evaluating
from vismodal.diffusion.kinds import Frame, Pipe, Texts, kind_of
from vismodal.diffusion.processes import Density, Process, process_of
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


class Prompts:
    """Prompts as the denoiser's text arguments: encoded once each where the encoders are frozen, else every time."""

    def __init__(self, pipe: Pipe, cache: bool) -> None:
        self.pipe, self.cache = pipe, cache
        self.cached: dict[str, Texts] = {}

    def __call__(self, prompts: Sequence[str]) -> Texts:
        """One row for each prompt."""
        if not self.cache:
            return encode_prompts(self.pipe, prompts)
        for prompt in prompts:
            if prompt not in self.cached:
                with torch.no_grad():
                    self.cached[prompt] = encode_prompts(self.pipe, [prompt])
        rows = [self.cached[prompt] for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class Weights:
    """How the loss is weighed.

    Args:
        prior: weight of the second set of pictures, the class (DreamBooth eq. 2).
        min_snr: gamma of Min-SNR; 0 is off.
        offset_noise: strength of offset noise; 0 is off.
        levels: density of the noise levels of flow matching.
    """

    prior: float = 0.0
    min_snr: float = 0.0
    offset_noise: float = 0.0
    levels: Density = "logit_normal"

    def process(self, pipe: Pipe) -> Process:
        """The pipeline's process; raises `InputError` where these weights have no meaning under it."""
        process = process_of(pipe, self.levels)
        if self.min_snr:
            process.min_snr(torch.zeros(1, dtype=torch.long), self.min_snr)
        return process


@dataclass
class _Batch:
    """Rows of one shape, which share a forward pass; `rows` are their places in the micro-batch."""

    rows: Sequence[int]
    noisy: Tensor
    level: Tensor
    target: Tensor
    prompts: Sequence[str]
    frames: Sequence[Frame]
    mask: Tensor | None

    def errors(self, predicted: Tensor) -> Tensor:
        """The squared error of each row, (B,)."""
        if self.mask is None:
            return losses.per_sample_mse(predicted, self.target)
        return losses.per_sample_masked_mse(predicted, self.target, self.mask)


Base = Callable[[], AbstractContextManager[None]]  # within it a model is as it was before it was adapted


def denoising(
    pipe: Pipe, sets: Sequence[Reading], prompts: Prompts, batch: int, weights: Weights, base: Base | None = None
) -> Callable[[Micro], Mapping[str, Tensor]]:
    """The loss of a micro-batch with `batch` rows of the first set and, with a prior, as many of the second one.

    A row's picture, prompt, noise, level and weight are made together, row by row: they cannot come out of step. Rows
    of one shape share a forward pass; the loss is as if each had one of its own.

    With `base` (`adapter.disabled`) the second set's target is what the unadapted model says of the same noisy latents
    and the same prompts, its text encoders unadapted too, in eval mode and without gradients.
    """
    kind, process = kind_of(pipe), weights.process(pipe)

    def predict(one: _Batch, rows: Sequence[int]) -> Tensor:
        texts, frames = prompts([one.prompts[i] for i in rows]), [one.frames[i] for i in rows]
        whole = len(rows) == len(one.rows)
        noisy, level = (one.noisy, one.level) if whole else (one.noisy[list(rows)], one.level[list(rows)])
        return kind.predict(pipe, noisy, process.time(level), texts, frames)

    def loss(micro: Micro) -> Mapping[str, Tensor]:
        places = [(pictures, place) for pictures in sets for place in micro.positions(batch)]
        drawn = [(pictures.name, place, pictures.draw(micro, place)) for pictures, place in places]
        batches = _batches(micro, drawn, process, weights, kind.model(pipe).device)
        if base is not None:  # before the first forward pass that a backward pass is to follow
            with evaluating(*kind.modules(pipe)), base():
                for one in batches:
                    of_class = [i for i, row in enumerate(one.rows) if row >= batch]
                    if of_class:
                        one.target = one.target.clone()
                        one.target[of_class] = predict(one, of_class).to(one.target)
        each = torch.cat([one.errors(predict(one, range(len(one.rows)))) for one in batches])
        back = torch.tensor([row for one in batches for row in one.rows]).argsort()
        each, level = each[back], torch.cat([one.level for one in batches])[back]
        weight = losses.prior_weight(batch, len(drawn) - batch, weights.prior).to(each.device)
        if weights.min_snr:
            weight = weight * process.min_snr(level, weights.min_snr)
        means = {p.name: each[i * batch : (i + 1) * batch].mean() for i, p in enumerate(sets)} if len(sets) > 1 else {}
        return {"loss": losses.weighted_sum(each, weight), **means}

    return loss


def _batches(
    micro: Micro, drawn: Sequence[tuple[str, int, Row]], process: Process, weights: Weights, device: torch.device
) -> list[_Batch]:
    """Rows, each with its set's name and its place in the reading, noised and put together by their shapes."""
    shapes: dict[torch.Size, list[int]] = {}
    for i, (_, _, row) in enumerate(drawn):
        shapes.setdefault(row.latent.shape, []).append(i)
    batches = []
    for shape, members in shapes.items():
        keys, rows = [drawn[i][:2] for i in members], [drawn[i][2] for i in members]
        x = torch.cat([row.latent for row in rows])
        noise = torch.stack([_noise(micro, name, place, shape[1:], weights) for name, place in keys]).to(device)
        levels = [process.draw(micro.generator(f"{name} level", place), x.shape) for name, place in keys]
        level = torch.stack(levels).to(device)
        noisy, target = process.add_noise(x, noise, level), process.target(x, noise, level)
        prompts, frames = [row.prompt for row in rows], [row.frame for row in rows]
        whole = torch.ones(1, 1, *shape[2:], device=device)
        masks = [whole if row.mask is None else row.mask for row in rows]
        mask = torch.cat(masks) if any(row.mask is not None for row in rows) else None
        batches.append(_Batch(members, noisy, level, target, prompts, frames, mask))
    return batches


def _noise(micro: Micro, name: str, place: int, shape: Sequence[int], weights: Weights) -> Tensor:
    noise = torch.randn(tuple(shape), generator=micro.generator(f"{name} noise", place))
    if not weights.offset_noise:
        return noise
    offset = torch.randn((1, shape[0], 1, 1), generator=micro.generator(f"{name} offset", place))
    return losses.offset_noise(noise[None], offset, weights.offset_noise)[0]
