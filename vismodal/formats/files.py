"""Files of adapters and tokens, of any tool: what is in one, and the same in another format.

contents = read_file("sks.safetensors")
write_file(contents, "kohya", "sks-kohya.safetensors", base_of("sdxl"))
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vismodal.adapter import Adapter
from vismodal.attach import adapt
from vismodal.checkpoint import described
from vismodal.errors import InputError
from vismodal.files import write_tensors
from vismodal.formats import comfy, kohya, mmdit, peft, tokens
from vismodal.formats.bases import Base, Kind, base_on, detect, models
from vismodal.formats.layers import COMPONENTS, Layers, some
from vismodal.formats.own import tokens_of
from vismodal.formats.own_file import dead, fill, layers_of, read_own, write_own
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
    if path.suffix in PICKLES:
        raise InputError(
            f"{path} is a pickle, which only convert reads, and of tokens alone; "
            f"write vismodal convert {path} --to diffusers --out {path.stem}.safetensors"
        )
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
        token: of a file with several, the one that is wanted; of one, its name, else its own or the file's.

    Raises `InputError` naming keys, settings and methods that are not known here.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        if not path.is_file():
            raise InputError(f"no file {path}")
        found, header = tokens.read_pickle(path)
        return _named(Contents("textual inversion", tokens=found, header=header), token)
    try:
        return _named(contents_in(*read_any(path), base, token or path.stem), token)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_any(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_tensors`, with what peft writes beside its own files in the header."""
    tensors, header = read_tensors(path)
    beside = path.with_name("adapter_config.json")
    if any(key.startswith(peft.WRAPPED) for key in tensors) and beside.is_file():
        header = {**header, peft.METADATA: beside.read_text(encoding="utf-8")}
    return tensors, header


def format_of(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """ "vismodal", "kohya", "lycoris", "comfyui", "diffusers" or "textual inversion".

    Raises `InputError` for none of them.
    """
    if "vismodal" in header:
        return "vismodal"
    if any(map(kohya.knows, tensors)):
        return "lycoris" if any(key.startswith("lycoris_") for key in tensors) else "kohya"
    if any(map(comfy.knows, tensors)):
        return "comfyui"
    if any(map(peft.knows, tensors)):
        return "diffusers"
    if tokens.is_tokens(tensors):
        return "textual inversion"
    kinds = "diffusers, kohya, LyCORIS, ComfyUI, vismodal or textual inversion"
    raise InputError(f"this is no adapter file of {kinds}; its keys are {some(tensors) or 'none'}")


def contents_in(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], base: Base | None = None, name: str = "token"
) -> Contents:
    """What the tensors and the header of a file are; the arguments and errors are those of `read_file`."""
    kind = format_of(tensors, header)
    if kind == "vismodal":
        return Contents(kind, *read_own(tensors, header, base), header=header)
    if kind in ("kohya", "lycoris"):
        layers, found = kohya.read(tensors, base.n if base else 2)
        return Contents(kind, layers, found, header, kind=cast(Kind | None, kohya.base_kind(tensors)))
    if kind == "comfyui":
        flat = comfy.as_kohya(tensors)
        told = kohya.base_kind(flat)  # of a UNet the names do not tell
        return Contents(kind, *kohya.read(flat, base.n if base else 2), header, kind=_transformer(told))
    if kind == "textual inversion":
        return Contents(kind, tokens=tokens.read(tensors, name), header=header)
    layers = peft.read(tensors, header)
    bare = peft.METADATA not in header and not any("alpha" in layer for layer in layers.values())
    notes = ("the header says no alpha: every layer is taken at strength 1, as diffusers does",) if bare else ()
    return Contents(kind, layers, header=header, notes=notes)


def _named(contents: Contents, token: str | None) -> Contents:
    """With the one token of that name, or its only one by that name. Raises `InputError` where several have others."""
    found = contents.tokens
    if not token or not found:
        return contents
    if token not in found and len(found) > 1:
        raise InputError(f"there is no token {token!r}; write --token with one of {some(found)}")
    return replace(contents, tokens={token: found.get(token, next(iter(found.values())))})


def _transformer(kind: str | None) -> Kind | None:
    return cast(Kind, kind) if kind in mmdit.KINDS else None


def contents_of(adapter: Adapter) -> Contents:
    """A live adapter, to be written by `write_file`."""
    return Contents("vismodal", layers_of(adapter), tokens_of(adapter.methods, adapter.state_dict())[0])


# -- writing ---------------------------------------------------------------------------------------------------------


def write_file(contents: Contents, to: str, out: str | Path, base: Base | None = None) -> Path:
    """Writes a file of another format, whole or not at all. The header keeps what it says of the training.

    Args:
        contents: what `read_file` gave.
        to: "diffusers", "kohya", "lycoris" or "vismodal".
        out: a `.safetensors` file.
        base: what the adapter is for; without one it is read off the contents where these tell.

    Raises `InputError` naming what the format cannot say, and where the base has to be given; warns of layers that are
    left out because nothing in the base reads them.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"only safetensors are written; write --out {out.with_suffix('.safetensors').name}")
    if not contents.layers and not contents.tokens:
        raise InputError("the file holds no layers and no tokens")
    tensors, header, notes = _written(contents, to, base)
    for note in notes:
        warnings.warn(f"{out}: {note}", stacklevel=2)
    return write_tensors(out, tensors, {**_kept(contents.header), **header})


def _kept(header: Mapping[str, str]) -> dict[str, str]:
    """What a header says of the training, whatever the format."""
    return {k: v for k, v in header.items() if k not in _OF_FORMAT and isinstance(v, str)}


Written = tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]  # tensors, header, and what is told


def _written(contents: Contents, to: str, base: Base | None) -> Written:
    if to not in FORMATS:
        raise InputError(f"no format {to!r}; write one of {', '.join(FORMATS)}")
    layers, found = contents.layers, contents.tokens
    if not layers and to in ("diffusers", "kohya"):
        return (tokens.write_diffusers if to == "diffusers" else tokens.write_webui)(found), {"format": "pt"}, ()
    if found and to not in ("kohya", "vismodal"):
        raise InputError(
            f"{to} keeps no tokens in an adapter's file, and here are {some(found)}; "
            "write --only adapter, and again --only tokens --to diffusers"
        )
    if to == "diffusers":
        return *peft.write(layers), ()
    if to == "lycoris":
        return *kohya.write_lycoris(layers), ()
    base = base or _base(contents)
    if to == "kohya":
        return *kohya.write(layers, found, base.kind, base.n), ()
    return _write_own(layers, found, base)


def _base(contents: Contents) -> Base:
    kind = detect(contents.layers, contents.header, contents.kind)
    if kind is None:
        known = "sd1, sd2, sdxl, sd3, flux"
        raise InputError(f"the file does not tell what it is for; write --base {known} or the model's folder")
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


def _write_own(layers: Layers, words: Tokens, base: Base) -> Written:
    components = [*(module.partition(".")[0] for module in layers), *(e for rows in words.values() for e in rows)]
    values = any("diff" in layer or "w_norm" in layer for layer in layers.values())
    found = models(base, [c for c in COMPONENTS if c in components], weights=values)
    tensors, header = write_own(layers, words, found)
    fill(adapt(found, list(described(header)[0].values()), "convert", seed=0), tensors)  # raises where they do not fit
    return tensors, header, _left_out(layers, found)


def _left_out(layers: Layers, models: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """A note on layers of which no file of vismodal says anything, if there are any."""
    gone = dead(layers, models)
    return (f"nothing in the model reads {some(gone)}, left out",) if gone else ()


# -- for use ---------------------------------------------------------------------------------------------------------

Own = tuple[Mapping[str, Tensor], Mapping[str, str], tuple[str, ...]]


def as_own(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], models: Mapping[str, nn.Module], name: str = "token"
) -> Own:
    """Any file's tensors and header as those of a file of vismodal, and notes on what it lets one doubt.

    Args:
        tensors, header: of `read_any`; those of vismodal come back as they are.
        models: that it is for, {"unet": ..., "text_encoder": ...}.
        name: of a token whose file holds none.

    Raises `InputError` for what the models do not have or no method here can be.
    """
    if format_of(tensors, header) == "vismodal":
        return tensors, header, ()
    contents = contents_in(tensors, header, base_on(models), name)
    made, described_by = write_own(contents.layers, contents.tokens, models)
    return made, {**_kept(header), **described_by}, (*contents.notes, *_left_out(contents.layers, models))


def as_own_on(tensors: Mapping[str, Tensor], header: Mapping[str, str], base: Base | None) -> Own:
    """The same of a file of others without the models: for a base, whose weights are needed only for differences
    (`diff`, norms); None for the one that the file tells. Raises `InputError` for tokens besides."""
    contents = contents_in(tensors, header, base)
    if not contents.layers:
        raise InputError("it holds tokens and no adapter")
    if contents.tokens:
        raise InputError(
            f"it holds the tokens {some(contents.tokens)} and an adapter; write vismodal convert --only adapter"
        )
    made, described_by, left_out = _write_own(contents.layers, {}, base or _base(contents))
    return made, {**_kept(header), **described_by}, (*contents.notes, *left_out)
