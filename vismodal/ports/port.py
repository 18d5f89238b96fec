"""What all ports share: the modules that stand here, by adapter and in order, and which of them act just now."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vismodal.recompute import Recompute, State
from vismodal.site import Site
from vismodal.weights import Entry, Group


class Port:
    """The modules of all adapters on one target, and which of them act just now."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.live: tuple[Group, ...] = ()
        self.state: State = ()
        self.waiting: tuple[str, ...] = ()  # adapters that would act here if they had a condition
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
        self.state = tuple((g.name, g.scale) for g in self.live)
        waiting = {e.adapter for e in self.entries if e.waits and not e.dropped}
        self.waiting = tuple(name for name, _ in active if name in waiting)

    def _groups(self, active: State) -> Iterator[Group]:
        """Entries by adapter in the order given, split where the method changes (a list of them)."""
        for name, scale in active:
            mine = [e for e in self.entries if e.adapter == name and not (e.dropped or e.waits)]
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
        same_device(self.live[0].entries[0], x)


def same_device(entry: Entry, x: Tensor) -> None:
    if next(entry.module.parameters(), x).device != x.device:
        raise RuntimeError(
            f"{entry.key}: the adapter lies on another device than its layer or input on {x.device}; "
            "move the whole model with model.to(...), and adapt before any offloading"
        )
