"""What the command lines of the tools have in common: files in, a file and a table out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vismodal.errors import InputError
from vismodal.tools.merge import Made
from vismodal.tools.resize import by_place
from vismodal.tools.saved import Saved, read_saved, write_saved


def read_all(paths: Sequence[Path], out: Path | None, model: str | None = None, folder: bool = False) -> list[Saved]:
    """The adapters, after a look at what is to be written; `model` as for `read_saved`.

    Raises `InputError` where that is missing or one of them.
    """
    if out is None:
        raise InputError(f"say where to write: --out {'FOLDER' if folder else 'FILE.safetensors'}")
    files = [path.expanduser() for path in paths]
    if not folder:
        check_out(out)
    for path in files:
        if path.resolve() == out.expanduser().resolve():
            raise InputError(f"--out {out} is one of the adapters, which stays as it is; write another file")
    return [read_saved(path, model) for path in files]


def check_out(out: Path | None) -> Path:
    """The file to write. Raises `InputError` where it is none of safetensors."""
    if out is None or out.suffix != ".safetensors":
        raise InputError(f"say which file to write: --out FILE.safetensors, not {out or 'nothing'}")
    return out.expanduser()


def deliver(made: Made, out: Path | None) -> Made:
    """Writes the file; prints ranks and errors by place, the notes, and the file's size."""
    path = write_saved(made.saved, check_out(out))
    print(by_place(made.report))
    for note in made.notes:
        print(f"note: {note}")
    count = sum(t.numel() for t in made.saved.tensors.values())
    print(f"{path}: {count:,} values, {path.stat().st_size:,} bytes")
    return made
