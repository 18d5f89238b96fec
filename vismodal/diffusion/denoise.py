"""The training of a latent denoiser: keyed rows of pictures, noise and noise levels, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from vismodal.data.photos import pixels
from vismodal.diffusion import losses
from vismodal.diffusion.pipeline import Pipe, draw_latents, encode_images, encode_prompts, noise_schedule
from vismodal.draw import shuffled
from vismodal.train import Micro

Crop = Literal["center", "random"]


class Pictures:
    """An endless shuffled reading of pictures: which one comes when, how it is cut, and its latent are drawn by key.

    Args:
        name: of the set ("instance", "class"), part of every key: two sets draw independently.
        prompts: one for each picture.
        size: side of the square in pixels.
        cache: encode once, keeping mean and deviation (for a picture and its mirror image), where `crop` allows it.
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
    ) -> None:
        self.pipe, self.name, self.images, self.prompts = pipe, name, images, prompts
        self.size, self.crop, self.flip = size, crop, flip
        self.cached: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        if cache and crop == "center":
            for index in range(len(images)):
                for mirrored in (False, True)[: 1 + flip]:
                    self.cached[index, mirrored] = self._encode(pixels(images[index], size), mirrored)

    def draw(self, micro: Micro, place: int) -> tuple[Tensor, str]:
        """The row at one place of the reading: its latent (1, c, h, w) and its prompt."""
        index = shuffled(micro.seed, self.name, len(self.images), place)
        mirrored = self.flip and bool(torch.randint(2, (), generator=micro.generator(f"{self.name} flip", place)))
        if (index, mirrored) in self.cached:
            mean, std = self.cached[index, mirrored]
        else:
            cut = micro.generator(f"{self.name} crop", place)
            mean, std = self._encode(pixels(self.images[index], self.size, crop=self.crop, generator=cut), mirrored)
        noise = torch.randn(mean.shape, generator=micro.generator(f"{self.name} latent", place))
        return draw_latents(self.pipe, mean, std, noise.to(mean)), self.prompts[index]

    def _encode(self, image: Tensor, mirrored: bool) -> tuple[Tensor, Tensor]:
        """One at a time: what a picture becomes does not depend on its neighbours in a batch."""
        return encode_images(self.pipe, (image.flip(-1) if mirrored else image)[None])


class Prompts:
    """Prompts as the UNet's text arguments: encoded once each where the text encoder is frozen, else every time."""

    def __init__(self, pipe: Pipe, cache: bool) -> None:
        self.pipe, self.cache = pipe, cache
        self.cached: dict[str, dict[str, Tensor]] = {}

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
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
    """

    prior: float = 0.0
    min_snr: float = 0.0
    offset_noise: float = 0.0


def denoising(
    pipe: Pipe, sets: Sequence[Pictures], prompts: Prompts, batch: int, weights: Weights
) -> Callable[[Micro], Mapping[str, Tensor]]:
    """The loss of a micro-batch with `batch` rows of the first set and, with a prior, as many of the second one.

    A row's picture, prompt, noise, level and weight are made together, row by row: they cannot come out of step.
    """
    kind, alpha_bar = noise_schedule(pipe)
    device, dtype = pipe.unet.device, pipe.unet.dtype

    def loss(micro: Micro) -> Mapping[str, Tensor]:
        rows = [(pictures, place) for pictures in sets for place in micro.positions(batch)]
        drawn = [pictures.draw(micro, place) for pictures, place in rows]
        latents = torch.cat([latent for latent, _ in drawn])
        noise = torch.stack([_noise(micro, p.name, place, latents.shape[1:], weights) for p, place in rows]).to(device)
        t = torch.tensor([_level(micro, p.name, place, len(alpha_bar)) for p, place in rows])
        level = alpha_bar[t].to(device)
        noisy = losses.add_noise(latents, noise, level)
        predicted = pipe.unet(noisy.to(dtype), t.to(device), **prompts([prompt for _, prompt in drawn])).sample
        each = losses.per_sample_mse(predicted, losses.denoising_target(kind, latents, noise, level))
        weight = losses.prior_weight(batch, len(rows) - batch, weights.prior).to(device)
        if weights.min_snr:
            weight = weight * losses.min_snr_weight(kind, level, weights.min_snr)
        means = {p.name: each[i * batch : (i + 1) * batch].mean() for i, p in enumerate(sets)} if len(sets) > 1 else {}
        return {"loss": losses.weighted_sum(each, weight), **means}

    return loss


def _level(micro: Micro, name: str, place: int, levels: int) -> int:
    return int(torch.randint(levels, (), generator=micro.generator(f"{name} level", place)))


def _noise(micro: Micro, name: str, place: int, shape: Sequence[int], weights: Weights) -> Tensor:
    noise = torch.randn(tuple(shape), generator=micro.generator(f"{name} noise", place))
    if not weights.offset_noise:
        return noise
    offset = torch.randn((1, shape[0], 1, 1), generator=micro.generator(f"{name} offset", place))
    return losses.offset_noise(noise[None], offset, weights.offset_noise)[0]
