"""How a model's training noise is drawn and what its denoiser must predict: diffusion or flow matching.

Which of the two a model is, and with what numbers, is read from its scheduler's config, whatever sampler that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vismodal.diffusion import losses
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.errors import InputError

Density = Literal["logit_normal", "uniform"]


@dataclass(frozen=True)
class Diffusion:
    """x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) noise; a level is the number t of one of T steps.

    Args:
        prediction: what the denoiser predicts.
        alpha_bar: (T,), falling; 0 in the end at zero terminal SNR.
    """

    prediction: losses.Prediction
    alpha_bar: Tensor

    def draw(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        """The level of one row, uniform; its latent's shape is of no account here."""
        return torch.randint(len(self.alpha_bar), (), generator=generator)

    def time(self, level: Tensor) -> Tensor:
        """What the denoiser is told, (B,)."""
        return level

    def add_noise(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return losses.add_noise(x, noise, self._at(level))

    def target(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return losses.denoising_target(self.prediction, x, noise, self._at(level))

    def min_snr(self, level: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights, (B,)."""
        return losses.min_snr_weight(self.prediction, self._at(level), gamma)

    def _at(self, level: Tensor) -> Tensor:
        return self.alpha_bar.to(level.device)[level]


@dataclass(frozen=True)
class Flow:
    """Rectified flow: x_s = (1 - s) x + s noise, target noise - x; a level is s in (0, 1).

    Args:
        density: of s before it is shifted. Logit-normal(0, 1) has most of its mass in the middle.
        config: of the scheduler: how s is shifted towards noise, for all sizes alike or more in larger pictures.
        patch: side of the squares of latents that are one token.
    """

    density: Density
    config: Mapping[str, Any]
    patch: int

    def draw(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        """The level of one row, whose latent has the shape (..., h, w)."""
        uniform = self.density == "uniform"
        plain = torch.rand((), generator=generator) if uniform else torch.randn((), generator=generator).sigmoid()
        return losses.shift_level(plain, self.shift(shape[-2] * shape[-1] // self.patch**2))

    def shift(self, tokens: int) -> float:
        """By how much levels are shifted for pictures of so many tokens."""
        config = self.config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift") or config.get("flow_shift") or 1.0)
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = base + (most - base) * (tokens - low) / (high - low)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def time(self, level: Tensor) -> Tensor:
        return level * 1000

    def add_noise(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return losses.flow_noise(x, noise, level)

    def target(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return noise - x

    def min_snr(self, level: Tensor, gamma: float) -> Tensor:
        raise InputError(
            "min_snr weighs the losses of diffusion by their signal to noise; this model is trained by flow matching, "
            "where the density of its levels does that (--levels). Write --min_snr 0"
        )


Process = Diffusion | Flow


def process_of(pipe: Pipe, density: Density = "logit_normal") -> Process:
    """The process that a pipeline's model was trained by. Raises `InputError` for one that is not known."""
    config, name = pipe.scheduler.config, type(pipe.scheduler).__name__
    if name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        return Flow(density, config, kind_of(pipe).patch(pipe))
    return Diffusion(*noise_schedule(pipe))


def zero_terminal_snr(pipe: Pipe) -> None:
    """Lets the noise of a pipeline end in noise alone, in training and sampling (Lin et al. 2023, arXiv 2305.08891).

    Its alpha_bar become those of their algorithm 1: sqrt(alpha_bar) is shifted to end at 0 and stretched to begin where
    it did. Sampling is theirs (section 3.3): DDIM, which begins at the last level ("trailing"), whatever sampler there
    was. Raises `InputError` unless the model predicts v: of noise alone, epsilon says nothing about the picture.
    """
    from diffusers import DDIMScheduler

    config, needed = pipe.scheduler.config, "zero_snr needs a model that predicts v by diffusion"
    if isinstance(process_of(pipe), Flow):
        raise InputError(
            f"{needed}; this one is trained by flow matching, whose last level is noise alone anyway. "
            "Write --zero_snr false"
        )
    given = config.get("prediction_type", "epsilon")
    if given != "v_prediction":
        raise InputError(
            f"{needed} (prediction_type v_prediction, as Stable Diffusion 2.1 at 768 pixels), "
            f"and this one predicts {given}. Write --zero_snr false, or --offset_noise 0.05 for dark and light pictures"
        )
    pipe.scheduler = DDIMScheduler.from_config(
        config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )


ZERO_SNR = "zero_snr"  # key in the header of an adapter's file


def sample_as_trained(pipe: Pipe, headers: Iterable[Mapping[str, str]]) -> None:
    """`zero_terminal_snr` where one of the adapters that are to act was trained so, as their headers say."""
    if any(ZERO_SNR in header for header in headers):
        zero_terminal_snr(pipe)


def noise_schedule(pipe: Pipe) -> tuple[losses.Prediction, Tensor]:
    """What the network predicts, and alpha_bar (T,) of its training noise levels, whatever the sampler makes of it."""
    from diffusers import DDPMScheduler

    given = pipe.scheduler.config
    if "beta_schedule" not in given:
        raise InputError(
            f"the scheduler {type(pipe.scheduler).__name__} has no beta_schedule and matches no flow, so the model's "
            "training noise is not known; put the scheduler_config.json of the model that it came from in its place"
        )
    scheduler = DDPMScheduler.from_config(given)
    return losses.prediction_type(scheduler.config.prediction_type), scheduler.alphas_cumprod
