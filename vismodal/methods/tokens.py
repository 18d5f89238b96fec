"""Tokens, keys and values that join those of a model: spans that several methods use, and what they ask of a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import SpanModule
from vismodal.methods.initial import drawn
from vismodal.site import Site


def join(x: Tensor, P: Tensor, start: int) -> Tensor:
    """x: b n d with P, b p d or p d, between its rows from `start`."""
    return torch.cat((x[:, :start], _rows(P, x), x[:, start:]), 1)


def overwrite(x: Tensor, P: Tensor, start: int) -> Tensor:
    """x: b n d with P, b p d or p d, in the places of its rows from `start`."""
    return torch.cat((x[:, :start], _rows(P, x), x[:, start + P.shape[-2] :]), 1)


def drop(x: Tensor, p: int, start: int) -> Tensor:
    """x: b n d without p of its rows from `start`."""
    return torch.cat((x[:, :start], x[:, start + p :]), 1)


def _rows(P: Tensor, x: Tensor) -> Tensor:
    return P.to(x.dtype).expand(len(x), -1, -1)


class Prompts(SpanModule):
    """P: p x d, after the class and register tokens, from where the span begins to where it ends."""

    def __init__(self, site: Site, tokens: int, bound: float, dropout: float = 0.0):
        super().__init__()
        self.place = site.layout.prefix if site.layout else 0
        self.dropout = dropout
        self.P = drawn(partial(nn.init.uniform_, a=-bound, b=bound), tokens, site.width, device=site.device)

    def prompts(self) -> Tensor:
        """Those that act."""
        return self.P

    def tokens(self, x: Tensor) -> Tensor:
        """For every row of x: b p d."""
        P = self.prompts().to(x.dtype).expand(len(x), -1, -1)
        return F.dropout(P, self.dropout) if self.training and self.dropout else P

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return join(x, self.tokens(x), self.place)

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return drop(y, len(self.prompts()), self.place)


class WindowPrompts(Prompts):
    """The same p tokens behind those of every window, normed like them."""

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return x

    def feed(self, name: str, x: Tensor, context: dict[str, Any]) -> Tensor:
        if name != "windows":
            return x
        return torch.cat((x, context["aside"]("norm", self.tokens(x[:1])).to(x.dtype).expand(len(x), -1, -1)), 1)

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y[:, : y.shape[1] - len(self.prompts())] if name == "windows" else y

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y


class JoinedKeys(SpanModule):
    """p keys and values behind the others, through p zero tokens whose queries' outputs are dropped: for an attention
    that takes the number of its keys from that of its queries."""

    def keys(self, x: Tensor) -> Tensor:
        """For the attention's input x: b n d, the keys and the values, 2 b p d or 2 1 p d."""
        raise NotImplementedError

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        context["at"], context["keys"] = x.shape[1], self.keys(x)
        return F.pad(x, (0, 0, 0, context["keys"].shape[2]))

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        if name == "q":
            return y
        k, v = context["keys"].to(y.dtype)
        new = {"k": k, "v": v, "qkv": torch.cat((torch.zeros_like(k), k, v), -1)}[name]
        at, end = context["at"], context["at"] + new.shape[1]
        return torch.cat((y[:, :at], new.expand(len(y), -1, -1), y[:, end:]), 1)

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        at = context["at"]
        return torch.cat((y[:, :at], y[:, at + context["keys"].shape[2] :]), 1)


def has_windows(site: Site) -> bool:
    """Whether it is a block that cuts its tokens into windows which tokens can join."""
    return site.span is not None and "windows" in site.span.room


def why_no_prompts(site: Site) -> str:
    """Why prompts cannot join the stream of a site; "" where they can."""
    if site.span is None or site.kind not in ("block", "tokens"):
        return "prompts go to the blocks, sites=('block',), or over all of them, sites=('tokens',)"
    if site.span.channels != -1 or not site.width:
        return "it has no stream of tokens of a known width"
    return "" if has_windows(site) else site.fixed


def why_no_keys(site: Site) -> str:
    """Why keys and values cannot join those of a site; "" where they can."""
    if site.span is None or site.kind.rpartition(".")[2] != "keys":
        return "keys and values go to attention, sites=('keys',), and in a UNet also ('keys', 'xattn.keys')"
    seen = site.modules.keys() & {"qkv", "k"} or isinstance(site.modules["enter"], nn.MultiheadAttention)
    return site.fixed or ("" if seen else "it computes its keys and values within, where nothing can join them")


def refuse(method: str, sites: Sequence[Site], why_not: Callable[[Site], str]) -> None:
    """Raises `InputError` for a site that cannot take tokens, with the reason and the `where` that leaves it out."""
    heads = {s.path.partition(".")[0]: "" for s in sites}
    heads |= {s.path.partition(".")[0]: why_not(s) for s in sites if why_not(s)}
    able = [head for head, why in heads.items() if not why]
    hint = f"; where='{able[0]}.*' takes those that can" if able else ""
    for site in sites:
        if why := why_not(site):
            raise InputError(f"{method} cannot join tokens to {site.key} ({site.kind}): {why}{hint}")


def key_width(site: Site) -> int:
    """Channels of the keys of a span inside attention: rows of the projection, or a third of those of all three."""
    whole, attention = site.modules.get("qkv"), site.modules["enter"]
    if isinstance(attention, nn.MultiheadAttention):
        return attention.embed_dim
    if isinstance(whole, nn.Linear):
        return whole.out_features // 3
    projection = site.modules.get("k")
    return projection.out_features if isinstance(projection, nn.Linear) else site.width
