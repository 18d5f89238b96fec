"""Gradient checkpointing runs a block again during backward: the adapters must be as they were in the forward."""

from __future__ import annotations

from collections import deque

import torch

State = tuple[tuple[str, float], ...]  # adapters in order, each with its scale


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as checkpointing does it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Recompute:
    """Catches a change of the active adapters between a forward and the recomputation of it by checkpointing.

    Inside a backward pass (graph task id >= 0) a forward is a recomputation and must find a state that a forward with
    gradients had since the last one. Two such forwards in different states before one backward are not told apart, and
    reentrant checkpointing, whose forward has no gradients, is not watched.
    """

    def __init__(self) -> None:
        self.seen: deque[State] = deque(maxlen=16)
        self.recomputed = False
        self.refuse = ""  # why no forward may come here just now

    def check(self, state: State) -> None:
        if torch.compiler.is_compiling():
            return
        if self.refuse:
            raise RuntimeError(self.refuse)
        if not recomputing():
            if torch.is_grad_enabled():  # a look at the base under no_grad is nothing to go back to
                if self.recomputed:
                    self.seen.clear()
                    self.recomputed = False
                if state not in self.seen:
                    self.seen.append(state)
        elif self.seen and state not in self.seen:
            raise RuntimeError(
                f"adapters changed between forward and backward of a checkpointed model: now {_show(state)}, in the "
                f"forward {' or '.join(map(_show, self.seen))}; call backward() before use(), scale or disabled()"
            )
        else:
            self.recomputed = True


def _show(state: State) -> str:
    return ", ".join(f"{name} at scale {scale:g}" for name, scale in state) or "none"
