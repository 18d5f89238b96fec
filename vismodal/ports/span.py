"""The span port: modules act on the stream where it enters a stretch of the model, in between, and where it leaves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vismodal.methods.base import SpanModule
from vismodal.ports.port import Port
from vismodal.recompute import State, recomputing
from vismodal.site import Site
from vismodal.weights import Entry, Group

Opened = list[tuple[Group, SpanModule, dict[str, Any]]]  # modules in order, each with its context
_NOTHING = ...  # what stands for an attribute that a module's __dict__ did not hold


class Stream:
    """How many tokens the spans of a model have joined to each tower's stream; plain numbers, so a model copies."""

    def __init__(self) -> None:
        self.joined: dict[str, dict[str, int]] = {}  # by tower, by port
        self.closed: dict[str, dict[str, int]] = {}  # of spans over several blocks: what they had joined
        self.part: tuple[int, Sequence[int]] | None = None  # where a batch runs in parts: its rows, and which run now
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
        self.passing = False  # while the model's own call is none to act on: its rows go through it in parts

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
        if self.stream.aside or self.passing:
            return None
        self.recompute.check(self.state)
        again = recomputing()
        opened = self._opened() if again and self.over_blocks else None
        if opened is None:
            self._close()  # an exception may have left one open
            self.left = None
        self._tell_of_waiting()
        if not self.live:
            return None
        name = None if args else next(iter(kwargs))
        x0 = x = kwargs[name] if name is not None else args[0]
        self._mark(x)
        if opened is None:
            extra = self.stream.count(self.tower, again)
            new = {"extra": extra, "aside": self.run_aside}
            opened = [(g, cast(SpanModule, e.module), new | self._given(e, x)) for g in self.live for e in g.entries]
            self.open = self.left = opened
        for _, span_module, context in opened:
            x = span_module.enter(x, context)
        if not again or not self.over_blocks:
            self._count(x, x0)
        kwargs = self._make_room("enter", module, x, x0, kwargs)
        for _, span_module, context in opened:
            self._stand("enter", module, span_module.values(module, context))
        return (args, {**kwargs, name: x}) if name is not None else ((x, *args[1:]), kwargs)

    def _given(self, entry: Entry, x: Tensor) -> dict[str, Any]:
        """The condition of an entry whose method needs one, for the rows of x."""
        if entry.condition is None:
            return {}
        count, part = self.stream.part or (len(x), None)
        return {"condition": entry.condition.of(count, part).to(x.device)}

    def _tell_of_waiting(self) -> None:
        for name in () if torch.compiler.is_compiling() else self.waiting:
            warnings.warn(
                f"adapter {name!r} has been given no condition, so the model is the base: set its `condition`, or "
                "write `with adapter.given(...)`",
                stacklevel=2,
            )

    def around(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A forward of a module with what this port does before and after the module's calls, which hooks do there."""
        if self.modules["enter"] is module:
            args, kwargs = self._enter(module, args, kwargs) or (args, kwargs)
        out = forward(*args, **kwargs)
        changed = self._exit(module, args, out) if self.modules["exit"] is module else None
        return out if changed is None else changed

    def feed(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The input of the tapped module `name`, as the open modules leave it."""
        opened = self._opened()
        if opened is None or self.stream.aside:
            return None
        key = None if args else next(iter(kwargs))
        x0 = x = kwargs[key] if key is not None else args[0]
        for group, span_module, context in opened:
            x = _between(x, span_module.feed(name, x, context), group.scale)
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
            y = _between(y, module.exit(y, context), 1 if module.whole else group.scale)
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
