"""A folder of labelled pictures as people have it: classes, parts for training, selection and the final figure.

    DIR/{train,val,test}/CLASS/*.jpg    the parts are given; without val a share of train is taken, without test there
                                        is none
    DIR/CLASS/*.jpg                     parts are drawn, class by class, from `seed` alone

Every picture is decoded once on reading: what cannot be used is named with its reason, never dropped in silence. How a
file becomes a picture (EXIF, transparency, CMYK, 16 bit, palettes) is in `vismodal.data.decode`.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vismodal.data.decode import Unusable
from vismodal.data.photos import is_picture, listing, read_picture
from vismodal.data.pictures import in_parallel
from vismodal.draw import generator
from vismodal.errors import InputError, one_line

PARTS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
LAYOUT = "pictures lie in DIR/CLASS/ or in DIR/train/CLASS/, DIR/val/CLASS/ and DIR/test/CLASS/"


@dataclass(frozen=True)
class Item:
    """One picture: its file, the number of its class, and a hash of the file."""

    path: Path
    label: int
    content: str


@dataclass(frozen=True)
class Folder:
    """Labelled pictures in three parts; `val` is never empty, `test` may be.

    Args:
        classes: names, in the order of the labels.
        train: to learn from.
        val: to select by.
        test: for the final figure alone.
        notes: one line for each file that was left out, and for whatever else one should know.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Classes, parts and contents as a short hash, wherever the folder lies."""
        total = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train, self.val, self.test):
            total.update(repr([(item.label, item.content) for item in part]).encode())
        return f"{len(self.train)} + {len(self.val)} + {len(self.test)} pictures {total.hexdigest()[:12]}"


def read_folder(root: Path, *, val: float = 0.2, test: float = 0.2, seed: int = 0) -> Folder:
    """Reads a folder in one of the two layouts.

    Args:
        root: DIR.
        val: share of each class for selection, where the folder has no part of its own for it.
        test: likewise for the final figure, in the layout without parts.
        seed: of that drawing; the same files give the same parts on every machine.

    Raises `InputError` if there are no two classes, a class has no usable picture or too few to be divided, or a class
    of val or test is not in train.
    """
    if not os.path.isdir(root):
        raise InputError(_no_folder(root))
    parts, notes = _parts(root)
    if parts:
        return _given(root, parts, notes, val, seed)
    by_class = _classes(root, root, notes)
    labels = tuple(by_class)
    items = _items(root, by_class, labels, notes)
    _check(by_class, items, 3, "are needed for train, val and test")
    rest, tested = take(items, test, seed, "test", labels)
    trained, selected = take(rest, val / (1 - test), seed, "val", labels)
    return Folder(root, labels, trained, selected, tested, (*notes, *_twice(trained, selected, tested)))


def take(
    items: Sequence[Item], share: float, seed: int, purpose: str, classes: Sequence[str]
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Divides items: those that stay, and `share` of each class, at least one. Each class draws by its own name."""
    gone: set[int] = set()
    for label, name in enumerate(classes):
        mine = [i for i, item in enumerate(items) if item.label == label]
        count = min(len(mine) - 1, max(1, round(share * len(mine))))
        order = torch.randperm(len(mine), generator=generator(seed, "split", purpose, name)).tolist()
        gone |= {mine[i] for i in order[:count]}
    return (
        tuple(item for i, item in enumerate(items) if i not in gone),
        tuple(item for i, item in enumerate(items) if i in gone),
    )


def few(folder: Folder, shots: int, seed: int) -> tuple[tuple[Item, ...], list[str]]:
    """`shots` training pictures of each class, drawn by seed and class name, and a note for classes that have fewer."""
    kept: set[int] = set()
    notes = []
    for label, name in enumerate(folder.classes):
        mine = [i for i, item in enumerate(folder.train) if item.label == label]
        order = torch.randperm(len(mine), generator=generator(seed, "shots", name)).tolist()
        kept |= {mine[i] for i in order[:shots]}
        if len(mine) < shots:
            notes.append(f"class {name!r} has {len(mine)} training pictures, fewer than the {shots} shots")
    return tuple(item for i, item in enumerate(folder.train) if i in kept), notes


def read_labelled(root: Path, classes: Sequence[str]) -> tuple[tuple[Item, ...], list[str]]:
    """All pictures of DIR/CLASS/, whose classes must be exactly these, and notes on what was left out."""
    if not os.path.isdir(root):
        raise InputError(_no_folder(root))
    notes: list[str] = []
    by_class = _classes(root, root, notes)
    strange, missing = [c for c in by_class if c not in classes], [c for c in classes if c not in by_class]
    if strange or missing:
        has = [f"has {strange[0]!r}, which the adapter does not know"] if strange else []
        has += [f"lacks {missing[0]!r}"] if missing else []
        parts = [by_class[name] for name in strange if any(name.lower() in names for names in PARTS.values())]
        hint = f"; perhaps you mean {min(parts, key=lambda path: path.name.lower() != 'test')}" if parts else ""
        told = f"{' and '.join(has)}: its folders must be the adapter's classes, {_few(classes)}"
        raise InputError(f"{root} {told}{hint}")
    items = _items(root, by_class, classes, notes)
    _check({name: by_class[name] for name in classes}, items, 1, "is needed")
    return items, notes


# -- the two layouts ---------------------------------------------------------------------------------------------------


def _parts(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders of train, val and test, where that is the layout; and notes on what lies beside them."""
    there = [path for path in listing(root) if os.path.isdir(path)]
    train = next((path for path in there if path.name.lower() == "train"), None)
    if train is None or not any(os.path.isdir(path) for path in listing(train)):
        return {}, []
    parts: dict[str, Path] = {}
    for name, spellings in PARTS.items():
        found = [path for path in there if path.name.lower() in spellings]
        if len(found) > 1:
            raise InputError(f"{root} has {' and '.join(p.name for p in found)}; keep one of them")
        if found:
            parts[name] = found[0]
    notes = [f"{_shown(root, p)}: beside train, not read" for p in listing(root) if p not in parts.values()]
    return parts, notes


def _given(root: Path, parts: dict[str, Path], notes: list[str], val: float, seed: int) -> Folder:
    by_part = {name: _classes(root, path, notes) for name, path in parts.items()}
    classes = tuple(by_part["train"])
    for name, by_class in by_part.items():
        if strange := [c for c in by_class if c not in classes]:
            lacks = f"which {parts['train']} lacks; it has {_few(classes)}"
            raise InputError(f"{parts[name]} has the class {strange[0]!r}, {lacks}")
    items = {name: _items(root, by_class, classes, notes) for name, by_class in by_part.items()}
    trained, selected, tested = items["train"], items.get("val"), items.get("test", ())
    if selected is not None:
        _check(by_part["train"], trained, 1, "is needed")
    else:
        _check(by_part["train"], trained, 2, "are needed, since there is no val folder and some are taken for it")
        trained, selected = take(trained, val, seed, "val", classes)
        notes.append(f"no val folder: {len(selected)} pictures of train are taken for selection")
    for name, part in (("val", selected), ("test", tested)):
        if name in parts and not part:
            raise InputError(f"{parts[name]} holds no usable picture; fill it or delete it")
        notes += [f"{name} has no picture of class {c!r}" for c in _missing(classes, part) if part]
    return Folder(root, classes, trained, selected, tested, (*notes, *_twice(trained, selected, tested)))


def _classes(root: Path, folder: Path, notes: list[str]) -> dict[str, Path]:
    """The class folders by name. Names are compared in Unicode's composed form, which file systems do not agree on."""
    found: dict[str, Path] = {}
    for path in listing(folder):
        if not os.path.isdir(path):
            notes.append(f"{_shown(root, path)}: not in the folder of a class")
            continue
        name = unicodedata.normalize("NFC", path.name)
        if name in found:
            raise InputError(f"{folder} has two folders named {name!r} that differ in Unicode's form; rename one")
        found[name] = path
    if len(found) < (2 if folder == root else 1):
        many = f"one class, {next(iter(found))!r}" if found else "no class folders"
        raise InputError(f"{folder} has {many}; {LAYOUT}")
    return found


def _items(root: Path, by_class: dict[str, Path], classes: Sequence[str], notes: list[str]) -> tuple[Item, ...]:
    """All usable pictures, class by class in natural order; the others are noted."""
    files = [(path, classes.index(name)) for name, folder in by_class.items() for path in listing(folder)]
    items = []
    for (path, label), (content, reason) in zip(
        files, in_parallel(_content, [path for path, _ in files], "reading"), strict=True
    ):
        if reason is None:
            items.append(Item(path, label, content))
        else:
            notes.append(one_line(f"{_shown(root, path)}: {reason}"))
    return tuple(items)


def _content(path: Path) -> tuple[str, str | None]:
    """A hash of a file that holds a picture, and nothing; or the reason why it holds none."""
    try:
        read_picture(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16], None
    except Unusable as error:
        return "", str(error)


# -- what is wrong with it ---------------------------------------------------------------------------------------------


def _check(by_class: dict[str, Path], items: Sequence[Item], least: int, why: str) -> None:
    counts = Counter(item.label for item in items)
    for label, (name, folder) in enumerate(by_class.items()):
        if not counts[label]:
            files = "all its files were skipped" if any(map(is_picture, listing(folder))) else "it is empty"
            if any(os.path.isdir(inside) for inside in listing(folder)):
                files = f"there are folders only, as where classes lie one deeper (--data {folder}, perhaps)"
            raise InputError(f"the class {name!r} has no usable picture: in {folder} {files}; add some, or delete it")
        if counts[label] < least:
            has = f"{counts[label]} picture{'s' if counts[label] > 1 else ''}"
            todo = "Add some, delete the class, or make the folders train, val and test"
            raise InputError(f"the class {name!r} has {has}; {least} {why}. {todo}")
    if len(by_class) < 2:
        raise InputError(f"there is one class, {next(iter(by_class))!r}; two are needed to tell apart")


def _missing(classes: Sequence[str], items: Sequence[Item]) -> list[str]:
    there = {item.label for item in items}
    return [name for label, name in enumerate(classes) if label not in there]


def _twice(train: Sequence[Item], val: Sequence[Item], test: Sequence[Item]) -> Iterator[str]:
    """Files of val and test that are in train too, byte for byte: their figures would be too good."""
    learnt = {item.content: item.path for item in train}
    for name, part in (("val", val), ("test", test)):
        same = [item for item in part if item.content in learnt]
        if same:
            first = f"{same[0].path.name} = {learnt[same[0].content].name}"
            yield f"{len(same)} of {name}'s files are in train too, byte for byte ({first})"


def _shown(root: Path, path: Path) -> str:
    return one_line(str(path.relative_to(root)))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _no_folder(root: Path) -> str:
    if os.path.exists(root):
        return f"{root} is a file; {LAYOUT}"
    if str(root).count("/") == 1 and not str(root).startswith((".", "/", "~")):
        get = f"hf download {root} --repo-type dataset --local-dir DIR"
        return f"there is no folder {root}; {LAYOUT}. For a data set on the Hub whose files lie like this: {get}"
    return f"there is no folder {root}; {LAYOUT}"
