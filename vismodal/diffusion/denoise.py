"""The training of a latent denoiser: rows of pictures, keyed noise and noise levels, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from vismodal.diffusion import losses
from vismodal.diffusion.encode import encode_prompts
from vismodal.diffusion.generate import evaluating
from vismodal.diffusion.kinds import Frame, Pipe, Texts, kind_of
from vismodal.diffusion.pictures import Reading, Row
from vismodal.diffusion.processes import Density, Process, process_of
from vismodal.train import Micro


class Prompts:
    """Prompts as the denoiser's text arguments: with `cache` encoded once each, by encoders that stay as they are.

    Autocast is left out: what the encoders say is what they say in the pipeline, and T5 stays finite in fp16. Frozen
    ones see one prompt at a time, so that it is the same to the bit, kept or not.
    """

    def __init__(self, pipe: Pipe, cache: bool) -> None:
        self.pipe, self.cache = pipe, cache
        self.cached: dict[str, Texts] = {}

    def __call__(self, prompts: Sequence[str]) -> Texts:
        """One row for each prompt."""
        kind = kind_of(self.pipe)
        readers = kind.readers(self.pipe).values()
        learning = not self.cache and any(p.requires_grad for reader in readers for p in reader.parameters())
        known = self.cached if self.cache else dict[str, Texts]()
        with torch.autocast(kind.model(self.pipe).device.type, enabled=False):
            if learning:
                return encode_prompts(self.pipe, prompts)
            with torch.no_grad():
                new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
                known |= {prompt: encode_prompts(self.pipe, [prompt]) for prompt in new}
        rows = [known[prompt] for prompt in prompts]
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
