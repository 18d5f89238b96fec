"""One safetensors file per adapter: its tensors, and in the header all that is needed to load it again.

Header (strings, as safetensors wants them): `vismodal` the format version, `methods` the configs by slot, `base` the
model's name and fingerprint, besides what the caller adds. Tensor names are "slot/site.name". No pickle is ever read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vismodal.adapter import Adapter
from vismodal.attach import Models, adapt, models_of
from vismodal.errors import InputError
from vismodal.files import write_tensors
from vismodal.fingerprint import BANK, Fingerprint
from vismodal.methods import METHODS, Method
from vismodal.site import Table

FORMAT = "1"


def save(adapter: Adapter, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write the adapter to one file: whole, or not at all (`InputError`, and an older file stays).

    Args:
        adapter: live or merged, on any device.
        path: a `.safetensors` file; its folder is made where it is missing.
        metadata: further header entries, such as classes or a prompt: strings.

    Base parameters that were unfrozen by hand are in no adapter, and so not in its file: they are warned of.
    """
    if not isinstance(adapter, Adapter):
        raise InputError(f"a {type(adapter).__name__} is no adapter; write vm.save(vm.attached(model)['NAME'], path)")
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder; name the file in it: {Path(path) / adapter.name}.safetensors")
    if wrong := [key for key, value in (metadata or {}).items() if not isinstance(value, str)]:
        raise InputError(f"metadata are strings, which {wrong[0]!r} is not; write json.dumps({wrong[0]})")
    free = [n for m in adapter.models.values() for n, p in m.named_parameters() if p.requires_grad and BANK not in n]
    if free:
        warnings.warn(
            f"{', '.join(free[:2])}{' ...' if free[2:] else ''} of the base can be trained, and no adapter's file "
            "holds that; have vm.Tune train it: vm.adapt(model, [vm.LoRA(), vm.Tune(sites=('head',))])",
            stacklevel=2,
        )
    return write_tensors(Path(path), adapter.state_dict(), header_of(adapter.methods, adapter.bases, metadata))


def header_of(
    methods: Mapping[str, Method], bases: Mapping[str, Fingerprint], metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The header of a file: methods by slot, bases by prefix, and what the caller adds."""
    return {
        **(metadata or {}),
        "vismodal": FORMAT,
        "methods": json.dumps({slot: to_json(m) for slot, m in methods.items()}, separators=(",", ":")),
        "base": json.dumps({k: f._asdict() for k, f in bases.items()}, separators=(",", ":")),
    }


def load(
    model: Models, path: str | Path, name: str | None = None, *, trainable: bool = False, sites: Table | None = None
) -> Adapter:
    """Attach the adapter of a file to its base model; frozen unless `trainable`. It acts at once, as with `adapt`.

    Args:
        model: the base, or several by the prefixes that the file names.
        path: a file written by `save`.
        name: the adapter's name here; the file's stem unless given.
        sites: as for `adapt`.

    Raises `InputError` where the file is none of ours, or the model's parameters have other names or shapes than those
    it was made on. Other values (another checkpoint of the same architecture) only warn, and so does another head where
    the file has none.
    """
    models = models_of(model)
    return restore(models, *read(path), path, name, trainable=trainable, sites=sites)


def restore(
    model: Models,
    header: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    path: str | Path,
    name: str | None = None,
    *,
    trainable: bool = False,
    sites: Table | None = None,
) -> Adapter:
    """As `load`, of a file that was read before; `path` is what messages call it."""
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    methods, bases = described(header)
    if bases.keys() != models.keys():
        raise InputError(f"{path} adapts {_names(bases)}; given {_names(models)}")
    name = name or Path(path).stem.replace(".", "_")
    try:
        adapter = adapt(model, list(methods.values()), name, sites=sites, seed=0)
    except InputError as error:
        raise InputError(f"{path} does not fit: {error}") from None
    try:
        for prefix, base in bases.items():
            _compare(base, adapter.bases[prefix], path, "head" in adapter.kinds.values())
        adapter.load_state_dict(tensors)
    except InputError as error:
        adapter.detach()
        raise InputError(f"{path} does not fit: {error}") from None
    except BaseException:
        adapter.detach()
        raise
    adapter.trainable = trainable
    return adapter


def described(header: Mapping[str, str]) -> tuple[dict[str, Method], dict[str, Fingerprint]]:
    """What a header says: the methods by slot, and the bases by prefix. Raises `InputError` where it says neither."""
    try:
        methods = {slot: from_json(config) for slot, config in json.loads(header["methods"]).items()}
        return methods, {prefix: Fingerprint(**base) for prefix, base in json.loads(header["base"]).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the header of a file of vismodal is broken: {error!r}") from error


def _compare(made_on: Fingerprint, given: Fingerprint, path: str | Path, has_head: bool) -> None:
    if made_on.shapes != given.shapes:
        raise InputError(f"it was made on {made_on.name}, and {given.name} has other parameter names or shapes")
    if not made_on.same_values(given):
        message = f"{path} was made on another checkpoint of {made_on.name}: same shapes, other values"
        warnings.warn(message, stacklevel=4)
    elif not has_head and not made_on.same_head(given):
        message = (
            f"{path} holds no head, and this {given.name} has another one than it was trained with: load that one into "
            "the base, or have the adapter train its own: [vm.LoRA(), vm.Tune(sites=('head',))]"
        )
        warnings.warn(message, stacklevel=4)


def read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of an adapter file. Raises `InputError` where it is missing, broken or none of ours."""
    if not Path(path).is_file():
        folder = "; that is a folder, name the file in it" if Path(path).is_dir() else ""
        raise InputError(f"no adapter file {path}{folder}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise InputError(f"{path} is no whole safetensors file: {error}") from None
    check(header, path)
    return header, tensors


def check(header: Mapping[str, str], path: str | Path) -> None:
    """Raises `InputError` for the header of a file that is none of ours, or of another version."""
    if "vismodal" not in header:
        raise InputError(f"{path} was not written by vismodal.save: its header has {_names(header)}")
    if header["vismodal"] != FORMAT:
        raise InputError(f"{path} has format {header['vismodal']}, this version reads {FORMAT}; update vismodal")


def _names(mapping: Mapping[str, Any]) -> str:
    return ", ".join(repr(k) for k in mapping) if any(mapping) else "one model" if mapping else "nothing"


# -- methods as JSON ----------------------------------------------------------------------------------------------


def to_json(method: Method) -> dict[str, Any]:
    """The class name and the fields that differ from its defaults; slices as {"slice": [start, stop, step]}."""
    options = method.options()
    for name, value in options.items():
        if isinstance(value, slice):
            options[name] = {"slice": [value.start, value.stop, value.step]}
    return {"method": type(method).__name__, **options}


def from_json(config: Mapping[str, Any]) -> Method:
    """The method that `to_json` described. Raises `InputError` for a name or field that this version does not know."""
    config = dict(config)
    name = config.pop("method")
    known = {m.__name__: m for m in METHODS}
    if name not in known:
        raise InputError(f"unknown method {name!r}; this version has {', '.join(known)}")
    for key, value in config.items():
        if isinstance(value, dict) and value.keys() == {"slice"}:
            config[key] = slice(*value["slice"])
        elif isinstance(value, list):
            config[key] = tuple(value)
    try:
        return known[name](**config)
    except TypeError as error:
        raise InputError(f"{name}: {error}") from None
