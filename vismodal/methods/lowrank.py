"""A product of two factors that is added to a weight: what LoRA and its derivatives share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, Part, WeightModule
from vismodal.methods.layers import add_product, is_matrix, is_plain, matrix, stack
from vismodal.site import Site


class Product(WeightModule):
    """W' = W + s B A, of whatever `factors` gives.

    Dropout acts on the input features of A. Where W' has to be formed (a shadowed weight) it masks whole columns of A,
    one mask per forward. Token embeddings have no input features, so dropout does not act there.
    """

    def __init__(self, scaling: float, dropout: float):
        super().__init__()
        self.scaling = scaling
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """A: r x in (r x in/g x kernel of a convolution) and B: out x r."""
        raise NotImplementedError

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is not None
        A, B = self.factors()
        if self.training and self.dropout:
            A = A * F.dropout(A.new_ones(A.shape[1]), self.dropout).view(-1, *[1] * (A.dim() - 2))
        A, B = A.flatten(1).to(W.dtype), B.to(W.dtype)
        return torch.addmm(W.flatten(1), B, A, alpha=self.scaling).view(W.shape), b

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return is_plain(layer)

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        """One product down and one up for all parts together: their A stacked, their B side by side."""
        modules = [cast(Product, part.module) for part in parts]
        A, B, scaling = stack(layer, parts, [(*m.factors(), m.scaling) for m in modules])
        if modules[0].training and modules[0].dropout and not isinstance(layer, nn.Embedding):
            x = F.dropout(x, modules[0].dropout)
        return add_product(layer, x, y, A, B, scaling)


class LowRank(Product):
    """A: Kaiming uniform with a = sqrt(5), B: zero."""

    def __init__(self, W: Tensor, rank: int, scaling: float, dropout: float):
        super().__init__(scaling, dropout)
        device = "meta" if W.is_meta else "cpu"  # the same draw for every device
        A = torch.empty(rank, *W.shape[1:], device=device, dtype=torch.float32)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)).to(W.device))
        self.B = nn.Parameter(torch.zeros(W.shape[0], rank, device=W.device, dtype=torch.float32))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B


@dataclass(frozen=True, kw_only=True, repr=False)
class LowRankMethod(Method):
    """Fields of every method that adds a product of two factors.

    Args:
        rank: r, the inner dimension of the product.
        dropout: probability on the input features of A while training.
    """

    sites: tuple[str, ...] = ("attn.q", "attn.v")
    rank: int = 8
    dropout: float = 0.0

    survey: ClassVar[str] = "reparameterised: LoRA derivatives"
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise InputError(f"{type(self).__name__}: rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"{type(self).__name__}: dropout must be in [0, 1), not {self.dropout}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return is_matrix(site)

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(self.module(site, matrix(type(self).__name__, site)) for site in sites))

    def module(self, site: Site, W: Tensor) -> Product:
        """The module of one site, whose weight is W."""
        raise NotImplementedError
