"""Fewer ranks after training: each update becomes its best approximation of a lower rank, by its singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods import Method
from vismodal.table import Listing

if TYPE_CHECKING:
    from vismodal.adapter import Adapter


@dataclass(frozen=True)
class Keep:
    """How many ranks of an update stay: one of the first three, or all of them.

    Args:
        rank: so many, where there are more.
        energy: the fewest that hold this share of the squared singular values.
        error: the fewest with |dW - dW0| / |dW0| of at most this in the Frobenius norm; energy is 1 - error^2.
        ranks: ranks of single sites, by glob on their key, first match: {"blocks.0.*": 4}.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.rank, self.energy, self.error)) > 1:
            raise InputError("rank, energy and error each say how much of the updates to keep; write one of them")
        for rank in (*self.ranks.values(), *(() if self.rank is None else (self.rank,))):
            if rank < 1:
                raise InputError(f"rank must be at least 1, not {rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"energy is a share above 0 and at most 1, not {self.energy:g}")
        if self.error is not None and not 0 <= self.error < 1:
            raise InputError(f"error is a share from 0 and below 1, not {self.error:g}")

    @property
    def everything(self) -> bool:
        """Whether nothing is said, so that all ranks stay."""
        return not self.ranks and self.rank is None and self.energy is None and self.error is None

    def check(self, keys: Sequence[str]) -> None:
        """Raises `InputError` for a glob that matches none of the sites."""
        for glob in self.ranks:
            if not any(fnmatchcase(key, glob) for key in keys):
                raise InputError(f"ranks names {glob!r}, which matches no site, such as {', '.join(keys[:3])}")

    def of(self, key: str, S: Tensor) -> int:
        """The number of ranks that the update of a site keeps, whose singular values are S."""
        rank = next((r for glob, r in self.ranks.items() if fnmatchcase(key, glob)), self.rank)
        if rank is not None:
            return min(rank, len(S))
        if self.error is not None:
            return _enough(S.flip(0).square().cumsum(0).flip(0), self.error**2)
        if self.energy is None:
            return len(S)
        share = S.square().cumsum(0)
        return min(int((share < self.energy * share[-1]).sum()) + 1, len(S))


def _enough(tail: Tensor, share: float) -> int:
    """The fewest ranks with at most that share left out; tail: the squares from each on."""
    return max(1, int((tail > share * tail[0]).sum()))


class Cut(NamedTuple):
    """What became of the update of one site: its ranks before and after, and the squared norms lost and of all."""

    key: str
    method: str
    before: int
    after: int
    lost: float
    whole: float

    @staticmethod
    def of(key: str, method: str, S: Tensor, rank: int) -> Cut:
        """Of an update with the singular values S, of which the first `rank` stay."""
        return Cut(key, method, len(S), rank, float(S[rank:].square().sum()), float(S.square().sum()))

    @property
    def error(self) -> float:
        return relative(self.lost, self.whole)


@dataclass(frozen=True)
class Pruned(Listing):
    """What is left, by the key of a module: the number of ranks, and |dW - dW0| / |dW0| in the Frobenius norm."""

    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    cuts: Sequence[Cut]


def prune(adapter: Adapter, rank: int | None, energy: float | None) -> Pruned:
    """See `Adapter.prune`."""
    if (rank is None) == (energy is None):
        raise InputError("say either the ranks to keep, prune(rank=4), or how much of the update, prune(energy=0.95)")
    keep = Keep(rank, energy)
    if adapter.merged:
        raise InputError(f"{adapter.name!r} is merged: unmerge() first, and merge() what is left")
    return shorten(adapter.methods, adapter.modules, keep)


def shorten(methods: Mapping[str, Method], modules: Mapping[str, nn.Module], keep: Keep) -> Pruned:
    """Truncates the updates of modules, which are named "slot/site", by their methods, which are named by slot.

    Raises `InputError` where none of them is a product, or values are not finite; nothing is changed then.
    """
    of = {key: methods[key.partition("/")[0]] for key in modules}
    found = {key: of[key].spectrum(module) for key, module in modules.items()}
    spectra = {key: S for key, S in found.items() if S is not None}
    if not spectra:
        names = ", ".join(dict.fromkeys(type(m).__name__ for m in methods.values()))
        raise InputError(
            f"{names} cannot be pruned: that takes an update that is a product of two factors of the site's own, as "
            "LoRA's is"
        )
    sites = {key: key.partition("/")[2] for key in spectra}
    keep.check(list(sites.values()))
    ranks = {key: keep.of(sites[key], S) for key, S in spectra.items()}
    for key, kept in ranks.items():
        if kept < len(spectra[key]):
            of[key].truncate(modules[key], kept)
    return report([Cut.of(key, type(of[key]).__name__, S, ranks[key]) for key, S in spectra.items()])


def report(cuts: Sequence[Cut]) -> Pruned:
    """A row for each site, and one for all."""
    rows = [[c.key.partition("/")[2], c.method, str(c.before), str(c.after), f"{c.error:.2g}"] for c in cuts]
    total = relative(sum(c.lost for c in cuts), sum(c.whole for c in cuts))
    rows.append(["all", "", str(sum(c.before for c in cuts)), str(sum(c.after for c in cuts)), f"{total:.2g}"])
    ranks, errors = {c.key: c.after for c in cuts}, {c.key: c.error for c in cuts}
    return Pruned(["site", "method", "ranks", "kept", "relative error"], rows, ranks, errors, cuts)


def relative(lost: float, whole: float) -> float:
    """|D - D0| / |D0| of the squares."""
    return math.sqrt(lost / whole) if whole else 0.0
