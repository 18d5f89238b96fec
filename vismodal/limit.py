"""AdapterDrop: an adapter left out of some blocks while the model runs (Rücklé et al. 2021, arXiv 2010.11918).

A plain statement about where an adapter acts, which can change between two forwards. A site that is left out is the
base, exactly. What a method's modules share goes on in those that act.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vismodal.errors import InputError


@dataclass(frozen=True)
class Spot:
    """Where a site lies: its module, its block among those of its tower, and whether it is a span."""

    path: str
    block: int | None
    depth: int
    is_span: bool


Spots = Mapping[str, Spot]  # by the key of a site's module


@dataclass(frozen=True)
class Limit:
    """The sites that act: those in `layers` or in no block, on modules whose path matches one of `where`."""

    layers: slice | None = None
    where: tuple[str, ...] = ("*",)

    def dropped(self, spots: Spots) -> frozenset[str]:
        """The keys of those that do not act."""
        return frozenset(key for key, spot in spots.items() if not (self._in_layers(spot) and self._matches(spot)))

    def check(self, spots: Spots) -> None:
        """Raises `InputError` for what leaves nothing, and for layers of what goes over all blocks."""
        if self.layers is not None and not isinstance(self.layers, slice):
            raise InputError(f"layers must be a slice such as slice(5, None), not {self.layers!r}")
        for glob in self.where:
            if not any(fnmatchcase(spot.path, glob) for spot in spots.values()):
                paths = ", ".join(dict.fromkeys(spot.path or "the model itself" for spot in spots.values()))
                raise InputError(f"where={glob!r} matches no module that the adapter is on: {paths}")
        whole = [key for key, spot in spots.items() if spot.is_span and spot.block is None]
        if self.layers is not None and whole:
            raise InputError(
                f"{whole[0]} is no part of one block and acts as a whole, so no layers of it can be left out; say what"
                " is to act by where=..."
            )
        blocks = {key: spot for key, spot in spots.items() if spot.block is not None}
        if self.dropped(spots) == spots.keys() or (self.layers is not None and blocks.keys() <= self.dropped(blocks)):
            depths = ", ".join(dict.fromkeys(str(spot.depth) for spot in blocks.values())) or "no"
            raise InputError(
                f"{self} leaves nothing of an adapter on {depths} blocks; to switch it off set enabled=False"
            )

    def _in_layers(self, spot: Spot) -> bool:
        return self.layers is None or spot.block is None or spot.block in range(spot.depth)[self.layers]

    def _matches(self, spot: Spot) -> bool:
        return any(fnmatchcase(spot.path, glob) for glob in self.where)

    def __str__(self) -> str:
        parts = [] if self.layers is None else [f"layers {_text(self.layers)}"]
        return ", ".join(parts + ([] if self.where == ("*",) else [" or ".join(self.where)])) or "everywhere"


def _text(s: slice) -> str:
    """As in x[5:]."""
    ends = [s.start, s.stop] if s.step is None else [s.start, s.stop, s.step]
    return ":".join("" if end is None else str(end) for end in ends)
