"""The losses against formulas written out by hand, and the traps of shared/diffusion.md."""

import math

import pytest
import torch

from vismodal.diffusion import losses
from vismodal.errors import InputError


def _case(batch=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, 2, 2, generator=generator)
    noise = torch.randn(batch, 4, 2, 2, generator=generator)
    return x, noise, torch.tensor([0.9, 0.5, 0.04])[:batch]


def test_noising_and_targets_by_hand():
    x, noise, bar = _case()
    noisy = losses.add_noise(x, noise, bar)
    v = losses.denoising_target("v_prediction", x, noise, bar)
    for i, a in enumerate(bar.tolist()):
        torch.testing.assert_close(noisy[i], math.sqrt(a) * x[i] + math.sqrt(1 - a) * noise[i])
        torch.testing.assert_close(v[i], math.sqrt(a) * noise[i] - math.sqrt(1 - a) * x[i])
        # v and the noisy sample give x and the noise back: the identities the samplers rely on
        torch.testing.assert_close(math.sqrt(a) * noisy[i] - math.sqrt(1 - a) * v[i], x[i])
    assert losses.denoising_target("epsilon", x, noise, bar) is noise
    assert losses.denoising_target("sample", x, noise, bar) is x


def test_flow_by_hand_and_as_diffusers_noises():
    from diffusers import FlowMatchEulerDiscreteScheduler

    x, noise, _ = _case()
    level = torch.tensor([0.0, 0.25, 1.0])
    noisy = losses.flow_noise(x, noise, level)
    torch.testing.assert_close(noisy[0], x[0])
    torch.testing.assert_close(noisy[1], 0.75 * x[1] + 0.25 * noise[1])
    assert torch.equal(noisy[2], noise[2])
    # one Euler step along noise - x gives x back
    torch.testing.assert_close(noisy - level.view(3, 1, 1, 1) * (noise - x), x)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    steps = torch.tensor([999, 600, 3])
    at = losses.shift_level((1000 - steps) / 1000, 3.0)
    theirs = scheduler.scale_noise(x, scheduler.timesteps[steps], noise)
    torch.testing.assert_close(losses.flow_noise(x, noise, at), theirs)
    torch.testing.assert_close(losses.shift_level(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert torch.equal(losses.shift_level(level, 1.0), level)


def test_targets_are_those_of_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()
    x, noise, _ = _case()
    steps = torch.tensor([0, 500, 999])
    bar = scheduler.alphas_cumprod[steps]
    torch.testing.assert_close(losses.add_noise(x, noise, bar), scheduler.add_noise(x, noise, steps))
    v = losses.denoising_target("v_prediction", x, noise, bar)
    torch.testing.assert_close(v, scheduler.get_velocity(x, noise, steps))


def test_min_snr_by_hand_and_equal_in_x_space():
    bar = torch.tensor([0.999, 0.9, 0.5, 0.1])
    snr = bar / (1 - bar)
    torch.testing.assert_close(losses.min_snr_weight("epsilon", bar), torch.minimum(snr, torch.tensor(5.0)) / snr)
    torch.testing.assert_close(losses.min_snr_weight("v_prediction", bar), snr.clamp(max=5) / (snr + 1))
    # one x-space error of 1 is an epsilon error of SNR and a v error of SNR + 1: all three weigh it the same
    in_x = losses.min_snr_weight("sample", bar)
    torch.testing.assert_close(losses.min_snr_weight("epsilon", bar) * snr, in_x)
    torch.testing.assert_close(losses.min_snr_weight("v_prediction", bar) * (snr + 1), in_x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_finite_at_zero_terminal_snr(kind):
    weight = losses.min_snr_weight(kind, torch.tensor([0.0, 1e-9, 0.5]))
    assert weight.isfinite().all()
    assert weight[0] == (1.0 if kind == "epsilon" else 0.0)


@pytest.mark.parametrize(("instances", "classes"), [(1, 1), (2, 2), (3, 2), (2, 0)])
def test_prior_is_the_sum_of_two_means(instances, classes):
    each = torch.rand(instances + classes, generator=torch.Generator().manual_seed(1))
    total = losses.weighted_sum(each, losses.prior_weight(instances, classes, 0.7))
    expected = each[:instances].mean() + (0.7 * each[instances:].mean() if classes else 0.0)
    torch.testing.assert_close(total, expected)


def test_min_snr_with_prior_is_per_sample():
    """The common bug: (B,) weights against one half of (2B,) losses crash or broadcast."""
    x, noise, bar = _case(2)
    each = losses.per_sample_mse(x, noise)
    weight = losses.min_snr_weight("epsilon", bar) * losses.prior_weight(1, 1, 0.5)
    expected = each[0] * weight[0] + each[1] * weight[1]
    torch.testing.assert_close(losses.weighted_sum(each, weight), expected)
    with pytest.raises(ValueError, match=r"\(batch,\)"):
        losses.weighted_sum(each, weight[:1])
    with pytest.raises(ValueError, match="differ in shape"):
        losses.per_sample_mse(x, noise[:1])
    with pytest.raises(ValueError, match="one value for each of the 2 samples"):
        losses.add_noise(x, noise, bar[:1])


def test_per_sample_mse_is_fp32_whatever_goes_in():
    x, noise, _ = _case()
    each = losses.per_sample_mse(x.bfloat16(), noise)
    assert each.dtype == torch.float32 and each.shape == (3,)
    torch.testing.assert_close(losses.per_sample_mse(x, noise)[1], ((x[1] - noise[1]) ** 2).mean())


def test_offset_noise_is_constant_over_space():
    _, noise, _ = _case()
    shifted = losses.offset_noise(noise, torch.ones(3, 4, 1, 1), 0.1)
    torch.testing.assert_close(shifted - noise, torch.full_like(noise, 0.1))


def test_unknown_prediction_type_names_the_known_ones():
    assert losses.prediction_type("v_prediction") == "v_prediction"
    with pytest.raises(InputError, match=r"'flow'.*epsilon, v_prediction, sample"):
        losses.prediction_type("flow")
