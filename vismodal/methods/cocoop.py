"""CoCoOp: conditional context optimization (Zhou et al. 2022, arXiv 2203.05557, equation 3).

    v_m(x) = v_m + U relu(D f + d) + u        t_c(x) = g([s; v_1(x) .. v_M(x); class name "."; e])

v: M d_t, f: b D_f, the normalised image features, D: r D_f with r = D_f / 16, d: r, U: d_t r, u: d_t. Every picture has
class features of its own: b C texts go through the text tower, which is why the official code takes batches of 1.
v begins with the embeddings of words, the network as nn.Linear does, as in the official code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.methods.deepprompts import Context, context, start_of
from vismodal.methods.initial import drawn, kaiming, linear
from vismodal.methods.tokens import overwrite
from vismodal.site import Site


class Conditional(SpanModule):
    """On the whole classifier: reads the features of the pictures, writes the contexts of the texts."""

    def __init__(self, site: Site, each: Context, hidden: int):
        super().__init__()
        self.start, features = each.start, site.widths["image"]
        self.register_buffer("ids", each.ids, persistent=False)
        self.v = start_of(each, site)
        self.down = drawn(kaiming, hidden, features, device=site.device)
        self.down_bias = drawn(_uniform(features), hidden, device=site.device)
        self.up = drawn(kaiming, site.width, hidden, device=site.device)
        self.up_bias = drawn(_uniform(hidden), site.width, device=site.device)

    def feed(self, name: str, x: Tensor, context: dict[str, Any]) -> Tensor:
        if name != "text":
            return x
        return cast(Tensor, self.ids).expand(len(context["shift"]), -1, -1)  # b C L

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        if name == "image":
            h = F.relu(linear(F.normalize(y, dim=-1), self.down, self.down_bias))
            context["shift"] = linear(h, self.up, self.up_bias)  # b d_t
        if name != "tokens":
            return y
        v = self.v + context["shift"][:, None]  # b M d_t
        return overwrite(y, v.repeat_interleave(len(y) // len(v), 0), self.start)


def _uniform(fan_in: int) -> Any:
    """The bias of nn.Linear."""
    bound = 1 / math.sqrt(fan_in)
    return partial(nn.init.uniform_, a=-bound, b=bound)


@dataclass(frozen=True, kw_only=True, repr=False)
class CoCoOp(Method):
    """Conditional context optimization, arXiv 2203.05557, on a CLIPClassifier.

    Args:
        tokens: M; by default the number of tokens of the words, 16 without words.
        words: what the context says at the start; "" draws it at random.
        reduction: of the width of the image features within the network.
    """

    sites: tuple[str, ...] = ("classifier",)
    tokens: int | None = None
    words: str = "a photo of a"
    reduction: int = 16

    survey: ClassVar[str] = "additive: soft prompts"
    paper: ClassVar[str] = "arXiv 2203.05557"
    mergeable: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction < 1 or (self.tokens is not None and self.tokens < 1):
            raise InputError(f"{self!r}: reduction and tokens must be at least 1")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.span is not None and site.kind == "classifier"

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(f"CoCoOp goes to ('classifier',) of a CLIPClassifier, not to {site.key}")
        return Built(tuple(self._module(site) for site in sites))

    def _module(self, site: Site) -> Conditional:
        hidden = max(1, site.widths["image"] // self.reduction)
        return Conditional(site, context(site, self.words, self.tokens), hidden)
