"""LoHa: low-rank Hadamard products (FedPara, Hyeon-Woo et al. 2022, arXiv 2108.06098; LyCORIS, arXiv 2309.14859).

    W' = W + s (w1a w1b) * (w2a w2b)        elementwise; w1a, w2a: out x r, w1b, w2b: r x (in/g kh kw), s = alpha / r

The update has ranks up to r^2, and is a product B A of that inner size: B[o, pq] = w1a[o, p] w2a[o, q] and
A[pq, i] = w1b[p, i] w2b[q, i] over all pairs pq. Where r^2 is small, B A x is added to the output; else W' is formed.
Initial values are LyCORIS's: w1a ~ N(0, .1), w1b and w2b ~ N(0, 1), w2a = 0. peft has three Kaiming-uniform factors
and w2b = 0. The Tucker form for convolutions, off by default in both, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, Part, WeightModule
from vismodal.methods.initial import drawn, zeros
from vismodal.methods.layers import add_product, is_matrix, is_plain, matrix, stack
from vismodal.quantised import is_quantised
from vismodal.site import Site


class Hadamard(WeightModule):
    """The four factors on one site."""

    def __init__(self, W: Tensor, rank: int, scaling: float):
        super().__init__()
        self.scaling = scaling
        rows, columns, normal = W.shape[0], W[0].numel(), nn.init.normal_
        self.w1a = drawn(partial(normal, std=0.1), rows, rank, device=W.device)
        self.w1b = drawn(normal, rank, columns, device=W.device)
        self.w2a = drawn(zeros, rows, rank, device=W.device)
        self.w2b = drawn(normal, rank, columns, device=W.device)

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is not None
        w1a, w1b, w2a, w2b = (w.to(W.dtype) for w in (self.w1a, self.w1b, self.w2a, self.w2b))
        return W + self.scaling * ((w1a @ w1b) * (w2a @ w2b)).view(W.shape), b


class SmallHadamard(Hadamard):
    """As a product of two matrices of inner size r^2, without W'."""

    def __init__(self, W: Tensor, rank: int, scaling: float):
        super().__init__(W, rank, scaling)
        self.shape = W.shape[1:]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        B = self.w1a[:, :, None] * self.w2a[:, None]  # out r r
        A = self.w1b[:, None] * self.w2b[None]  # r r in
        return A.reshape(-1, *self.shape), B.flatten(1), self.scaling

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return is_plain(layer)

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        factors = [cast(SmallHadamard, part.module).factors() for part in parts]
        return add_product(layer, x, y, *stack(layer, parts, factors))


@dataclass(frozen=True, kw_only=True, repr=False)
class LoHa(Method):
    """Low-rank Hadamard products, arXiv 2108.06098.

    Args:
        rank: r, the inner dimension of both products; the update has ranks up to r^2.
        alpha: the update is scaled by alpha / r; the default alpha = r scales by 1.
    """

    sites: tuple[str, ...] = ("attn.q", "attn.v")
    rank: int = 8
    alpha: float | None = None

    survey: ClassVar[str] = "reparameterised: low rank"
    paper: ClassVar[str] = "arXiv 2108.06098"
    mergeable: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("conv",),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise InputError(f"LoHa: rank must be at least 1, not {self.rank}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return is_matrix(site)

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(self._module(matrix("LoHa", site)) for site in sites))

    def _module(self, W: Tensor) -> Hadamard:
        rows, columns = W.shape[0], W[0].numel()
        # three products forward and backward, in place of that of the whole weight's gradient
        small = 3 * self.rank**2 * (rows + columns) <= rows * columns or is_quantised(W)
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        return (SmallHadamard if small else Hadamard)(W, self.rank, scaling)
