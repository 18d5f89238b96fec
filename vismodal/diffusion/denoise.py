"""The training of a latent denoiser: keyed rows of pictures, noise and noise levels, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from vismodal.data.photos import pixels, square_box
from vismodal.diffusion import losses
from vismodal.diffusion.encode import draw_latents, encode_images, encode_prompts
from vismodal.diffusion.kinds import Frame, Pipe, Texts, kind_of
from vismodal.diffusion.processes import Density, Process, process_of
from vismodal.draw import shuffled
from vismodal.train import Micro

Crop = Literal["center", "random"]


class Row(NamedTuple):
    """One row of a batch: its latent (1, c, h, w), its prompt, and where the square comes from."""

    latent: Tensor
    prompt: str
    frame: Frame


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
    ) -> None:
        self.pipe, self.name, self.images, self.prompts = pipe, name, images, prompts
        self.sizes = sizes or [image.size for image in images]
        self.size, self.crop, self.flip = size, crop, flip
        self.cached: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        if cache and crop == "center":
            for index in range(len(images)):
                for mirrored in (False, True)[: 1 + flip]:
                    self.cached[index, mirrored] = self._encode(pixels(images[index], size), mirrored)

    def draw(self, micro: Micro, place: int) -> Row:
        """The row at one place of the reading."""
        index = shuffled(micro.seed, self.name, len(self.images), place)
        mirrored = self.flip and bool(torch.randint(2, (), generator=micro.generator(f"{self.name} flip", place)))
        if (index, mirrored) in self.cached:
            mean, std = self.cached[index, mirrored]
        else:
            cut = micro.generator(f"{self.name} crop", place)
            mean, std = self._encode(pixels(self.images[index], self.size, crop=self.crop, generator=cut), mirrored)
        noise = torch.randn(mean.shape, generator=micro.generator(f"{self.name} latent", place))
        latent = draw_latents(self.pipe, mean, std, noise.to(mean))
        return Row(latent, self.prompts[index], self._frame(micro, place, index, mirrored))

    def _frame(self, micro: Micro, place: int, index: int, mirrored: bool) -> Frame:
        """Where the square lies, drawn again by the key that it was cut by."""
        (width, height), original = self.images[index].size, self.sizes[index]
        cut = micro.generator(f"{self.name} crop", place) if self.crop == "random" else None
        left, top, right, bottom = square_box(width, height, self.size, cut)
        scale = self.size / (bottom - top)
        corner = round(top * scale), round((width - right if mirrored else left) * scale)
        return Frame((original[1], original[0]), corner, (self.size, self.size))

    def _encode(self, image: Tensor, mirrored: bool) -> tuple[Tensor, Tensor]:
        """One at a time: what a picture becomes does not depend on its neighbours in a batch."""
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


def denoising(
    pipe: Pipe, sets: Sequence[Reading], prompts: Prompts, batch: int, weights: Weights
) -> Callable[[Micro], Mapping[str, Tensor]]:
    """The loss of a micro-batch with `batch` rows of the first set and, with a prior, as many of the second one.

    A row's picture, prompt, noise, level and weight are made together, row by row: they cannot come out of step.
    """
    kind, process = kind_of(pipe), weights.process(pipe)
    device = kind.model(pipe).device

    def loss(micro: Micro) -> Mapping[str, Tensor]:
        places = [(pictures, place) for pictures in sets for place in micro.positions(batch)]
        rows = [pictures.draw(micro, place) for pictures, place in places]
        x = torch.cat([row.latent for row in rows])
        noise = torch.stack([_noise(micro, p.name, place, x.shape[1:], weights) for p, place in places]).to(device)
        generators = [micro.generator(f"{p.name} level", place) for p, place in places]
        level = torch.stack([process.draw(generator, x.shape) for generator in generators]).to(device)
        texts, frames = prompts([row.prompt for row in rows]), [row.frame for row in rows]
        predicted = kind.predict(pipe, process.add_noise(x, noise, level), process.time(level), texts, frames)
        each = losses.per_sample_mse(predicted, process.target(x, noise, level))
        weight = losses.prior_weight(batch, len(rows) - batch, weights.prior).to(device)
        if weights.min_snr:
            weight = weight * process.min_snr(level, weights.min_snr)
        means = {p.name: each[i * batch : (i + 1) * batch].mean() for i, p in enumerate(sets)} if len(sets) > 1 else {}
        return {"loss": losses.weighted_sum(each, weight), **means}

    return loss


def _noise(micro: Micro, name: str, place: int, shape: Sequence[int], weights: Weights) -> Tensor:
    noise = torch.randn(tuple(shape), generator=micro.generator(f"{name} noise", place))
    if not weights.offset_noise:
        return noise
    offset = torch.randn((1, shape[0], 1, 1), generator=micro.generator(f"{name} offset", place))
    return losses.offset_noise(noise[None], offset, weights.offset_noise)[0]
