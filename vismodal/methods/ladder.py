"""LST: ladder side-tuning (Sung, Cho and Bansal 2022, arXiv 2206.06522).

    s <- D_0 x_0 + d_0                                          x_0: b n c before the blocks
    s <- block_i(g_i s + (1 - g_i) (D_{i+1} h_i + d_{i+1}))     h_i: b n c after block i; D: w x c, w = c / reduction
    g_i = sigma(a_i / T)                                        a_i = 0 at the start, T = 0.1
    out = U norm(s) + u                                         U: c x w

`out` stands in for the base's last features: after its final norm in ViT, before it in the towers of CLIP. Every x and
h is detached, so the backbone has no graph at all.

The side blocks are small transformer blocks that begin as structured prunings of the base's by the size of weights. The
official code prunes matrix after matrix, each by what the one before kept; here the whole side keeps one set of
channels of the stream, so that its residual sums are over the same ones. D and U are N(0, 0.01) with zero biases, as
there.
A side block is a plain one: neither rotary or relative positions nor layer scale come along from the base.

For models whose blocks have one width. Swin, conv nets and UNets are left out: a ladder beside them has no published
definition (a UNet's side blocks would need its time steps, texts and skips too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.methods.blocks import along, over_all_blocks
from vismodal.methods.initial import drawn, zeros
from vismodal.methods.pruned import Block, Norm, blocks_of, channels_of, prune
from vismodal.site import Layout, Site

small = partial(nn.init.normal_, std=0.01)


class Rungs(SpanModule):
    """The side network; s before its i-th block is kept as "s.i"."""

    def __init__(self, site: Site, width: int, reduction: int, head: int, pruned: bool, temperature: float):
        super().__init__()
        self.layout, self.temperature = site.layout or Layout(), temperature
        bigs, device, n = blocks_of(site), site.device, site.depth
        self.down = nn.ParameterList([drawn(small, width, site.width, device=device) for _ in range(n + 1)])
        self.down_bias = nn.ParameterList([drawn(zeros, width, device=device) for _ in range(n + 1)])
        self.gate = drawn(zeros, n, device=device)
        hidden = [big["mlp.up"].tensor.shape[0] // reduction for big in bigs]
        self.blocks = nn.ModuleList(
            Block(width, h, "mlp.gate" in big, width // head, self.layout.causal, device)
            for h, big in zip(hidden, bigs, strict=True)
        )
        self.norm = Norm(width, device)
        self.up, self.up_bias = drawn(small, site.width, width, device=device), drawn(zeros, site.width, device=device)
        if pruned:
            channels = channels_of(bigs, width)
            for big, block in zip(bigs, self.blocks, strict=True):
                prune(big, block, channels)  # type: ignore[arg-type]

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        context["s.0"] = along(x.detach(), self.down[0], self.down_bias[0])
        return x

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        i = int(name.rpartition(".")[2])
        g = torch.sigmoid(self.gate[i] / self.temperature).to(y.dtype)
        rung = along(y.detach(), self.down[i + 1], self.down_bias[i + 1])
        context[f"s.{i + 1}"] = self.blocks[i](g * context[f"s.{i}"] + (1 - g) * rung)
        return y

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        s = context[f"s.{len(self.blocks)}"]
        if s.shape[1] != y.shape[1]:  # prompts of others are gone from the stream by now
            first, rest = s.tensor_split([self.layout.prefix], 1)
            s = torch.cat([first, rest[:, context["extra"] :]], 1)
        return along(self.norm(s), self.up, self.up_bias).to(y.dtype)


@dataclass(frozen=True, kw_only=True, repr=False)
class Ladder(Method):
    """Ladder side-tuning, arXiv 2206.06522.

    Args:
        reduction: the side is so many times narrower than the base.
        head: channels of one head of the side's attention; 8 are the base's 64 over the default reduction.
        pruned: begin with the base's largest weights; otherwise at random.
        temperature: T, of the gates.
    """

    sites: tuple[str, ...] = ("features",)
    reduction: int = 8
    head: int = 8
    pruned: bool = True
    temperature: float = 0.1

    survey: ClassVar[str] = "efficiency: memory"
    paper: ClassVar[str] = "arXiv 2206.06522"
    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction < 1 or self.head < 1:
            raise InputError(f"Ladder: reduction and head must be at least 1, not {self.reduction} and {self.head}")
        if self.temperature <= 0:
            raise InputError(f"Ladder: temperature must be above 0, not {self.temperature:g}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return over_all_blocks(site)

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(self._module(site) for site in sites))

    def _module(self, site: Site) -> Rungs:
        if not self.fits(site):
            raise InputError(
                "Ladder needs a stream of tokens of one width over all blocks ('features' of a plain transformer), "
                f"which {site.key} ({site.kind}) is not"
            )
        width = site.width // self.reduction
        if not width or site.width % self.reduction or width % self.head:
            raise InputError(
                f"Ladder: {site.key} has {site.width} channels, which reduction={self.reduction} and head={self.head} "
                "do not divide; choose others, e.g. reduction=4 and head=16"
            )
        return Rungs(site, width, self.reduction, self.head, self.pruned, self.temperature)
