"""Convpass: convolutional bypasses (Jie and Deng 2022, arXiv 2207.07039).

    n = LN(x)
    x <- x + attn(n) + s CP(n),  likewise at the MLP        n: b t c, or b h w c
    CP(n) = U Drop(q(K * q(D n + d) + k)) + u               q(a) = a sigmoid(1.702 a)
                                                            D: r x c, K: r x r x 3 x 3, U: c x r

The patches of the grid are convolved with zeros around them. Every token before them (class, registers, prompts of
others) is a map of its own of one by one, on which only the middle of K acts. D is Xavier uniform, K the identity, or
Xavier uniform as in the official Swin, U and the biases zero. The official code drops the bypass by a drop-path of its
own at the block's rate; here the bypass is never dropped.

The grid comes from the model's layout, so Convpass is not for streams that do not say how their tokens lie: texts,
models that take pictures of any size, and UNets, whose attention sees a latent of any height and width as one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.methods.bottleneck import check_branches, on_branch
from vismodal.methods.initial import check_sizes, drawn, linear, zeros
from vismodal.site import Site


class Bypass(SpanModule):
    """Reads what the norm gives the branch, and adds s CP(n) where the branch ends."""

    def __init__(self, site: Site, rank: int, scaling: float, dropout: float, xavier: bool):
        super().__init__()
        assert site.layout is not None
        self.key, self.layout = site.key, site.layout
        self.scaling = scaling
        self.dropout = dropout
        conv = nn.init.xavier_uniform_ if xavier else nn.init.dirac_
        self.down = drawn(nn.init.xavier_uniform_, rank, site.width, device=site.device)
        self.down_bias = drawn(zeros, rank, device=site.device)
        self.conv = drawn(conv, rank, rank, 3, 3, device=site.device)
        self.conv_bias = drawn(zeros, rank, device=site.device)
        self.up = drawn(zeros, site.width, rank, device=site.device)
        self.up_bias = drawn(zeros, site.width, device=site.device)

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        if name == "normed":
            context["normed"] = y
        return y

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y + self.scaling * self(context["normed"], context["extra"])

    def forward(self, n: Tensor, extra: int = 0) -> Tensor:
        h = quick_gelu(linear(n, self.down, self.down_bias))
        if h.dim() == 4:  # b h w r
            h = self._convolve(h)
        else:
            first, patches = h.tensor_split([self.layout.prefix + extra], 1)
            patches = self._convolve(patches.unflatten(1, self._grid(patches.shape[1]))).flatten(1, 2)
            h = torch.cat([linear(first, self.conv[:, :, 1, 1], self.conv_bias), patches], 1)
        h = F.dropout(quick_gelu(h), self.dropout, self.training)
        return linear(h, self.up, self.up_bias)

    def _convolve(self, h: Tensor) -> Tensor:
        """b h w r -> b h w r"""
        h = h.movedim(-1, 1)
        h = F.conv2d(h, self.conv.to(h.dtype), self.conv_bias.to(h.dtype), padding=1)
        return h.movedim(1, -1)

    def _grid(self, tokens: int) -> tuple[int, int]:
        rows, columns = self.layout.grid or (0, 0)
        if tokens != rows * columns:
            raise RuntimeError(
                f"{self.key}: Convpass was made for {rows} x {columns} patches and got {tokens}; give pictures of the "
                "model's own size"
            )
        return rows, columns


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@dataclass(frozen=True, kw_only=True, repr=False)
class Convpass(Method):
    """Convolutional bypasses of attention and MLP, arXiv 2207.07039.

    Args:
        rank: r, the inner dimension.
        scaling: s, on what the bypass adds; the paper searches it in 0.01, 0.1, 1, 10, 100 for each task.
        dropout: probability on the inner features while training.
        xavier: start the convolution at random instead of at the identity.
    """

    sites: tuple[str, ...] = ("attn", "mlp")
    rank: int = 8
    scaling: float = 1.0
    dropout: float = 0.1
    xavier: bool = False

    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "arXiv 2207.07039"
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("Convpass", self.rank, self.dropout)

    @classmethod
    def fits(cls, site: Site) -> bool:
        return on_branch(site) and not _lacking(site)

    def build(self, sites: Sequence[Site]) -> Built:
        check_branches("Convpass", sites)
        for site in sites:
            if why := _lacking(site):
                raise InputError(f"Convpass cannot stand at {site.key}, {why}; leave it out with where=...")
        return Built(tuple(Bypass(site, self.rank, self.scaling, self.dropout, self.xavier) for site in sites))


def _lacking(site: Site) -> str:
    """What a branch lacks for a bypass, or nothing."""
    if "normed" not in site.modules:
        return "whose branch has no norm before it to read from"
    if site.layout is None:
        return "whose stream does not say how its tokens lie in rows and columns"
    return "" if site.layout.grid else "which has no fixed grid of patches (a text, or pictures of any size)"
