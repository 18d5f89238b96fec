"""Adapter files on a pipeline, at the strengths that are asked for: rows of one batch may differ in both.

Files of diffusers, kohya and LyCORIS are read as ours are, once the pipeline is there whose modules they name.

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

import vismodal as vm
from vismodal.checkpoint import check, described, read, restore
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.words import BASE, marked, teach, words_of
from vismodal.errors import InputError
from vismodal.formats import peft
from vismodal.formats.files import as_own, format_of, read_any
from vismodal.resume import adapter_of

FILE = "adapter.safetensors"  # what a run's folder calls it
FILES = (FILE, peft.FILE, "adapter_model.safetensors")  # and what those of diffusers and peft do
NONE = "none"  # the name in a tag that asks for no adapter
_NAMED = re.compile(r"([\w. -]+)=(.+)")


class Use(NamedTuple):
    """An adapter by name, and how strongly it acts: 0 is the base, 1 the adapter."""

    name: str
    strength: float = 1.0


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read, in any format: what prompts call it, its file, and the first digits of the file's SHA-256."""

    name: str
    path: Path
    digest: str
    header: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)


def read_adapters(given: Sequence[str]) -> dict[str, AdapterFile]:
    """Adapters by name. Each is FILE, a run's FOLDER, a training checkpoint of a run, or NAME=one of these.

    Without a name it is the file's stem, or its folder's name where the file is called as all of its kind (`FILES`).
    Raises `InputError` for what is no adapter, and for two of one name.
    """
    found: dict[str, AdapterFile] = {}
    for text in given:
        named = None if Path(text).expanduser().exists() else _NAMED.fullmatch(text)
        one = _read(Path(named[2] if named else text).expanduser(), named[1] if named else None)
        if one.name == NONE:
            raise InputError(f"an adapter called {NONE} cannot be asked for in tags; write NAME={one.path}")
        if one.name in found:
            raise InputError(
                f"two adapters are called {one.name!r}: {found[one.name].path} and {one.path}; "
                f"give them names, as in --adapters first={found[one.name].path} second={one.path}"
            )
        found[one.name] = one
    return found


def _read(path: Path, name: str | None) -> AdapterFile:
    if path.is_dir():
        there = [path / file for file in FILES if (path / file).is_file()]
        if not there:
            raise InputError(f"the folder {path} has no {FILE}; give the folder of a finished run, or a file")
        path = there[0]
    if name is None:
        name = path.resolve().parent.name if path.name in FILES else path.stem
    if path.is_file() and (state := adapter_of(path)) is not None:  # a training checkpoint: its run says what it is
        run = path.parent.parent / FILE
        if not run.is_file():
            raise InputError(
                f"{path} is a checkpoint, and what it adapts stands in {run}, which a run writes at its end; let it "
                f"come there, or ask for samples as it goes by a file {path.parent.parent / 'sample-now'}"
            )
        header, _ = read(run)
        return AdapterFile(name, path, digest_of(path), header, state)
    tensors, header = read_any(path)
    if "vismodal" in header:
        check(header, path)
    try:
        format_of(tensors, header)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
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
        given: by the same names, the condition of each that needs one, as one row: the same for all that is drawn.
    """

    def __init__(
        self, pipe: Pipe, files: Mapping[str, AdapterFile], given: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        kind = kind_of(pipe)
        self.pipe, self.files, self.given, self.denoiser = pipe, files, given, kind.denoiser
        self.models: dict[str, nn.Module] = {kind.denoiser: kind.model(pipe), **kind.readers(pipe)}
        self.there: dict[Use, str] = {}
        self.own: dict[str, AdapterFile] = {}  # as vismodal would have written them for these models
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

    def give(self, rows: int) -> None:
        """To each adapter that needs one its condition, for a batch of so many rows."""
        for use, name in self.there.items():
            if use.name in self.given:
                adapter = vm.attached(self.models)[name]
                adapter.condition = self.given[use.name].expand(rows, *self.given[use.name].shape[1:])

    def spell(self, prompt: str, uses: Sequence[Use]) -> str:
        """The prompt for a row of these adapters: a new word in it is marked as theirs, another's as the base's.

        Raises `InputError` for a word that two of them have.
        """
        row = self.row(uses)
        words = [word.lower() for name in row for word in self.words[name]]
        if twice := [word for word in words if words.count(word) > 1]:
            named = " and ".join(use.name for use in uses)
            raise InputError(f"{named} both have the new word {twice[0]!r}; use one of them in a prompt")
        for name in row:
            prompt = marked(prompt, self.words[name], name)
        others = {word for each in self.words.values() for word in each if word.lower() not in words}
        return marked(prompt, sorted(others), BASE)

    def _attached(self, use: Use) -> str:
        if use not in self.there:
            if use.name not in self.files:
                there = ", ".join(self.files) or "none"
                raise InputError(f"there is no adapter {use.name!r}; --adapters has {there}")
            self.there[use] = self._attach(self._own(use.name), use.strength)
        return self.there[use]

    def _own(self, name: str) -> AdapterFile:
        if name not in self.own:
            file = self.files[name]
            try:
                tensors, header, notes = as_own(file.tensors, file.header, self.models, file.name)
            except InputError as error:
                raise InputError(f"{file.path}: {error}") from None
            for note in notes:
                print(f"note: {file.path}: {note}", file=sys.stderr)
            self.own[name] = replace(file, tensors=tensors, header=header)
        return self.own[name]

    def _attach(self, file: AdapterFile, strength: float) -> str:
        methods, bases = described(file.header)
        if file.name not in self.given and any(method.conditioned for method in methods.values()):
            raise InputError(f"{file.path} is steered beside the prompt; write vismodal generate --conditions PICTURE")
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
