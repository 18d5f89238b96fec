"""AdaptFormer: a bottleneck in parallel to the MLP (Chen et al. 2022, arXiv 2205.13535).

    x <- x + MLP(LN(x)) + s (U Drop(ReLU(D x + d)) + u)        x: ... x c, D: r x c, U: c x r

The bottleneck reads the stream x itself, before the norm, and is added after the branch's drop-path and layer scale.
D is Kaiming uniform with a = sqrt(5), all else zero. The official
code may put a norm before the bottleneck or learn s; its own configuration does neither, and that is followed. It also
gives the dropout of 0.1.

On `attn` (and `xattn`) it is the parallel adapter of He et al. 2021, arXiv 2110.04366.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from vismodal.methods.base import Built, Method
from vismodal.methods.bottleneck import Bottleneck, check_branches, on_branch
from vismodal.methods.initial import check_sizes, kaiming, zeros
from vismodal.site import Site


class Parallel(Bottleneck):
    """Keeps the stream from where the branch begins, and adds s f(x) where it ends."""

    def __init__(self, site: Site, rank: int, scaling: float, dropout: float):
        super().__init__(site, rank, F.relu, kaiming, zeros, dropout)
        self.scaling = scaling

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        context["x"] = x
        return x

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y + self.scaling * self(context["x"])


@dataclass(frozen=True, kw_only=True, repr=False)
class AdaptFormer(Method):
    """Parallel adapters, arXiv 2205.13535.

    Args:
        rank: r, the inner dimension.
        scaling: s, on what the bottleneck adds.
        dropout: probability on the inner features while training.
    """

    sites: tuple[str, ...] = ("mlp",)
    rank: int = 64
    scaling: float = 0.1
    dropout: float = 0.1

    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "arXiv 2205.13535"
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("AdaptFormer", self.rank, self.dropout)

    @classmethod
    def fits(cls, site: Site) -> bool:
        return on_branch(site)

    def build(self, sites: Sequence[Site]) -> Built:
        check_branches("AdaptFormer", sites)
        return Built(tuple(Parallel(site, self.rank, self.scaling, self.dropout) for site in sites))
