"""IP-Adapter: a picture as a prompt, by attention of its own beside the text's (Ye et al. 2023, arXiv 2308.06721).

    c = LN(W e + b)                                           e: b x width, W: (n d) x width, c: b x n x d
    Z = softmax(Q K^T / sqrt(h)) V + s softmax(Q K'^T / sqrt(h)) V'
    K' = W'_k c, V' = W'_v c                                  in heads of h channels, as Q; W_out reads Z

e are features of a picture by any frozen image encoder, in the paper the global ones of CLIP (ViT-H/14: width 1024);
they are the adapter's `condition`. d is the width of the text's tokens. W'_k and W'_v begin as copies of the base's W_k
and W_v. Q is the base's, with what other adapters make of it; s is `adapter.scale`.

In the rows that guidance leads away from, e is zero, as it is for pictures that are dropped in training (5% of the
pictures, 5% of the texts, 5% of both): that is the training loop's to do. The paper's second form, which resamples all
of the encoder's tokens ("plus"), is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Condition, Method, SpanModule, share
from vismodal.methods.initial import built
from vismodal.quantised import values
from vismodal.site import Site


class Projection(nn.Module):
    """e: b width -> c: b n d."""

    def __init__(self, width: int, tokens: int, d: int):
        super().__init__()
        self.tokens = tokens
        self.linear, self.norm = nn.Linear(width, tokens * d), nn.LayerNorm(d)

    def forward(self, e: Tensor) -> Tensor:
        c: Tensor = self.norm(self.linear(e.to(self.linear.weight.dtype)).unflatten(1, (self.tokens, -1)))
        return c


class Decoupled(SpanModule):
    """W'_k and W'_v of one cross-attention."""

    shared: Projection

    def __init__(self, site: Site):
        super().__init__()
        self.heads = site.heads
        self.k, self.v = (nn.Parameter(_weight(site, name).detach().float().clone()) for name in ("k", "v"))

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        if name == "q":
            context["q"] = y
        return y

    def feed(self, name: str, x: Tensor, context: dict[str, Any]) -> Tensor:
        if name != "out":
            return x
        q: Tensor = context["q"]
        c = self.shared(context["condition"]).to(q.dtype)
        each = (q, F.linear(c, self.k.to(q.dtype)), F.linear(c, self.v.to(q.dtype)))  # b . (heads h)
        z = F.scaled_dot_product_attention(*(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in each))
        return x + z.transpose(1, 2).flatten(2).to(x.dtype)


@dataclass(frozen=True, kw_only=True, repr=False)
class IPAdapter(Method):
    """IP-Adapter, arXiv 2308.06721: `adapter.condition` are features of pictures, rows x width.

    Args:
        tokens: n, of a picture.
        width: of the features.
    """

    sites: tuple[str, ...] = ("xattn.beside",)
    tokens: int = 4
    width: int = 1024

    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "arXiv 2308.06721"
    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False
    conditioned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1 or self.width < 1:
            raise InputError(f"{self!r}: tokens and width must be at least 1")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.span is not None and site.kind == "xattn.beside"

    def condition(self, rows: Tensor) -> Condition:
        if rows.dim() != 2 or rows.shape[1] != self.width or not rows.is_floating_point():
            raise InputError(
                f"IPAdapter(width={self.width}) takes features of pictures, rows x {self.width}, not "
                f"{'x'.join(map(str, rows.shape))} of {rows.dtype}"
            )
        return Condition(rows, torch.zeros_like(rows))

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(f"IPAdapter goes beside cross-attention ('xattn.beside'); {site.key} is {site.kind!r}")
        modules = tuple(Decoupled(site) for site in sites)
        d = {_weight(site, "k").shape[1] for site in sites}
        if len(d) > 1:
            raise InputError(f"IPAdapter: the text has {sorted(d)} channels in these layers; choose some by where=")
        projection = built(lambda: Projection(self.width, self.tokens, d.pop()), sites[0].device)
        for module in modules:
            share(module, projection)
        return Built(modules, projection)


def _weight(site: Site, name: str) -> Tensor:
    """W_k or W_v of the base: (heads h) x d."""
    weight = site.modules[name].weight
    assert isinstance(weight, Tensor)
    return values(weight)
