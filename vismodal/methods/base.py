"""What a method is: a frozen config that says where it attaches and builds one module per site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.site import Site


class Part(NamedTuple):
    """A module together with the range of its layer's rows (or columns) that it acts on; None is the whole."""

    module: nn.Module
    range: tuple[int, int] | None
    axis: int


class WeightModule(nn.Module):
    """Re-expresses a weight and its bias. `forward` is the truth: live use, merging and exporting all follow it.

    `bias_only` says that `forward` hands W back as it came, whatever that is; of a quantised one it is given None.
    `reads_weight` says that `update` reads `layer.weight` or its bias, as left by merged adapters only: it is used
    where no other adapter or method stands on that parameter. `replaces` says that nothing of what `forward` was given
    for the site's own tensor is left.
    """

    reads_weight: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    bias_only: bool = False

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W, b (the site's range, at least fp32) -> W', b' of the same shapes."""
        raise NotImplementedError

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        """Whether `update` can act on this layer's output without forming W'."""
        return False

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        """y of the layer for input x -> y', equal to the layer with W'; `parts` are this adapter's modules on it."""
        raise NotImplementedError


class SpanModule(nn.Module):
    """Acts on the stream of tokens or features of a span.

    `context` lasts from an enter to its exit. It is the only place for what is kept in between: under gradient
    checkpointing a tap or an enter may run again with the same context, and must then do the same again, so nothing is
    accumulated in it. A module whose method lets it take no part just now says so by an attribute `idle`, and is not
    dead then. The key "extra" holds how many tokens other modules have joined to the stream before, "aside" a
    function that runs a module of the span on tensors of one's own: `context["aside"]("normed", prompts)`. Adapted
    weights take part in that, spans do not. Where the method needs a condition, "condition" holds it, one row for each
    of the stream's; without one the module is not called. A module that is `whole` acts in full at every scale but 0.
    """

    whole: ClassVar[bool] = False

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        """The stream where the span begins -> what the model goes on with."""
        return x

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        """The stream where the span ends -> what the model goes on with."""
        return y

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        """The output of the tapped module `name`, in between."""
        return y

    def feed(self, name: str, x: Tensor, context: dict[str, Any]) -> Tensor:
        """The input of the tapped module `name`. Tokens joined where the span has `room` for them stand behind."""
        return x

    def values(self, module: nn.Module, context: dict[str, Any]) -> Mapping[str, Any]:
        """Values that stand in for attributes of `module`, where the span begins, while that runs."""
        return {}


class Condition(NamedTuple):
    """What a method is given beside the model's input, such as an edge map: a row for each row of the batch.

    `away` stands in for `rows` where classifier-free guidance leads away from something. `number` tells it from others.
    """

    rows: Tensor
    away: Tensor
    number: int = 0

    def of(self, count: int, part: Sequence[int] | None = None) -> Tensor:
        """The rows for a batch of `count`, or for a `part` of it, by their places.

        A batch of twice as many rows is guidance's: first those that it leads away from, then the batch itself. Raises
        `InputError` for any other number.
        """
        given = len(self.rows)
        if count not in (given, 2 * given):
            raise InputError(
                f"the batch has {count} rows, the condition {given}: give one for each row of the batch, as it is "
                "before classifier-free guidance doubles it"
            )
        whole = self.rows if count == given else torch.cat((self.away, self.rows))
        return whole if part is None else whole[list(part)]


def share(module: nn.Module, shared: nn.Module) -> None:
    """Lets `module` use `shared` as `module.shared`, which is not saved with it: the adapter holds it once."""
    module.__dict__["shared"] = shared


class Built(NamedTuple):
    """One module per site, in the order given, and what they share (None for most methods)."""

    modules: tuple[nn.Module, ...]
    shared: nn.Module | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Method:
    """Fields that every method has.

    Args:
        sites: kinds of site, by name or glob: ("attn.q", "mlp.*").
        where: glob, or several, on module paths: "blocks.1?.*".
        layers: a slice of the blocks of each tower: slice(-4, None) for the last four.
    """

    sites: tuple[str, ...] = ()
    where: str | tuple[str, ...] = "*"
    layers: slice | None = field(default=None, hash=False)

    survey: ClassVar[str]  # class in arXiv 2403.14608
    paper: ClassVar[str]
    mergeable: ClassVar[bool]
    interpolates: ClassVar[bool] = True  # whether scales between 0 and 1 mean something
    whole: ClassVar[bool] = False  # if they mean nothing: whether they may be asked for all the same, of methods beside
    starts_at_base: ClassVar[bool] = True  # whether the output is the base's until something is learnt
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = ()  # sites that are the method where a model lacks the default
    quantised: ClassVar[bool] = True  # whether it acts where the base's weights are quantised
    conditioned: ClassVar[bool] = False  # whether it needs a condition at each forward, and is the base without one

    def __post_init__(self) -> None:
        name = type(self).__name__
        for given, what in ((self.sites, "sites"), (self.where, "where")):
            if isinstance(given, str) and what == "sites":
                object.__setattr__(self, what, (given,))  # one kind may come without the tuple
            elif not given:
                raise InputError(f"{name}: {what} is empty, so nothing could attach")
        if self.layers is not None and not isinstance(self.layers, slice):
            raise InputError(f"{name}: layers must be a slice such as slice(-4, None), not {self.layers!r}")

    def options(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        made = {f.name: f.default_factory for f in fields(self) if f.default_factory is not MISSING}
        defaults = {f.name: made[f.name]() if f.name in made else f.default for f in fields(self)}
        return {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"

    def build(self, sites: Sequence[Site]) -> Built:
        """New modules for the bound sites. Raises `InputError` where the definition makes no sense."""
        raise NotImplementedError

    @classmethod
    def fits(cls, site: Site) -> bool:
        """Whether this method can attach to the site at all: what globs take, and what `vm.sites` shows."""
        return True

    @classmethod
    def takes(cls, sites: Sequence[Site]) -> tuple[str, ...]:
        """What to give as `sites` for the whole method on these: the default, or the first of `elsewhere` of which
        every kind is there and fits; () where the method makes no sense."""
        fit = {site.kind for site in sites if not site.blocked and cls.fits(site)}
        choices = (cls().sites, *cls.elsewhere)
        whole = (kinds for kinds in choices if all(any(fnmatchcase(k, kind) for k in fit) for kind in kinds))
        return next(whole, ())

    def condition(self, rows: Tensor) -> Condition:
        """What its modules are to be given for this condition, a row for each row of a batch.

        Raises `InputError` for what has not the form that it needs.
        """
        raise NotImplementedError

    def loss(self, modules: Sequence[nn.Module]) -> Tensor | None:
        """A term that training adds to the task's loss, from the modules that `build` made; None without one."""
        return None

    def step(self, modules: Sequence[nn.Module], step: int, steps: int) -> None:
        """Called after update `step` of `steps` (1 is the first), while the gradients of that update are there."""

    @property
    def rests(self) -> bool:
        """Whether a step may leave a site without a gradient by chance, as drop-path does."""
        return False

    def rate(self, tensor: str) -> float:
        """A factor on the learning rate of a tensor, by its name in the module ("B")."""
        return 1.0

    def last(self, tensor: str) -> int | None:
        """The update after which a tensor stays as it is; None where it learns to the end."""
        return None

    def calibrating(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """In which batches run forward and backward before training, for a method that chooses by their gradients."""
        return nullcontext()

    def resize(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Gives a module the sizes of the tensors that it is about to get, where a choice by data made them."""

    def spectrum(self, module: nn.Module) -> Tensor | None:
        """The singular values of a module's update, the largest first, where that is a product of factors that others
        can take the place of; None where it is not."""
        return None

    def truncate(self, module: nn.Module, rank: int) -> None:
        """Leaves of a module's update, which has a `spectrum`, the best approximation of that rank."""
        raise NotImplementedError
