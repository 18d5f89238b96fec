"""Rows of tensors by key: in memory up to a limit, then in mapped files up to a cap; what fits in neither is not kept.

A row has one tensor for each `Spec`. Rows are never changed, and come back bit for bit, in the order of strides that
they had. Temporary files have no name, so that they end with the process, however it ends. In a folder that is named,
rows are files from the first one on, with an index that is written when a file is full and at the end.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.files import lock_folder, reserve, write_file

FORMAT = 1
CHUNK = 64 << 20  # bytes of rows that are made room for at once
SPARE = 1 << 30  # bytes of a disk that are never filled
ALIGN = 64
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Spec(NamedTuple):
    """One tensor of a row. `order` are its axes from the largest stride to the smallest."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    @classmethod
    def of(cls, batch: Tensor) -> Spec:
        """Of the rows of a batch."""
        strides: tuple[int, ...] = batch.stride()
        axes = sorted(range(1, batch.dim()), key=lambda axis: (-strides[axis], axis))
        return cls(tuple(batch.shape[1:]), batch.dtype, tuple(axis - 1 for axis in axes))

    @property
    def bytes(self) -> int:
        size = math.prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGN) * ALIGN

    def laid(self, batch: Tensor) -> Tensor:
        """A batch with its axes as they lie in memory."""
        return batch.permute(0, *(axis + 1 for axis in self.order))

    def empty(self, rows: int, device: torch.device) -> Tensor:
        """Room for a batch."""
        return self.back(
            torch.empty((rows, *(self.shape[axis] for axis in self.order)), dtype=self.dtype, device=device)
        )

    def back(self, batch: Tensor) -> Tensor:
        """What `laid` was given."""
        where = sorted(range(len(self.order)), key=self.order.__getitem__)
        return batch.permute(0, *(axis + 1 for axis in where))


def size_of(given: str | int) -> int:
    """Bytes: 5000, "500MB", "4GiB"."""
    if isinstance(given, int) and given >= 0:
        return given
    found = re.fullmatch(r"([\d.]+)\s*([a-z]*)", str(given).strip(), re.IGNORECASE)
    if found is None or found[1].count(".") > 1 or found[2].upper() not in UNITS:
        raise InputError(f"{given!r} is no size; write a number of bytes, or one such as '500MB' or '4GiB'")
    return int(float(found[1]) * UNITS[found[2].upper()])


@dataclass
class Budget:
    """Bytes that several stores share."""

    left: int

    def take(self, most: int, least: int) -> int:
        """As much as is left of `most`; 0 where that is less than `least`."""
        taken = min(most, self.left)
        taken = taken if taken >= least else 0
        self.left -= taken
        return taken


@dataclass
class Chunk:
    """Room for some rows; of each tensor all rows lie together."""

    tensors: list[Tensor]
    rows: int
    bytes: int
    mapped: np.memmap | None = None
    used: int = 0


class Rows:
    """The store.

    Args:
        specs: of the tensors of a row.
        device: where those lie that are kept in memory.
        memory: bytes for them.
        disk: bytes for mapped files.
        folder: where these are, to be found again; none for files without a name.
        about: what must be the same for rows of the folder to be these.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        device: torch.device,
        memory: Budget,
        disk: Budget,
        folder: Path | None = None,
        about: str = "",
    ):
        self.specs, self.device, self.memory, self.disk, self.about = list(specs), device, memory, disk, about
        self.row = sum(spec.bytes for spec in specs)
        self.chunks: list[Chunk] = []
        self.where: dict[Hashable, tuple[int, int]] = {}
        self.lock = lock_folder(folder) if folder is not None else None
        self.folder = folder if self.lock is not None else None
        self.found = self._open() if self.folder is not None else 0  # rows of an earlier run

    def __len__(self) -> int:
        return len(self.where)

    def kept(self, on_disk: bool) -> int:
        """Bytes of the rows that are kept there."""
        return sum(chunk.used * self.row for chunk in self.chunks if (chunk.mapped is not None) == on_disk)

    # -- rows --

    def add(self, keys: Sequence[Hashable], batches: Sequence[Tensor]) -> None:
        """Keeps the rows of these batches, one for each spec, as far as there is room."""
        at = 0
        while at < len(keys) and (chunk := self._room()) is not None:
            n = min(chunk.rows - chunk.used, len(keys) - at)
            for spec, held, batch in zip(self.specs, chunk.tensors, batches, strict=True):
                held[chunk.used : chunk.used + n].copy_(spec.laid(batch)[at : at + n])
            for i in range(n):
                self.where[keys[at + i]] = len(self.chunks) - 1, chunk.used + i
            chunk.used += n
            at += n

    def get(self, keys: Sequence[Hashable]) -> list[Tensor]:
        """A batch for each spec, on the device; new tensors."""
        places = [self.where[key] for key in keys]
        mixed = self.device.type != "cpu" and any(self.chunks[c].mapped is not None for c, _ in places)
        found = []
        for i, spec in enumerate(self.specs):
            rows = [self.chunks[c].tensors[i][r] for c, r in places]
            rows = [row.to(self.device) for row in rows] if mixed else rows
            found.append(spec.back(torch.stack(rows)))
        return found

    def clear(self) -> None:
        """Forgets all rows, and gives their room back."""
        for chunk in self.chunks:
            (self.memory if chunk.mapped is None else self.disk).left += chunk.bytes
        self.chunks, self.where, self.found = [], {}, 0
        if self.folder is not None:
            for path in (*self.folder.glob("*.rows"), self.folder / "index.json"):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Writes the index of a named folder, and lets others have it."""
        if self.folder is not None:
            with suppress(InputError):  # a full disk: the rows are computed again
                self._write_index()
        if self.lock is not None:
            self.lock.close()
        self.folder = self.lock = None
        self.chunks, self.where = [], {}

    # -- room --

    def _room(self) -> Chunk | None:
        """The chunk that has room, which may be a new one."""
        if self.chunks and self.chunks[-1].used < self.chunks[-1].rows:
            return self.chunks[-1]
        most = max(CHUNK // self.row, 1) * self.row
        chunk = None
        if self.folder is None and (size := self.memory.take(most, self.row)):
            chunk = self._in_memory(size)
            self.memory.left += size - (chunk.bytes if chunk else 0)
        if chunk is None and (size := self.disk.take(most, self.row)):
            chunk = self._on_disk(size)
            self.disk.left += size - (chunk.bytes if chunk else 0)
        if chunk is not None:
            self.chunks.append(chunk)
            if self.folder is not None and len(self.chunks) > 1:
                with suppress(InputError):
                    self._write_index()
        return chunk

    def _in_memory(self, size: int) -> Chunk | None:
        try:
            with torch.inference_mode(False):
                whole = torch.empty(size // self.row * self.row, dtype=torch.uint8, device=self.device)
        except (MemoryError, RuntimeError):  # torch.OutOfMemoryError is one of them
            return None
        return self._cut(whole)

    def _on_disk(self, size: int) -> Chunk | None:
        """Files are filled with zeros first: a disk that gets full under a mapping would end the process."""
        size = size // self.row * self.row
        try:
            if shutil.disk_usage(self.folder or tempfile.gettempdir()).free < size + SPARE:
                return None
            path = self.folder / f"{len(self.chunks):05d}.rows" if self.folder is not None else None
            with tempfile.TemporaryFile() if path is None else path.open("w+b") as file:
                reserve(file, size)
                return self._map(file, size)
        except OSError:
            return None

    def _map(self, file: IO[bytes], size: int) -> Chunk:
        mapped = np.memmap(file, np.uint8, "r+", shape=(size,))
        with torch.inference_mode(False):
            chunk = self._cut(torch.from_numpy(mapped))
        chunk.mapped = mapped
        return chunk

    def _cut(self, whole: Tensor) -> Chunk:
        """Rows of every tensor, of which the last ones are followed by what alignment asks for."""
        rows, at, tensors = len(whole) // self.row, 0, []
        for spec in self.specs:
            part = whole[at : at + rows * spec.bytes].view(rows, spec.bytes)
            size = math.prod(spec.shape) * spec.dtype.itemsize
            shape = [spec.shape[axis] for axis in spec.order]
            tensors.append(
                part[:, :size].view(spec.dtype).unflatten(1, shape) if shape else part[:, :size].view(spec.dtype)[:, 0]
            )
            at += rows * spec.bytes
        return Chunk(tensors, rows, len(whole))

    # -- a named folder --

    def _header(self) -> dict[str, Any]:
        specs = [[list(s.shape), str(s.dtype), list(s.order)] for s in self.specs]
        return {"format": FORMAT, "about": self.about, "specs": specs}

    def _write_index(self) -> None:
        assert self.folder is not None
        for chunk in self.chunks:
            if chunk.mapped is not None:
                chunk.mapped.flush()
        chunks: list[list[Hashable]] = [[] for _ in self.chunks]
        for key, (c, _) in self.where.items():  # in the order in which they were added
            chunks[c].append(key)
        sizes = [chunk.bytes for chunk in self.chunks]
        write_file(self.folder / "index.json", json.dumps({**self._header(), "bytes": sizes, "keys": chunks}))

    def _open(self) -> int:
        """Finds the rows of an earlier run; files that are cut short, and those behind them, are left out."""
        assert self.folder is not None
        path = self.folder / "index.json"
        try:
            index = json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError):
            index = {}
        if {k: index.get(k) for k in self._header()} != self._header():
            return 0
        for c, (size, keys) in enumerate(zip(index["bytes"], index["keys"], strict=True)):
            file = self.folder / f"{c:05d}.rows"
            if not file.exists() or file.stat().st_size != size or self.disk.take(size, size) != size:
                break
            with file.open("r+b") as opened:
                self.chunks.append(self._map(opened, size))
            for r, key in enumerate(keys):
                self.where[_key_of(key)] = c, r
            self.chunks[-1].used = len(keys)
        return len(self.where)


def _key_of(read: Any) -> Hashable:
    """JSON has lists for tuples."""
    return tuple(map(_key_of, read)) if isinstance(read, list) else read
