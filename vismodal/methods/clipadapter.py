"""CLIP-Adapter (Gao et al. 2021, arXiv 2110.04544, equations 4 and 6).

    f' = a relu(U relu(D f)) + (1 - a) f        f: ... D_f, D: r D_f, U: D_f r, r = D_f / reduction

f is the image feature before it is normalised. As in the official code a is 0.2, the factors have no bias and begin as
those of nn.Linear, and only the image side has an adapter; the paper describes one for the class features as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.methods.initial import drawn, kaiming
from vismodal.site import Site


class Mixed(SpanModule):
    """On features at the end of a span."""

    def __init__(self, site: Site, hidden: int, ratio: float):
        super().__init__()
        self.ratio = ratio
        self.down = drawn(kaiming, hidden, site.width, device=site.device)
        self.up = drawn(kaiming, site.width, hidden, device=site.device)

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        h = F.relu(F.linear(y, self.down.to(y.dtype)))
        return self.ratio * F.relu(F.linear(h, self.up.to(h.dtype))).to(y.dtype) + (1 - self.ratio) * y


@dataclass(frozen=True, kw_only=True, repr=False)
class CLIPAdapter(Method):
    """CLIP-Adapter, arXiv 2110.04544, on a CLIPClassifier.

    Args:
        reduction: of the features' width within.
        ratio: a, the share of the adapted feature.
    """

    sites: tuple[str, ...] = ("image.features",)
    reduction: int = 4
    ratio: float = 0.2

    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "arXiv 2110.04544"
    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction < 1 or not 0 < self.ratio <= 1:
            raise InputError(f"{self!r}: reduction must be at least 1, ratio above 0 and at most 1")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.span is not None and site.kind == "image.features"

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(f"CLIPAdapter goes to ('image.features',) of a CLIPClassifier, not to {site.key}")
        return Built(tuple(Mixed(s, max(1, s.width // self.reduction), self.ratio) for s in sites))
