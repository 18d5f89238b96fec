"""Files as they come, alone or in a zip, before anything is believed of them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from vismodal.data.decode import Unusable

MIB = 2**20
_ENTRY = 1024  # bytes of an entry of the list, with a long name
_IGNORED = ("__macosx", "thumbs.db", "desktop.ini", ".ds_store")


@dataclass(frozen=True)
class Entry:
    """A file as it came: the path inside the zip or its own name, its size, and how to open it."""

    path: PurePosixPath
    size: int
    source: Path | tuple[zipfile.ZipFile, zipfile.ZipInfo]

    def open(self) -> IO[bytes]:
        if isinstance(self.source, Path):
            return self.source.open("rb")
        return self.source[0].open(self.source[1])


class Archives:
    """Zips that are open while their entries are read."""

    def __init__(self) -> None:
        self.open: list[zipfile.ZipFile] = []

    def __enter__(self) -> Archives:
        return self

    def __exit__(self, *_: object) -> None:
        for archive in self.open:
            archive.close()

    def entries(self, file: Path, rejected: list[str], most: int) -> Iterator[Entry]:
        """The files in a zip, or why there are none. What leads out of it, is a link, or is locked is named."""
        try:
            if directory_of(file) > most * _ENTRY:
                rejected.append(f"{file.name}: more than {most:,} files; zip fewer")
                return
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            rejected.append(f"{file.name}: no zip that can be read ({error})")
            return
        self.open.append(archive)
        if len(archive.infolist()) > 2 * most:  # with folders, and what systems add
            rejected.append(f"{file.name}: more than {most:,} files; zip fewer")
            return
        for info in archive.infolist():
            path = PurePosixPath(info.filename.replace("\\", "/"))
            if info.is_dir() or any(part.lower() in _IGNORED or part.startswith("._") for part in path.parts):
                continue
            if reason := _refused(info, path):
                rejected.append(f"{path}: {reason}")
            else:
                yield Entry(path, info.file_size, (archive, info))


def directory_of(file: Path) -> int:
    """Bytes of a zip's list of entries, as its end says: `zipfile` reads all of it before anybody can stop it."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 2**16 - 22))
        end = stream.read()
    place = end.rfind(b"PK\x05\x06")
    return int.from_bytes(end[place + 12 : place + 16], "little") if place >= 0 else 0


def _refused(info: zipfile.ZipInfo, path: PurePosixPath) -> str:
    if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0]:
        return "its name leads out of the zip"
    if (info.external_attr >> 16) & 0o170000 == 0o120000:
        return "a link, which is not followed"
    if info.flag_bits & 1:
        return "locked with a password"
    return "a zip in a zip; unpack it first" if path.suffix.lower() == ".zip" else ""


def read(entry: Entry, most: int) -> bytes:
    """All bytes of a file. Raises `Unusable` where it has more than `most`, whatever its header says, or is damaged."""
    try:
        with entry.open() as stream:
            data = stream.read(most + 1)
    except Exception as error:  # zlib, zipfile and the system each have their own
        raise Unusable(f"cannot be read ({error})") from error
    if len(data) > most:
        raise Unusable(f"more than {most / MIB:.3g} MiB; make it smaller")
    return data


def is_zip(file: Path) -> bool:
    """By its name, or by its first bytes."""
    with file.open("rb") as stream:
        return file.name.lower().endswith(".zip") or stream.read(4) == b"PK\x03\x04"
