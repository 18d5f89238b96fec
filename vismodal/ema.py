"""An exponential moving average of an adapter's parameters, kept beside them while they are trained.

    ema = Ema(adapter, 0.999)
    fit(loss, adapter, optimizer, plan=plan, ema=ema)   # averages after every update; checkpoints hold both
    with ema.worn():                                    # the adapter has the averages, and its own values again after
        vm.save(adapter, "adapter.safetensors")

After update n: average <- d average + (1 - d) parameter, d = min(decay, (1 + n) / (10 + n)). So short runs, and the
start of long ones, average over their last tenth or so instead of remembering where they began (Polyak and Juditsky
1992; the course of d is that of TensorFlow's `ExponentialMovingAverage` with `num_updates`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.sharding import spread_like, whole

if TYPE_CHECKING:
    from vismodal.resume import Trainable

Given = ParamSpec("Given")
Made = TypeVar("Made")


class Ema:
    """The averages of all parameters of an adapter, in fp32; they begin as the parameters are now.

    Raises `InputError` unless 0 < decay < 1.
    """

    def __init__(self, adapter: Trainable, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"ema must be more than 0 and less than 1, not {decay}; usual are 0.99 to 0.9999")
        self.adapter, self.decay = adapter, decay
        self.averages = {name: p.detach().float().clone() for name, p in adapter.named_parameters()}
        self._own: dict[str, Tensor] | None = None  # the adapter's values while it wears the averages

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters as they are after update `step`, the first of which is 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.adapter.named_parameters():
            self.averages[name].lerp_(parameter.detach().float(), 1 - decay)  # what does not move stays to the bit

    @contextmanager
    def worn(self) -> Iterator[None]:
        """The adapter has the averages for a while, and afterwards the values that it had, to the bit."""
        own = {name: tensor.clone() for name, tensor in self.adapter.state_dict().items()}
        self._own = own
        try:
            self.adapter.load_state_dict(own | self.state_dict())
            yield
        finally:
            self.take_off()

    def take_off(self) -> None:
        """Gives the adapter its own values back where a stop came between; `fit` does so before it saves."""
        if self._own is not None:
            self.adapter.load_state_dict(self._own)
            self._own = None

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the parameters' names; those that FSDP2 has sharded are gathered."""
        return {name: whole(tensor) for name, tensor in self.averages.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the averages of a checkpoint, which are of the same adapter."""
        for name, mine in self.averages.items():
            self.averages[name] = spread_like(state[name].to(mine.device, torch.float32), mine)


def wearing(ema: Ema | None, action: Callable[Given, Made]) -> Callable[Given, Made]:
    """The action, done with the averages worn; as it is where there are none."""
    if ema is None:
        return action

    def done(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with ema.worn():
            return action(*args, **kwargs)

    return done
