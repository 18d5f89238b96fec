"""Attaching methods to a model, and choosing which adapters act.

    a = adapt(model, LoRA(rank=8), name="pets")

The base is frozen and stays as it is: same classes, same keys, same values. Adapter modules live in a `Bank` on the
model, visible to `parameters()`, `.to()` and `train()`, absent from `state_dict()` and from `apply()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from vismodal.adapter import Adapter
from vismodal.bank import Bank, attach, bank_of, detach
from vismodal.discover import discover
from vismodal.errors import InputError
from vismodal.families import table as family_table
from vismodal.fingerprint import BANK
from vismodal.methods import METHODS, Method
from vismodal.ports import is_ported
from vismodal.quantised import is_quantised
from vismodal.selection import check_left, select
from vismodal.site import Site, Sites, Table

Models = nn.Module | Mapping[str, nn.Module]


def sites(model: Models, sites: Table | None = None) -> Sites:
    """What the model, or several by prefix, offers: a list of bound sites that prints as a table.

    `sites` adds rows for classes that no family knows: `{MyBlock: (Weight("attn.q", "query.weight"), ...)}`.
    """
    found = [s for prefix, m in models_of(model).items() for s in discover(m, family_table(m, sites), prefix)]
    return Sites(found, lambda site: ", ".join(m.__name__ for m in METHODS if _fits(m, site)))


def _fits(method: type[Method], site: Site) -> bool:
    hidden = site.slot == "weight" and is_quantised(site.tensor)
    return method.fits(site) and (method.quantised or not hidden)


def adapt(
    model: Models,
    method: Method | Sequence[Method],
    name: str = "default",
    *,
    sites: Table | None = None,
    seed: int | None = None,
) -> Adapter:
    """Freeze the model and attach one method, or a list of them, as one trainable adapter.

    It acts at once, beside the adapters that do already; `use(model, name)` has it act alone.

    Args:
        model: a module, or several by prefix: {"unet": unet, "text_encoder": text_encoder}.
        method: e.g. `LoRA(rank=8)`, or `[LoRA(), Tune(sites=("head",))]`.
        name: the adapter's name on the model.
        sites: table rows for module classes that no family knows.
        seed: draws the initial values from this seed alone; None draws from torch's global generator.

    Raises `InputError` where a kind, glob or shape does not fit, or the model is wrapped. Nothing is changed then.
    """
    models = models_of(model)
    _check_disjoint(models)
    for m in models.values():
        _check(m, name)
    methods = slots([method] if isinstance(method, Method) else method)
    found = {prefix: discover(m, family_table(m, sites), prefix) for prefix, m in models.items()}
    built, shared = _built(methods, [s for f in found.values() for s in f], seed)
    try:
        for prefix, m in models.items():
            if BANK not in m._modules:
                m.add_module(BANK, Bank(m, _heads(found[prefix], prefix)))
            mine = set(found[prefix])
            parts = [b for b in built if b[1] in mine]
            attach(bank_of(m), name, prefix, methods, parts, shared if m is next(iter(models.values())) else {})
        for m in models.values():
            bank_of(m).use((*bank_of(m).active, name))
    except BaseException:  # an interrupt too leaves nothing behind
        for m in models.values():
            detach(m, name, keep=False)
        raise
    return Adapter(models, name)


def use(model: Models, *names: str) -> None:
    """Which adapters act, in this order; none of them gives the base. `use(model, "pets", "style")`.

    Of several models, each uses those that it has. Raises `InputError` for a name that none has, or one given twice.
    """
    models = models_of(model).values()
    there = {n for m in models if BANK in m._modules for n in bank_of(m).attached}
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"{name!r} is no name; write names one by one: vm.use(model, 'a', 'b')")
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
    for m in models_of(model).values():
        for name, part in (bank_of(m).attached if BANK in m._modules else {}).items():
            adapters.setdefault(name, {})[part.prefix] = m
    return {name: Adapter(models, name) for name, models in adapters.items()}


def models_of(model: Models) -> dict[str, nn.Module]:
    """One model, or several by prefix, each plain. Raises `InputError` for what is none, or is wrapped."""
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    for m in models.values():
        if not isinstance(m, nn.Module):
            parts = [n for n in ("unet", "transformer", "text_encoder") if isinstance(getattr(m, n, None), nn.Module)]
            hint = ", ".join(f'"{n}": pipe.{n}' for n in parts)
            raise InputError(f"a {type(m).__name__} is no module" + (f"; write {{{hint}}}" if hint else ""))
        if type(m).__name__ in WRAPPERS:
            raise InputError(
                f"this is a {type(m).__name__}: use the plain model, and adapt it before wrapping; it holds the model "
                f"at .{WRAPPERS[type(m).__name__]}"
            )
    return models


# -- attaching ----------------------------------------------------------------------------------------------------


WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


def slots(methods: object) -> dict[str, Method]:
    """A list of methods by the names of their slots: "lora", "tune", "lora_1". Raises `InputError` for what is none."""
    found: dict[str, Method] = {}
    for method in methods if isinstance(methods, Iterable) and not isinstance(methods, str) else (methods,):
        if not isinstance(method, Method):
            raise InputError(f"{method!r} is no method; write e.g. vm.adapt(model, vm.LoRA(rank=8))")
        slot = name = type(method).__name__.lower()
        while slot in found:
            slot = f"{name}_{int(slot[len(name) + 1 :] or 0) + 1}"
        found[slot] = method
    if not found:
        raise InputError("no method given; write e.g. vm.adapt(model, vm.LoRA(rank=8))")
    return found


def _built(
    methods: Mapping[str, Method], sites: Sequence[Site], seed: int | None
) -> tuple[list[tuple[str, Site, nn.Module]], dict[str, nn.Module]]:
    """The modules of all methods with their slots and sites, and those that the sites of a method share."""
    built: list[tuple[str, Site, nn.Module]] = []
    shared: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # the CPU's alone, where all is drawn
        for slot, method in methods.items():
            chosen = _select(sites, method)
            modules, common = method.build(chosen)
            built += [(slot, s, m) for s, m in zip(chosen, modules, strict=True)]
            if common is not None:
                shared[f"{slot}/shared"] = common
    check_left([(slot, site, getattr(module, "replaces", False)) for slot, site, module in built])
    return built, shared


def _select(sites: Sequence[Site], method: Method) -> list[Site]:
    try:
        return select(sites, method.sites, method.where, method.layers, method.fits)
    except InputError as error:
        default, there = type(method)().sites, method.takes(sites)
        if method.sites == default and not there and "head" not in default:
            kinds = dict.fromkeys(s.kind for s in sites if not s.blocked and method.fits(s))
            fits = ", ".join(kinds) if kinds else "none of them; vm.methods() says which families it is for"
            raise InputError(f"{error}; {type(method).__name__} fits {fits}") from None
        if method.sites != default or there in ((), default):
            raise
        raise InputError(f"{error}; {type(method).__name__} goes here with sites={there}") from None


def _check_disjoint(models: Mapping[str, nn.Module]) -> None:
    owner: dict[int, str] = {}
    for prefix, m in models.items():
        for p in m.parameters():
            if owner.setdefault(id(p), prefix) != prefix:
                raise InputError(f"models {owner[id(p)]!r} and {prefix!r} share parameters; give each of them once")


def _check(model: nn.Module, name: str) -> None:
    if any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise InputError(
            "the model is offloaded by accelerate; call adapt before any offloading or dispatching, and load "
            "without a device_map: model.to(device)"
        )
    if any(hasattr(p, "placements") for p in model.parameters()):
        raise InputError("the parameters are sharded (DTensor); call adapt before fully_shard")
    if BANK not in model._modules and any(is_ported(m) for m in model.modules()):
        raise InputError(
            "a part of this model, or a whole that it is part of, is adapted; adapt that one, or detach it"
        )
    if not isinstance(name, str) or not name or any(c in name for c in "./"):
        raise InputError(f"{name!r} cannot name an adapter: write a name without dots or slashes")
    if BANK in model._modules and name in bank_of(model).attached:
        raise InputError(f"the model has an adapter {name!r} already; choose another name, or detach that one first")


def _heads(sites: Iterable[Site], prefix: str) -> frozenset[str]:
    """Names of the parameters of classification heads, which differ from task to task."""
    heads = [s for s in sites if s.kind == "head"]
    paths = [s.path.removeprefix(prefix).strip(".") for s in heads]
    names = [s.places[0].weight if s.slot == "weight" else s.places[0].bias for s in heads]
    return frozenset(f"{path}.{name}".strip(".") for path, name in zip(paths, names, strict=True))
