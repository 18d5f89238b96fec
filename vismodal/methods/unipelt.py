"""UniPELT: adapters, prefixes and LoRA behind gates that the input opens (Mao et al. 2022, arXiv 2110.07577).

    g(z) = mean over tokens of sigmoid(w z + b)             z: b n d, w: 1 x d; one number for each row of the batch
    attention on x      q + g_l(x) B_q A_q x, v + g_l(x) B_v A_v x, K' = [K; g_p(x) P_k], V' = [V; g_p(x) P_v]
    MLP with output y   y + g_a(y) (U relu(D y + d) + u)

One gate for each method and block, as in the paper; the official code gives q and v one each. As there, LoRA's gate
stands in for its alpha / r, w is N(0, 0.02) and b zero, so that gates begin half open, and so are D and U, while A is
Kaiming uniform with a = sqrt(5) and B zero. P is N(0, std); the official code makes it by a perceptron.
In Swin a row is a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.methods.bottleneck import Bottleneck
from vismodal.methods.initial import drawn, kaiming, linear, zeros
from vismodal.methods.tokens import JoinedKeys, key_width, refuse, why_no_keys
from vismodal.site import Site

small = partial(nn.init.normal_, std=0.02)


class Gate(nn.Module):
    """g: b n d -> b 1 1, in the dtype of its input."""

    def __init__(self, width: int, device: torch.device | None):
        super().__init__()
        self.w = drawn(small, 1, width, device=device)
        self.b = drawn(zeros, 1, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.w, self.b).sigmoid().mean(1, keepdim=True)


class GatedAttention(JoinedKeys):
    """The prefix and LoRA on q and v of one attention."""

    def __init__(self, site: Site, tokens: int, rank: int, std: float):
        super().__init__()
        inner, device = key_width(site), site.device
        self.prefix_gate, self.lora_gate = Gate(site.width, device), Gate(site.width, device)
        self.P = drawn(partial(nn.init.normal_, std=std), 2, tokens, inner, device=device)
        self.A = drawn(kaiming, 2 * rank, site.width, device=device)  # of q, then of v
        self.B_q = drawn(zeros, inner, rank, device=device)
        self.B_v = drawn(zeros, inner, rank, device=device)

    def keys(self, x: Tensor) -> Tensor:
        return self.prefix_gate(x) * self.P[:, None].to(x.dtype)

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        h = F.linear(x, self.A.to(x.dtype)) * self.lora_gate(x)  # b n 2r
        joined = super().enter(x, context)
        h_q, h_v = F.pad(h, (0, 0, 0, joined.shape[1] - x.shape[1])).chunk(2, -1)
        context["q"], context["v"] = F.linear(h_q, self.B_q.to(h.dtype)), F.linear(h_v, self.B_v.to(h.dtype))
        return joined

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        if name == "qkv":
            q, v = context["q"], context["v"]
            y = y + torch.cat((q, torch.zeros_like(q), v), -1).to(y.dtype)
        elif name in context:
            y = y + context[name].to(y.dtype)
        return super().tap(name, y, context)


class GatedAdapter(Bottleneck):
    """The adapter on the output of one MLP."""

    def __init__(self, site: Site, width: int):
        super().__init__(site, width, F.relu, small, small)
        self.gate = Gate(site.width, site.device)

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y + self.gate(y) * self(y)


@dataclass(frozen=True, kw_only=True, repr=False)
class UniPELT(Method):
    """Gated prefixes, LoRA and adapters, arXiv 2110.07577.

    Args:
        tokens: p, the length of the prefixes.
        rank: r of LoRA on queries and values.
        width: of the adapters, in the paper a sixteenth of the model's.
        std: standard deviation of the prefixes' initial values.
    """

    sites: tuple[str, ...] = ("keys", "mlp")
    tokens: int = 10
    rank: int = 8
    width: int = 48
    std: float = 0.02

    survey: ClassVar[str] = "hybrid"
    paper: ClassVar[str] = "arXiv 2110.07577"
    mergeable: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tokens, self.rank, self.width) < 1:
            raise InputError(f"{self!r}: tokens, rank and width must be at least 1")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return not _why_not(site)

    def build(self, sites: Sequence[Site]) -> Built:
        refuse("UniPELT", sites, _why_not)
        return Built(tuple(self._module(site) for site in sites))

    def _module(self, site: Site) -> SpanModule:
        if site.kind == "mlp":
            return GatedAdapter(site, self.width)
        return GatedAttention(site, self.tokens, self.rank, self.std)


def _why_not(site: Site) -> str:
    if site.span is not None and site.kind == "mlp":
        return "" if site.width and site.span.channels == -1 else "it has no stream of tokens of a known width"
    if site.span is None or site.kind != "keys":
        return "UniPELT goes to attention and MLPs, sites=('keys', 'mlp')"
    if site.modules.keys() & {"q", "qkv"}:
        return why_no_keys(site)
    return site.fixed or "it computes its queries within the attention, where nothing can be added to them"
