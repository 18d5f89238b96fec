"""The same adapter in another tool's format, or an error that says what that format cannot hold.

    vismodal convert sks.safetensors --to kohya --out sks-webui.safetensors
    vismodal convert civitai.safetensors --to diffusers --out pytorch_lora_weights.safetensors
    vismodal convert adapter.safetensors --to kohya --base my-model --out sks-webui.safetensors
    vismodal convert embedding.pt --to diffusers --out learned_embeds.safetensors

The same from Python: `main(Config(files=(Path("sks.safetensors"),), to="kohya", out=Path("sks-webui.safetensors")))`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from vismodal.errors import InputError
from vismodal.formats.bases import base_of
from vismodal.formats.files import FORMATS, Contents, only, read_file, write_file
from vismodal.formats.layers import some
from vismodal.formats.summary import inspect


@dataclass(frozen=True)
class Config:
    """Write an adapter or tokens in another tool's format.

    Args:
        files: an adapter of vismodal, diffusers, kohya or LyCORIS, and files of tokens to go into the same file.
        to: diffusers, for load_lora_weights; kohya, for web UIs and ComfyUI; lycoris, for its own wrapper; vismodal.
        out: the safetensors file to write.
        base: the base model: sd1, sd2, sdxl, sd3, flux, tiny-sd or a folder of diffusers; only where the file does not
            tell it, and the folder for files of vismodal for SD3 and Flux.
        only: of a file with both, the adapter or the tokens.
        token: of a file with several tokens, the one to write; of one, the name that it gets.
        force: replace a file that is there.
    """

    files: tuple[Path, ...] = ()
    to: Literal["diffusers", "kohya", "lycoris", "vismodal"] | None = None
    out: Path | None = None
    base: str | None = None
    only: Literal["adapter", "tokens"] | None = None
    token: str | None = None
    force: bool = False

    POSITIONAL: ClassVar[str] = "files"


def main(config: Config) -> Path:
    """Writes the file, says what is in it, and gives its path."""
    if not config.files:
        raise InputError("no file; write the adapter's, such as sks.safetensors")
    if config.to is None:
        raise InputError(f"the format is missing; write --to {', '.join(FORMATS)}")
    if config.out is None:
        raise InputError("the file to write is missing; write --out FILE.safetensors")
    out = config.out.expanduser()
    if out.exists() and not config.force:
        raise InputError(f"{out} is there already; write another --out, or --force to replace it")
    base = base_of(config.base) if config.base else None
    read = [read_file(path.expanduser(), base, config.token) for path in config.files]
    for note in (note for contents in read for note in contents.notes):
        print(f"note: {note}", file=sys.stderr)
    path = write_file(only(together(read), config.only), config.to, out, base)
    print(f"{path}\n{inspect(path)}")
    return path


def together(read: list[Contents]) -> Contents:
    """One adapter and the tokens of all files. Raises `InputError` for two adapters, or two tokens of one name."""
    adapters = [contents for contents in read if contents.layers]
    if len(adapters) > 1:
        raise InputError("two of the files are adapters; one adapter and files of tokens can go into one file")
    names = [token for contents in read for token in contents.tokens]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"tokens of one name in two files: {some(twice)}")
    first = (adapters or read)[0]
    return replace(first, tokens={token: rows for contents in read for token, rows in contents.tokens.items()})


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["convert", *sys.argv[1:]]))
