"""Tensors that FSDP2 (`fully_shard`) has spread over the processes.

whole(t)              all of it, on every process: a collective, so that all processes must call it
spread_like(t, like)  of a whole tensor, which all processes have, the form that `like` has
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it (a DTensor)."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes where it is sharded."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that is whole on all processes, sharded as `like` is; no process asks another."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    there = cast(Any, like)
    return distribute_tensor(tensor.to(there.device), there.device_mesh, there.placements, src_data_rank=None)
