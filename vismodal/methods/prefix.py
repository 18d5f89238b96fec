"""Prefix tuning: learned keys and values (Li and Liang 2021, arXiv 2101.00190; in vision He et al. 2022, 2110.04366).

    K' = [K; P_k], V' = [V; P_v]        P_k, P_v: p x d, of every block and tower

Attention does not depend on the order of its keys, so the prefix may stand behind. Where a block takes the number of
keys from that of its queries, p zero tokens are joined on entering the attention, their keys and values overwritten,
and the outputs of their queries dropped. Where it reads it off the keys (diffusers), the prefix is joined to those, and
a `nn.MultiheadAttention` takes it as its `bias_k` and `bias_v`. Norms of keys (`qk_norm`) act on P_k too. In Swin every
window gets the prefix, on which neither the bias of relative positions nor the mask of shifted windows acts.

The paper trains P as the output of a perceptron, P = W2 tanh(W1 E + b1) + b2, E: p x d, which `hidden` asks for: E, W1
and b1 are shared by all blocks. E is N(0, 1) as in the official code; so is P there where it is learned directly, which
is far from what keys of vision transformers look like: here it is N(0, std).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule, share
from vismodal.methods.initial import drawn, kaiming, zeros
from vismodal.methods.tokens import JoinedKeys, key_width, refuse, why_no_keys
from vismodal.site import Site


class Trunk(nn.Module):
    """tanh(W1 E + b1): p x hidden, what all blocks' prefixes are made of."""

    def __init__(self, site: Site, tokens: int, hidden: int):
        super().__init__()
        self.E = drawn(nn.init.normal_, tokens, site.width, device=site.device)
        self.W1 = drawn(kaiming, hidden, site.width, device=site.device)
        self.b1 = drawn(zeros, hidden, device=site.device)

    def forward(self) -> Tensor:
        return torch.tanh(F.linear(self.E, self.W1, self.b1))


class Prefixes(SpanModule):
    """P_k and P_v of one attention."""

    shared: Trunk

    def __init__(self, site: Site, tokens: int, width: int, hidden: int, std: float):
        super().__init__()
        self.hidden = hidden
        if hidden:
            self.W2 = drawn(kaiming, 2 * width, hidden, device=site.device)
            self.b2 = drawn(zeros, 2 * width, device=site.device)
        else:
            self.P = drawn(partial(nn.init.normal_, std=std), 2, tokens, width, device=site.device)

    def keys(self, x: Tensor) -> Tensor:
        """P_k and P_v: 2 1 p d, in the dtype of x."""
        if not self.hidden:
            return self.P[:, None].to(x.dtype)
        P = F.linear(self.shared(), self.W2, self.b2)  # p 2d
        return P.unflatten(1, (2, -1)).transpose(0, 1)[:, None].to(x.dtype)


class Joined(Prefixes, JoinedKeys):
    """Through zero tokens behind the others."""


class Longer(Prefixes):
    """Behind keys and values whose number may differ from that of the queries."""

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        context["k"], context["v"] = self.keys(x)
        return x

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        return torch.cat((y, context[name].to(y.dtype).expand(len(y), -1, -1)), 1)


class Biases(Prefixes):
    """As the further keys and values of `nn.MultiheadAttention`, p 1 d, behind those that it has."""

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        context["keys"] = self.keys(x)
        return x

    def values(self, module: nn.Module, context: dict[str, Any]) -> Mapping[str, Any]:
        new = dict(zip(("bias_k", "bias_v"), context["keys"].transpose(1, 2), strict=True))
        old = {name: getattr(module, name) for name in new}
        return {name: t if old[name] is None else torch.cat((old[name].to(t.dtype), t)) for name, t in new.items()}


@dataclass(frozen=True, kw_only=True, repr=False)
class Prefix(Method):
    """Prefix tuning, arXiv 2101.00190: learned keys and values; in a UNet sites=("keys", "xattn.keys").

    Args:
        tokens: p, the number of keys and values.
        hidden: width of the perceptron that the prefixes come out of (512 in the paper's code); 0 learns them directly.
        std: standard deviation of the initial values of those learned directly.
    """

    sites: tuple[str, ...] = ("keys",)
    tokens: int = 10
    hidden: int = 0
    std: float = 0.02

    survey: ClassVar[str] = "additive: soft prompts"
    paper: ClassVar[str] = "arXiv 2101.00190"
    mergeable: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1 or self.hidden < 0:
            raise InputError(f"{self!r}: tokens must be at least 1, hidden at least 0")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return not why_no_keys(site)

    def build(self, sites: Sequence[Site]) -> Built:
        refuse("Prefix", sites, why_no_keys)
        modules = tuple(self._module(site) for site in sites)
        if not self.hidden:
            return Built(modules)
        trunk = Trunk(sites[0], self.tokens, self.hidden)
        for module in modules:
            share(module, trunk)
        return Built(modules, trunk)

    def _module(self, site: Site) -> Prefixes:
        return _form(site)(site, self.tokens, key_width(site), self.hidden, self.std)


def _form(site: Site) -> type[Prefixes]:
    if isinstance(site.modules["enter"], nn.MultiheadAttention):
        return Biases
    return Longer if site.modules.keys() == {"enter", "exit", "k", "v"} else Joined
