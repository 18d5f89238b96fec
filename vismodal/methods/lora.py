"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    W' = W + s B A        A: r x in, B: out x r, s = alpha / r, or alpha / sqrt(r) when rank-stabilised
                          (Kalajdzievski 2023, arXiv 2312.03732)

Convolutions have A: r x in/g x kh x kw with the layer's own stride, dilation and padding, then B as a 1x1 convolution
with the layer's groups. Embeddings have B: n x r, A: r x d, read as rows of B times A.
A is Kaiming uniform with a = sqrt(5) as in the official code (the paper says Gaussian), B is zero.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354) gives B a learning rate that is `lr_ratio` times that of A. LoRA-FA (Zhang
et al. 2023, arXiv 2308.03303) keeps A as it was drawn: a layer then stores A x for its backward, r values a token
instead of x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import Tensor

from vismodal.errors import InputError
from vismodal.methods.base import Built
from vismodal.methods.lowrank import LowRank, LowRankMethod
from vismodal.site import Site


@dataclass(frozen=True, kw_only=True, repr=False)
class LoRA(LowRankMethod):
    """Low-rank adaptation, arXiv 2106.09685.

    Args:
        rank: r, the inner dimension of the update.
        alpha: the update is scaled by alpha / r; the default alpha = r scales by 1.
        dropout: probability on the input features of A while training.
        rank_stabilised: scale by alpha / sqrt(r), arXiv 2312.03732.
        ranks: ranks of single sites, by glob on their kind or key, first match: {"mlp.*": 16, "blocks.0.*": 4}.
        lr_ratio: learning rate of B over that of A in `adapter.groups`; LoRA+, arXiv 2402.12354, takes 16.
        freeze_down: train B alone, LoRA-FA, arXiv 2308.03303.
    """

    alpha: float | None = None
    rank_stabilised: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)
    lr_ratio: float = 1.0
    freeze_down: bool = False

    survey: ClassVar[str] = "reparameterised: low rank"
    paper: ClassVar[str] = "arXiv 2106.09685"
    pair: ClassVar[type[LowRank]] = LowRank  # of the sites' modules

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for rank in self.ranks.values():
            if rank < 1:
                raise InputError(f"{name}: rank must be at least 1, not {rank}")
        for field_, value in (("alpha", self.alpha), ("lr_ratio", self.lr_ratio)):
            if value is not None and not value > 0:
                raise InputError(f"{name}: {field_} must be above 0, not {value}")

    def build(self, sites: Sequence[Site]) -> Built:
        for glob in self.ranks:
            if not any(_matches(glob, s) for s in sites):
                name = type(self).__name__
                raise InputError(f"{name}: ranks names {glob!r}, which matches no chosen site, such as {sites[0].key}")
        return super().build(sites)

    def rank_of(self, site: Site) -> int:
        return next((r for glob, r in self.ranks.items() if _matches(glob, site)), self.rank)

    def module(self, site: Site, W: Tensor) -> LowRank:
        rank = self.rank_of(site)
        alpha = rank if self.alpha is None else self.alpha
        scaling = alpha / (math.sqrt(rank) if self.rank_stabilised else rank)
        module = self.pair(W, rank, scaling, self.dropout)
        module.A.requires_grad_(not self.freeze_down)
        return module

    def rate(self, tensor: str) -> float:
        return self.lr_ratio if tensor == "B" else 1.0


def _matches(glob: str, site: Site) -> bool:
    return fnmatchcase(site.kind, glob) or fnmatchcase(site.key, glob)
