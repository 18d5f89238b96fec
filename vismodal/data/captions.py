"""Captions that lie beside photos: `NAME.txt` next to `NAME.jpg`, or rows of `metadata.jsonl`.

Where both name a photo, the `.txt` wins: it is the one that people edit by hand, picture by picture, while
`metadata.jsonl` is usually written by an export. An empty `.txt` says nothing, so the row counts.
"""

import codecs
import difflib
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from vismodal.errors import InputError

METADATA = "metadata.jsonl"
_EXAMPLE = '{"file_name": "1.jpg", "text": "a photo of sks dog"}'
_LONGEST = 1 << 16  # bytes of a caption file that are read: more than any text encoder takes


def text_caption(path: Path) -> str | None:
    """The caption in a `.txt` file, on one line; None if it is empty.

    Any encoding is taken: UTF-8 and UTF-16 are recognised, the rest is read as Windows' Western one. Raises OSError if
    the file cannot be read.
    """
    with path.open("rb") as stream:
        raw = stream.read(_LONGEST)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = raw.decode("utf-16", errors="replace")
    else:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("cp1252", errors="replace")
    return _tidy(text)


def metadata_captions(path: Path, names: Iterable[str]) -> dict[str, str]:
    """The captions of a `metadata.jsonl`, by file name; rows whose caption is empty or null are left out.

    A row is an object with `file_name`, which must be among `names`, and `text` or `caption` (`text` wins).
    Raises InputError that names the line, if one is malformed, names a file that is not there, or names one twice.
    """
    # macOS stores decomposed accents, editors write composed ones: both must name the same file
    there = {unicodedata.normalize("NFC", name): name for name in names}
    captions: dict[str, str] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        given, caption = _row(line, where)
        name = there.get(unicodedata.normalize("NFC", str(PurePosixPath(given))))
        if name is None:
            raise InputError(f"{where}: {_missing(given, there)}")
        if name in seen:
            raise InputError(f"{where}: {given!r} was named in line {seen[name]} already; keep one of the two")
        seen[name] = number
        if caption is not None:
            captions[name] = caption
    return captions


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _row(line: bytes, where: str) -> tuple[str, str | None]:
    """One line's file name and caption."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); write one object a line, like {_EXAMPLE}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}, not an object; write rows like {_EXAMPLE}")
    if not isinstance(row.get("file_name"), str):
        raise InputError(f"{where}: no file_name, but {', '.join(row) or 'nothing'}; write rows like {_EXAMPLE}")
    key = next((key for key in ("text", "caption") if key in row), None)
    if key is None:
        raise InputError(f"{where}: no text or caption, but {', '.join(row)}; write rows like {_EXAMPLE}")
    if row[key] is not None and not isinstance(row[key], str):
        raise InputError(f"{where}: {key} is {row[key]!r}, not a text; write rows like {_EXAMPLE}")
    return row["file_name"], _tidy(row[key] or "")


def _missing(given: str, there: Iterable[str]) -> str:
    """Why no file is called `given`, and what to write."""
    if len(PurePosixPath(given).parts) > 1:
        return f"{given!r} is not directly in this folder; only pictures beside {METADATA} are read"
    near = difflib.get_close_matches(given, list(there), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "correct the name or delete the line"
    return f"names {given!r}, which is not in this folder; {hint}"


def _tidy(text: str) -> str | None:
    return " ".join(text.split()) or None
