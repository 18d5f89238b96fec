"""Adapter+: a bottleneck after the whole block (Steitz and Roth 2024, arXiv 2406.06820).

    z <- z + gamma * DropPath(U GELU(D z + d) + u)        z: ... x c, D: r x c, U: c x r, gamma: c

z is the block's output, residual included; there is no norm. D and U are normal with standard deviation 0.01, cut at
two of them, d and u zero, gamma one, so the output at the start differs from the base's by about 1%. In convolutional
networks the channels lie on axis 1, and the bottleneck is a pair of 1x1 convolutions. DropPath drops what the adapter
adds for whole samples, with the same probability in every block as in the official configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method
from vismodal.methods.bottleneck import Bottleneck
from vismodal.methods.initial import check_sizes, drawn, truncated
from vismodal.site import Site


class Post(Bottleneck):
    """On a block's output, with a learned scale for each channel."""

    def __init__(self, site: Site, rank: int, std: float, drop_path: float):
        super().__init__(site, rank, F.gelu, truncated(std), truncated(std))
        assert site.span is not None
        self.channels = site.span.channels
        self.drop_path = drop_path
        self.gamma = drawn(nn.init.ones_, site.width, device=site.device)

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        change = self(y.movedim(self.channels, -1))
        change = drop_samples(change, self.drop_path if self.training else 0.0) * self.gamma.to(change.dtype)
        return y + change.movedim(-1, self.channels)


def drop_samples(x: Tensor, p: float) -> Tensor:
    """Zero for whole samples with probability p, divided by 1 - p for the others."""
    if not p:
        return x
    kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= p
    return x * kept / (1 - p)


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterPlus(Method):
    """Adapters with channel-wise scaling after each block, arXiv 2406.06820.

    Args:
        rank: r, the inner dimension.
        drop_path: probability that a sample goes without what an adapter adds, while training.
        std: standard deviation of the initial values.
    """

    sites: tuple[str, ...] = ("block",)
    rank: int = 8
    drop_path: float = 0.1
    std: float = 0.01

    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "arXiv 2406.06820"
    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("AdapterPlus", self.rank)
        if not 0 <= self.drop_path < 1:
            raise InputError(f"AdapterPlus: drop_path must be in [0, 1), not {self.drop_path}")
        if not self.std > 0:
            raise InputError(f"AdapterPlus: std must be above 0, not {self.std}: two zero factors have no gradients")

    @property
    def rests(self) -> bool:
        return self.drop_path > 0

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.span is not None and site.kind == "block" and site.width > 0

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if site.span is None or site.kind != "block":
                raise InputError(f"AdapterPlus goes after whole blocks; {site.key} ({site.kind}) is none")
            if not site.width:
                raise InputError(
                    f"AdapterPlus needs to know the channels of {site.key}: give its Span(..., width='norm')"
                )
        return Built(tuple(Post(site, self.rank, self.std, self.drop_path) for site in sites))
