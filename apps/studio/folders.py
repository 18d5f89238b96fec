"""What a job's folder tells without its process: whether one is there, numbers that it left, how large it is."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

LOCK = "lock"


def take(folder: Path) -> int | None:
    """The lock of a job's folder, as a file descriptor; None while a process has it."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def alive(folder: Path) -> bool:
    """Whether the process of a job is there."""
    if not (folder / LOCK).exists():
        return False
    lock = take(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


def number(path: Path) -> int | None:
    """The number in a file; None where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, each once under whatever names; those that go away meanwhile do not count."""
    found: dict[tuple[int, int], int] = {}
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                state = os.lstat(os.path.join(where, name))
                found[state.st_dev, state.st_ino] = state.st_size
    return sum(found.values())
