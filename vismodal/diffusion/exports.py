"""A trained adapter in the files of other tools, as far as they have words for it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import vismodal as vm
from vismodal.diffusion.kinds import XL, Kind, Pipe, kind_of
from vismodal.diffusion.load import tokenizer_of
from vismodal.errors import InputError
from vismodal.files import write_tensors
from vismodal.formats import own, peft, tokens
from vismodal.formats.bases import Base
from vismodal.formats.files import Contents, contents_of, only, write_file

WEBUI = "webui.safetensors"
TOKENS = "embeddings"  # the folder with a file for each new word


@dataclass(frozen=True)
class Exports:
    """What was written for others.

    Args:
        files: the files that were written.
        loading: lines of Python by which diffusers alone loads all of the adapter into `pipe`; none where it cannot.
        notes: what people are told of it.
    """

    files: tuple[Path, ...]
    loading: tuple[str, ...]
    notes: tuple[str, ...]


def export(pipe: Pipe, adapter: vm.Adapter, output: Path, told: Mapping[str, str] | None = None) -> Exports:
    """Files of diffusers, or where it has no words for the method of web UIs, and of new words one each. `told` is what
    the header of an adapter's file says of the training."""
    found, rest = own.tokens_of(adapter.methods, adapter.state_dict())
    path, note = _lora(pipe, adapter, output, told or {}) if rest else (None, "")
    files = [path] if path is not None else []
    lines = [f'pipe.load_lora_weights(".", weight_name="{peft.FILE}")'] if rest else []
    for word, rows in found.items():
        files.append(write_tensors(_path(output, word, files), tokens.write_diffusers({word: rows}), {"format": "pt"}))
        lines += _loading(pipe, word, f"{TOKENS}/{files[-1].name}", list(rows))
    reads = not found or hasattr(pipe, "load_textual_inversion")
    whole = reads and (not rest or (path is not None and path.name == peft.FILE))
    loader = "pipe.load_textual_inversion" if reads else f"web UIs (a {type(pipe).__name__} reads no tokens)"
    notes = (note, f"and for {loader} {output / TOKENS}" if found else "")
    return Exports(tuple(files), tuple(dict.fromkeys(lines)) if whole else (), tuple(filter(None, notes)))


def _path(output: Path, word: str, taken: Sequence[Path]) -> Path:
    """A file of its own for a word, by its letters."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "", word) or "token"
    names = (output / TOKENS / f"{stem}{f'-{i}' if i > 1 else ''}.safetensors" for i in itertools.count(1))
    return next(path for path in names if path not in taken)


def _lora(pipe: Pipe, adapter: vm.Adapter, output: Path, told: Mapping[str, str]) -> tuple[Path | None, str]:
    """The file of diffusers or of web UIs, if any, of all but new words, and what is told of it."""
    kind = kind_of(pipe)
    if not kind.lora_files:
        return None, f"a {type(pipe).__name__} has no load_lora_weights"
    try:
        path = write_lora(adapter, output / peft.FILE, told)
        return path, f"and for pipe.load_lora_weights {path}"
    except InputError as error:
        if kind.denoiser != "unet":
            return None, f"other tools have no file for it: {error}"
    try:
        path = write_file(_contents(adapter, told), "kohya", output / WEBUI, _base(pipe, kind))
        return path, f"and for web UIs {path} (pipe.load_lora_weights cannot read it)"
    except InputError as error:
        return None, f"other tools have no file for it: {error}"


def write_lora(adapter: vm.Adapter, path: Path, told: Mapping[str, str] | None = None) -> Path:
    """What `load_lora_weights` reads. Raises `InputError` naming what it cannot hold."""
    return write_file(only(_contents(adapter, told or {}), "adapter"), "diffusers", path)


def _contents(adapter: vm.Adapter, told: Mapping[str, str]) -> Contents:
    return replace(contents_of(adapter), header=told)


def _base(pipe: Pipe, kind: Kind) -> Base:
    config = pipe.unet.config
    if isinstance(kind, XL):
        return Base("sdxl", config.layers_per_block)
    return Base("sd2" if config.cross_attention_dim == 1024 else "sd1", config.layers_per_block)


def _loading(pipe: Pipe, word: str, file: str, encoders: Sequence[str]) -> list[str]:
    """How diffusers loads a word; one that its tokenizer has already needs another name there."""
    there = word in getattr(pipe, tokenizer_of(encoders[0])).get_vocab()
    name = f"<{word}>" if there else word
    told = f"  # write {name} in prompts" if there else ""
    if len(encoders) == 1:
        return [f'pipe.load_textual_inversion("{file}"{f", token={name!r}" if there else ""}){told}']
    lines = [f'rows = safetensors.torch.load_file("{file}")']
    for encoder, key in zip(encoders, ("clip_l", "clip_g"), strict=True):
        parts = f"text_encoder=pipe.{encoder}, tokenizer=pipe.{tokenizer_of(encoder)}"
        lines.append(f'pipe.load_textual_inversion(rows["{key}"], token={name!r}, {parts}){told}')
    return ["import safetensors.torch", *lines]
