"""Random numbers by key instead of by running state: a draw depends on the seed, the purpose and the index alone.

A run that is stopped and resumed, that caches or not, that finds its class images or makes them, then draws the same.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed for a key such as (seed, "noise", 17): the same on every machine, unrelated for other keys."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator for the key. Draw on the CPU and move, and every device sees the same numbers."""
    return torch.Generator().manual_seed(seed_of(*key))


def shuffled(seed: int, purpose: str, size: int, position: int) -> int:
    """The item, of `size` items, at `position` of an endless shuffled reading in which each epoch has its own order."""
    epoch, offset = divmod(position, size)
    return int(_order(seed, purpose, size, epoch)[offset])


@lru_cache(maxsize=4)  # a function of its arguments, kept since an epoch asks for it once for every row
def _order(seed: int, purpose: str, size: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, "order", purpose, epoch))
