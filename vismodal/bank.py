"""The bank: the adapters of one model, where the model carries them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vismodal.errors import InputError
from vismodal.fingerprint import BANK, fingerprint
from vismodal.limit import Limit, Spot
from vismodal.methods import Condition, Method
from vismodal.ports import FrozenStatistics, Port, SpanPort, Stream, WeightPort
from vismodal.site import Site
from vismodal.weights import Entry


class Bank(nn.Module):
    """The adapters of one model, their ports, and which of them act.

    Modules are kept out of `_modules`, which `state_dict` and strict loading walk, and are handed to what walks
    `children()` and `named_modules()`: parameters, buffers, `.to`, `train`, DDP, FSDP. `named_children`, `apply` and
    transformers' `smart_apply` see nothing: re-initialising the base (timm's `init_weights`) must not reach them.
    """

    def __init__(self, model: nn.Module, heads: frozenset[str]):
        super().__init__()
        self.heads = heads
        self.base = fingerprint(model, heads)
        self.attached: dict[str, Attached] = {}
        self.ports: dict[str, Port] = {}
        self.stream = Stream()
        self.active: tuple[str, ...] = ()
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        self.training = model.training
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.frozen = [FrozenStatistics(m) for m in norms]

    def forward(self, x: Any) -> Any:
        return x  # an nn.Sequential calls all its children

    def children(self) -> Iterator[nn.Module]:
        for attached in self.__dict__["attached"].values():
            yield attached.tree

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(())

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        yield from super().named_modules(memo, prefix, remove_duplicate)
        for name, attached in self.__dict__["attached"].items():
            yield from attached.tree.named_modules(memo, f"{prefix}.{name}".strip("."), remove_duplicate)

    def is_free(self, name: str) -> bool:
        """Whether an adapter may have this name: those of the bank's own attributes would hide it."""
        return not hasattr(self, name)

    def __getattr__(self, name: str) -> Any:
        """`model.get_submodule("_vismodal.pets")` finds what `named_modules` names."""
        attached = self.__dict__.get("attached", {})
        return attached[name].tree if name in attached else super().__getattr__(name)

    def apply(self, fn: Any) -> Bank:
        return self

    smart_apply = apply

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination

    def refresh(self) -> None:
        """Hand every port the adapters that act on it, and let only those that do require gradients."""
        order = [self.attached[name] for name in self.active]
        live = tuple((a.name, a.scale) for a in order if a.enabled and a.scale and not a.merged)
        merged = tuple((a.name, a.scale) for a in order if a.enabled and a.scale and a.merged)
        dropped = {name: attached.dropped for name, attached in self.attached.items()}
        for port in self.ports.values():
            for entry in port.entries:
                entry.dropped = entry.key in dropped[entry.adapter]
                self.attached[entry.adapter].hand_over(entry)
            port.set(live, merged)

    def rehook(self) -> None:
        """Hooks of all ports anew, in an order that does not depend on which adapter came first.

        What was compiled before would go on without them, since it guards no hooks (`skip_nnmodule_hook_guards`).
        """
        for port in sorted(self.ports.values(), key=lambda port: port.order):
            port.rehook()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    def act(self, names: Sequence[str]) -> None:
        """The adapters that act from now on; what wants gradients stays."""
        self.active = tuple(names)
        self.refresh()

    def use(self, names: Sequence[str]) -> None:
        """The adapters that act from now on, and that alone want gradients."""
        for attached in self.attached.values():
            attached.require_grad(attached.trainable and attached.name in names)
        self.act(names)


@dataclass(eq=False)
class Attached:
    """One adapter's part on one model."""

    name: str
    prefix: str  # of its keys, where it adapts several models
    methods: dict[str, Method]  # by slot: "lora", "tune", "lora_1"
    sites: dict[str, str]  # key of a module -> kind of its site
    spots: dict[str, Spot]  # and where it lies
    modules: dict[str, nn.Module]  # by key: "lora/blocks.0.attn.qkv:q"
    shared: dict[str, nn.Module] = field(default_factory=dict)  # what a method's modules use together: "fact/shared"
    trainable: bool = True
    enabled: bool = True
    scale: float = 1.0
    merged: bool = False
    limit: Limit = field(default_factory=Limit)
    condition: Condition | None = None
    given: int = 0  # how many conditions there have been
    tree: nn.Module = field(init=False)
    frozen: frozenset[str] = field(init=False)  # parameters that the method itself holds fixed

    def __post_init__(self) -> None:
        self.tree = nn.Module()
        for key, module in {**self.modules, **self.shared}.items():
            self.tree.add_module(key.replace(".", "/"), module)
        self.frozen = frozenset(n for n, p in self.tree.named_parameters() if not p.requires_grad)

    @property
    def dropped(self) -> frozenset[str]:
        """Keys of the modules that its limit leaves out."""
        return self.limit.dropped(self.spots)

    def hand_over(self, entry: Entry) -> None:
        """The condition, or its lack, to one of the modules, where its method needs one."""
        needs = self.methods[entry.key.partition("/")[0]].conditioned
        entry.condition = self.condition if needs else None
        entry.waits = needs and self.condition is None

    def require_grad(self, on: bool) -> None:
        for name, p in self.tree.named_parameters():
            p.requires_grad_(on and name not in self.frozen)


def bank_of(model: nn.Module) -> Bank:
    """The bank of a model that has one."""
    bank: Bank = model._modules[BANK]  # type: ignore[assignment]
    return bank


def attach(
    bank: Bank,
    name: str,
    prefix: str,
    methods: dict[str, Method],
    built: list[tuple[str, Site, nn.Module]],
    shared: dict[str, nn.Module],
) -> None:
    """Put the modules built for sites of one model into its bank, and their ports on their places."""
    if not bank.is_free(name):
        raise InputError(f"{name!r} cannot name an adapter: choose another name")
    modules = {f"{slot}/{site.key}": module for slot, site, module in built}
    kinds = {f"{slot}/{site.key}": site.kind for slot, site, _ in built}
    spots = {f"{slot}/{s.key}": Spot(s.path, s.index, s.depth, s.span is not None) for slot, s, _ in built}
    bank.attached[name] = Attached(name, prefix, methods, kinds, spots, modules, shared)
    bank.attached[name].tree.train(bank.training)
    for slot, site, module in built:
        if site.target not in bank.ports:
            bank.ports[site.target] = WeightPort(site) if site.span is None else SpanPort(site, bank.stream)
        bank.ports[site.target].add(name, f"{slot}/{site.key}", module, site)
    bank.rehook()


def detach(model: nn.Module, name: str, keep: bool) -> None:
    """Take an adapter off a model; the last one leaves the model as it was found."""
    if BANK not in model._modules:
        return
    bank = bank_of(model)
    for target, port in list(bank.ports.items()):
        if keep:
            port.keep(name)
        port.set((), ())
        port.remove(name)
        if not port.entries:
            port.rehook()
            del bank.ports[target]
    bank.rehook()
    if keep:
        bank.base = fingerprint(model, bank.heads)
    bank.attached.pop(name, None)
    bank.use([n for n in bank.active if n != name])
    if bank.attached:
        return
    for frozen in bank.frozen:
        frozen.remove(model.training)
    del model._modules[BANK]
    for path, p in model.named_parameters():
        p.requires_grad_(bank.requires_grad.get(path, p.requires_grad))
