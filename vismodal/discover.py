"""Finding sites: `discover` binds the entries of a table to a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from vismodal.errors import InputError
from vismodal.site import (
    Entry,
    Layout,
    Order,
    Part,
    Place,
    Range,
    Site,
    Span,
    Table,
    Tokens,
    Tower,
    Weight,
    lookup,
)


def discover(model: nn.Module, table: Table, prefix: str = "") -> list[Site]:
    """Bind every entry of `table` to `model`, in the model's own order; biases of the weights found follow them.

    `prefix` stands before every path, for an adaptation of several models under one name.
    """
    walked = list(_walk(model, table, prefix))
    depth = Counter(step.tower for step in walked if step.is_block)
    holders = _holders(model, walked, prefix)
    found: dict[tuple[object, ...], Site] = {}
    keys: dict[tuple[str, str], Site] = {}
    for step in walked:
        for entry in step.entries:
            for site in _bind(entry, step.module, step.path, holders):
                tower = (site.span and site.span.tower) or step.tower
                site = replace(site, tower=tower, index=step.block, depth=depth[tower], order=len(found))
                if step.tokens is not None:
                    has_room = site.span is not None and "enter" in site.span.room
                    site = replace(site, layout=step.tokens[0], fixed="" if has_room else step.tokens[1])
                if site.identity in found:  # the outermost declaration stands
                    continue
                if (site.kind, site.key) in keys:  # two ranges of one parameter under one kind
                    site = replace(site, key=f"{site.key}[{site.range[0]}:{site.range[1]}]" if site.range else site.key)
                found[site.identity] = keys[site.kind, site.key] = site
    sites = list(found.values())
    return [replace(s, within=_within(s, sites)) if s.span is not None and s.index is None else s for s in sites]


def check_rows(model: nn.Module, table: Table) -> None:
    """Raises `InputError` for rows that say something of a class in the model which none of its instances has.

    For a user's table: in a family's, a row holds for several versions of a class, and what one lacks drops out.
    """
    for cls, entries in table.items():
        if not isinstance(cls, type):
            raise InputError(f"sites: {cls!r} is no class; write the class of a module, such as {{MyBlock: (...)}}")
        if not isinstance(entries, tuple | list):
            raise InputError(f"sites: what {cls.__name__} offers is a tuple; write {cls.__name__}: ({entries},)")
        instances = [m for m in model.modules() if lookup(type(m), table) is entries]
        for path, what in (p for e in entries if instances for p in _paths(e)):
            head, _, name = path.rpartition(".") if what == "parameter" else (path, "", "")
            owners = [_submodule(m, head) for m in instances]
            if not any(owner is not None and (not name or hasattr(owner, name)) for owner in owners):
                first = instances[0]
                there = first.named_parameters() if name else first.named_modules()
                offers = ", ".join(filter(None, (n for n, _ in there))) or "none"
                raise InputError(f"sites: {cls.__name__} has no {what} {path!r}; it has {offers}")


def _paths(entry: Entry) -> list[tuple[str, str]]:
    """What an entry names in its module."""
    if isinstance(entry, Weight):
        return [(entry.param, "parameter")]
    return [(path, "module") for path in (entry.enter, entry.exit)] if isinstance(entry, Span) else []


def _within(span: Site, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites in the blocks of the span's tower, below the module that declares the span."""
    inside = f"{span.path}." if span.path else ""
    return tuple(s for s in sites if s.index is not None and s.tower == span.tower and s.path.startswith(inside))


class _Step(NamedTuple):
    module: nn.Module
    path: str
    tower: str
    block: int | None
    is_block: bool
    tokens: tuple[Layout, str] | None  # how tokens lie here, and why none can be added
    entries: tuple[Entry, ...]


def _walk(model: nn.Module, table: Table, prefix: str) -> Iterator[_Step]:
    """Modules in order, with tower and block index; `_modules` is read directly, so adapters are not walked."""
    seen: set[nn.Module] = set()
    blocks: Counter[str] = Counter()
    stack: list[tuple[nn.Module, str, str, int | None, tuple[Layout, str] | None]] = [(model, prefix, "", None, None)]
    while stack:
        module, path, tower, index, tokens = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        entries = lookup(type(module), table)
        is_block = any(isinstance(e, Span) and e.kind == "block" for e in entries)
        if is_block:
            index = blocks[tower]
            blocks[tower] += 1
        tokens = next(((e.layout(module), e.fixed) for e in entries if isinstance(e, Tokens)), tokens)
        yield _Step(module, path, tower, index, is_block, tokens, entries)
        towers = {e.child: e.name for e in entries if isinstance(e, Tower)}
        order = [name for e in entries if isinstance(e, Order) for name in e.children]
        children = sorted(module._modules.items(), key=lambda c: order.index(c[0]) if c[0] in order else -1)
        for name, child in reversed(children):
            if child is not None:
                stack.append((child, f"{path}.{name}" if path else name, towers.get(name, tower), index, tokens))


class _Holder(NamedTuple):
    """One module that holds a parameter, under which name, and who reads it there."""

    path: str
    owner: nn.Module
    name: str
    reader: nn.Module


def _holders(model: nn.Module, walked: Sequence[_Step], prefix: str) -> dict[int, list[_Holder]]:
    """By the parameter's id: one that several modules hold is one target, with the reader of each place."""
    readers: dict[tuple[nn.Module, str], nn.Module] = {}
    for step in walked:
        for entry in step.entries:
            if isinstance(entry, Weight) and entry.reader is not None:
                head, _, name = entry.param.rpartition(".")
                owner, reader = _submodule(step.module, head), _submodule(step.module, entry.reader)
                if owner is not None and reader is not None:
                    for each in filter(None, _pair(name)[:2]):
                        readers.setdefault((owner, each), reader)
    holders: dict[int, list[_Holder]] = {}
    for path, module in model.named_modules(prefix=prefix):
        for name, p in module._parameters.items():
            if p is not None:
                holders.setdefault(id(p), []).append(_Holder(path, module, name, readers.get((module, name), module)))
    return holders


def _bind(entry: Entry, module: nn.Module, path: str, holders: Mapping[int, list[_Holder]]) -> Iterator[Site]:
    if isinstance(entry, Span):
        yield from _bind_span(entry, module, path)
    if not isinstance(entry, Weight) or (entry.when is not None and not entry.when(module)):
        return
    head, _, name = entry.param.rpartition(".")
    owner = _submodule(module, head)
    if owner is None:
        return
    param = owner._parameters.get(name)
    if param is None:
        yield from _blocked(entry, owner, name, f"{path}.{entry.param}".strip("."))
        return
    held = holders[id(param)]
    first, (weight, bias, slot) = held[0], _pair(held[0].name)
    pieces = entry.bias if all(getattr(module, piece, None) is not None for piece in entry.bias) else ()
    places = tuple(Place(h.owner, *_pair(h.name)[:2], h.reader, pieces) for h in held)
    range_ = _resolve(entry.part, module, param.shape[entry.axis])
    key = _key(first.path, first.name) + (f":{entry.kind.rpartition('.')[2]}" if range_ else "")
    target = f"{first.path}/{weight}"
    yield Site(entry.kind, key, target, places, slot, range_, entry.axis, whole=entry.whole)
    if slot == "bias" and entry.kind not in ("bias", "head"):
        yield Site("bias", key, target, places, "bias")
    if slot == "weight" and entry.kind != "head" and bias and first.owner._parameters.get(bias) is not None:
        yield Site("bias", _key(first.path, bias), target, places, "bias")
    start = 0
    for piece in pieces:  # those that are no parameters are fixed at zero
        stop = start + len(getattr(module, piece))
        if piece in module._parameters:
            yield Site("bias", f"{path}.{piece}".strip("."), target, places, "bias", (start, stop))
        start = stop


def _blocked(entry: Weight, owner: nn.Module, name: str, path: str) -> Iterator[Site]:
    """A weight that is computed (parametrised, pruned) cannot be adapted; one that is not there drops out."""
    if not parametrize.is_parametrized(owner, name) and not isinstance(getattr(owner, name, None), Tensor):
        return
    why = f"{path} is computed from other parameters; remove the parametrisation or the pruning from it first"
    yield Site(entry.kind, path, path, (), "weight", blocked=why)


def _bind_span(entry: Span, module: nn.Module, path: str) -> Iterator[Site]:
    modules: dict[str, nn.Module | None] = {
        "enter": _submodule(module, entry.enter),
        "exit": _submodule(module, entry.exit),
    }
    for name, sub in entry.taps.items():
        modules |= _each(module, name, sub)
    found = {name: m for name, m in modules.items() if m is not None}
    if len(found) == len(modules) and (entry.when is None or entry.when(module)):
        width = _width(_submodule(module, entry.width)) if entry.width is not None else 0
        widths = {n: _width(m) for name, sub in entry.widths.items() for n, m in _each(module, name, sub).items()}
        name = ".".join(filter(None, (entry.kind, entry.name)))
        heads = entry.heads(module) if entry.heads is not None else 0
        device = next((p.device for p in module.parameters()), None)
        yield Site(
            entry.kind, f"{path}:{name}", f"{path}/{name}", (), "span",
            span=entry, modules=found, width=width, widths=widths, device=device, heads=heads,
        )  # fmt: skip


def _each(module: nn.Module, name: str, path: str) -> dict[str, nn.Module | None]:
    """The module at a path under its name; of a path with a star one for every child there: "blocks.0", "blocks.1".

    Behind the star, "a|b" is a where the child has it, else b."""
    head, star, tail = path.partition("*")
    parent = _submodule(module, head.strip("."))
    if not star or parent is None:
        return {name: parent}
    children = [child for child in parent._modules.values() if child is not None]
    paths = tail.strip(".").split("|")
    found = [[m for path in paths if (m := _submodule(child, path)) is not None] for child in children]
    return {f"{name}.{i}": next(iter(each), None) for i, each in enumerate(found)}


def _width(module: nn.Module | None) -> int:
    """Channels that a norm, a layer or an embedding puts out, or what `width` says; 0 where nothing does."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    shape = getattr(module, "normalized_shape", None)
    weight = getattr(module, "weight", None)
    said = getattr(module, "width", 0)
    return int(shape[-1]) if shape else int(weight.shape[0]) if isinstance(weight, Tensor) else int(said)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in filter(None, path.split(".")):
        child = _child(module, name)
        if child is None:
            return None
        module = child
    return module


def _child(module: nn.Module, name: str) -> nn.Module | None:
    """A child by its name, or by its place from the end: "-1" is the last."""
    if name.startswith("-"):
        names = list(module._modules)
        name = names[int(name)] if len(names) >= -int(name) else ""
    return module._modules.get(name)


def _pair(name: str) -> tuple[str, str | None, str]:
    """("in_proj_weight" or "in_proj_bias") -> names of the weight and its bias, and which of them was given."""
    if name.endswith("bias"):
        return name[:-4] + "weight", name, "bias"
    return name, name[:-6] + "bias" if name.endswith("weight") else None, "weight"


def _key(path: str, name: str) -> str:
    """`name` "weight" is left out: "blocks.0.attn.qkv", "blocks.0.attn.qkv.bias"."""
    return path if name == "weight" and path else f"{path}.{name}".strip(".")


def _resolve(part: Part | None, module: nn.Module, size: int) -> Range | None:
    if part is None:
        return None
    if callable(part):
        return part(module)
    i, n = part
    if size % n:
        raise InputError(f"part {part} of {type(module).__name__}: {size} rows do not divide by {n}")
    return i * size // n, (i + 1) * size // n
