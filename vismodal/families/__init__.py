"""Families: the injection map of each library, a table from module classes to their sites.

A family is imported when a class of its library stands in the model, so that a user of timm needs no diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType

from torch import nn

from vismodal.discover import check_rows
from vismodal.errors import InputError
from vismodal.site import COMMON, Table, lookup

FAMILIES: Mapping[str, str] = {
    "timm": "vismodal.families.timm",
    "open_clip": "vismodal.families.open_clip",
    "transformers": "vismodal.families.transformers",
    "diffusers": "vismodal.families.diffusers",
    "vismodal": "vismodal.families.clip",
}


def table(model: nn.Module, sites: Table | None = None) -> Table:
    """The merged table for the libraries whose classes stand in the model; `sites` has the last word.

    Raises `InputError` where nothing in the model is known, or `sites` names what its classes do not have.
    """
    check_rows(model, sites or {})
    classes = {c for m in model.modules() for c in type(m).__mro__}
    merged: dict[type[nn.Module], tuple] = dict(COMMON)
    for root in {c.__module__.partition(".")[0] for c in classes} & FAMILIES.keys():
        merged.update(import_module(FAMILIES[root]).TABLE)
    merged.update(sites or {})
    known = any(lookup(type(m), merged) != lookup(type(m), COMMON) for m in model.modules())
    if not known and not sites:
        raise InputError(_unknown(model))
    return merged


def _unknown(model: nn.Module) -> str:
    """An example that runs: the class that most often holds layers, and its first one."""
    held = [(type(m), n) for m in model.modules() for n, child in m.named_children() if _is_layer(child)]
    own = [c for c, _ in held if not c.__module__.startswith("torch.nn.")]
    block = max(own, key=own.count, default=None)
    cls, name = ("MyBlock", "query") if block is None else (block.__name__, next(n for c, n in held if c is block))
    return (
        f"{type(model).__name__} is of no known family (vm.families() lists them); say where its sites are, by names "
        f'of your own or of theirs, e.g. vm.adapt(model, vm.LoRA(sites=("{name}",)), sites={{{cls}: '
        f'(vm.Weight("{name}", "{name}.weight"),)}})'
    )


def _is_layer(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1


def installed() -> list[ModuleType]:
    """The family modules whose library is installed."""
    found = []
    for path in FAMILIES.values():
        try:
            found.append(import_module(path))
        except ImportError:
            continue
    return found
