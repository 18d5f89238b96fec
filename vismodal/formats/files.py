"""Files of adapters and tokens, of any tool: what is in one, and the same in another format.

contents = read_file("sks.safetensors")
write_file(contents, "kohya", "sks-kohya.safetensors", base_of("sdxl"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vismodal.adapter import Adapter
from vismodal.attach import adapt
from vismodal.checkpoint import FORMAT, from_json, to_json
from vismodal.discover import discover
from vismodal.errors import InputError
from vismodal.families import table
from vismodal.files import write_tensors
from vismodal.fingerprint import BANK
from vismodal.formats import kohya, methods, own, peft, tokens
from vismodal.formats.bases import Base, Kind, detect, models
from vismodal.formats.layers import COMPONENTS, Layers, some
from vismodal.formats.tokens import Tokens

FORMATS = ("diffusers", "kohya", "lycoris", "vismodal")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# entries of a header that tell of one format, and are written anew
_OF_FORMAT: tuple[str, ...] = (
    "format",
    "vismodal",
    "methods",
    "base",
    peft.METADATA,
    "ss_network_module",
    "ss_network_dim",
)
_OF_FORMAT += ("ss_network_alpha", "ss_network_args", "ss_base_model_version", "modelspec.architecture")
_OF_FORMAT += ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # of the old file's tensors


@dataclass(frozen=True)
class Contents:
    """What a file holds: its format, layers and tokens, the entries of its header, and what it lets one doubt."""

    format: str
    layers: Layers = field(default_factory=dict)
    tokens: Tokens = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kind: Kind | None = None  # of the base, where the file's keys tell it


# -- reading ---------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file. Raises `InputError` where it is missing or broken."""
    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is no whole safetensors file: {error}") from None


def read_file(path: str | Path, base: Base | None = None, token: str | None = None) -> Contents:
    """What a file of diffusers, kohya, LyCORIS, vismodal or textual inversion holds.

    Args:
        path: a safetensors file; of textual inversion also `.pt`, `.bin`.
        base: the model that it is for, which a file of vismodal needs, and of SDXL's original names another `n` than 2.
        token: the name of a token whose file holds none; its own name unless given.

    Raises `InputError` naming keys, settings and methods that are not known here.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        if not path.is_file():
            raise InputError(f"no file {path}")
        found, header = tokens.read_pickle(path)
        return Contents("textual inversion", tokens=_named(found, token), header=header)
    tensors, header = read_tensors(path)
    beside = path.with_name("adapter_config.json")
    if any(key.startswith(peft.WRAPPED) for key in tensors) and beside.is_file():
        header = {**header, peft.METADATA: beside.read_text(encoding="utf-8")}
    try:
        return _read(tensors, header, base, token or path.stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read(tensors: dict[str, Tensor], header: dict[str, str], base: Base | None, name: str) -> Contents:
    if "vismodal" in header:
        return _read_own(tensors, header, base)
    if any(map(kohya.knows, tensors)):
        layers, found = kohya.read(tensors, base.n if base else 2)
        style = "lycoris" if any(key.startswith("lycoris_") for key in tensors) else "kohya"
        return Contents(style, layers, found, header, kind="sdxl" if kohya.is_xl(tensors) else None)
    if any(map(peft.knows, tensors)):
        layers = peft.read(tensors, header)
        bare = peft.METADATA not in header and not any("alpha" in layer for layer in layers.values())
        notes = ("the header says no alpha: every layer is taken at strength 1, as diffusers does",) if bare else ()
        return Contents("diffusers", layers, header=header, notes=notes)
    if tokens.is_tokens(tensors):
        return Contents("textual inversion", tokens=tokens.read(tensors, name), header=header)
    kinds = "diffusers, kohya, LyCORIS, vismodal or textual inversion"
    raise InputError(f"this is no adapter file of {kinds}; its keys are {some(tensors) or 'none'}")


def _named(found: Tokens, token: str | None) -> Tokens:
    return {token: next(iter(found.values()))} if token and len(found) == 1 else found


def _read_own(tensors: dict[str, Tensor], header: dict[str, str], base: Base | None) -> Contents:
    if header["vismodal"] != FORMAT:
        raise InputError(f"it has format {header['vismodal']}, this version reads {FORMAT}; update vismodal")
    slots = {slot: from_json(config) for slot, config in json.loads(header["methods"]).items()}
    found_tokens, tensors = own.tokens_of(slots, tensors)
    attached = [method for slot, method in slots.items() if any(key.startswith(f"{slot}/") for key in tensors)]
    if not attached:
        return Contents("vismodal", tokens=found_tokens, header=header)
    prefixes = list(json.loads(header["base"]))
    components = ["unet"] if prefixes == [""] else prefixes
    if unknown := [p for p in components if p not in COMPONENTS]:
        raise InputError(f"it adapts {some(map(repr, unknown))}; the formats of others know {', '.join(COMPONENTS)}")
    if base is None:
        raise InputError("a file of vismodal needs its base model; write --base sd1, sd2, sdxl or its folder")
    values = any(key.endswith(".value") for key in tensors)  # of Tune, of which others hold the difference
    found = models(base, components, weights=values)
    adapter = adapt({"": found["unet"]} if prefixes == [""] else found, attached, "convert", seed=0)
    fill(adapter, tensors)
    return Contents("vismodal", layers_of(adapter), found_tokens, header=header)


def fill(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Tensors of a file for the adapter's, which may have no storage. Raises `InputError` if they do not fit."""
    mine = adapter.state_dict()
    if wrong := sorted(mine.keys() ^ tensors.keys()):
        raise InputError(f"it does not fit the base model, which differs at {some(wrong)}; write another --base")
    adapter._resize(tensors)
    if wrong := [k for k, t in adapter.state_dict().items() if t.shape != tensors[k].shape]:
        raise InputError(f"it has other sizes than the base model at {some(wrong)}; write another --base")
    for key, module in adapter._all_modules().items():
        module.load_state_dict({n: tensors[f"{key}.{n}"] for n in module.state_dict()}, assign=True)


def layers_of(adapter: Adapter) -> Layers:
    """The layers of a live adapter on `{"unet": ..., "text_encoder": ...}`, or on a UNet alone.

    Raises `InputError` naming what no file of another tool can say.
    """
    if adapter.merged:
        raise InputError("a merged adapter has changed the base's values; write adapter.unmerge() first")
    alone = list(adapter.models) == [""]
    modules = {_of_unet(key): m for key, m in adapter.modules.items()} if alone else adapter.modules
    held = {
        f"{prefix or 'unet'}.{name}": p.detach()
        for prefix, model in adapter.models.items()
        for name, p in model.named_parameters()
        if not name.startswith(f"{BANK}.")
    }
    return own.layers_of(modules, held)


def _of_unet(key: str) -> str:
    slot, _, site = key.partition("/")
    return f"{slot}/unet.{site}"


def contents_of(adapter: Adapter) -> Contents:
    """A live adapter, to be written by `write_file`."""
    return Contents("vismodal", layers_of(adapter), own.tokens_of(adapter.methods, adapter.state_dict())[0])


# -- writing ---------------------------------------------------------------------------------------------------------


def write_file(contents: Contents, to: str, out: str | Path, base: Base | None = None) -> Path:
    """Writes a file of another format, whole or not at all. The header keeps what it says of the training.

    Args:
        contents: what `read_file` gave.
        to: "diffusers", "kohya", "lycoris" or "vismodal".
        out: a `.safetensors` file.
        base: what the adapter is for; without one it is read off the contents where these tell.

    Raises `InputError` naming what the format cannot say, and where the base has to be given.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"only safetensors are written; write --out {out.with_suffix('.safetensors').name}")
    if not contents.layers and not contents.tokens:
        raise InputError("the file holds no layers and no tokens")
    tensors, header = _written(contents, to, base)
    kept = {k: v for k, v in contents.header.items() if k not in _OF_FORMAT and isinstance(v, str)}
    return write_tensors(out, tensors, {**kept, **header})


def _written(contents: Contents, to: str, base: Base | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    if to not in FORMATS:
        raise InputError(f"no format {to!r}; write one of {', '.join(FORMATS)}")
    layers, found = contents.layers, contents.tokens
    if not layers and to in ("diffusers", "kohya"):
        return (tokens.write_diffusers if to == "diffusers" else tokens.write_webui)(found), {"format": "pt"}
    if found and to not in ("kohya", "vismodal"):
        raise InputError(
            f"{to} keeps no tokens in an adapter's file, and here are {some(found)}; "
            "write --only adapter, and again --only tokens --to diffusers"
        )
    if to == "diffusers":
        return peft.write(layers)
    if to == "lycoris":
        return kohya.write_lycoris(layers)
    base = base or _base(contents)
    if to == "kohya":
        return kohya.write(layers, found, base.kind, base.n)
    return _write_own(layers, found, base)


def _base(contents: Contents) -> Base:
    kind = contents.kind or detect(contents.layers, contents.header)
    if kind is None:
        raise InputError("the file does not tell what it is for; write --base sd1, sd2, sdxl or the model's folder")
    return Base(kind)


def only(contents: Contents, part: str | None) -> Contents:
    """The "adapter" or the "tokens" alone; None is both. Raises `InputError` where that leaves nothing."""
    left = {
        None: contents,
        "adapter": replace(contents, tokens={}),
        "tokens": replace(contents, layers={}),
    }[part]
    if not left.layers and not left.tokens:
        raise InputError(f"the file holds no {part}")
    return left


def _write_own(layers: Layers, words: Tokens, base: Base) -> tuple[dict[str, Tensor], dict[str, str]]:
    components = [*(module.partition(".")[0] for module in layers), *(e for rows in words.values() for e in rows)]
    values = any("diff" in layer or "w_norm" in layer for layer in layers.values())
    found = models(base, [c for c in COMPONENTS if c in components], weights=values)
    sites = [s for prefix, m in found.items() for s in discover(m, table(m), prefix)]
    chosen = [*methods.methods_for(layers, sites), *own.words_for(words, sites)]
    adapter = adapt(found, [method for method, _ in chosen], "convert", seed=0)
    tensors: dict[str, Tensor] = {}
    for slot, (_, by_site) in zip(adapter.methods, chosen, strict=True):
        tensors |= {f"{slot}/{site}.{n}": t.float() for site, named in by_site.items() for n, t in named.items()}
    fill(adapter, tensors)
    header = {
        "vismodal": FORMAT,
        "methods": json.dumps({slot: to_json(m) for slot, m in adapter.methods.items()}, separators=(",", ":")),
        "base": json.dumps({k: f._asdict() for k, f in adapter.bases.items()}, separators=(",", ":")),
    }
    return tensors, header
