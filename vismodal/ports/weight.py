"""The weight port: modules act on the output of the parameter's layer, as its shadow, or merged into it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vismodal.errors import InputError
from vismodal.methods.base import WeightModule
from vismodal.ports.port import Port, same_device
from vismodal.recompute import State
from vismodal.site import Place, Range, Site
from vismodal.weights import can_form, compute, region, rows


class WeightPort(Port):
    """Everything that acts on one parameter and its bias."""

    def __init__(self, site: Site):
        super().__init__()
        self.places = site.places
        self.shadows: dict[int, list[tuple[nn.Module, str]]] = {}  # by place: names that stand in a __dict__ just now
        self.thread = 0  # that put them there
        self.baked: State = ()
        self.pristine: list[tuple[str, int, Range | None, Tensor]] = []  # copies of the rows that merging replaced
        self.guard: RemovableHandle | None = None

    def _hooks(self) -> Iterator[RemovableHandle]:
        self._drop_all()
        for place in self.places:
            if self._is_fast(place):
                # prepended: transformers records outputs with forward hooks of its own
                yield place.reader.register_forward_hook(self._update, prepend=True, with_kwargs=True)
                continue
            if not can_form(place.get("weight"), place.get("bias"), self.entries):
                raise InputError(self._why_not(place))
            yield place.reader.register_forward_pre_hook(self._enter)
            yield place.reader.register_forward_hook(self._leave, prepend=True, always_call=True)

    def _is_fast(self, place: Place) -> bool:
        modules = [cast(WeightModule, e.module) for e in self.entries]
        alone = len({(e.adapter, e.key.partition("/")[0]) for e in self.entries}) == 1
        fast = all(m.can_update(place.owner) and (alone or not m.reads_weight) for m in modules)
        return place.reader is place.owner and fast

    def _why_not(self, place: Place) -> str:
        """Why the modules cannot act on a quantised weight, and what to do instead."""
        from vismodal.methods import METHODS  # late: some of them import what stands on ports

        able = ", ".join(m.__name__ for m in METHODS if m.quantised and m.mergeable)
        entry = next((e for e in self.entries if not cast(WeightModule, e.module).bias_only), self.entries[-1])
        if place.reader is not place.owner:
            what = f"{type(place.reader).__name__} reads this one itself, past its layer"
        elif len({(e.adapter, e.key.partition("/")[0]) for e in self.entries}) > 1:
            what = f"{', '.join(e.key for e in self.entries)} do not go together on it, leave one of them out"
        else:
            what = f"{able} and all methods on spans need none"
        return (
            f"{entry.key}: a new weight is needed here, and none is formed of a quantised one; {what}, or keep this "
            "layer out of the quantisation"
        )

    def set(self, active: State, merged: State) -> None:
        self._drop_all()
        super().set(active, merged)
        here = {e.adapter for e in self.entries if not e.dropped}
        baked = tuple((name, scale) for name, scale in merged if name in here)
        if baked != self.baked:
            self._restore()
            if baked:
                self._bake(baked)

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
        self._check_thread()
        for i, place in enumerate(self.places):
            if place.reader is reader:
                self._drop(i)  # a KeyboardInterrupt skips always_call hooks
                self._shadow(i, place)

    def _shadow(self, i: int, place: Place) -> None:
        if not torch.compiler.is_compiling():
            self.thread = threading.get_ident()
        W, b = place.get("weight"), place.get("bias")
        self._mark(W if W is not None else b)  # type: ignore[arg-type]
        W2, b2 = compute(W, b, self.live)
        for slot, old, new in (("weight", W, W2), ("bias", b, b2)):
            if new is None or new is old:
                continue
            shadows = place.split(slot, new)
            if not shadows:
                raise RuntimeError(f"{self.entries[0].key}: {type(place.owner).__name__} takes no {slot} to shadow")
            for module, name, value in shadows:
                module.__dict__[name] = value
                self.shadows.setdefault(i, []).append((module, name))

    def _leave(self, reader: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if self.shadows and self._is_mine():  # called too where another thread was refused in _enter
            for i, place in enumerate(self.places):
                if place.reader is reader:
                    self._drop(i)

    def _drop(self, i: int) -> None:
        for module, name in self.shadows.pop(i, ()):
            module.__dict__.pop(name, None)
        if not self.shadows:
            self.thread = 0

    def _drop_all(self) -> None:
        for i in list(self.shadows):
            self._drop(i)

    def _is_mine(self) -> bool:
        return torch.compiler.is_compiling() or self.thread == threading.get_ident()

    def _check_thread(self) -> None:
        """Shadows are state of the module: one forward at a time."""
        if self.thread and not self._is_mine() and any(t.ident == self.thread for t in threading.enumerate()):
            raise RuntimeError(
                f"{self.entries[0].key}: two threads run this model at once, or one was interrupted within it; its "
                "adapted weight is shadowed, so run one forward at a time, or merge() first"
            )

    # -- merged: in the parameters --

    def _restore(self) -> None:
        """Put the pristine rows back."""
        with torch.no_grad():
            for slot, axis, range_, copy in self.pristine:
                whole = cast(Tensor, self.places[0].get(slot))
                rows(whole, axis, range_).copy_(copy)
                _write(self.places[0], slot, whole)
        self._forget()

    def _bake(self, merged: State) -> None:
        """Write W' of the merged adapters into the pristine parameters; nothing is written unless all of it can be."""
        place = self.places[0]
        W, b = place.get("weight"), place.get("bias")
        groups = list(self._groups(merged))
        entries = [e for g in groups for e in g.entries]
        if not can_form(W, b, entries):
            raise RuntimeError(f"{entries[0].key}: cannot merge into a sharded or quantised weight; keep it live")
        same_device(entries[0], W if W is not None else b)  # type: ignore[arg-type]
        with torch.no_grad(), _deterministic(e.module for e in entries):
            W2, b2 = compute(W, b, groups)
            changed = [(slot, old, new) for slot, old, new in (("weight", W, W2), ("bias", b, b2)) if new is not old]
            for slot, _, new in changed:
                if not _can_write(place, slot, cast(Tensor, new)):
                    raise RuntimeError(f"{entries[0].key}: cannot merge, the layer has no {slot}; keep it live")
            self.pristine = [
                (slot, axis, range_, rows(old.detach(), axis, range_).clone())
                for slot, old, _ in changed
                if old is not None
                for axis, range_ in {region(e, slot) for e in entries}
            ]
            self.baked = merged  # from here on there is something to restore, also after an interrupt
            self.guard = place.owner.register_load_state_dict_pre_hook(self._refuse_load)
            for slot, _, new in changed:
                _write(place, slot, cast(Tensor, new))

    def _refuse_load(self, *_: Any) -> None:
        names = ", ".join(name for name, _ in self.baked)
        raise RuntimeError(f"the weights hold the merged {names}: unmerge() before loading others into the base")

    def _forget(self) -> None:
        self.pristine, self.baked = [], ()
        if self.guard is not None:
            self.guard.remove()
            self.guard = None

    def keep(self, adapter: str) -> None:
        self.set((), tuple(e for e in self.baked if e[0] == adapter))
        self._forget()


def _can_write(place: Place, slot: str, value: Tensor) -> bool:
    """Whether there are parameters for all of a value; a buffer, which goes into no file, may only stay as it is."""
    parts = place.split(slot, value)
    fixed = [(module._buffers.get(name), part) for module, name, part in parts if module._parameters.get(name) is None]
    return bool(parts) and all(held is not None and torch.equal(held, part) for held, part in fixed)


def _write(place: Place, slot: str, value: Tensor) -> None:
    for module, name, part in place.split(slot, value):
        held = module._parameters.get(name)
        if held is not None:
            held.copy_(part)


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
