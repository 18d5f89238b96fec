"""Pictures with texts: the rows of a `metadata.jsonl` or a CSV file, any number of captions for a picture.

    {"file_name": "a/1.jpg", "text": "a red bus"}              metadata.jsonl; text may be a list of captions
    {"file_name": "a/1.jpg", "text": ["a bus", "a big bus"]}
    file_name,text                                             captions.csv; a line for each caption
    a/1.jpg,a red bus

Rows that name the same file again add captions to it. Paths are relative to the file's folder.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vismodal.data.captions import METADATA
from vismodal.data.photos import Rejected
from vismodal.data.pictures import usable
from vismodal.draw import generator
from vismodal.errors import InputError

FILE_COLUMNS = ("file_name", "image", "path", "filepath")
TEXT_COLUMNS = ("text", "caption", "title")
Long = Literal["truncate", "skip", "error"]
_EXAMPLE = '{"file_name": "1.jpg", "text": "a red bus"}'


@dataclass(frozen=True)
class Pair:
    """A picture's file and its captions, one or more."""

    path: Path
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """What a table of captions holds, in its order; the pictures that were left out, and notes on its captions."""

    pairs: tuple[Pair, ...]
    rejected: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """All captions in order; `image_of` has the place of the picture of each."""
        return [text for pair in self.pairs for text in pair.texts]

    @property
    def digest(self) -> str:
        """Pictures and captions as a short hash, wherever they lie."""
        total = hashlib.sha256()
        for pair in self.pairs:
            total.update(repr(pair.texts).encode() + pair.path.read_bytes())
        return f"{len(self.pairs)} pictures {total.hexdigest()[:12]}"

    @property
    def image_of(self) -> list[int]:
        return [i for i, pair in enumerate(self.pairs) for _ in pair.texts]

    @property
    def told(self) -> str:
        """How much there is."""
        return f"{len(self.pairs)} pictures with {len(self.texts)} captions"

    @property
    def shared(self) -> dict[str, int]:
        """Captions that several pictures have, with the number of these."""
        return {text: count for text, count in Counter(self.texts).items() if count > 1}

    @cached_property
    def contents(self) -> set[bytes]:
        """Hashes of the pictures' files."""
        return {hashlib.sha256(pair.path.read_bytes()).digest() for pair in self.pairs}


def read_pairs(place: Path) -> Pairs:
    """Reads a `metadata.jsonl` or `.csv`, or the one that lies in a folder. Every picture is decoded once.

    Pictures that cannot be used are in `Pairs.rejected`. Raises `InputError` that names the line for a row that is
    malformed, without text, or names a file that is not there, and where no pair is left.
    """
    table = _table(place)
    captions: dict[Path, list[str]] = {}
    empty = []
    for number, name, texts in _rows(table):
        where = f"{table}, line {number}"
        path = _file(table.parent, name, where)
        tidy = [t for t in (" ".join(text.split()) for text in texts) if t]
        if not tidy:
            raise InputError(f"{where}: no caption for {name!r}; write one, or delete the line")
        empty += [number] * (len(texts) - len(tidy))
        captions.setdefault(path, []).extend(tidy)
    good, rejected = usable(list(captions))
    if not good:
        first = "; ".join(map(str, rejected[:3])) or "it has no rows"
        raise InputError(f"{table} names no usable picture: {first}")
    found = [(path, each) for i, (path, each) in enumerate(captions.items()) if i in set(good)]
    pairs = tuple(Pair(path, tuple(dict.fromkeys(each))) for path, each in found)
    notes = [f"{table.name}: {len(empty)} empty captions are left out, the first in line {empty[0]}"] if empty else []
    if twice := [(path, t) for path, each in found for t, n in Counter(each).items() if n > 1]:
        path, text = twice[0]
        notes.append(f"{table.name}: {len(twice)} captions are given again and count once, {text!r} of {path.name}")
    return Pairs(pairs, tuple(rejected), tuple(notes))


def has_table(folder: Path) -> bool:
    """Whether a folder holds a table of captions itself."""
    return (folder / METADATA).is_file() or any(folder.glob("*.csv"))


def fitting(pairs: Pairs, too_long: Callable[[Sequence[str]], list[int]], long: Long) -> tuple[Pairs, list[str]]:
    """Pairs without captions that the model cannot read in full where these are to be left out, and these captions.

    Raises `InputError` where they are to be an error, and where none would be left.
    """
    texts = pairs.texts
    found = {texts[i] for i in too_long(texts)}
    told = sorted(found)
    if found and long == "error":
        raise InputError(
            f"{len(found)} captions are longer than the model's context, such as {told[0]!r}; shorten them, or write "
            "--long truncate (their end is not seen) or --long skip (they are left out)"
        )
    if not found or long == "truncate":
        return pairs, told
    kept = [Pair(p.path, tuple(t for t in p.texts if t not in found)) for p in pairs.pairs]
    kept = [pair for pair in kept if pair.texts]
    if not kept:
        raise InputError("every caption is longer than the model's context; shorten them, or write --long truncate")
    return replace(pairs, pairs=tuple(kept)), told


def held_out(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """Training pairs, and a share of pictures that training does not see; drawn by picture's place and seed."""
    import torch

    order = torch.randperm(len(pairs.pairs), generator=generator(seed, "held out", len(pairs.pairs))).tolist()
    away = set(order[: max(1, round(share * len(order)))])
    parts = [tuple(p for i, p in enumerate(pairs.pairs) if (i in away) == out) for out in (False, True)]
    if not parts[0]:
        raise InputError(f"{len(pairs.pairs)} pictures are too few to hold some out; give more, or a val folder")
    return replace(pairs, pairs=parts[0]), Pairs(parts[1])


# -- tables ----------------------------------------------------------------------------------------------------------


def _table(place: Path) -> Path:
    place = place.expanduser()
    if place.is_file():
        return place
    if not place.is_dir():
        raise InputError(f"there is no {place}; write a folder with a {METADATA}, or a .jsonl or .csv file")
    found = [place / METADATA] if (place / METADATA).is_file() else sorted(place.glob("*.csv"))
    if len(found) != 1:
        what = f"{len(found)} csv files" if found else f"no {METADATA} and no csv file"
        raise InputError(f"{place} holds {what}; write the file itself, with rows like {_EXAMPLE}")
    return found[0]


def _rows(table: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Line number, file name and captions."""
    try:
        text = table.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{table} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{table} cannot be read: {error.strerror or error}") from error
    read = _json_rows if table.suffix.lower() in (".jsonl", ".json") else _csv_rows
    for number, row in read(table, text):
        name, given = _column(table, number, row, FILE_COLUMNS), _column(table, number, row, TEXT_COLUMNS)
        texts = given if isinstance(given, list) else [given]
        if not isinstance(name, str) or not all(isinstance(t, str) for t in texts):
            raise InputError(f"{table}, line {number}: file name and text must be texts; write rows like {_EXAMPLE}")
        yield number, name, texts


def _json_rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{table}, line {number}: not JSON ({error}); write rows like {_EXAMPLE}") from error
        if not isinstance(row, dict):
            raise InputError(f"{table}, line {number}: a {type(row).__name__}, no object; write rows like {_EXAMPLE}")
        yield number, row


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    first = text.split("\n", 1)[0]
    separator = max(",;\t", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                fields = ", ".join(reader.fieldnames or ())
                raise InputError(
                    f"{table}, line {reader.line_num}: not as many fields as the first line has ({fields}); put quotes "
                    'around a caption with commas in it: "a cat, sleeping"'
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(
            f"{table}, line {reader.line_num}: {error}; a caption that begins with a quote must end with one"
        ) from error


def _column(table: Path, number: int, row: dict[str, Any], names: Sequence[str]) -> Any:
    name = next((n for n in names if n in row), None)
    if name is None:
        there = ", ".join(map(str, row)) or "nothing"
        raise InputError(f"{table}, line {number}: no {names[0]}, but {there}; write rows like {_EXAMPLE}")
    return row[name]


def _file(root: Path, name: str, where: str) -> Path:
    relative = PurePosixPath(name.strip())
    if not name.strip() or relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"{where}: {name!r} is no path within {root}; write it relative to that folder")
    for form in ("NFC", "NFD"):  # macOS stores decomposed accents, editors write composed ones
        path = root / unicodedata.normalize(form, str(relative))
        if path.is_file():
            return path
    raise InputError(f"{where}: names {name!r}, which is not in {root}; correct the name or delete the line")
