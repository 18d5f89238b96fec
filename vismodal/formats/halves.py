"""The halves of a GEGLU's matrix, which our sites `proj:up` and `proj:gate` adapt apart, as one layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vismodal.errors import InputError
from vismodal.formats.layers import Layer, rows
from vismodal.formats.rows import stack

_HALVES = ("up", "gate")  # in this order
_WHOLE = {"", "in"}


def join(module: str, parts: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The parts of one layer as one, with zeros where a half has none.

    Args:
        module: what errors name.
        parts: by the part of our site's key: "" or "in" for the whole, "up", "gate".

    Raises `InputError` for parts or methods that no whole layer can say.
    """
    if len(parts) == 1 and parts.keys() <= _WHOLE:
        return dict(next(iter(parts.values())))
    if not parts.keys() <= set(_HALVES):
        raise InputError(f"{module} is adapted in parts ({', '.join(parts)}); diffusers has only {', '.join(_HALVES)}")
    height = max(rows(layer) for layer in parts.values())
    return stack(module, parts, dict.fromkeys(_HALVES, height), 'adapt sites=("mlp.in",)')
