"""The calls of a model's modules within one forward: watched, or stood in for.

What stands in for a module's forward lies in its `__dict__` while the forward of the model runs, where attribute
look-up finds it first: hooks fire as ever, classes and keys stay as they are. Adapters are no part of the model here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vismodal.clip import Step
from vismodal.fingerprint import BANK
from vismodal.ports import before

Forward = Callable[..., Any]
Act = Callable[["StandIn", int, tuple[Any, ...], dict[str, Any]], Any]
_NOTHING = ...


def modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """A model's modules with their paths; the steps of a classifier with the model that they run, adapters left out."""
    found: dict[nn.Module, str] = {}
    stack = [(model, "")]
    while stack:
        module, path = stack.pop()
        if module in found:
            continue
        found[module] = path
        children = [(name, m) for name, m in module._modules.items() if m is not None and name != BANK]
        children += [("model", module.model)] if isinstance(module, Step) else []
        stack += [(m, f"{path}.{name}" if path else name) for name, m in reversed(children)]
    return found


class StandIn:
    """Runs instead of the forward of a module: `act(stand_in, n, args, kwargs)` in its n-th call."""

    def __init__(self, module: nn.Module, act: Act):
        self.module, self.act, self.count = module, act, 0
        self.held = module.__dict__.get("forward", _NOTHING)
        self.forward: Forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.act(self, self.count - 1, args, kwargs)

    def leave(self) -> None:
        if self.held is _NOTHING:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self.held


@contextmanager
def standing_in(modules: Iterable[nn.Module], act: Act) -> Iterator[None]:
    stand_ins = [StandIn(module, act) for module in modules]
    try:
        for each in stand_ins:
            each.module.__dict__["forward"] = each
        yield
    finally:
        for each in stand_ins:
            each.leave()


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a module."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_stream(args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}


@dataclass(eq=False)
class Call:
    """One call of a module, of which `watched` sees what it gets and what it makes.

    `given` counts the calls of a module by when they begin, `made` by when its forward runs, and `order` is that of
    what is given and made among all.
    """

    module: nn.Module | None = None
    given: int = 0
    made: int = 0
    order: tuple[int, int] = (0, 0)
    gets: int = 0
    makes: int = 0
    flops: int = 0
    children: list[Call] = field(default_factory=list)


def watched(model: nn.Module, run: Callable[[], Any], see: Callable[[list[Any]], int]) -> Call:
    """The calls that `run` makes, below one that stands for itself. `see` takes the leaves of what a module gets (of
    its first argument) and makes; FLOPs are those of matrix products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    stack = [Call()]
    begun: dict[nn.Module, list[Call]] = {}
    counts: dict[nn.Module, int] = {}
    clock = count()

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(module, counts.get(module, 0), order=(next(clock), 0))
        call.gets = see(pytree.tree_leaves(stream_of(args, kwargs)))
        counts[module] = call.given + 1
        begun.setdefault(module, []).append(call)
        stack[-1].children.append(call)

    def make(stand_in: StandIn, n: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = begun[stand_in.module].pop()
        stack.append(call)
        before_it = counter.get_total_flops()
        out = stand_in.forward(*args, **kwargs)
        stack.pop()
        call.made, call.order = n, (call.order[0], next(clock))
        call.flops = counter.get_total_flops() - before_it
        call.makes = see(pytree.tree_leaves(out))
        return out

    modules = modules_of(model)
    counter = FlopCounterMode(display=False)
    with before(modules, begin), standing_in(modules, make), counter:
        run()
    stack[0].flops = counter.get_total_flops()
    return stack[0]
