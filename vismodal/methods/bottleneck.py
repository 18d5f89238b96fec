"""The bottleneck that the adapters share, and the two ways in which a branch takes it: in series and in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import SpanModule
from vismodal.methods.initial import Init, drawn, linear, zeros
from vismodal.site import Site

BRANCHES = ("attn", "xattn", "mlp")


class Bottleneck(SpanModule):
    """f(x) = U Drop(act(D x + d)) + u        x: ... x c, D: r x c, d: r, U: c x r, u: c; d and u begin at zero."""

    def __init__(
        self, site: Site, rank: int, act: Callable[[Tensor], Tensor], down: Init, up: Init, dropout: float = 0.0
    ):
        super().__init__()
        self.act = act
        self.dropout = dropout
        self.down = drawn(down, rank, site.width, device=site.device)
        self.down_bias = drawn(zeros, rank, device=site.device)
        self.up = drawn(up, site.width, rank, device=site.device)
        self.up_bias = drawn(zeros, site.width, device=site.device)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(linear(x, self.down, self.down_bias))
        return linear(F.dropout(h, self.dropout, self.training), self.up, self.up_bias)


class Serial(Bottleneck):
    """y -> y + f(y) on the output y of a branch."""

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y + self(y)


def on_branch(site: Site) -> bool:
    """Whether the site is a branch of a block: tokens x channels, of known width."""
    return site.span is not None and site.kind in BRANCHES and site.width > 0 and site.span.channels == -1


def check_branches(name: str, sites: Sequence[Site]) -> None:
    """Raises `InputError` for sites that are no branch, with the reason."""
    for site in sites:
        if site.span is None or site.kind not in BRANCHES:
            raise InputError(f"{name} goes on branches ({', '.join(BRANCHES)}); {site.key} ({site.kind}) is none")
        if not on_branch(site):
            raise InputError(f"{name} needs to know the channels of {site.key}: give its Span(..., width='norm')")
