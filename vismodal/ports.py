"""Ports: how modules act on a model. The only file that touches hooks.

A `WeightPort` stands on one parameter (with its bias) and holds the modules of every adapter on it, in order. Where the
parameter's own layer is called and all modules have an `update`, they act on that layer's output. Otherwise the port
*shadows*: while the reading module runs, W' stands in the owner's `__dict__`, where attribute look-up finds it before
the parameter. Base parameters, classes and state-dict keys never change.

Hooks are bound methods of ports, so that `deepcopy` and `pickle` of a model take its adapters along.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vismodal.methods.base import Part, WeightModule
from vismodal.site import Place, Range, Site

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


@dataclass(eq=False)
class Group:
    """What one adapter does on one port: its entries, together."""

    entries: tuple[Entry, ...]
    scale: float
    cls: type[WeightModule] = field(init=False)
    parts: tuple[Part, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.cls = type(self.entries[0].module)  # type: ignore[assignment]
        self.parts = tuple(Part(e.module, e.range, e.axis) for e in self.entries)


class Recompute:
    """Catches a change of the active adapters between a forward and the recomputation of it by checkpointing.

    Inside a backward pass (graph task id >= 0) a forward is a recomputation and must find a state that was seen since
    the last backward.
    """

    def __init__(self) -> None:
        self.seen: set[tuple[tuple[str, float], ...]] = set()
        self.recomputed = False

    def check(self, state: tuple[tuple[str, float], ...]) -> None:
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:
            if self.recomputed:
                self.seen.clear()
                self.recomputed = False
            self.seen.add(state)
        elif self.seen and state not in self.seen:
            raise RuntimeError(
                f"adapters changed between forward and backward of a checkpointed model: now {_show(state)}, in the "
                f"forward {' or '.join(map(_show, self.seen))}; call backward() before use(), scale or disabled()"
            )
        else:
            self.recomputed = True


def _show(state: tuple[tuple[str, float], ...]) -> str:
    return ", ".join(f"{name} at scale {scale:g}" for name, scale in state) or "none"


class WeightPort:
    """Everything that acts on one parameter and its bias."""

    def __init__(self, places: Sequence[Place]):
        self.places = tuple(places)
        self.entries: list[Entry] = []
        self.live: tuple[Group, ...] = ()
        self.state: tuple[tuple[str, float], ...] = ()
        self.recompute = Recompute()
        self.handles: list[RemovableHandle] = []
        self.pristine: list[tuple[str, int, Range | None, Tensor]] = []  # copies of the rows that merging replaced
        self.baked: tuple[tuple[str, float], ...] = ()
        self.thread = 0

    # -- set-up --

    def add(self, adapter: str, key: str, module: nn.Module, site: Site) -> None:
        self.entries.append(Entry(adapter, key, module, site.slot, site.range, site.axis))
        self._hook()

    def remove(self, adapter: str) -> None:
        self.entries = [e for e in self.entries if e.adapter != adapter]
        self._hook()

    def _hook(self) -> None:
        """Hooks are made only when modules come or go; switching and scaling change plain state."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if not self.entries:
            return
        for place in self.places:
            if self._is_fast(place):
                # prepended: transformers records outputs with forward hooks of its own
                self.handles.append(place.reader.register_forward_hook(self._update, prepend=True, with_kwargs=True))
            else:
                self.handles.append(place.reader.register_forward_pre_hook(self._enter))
                self.handles.append(place.reader.register_forward_hook(self._leave, prepend=True, always_call=True))

    def _is_fast(self, place: Place) -> bool:
        modules = [e.module for e in self.entries]
        return place.reader is place.owner and all(m.can_update(place.owner) for m in modules)  # type: ignore[operator]

    def set(self, active: Sequence[tuple[str, float]], merged: Sequence[tuple[str, float]]) -> None:
        """Which adapters act, in this order and at which scale: computed live, or baked into the parameters."""
        self.live = tuple(self._groups(active))
        self.state = tuple((g.entries[0].adapter, g.scale) for g in self.live)
        here = {e.adapter for e in self.entries}
        baked = tuple((name, scale) for name, scale in merged if name in here)
        if baked != self.baked:
            self._bake(baked)

    def _groups(self, active: Sequence[tuple[str, float]]) -> Iterator[Group]:
        """Entries by adapter in the order given, split where the class of module changes (a list of methods)."""
        for name, scale in active:
            mine = [e for e in self.entries if e.adapter == name]
            for _, entries in groupby(mine, key=lambda e: (type(e.module), e.key.partition("/")[0])):
                yield Group(tuple(entries), scale)

    # -- live: on the output, or as a shadow --

    def _update(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        self.recompute.check(self.state)
        if not self.live:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        self._mark(x)
        for group in self.live:
            new = group.cls.update(layer, group.parts, x, y)
            y = new if group.scale == 1 else torch.lerp(y, new, group.scale)
        return y

    def _enter(self, reader: nn.Module, args: tuple[Any, ...]) -> None:
        self.recompute.check(self.state)
        if not self.live:
            return
        self._lock()
        self._mark(None)
        for place in self.places:
            if place.reader is reader:
                self._shadow(place)

    def _shadow(self, place: Place) -> None:
        shadow = place.owner.__dict__
        shadow.pop(place.weight, None)  # a KeyboardInterrupt skips always_call hooks: drop what one may have left
        W, b = _get(place, place.weight), _get(place, place.bias)
        W2, b2 = self.compute(W, b, self.live)
        if W2 is not W and W2 is not None:
            shadow[place.weight] = W2
        if place.bias is not None and b2 is not b:
            shadow.pop(place.bias, None)
            shadow[place.bias] = b2

    def _leave(self, reader: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        for place in self.places:
            if place.reader is reader:
                place.owner.__dict__.pop(place.weight, None)
                if place.bias is not None:
                    place.owner.__dict__.pop(place.bias, None)
        self.thread = 0

    def _lock(self) -> None:
        """Shadows are state of the module: one forward at a time."""
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        if self.thread not in (0, me) and any(t.ident == self.thread for t in threading.enumerate()):
            raise RuntimeError(
                f"{self.entries[0].key}: two threads run this model at once, or one was interrupted within it; its "
                "adapted weight is shadowed, so run one forward at a time, or merge() first"
            )
        self.thread = me

    def _mark(self, x: Tensor | None) -> None:
        for group in self.live:
            for entry in group.entries:
                entry.ran = True
        if x is not None and next(self.live[0].entries[0].module.parameters()).device != x.device:
            raise RuntimeError(
                f"{self.live[0].entries[0].key}: the adapter lies on another device than its input on {x.device}; "
                "move the whole model with model.to(...), and adapt before any offloading"
            )

    # -- the truth: W', b' --

    def compute(self, W: Tensor | None, b: Tensor | None, groups: Sequence[Group]) -> Pair:
        """W', b' of all groups in order, at least fp32 throughout and rounded once; unchanged ones as they came."""
        W1, b1 = _wide(W), _wide(b)
        W2, b2 = W1, b1
        device = next(t for t in (W, b) if t is not None).device.type
        with torch.autocast(device, enabled=False):
            for group in groups:
                for entry in group.entries:
                    W2, b2 = _apply(entry, group.scale, W2, b2)
        return (W if W2 is W1 else _as(W2, W)), (b if b2 is b1 else _as(b2, b))

    def _bake(self, merged: tuple[tuple[str, float], ...]) -> None:
        """Put the pristine rows back, then write W' of the merged adapters over them, keeping copies of the rows."""
        place = self.places[0]
        W, b = _get(place, place.weight), _get(place, place.bias)
        if any(type(p.data) is not Tensor or not p.is_floating_point() for p in (W, b) if p is not None):
            raise RuntimeError(f"{self.entries[0].key}: cannot merge into a sharded or quantised weight; keep it live")
        groups = list(self._groups(merged))
        entries = [e for g in groups for e in g.entries]
        with torch.no_grad(), _deterministic(e.module for e in entries):
            for slot, axis, range_, copy in self.pristine:
                _rows(W if slot == "weight" else b, axis, range_).copy_(copy)
            self.pristine, self.baked = [], ()
            W2, b2 = self.compute(W, b, groups)
            for old, new, slot in ((W, W2, "weight"), (b, b2, "bias")):
                if new is old or new is None:
                    continue
                if old is None:
                    raise RuntimeError(f"{entries[0].key}: cannot merge, the layer has no {slot}; keep it live")
                for region in {_region(e, slot) for e in entries}:
                    self.pristine.append((slot, *region, _rows(old.detach(), *region).clone()))
                old.copy_(new)
        self.baked = merged

    def forget(self) -> None:
        """What is baked in becomes the base, for `detach(keep=True)`."""
        self.pristine, self.baked = [], ()


def _apply(entry: Entry, scale: float, W: Tensor | None, b: Tensor | None) -> Pair:
    """One module on its range of W and of b, interpolated by `scale` between before and after."""
    (w_axis, w_range), (b_axis, b_range) = _region(entry, "weight"), _region(entry, "bias")
    Wp, bp = _rows(W, w_axis, w_range), _rows(b, b_axis, b_range)
    W2, b2 = entry.module(Wp, bp)
    W = W if W2 is Wp else _put(W, _lerp(Wp, W2, scale), w_axis, w_range)
    b = b if b2 is bp else _put(b, _lerp(bp, b2, scale), b_axis, b_range)
    return W, b


def _region(entry: Entry, slot: str) -> tuple[int, Range | None]:
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


def _rows(t: Tensor | None, axis: int, range_: Range | None) -> Any:
    return t if range_ is None or t is None else t.narrow(axis, range_[0], range_[1] - range_[0])


def _get(place: Place, name: str | None) -> nn.Parameter | None:
    return place.owner._parameters.get(name) if name else None


def _wide(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.to(torch.promote_types(t.dtype, torch.float32))


def _as(t: Tensor | None, original: Tensor | None) -> Tensor | None:
    return t if t is None or original is None else t.to(original.dtype)


@contextmanager
def _deterministic(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Merging never draws dropout, also in train mode."""
    training = [m for m in modules if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


class FrozenStatistics:
    """Keeps a batch norm of the frozen base in eval mode: its running statistics are base values like any other."""

    def __init__(self, module: nn.Module):
        self.handle = module.register_forward_pre_hook(self._eval)

    def _eval(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            module.training = False

    def remove(self) -> None:
        self.handle.remove()
