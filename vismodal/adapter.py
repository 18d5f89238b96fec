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

from vismodal.bank import Attached, Bank, bank_of
from vismodal.discover import discover, select
from vismodal.errors import InputError
from vismodal.families import table as family_table
from vismodal.fingerprint import BANK, Fingerprint, fingerprint
from vismodal.methods import METHODS, Method
from vismodal.ports import SpanPort, WeightPort, is_ported
from vismodal.site import Site, Sites, Table

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

    def _all_modules(self) -> dict[str, nn.Module]:
        return self.modules | {key: module for part in self._parts for key, module in part.shared.items()}

    @property
    def bases(self) -> dict[str, Fingerprint]:
        """Fingerprints of the base models, by prefix."""
        return {prefix: bank_of(m).base for prefix, m in self.models.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for key, module in self._all_modules().items():
            for name, p in module.named_parameters():
                yield f"{key}.{name}", p

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for _, p in self.named_parameters())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors by "slot/site.name", gathered where they are sharded; the base is not among them."""
        tensors = {f"{k}.{n}": t for k, m in self._all_modules().items() for n, t in m.state_dict().items()}
        return {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in tensors.items()}

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
            acts = all(self.name in bank_of(m).active for m in self.models.values())
            if not (acts and self.enabled and self.scale):
                raise InputError(f"{self.name!r} is off, so keep=True would bake nothing in; enable or use it first")
            self.merge()
        for model in self.models.values():
            _detach(model, self.name, keep)

    def unused(self) -> list[str]:
        """Dead sites: those that did not run since the last call of `unused()` (or since attaching), and, after a
        backward, those none of whose tensors got a non-zero gradient. Empty when all take part, or are merged."""
        entries = [e for m in self.models.values() for p in bank_of(m).ports.values() for e in p.entries]
        ran = {e.key for e in entries if e.ran and e.adapter == self.name}
        for e in entries:
            e.ran = e.ran and e.adapter != self.name
        if self.merged:
            return []
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
    models = _models(model)
    _check_disjoint(models)
    for m in models.values():
        _check(m, name)
    methods = _slots([method] if isinstance(method, Method) else method)
    found = {prefix: discover(m, family_table(m, sites), prefix) for prefix, m in models.items()}
    built: list[tuple[str, Site, nn.Module]] = []
    shared: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for slot, each in methods.items():
            chosen = select([s for f in found.values() for s in f], each.sites, each.where, each.layers, each.fits)
            modules, common = each.build(chosen)
            built += [(slot, s, m) for s, m in zip(chosen, modules, strict=True)]
            if common is not None:
                shared[f"{slot}/shared"] = common
    try:
        for prefix, m in models.items():
            if BANK not in m._modules:
                m.add_module(BANK, Bank(m, _heads(found[prefix], prefix)))
            mine = set(found[prefix])
            parts = [b for b in built if b[1] in mine]
            _attach(bank_of(m), name, prefix, methods, parts, shared if m is next(iter(models.values())) else {})
        for m in models.values():
            bank_of(m).use((*bank_of(m).active, name))
    except BaseException:  # an interrupt too leaves nothing behind
        for m in models.values():
            _detach(m, name, keep=False)
        raise
    return Adapter(models, name)


def use(model: Models, *names: str) -> None:
    """Which adapters act, in this order; none of them gives the base. `use(model, "pets", "style")`.

    Of several models, each uses those that it has. Raises `InputError` for a name that none has, or one given twice.
    """
    models = _models(model).values()
    there = {n for m in models if BANK in m._modules for n in bank_of(m).attached}
    for name in names:
        if name not in there:
            raise InputError(f"no adapter {name!r} on this model, which has {', '.join(sorted(there)) or 'none'}")
        if names.count(name) > 1:
            raise InputError(f"adapter {name!r} is named twice")
    for m in models:
        if BANK in m._modules:
            bank_of(m).use([n for n in names if n in bank_of(m).attached])


def attached(model: Models) -> dict[str, Adapter]:
    """The adapters on a model by name, also on a copied or unpickled one."""
    adapters: dict[str, dict[str, nn.Module]] = {}
    for m in _models(model).values():
        for name, part in (bank_of(m).attached if BANK in m._modules else {}).items():
            adapters.setdefault(name, {})[part.prefix] = m
    return {name: Adapter(models, name) for name, models in adapters.items()}


def _models(model: Models) -> dict[str, nn.Module]:
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    for m in models.values():
        if not isinstance(m, nn.Module):
            parts = [n for n in ("unet", "transformer", "text_encoder") if isinstance(getattr(m, n, None), nn.Module)]
            hint = ", ".join(f'"{n}": pipe.{n}' for n in parts)
            raise InputError(f"a {type(m).__name__} is no module" + (f"; write {{{hint}}}" if hint else ""))
        if type(m).__name__ in WRAPPERS or m._compiled_call_impl is not None:
            inner = WRAPPERS.get(type(m).__name__)
            where = f"it holds the model at .{inner}" if inner else "it was compiled in place"
            raise InputError(
                f"this is a {type(m).__name__}: use the plain model, and adapt it before wrapping; {where}"
            )
    return models


# -- attaching ----------------------------------------------------------------------------------------------------


WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


def _slots(methods: object) -> dict[str, Method]:
    slots: dict[str, Method] = {}
    for method in methods if isinstance(methods, Iterable) else (methods,):
        if not isinstance(method, Method):
            raise InputError(f"{method!r} is no method; write e.g. vm.adapt(model, vm.LoRA(rank=8))")
        slot = name = type(method).__name__.lower()
        while slot in slots:
            slot = f"{name}_{int(slot[len(name) + 1 :] or 0) + 1}"
        slots[slot] = method
    if not slots:
        raise InputError("no method given; write e.g. vm.adapt(model, vm.LoRA(rank=8))")
    return slots


def _check_disjoint(models: Mapping[str, nn.Module]) -> None:
    owner: dict[int, str] = {}
    for prefix, m in models.items():
        for p in m.parameters():
            if owner.setdefault(id(p), prefix) != prefix:
                raise InputError(f"models {owner[id(p)]!r} and {prefix!r} share parameters; give each of them once")


def _check(model: nn.Module, name: str) -> None:
    if any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise InputError("the model is offloaded by accelerate; call adapt before any offloading or dispatching")
    if any(hasattr(p, "placements") for p in model.parameters()):
        raise InputError("the parameters are sharded (DTensor); call adapt before fully_shard")
    if BANK not in model._modules and any(is_ported(m) for m in model.modules()):
        raise InputError(
            "a part of this model, or a whole that it is part of, is adapted; adapt that one, or detach it"
        )
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


def _attach(
    bank: Bank,
    name: str,
    prefix: str,
    methods: dict[str, Method],
    built: list[tuple[str, Site, nn.Module]],
    shared: dict[str, nn.Module],
) -> None:
    if not bank.is_free(name):
        raise InputError(f"{name!r} cannot name an adapter: choose another name")
    modules = {f"{slot}/{site.key}": module for slot, site, module in built}
    kinds = {f"{slot}/{site.key}": site.kind for slot, site, _ in built}
    bank.attached[name] = Attached(name, prefix, methods, kinds, modules, shared)
    bank.attached[name].tree.train(bank.training)
    for slot, site, module in built:
        if site.target not in bank.ports:
            bank.ports[site.target] = WeightPort(site) if site.span is None else SpanPort(site)
        port = bank.ports[site.target]
        port.add(name, f"{slot}/{site.key}", module, site)


def _detach(model: nn.Module, name: str, keep: bool) -> None:
    if BANK not in model._modules:
        return
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
    bank.attached.pop(name, None)
    bank.use([n for n in bank.active if n != name])
    if bank.attached:
        return
    for frozen in bank.frozen:
        frozen.remove(model.training)
    del model._modules[BANK]
    for path, p in model.named_parameters():
        p.requires_grad_(bank.requires_grad.get(path, p.requires_grad))
