"""What people upload: pictures with captions, alone or in a zip, and files of adapters. Nothing of it is trusted.

Every picture is decoded and written anew as a png under a name of the server's: what else was in its file (a script
behind the last pixel, where a photo was taken) is left behind. No name from outside becomes a path. Each file that is
not taken is named with its reason.
"""

from __future__ import annotations

import io
import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image
from safetensors import SafetensorError, safe_open

from vismodal.data.captions import METADATA, metadata_captions, text_caption
from vismodal.data.decode import Unusable, decode
from vismodal.data.folder import BESIDE, PARTS
from vismodal.data.photos import SUFFIXES
from vismodal.errors import InputError, one_line
from vismodal.files import write_file

from .archives import MIB, Archives, Entry, is_zip, read
from .folders import size_of

CALLED = ".names.json"  # what the pictures of a set were called, by the names that they have now
_CAPTION = 2**16
GROWTH = 4  # times the bytes of an upload that its pictures may have as png


@dataclass(frozen=True)
class Limits:
    """The most that is taken.

    Args:
        file: bytes of a picture.
        upload: bytes of all that comes at once, unpacked.
        count: files that come at once.
        pixels: of a picture, by its header.
        side: pixels of the shorter side that are kept; larger pictures are shrunk.
        run: bytes of the folder of a job.
        total: bytes of the studio's folder.
    """

    file: int = 40 * MIB
    upload: int = 500 * MIB
    count: int = 2000
    pixels: int = 2**26
    side: int = 2048
    run: int = 8 * 2**30
    total: int = 50 * 2**30


@dataclass(frozen=True)
class Upload:
    """What was taken: the set's name, its pictures in order with what they were called, and the rest with reasons."""

    id: str
    pictures: Mapping[str, str]
    rejected: tuple[str, ...]


class Intake:
    """Sets of pictures and adapter files in the studio's folder, by names that the server chose."""

    def __init__(self, home: Path, limits: Limits) -> None:
        self.home, self.limits = home, limits
        self.sets, self.files = home / "sets", home / "files"
        for folder in (self.sets, self.files):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    # -- pictures ----------------------------------------------------------------------------------------------------

    def pictures(self, files: Sequence[Path], classes: bool = False) -> Upload:
        """Takes pictures with their captions; with `classes`, from a zip with a folder for each class.

        Raises `InputError` where nothing is usable, or a cap is reached; then nothing stays.
        """
        self.check_space()
        rejected: list[str] = []
        name = secrets.token_hex(8)
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=self.sets) as temporary:
            folder = Path(temporary) / name
            folder.mkdir(mode=0o700)
            with Archives() as archives:
                entries = list(self._entries(files, archives, rejected))
                taken = self._take(entries, folder, classes, rejected)
                captions = self._captions(entries, taken, Path(temporary), rejected) if not classes else {}
            if not taken:
                shown = "; ".join(rejected[:5]) + (f"; and {len(rejected) - 5} more" if len(rejected) > 5 else "")
                raise InputError(
                    f"no usable picture: {shown or 'nothing came'}. Give jpg, png or webp, or a zip of them"
                )
            if classes and len({PurePosixPath(new).parent for new in taken}) < 2:
                raise InputError("pictures of one class only; zip a folder for each class, with its pictures in it")
            for new, text in captions.items():
                write_file((folder / new).with_suffix(".txt"), text)
            write_file(folder / CALLED, json.dumps({new: str(old.path) for new, old in taken.items()}))
            folder.rename(self.sets / name)
        called = {new: str(old.path) for new, old in taken.items()}
        return Upload(name, called, tuple(one_line(text) for text in rejected))

    def folder(self, name: str) -> Path:
        """The folder of a set. Raises `InputError` for a name that the server did not give."""
        if not (len(name) == 16 and all(c in "0123456789abcdef" for c in name) and (self.sets / name).is_dir()):
            raise InputError("these pictures are not here any more; upload them again")
        return self.sets / name

    def captions(self, name: str) -> list[tuple[str, str, str]]:
        """Name, what it was called, and caption of each picture of a set."""
        folder = self.folder(name)
        called = json.loads((folder / CALLED).read_text())
        texts = {new: (folder / new).with_suffix(".txt") for new in called}
        return [
            (new, old, text_caption(texts[new]) or "" if texts[new].exists() else "") for new, old in called.items()
        ]

    def caption(self, name: str, picture: str, text: str) -> None:
        """Writes the caption of a picture; an empty one removes it."""
        folder = self.folder(name)
        if picture not in json.loads((folder / CALLED).read_text()):
            raise InputError(f"there is no picture {picture!r} in this set")
        if len(text.encode()) > _CAPTION:
            raise InputError("the caption is too long; a text encoder reads about 75 words")
        file = (folder / picture).with_suffix(".txt")
        if text.strip():
            write_file(file, " ".join(text.split()))
        else:
            file.unlink(missing_ok=True)

    def _entries(self, files: Sequence[Path], archives: Archives, rejected: list[str]) -> Iterator[Entry]:
        """The files, and those in zips, up to the caps."""
        count = total = 0
        for file in files:
            if is_zip(file):
                found = archives.entries(file, rejected, self.limits.count)
            else:
                found = iter([Entry(PurePosixPath(file.name), file.stat().st_size, file)])
            for entry in found:
                count, total = count + 1, total + entry.size
                if count > self.limits.count:
                    raise InputError(f"more than {self.limits.count:,} files came at once; give fewer")
                if total > self.limits.upload:
                    raise InputError(f"more than {self.limits.upload // MIB} MiB came at once, unpacked; give less")
                yield entry

    def _take(self, entries: Sequence[Entry], folder: Path, classes: bool, rejected: list[str]) -> dict[str, Entry]:
        """Writes what is usable, and gives it by its new name."""
        taken: dict[str, Entry] = {}
        labels: dict[str, str] = {}
        written = 0
        for entry in sorted(entries, key=lambda e: str(e.path)):
            if _is_text(entry.path):
                continue
            try:
                place = folder
                if classes:
                    label = _label(entry.path)
                    place = folder / labels.setdefault(label, f"class-{len(labels):03d}")
                    place.mkdir(mode=0o700, exist_ok=True)
                path = place / f"{len(taken) + 1:04d}.png"
                data = png(self._picture(entry))  # larger than a jpg
                written += len(data)
                if written > GROWTH * self.limits.upload:
                    raise InputError("these pictures are more than is taken at once; give fewer, or smaller ones")
                write_file(path, data)
            except Unusable as error:
                rejected.append(f"{entry.path}: {error}")
                continue
            taken[str(path.relative_to(folder))] = entry
        if classes:
            write_file(folder / BESIDE, json.dumps({"classes": {new: old for old, new in labels.items()}}))
        return taken

    def _picture(self, entry: Entry) -> Image.Image:
        if entry.path.suffix.lower() not in SUFFIXES:
            raise Unusable("not a jpg, png or webp picture")
        image = decode(io.BytesIO(read(entry, self.limits.file)), self.limits.pixels)
        if min(image.size) > self.limits.side:
            scale = self.limits.side / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.BICUBIC)
        return image

    def _captions(
        self, entries: Sequence[Entry], taken: Mapping[str, Entry], temporary: Path, rejected: list[str]
    ) -> dict[str, str]:
        """The captions by the pictures' new names; a `.txt` wins over a row of metadata.jsonl."""
        found: dict[str, str] = {}
        scratch = temporary / "text"
        for entry in sorted(entries, key=lambda e: (e.path.name != METADATA, str(e.path))):  # the rows first
            if not _is_text(entry.path):
                continue
            near = {old.path.name: new for new, old in taken.items() if old.path.parent == entry.path.parent}
            try:
                scratch.write_bytes(read(entry, self.limits.file if entry.path.name == METADATA else _CAPTION))
                if entry.path.name == METADATA:
                    found |= {near[old]: text for old, text in metadata_captions(scratch, near).items()}
                    continue
                mine = [new for old, new in near.items() if PurePosixPath(old).stem == entry.path.stem]
                if not mine:
                    raise Unusable("a text that belongs to no picture (a.txt is the caption of a.jpg)")
                if text := text_caption(scratch):
                    found |= dict.fromkeys(mine, text)
            except (Unusable, InputError) as error:
                rejected.append(f"{entry.path}: {str(error).replace(str(scratch), METADATA)}")
        return found

    # -- adapters ----------------------------------------------------------------------------------------------------

    def adapter(self, file: Path) -> Path:
        """A safetensors file, under a name of the server's. Raises `InputError` for any other."""
        self.check_space()
        if file.stat().st_size > self.limits.upload:
            raise InputError(f"the file has more than {self.limits.upload // MIB} MiB, and is not taken")
        try:
            with safe_open(file, "np") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file.name} is no whole safetensors file ({error}); pickles are never read") from error
        kept = self.files / f"{secrets.token_hex(8)}.safetensors"
        write_file(kept, lambda part: shutil.copyfile(file, part))
        return kept

    def check_space(self) -> None:
        """Raises `InputError` where the studio's folder is full."""
        if self.full():
            raise InputError(f"the studio's folder has its {self.limits.total / 2**30:.3g} GiB; delete some jobs")

    def full(self) -> bool:
        return size_of(self.home) > self.limits.total


def _label(path: PurePosixPath) -> str:
    """The class of a picture: the folder it lies in."""
    if len(path.parts) < 2:
        raise Unusable("not in the folder of a class")
    parts = [name for names in PARTS.values() for name in names]
    if any(part.lower() in parts for part in path.parts[:-2]):
        raise Unusable("in a part such as train or val; zip the folders of the classes alone, parts are drawn here")
    return path.parts[-2]


def _is_text(path: PurePosixPath) -> bool:
    return path.suffix.lower() == ".txt" or path.name == METADATA


def png(image: Image.Image) -> bytes:
    """The picture and nothing else, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()
