"""Ports: how modules act on a model. The only file that touches hooks.

A `WeightPort` stands on one parameter (with its bias) and holds the modules of every adapter on it, in order. Where the
parameter's own layer is called and all modules have an `update`, they act on that layer's output. Otherwise the port
*shadows*: while the reading module runs, W' stands in the owner's `__dict__`, where attribute look-up finds it before
the parameter. A `SpanPort` stands on a stretch of the model, from one module's input to another's output.
Base parameters, classes and state-dict keys never change.

Hooks are bound methods of ports, so that `deepcopy` and `pickle` of a model take its adapters along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vismodal.errors import InputError
from vismodal.methods.base import SpanModule, WeightModule
from vismodal.recompute import Recompute, State, recomputing
from vismodal.site import Place, Range, Site
from vismodal.weights import Entry, Group, can_form, compute, region, rows


class Port:
    """The modules of all adapters on one target, and which of them act just now."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.live: tuple[Group, ...] = ()
        self.state: State = ()
        self.recompute = Recompute()
        self.handles: list[RemovableHandle] = []

    @property
    def order(self) -> tuple[bool, int]:
        """Outer spans before inner ones, and those before weights: what is hooked last acts first on an output."""
        return True, 0

    def add(self, adapter: str, key: str, module: nn.Module, site: Site) -> None:
        self.entries.append(Entry(adapter, key, module, site.slot, site.range, site.axis))

    def remove(self, adapter: str) -> None:
        self.entries = [e for e in self.entries if e.adapter != adapter]

    def rehook(self) -> None:
        """Hooks are made only when modules come or go; switching and scaling change plain state."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for handle in self._hooks() if self.entries else ():  # one by one: a refusal leaves none of them behind
            self.handles.append(handle)

    def _hooks(self) -> Iterator[RemovableHandle]:
        raise NotImplementedError

    def set(self, active: State, merged: State) -> None:
        """Which adapters act, in this order and at which scale: computed live, or baked into the parameters."""
        self.live = tuple(self._groups(active))
        self.state = tuple((g.entries[0].adapter, g.scale) for g in self.live)

    def _groups(self, active: State) -> Iterator[Group]:
        """Entries by adapter in the order given, split where the method changes (a list of them)."""
        for name, scale in active:
            mine = [e for e in self.entries if e.adapter == name and not e.dropped]
            for _, entries in groupby(mine, key=lambda e: (type(e.module), e.key.partition("/")[0])):
                yield Group(tuple(entries), scale)

    def keep(self, adapter: str) -> None:
        """Make what a merged adapter wrote the new base; other merged ones step aside."""

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the modules that act just now."""
        for module in (e.module for group in self.live for e in group.entries):
            for each in (module, module.__dict__.get("shared")):
                if each is not None:
                    yield from each.parameters()
                    yield from each.buffers()

    def _mark(self, x: Tensor) -> None:
        for group in self.live:
            for entry in group.entries:
                entry.ran = True
        _same_device(self.live[0].entries[0], x)


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
        from vismodal.methods import METHODS  # late: some of them import what stands on this file

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
        _same_device(entries[0], W if W is not None else b)  # type: ignore[arg-type]
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


Opened = list[tuple[Group, SpanModule, dict[str, Any]]]  # modules in order, each with its context
_NOTHING = ...  # what stands for an attribute that a module's __dict__ did not hold


class Stream:
    """How many tokens the spans of a model have joined to each tower's stream; plain numbers, so a model copies."""

    def __init__(self) -> None:
        self.joined: dict[str, dict[str, int]] = {}  # by tower, by port
        self.closed: dict[str, dict[str, int]] = {}  # of spans over several blocks: what they had joined
        self.aside = False  # while a module of the model runs on a span's own tensors, and every span lets them pass

    def count(self, tower: str, again: bool) -> int:
        """Tokens joined where the tower stands; `again` while blocks are recomputed after the forward has ended."""
        closed = self.closed.get(tower, {}) if again else {}
        return sum((closed | self.joined.get(tower, {})).values())


class SpanPort(Port):
    """Everything that acts on the stream between one module's input and another's output, with taps in between.

    Enters run in order, exits in reverse. An exit acts only after its own enter: a module may run elsewhere too
    (dropout in transformers' ViT runs twice a block). What a module keeps from enter to exit lives in a context that is
    made anew for each forward. Checkpointing recomputes single blocks: a span inside one is entered again, one that
    goes over several repeats each enter, tap and exit with the context that the forward left.
    """

    def __init__(self, site: Site, stream: Stream):
        super().__init__()
        self.modules = dict(site.modules)
        self.position = site.order
        self.tower, self.key = site.tower, site.target
        self.over_blocks = site.index is None
        self.stream = stream
        self.room = site.span.room if site.span else {}
        self.stood: dict[str, dict[str, Any]] = {}  # by module: what its __dict__ held before other values stood in
        self.open: Opened | None = None
        self.left: Opened | None = None  # what the last forward had open, of a span over several blocks

    @property
    def order(self) -> tuple[bool, int]:
        return False, self.position

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"open": None, "left": None}  # tensors of a graph do not go along

    def _hooks(self) -> Iterator[RemovableHandle]:
        yield self.modules["enter"].register_forward_pre_hook(self._enter, with_kwargs=True)
        yield self.modules["exit"].register_forward_hook(self._exit, prepend=True)
        for name, module in self.modules.items():
            if name not in ("enter", "exit") and self._any("tap"):
                # before the exit, which may be of the same module and is prepended as well
                yield module.register_forward_hook(Tap(self, name), prepend=True)
            if name not in ("enter", "exit") and self._any("feed"):
                yield module.register_forward_pre_hook(Feed(self, name), with_kwargs=True)
            if name in self.room or (name == "enter" and self._any("values")):
                yield module.register_forward_hook(Leave(self, name), prepend=True, always_call=True)

    def _any(self, method: str) -> bool:
        """Whether a module here has such a method of its own."""
        return any(getattr(type(e.module), method) is not getattr(SpanModule, method) for e in self.entries)

    def set(self, active: State, merged: State) -> None:
        super().set(active, merged)
        self.open = self.left = None
        for name in list(self.stood):
            self.step_back(name)

    def _opened(self) -> Opened | None:
        return self.left if self.over_blocks and recomputing() else self.open

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        if self.stream.aside:
            return None
        self.recompute.check(self.state)
        again = recomputing()
        opened = self._opened() if again and self.over_blocks else None
        if opened is None:
            self._close()  # an exception may have left one open
            self.left = None
        if not self.live:
            return None
        name = None if args else next(iter(kwargs))
        x0 = x = kwargs[name] if name is not None else args[0]
        self._mark(x)
        if opened is None:
            extra = self.stream.count(self.tower, again)
            new = {"extra": extra, "aside": self.run_aside}
            opened = [(g, cast(SpanModule, e.module), dict(new)) for g in self.live for e in g.entries]
            self.open = self.left = opened
        for _, span_module, context in opened:
            x = span_module.enter(x, context)
        if not again or not self.over_blocks:
            self._count(x, x0)
        kwargs = self._make_room("enter", module, x, x0, kwargs)
        for _, span_module, context in opened:
            self._stand("enter", module, span_module.values(module, context))
        return (args, {**kwargs, name: x}) if name is not None else ((x, *args[1:]), kwargs)

    def feed(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The input of the tapped module `name`, as the open modules leave it."""
        opened = self._opened()
        if opened is None or self.stream.aside:
            return None
        key = None if args else next(iter(kwargs))
        x0 = x = kwargs[key] if key is not None else args[0]
        for _, span_module, context in opened:
            x = span_module.feed(name, x, context)
        kwargs = self._make_room(name, module, x, x0, kwargs)
        return (args, {**kwargs, key: x}) if key is not None else ((x, *args[1:]), kwargs)

    def _make_room(
        self, name: str, module: nn.Module, x: Tensor, x0: Tensor, kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Lets a module that runs next take more tokens; returns its keyword arguments."""
        self.step_back(name)  # a KeyboardInterrupt skips always_call hooks
        room = self.room.get(name)
        if room is None or x.shape[1] == x0.shape[1]:
            return kwargs
        more = x.shape[1] - x0.shape[1]
        self._stand(name, module, room.attributes(module, more))
        masks = {key: kwargs[key] for key in room.masks if kwargs.get(key) is not None}
        return {**kwargs, **{key: nn.functional.pad(mask, (0, more, 0, more)) for key, mask in masks.items()}}

    def _stand(self, name: str, module: nn.Module, values: Mapping[str, Any]) -> None:
        """Values stand in for attributes of a module, which are found in its __dict__ first."""
        for key, value in values.items():
            self.stood.setdefault(name, {}).setdefault(key, module.__dict__.get(key, _NOTHING))
            module.__dict__[key] = value

    def step_back(self, name: str) -> None:
        """A module's own attributes again, where others stood in for them."""
        held = self.modules[name].__dict__
        for key, value in self.stood.pop(name, {}).items():
            if value is _NOTHING:
                held.pop(key, None)
            else:
                held[key] = value

    def run_aside(self, name: str, x: Tensor) -> Tensor:
        """A module of the span on other tensors than the stream, past every span."""
        self.stream.aside = True
        try:
            return cast(Tensor, self.modules[name](x))
        finally:
            self.stream.aside = False

    def _count(self, x: Tensor, x0: Tensor) -> None:
        if x.dim() == x0.dim() == 3 and x.shape[1] != x0.shape[1]:
            self.stream.joined.setdefault(self.tower, {})[self.key] = x.shape[1] - x0.shape[1]

    def _close(self) -> None:
        self.open = None
        joined = self.stream.joined.get(self.tower, {}).pop(self.key, 0)
        if self.over_blocks:
            self.stream.closed.setdefault(self.tower, {})[self.key] = joined

    def _exit(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        opened = self._opened()
        if opened is None or self.stream.aside:
            return None
        if opened is self.open:
            self._close()
        return _on_stream(out, lambda y: self._back(opened, y))

    def _back(self, opened: Opened, y: Tensor) -> Tensor:
        for group, module, context in reversed(opened):
            y = _between(y, module.exit(y, context), group.scale)
        return y

    def tap(self, name: str, out: Any) -> Any:
        """The output of the tapped module `name`, as the open modules leave it."""
        opened = self._opened()
        if opened is None or self.stream.aside:
            return None
        return _on_stream(out, lambda y: self._through(name, opened, y))

    def _through(self, name: str, opened: Opened, y: Tensor) -> Tensor:
        for group, module, context in opened:
            y = _between(y, module.tap(name, y, context), group.scale)
        return y


def _between(old: Tensor, new: Tensor, scale: float) -> Tensor:
    """What an adapter makes of a stream, at its scale; one that only reads it leaves it as it is."""
    return new if scale == 1 or new is old else torch.lerp(old, new, scale)


class Named:
    """A hook that knows the name under which its port has the module."""

    def __init__(self, port: SpanPort, name: str):
        self.port, self.name = port, name


class Tap(Named):
    """After a tapped module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return self.port.tap(self.name, out)


class Feed(Named):
    """Before a tapped module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.port.feed(self.name, module, args, kwargs)


class Leave(Named):
    """After a module for whose attributes others may stand in, also after an exception."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if not self.port.stream.aside:
            self.port.step_back(self.name)


def _on_stream(out: Any, act: Callable[[Tensor], Tensor]) -> Any:
    """Applies to the stream, which is a module's output or the first of a tuple."""
    return (act(out[0]), *out[1:]) if isinstance(out, tuple) else act(out)


def _same_device(entry: Entry, x: Tensor) -> None:
    if next(entry.module.parameters(), x).device != x.device:
        raise RuntimeError(
            f"{entry.key}: the adapter lies on another device than its layer or input on {x.device}; "
            "move the whole model with model.to(...), and adapt before any offloading"
        )


def is_ported(module: nn.Module) -> bool:
    """Whether ports of some model that holds this module hook it."""
    return any(isinstance(hook, Port | FrozenStatistics | Named) for hook in _hooked(module))


def ports_on(modules: Iterable[nn.Module]) -> list[Port]:
    """The ports, of whatever model, that hook one of these modules."""
    hooks = (getattr(hook, "port", hook) for module in modules for hook in _hooked(module))
    return list(dict.fromkeys(hook for hook in hooks if isinstance(hook, Port)))


def acting(modules: Iterable[nn.Module]) -> list[Port]:
    """Those of the ports on these modules that act just now."""
    return [port for port in ports_on(modules) if port.live]


def _hooked(module: nn.Module) -> list[Any]:
    """The objects whose methods a module's hooks are."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [getattr(hook, "__self__", hook) for hook in hooks]


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


Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def before(modules: Iterable[nn.Module], act: Before) -> Iterator[None]:
    """For a while `act` sees what each of these modules is called with, before any port does, and may replace it."""
    handles = [m.register_forward_pre_hook(act, prepend=True, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        self.module = module
        self.switched = False
        self.handle = module.register_forward_pre_hook(self._eval)

    def _eval(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            module.training = False
            self.switched = True

    def remove(self, training: bool) -> None:
        """Give the module back to a model that is in training mode or not."""
        self.handle.remove()
        if self.switched and training:
            self.module.training = True
