"""Fewer ranks after training: each update becomes its best approximation of a lower rank, by its singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vismodal.errors import InputError
from vismodal.table import Listing

if TYPE_CHECKING:
    from vismodal.adapter import Adapter


@dataclass(frozen=True)
class Pruned(Listing):
    """What is left, by the key of a module: the number of ranks, and |dW - dW0| / |dW0| in the Frobenius norm."""

    ranks: Mapping[str, int]
    errors: Mapping[str, float]


def prune(adapter: Adapter, rank: int | None, energy: float | None) -> Pruned:
    """See `Adapter.prune`."""
    _check(adapter, rank, energy)
    methods = {key: adapter.methods[key.partition("/")[0]] for key in adapter.modules}
    found = {key: methods[key].spectrum(module) for key, module in adapter.modules.items()}
    spectra = {key: S for key, S in found.items() if S is not None}
    if not spectra:
        names = ", ".join(dict.fromkeys(type(m).__name__ for m in adapter.methods.values()))
        raise InputError(
            f"{names} cannot be pruned: that takes an update that is a product of two factors of the site's own, as "
            "LoRA's is"
        )
    ranks = {key: min(rank, len(S)) if rank is not None else _enough(S, energy or 1.0) for key, S in spectra.items()}
    for key, kept in ranks.items():
        if kept < len(spectra[key]):
            methods[key].truncate(adapter.modules[key], kept)
    return _report(adapter, spectra, ranks)


def _check(adapter: Adapter, rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise InputError("say either the ranks to keep, prune(rank=4), or how much of the update, prune(energy=0.95)")
    if rank is not None and rank < 1:
        raise InputError(f"rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy is a share above 0 and at most 1, not {energy:g}")
    if adapter.merged:
        raise InputError(f"{adapter.name!r} is merged: unmerge() first, and merge() what is left")


def _enough(S: Tensor, energy: float) -> int:
    """The number of largest singular values whose squares are that share of all."""
    share = S.square().cumsum(0)
    return min(int((share < energy * share[-1]).sum()) + 1, len(S))


def _report(adapter: Adapter, spectra: Mapping[str, Tensor], ranks: Mapping[str, int]) -> Pruned:
    squares = {key: (float(S[ranks[key] :].square().sum()), float(S.square().sum())) for key, S in spectra.items()}
    errors = {key: _relative(*pair) for key, pair in squares.items()}
    rows = [
        [key.partition("/")[2], type(adapter.methods[key.partition("/")[0]]).__name__, str(len(S)), str(ranks[key]),
         f"{errors[key]:.2g}"]
        for key, S in spectra.items()
    ]  # fmt: skip
    total = _relative(*map(sum, zip(*squares.values(), strict=True)))
    rows.append(["all", "", str(sum(map(len, spectra.values()))), str(sum(ranks.values())), f"{total:.2g}"])
    return Pruned(["site", "method", "ranks", "kept", "relative error"], rows, ranks, errors)


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0
