"""Sites: the named places of a model where a method can attach, found through tables keyed by module class.

A table maps a class to the sites that its instances offer, written relative to the module:

    Attention: (Weight("attn.q", "qkv.weight", part=(0, 3)), Weight("attn.out", "proj.weight"), ...)

`vismodal.discover` binds such entries to a model as `Site`s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Range = tuple[int, int]  # start, stop
Part = tuple[int, int] | Callable[[nn.Module], Range]  # (i, n): the i-th of n equal ranges; or a function of the module


@dataclass(frozen=True)
class Weight:
    """A parameter, or a range of its rows (`axis=0`) or columns (`axis=1`).

    `reader` is the module whose forward reads the parameter, relative to the declaring one ("" is that one itself).
    None means that the parameter's own module is called, as with an ordinary `nn.Linear`. `whole` marks a site that
    covers others, such as `attn.qkv` over `attn.q`: it answers to its own name, never to a glob. `when` says for which
    instances of the class the entry holds. `bias` names tensors of the reader that are its bias, one after the other,
    in instances that hold it apart from the weight.
    """

    kind: str
    param: str
    part: Part | None = None
    axis: int = 0
    reader: str | None = None
    whole: bool = False
    when: Callable[[nn.Module], bool] | None = None
    bias: tuple[str, ...] = ()


@dataclass(frozen=True)
class Room:
    """How a module makes room for tokens that are joined behind those it was made for.

    `attributes` takes the module and the number of tokens joined, and gives the values that stand in for attributes of
    the module while it runs. `masks` names keyword arguments, ... x n x n, that get rows and columns of zeros behind.
    """

    attributes: Callable[[Any, int], Mapping[str, Any]]
    masks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Span:
    """From the input of module `enter` to the output of module `exit` ("" is the declaring module), with taps.

    Paths are relative; a part may be -1 for the last child, -2 for the one before it. `taps` gives names to modules in
    between whose output is read or replaced: {"normed": "norm1"}; a path with a star taps it in every child, as
    "blocks.0", "blocks.1", ... for {"blocks": "blocks.*"}, and "a|b" behind the star is a, or b in a child without it.
    `width` is the path of a module whose weight or shape tells the number of channels of the stream, `channels` the
    axis on which they lie; where they change on the way, `widths` has such paths for the taps, by name. Several spans
    of one kind on a module are told apart by `name`. `when` says for which instances it holds. `room`, by "enter" or
    the name of a tap, says how that module runs on more tokens than it was made for. `heads` is the number of heads of
    the attention that the span is in.
    """

    kind: str
    enter: str = ""
    exit: str = ""
    taps: Mapping[str, str] = field(default_factory=dict, hash=False)
    width: str | None = None
    channels: int = -1
    tower: str = ""
    name: str = ""
    widths: Mapping[str, str] = field(default_factory=dict, hash=False)
    when: Callable[[nn.Module], bool] | None = None
    room: Mapping[str, Room] = field(default_factory=dict, hash=False)
    heads: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class Layout:
    """How tokens lie in the stream: `prefix` of them (class, registers), then those of a grid of rows x columns, or of
    a sequence where `grid` is None. Methods that add tokens put them between the two. Where it is `causal`, a token
    sees only those before it."""

    prefix: int = 0
    grid: tuple[int, int] | None = None
    causal: bool = False


@dataclass(frozen=True)
class Tokens:
    """Declares the layout of every site below this module; `fixed` says why tokens cannot be added there."""

    layout: Callable[[nn.Module], Layout]
    fixed: str = ""


@dataclass(frozen=True)
class Tower:
    """Names the tower ("image", "text") that a direct child of the module holds; layers are counted per tower."""

    name: str
    child: str


@dataclass(frozen=True)
class Order:
    """The order in which the forward runs these direct children, where it is not that of their registration."""

    children: tuple[str, ...]


Entry = Weight | Span | Tokens | Tower | Order
Table = Mapping[type[nn.Module], tuple[Entry, ...]]


def lookup(cls: type, table: Table) -> tuple[Entry, ...]:
    """Entries of the nearest class in the method resolution order, so that subclasses need no row of their own."""
    return next((table[c] for c in cls.__mro__ if c in table), ())


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
    """One module that holds a parameter: the attribute names of the weight and its bias, and who reads them.

    `pieces` names the tensors of the reader that are the bias instead, one after the other: BEiT's q, k and v.
    """

    owner: nn.Module
    weight: str
    bias: str | None
    reader: nn.Module
    pieces: tuple[str, ...] = ()

    def get(self, slot: str) -> Tensor | None:
        """The "weight" or the "bias" as it is held, whatever stands in for it just now."""
        if slot == "bias" and self.pieces:
            return torch.cat([_held(self.reader, name) for name in self.pieces])
        name = self.weight if slot == "weight" else self.bias
        return self.owner._parameters.get(name) if name else None

    def split(self, slot: str, value: Tensor) -> list[tuple[nn.Module, str, Tensor]]:
        """Which attributes of which modules are to hold a value of the weight or the bias; none where it has no use."""
        if slot == "bias" and self.pieces:
            sizes = [len(_held(self.reader, name)) for name in self.pieces]
            return [(self.reader, n, v) for n, v in zip(self.pieces, value.split(sizes), strict=True)]
        name = self.weight if slot == "weight" else self.bias
        return [(self.owner, name, value)] if name in self.owner._parameters else []


def _held(module: nn.Module, name: str) -> Tensor:
    held = module._parameters.get(name, module._buffers.get(name))
    assert held is not None
    return held


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
    width: int = 0  # of a span: channels of its stream
    heads: int = 0  # of a span in attention, where it says so
    widths: Mapping[str, int] = field(default_factory=dict)  # of a span whose channels change: by the name of the tap
    within: tuple[Site, ...] = ()  # of a span over blocks: the sites in them
    device: torch.device | None = None  # of a span: where the parameters of the module that declares it lie
    layout: Layout | None = None
    fixed: str = ""  # why tokens cannot be added to the stream here
    order: int = 0  # in which sites were found: those around others come first

    @property
    def identity(self) -> tuple[object, ...]:
        return self.kind, self.target, self.slot, self.range, self.axis

    @property
    def path(self) -> str:
        """Path of the module that holds the parameter (of a span: that declares it)."""
        return self.target.rpartition("/")[0]

    @property
    def weight(self) -> Tensor | None:
        """The weight's range, as a view; the whole weight for a bias site; None where there is only a bias."""
        W = self.places[0].get("weight")
        return _narrow(W, self.range, self.axis) if self.slot == "weight" and W is not None else W

    @property
    def bias(self) -> Tensor | None:
        """The bias that belongs to the range of rows, or None."""
        b = self.places[0].get("bias")
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

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        from vismodal.table import table

        return table(["kind", "site", "shape", "layer", "methods"], [self._row(s) for s in self])

    def _row(self, site: Site) -> list[str]:
        layer = "" if site.index is None else f"{site.tower} {site.index}".strip()
        if site.blocked:
            return [site.kind, site.key, "", layer, f"none: {site.blocked}"]
        shape = "span" if site.span else "x".join(map(str, site.tensor.shape))
        return [site.kind, site.key, shape, layer, self.fits(site) if self.fits else ""]
