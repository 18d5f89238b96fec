"""A data set of Hugging Face's `datasets` as a folder of pictures: written once, then read like every other.

    as_folder(Path("OWNER/NAME"), cache)     # on the Hub
    as_folder(Path("saved"), cache)          # written by save_to_disk, or a folder of parquet, arrow or tar files

    CACHE/NAME-KEY/SPLIT/NUMBER_CLASS/ROW.jpg     without SPLIT where there is but one, so that parts are drawn

KEY is of the content: another revision, or other columns, are another folder. Encoded pictures keep their bytes; what
is no jpg, png or webp becomes a png. The true names of the classes, and what was left out, stand in a hidden file that
`vismodal.data.folder` reads.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from PIL import Image
from tqdm import tqdm

from vismodal.data.folder import BESIDE, PARTS, few_names, is_hub_id, no_folder
from vismodal.data.photos import is_picture, natural
from vismodal.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_LAYOUT = 1  # of the folders below; another number makes all of them anew
_SAVED = ("dataset_dict.json", "state.json")  # save_to_disk leaves one of them
_FILES = (".parquet", ".arrow", ".tar")
_HEADS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"RIFF": ".webp"}  # what else is RIFF is no picture
_COLOURS = ("CMYK", "YCbCr", "LAB", "HSV")  # which a png cannot have
_STRANGE = re.compile(r"\W+")
_INSTALL = 'pip install "vismodal[datasets]"'
_BY_HAND = 'load it in Python as you need it, .save_to_disk("DIR"), and give --data DIR'


def as_folder(data: Path | None, cache: Path, image: str | None = None, label: str | None = None) -> Path | None:
    """The folder of pictures that `data` is, or that is made of it in `cache`, whole or not at all.

    Args:
        data: a folder, which is given back if it holds pictures; or OWNER/NAME on the Hub. None stays None.
        cache: where the folders lie that are made here.
        image: column of the pictures, where their type does not tell.
        label: column of the classes, where its type does not tell.

    Raises `InputError` if it cannot be loaded, or if its columns or splits do not tell what is what.
    """
    root = data.expanduser() if data else None
    if root is None or not (_is_local(root) or (is_hub_id(root) and not os.path.exists(root))):
        if image or label:
            raise InputError("image_column and label_column are for a data set of the package datasets; leave them out")
        return root
    splits = _loaded(root)
    features = next(iter(splits.values())).features
    columns = (
        _column(root, features, "image", image, _pictures(features)),
        _column(root, features, "label", label, _labels(features)),
    )
    slug = root.as_posix().replace("/", "--") if is_hub_id(root) and not os.path.exists(root) else root.resolve().name
    place = cache / f"{slug}-{_key(splits, columns)}"
    if not place.is_dir():
        _publish(place, lambda temporary: _write(root, splits, *columns, temporary))
    return place


# -- loading -----------------------------------------------------------------------------------------------------------


def _is_local(root: Path) -> bool:
    """Whether a folder is of `datasets`' making. One with pictures by class is not, whatever lies beside them."""
    if any((root / name).is_file() for name in _SAVED):
        return True
    inside = (path for depth in ("*", "*/*") for path in root.glob(depth))
    return any(p.suffix in _FILES for p in inside) and not any(
        map(is_picture, (*root.glob("*/*"), *root.glob("*/*/*")))
    )


def _loaded(root: Path) -> dict[str, Dataset]:
    """All splits by name."""
    try:
        from datasets import Dataset, load_dataset, load_from_disk
    except ImportError as error:
        if _is_local(root):
            what = f"{root} is a data set of the package datasets, which is not installed"
            raise InputError(f"{what}; write {_INSTALL}") from error
        raise InputError(f"{no_folder(root)}; for all others: {_INSTALL}") from error
    saved = any((root / name).is_file() for name in _SAVED)
    try:
        found = load_from_disk(root) if saved else load_dataset(root.as_posix())
    except Exception as error:  # builders, pyarrow, the Hub and the network raise nearly anything
        what = f"{root} cannot be loaded" if os.path.exists(root) else f"{no_folder(root)}. As a data set on the Hub"
        raise InputError(f"{what}: {error}. If it needs more than its name: {_BY_HAND}") from error
    return {"train": found} if isinstance(found, Dataset) else dict(found)


def _key(splits: Mapping[str, Dataset], columns: tuple[str, str]) -> str:
    """A short hash of what the data are. A fingerprint alone does not see pictures that changed under their names
    before the data were saved again, so that size and time of the Arrow files belong to it."""
    total = hashlib.sha256(repr((_LAYOUT, columns)).encode())
    for name, rows in splits.items():
        files = [os.stat(file["filename"]) for file in rows.cache_files]
        total.update(repr((name, rows._fingerprint, [(f.st_size, f.st_mtime_ns) for f in files])).encode())
    return total.hexdigest()[:12]


# -- columns -----------------------------------------------------------------------------------------------------------


def _pictures(features: Mapping[str, Any]) -> list[str]:
    return [name for name, feature in features.items() if type(feature).__name__ == "Image"]


def _labels(features: Mapping[str, Any]) -> list[str]:
    """The columns of type ClassLabel; without any, `label`, or else all with text or whole numbers."""
    found = [name for name, feature in features.items() if hasattr(feature, "int2str")]
    plain = [name for name, feature in features.items() if _is_plain(feature)]
    return found or [name for name in plain if name == "label"] or plain


def _is_plain(feature: Any) -> bool:
    kind = getattr(feature, "dtype", "") if type(feature).__name__ == "Value" else ""
    return kind in ("string", "large_string", "bool") or kind.startswith(("int", "uint"))


def _column(root: Path, features: Mapping[str, Any], what: str, given: str | None, found: Sequence[str]) -> str:
    """The column that was asked for, or the only one that may be meant."""
    there = ", ".join(f"{name} ({getattr(f, '_type', type(f).__name__)})" for name, f in features.items())
    if given is not None:
        if given not in features:
            raise InputError(f"{root} has no column {given!r}; it has {there}")
        if what == "label" and not (hasattr(features[given], "int2str") or _is_plain(features[given])):
            raise InputError(f"the column {given!r} of {root} holds no names or numbers of classes; it has {there}")
        return given
    if len(found) == 1:
        return found[0]
    many = f"several columns that may be the {what}, {', '.join(found)}" if found else f"no column of type {what}"
    raise InputError(f"{root} has {many}; write --{what}_column NAME. Its columns: {there}")


# -- splits and classes ------------------------------------------------------------------------------------------------

Names = Sequence[str | None]  # the class of each row, None where it has none


def _names(root: Path, split: str, rows: Dataset, column: str) -> Names:
    """Without a class are no value, no text, and a number that no label has (-1, usually)."""
    if column not in rows.features:
        raise InputError(f"the split {split} of {root} has no column {column!r}; {_BY_HAND}")
    names, values = getattr(rows.features[column], "names", None), list(rows[column])
    if names is None:
        return [None if value is None or value == "" else _normal(str(value)) for value in values]
    return [_normal(names[value]) if value is not None and 0 <= value < len(names) else None for value in values]


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _parts(root: Path, names: Mapping[str, Names]) -> tuple[list[str], list[str]]:
    """The splits that can serve, and a note on each other one. Where there are several, their names tell the parts."""
    meant = {spelling: part for part, spellings in PARTS.items() for spelling in spellings}
    if len(names) == 1:
        parts, notes = list(names), []
    else:
        parts = [split for split in names if split.lower() in meant and any(names[split])]
        notes = [
            f"the split {split}: not read, since {_why_not(split, meant)}" for split in names if split not in parts
        ]
        found = [meant[split.lower()] for split in parts]
        if "train" not in found or len(set(found)) < len(found):
            todo = "One with labels must be named train, and at most one validation and one test"
            raise InputError(f"{root} has the splits {', '.join(names)}. {todo}; {_BY_HAND}")
    if not any(name for split in parts for name in names[split]):
        raise InputError(f"no row of {root} has a label; write --label_column NAME for another column")
    return parts, notes


def _why_not(split: str, meant: Mapping[str, str]) -> str:
    return "none of its rows has a label" if split.lower() in meant else f"its name is none of {', '.join(meant)}"


def _order(splits: Mapping[str, Dataset], column: str, there: Collection[str]) -> tuple[list[str], list[str]]:
    """The classes with rows in the data's own order, or in the natural one; and those without rows."""
    listed = [_normal(name) for rows in splits.values() for name in getattr(rows.features[column], "names", ())]
    order = list(dict.fromkeys(listed)) or sorted(there, key=natural)
    return [name for name in order if name in there], [name for name in order if name not in there]


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(root: Path, splits: Mapping[str, Dataset], image: str, label: str, place: Path) -> None:
    """All pictures, and the hidden files beside their folders."""
    names = {split: _names(root, split, rows, label) for split, rows in splits.items()}
    parts, notes = _parts(root, names)
    order, unused = _order(splits, label, {name for split in parts for name in names[split] if name is not None})
    if unused:
        notes.append(f"classes without a picture: {few_names(unused)}")
    # a name may be anything, a path or a device too; its number alone tells a folder from the others
    folders = {name: f"{i}_{_STRANGE.sub('_', name)[:40]}" for i, name in enumerate(order)}
    for split in parts:
        inside = place / split if len(parts) > 1 else place
        for known in dict.fromkeys(filter(None, names[split])):
            (inside / folders[known]).mkdir(parents=True)
        rows = tqdm(
            _pictures_of(root, split, splits[split], image), split, len(names[split]), leave=False, disable=None
        )
        for i, (name, content) in enumerate(zip(names[split], rows, strict=True)):
            if name is None or content is None:
                notes.append(f"{split}, row {i}: no {'label' if name is None else 'picture'}")
                continue
            data, suffix = _file(content)
            (inside / folders[name] / f"{i}{suffix}").write_bytes(data)
        (inside / BESIDE).write_text(json.dumps({"classes": {folder: name for name, folder in folders.items()}}))
    beside = json.loads((place / BESIDE).read_text()) if len(parts) == 1 else {}
    (place / BESIDE).write_text(json.dumps({**beside, "notes": notes}))


def _pictures_of(root: Path, split: str, rows: Dataset, column: str) -> Iterator[bytes | None]:
    """The bytes of each row's picture as the data set holds them, None where it has none."""
    from datasets import Image as Encoded

    try:
        for row in rows.select_columns([column]).cast_column(column, Encoded(decode=False)):
            value = row[column] or {}
            if value.get("bytes") is None and value.get("path"):
                with fsspec.open(value["path"], "rb") as file:
                    yield file.read()
            else:
                yield value.get("bytes") or None
    except Exception as error:  # as above: pyarrow, the system, the network
        raise InputError(f"the pictures of {root}, column {column!r} of {split}, cannot be read: {error}") from error


def _file(content: bytes) -> tuple[bytes, str]:
    """What to write, and the suffix: jpg, png and webp as they are, others as png, what is no picture as it is."""
    known = next((suffix for head, suffix in _HEADS.items() if content.startswith(head)), None)
    if known:
        return content, known
    try:
        picture: Image.Image = Image.open(io.BytesIO(content))
        if picture.mode in _COLOURS:
            picture = picture.convert("RGB")
        written = io.BytesIO()
        picture.save(written, "PNG")
    except Exception:  # whatever Pillow raises: the folder's reader names the file and says what is wrong with it
        return content, ".bin"
    return written.getvalue(), ".png"


def _publish(place: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a folder under a temporary name, and renames it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        if hasattr(os, "sync"):  # not on Windows; one call for all files, where a power cut would leave empty ones
            os.sync()
        if not place.is_dir():  # another process may have been faster
            os.replace(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
