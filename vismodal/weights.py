"""W' and b': the truth that live use, merging and exporting share. Pure functions of tensors and entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vismodal.methods.base import Condition, Part
from vismodal.quantised import is_quantised
from vismodal.site import Range

Pair = tuple[Tensor | None, Tensor | None]  # a weight and its bias


@dataclass(eq=False)
class Entry:
    """One module of one adapter on a port."""

    adapter: str
    key: str
    module: nn.Module
    slot: str
    range: Range | None
    axis: int
    ran: bool = False
    dropped: bool = False  # left out by its adapter's limit
    condition: Condition | None = None  # what its adapter has been given, where its method needs something
    waits: bool = False  # for a condition, without which it does not act


@dataclass(eq=False)
class Group:
    """What one adapter does on one port: its entries, together."""

    entries: tuple[Entry, ...]
    scale: float
    cls: Any = field(init=False)  # their class, a WeightModule or SpanModule
    parts: tuple[Part, ...] = field(init=False)

    @property
    def name(self) -> str:
        """The adapter's name, with the number of the condition under which it acts."""
        first = self.entries[0]
        return first.adapter if first.condition is None else f"{first.adapter} (condition {first.condition.number})"

    def __post_init__(self) -> None:
        self.cls = type(self.entries[0].module)
        self.parts = tuple(Part(e.module, e.range, e.axis) for e in self.entries)


def can_form(W: Tensor | None, b: Tensor | None, entries: Sequence[Entry]) -> bool:
    """Whether W' and b' can be computed: no other weight is formed of a quantised or sharded one."""
    free = all(e.module.bias_only for e in entries)
    return not any(t is not None and is_quantised(t) for t in ((b,) if free else (W, b)))


def compute(W: Tensor | None, b: Tensor | None, groups: Sequence[Group]) -> Pair:
    """W', b' of all groups in order, at least fp32 throughout and rounded once; unchanged ones as they came.

    A quantised W stays as it is: modules that leave it alone are given None.
    """
    if W is not None and is_quantised(W):
        if not can_form(W, b, [e for g in groups for e in g.entries]):
            raise RuntimeError(f"{groups[0].entries[0].key}: the weight was quantised after the adapter was attached")
        return W, compute(None, b, groups)[1]
    W1, b1 = _wide(W), _wide(b)
    W2, b2 = W1, b1
    device = next(t for t in (W, b) if t is not None).device.type
    with torch.autocast(device, enabled=False):
        for group in groups:
            for entry in group.entries:
                W2, b2 = _apply(entry, group.scale, W2, b2)
    return (W if W2 is W1 else _as(W2, W)), (b if b2 is b1 else _as(b2, W if b is None else b))


def _apply(entry: Entry, scale: float, W: Tensor | None, b: Tensor | None) -> Pair:
    """One module on its range of W and of b, interpolated by `scale` between before and after."""
    (w_axis, w_range), (b_axis, b_range) = region(entry, "weight"), region(entry, "bias")
    Wp, bp = rows(W, w_axis, w_range), rows(b, b_axis, b_range)
    W2, b2 = entry.module(Wp, bp)
    dtype = next(t.dtype for t in (W, b) if t is not None)
    W = W if W2 is Wp else _put(W, _lerp(Wp, W2.to(dtype), scale), w_axis, w_range)
    b = b if b2 is bp else _put(b, _lerp(bp, b2.to(dtype), scale), b_axis, b_range)
    return W, b


def region(entry: Entry, slot: str) -> tuple[int, Range | None]:
    """Where an entry acts in the weight or in the bias: a range of rows covers both, one of columns has no bias."""
    if slot == entry.slot or (slot == "bias" and entry.axis == 0):
        return entry.axis, entry.range
    return 0, None


def _lerp(old: Tensor | None, new: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return new
    return torch.lerp(torch.zeros_like(new) if old is None else old, new, scale)


def _put(whole: Tensor | None, new: Tensor, axis: int, range_: Range | None) -> Tensor:
    """`whole` with the range replaced, out of place."""
    if range_ is None or whole is None:
        return new
    start, stop = range_
    after = whole.narrow(axis, stop, whole.shape[axis] - stop)
    return torch.cat((whole.narrow(axis, 0, start), new.to(whole.dtype), after), axis)


def rows(t: Tensor | None, axis: int, range_: Range | None) -> Any:
    return t if range_ is None or t is None else t.narrow(axis, range_[0], range_[1] - range_[0])


def _wide(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.to(torch.promote_types(t.dtype, torch.float32))


def _as(t: Tensor | None, original: Tensor | None) -> Tensor | None:
    return t if t is None or original is None else t.to(original.dtype)
