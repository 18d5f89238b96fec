"""Adapter files on a pipeline, at the strengths that are asked for: rows of one batch may differ in both.

shelf = Shelf(pipe, read_adapters(["dog=runs/dreambooth-1", "style.safetensors"]))
with vm.route(shelf.models, [shelf.row([Use("dog", 0.8)]), None]):
    pipe(["a photo of sks dog", "a photo of a dog"])
"""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

import vismodal as vm
from vismodal.checkpoint import described, read, restore
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.words import marked, teach, words_of
from vismodal.errors import InputError
from vismodal.resume import adapter_of

FILE = "adapter.safetensors"  # what a run's folder calls it
_NAMED = re.compile(r"([\w. -]+)=(.+)")


class Use(NamedTuple):
    """An adapter by name, and how strongly it acts: 0 is the base, 1 the adapter."""

    name: str
    strength: float = 1.0


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read: what prompts call it, its file, and the first digits of the file's SHA-256."""

    name: str
    path: Path
    digest: str
    header: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)


def read_adapters(given: Sequence[str]) -> dict[str, AdapterFile]:
    """Adapters by name. Each is FILE, a run's FOLDER, a training checkpoint of a run, or NAME=one of these.

    Without a name it is the file's stem, or its folder's name where the file is called adapter.safetensors. Raises
    `InputError` for what is no adapter, and for two of one name.
    """
    found: dict[str, AdapterFile] = {}
    for text in given:
        named = None if Path(text).expanduser().exists() else _NAMED.fullmatch(text)
        one = _read(Path(named[2] if named else text).expanduser(), named[1] if named else None)
        if one.name in found:
            raise InputError(
                f"two adapters are called {one.name!r}: {found[one.name].path} and {one.path}; "
                f"give them names, as in --adapters first={found[one.name].path} second={one.path}"
            )
        found[one.name] = one
    return found


def _read(path: Path, name: str | None) -> AdapterFile:
    if path.is_dir():
        if not (path / FILE).is_file():
            raise InputError(f"the folder {path} has no {FILE}; give the folder of a finished run, or a file")
        path = path / FILE
    if name is None:
        name = path.resolve().parent.name if path.name == FILE else path.stem
    if path.is_file() and (state := adapter_of(path)) is not None:  # a training checkpoint: its run says what it is
        header, _ = read(path.parent.parent / FILE)
        tensors: Mapping[str, Tensor] = state
    else:
        header, tensors = read(path)
    return AdapterFile(name, path, digest_of(path), header, tensors)


def digest_of(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Shelf:
    """Adapters of a pipeline, attached once for each strength at which they are used. None of them acts by itself.

    Args:
        pipe: whose denoiser and text encoders they are for.
        files: by the names that uses have.
    """

    def __init__(self, pipe: Pipe, files: Mapping[str, AdapterFile]) -> None:
        kind = kind_of(pipe)
        self.pipe, self.files, self.denoiser = pipe, files, kind.denoiser
        self.models: dict[str, nn.Module] = {kind.denoiser: kind.model(pipe), **kind.readers(pipe)}
        self.there: dict[Use, str] = {}
        self.words: dict[str, tuple[str, ...]] = {}  # the new words of each that is attached

    def row(self, uses: Sequence[Use]) -> tuple[str, ...]:
        """The names for `vm.route`, in the order given; what has strength 0 is left out.

        Raises `InputError` for a name that is not there or twice, an adapter that was made on another model, and a
        strength between 0 and 1 of a method that has none.
        """
        for use in uses:
            if [u.name for u in uses].count(use.name) > 1:
                raise InputError(f"the adapter {use.name!r} is named twice in one prompt")
        return tuple(self._attached(use) for use in uses if use.strength)

    def spell(self, prompt: str, uses: Sequence[Use]) -> str:
        """The prompt for a row of these adapters: their new words in it are marked as theirs.

        Raises `InputError` for a word that two of them have.
        """
        row = self.row(uses)
        words = [word.lower() for name in row for word in self.words[name]]
        if twice := [word for word in words if words.count(word) > 1]:
            named = " and ".join(use.name for use in uses)
            raise InputError(f"{named} both have the new word {twice[0]!r}; use one of them in a prompt")
        for name in row:
            prompt = marked(prompt, self.words[name], name)
        return prompt

    def _attached(self, use: Use) -> str:
        if use not in self.there:
            if use.name not in self.files:
                there = ", ".join(self.files) or "none"
                raise InputError(f"there is no adapter {use.name!r}; --adapters has {there}")
            self.there[use] = self._attach(self.files[use.name], use.strength)
        return self.there[use]

    def _attach(self, file: AdapterFile, strength: float) -> str:
        _, bases = described(file.header)
        parts = {prefix: self._part(file, prefix) for prefix in bases}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            adapter = restore(parts, file.header, file.tensors, file.path, f"shelf-{len(self.there)}")
        for warning in caught:  # the base has other values than the one that the adapter was made on
            print(f"warning: {warning.message}", file=sys.stderr)
        try:
            adapter.scale = strength
        except InputError as error:
            adapter.detach()
            raise InputError(f"{file.path}: {error}") from None
        teach(self.pipe, adapter)
        self.words[adapter.name] = words_of(adapter)
        vm.use(self.models)
        return adapter.name

    def _part(self, file: AdapterFile, prefix: str) -> nn.Module:
        name = prefix or self.denoiser  # a file of one model has no prefixes
        if name not in self.models:
            raise InputError(f"{file.path} adapts {name!r}; this pipeline has {', '.join(self.models)}")
        return self.models[name]
