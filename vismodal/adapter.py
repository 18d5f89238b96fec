"""Adapters: attach methods to a model, switch, scale, merge and detach them.

    a = adapt(model, LoRA(rank=8), name="pets")

The base is frozen and stays as it is: same classes, same keys, same values. Adapter modules live in a `Bank` on the
model, visible to `parameters()`, `.to()` and `train()`, absent from `state_dict()` and from `apply()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vismodal.bank import BANK, Attached, Bank, bank_of
from vismodal.errors import InputError
from vismodal.families import table as family_table
from vismodal.fingerprint import Fingerprint, fingerprint
from vismodal.methods import METHODS, Method
from vismodal.ports import SpanPort, WeightPort
from vismodal.site import Site, Sites, Table, discover, select

Models = nn.Module | Mapping[str, nn.Module]


class Adapter:
    """One named adaptation of one model, or of several under one name."""

    def __init__(self, models: dict[str, nn.Module], name: str):
        self.name = name
        self.models = models

    @property
    def _parts(self) -> list[Attached]:
        try:
            return [bank_of(m).attached[self.name] for m in self.models.values()]
        except (AttributeError, KeyError):
            raise RuntimeError(f"adapter {self.name!r} is detached from its model") from None

    @property
    def methods(self) -> dict[str, Method]:
        """The methods by slot: {"lora": LoRA(rank=8)}."""
        return self._parts[0].methods

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by "slot/site"."""
        return {key: module for part in self._parts for key, module in part.modules.items()}

    @property
    def bases(self) -> dict[str, Fingerprint]:
        """Fingerprints of the base models, by prefix."""
        return {prefix: bank_of(m).base for prefix, m in self.models.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for key, module in self.modules.items():
            for name, p in module.named_parameters():
                yield f"{key}.{name}", p

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for _, p in self.named_parameters())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors by "slot/site.name"; the base is not among them."""
        return {f"{k}.{n}": t for k, m in self.modules.items() for n, t in m.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors in. Raises `InputError` naming keys that are missing, left over, or of another shape."""
        mine = self.state_dict()
        wrong = [f"lacks {k}" for k in mine.keys() - state.keys()] + [f"has {k}" for k in state.keys() - mine.keys()]
        shapes = [(k, tuple(state[k].shape), tuple(mine[k].shape)) for k in mine.keys() & state.keys()]
        wrong += [f"{k} is {a}, the adapter has {b}" for k, a, b in shapes if a != b]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise InputError(f"tensors do not fit adapter {self.name!r}: {'; '.join(sorted(wrong)[:4])}{more}")
        with torch.no_grad():
            for key, tensor in mine.items():
                tensor.copy_(state[key])
        self._refresh(rebake=True)

    # -- state --

    def _set(self, **state: Any) -> None:
        before = [(part, {k: getattr(part, k) for k in state}) for part in self._parts]
        try:
            for part, _ in before:
                for k, value in state.items():
                    setattr(part, k, value)
            self._refresh()
        except BaseException:
            for part, old in before:
                for k, value in old.items():
                    setattr(part, k, value)
            self._refresh()
            raise

    def _refresh(self, rebake: bool = False) -> None:
        for model in self.models.values():
            if rebake:
                for port in bank_of(model).ports.values():
                    port.set((), ())
            bank_of(model).refresh()

    @property
    def enabled(self) -> bool:
        return self._parts[0].enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._set(enabled=bool(on))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Without this adapter for a while: `with a.disabled(): y0 = model(x)`."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @property
    def scale(self) -> float:
        """Interpolates each weight between the base (0, exactly) and W' (1)."""
        return self._parts[0].scale

    @scale.setter
    def scale(self, scale: float) -> None:
        fixed = [type(m).__name__ for m in self.methods.values() if not m.interpolates]
        if fixed and scale not in (0, 1):
            raise InputError(f"{', '.join(fixed)} cannot be interpolated: scale must be 0 or 1, not {scale:g}")
        self._set(scale=float(scale))

    @property
    def trainable(self) -> bool:
        return self._parts[0].trainable

    @trainable.setter
    def trainable(self, on: bool) -> None:
        for part, model in zip(self._parts, self.models.values(), strict=True):
            part.trainable = bool(on)
            bank_of(model).use(bank_of(model).active)

    @property
    def merged(self) -> bool:
        return self._parts[0].merged

    def merge(self) -> None:
        """Write W' into the base parameters, before any adapter that stays live. `unmerge` restores them bit by bit."""
        for slot, method in self.methods.items():
            if not method.mergeable:
                raise InputError(f"{type(method).__name__} ({slot}) cannot merge into the base weights; keep it live")
        self._set(merged=True)

    def unmerge(self) -> None:
        self._set(merged=False)

    def detach(self, keep: bool = False) -> None:
        """Remove the adapter and leave the model as it was found; `keep=True` bakes it into the base weights first."""
        if keep:
            self.merge()
        for model in self.models.values():
            _detach(model, self.name, keep)

    def unused(self) -> list[str]:
        """Dead sites: those that did not run since the last call of `unused()` (or since attaching), and, after a
        backward, those none of whose tensors got a non-zero gradient. Empty when every site takes part."""
        entries = [e for m in self.models.values() for p in bank_of(m).ports.values() for e in p.entries]
        ran = {e.key for e in entries if e.ran and e.adapter == self.name}
        for e in entries:
            e.ran = e.ran and e.adapter != self.name
        trained = any(p.grad is not None for p in self.parameters())
        return [k for k, m in self.modules.items() if k not in ran or (trained and not _has_gradient(m))]

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {', '.join(map(repr, self.methods.values()))})"

    def __str__(self) -> str:
        from vismodal.table import table

        kinds = {key: kind for part in self._parts for key, kind in part.sites.items()}
        rows = [
            [key.partition("/")[2], kinds[key], type(self.methods[key.partition("/")[0]]).__name__, f"{_count(m):,}"]
            for key, m in self.modules.items()
        ]
        base = sum(p.numel() for m in self.models.values() for n, p in m.named_parameters() if BANK not in n)
        total = f"{self.num_parameters:,} parameters, {100 * self.num_parameters / base:.2f}% of {base:,}"
        state = "merged" if self.merged else "live" if self.enabled else "off"
        names = ", ".join(b.name for b in self.bases.values())
        head = f"adapter {self.name!r} on {names}: {total}; {state} at scale {self.scale:g}"
        return f"{head}\n{table(['site', 'kind', 'method', 'parameters'], rows)}"


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _has_gradient(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


# -- the public functions -----------------------------------------------------------------------------------------


def sites(model: nn.Module, sites: Table | None = None) -> Sites:
    """What the model offers: a list of bound sites that prints as a table.

    `sites` adds rows for classes that no family knows: `{MyBlock: (Weight("attn.q", "query.weight"), ...)}`.
    """
    found = discover(model, family_table(model, sites))
    return Sites(found, lambda site: ", ".join(m.__name__ for m in METHODS if m.fits(site)))


def adapt(
    model: Models,
    method: Method | Sequence[Method],
    name: str = "default",
    *,
    sites: Table | None = None,
    seed: int | None = None,
) -> Adapter:
    """Freeze the model and attach one method, or a list of them, as one trainable adapter.

    Args:
        model: a module, or several by prefix: {"unet": unet, "text_encoder": text_encoder}.
        method: e.g. `LoRA(rank=8)`, or `[LoRA(), Tune(sites=("head",))]`.
        name: the adapter's name on the model.
        sites: table rows for module classes that no family knows.
        seed: draws the initial values from this seed alone; None draws from torch's global generator.

    Raises `InputError` where a kind, glob or shape does not fit, or the model is wrapped. Nothing is changed then.
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    for m in models.values():
        _check(m, name)
    methods = _slots([method] if isinstance(method, Method) else list(method))
    found = {prefix: discover(m, family_table(m, sites), prefix) for prefix, m in models.items()}
    built: list[tuple[str, Site, nn.Module]] = []
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for slot, each in methods.items():
            chosen = select([s for f in found.values() for s in f], each.sites, each.where, each.layers)
            built += [(slot, s, m) for s, m in zip(chosen, each.build(chosen).modules, strict=True)]
    for prefix, m in models.items():
        mine = set(found[prefix])
        if BANK not in m._modules:
            m.add_module(BANK, Bank(m, _heads(found[prefix], prefix)))
        _attach(bank_of(m), name, methods, [b for b in built if b[1] in mine])
    adapter = Adapter(models, name)
    for m in models.values():
        bank_of(m).use((*bank_of(m).active, name))
    return adapter


def use(model: Models, *names: str) -> None:
    """Which adapters act, in this order; none of them gives the base. `use(model, "pets", "style")`."""
    for m in model.values() if isinstance(model, Mapping) else (model,):
        if BANK not in m._modules:
            if names:
                raise InputError(f"no adapter on this {type(m).__name__}; call vm.adapt or vm.load first")
            continue
        bank_of(m).use(names)


def attached(model: Models) -> dict[str, Adapter]:
    """The adapters on a model by name, also on a copied or unpickled one."""
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    names = [n for m in models.values() if BANK in m._modules for n in bank_of(m).attached]
    return {n: Adapter({k: m for k, m in models.items() if n in bank_of(m).attached}, n) for n in dict.fromkeys(names)}


# -- attaching ----------------------------------------------------------------------------------------------------


def _slots(methods: Iterable[Method]) -> dict[str, Method]:
    slots: dict[str, Method] = {}
    for method in methods:
        slot = name = type(method).__name__.lower()
        while slot in slots:
            slot = f"{name}_{int(slot[len(name) + 1 :] or 0) + 1}"
        slots[slot] = method
    if not slots:
        raise InputError("no method given; write e.g. vm.adapt(model, vm.LoRA(rank=8))")
    return slots


def _check(model: nn.Module, name: str) -> None:
    kind = type(model).__name__
    unwrap = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
    if kind in unwrap or model._compiled_call_impl is not None:
        inner = f"it holds the model at .{unwrap[kind]}" if kind in unwrap else "it was compiled in place"
        raise InputError(f"adapt the plain model first, then wrap it: this is a {kind}; {inner}")
    if any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise InputError("the model is offloaded by accelerate; call adapt before any offloading or dispatching")
    if any(hasattr(p, "placements") for p in model.parameters()):
        raise InputError("the parameters are sharded (DTensor); call adapt before fully_shard")
    if not name or any(c in name for c in "./"):
        raise InputError(f"{name!r} cannot name an adapter: write a name without dots or slashes")
    if BANK in model._modules and name in bank_of(model).attached:
        raise InputError(f"the model has an adapter {name!r} already; choose another name, or detach that one first")


def _heads(sites: Iterable[Site], prefix: str) -> frozenset[str]:
    """Names of the parameters of classification heads, which differ from task to task."""
    heads = [s for s in sites if s.kind == "head"]
    paths = [s.path.removeprefix(prefix).strip(".") for s in heads]
    names = [s.places[0].weight if s.slot == "weight" else s.places[0].bias for s in heads]
    return frozenset(f"{path}.{name}".strip(".") for path, name in zip(paths, names, strict=True))


def _attach(bank: Bank, name: str, methods: dict[str, Method], built: list[tuple[str, Site, nn.Module]]) -> None:
    modules = {f"{slot}/{site.key}": module for slot, site, module in built}
    kinds = {f"{slot}/{site.key}": site.kind for slot, site, _ in built}
    bank.attached[name] = Attached(name, methods, kinds, modules)
    bank.attached[name].tree.train(bank.training)
    for slot, site, module in built:
        if site.target not in bank.ports:
            bank.ports[site.target] = WeightPort(site) if site.span is None else SpanPort(site)
        port = bank.ports[site.target]
        port.add(name, f"{slot}/{site.key}", module, site)


def _detach(model: nn.Module, name: str, keep: bool) -> None:
    bank = bank_of(model)
    for target, port in list(bank.ports.items()):
        if keep:
            port.keep(name)
        port.set((), ())
        port.remove(name)
        if not port.entries:
            del bank.ports[target]
    if keep:
        bank.base = fingerprint(model, bank.heads)
    del bank.attached[name]
    bank.use([n for n in bank.active if n != name])
    if bank.attached:
        return
    for frozen in bank.frozen:
        frozen.remove()
    del model._modules[BANK]
    for path, p in model.named_parameters():
        p.requires_grad_(bank.requires_grad[path])
