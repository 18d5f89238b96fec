"""Diffusion training losses as small pure functions: shapes in, shapes out, no models and no loops.

Throughout, B is the batch, `...` the latent's own dimensions (channels, height, width), and `alpha_bar` is the
scheduler's ``alphas_cumprod`` *gathered at each sample's timestep*, of shape (B,).

Sources: DDPM (Ho et al. 2020, eq. 4 and 14) for the noising and the epsilon loss; Progressive Distillation (Salimans
and Ho 2022, appendix D) for v; Min-SNR (Hang et al. 2023); DreamBooth (Ruiz et al. 2023, eq. 2) for the prior term;
offset noise from Guttenberg's "Diffusion with Offset Noise" (2023); rectified flow and the shift of its levels from
Stable Diffusion 3 (Esser et al. 2024, eq. 13 and 23).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vismodal.errors import InputError

Prediction = Literal["epsilon", "v_prediction", "sample"]


def prediction_type(name: str) -> Prediction:
    """The scheduler's ``prediction_type`` as one of those that these losses know; `InputError` names them otherwise."""
    for known in get_args(Prediction):
        if name == known:
            return known
    raise InputError(
        f"the scheduler predicts {name!r}; the losses know {', '.join(get_args(Prediction))}. "
        "Set prediction_type in the model's scheduler/scheduler_config.json to one of them"
    )


def _like(per_sample: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) with as many dimensions as x: the one place where a per-sample value may broadcast."""
    if per_sample.shape != x.shape[:1]:
        raise ValueError(f"expected one value for each of the {len(x)} samples, got shape {tuple(per_sample.shape)}")
    return per_sample.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise (DDPM eq. 4). x, noise: (B, ...); alpha_bar: (B,)."""
    return _like(alpha_bar.sqrt(), x) * x + _like((1 - alpha_bar).sqrt(), x) * noise


def flow_noise(x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """x_s = (1 - s) x + s noise; x, noise: (B, ...); level: s (B,) in [0, 1]. The target is noise - x."""
    return _like(1 - level, x) * x + _like(level, x) * noise


def shift_level(level: Tensor, shift: float) -> Tensor:
    """s -> shift s / (1 + (shift - 1) s): a larger picture needs more noise to be as unrecognisable. Any shape."""
    return shift * level / (1 + (shift - 1) * level)


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """noise + strength * offset, one offset for each sample and channel, so that the mean brightness can be learnt.

    noise: (B, C, H, W); offset: standard normal (B, C, 1, 1).
    """
    return noise + strength * offset


def denoising_target(kind: Prediction, x: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network must predict, (B, ...): the noise, v = sqrt(ab) noise - sqrt(1 - ab) x, or x itself."""
    match kind:
        case "epsilon":
            return noise
        case "v_prediction":
            return _like(alpha_bar.sqrt(), x) * noise - _like((1 - alpha_bar).sqrt(), x) * x
        case "sample":
            return x


def min_snr_weight(kind: Prediction, alpha_bar: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR weights, (B,): min(SNR, gamma) in x-space, divided by what the prediction's own loss already weighs.

    epsilon: min(1, gamma / SNR), written so because the usual min(SNR, gamma) / SNR is 0/0 at zero SNR;
    v: min(SNR, gamma) / (SNR + 1); sample: min(SNR, gamma). All are finite at zero terminal SNR.
    """
    snr = alpha_bar / (1 - alpha_bar)
    match kind:
        case "epsilon":
            return (gamma / snr).clamp(max=1.0)
        case "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        case "sample":
            return snr.clamp(max=gamma)


def prior_weight(instances: int, classes: int, prior: float) -> Tensor:
    """Weights, (instances + classes,), with which a plain weighted *sum* of per-sample losses is
    mean(instance) + prior * mean(class), the rows in that order (DreamBooth eq. 2, prior = lambda)."""
    one = torch.full((instances,), 1 / instances)
    return torch.cat([one, torch.full((classes,), prior / classes)]) if classes else one


def per_sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample in fp32: (B, ...), (B, ...) -> (B,). Unequal shapes raise, never broadcast."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def per_sample_masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The same as a weighted mean: (B, C, H, W), (B, C, H, W), mask (B, 1, H, W) -> (B,).

    A sample counts as much as any other, however small its mask is; where all of it is 0, the loss is 0.
    """
    if mask.shape != (len(target), 1, *target.shape[2:]):
        raise ValueError(f"the mask {tuple(mask.shape)} is not (batch, 1, height, width) of {tuple(target.shape)}")
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    each = (prediction.float() - target.float()).square().mean(1, keepdim=True)  # B 1 H W
    total = mask.flatten(1).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return (each * mask).flatten(1).sum(1) / total


def weighted_sum(losses: Tensor, weight: Tensor) -> Tensor:
    """sum_i weight_i losses_i: (B,), (B,) -> scalar. Anything but one weight for each sample raises."""
    if losses.shape != weight.shape or losses.ndim != 1:
        raise ValueError(f"losses {tuple(losses.shape)} and weights {tuple(weight.shape)} must both be (batch,)")
    return (losses * weight).sum()
