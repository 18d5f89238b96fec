"""Files that are whole or absent: everything is written under a temporary name, flushed to the disk, and renamed.

A reader, or the next run after a power cut, never sees half a file; a full disk leaves the old file and no rubbish.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from safetensors.torch import save
from torch import Tensor

from vismodal.errors import InputError

TEMPORARY = ".part"  # suffix of files being written; whoever finds one may delete it


def write_file(path: Path, data: bytes | str | Callable[[Path], object]) -> Path:
    """Writes `data` to `path` (its folder is made), or lets `data(temporary_path)` write it, and renames.

    The temporary name ends with the suffix of `path`, since many writers go by it. Raises `InputError` if the system
    refuses (disk full, file too large, no permission); then nothing is left behind, and a file that was there stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.stem}-{secrets.token_hex(6)}{TEMPORARY}{path.suffix}")
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))  # less the umask, unlike tempfile's
        temporary = fresh
        if callable(data):
            data(temporary)
        else:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        _publish(temporary, path)
        return path
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {why}; free some space, or choose another folder") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    """Data to the disk, then the name, then the folder's entry: in this order a power cut leaves old or new, whole."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    """One safetensors file, whole or absent. Its bytes are made in memory: safetensors hides the system's errors."""
    plain: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().contiguous().cpu()
        memory = plain[name].untyped_storage().data_ptr()
        if memory in held:  # safetensors refuses tensors that share memory, such as one A of q, k and v
            plain[name] = plain[name].clone()
        held.add(memory)
    return write_file(path, save(plain, metadata=dict(header or {})))


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process left half-written in `folder`."""
    for path in folder.glob(f".*{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def reserve(file: IO[bytes], size: int) -> None:
    """Makes a new file so long, of zeros that have their place on the disk; raises `OSError` where there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(1 << 20)
    for at in range(0, size, len(zeros)):
        file.write(zeros[: size - at])
    file.flush()


def lock_folder(folder: Path) -> IO[bytes] | None:
    """The folder for this process alone until it ends; None while another has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("wb")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not on Windows
        pass
    except OSError:
        file.close()
        return None
    return file
