"""What the parameters of most methods begin with: initial values, equal on every device, and sizes that make sense.

And `linear`, which multiplies by such parameters, fp32 by default, in the dtype of its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError

Init = Callable[[Tensor], Tensor]
M = TypeVar("M", bound=nn.Module)
kaiming: Init = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
zeros: Init = nn.init.zeros_


def truncated(std: float) -> Init:
    """A normal distribution cut at two standard deviations."""
    return partial(nn.init.trunc_normal_, std=std, a=-2 * std, b=2 * std)


def drawn(init: Init, *shape: int, device: torch.device | None) -> nn.Parameter:
    """A parameter in fp32 with the same initial values on every device."""
    on = "meta" if device is not None and device.type == "meta" else "cpu"
    return nn.Parameter(init(torch.empty(*shape, device=on, dtype=torch.float32)).to(device=device))


def built(make: Callable[[], M], device: torch.device | None) -> M:
    """A network in fp32 with the same initial values on every device."""
    with torch.device("meta" if device is not None and device.type == "meta" else "cpu"):
        return make().to(device=device, dtype=torch.float32)


def linear(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """In the dtype of x, whatever that of the parameters."""
    return F.linear(x, W.to(x.dtype), b.to(x.dtype))


def check_sizes(name: str, rank: int, dropout: float = 0.0) -> None:
    """Raises `InputError` for a rank or a dropout that no method has."""
    if rank < 1:
        raise InputError(f"{name}: rank must be at least 1, not {rank}")
    if not 0 <= dropout < 1:
        raise InputError(f"{name}: dropout must be in [0, 1), not {dropout}")
