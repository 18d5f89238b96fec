"""LoKr: Kronecker products (KronA, Edalati et al. 2022, arXiv 2212.10650; LyCORIS, arXiv 2309.14859).

    W' = W + s w1 (x) w2        out = a b, in/g = c d;  w1: a x c, w2: b x d kh kw;  row (i, j) of W' is i b + j

w2 = w2a w2b with inner size r unless r >= max(b, d) / 2, or `full`; w1 = w1a w1b only where `decompose_both` and
r < max(a, c) / 2. s = alpha / r, and 1 where neither is decomposed (peft scales there too).
a is the largest divisor of out that is at most `factor` and at most sqrt(out), c that of in; a `factor` that divides
out and is above its root is taken, with a the smaller of the two, as LyCORIS does (peft keeps their order then).

On an input seen as c x d, w1 (x) w2 acts as w1 x w2^T: the module adds that to a layer's output, without W'.
Initial values are LyCORIS's: Kaiming uniform with a = sqrt(5), w2 (or w2b) zero. peft makes w1 (or w1a) zero instead.
The Tucker form for convolutions, off by default in both, is not here.
"""

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
from vismodal.methods.initial import drawn, kaiming, zeros
from vismodal.methods.layers import Conv, add_rows, channel_axis, columns_of, is_matrix, is_plain, matrix
from vismodal.site import Site


def factorise(size: int, factor: int | None) -> tuple[int, int]:
    """Two factors of `size`, the smaller first: near to its root, or near to `factor`."""
    if factor is not None and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = min(math.isqrt(size), factor or size)
    a = next(a for a in range(most, 0, -1) if size % a == 0)
    return a, size // a


class Kronecker(WeightModule):
    """The factors on one site: w1, or w1a and w1b; w2, or w2a and w2b."""

    w1: nn.Parameter | None
    w1a: nn.Parameter | None
    w1b: nn.Parameter | None
    w2: nn.Parameter | None
    w2a: nn.Parameter | None
    w2b: nn.Parameter | None

    def __init__(self, W: Tensor, rank: int, alpha: float, factor: int | None, decompose_both: bool, full: bool):
        super().__init__()
        (a, b), (c, d), on = factorise(W.shape[0], factor), factorise(W.shape[1], factor), W.device
        self.kernel = W.shape[2:]
        self.w1 = self.w1a = self.w1b = self.w2 = self.w2a = self.w2b = None
        if decompose_both and rank < max(a, c) / 2 and not full:
            self.w1a, self.w1b = drawn(kaiming, a, rank, device=on), drawn(kaiming, rank, c, device=on)
        else:
            self.w1 = drawn(kaiming, a, c, device=on)
        if rank < max(b, d) / 2 and not full:
            self.w2a, self.w2b = drawn(kaiming, b, rank, device=on), drawn(zeros, rank, d, *self.kernel, device=on)
        else:
            self.w2 = drawn(zeros, b, d, *self.kernel, device=on)
        self.scaling = 1.0 if self.w1 is not None and self.w2 is not None else alpha / rank

    def first(self, dtype: torch.dtype) -> Tensor:
        """s w1: a c."""
        w1 = self.w1 if self.w1 is not None else cast(Tensor, self.w1a) @ cast(Tensor, self.w1b)
        return (self.scaling * w1).to(dtype)

    def second(self, dtype: torch.dtype) -> Tensor:
        """w2: b d kh kw."""
        if self.w2 is not None:
            return self.w2.to(dtype)
        assert self.w2a is not None
        assert self.w2b is not None
        w2 = self.w2a.to(dtype) @ self.w2b.to(dtype).flatten(1)
        return w2.view(-1, *self.w2b.shape[1:])

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is not None
        return W + torch.einsum("ac,bd...->abcd...", self.first(W.dtype), self.second(W.dtype)).reshape(W.shape), b

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return is_plain(layer) and not isinstance(layer, nn.Embedding) and getattr(layer, "groups", 1) == 1

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        for part in parts:
            module = cast(Kronecker, part.module)
            y = add_rows(layer, part, y, module.change(layer, columns_of(layer, part, x)))
        return y

    def change(self, layer: nn.Module, x: Tensor) -> Tensor:
        """(s w1 (x) w2) x, first on d, then on c; w2a comes last."""
        axis = channel_axis(layer, x)
        w1 = self.first(x.dtype)
        inner = (self.w2 if self.w2 is not None else cast(Tensor, self.w2b)).to(x.dtype)
        c, d = w1.shape[1], inner.shape[1]
        z = x.unflatten(axis, (c, d))
        if isinstance(layer, Conv):  # [n] c d h w: c goes along with the batch
            z = layer._conv_forward(z.flatten(0, axis), inner, None)
            z = z.unflatten(0, (*x.shape[:axis], c)).movedim(axis + 1, -1).movedim(axis, -1)  # [n] h w r c
        else:
            z = F.linear(z, inner).mT  # ... r c
        z = F.linear(z, w1).mT  # ... a r
        z = z if self.w2a is None else F.linear(z, self.w2a.to(z.dtype))
        return z.flatten(-2).movedim(-1, axis)  # (a b) channels


@dataclass(frozen=True, kw_only=True, repr=False)
class LoKr(Method):
    """Kronecker products, arXiv 2212.10650 and 2309.14859.

    Args:
        rank: r, the inner dimension of the second factor, where it is not larger than half of that one.
        alpha: the update is scaled by alpha / r, unless no factor is decomposed; the default alpha = r scales by 1.
        factor: about how large the first factor is; the default takes factors as equal as possible.
        decompose_both: the first factor has rank r too.
        full: neither factor is decomposed, whatever the rank.
    """

    sites: tuple[str, ...] = ("attn.q", "attn.v")
    rank: int = 8
    alpha: float | None = None
    factor: int | None = None
    decompose_both: bool = False
    full: bool = False

    survey: ClassVar[str] = "reparameterised: low rank"
    paper: ClassVar[str] = "arXiv 2212.10650"
    mergeable: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("conv",),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise InputError(f"LoKr: rank must be at least 1, not {self.rank}")
        if self.factor is not None and self.factor < 1:
            raise InputError(f"LoKr: factor must be at least 1, or None for the nearest to the root, not {self.factor}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return is_matrix(site)

    def build(self, sites: Sequence[Site]) -> Built:
        alpha = self.rank if self.alpha is None else self.alpha
        options = (self.rank, alpha, self.factor, self.decompose_both, self.full)
        return Built(tuple(Kronecker(matrix("LoKr", site), *options) for site in sites))
