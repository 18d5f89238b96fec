"""A batch whose rows belong to different adapters: many subjects from one backbone, or many adapters trained at once.

    with vm.route(model, ["pets", None, "style"]):
        y = model(x)                            # x: 3 rows; the second one is the base's

Holds for every method, since the rows of one adapter run together, as a batch of their own: a prompt, a gate or a new
weight acts on them as ever. The forward's cost is that of the smaller batches; nothing is loaded or merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vismodal.attach import Models, models_of
from vismodal.bank import bank_of
from vismodal.errors import InputError
from vismodal.fingerprint import BANK
from vismodal.ports import SpanPort

Row = str | None | Sequence[str]  # an adapter, the base, or several adapters in order
ROUTED = ("a row's own", 1.0)  # a state that no recomputation by checkpointing is in, so that each is refused
# of a model, besides its call: open_clip's and transformers' features of pictures and texts, timm's before its head
WAYS = ("forward", "encode_image", "encode_text", "get_image_features", "get_text_features", "forward_features")
_NOTHING = ...


@contextmanager
def route(model: Models, rows: Sequence[Row]) -> Iterator[None]:
    """Rows of the batches in here belong to these adapters: row i to `rows[i]`, None for the base alone.

    A batch of k times as many rows is taken for k copies of the batch, one after the other, as classifier-free guidance
    makes them. Arguments with as many rows as the batch (the first tensor among them says how many) are cut; all others
    go to every part as they are. An adapter's `condition` has a row for each of `rows`, whoever they belong to. Of
    several models, each uses those adapters that it has. Gradients reach each adapter from its own rows, until the next
    `vm.use`.

    What runs parts of the model by itself, past its call and its `encode_image` or the like, is refused. Raises
    `InputError` for a name that no model has, and in a forward for a batch whose rows do not fit, or an output
    that is not made of rows. Gradient checkpointing is refused in the backward pass.
    """
    models = [m for m in models_of(model).values() if BANK in m._modules]
    wanted = [_names(row) for row in ([] if isinstance(rows, str) else rows)]
    _check(models, wanted)
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(_routed(each, wanted))
        yield


def _names(row: Row) -> tuple[str, ...]:
    names = () if row is None else (row,) if isinstance(row, str) else row
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{row!r} is neither a name nor None nor several names")
    return tuple(names)


def _check(models: Sequence[nn.Module], rows: Sequence[tuple[str, ...]]) -> None:
    there = sorted({name for m in models for name in bank_of(m).attached})
    if not rows:
        raise InputError('no rows are given; write a name for each, or None for the base: vm.route(model, ["a", None])')
    for name in {name for row in rows for name in row}:
        if name not in there:
            raise InputError(f"no adapter {name!r} on this model, which has {', '.join(there) or 'none'}")
    merged = [n for m in models for n, a in bank_of(m).attached.items() if a.merged]
    if merged:
        raise InputError(f"{merged[0]!r} is merged into the weights, which all rows share: unmerge() it first")


@contextmanager
def _routed(model: nn.Module, rows: Sequence[tuple[str, ...]]) -> Iterator[None]:
    """The model's ways in, each in parts: what stands in for them lies in its `__dict__`, so its hooks fire as ever."""
    bank = bank_of(model)
    mine = [tuple(name for name in row if name in bank.attached) for row in rows]
    active = bank.active
    for name in {name for row in mine for name in row}:
        bank.attached[name].require_grad(bank.attached[name].trainable)
    ways = [name for name in WAYS if hasattr(model, name)]
    held = {name: model.__dict__.get(name, _NOTHING) for name in ways}
    try:
        for name in ways:
            model.__dict__[name] = _Parts(model, mine, getattr(model, name), name == "forward")
        _refuse(model, f"rows are routed here: call the model itself, or one of {', '.join(ways[1:])}")
        yield
    finally:
        for name, value in held.items():
            if value is _NOTHING:
                model.__dict__.pop(name, None)
            else:
                model.__dict__[name] = value
        bank.act(active)
        _refuse(model, "")


def _refuse(model: nn.Module, why: str) -> None:
    for port in bank_of(model).ports.values():
        port.recompute.refuse = why
        if isinstance(port, SpanPort):
            port.passing = bool(why) and port.modules["enter"] is model


class _Parts:
    """A way into a model on whose every row its own adapters act."""

    def __init__(self, model: nn.Module, rows: Sequence[tuple[str, ...]], way: Callable[..., Any], call: bool):
        self.model, self.rows, self.way = model, rows, way
        self.part = way
        for port in bank_of(model).ports.values() if call else ():  # what hooks do around the model's own call
            if isinstance(port, SpanPort):
                self.part = partial(port.around, model, self.part)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ports = bank_of(self.model).ports.values()
        why = next((port.recompute.refuse for port in ports), "")
        if not why:  # one way leads through another
            return self.way(*args, **kwargs)
        _refuse(self.model, "")
        try:
            return _in_parts(self.part, self.rows, self.act, args, kwargs)
        finally:
            bank_of(self.model).stream.part = None
            _refuse(self.model, why)

    def act(self, choice: Sequence[str], count: int, at: Sequence[int]) -> None:
        """These adapters from now on, on the rows `at` of a batch of `count`."""
        bank = bank_of(self.model)
        bank.stream.part = count, at
        bank.act(choice)
        for port in bank.ports.values():
            port.state = (*port.state, ROUTED)


def _in_parts(
    forward: Callable[..., Any],
    rows: Sequence[tuple[str, ...]],
    act: Callable[[Sequence[str], int, Sequence[int]], None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The forward on the rows of each choice of adapters, and the outputs in the order of the rows."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    count = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 0)
    if count % len(rows) or not count:
        raise InputError(f"the batch has {count} rows, but {len(rows)} are routed: give one name, or None, for each")
    tiled = list(rows) * (count // len(rows))
    choices = list(dict.fromkeys(tiled))
    places = [[i for i, row in enumerate(tiled) if row == choice] for choice in choices]
    outputs = []
    for choice, at in zip(choices, places, strict=True):
        act(choice, count, at)
        args, kwargs = pytree.tree_unflatten([_rows(leaf, count, at) for leaf in leaves], tree)
        outputs.append(forward(*args, **kwargs))
    order = torch.tensor([i for at in places for i in at]).argsort()
    return _joined(outputs, [len(at) for at in places], order)


def _rows(leaf: Any, count: int, at: Sequence[int]) -> Any:
    if len(at) == count or not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != count:
        return leaf
    return leaf[torch.tensor(at, device=leaf.device)]


def _joined(outputs: Sequence[Any], sizes: Sequence[int], order: Tensor) -> Any:
    """Outputs of parts as that of the whole batch."""
    flat = [pytree.tree_flatten(out) for out in outputs]
    if len(outputs) == 1:
        return outputs[0]
    if len({len(leaves) for leaves, _ in flat}) > 1:
        raise InputError("the adapters make outputs of different kinds, which do not go into one batch")
    found = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if all(isinstance(t, Tensor) and t.dim() and len(t) == n for t, n in zip(leaves, sizes, strict=True)):
            if len({t.shape[1:] for t in leaves}) > 1:
                shapes = ", ".join(str(tuple(t.shape[1:])) for t in leaves)
                raise InputError(f"the adapters' outputs differ in shape ({shapes}), so they do not go into one batch")
            found.append(torch.cat(leaves)[order.to(leaves[0].device)])
        elif any(isinstance(t, Tensor) for t in leaves) or any(leaf != leaves[0] for leaf in leaves):
            raise InputError("the model gives something that is not made of rows, such as a loss over the batch")
        else:
            found.append(leaves[0])
    return pytree.tree_unflatten(found, flat[0][1])
