"""A product of two factors that is added to a weight: what LoRA and its derivatives share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, Part, WeightModule
from vismodal.methods.layers import add_product, is_matrix, is_plain, matrix, stack
from vismodal.methods.spectrum import Spectrum, spectrum
from vismodal.site import Site


class Product(WeightModule):
    """W' = W + s B A, of whatever `factors` gives.

    Dropout acts on the input features of A. Where W' has to be formed (a shadowed weight) it masks whole columns of A,
    one mask per forward. Token embeddings have no input features, so dropout does not act there.
    """

    own: ClassVar[bool] = False  # whether its factors are its own, and all that it is: `hold` can then replace them

    def __init__(self, scaling: float, dropout: float):
        super().__init__()
        self.scaling = scaling
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """A: r x in (r x in/g x kernel of a convolution) and B: out x r."""
        raise NotImplementedError

    def spectrum(self) -> Spectrum:
        """Of s B A, as in eval mode."""
        training, self.training = self.training, False
        try:
            return spectrum(*self.factors(), self.scaling)
        finally:
            self.training = training

    def hold(self, update: Spectrum) -> None:
        """Have this for s B A, where the factors are its `own`."""
        raise NotImplementedError

    def resize(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the ranks of tensors that were pruned, where the factors are its `own`."""

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


class Own(Product):
    """One that has at most `most` ranks. `axes` says on which axis of its tensors they lie."""

    own: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, int]]
    most: int

    def become(self, **tensors: Tensor) -> None:
        """Other values, of other ranks. The parameters stay the same objects, so that what holds them still does."""
        for name, value in tensors.items():
            held = getattr(self, name)
            held.data, held.grad = value.to(held.device, held.dtype).contiguous(), None

    def resize(self, tensors: Mapping[str, Tensor]) -> None:
        new = {name: (tensors[name], getattr(self, name), axis) for name, axis in self.axes.items()}
        ranks = {t.shape[axis] for t, held, axis in new.values() if t.dim() == held.dim()} - {0}
        if len(ranks) == 1 and ranks.pop() <= self.most and any(t.shape != held.shape for t, held, _ in new.values()):
            self.become(**{name: torch.zeros_like(t) for name, (t, held, axis) in new.items() if _fits(t, held, axis)})


def _fits(t: Tensor, held: Tensor, axis: int) -> bool:
    """Whether the shapes differ on that axis alone."""
    return t.dim() == held.dim() and all(
        a == b for i, (a, b) in enumerate(zip(t.shape, held.shape, strict=True)) if i != axis
    )


class LowRank(Own):
    """A: Kaiming uniform with a = sqrt(5), B: zero."""

    axes: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1}

    def __init__(self, W: Tensor, rank: int, scaling: float, dropout: float):
        super().__init__(scaling, dropout)
        self.most = rank
        device = "meta" if W.is_meta else "cpu"  # the same draw for every device
        A = torch.empty(rank, *W.shape[1:], device=device, dtype=torch.float32)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)).to(W.device))
        self.B = nn.Parameter(torch.zeros(W.shape[0], rank, device=W.device, dtype=torch.float32))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def hold(self, update: Spectrum) -> None:
        A, B = update.factors(self.scaling)
        self.become(A=A.view(-1, *self.A.shape[1:]), B=B)


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
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("conv",),)

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

    def spectrum(self, module: nn.Module) -> Tensor | None:
        product = cast(Product, module)
        return product.spectrum().S if product.own else None

    def truncate(self, module: nn.Module, rank: int) -> None:
        product = cast(Product, module)
        product.hold(product.spectrum().first(rank))

    def resize(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        cast(Product, module).resize(tensors)
