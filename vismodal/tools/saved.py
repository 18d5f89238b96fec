"""An adapter file in memory, and what it does to each weight, as far as that can be told without the base model.

a = read_saved("pets.safetensors")
a.tensors, a.methods, a.bases
write_saved(a, "copy.safetensors")
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from vismodal.adapter import Adapter
from vismodal.checkpoint import check, described, header_of
from vismodal.errors import InputError
from vismodal.files import write_tensors
from vismodal.fingerprint import Fingerprint
from vismodal.formats.bases import EMBEDDED, NAMES, base_of
from vismodal.formats.files import as_own_on, read_any
from vismodal.methods import AdaLoRA, DyLoRA, LoRA, Method, PiSSA, Tune
from vismodal.methods.lowrank import Own
from vismodal.site import Place, Site
from vismodal.tools.combine import Change, Update, Value

OWN_ENTRIES = ("vismodal", "methods", "base")  # of the header
# the tensors whose rows, and whose other axes, are those of the weight
FACTORS: Mapping[type[Method], tuple[str, str]] = {
    LoRA: ("B", "A"), PiSSA: ("B", "A"), DyLoRA: ("B", "A"), AdaLoRA: ("P", "Q"),
}  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """What a file of `vm.save` holds: `name` is what messages call it."""

    name: str
    header: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    @cached_property
    def methods(self) -> dict[str, Method]:
        """By slot."""
        return described(self.header)[0]

    @cached_property
    def bases(self) -> dict[str, Fingerprint]:
        """By prefix."""
        return described(self.header)[1]

    @property
    def metadata(self) -> dict[str, str]:
        """What the header says besides: classes, a prompt."""
        return {k: v for k, v in self.header.items() if k not in OWN_ENTRIES}

    @cached_property
    def slots(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Tensors by slot, site and name."""
        found: dict[str, dict[str, dict[str, Tensor]]] = {slot: {} for slot in self.methods}
        for key, tensor in self.tensors.items():
            slot, _, rest = key.partition("/")
            site, _, name = rest.rpartition(".")
            found.setdefault(slot, {}).setdefault(site, {})[name] = tensor
        return found


def read_saved(path: str | Path, model: str | None = None) -> Saved:
    """An adapter file of vismodal, or one of diffusers, kohya or LyCORIS as vismodal would have written it.

    Args:
        path: the file.
        model: the base of a file of others, which does not always tell it: a folder of diffusers, sd1, sd2, sdxl.

    Raises `InputError` where the file is missing, broken or no adapter, and where its base is not known.
    """
    path = Path(path)
    tensors, header = read_any(path)
    if "vismodal" in header:
        check(header, path)
        return Saved(str(path), header, tensors)
    known = model is not None and (model in NAMES or model == EMBEDDED or Path(model).expanduser().is_dir())
    try:
        made, described_by, notes = as_own_on(tensors, header, base_of(model) if model and known else None)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return Saved(str(path), described_by, made)


def saved_of(adapter: Adapter, metadata: Mapping[str, str] | None = None) -> Saved:
    """An adapter on a model as its file would be."""
    tensors = {key: t.detach().cpu().clone() for key, t in adapter.state_dict().items()}
    return Saved(adapter.name, header_of(adapter.methods, adapter.bases, metadata), tensors)


def write_saved(saved: Saved, path: str | Path) -> Path:
    """Whole, or not at all."""
    return write_tensors(Path(path), saved.tensors, saved.header)


# -- what it does --------------------------------------------------------------------------------------------------


def products(saved: Saved) -> dict[str, nn.Module]:
    """The modules of its low-rank methods by "slot/site", made again without the base; {} where it has none."""
    return {
        key: module for slot, m in saved.methods.items() if type(m) in FACTORS for key, module in _built(saved, slot)
    }


def changes(saved: Saved) -> dict[str, Change]:
    """What it does to each site. Raises `InputError` where that cannot be told from the file alone."""
    found: dict[str, Change] = {}
    for slot, method in saved.methods.items():
        check_is_weights(saved, method)
        if type(method) in FACTORS:
            new: dict[str, Change] = {k.partition("/")[2]: update_of(cast(Own, m)) for k, m in _built(saved, slot)}
        elif isinstance(method, Tune):
            new = {site: Value(named["value"], None) for site, named in saved.slots[slot].items()}
        else:
            raise InputError(f"{saved.name}: what {type(method).__name__} does to a weight {NEEDS_BASE}")
        if twice := new.keys() & found.keys():
            raise InputError(f"{saved.name}: two of its methods act on {sorted(twice)[0]}; what they do {NEEDS_BASE}")
        found |= new
    return found


NEEDS_BASE = "cannot be told from its file alone; give the base model as well (--model)"


def check_is_weights(saved: Saved, method: Method) -> None:
    """Raises `InputError` for a method that is no update of weights."""
    if not method.mergeable:
        raise InputError(
            f"{saved.name} has {type(method).__name__}, which is no update of weights: it acts in the forward pass. "
            'Keep it a file of its own, and let several act at once: vm.use(model, "a", "b")'
        )


@torch.no_grad()
def update_of(module: Own) -> Update:
    """A product with its scale in B."""
    A, B = module.eval().factors()
    return Update(A.detach().float().cpu(), (module.scaling * B).detach().float().cpu())


def _built(saved: Saved, slot: str) -> Iterator[tuple[str, nn.Module]]:
    """The method's own modules, on stand-ins for the sites: only their shapes are known."""
    method, tensors = saved.methods[slot], dict(saved.slots[slot])
    common = tensors.pop("shared", None)
    rows, columns = FACTORS[type(method)]
    sites = [_site(key, (len(t[rows]), *t[columns].shape[1:])) for key, t in tensors.items()]
    built = _without_kinds(saved, method, tensors, rows).build(sites)
    if built.shared is not None and common is not None:
        built.shared.to_empty(device="cpu").load_state_dict(common)
    for site, module in zip(sites, built.modules, strict=True):
        module.to_empty(device="cpu")
        method.resize(module, tensors[site.key])
        module.load_state_dict(tensors[site.key])
        yield f"{slot}/{site.key}", module


def _without_kinds(saved: Saved, method: Method, tensors: Mapping[str, Mapping[str, Tensor]], rows: str) -> Method:
    """The method with no ranks by the kind of site, which a file does not know; where alpha decides by them, the base
    does."""
    if not isinstance(method, LoRA) or not method.ranks:
        return method
    if method.alpha is not None or method.rank_stabilised or type(method) is not LoRA:
        raise InputError(f"{saved.name}: {method!r} has ranks by site, and its scale there {NEEDS_BASE}")
    return replace(method, ranks={}, rank=max(t[rows].shape[1] for t in tensors.values()))


def _site(key: str, shape: tuple[int, ...]) -> Site:
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.empty(shape, device="meta"))
    return Site("", key, key, (Place(owner, "weight", None, owner),), "weight")
