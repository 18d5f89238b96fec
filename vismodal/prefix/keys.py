"""Keys of pictures, and what tells whether the picture under a key is the one that it was."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vismodal.errors import InputError

Key = Hashable
LOOKS = 64  # values of a picture that are kept, to tell it from another


def names(keys: Iterable[Key] | Tensor) -> list[Key]:
    return [_name(key) for key in (keys.tolist() if isinstance(keys, Tensor) else keys)]


def _name(key: Any) -> Key:
    """A key that a file can hold: an integer, a string, or a tuple of them."""
    if isinstance(key, str):
        return key
    if isinstance(key, tuple | list):
        return tuple(map(_name, key))
    try:
        return operator.index(key)
    except TypeError:
        raise InputError(f"{key!r} is no key; take whole numbers, strings, or tuples of them") from None


def looks(x: Tensor) -> Tensor:
    """Values of each picture, b 64, spread over it."""
    n = x[0].numel()
    at = torch.linspace(0, n - 1, LOOKS, dtype=torch.float64).long()
    places = torch.unravel_index(at.to(x.device), x.shape[1:])
    return x.movedim(0, -1)[places].T.float()


def check(given: Tensor, kept: Tensor, keys: Sequence[Key]) -> None:
    """Looks of the pictures given against those kept under their keys. Raises `InputError` where they are others."""
    same = torch.isclose(given, kept.to(given.device), rtol=1e-2, atol=1e-2).all(1)
    if not bool(same.all()):
        raise InputError(
            f"another picture than this was kept under the key {keys[int((~same).nonzero()[0])]!r}. Give each picture "
            "a key of its own, and each augmented copy of it: (row, copy); a picture that is augmented anew each time "
            "cannot be kept"
        )
