"""VPT: visual prompt tuning (Jia et al. 2022, arXiv 2203.12119, equations 4 to 6).

    shallow, on the span over all blocks:   [c; P; E] -> blocks -> [c; .; E]
    deep, on every block i:                 [c; P_i; E] -> block i -> [c; .; E]        P: p x d

c are the class and register tokens, E the patches; prompts have no position. They are taken out where the span ends, so
that what follows sees the tokens it knows. Around each block this is the paper's rule of replacing them: what became of
P_i-1 is read by nothing.
In Swin the prompts of a block join every window after the block's first norm; neither the bias of relative positions
nor the mask of shifted windows acts on them. The official code pools its last prompts along with the patches; here, as
everywhere, only patches are pooled.
P is uniform in +-sqrt(6 / (3 patch_size^2 + d)). In CLIP towers the first deep prompts join after the norm that stands
before the blocks, the shallow ones before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.methods.bottleneck import drawn
from vismodal.methods.tokens import refuse
from vismodal.site import Site


class Prompts(SpanModule):
    """p tokens after the class and register tokens, from where the span begins to where it ends."""

    def __init__(self, site: Site, tokens: int, bound: float, dropout: float):
        super().__init__()
        self.place = site.layout.prefix if site.layout else 0
        self.dropout = dropout
        self.P = drawn(partial(nn.init.uniform_, a=-bound, b=bound), tokens, site.width, device=site.device)

    def tokens(self, x: Tensor) -> Tensor:
        """For every row of x: b p d."""
        P = self.P.to(x.dtype).expand(len(x), -1, -1)
        return F.dropout(P, self.dropout) if self.training and self.dropout else P

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return torch.cat((x[:, : self.place], self.tokens(x), x[:, self.place :]), 1)

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return torch.cat((y[:, : self.place], y[:, self.place + len(self.P) :]), 1)


class WindowPrompts(Prompts):
    """The same p tokens behind those of every window, normed like them."""

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return x

    def feed(self, name: str, x: Tensor, context: dict[str, Any]) -> Tensor:
        if name != "windows":
            return x
        return torch.cat((x, context["aside"]("norm", self.tokens(x[:1])).to(x.dtype).expand(len(x), -1, -1)), 1)

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y[:, : y.shape[1] - len(self.P)] if name == "windows" else y

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y


@dataclass(frozen=True, kw_only=True, repr=False)
class VPT(Method):
    """Visual prompt tuning, arXiv 2203.12119: deep on sites=("block",), shallow on sites=("tokens",).

    Args:
        tokens: p, the number of prompts, of each block where they are deep.
        dropout: probability on the prompts while training.
        patch_size: side of the model's patches, which the range of the initial values depends on.
    """

    sites: tuple[str, ...] = ("block",)
    tokens: int = 10
    dropout: float = 0.0
    patch_size: int = 16

    survey: ClassVar[str] = "additive: soft prompts"
    paper: ClassVar[str] = "arXiv 2203.12119"
    mergeable: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 0 or self.patch_size < 1 or not 0 <= self.dropout < 1:
            raise InputError(f"{self!r}: tokens must be at least 0, patch_size at least 1, dropout in [0, 1)")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return not _why_not(site)

    def build(self, sites: Sequence[Site]) -> Built:
        refuse("VPT", sites, _why_not)
        return Built(tuple(self._module(site) for site in sites))

    def _module(self, site: Site) -> Prompts:
        kind = WindowPrompts if _has_windows(site) else Prompts
        return kind(site, self.tokens, math.sqrt(6 / (3 * self.patch_size**2 + site.width)), self.dropout)


def _has_windows(site: Site) -> bool:
    return site.span is not None and "windows" in site.span.room


def _why_not(site: Site) -> str:
    if site.span is None or site.kind not in ("block", "tokens"):
        return "prompts go to the blocks, sites=('block',), or over all of them, sites=('tokens',)"
    if site.span.channels != -1 or not site.width:
        return "it has no stream of tokens of a known width"
    return "" if _has_windows(site) else site.fixed
