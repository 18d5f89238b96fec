"""Res-Tuning-Bypass: a bypass of residual tuners beside the backbone (Jiang et al. 2023, arXiv 2310.19859).

    b_0 = x_0,   b_{i+1} = V_i(b_i) + H_i(x_{i+1})         x_0: ... x c before the blocks, x_{i+1}: after block i
    V, H: z -> z + U gelu(D z + d) + u                     D: r x c, U: c x r

The last b stands in for the stream after the last block, so the base's final norm and head read it. Every x is
detached: the backbone has no graph at all. D and U are Xavier uniform, d and u ~ N(0, 1e-6), as in the official code
(modelscope/ms-swift), so that the output begins far from the base's.

On a UNet (site `decoder`) the bypass follows the decoder, as in the official code's own test on Stable Diffusion: x_0
is the input of the middle block, x_1 its output, and x_2, ... are those of the blocks upwards. From x_2 on

    b <- C * upsampled(b)                                  C: 3 x 3 convolution with bias, zero at the start

comes before V and brings b to the size and width of x. U and u of the last pair are zero, so that the output is the
base's until something is learnt. The tuners are the same as elsewhere, where that test takes grouped ones.

Swin and conv nets are left out: a bypass beside them needs a downsampling, which the official code has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.methods.blocks import along, over_all_blocks
from vismodal.methods.initial import drawn, zeros
from vismodal.site import Site

xavier = nn.init.xavier_uniform_
tiny = partial(nn.init.normal_, std=1e-6)


class Tuner(nn.Module):
    """z + U gelu(D z + d) + u; `still` starts at z."""

    def __init__(self, width: int, rank: int, axis: int, device: torch.device | None, still: bool = False):
        super().__init__()
        self.axis = axis
        self.down, self.down_bias = drawn(xavier, rank, width, device=device), drawn(tiny, rank, device=device)
        self.up = drawn(zeros if still else xavier, width, rank, device=device)
        self.up_bias = drawn(zeros if still else tiny, width, device=device)

    def forward(self, z: Tensor) -> Tensor:
        h = F.gelu(along(z, self.down, self.down_bias, self.axis))
        return z + along(h, self.up, self.up_bias, self.axis)


class Upsample(nn.Module):
    """To the size of the next map, nearest, and to its width."""

    def __init__(self, width: int, out: int, device: torch.device | None):
        super().__init__()
        self.weight = drawn(zeros, out, width, 3, 3, device=device)
        self.bias = drawn(zeros, out, device=device)

    def forward(self, b: Tensor, like: Tensor) -> Tensor:
        b = F.interpolate(b, like.shape[2:], mode="nearest")
        return F.conv2d(b, self.weight.to(b.dtype), self.bias.to(b.dtype), padding=1)


class Bypass(SpanModule):
    """b before the i-th block is kept as "b.i"."""

    def __init__(self, site: Site, rank: int):
        super().__init__()
        assert site.span is not None
        self.order = {name: i for i, name in enumerate(n for n in site.modules if n not in ("enter", "exit"))}
        widths = [site.widths.get(name, site.width) for name in self.order]
        still = [bool(site.widths) and i == len(widths) - 1 for i in range(len(widths))]
        tuners = [
            [Tuner(w, rank, site.span.channels, site.device, s) for w, s in zip(widths, still, strict=True)]
            for _ in range(2)
        ]
        self.vertical, self.horizontal = map(nn.ModuleList, tuners)
        pairs = pairwise(widths) if site.widths else ()
        self.upsample = nn.ModuleList([Upsample(*pair, device=site.device) for pair in pairs])

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        context["b.0"] = x.detach()
        return x

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        i = self.order[name]
        b = context[f"b.{i}"]
        if i and len(self.upsample):
            b = self.upsample[i - 1](b, y)
        b = self.vertical[i](b) + self.horizontal[i](y.detach())
        if i == len(self.order) - 1:
            return b.to(y.dtype)
        context[f"b.{i + 1}"] = b
        return y


@dataclass(frozen=True, kw_only=True, repr=False)
class ResTuningBypass(Method):
    """The bypass of Res-Tuning, arXiv 2310.19859; of a UNet with `sites="decoder"`.

    Args:
        rank: r, the inner dimension of every tuner.
    """

    sites: tuple[str, ...] = ("features",)
    rank: int = 32

    survey: ClassVar[str] = "efficiency: memory"
    paper: ClassVar[str] = "arXiv 2310.19859"
    mergeable: ClassVar[bool] = False
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("decoder",),)
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "starts_at_base", self.sites == ("decoder",))
        if self.rank < 1:
            raise InputError(f"ResTuningBypass: rank must be at least 1, not {self.rank}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return over_all_blocks(site) or site.kind == "decoder"

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(
                    "ResTuningBypass needs a stream of one width over all blocks ('features' of a plain transformer) "
                    f"or a UNet's 'decoder'; {site.key} ({site.kind}) is neither"
                )
        return Built(tuple(Bypass(site, self.rank) for site in sites))
