"""Places in a forward at which values are taken, or given so that what leads to them need not run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vismodal.ports import before
from vismodal.prefix.calls import StandIn, standing_in, stream_of, tensors_in, with_stream
from vismodal.prefix.store import Spec


class Point(NamedTuple):
    """What a module makes in its n-th call ("out"), or its first argument there ("in")."""

    module: nn.Module
    side: str
    call: int
    path: str

    def __str__(self) -> str:
        return f"{self.path or 'the model'}{', its input' if self.side == 'in' else ''}"


class Form:
    """How the value of a point is made of tensors."""

    def __init__(self, value: Any):
        leaves, self.tree = pytree.tree_flatten(value)
        self.leaves = [Spec.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.specs = [leaf for leaf in self.leaves if isinstance(leaf, Spec)]

    def build(self, tensors: Sequence[Tensor]) -> Any:
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if isinstance(x, Spec) else x for x in self.leaves], self.tree)


class _Done(Exception):
    """All that is kept has been made: the rest of the forward is not needed."""


@dataclass(eq=False)
class Cut:
    """What of a forward is kept, and what needs not run then.

    Args:
        kept: the points whose values are kept.
        skipped: those that nothing depends on but what is kept: NaN stands for them.
        forms: of all of these.
        constants: the tensors that the values follow from, besides the picture.
        share: of the forward's FLOPs that need not be computed any more.
        reads: whether the rest reads the picture too.
        why: what there is to say where nothing is kept.
    """

    kept: list[Point] = field(default_factory=list)
    skipped: list[Point] = field(default_factory=list)
    forms: dict[Point, Form] = field(default_factory=dict)
    constants: list[Tensor] = field(default_factory=list)
    share: float = 0.0
    reads: bool = True
    why: str = ""
    blanks: dict[object, Tensor] = field(default_factory=dict)

    @property
    def specs(self) -> list[Spec]:
        return [spec for point in self.kept for spec in self.forms[point].specs]

    def record(self, run: Callable[[], Any]) -> list[Tensor]:
        """The tensors of the kept points; the forward ends with the last of them."""
        values = record(self.kept, run)
        return [t for point in self.kept for t in tensors_in(values[point])]

    def replay(self, run: Callable[[], Any], tensors: Sequence[Tensor]) -> Any:
        """The forward with these tensors at the kept points."""
        left, values = iter(tensors), {}
        for point in self.kept:
            values[point] = self.forms[point].build([next(left) for _ in self.forms[point].specs])
        for point in self.skipped:
            values[point] = self.forms[point].build([self._blank(s, tensors[0]) for s in self.forms[point].specs])
        return replay(values, run)

    def _blank(self, spec: Spec, like: Tensor) -> Tensor:
        """NaN, of which nothing is computed."""
        shape = len(like), *spec.shape
        key = shape, spec.dtype, like.device
        if key not in self.blanks:
            if len(self.blanks) > 32:  # batches of many sizes
                self.blanks.clear()
            with torch.inference_mode(False):
                self.blanks[key] = torch.full(shape, float("nan"), dtype=spec.dtype, device=like.device)
        return self.blanks[key]


# -- running with some points taken or given ---------------------------------------------------------------------------


@contextmanager
def _at(
    points: Collection[Point], made: Callable[[Point, StandIn, Any, Any], Any], given: Callable[[Point, Any], Any]
) -> Iterator[None]:
    """`made` runs instead of the modules of "out" points, `given` sees what those of "in" points get."""
    out = {(p.module, p.call): p for p in points if p.side == "out"}
    into = {(p.module, p.call): p for p in points if p.side == "in"}
    counts: dict[nn.Module, int] = {}

    def act(stand_in: StandIn, n: int, args: Any, kwargs: Any) -> Any:
        point = out.get((stand_in.module, n))
        return stand_in.forward(*args, **kwargs) if point is None else made(point, stand_in, args, kwargs)

    def see(module: nn.Module, args: Any, kwargs: Any) -> Any:
        n = counts[module] = counts.get(module, -1) + 1
        point = into.get((module, n))
        new = None if point is None else given(point, stream_of(args, kwargs))
        return None if new is None else with_stream(args, kwargs, new)

    with before({m for m, _ in into}, see), standing_in(dict.fromkeys(m for m, _ in out), act):
        yield


def record(points: Collection[Point], run: Callable[[], Any]) -> dict[Point, Any]:
    """Copies of the values of points; raises `RuntimeError` where the forward does not come to one of them."""
    values: dict[Point, Any] = {}

    def keep(point: Point, value: Any) -> None:
        values[point] = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)
        if len(values) == len(points):
            raise _Done

    def made(point: Point, stand_in: StandIn, args: Any, kwargs: Any) -> Any:
        value = stand_in.forward(*args, **kwargs)
        keep(point, value)
        return value

    try:
        with _at(points, made, keep):
            run()
    except _Done:
        return values
    left = next(p for p in points if p not in values)
    raise RuntimeError(f"the forward did not come to {left} any more; make a new FrozenPrefix")


def replay(values: dict[Point, Any], run: Callable[[], Any]) -> Any:
    with _at(values, lambda point, *_: values[point], lambda point, _: values[point]):
        return run()
