"""Several updates of one weight as one, as pure functions of tensors.

With D_i the update W' - W of adapter i and w_i its weight, of adapters that have the site:

    linear      D = sum_i w_i D_i
    ties        T_i = w_i trim(D_i), trim keeps the `density` n entries of largest size of n       arXiv 2306.01708
                s = sign(sum_i T_i)                                                                section 3
                D = sum over {i: sign(T_i) = s} of T_i / |{i: sign(T_i) = s}|, 0 where s = 0       elementwise
    dare        D = sum_i w_i m_i D_i / density,  m_i ~ Bernoulli(density)                         arXiv 2311.03099
    dare_ties   as ties, with m_i D_i / density for trim(D_i)

The drop rate of DARE's paper is p = 1 - density. `concatenated` and `svd` are `linear` under the names that other tools
give to its two results: exact, with ranks that add up, and the best one of a lower rank.

TIES' paper trims a model's whole change and knows no weights, but one scale for the result: w_i = lambda. Here each
site is trimmed by itself, as in peft's `ties_svd`. peft elects signs before it weighs, so that an adapter of weight 0.5
is another than the same one at half strength, and counts a tie as positive; with equal weights and without ties it
gives the same. peft's `linear`, `ties`, `dare_linear` and `dare_ties` combine A and B apart: (sum A_i)(sum B_i) has
cross terms B_i A_j which no adapter had. They are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vismodal.draw import generator
from vismodal.errors import InputError
from vismodal.methods.spectrum import Spectrum, decompose, spectrum

EXACT = ("linear", "concatenated", "svd")
METHODS = (*EXACT, "ties", "dare", "dare_ties")


class Update(NamedTuple):
    """W' - W = B A, with what scales it in B. A: r x in (x kernel), B: out x r."""

    A: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        """out x in (x kernel), in fp64."""
        return (self.B.double() @ self.A.flatten(1).double()).view(len(self.B), *self.A.shape[1:])

    def norm(self) -> float:
        """Frobenius, from the small matrices B^T B and A A^T alone."""
        A, B = self.A.flatten(1).double(), self.B.double()
        return float(((B.t() @ B) * (A @ A.t())).sum().clamp(min=0).sqrt())


class Value(NamedTuple):
    """V in the place of the base's W, which is None where only the adapter's file is there."""

    V: Tensor
    W: Tensor | None


Change = Update | Tensor | Value  # of one site; a tensor is a W' - W that is no product


@dataclass(frozen=True)
class Recipe:
    """How to combine.

    Args:
        method: one of `METHODS`.
        density: share of the entries that TIES keeps (0.2 unless given, as in its paper) or DARE (0.5 unless given).
        seed: of what DARE keeps.
    """

    method: str = "linear"
    density: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"no method {self.method!r} to merge by; write one of {', '.join(METHODS)}")
        if self.density is not None and self.exact:
            raise InputError(f"density is for ties, dare and dare_ties; {self.method} keeps every entry")
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"density is a share above 0 and at most 1, not {self.density:g}")

    @property
    def exact(self) -> bool:
        """Whether it is a weighted sum and nothing else."""
        return self.method in EXACT

    @property
    def share(self) -> float:
        return self.density if self.density is not None else 0.2 if self.method == "ties" else 0.5


def concatenate(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """sum_i w_i B_i A_i, exactly: A = [A_1; A_2; ...], B = [w_1 B_1, w_2 B_2, ...]."""
    A = torch.cat([u.A for u in updates])
    return Update(A, torch.cat([w * u.B for u, w in zip(updates, weights, strict=True)], 1))


def trim(D: Tensor, density: float) -> Tensor:
    """D with its largest entries alone, of all axes together; at least one."""
    kept = D.abs().flatten().topk(max(1, int(density * D.numel()))).indices
    return torch.zeros_like(D).flatten().index_copy_(0, kept, D.flatten()[kept]).view_as(D)


def drop(D: Tensor, density: float, key: Sequence[int | str]) -> Tensor:
    """D with a random share of its entries, by a generator of that key, divided by the share."""
    kept = torch.rand(D.shape, generator=generator(*key), dtype=torch.float64) < density
    return torch.where(kept.to(D.device), D / density, 0.0)


def disjoint_mean(T: Sequence[Tensor]) -> Tensor:
    """Of each entry the mean of those that have the sign of their sum."""
    stacked = torch.stack(list(T))
    sign = stacked.sum(0).sign()
    agree = (stacked.sign() == sign) & (sign != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def combine_dense(D: Sequence[Tensor], weights: Sequence[float], recipe: Recipe, key: str) -> Tensor:
    """The combination of updates of one shape, in fp64. `key` names the site: DARE draws by it, and by the place."""
    D = [d.double() for d in D]
    if recipe.method == "ties":
        D = [trim(d, recipe.share) for d in D]
    elif not recipe.exact:
        D = [drop(d, recipe.share, (recipe.seed, "dare", key, i)) for i, d in enumerate(D)]
    T = [w * d for d, w in zip(D, weights, strict=True)]
    return disjoint_mean(T) if recipe.method.endswith("ties") else torch.stack(T).sum(0)


def combine(changes: Sequence[Change], weights: Sequence[float], recipe: Recipe, key: str) -> Change:
    """One change of one site for several, of full rank. Raises `InputError` where their shapes differ, or where a value
    stands in for the base's, which is needed and unknown."""
    shapes = {tuple(shape_of(c)) for c in changes}
    if len(shapes) > 1:
        raise InputError(f"{key} has the shapes {' and '.join(map(str, sorted(shapes)))}, which cannot be merged")
    if any(isinstance(c, Value) for c in changes):
        return _values(changes, weights, recipe, key)
    products = [c for c in changes if isinstance(c, Update)]
    if recipe.exact and len(products) == len(changes):
        return concatenate(products, weights)
    return combine_dense([dense(c) for c in changes], weights, recipe, key)


def _values(changes: Sequence[Change], weights: Sequence[float], recipe: Recipe, key: str) -> Value:
    """W + the combination of all V - W. Where W is not known, it has to cancel: w_i that add up to 1."""
    W = next((c.W for c in changes if isinstance(c, Value) and c.W is not None), None)
    if W is not None:
        return Value(W.double() + combine_dense([dense(c) for c in changes], weights, recipe, key), W)
    values = [c.V.double() for c in changes if isinstance(c, Value)]
    if not recipe.exact or len(values) < len(changes) or abs(sum(weights) - 1) > 1e-6:
        raise InputError(
            f"{key} is a trained copy of the base's values, of which the base is needed here: give it (--model), or "
            "merge linearly by weights that add up to 1, of adapters that all have it"
        )
    return Value(torch.stack([w * v for v, w in zip(values, weights, strict=True)]).sum(0), None)


def shape_of(change: Change) -> torch.Size:
    """Of the weight that it changes."""
    if isinstance(change, Update):
        return torch.Size((len(change.B), *change.A.shape[1:]))
    return change.V.shape if isinstance(change, Value) else change.shape


def dense(change: Change) -> Tensor:
    """W' - W in fp64."""
    if isinstance(change, Update):
        return change.dense()
    if isinstance(change, Value):
        assert change.W is not None
        return change.V.double() - change.W.double()
    return change.double()


def spectrum_of(change: Update | Tensor) -> Spectrum:
    """Of a product without forming it."""
    return spectrum(change.A, change.B, 1.0) if isinstance(change, Update) else decompose(change)
