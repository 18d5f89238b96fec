"""Sites: the named places of a model where a method can attach, found through tables keyed by module class.

A table maps a class to the sites that its instances offer, written relative to the module:

    Attention: (Weight("attn.q", "qkv.weight", part=(0, 3)), Weight("attn.out", "proj.weight"), ...)

`discover` walks a model and binds every entry; `select` picks those that a method asks for. A kind that a method
names and the model lacks is an error here, never a silent no-op later.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from vismodal.errors import InputError

Range = tuple[int, int]  # start, stop
Part = tuple[int, int] | Callable[[nn.Module], Range]  # (i, n): the i-th of n equal ranges; or a function of the module


@dataclass(frozen=True)
class Weight:
    """A parameter, or a range of its rows (`axis=0`) or columns (`axis=1`).

    `reader` is the module whose forward reads the parameter, relative to the declaring one ("" is that one itself).
    None means that the parameter's own module is called, as with an ordinary `nn.Linear`. `whole` marks a site that
    covers others, such as `attn.qkv` over `attn.q`: it answers to its own name, never to a glob.
    """

    kind: str
    param: str
    part: Part | None = None
    axis: int = 0
    reader: str | None = None
    whole: bool = False


@dataclass(frozen=True)
class Span:
    """From the input of module `enter` to the output of module `exit` ("" is the declaring module), with named taps."""

    kind: str
    enter: str = ""
    exit: str = ""
    taps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tower:
    """Names the tower ("image", "text") that a direct child of the module holds; layers are counted per tower."""

    name: str
    child: str


Entry = Weight | Span | Tower
Table = Mapping[type[nn.Module], tuple[Entry, ...]]

NORMS = (Weight("norm", "weight"), Weight("norm", "bias"))
COMMON: Table = {
    nn.LayerNorm: NORMS,
    nn.GroupNorm: NORMS,
    nn.RMSNorm: NORMS,
    nn.modules.batchnorm._BatchNorm: NORMS,
    # forward calls F.multi_head_attention_forward on the raw parameters: out_proj is never called as a module
    nn.MultiheadAttention: (
        Weight("attn.q", "in_proj_weight", (0, 3)),
        Weight("attn.k", "in_proj_weight", (1, 3)),
        Weight("attn.v", "in_proj_weight", (2, 3)),
        Weight("attn.qkv", "in_proj_weight", whole=True),
        Weight("attn.out", "out_proj.weight", reader=""),
    ),
}


@dataclass(frozen=True, eq=False)
class Place:
    """One module that holds a parameter: the attribute names of the weight and its bias, and who reads them."""

    owner: nn.Module
    weight: str
    bias: str | None
    reader: nn.Module


@dataclass(frozen=True, eq=False)
class Site:
    """A site bound to a model. `key` is its unique name, `target` the parameter that it shares with other sites."""

    kind: str
    key: str
    target: str
    places: tuple[Place, ...]
    slot: str  # "weight" or "bias"
    range: Range | None = None
    axis: int = 0
    index: int | None = None  # of the block that holds it, within its tower
    tower: str = ""
    whole: bool = False
    blocked: str = ""  # why nothing can attach here
    span: Span | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)  # of a span: "enter", "exit" and the taps
    depth: int = 0  # number of blocks in the tower

    @property
    def path(self) -> str:
        """Path of the module that holds the parameter (of a span: that declares it)."""
        return self.target.rpartition("/")[0]

    def _parameter(self, name: str | None) -> Tensor | None:
        return self.places[0].owner._parameters.get(name) if name else None

    @property
    def weight(self) -> Tensor | None:
        """The weight's range, as a view; the whole weight for a bias site; None where there is only a bias."""
        W = self._parameter(self.places[0].weight)
        return _narrow(W, self.range, self.axis) if self.slot == "weight" and W is not None else W

    @property
    def bias(self) -> Tensor | None:
        """The bias that belongs to the range of rows, or None."""
        b = self._parameter(self.places[0].bias)
        rows = self.range if self.slot == "bias" or self.axis == 0 else None
        return _narrow(b, rows, 0) if b is not None else None

    @property
    def tensor(self) -> Tensor:
        """What the site names: the weight's or the bias's range."""
        tensor = self.weight if self.slot == "weight" else self.bias
        assert tensor is not None
        return tensor

    @property
    def layer(self) -> nn.Module:
        return self.places[0].owner


def _narrow(tensor: Tensor, range: Range | None, axis: int) -> Tensor:
    return tensor if range is None else tensor.narrow(axis, range[0], range[1] - range[0])


class Sites(list[Site]):
    """A list of sites that prints as a table. `fits` names the methods that can attach to a site (see `vm.sites`)."""

    def __init__(self, sites: Iterable[Site], fits: Callable[[Site], str] | None = None):
        super().__init__(sites)
        self.fits = fits

    def __str__(self) -> str:
        from vismodal.table import table

        rows = [
            [s.kind, s.key, "x".join(map(str, s.tensor.shape)) if s.span is None else "span", *self._more(s)]
            for s in self
        ]
        return table(["kind", "site", "shape", "layer", "methods"], rows)

    def _more(self, site: Site) -> list[str]:
        layer = "" if site.index is None else f"{site.tower} {site.index}".strip()
        return [layer, self.fits(site) if self.fits else ""]


# -- discovery ---------------------------------------------------------------------------------------------------


def lookup(cls: type, table: Table) -> tuple[Entry, ...]:
    """Entries of the nearest class in the method resolution order, so that subclasses need no row of their own."""
    return next((table[c] for c in cls.__mro__ if c in table), ())


def discover(model: nn.Module, table: Table, prefix: str = "") -> list[Site]:
    """Bind every entry of `table` to `model`, in the model's own order; biases of the weights found follow them.

    `prefix` stands before every path, for an adaptation of several models under one name.
    """
    holders: Holders = {}
    for path, module in model.named_modules(prefix=prefix):
        for name, p in module._parameters.items():
            if p is not None:
                holders.setdefault(id(p), []).append((path, module, name))
    walked = list(_walk(model, table, prefix))
    depth = Counter(step.tower for step in walked if step.is_block)
    found: dict[tuple[str, str], Site] = {}
    for step in walked:
        for entry in step.entries:
            for site in _bind(entry, step.module, step.path, holders):
                site = replace(site, tower=step.tower, index=step.block, depth=depth[step.tower])
                found.setdefault((site.kind, site.key), site)  # the outermost declaration stands
    return list(found.values())


class _Step(NamedTuple):
    module: nn.Module
    path: str
    tower: str
    block: int | None
    is_block: bool
    entries: tuple[Entry, ...]


def _walk(model: nn.Module, table: Table, prefix: str) -> Iterator[_Step]:
    """Modules in order, with tower and block index; `_modules` is read directly, so adapters are not walked."""
    seen: set[nn.Module] = set()
    blocks: Counter[str] = Counter()
    stack: list[tuple[nn.Module, str, str, int | None]] = [(model, prefix, "", None)]
    while stack:
        module, path, tower, index = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        entries = lookup(type(module), table)
        is_block = any(isinstance(e, Span) and e.kind == "block" for e in entries)
        if is_block:
            index = blocks[tower]
            blocks[tower] += 1
        yield _Step(module, path, tower, index, is_block, entries)
        towers = {e.child: e.name for e in entries if isinstance(e, Tower)}
        for name, child in reversed(list(module._modules.items())):
            if child is not None:
                stack.append((child, f"{path}.{name}" if path else name, towers.get(name, tower), index))


Holders = dict[int, list[tuple[str, nn.Module, str]]]  # id of a parameter -> every (path, module, attribute) holding it


def _bind(entry: Entry, module: nn.Module, path: str, holders: Holders) -> Iterator[Site]:
    if isinstance(entry, Span):
        yield from _bind_span(entry, module, path)
    if not isinstance(entry, Weight):
        return
    head, _, name = entry.param.rpartition(".")
    owner = _submodule(module, head)
    if owner is None:
        return
    reader = owner if entry.reader is None else _submodule(module, entry.reader)
    assert reader is not None, f"{type(module).__name__} has no module {entry.reader!r}"
    if parametrize.is_parametrized(owner, name):
        where = f"{path}.{entry.param}".strip(".")
        why = f"{where} is parametrised; call torch.nn.utils.parametrize.remove_parametrizations on it first"
        yield Site(entry.kind, where, where, (Place(owner, name, None, reader),), "weight", blocked=why)
    param = owner._parameters.get(name)
    if param is None:  # an instance without it (no bias, an alternative layout): the site drops out
        return
    held = holders[id(param)]  # one parameter in several places is one target, named after the first
    first = held[0][0]
    weight, bias, slot = _pair(name)
    places = tuple(Place(o, *_pair(n)[:2], reader if o is owner else o) for _, o, n in held)
    range_ = _resolve(entry.part, module, param.shape[entry.axis])
    key = _key(first, held[0][2]) + (f":{entry.kind.rpartition('.')[2]}" if range_ else "")
    target = f"{first}/{weight}"
    yield Site(entry.kind, key, target, places, slot, range_, entry.axis, whole=entry.whole)
    if slot == "bias" and entry.kind not in ("bias", "head"):
        yield Site("bias", key, target, places, "bias")
    if slot == "weight" and entry.kind != "head" and bias and owner._parameters.get(bias) is not None:
        yield Site("bias", _key(first, bias), target, places, "bias")


def _bind_span(entry: Span, module: nn.Module, path: str) -> Iterator[Site]:
    names = {"enter": entry.enter, "exit": entry.exit, **{tap: tap for tap in entry.taps}}
    modules = {name: _submodule(module, sub) for name, sub in names.items()}
    if all(m is not None for m in modules.values()):
        found = {name: m for name, m in modules.items() if m is not None}
        yield Site(entry.kind, f"{path}:{entry.kind}", f"{path}/{entry.kind}", (), "span", span=entry, modules=found)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in filter(None, path.split(".")):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


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


# -- selection ---------------------------------------------------------------------------------------------------


def select(
    sites: Sequence[Site],
    kinds: Sequence[str],
    where: str | Sequence[str] = "*",
    layers: slice | None = None,
) -> list[Site]:
    """The sites of the given kinds (names or globs) whose module path matches a glob of `where`, in `layers`.

    Raises `InputError` for a kind, glob or slice that matches nothing, and for two sites that overlap.
    """
    chosen: dict[str, Site] = {}
    for kind in kinds:
        matches = [s for s in sites if s.kind == kind or (not s.whole and fnmatchcase(s.kind, kind))]
        if not matches:
            raise InputError(_no_kind(kind, sites))
        chosen.update({s.key: s for s in matches})
    globs = [where] if isinstance(where, str) else list(where)
    for glob in globs:
        if not any(fnmatchcase(s.path, glob) for s in chosen.values()):
            paths = ", ".join(s.path for s in list(chosen.values())[:4])
            raise InputError(f"where={glob!r} matches none of the modules with {', '.join(kinds)}, such as {paths}")
    picked = [s for s in sites if s is chosen.get(s.key) and any(fnmatchcase(s.path, g) for g in globs)]
    if layers is not None:
        picked = [s for s in picked if s.index is not None and s.index in range(s.depth)[layers]]
        if not picked:
            depths = {s.tower or "model": s.depth for s in chosen.values()}
            raise InputError(f"layers={layers} selects nothing: the blocks are {depths}; write e.g. slice(-4, None)")
    _check(picked)
    return picked


def _no_kind(kind: str, sites: Sequence[Site]) -> str:
    if kind == "head":
        return "the model has no head to tune; make one first, e.g. model.reset_classifier(num_classes) in timm"
    offered = sorted({s.kind for s in sites})
    close = difflib.get_close_matches(kind, offered, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no site of kind {kind!r} in this model, which offers {', '.join(offered) or 'none'}{hint}"


def _check(sites: Sequence[Site]) -> None:
    taken: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        if site.blocked:
            raise InputError(site.blocked)
        for other in taken.setdefault((site.target, site.slot), []):
            if site.span is None and _overlap(site, other):
                raise InputError(f"{site.key} ({site.kind}) and {other.key} ({other.kind}) overlap; name one of them")
        taken[(site.target, site.slot)].append(site)


def _overlap(a: Site, b: Site) -> bool:
    if a.range is None or b.range is None or a.axis != b.axis:
        return True
    return a.range[0] < b.range[1] and b.range[0] < a.range[1]
