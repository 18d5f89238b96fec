"""Tables of captions: what is read, what is refused by its line, what is left out and told."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from vismodal.data.pairs import Pair, Pairs, fitting, held_out, read_pairs
from vismodal.errors import InputError


def picture(path: Path, size: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("1.jpg", "sub/2.png", unicodedata.normalize("NFD", "été.jpg")):
        picture(tmp_path / name)
    return tmp_path


def write(folder: Path, rows: Sequence[object], name: str = "metadata.jsonl") -> Path:
    (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return folder / name


def test_several_captions_in_a_list_and_in_rows(folder: Path) -> None:
    rows = [
        {"file_name": "1.jpg", "text": ["a  red\nbus", "a bus"]},
        {"file_name": "sub/2.png", "caption": "a cat"},
        {"file_name": "1.jpg", "text": "a bus"},  # said before
        {"file_name": "1.jpg", "text": "my bus"},
        {"file_name": unicodedata.normalize("NFC", "été.jpg"), "text": "l'été, 夏"},
    ]
    write(folder, rows)
    found = read_pairs(folder)
    assert [(p.path.name, p.texts) for p in found.pairs][:2] == [
        ("1.jpg", ("a red bus", "a bus", "my bus")), ("2.png", ("a cat",)),
    ]  # fmt: skip
    assert found.pairs[2].texts == ("l'été, 夏",) and found.pairs[2].path.is_file()
    assert found.texts == ["a red bus", "a bus", "my bus", "a cat", "l'été, 夏"]
    assert found.image_of == [0, 0, 0, 1, 2]
    assert found.digest == read_pairs(folder / "metadata.jsonl").digest
    write(folder, [*rows[:-1], {**rows[-1], "text": "winter"}])
    assert found.digest != read_pairs(folder).digest


@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_csv(folder: Path, sep: str) -> None:
    write(folder, [f"file_name{sep}text", f'1.jpg{sep}"a cat, asleep; ""here"""', f"1.jpg{sep}a cat"], "captions.csv")
    (pair,) = read_pairs(folder).pairs
    assert pair.texts == ('a cat, asleep; "here"', "a cat")


def test_empty_and_repeated_captions_are_told(folder: Path) -> None:
    rows = [{"file_name": "1.jpg", "text": ["a bus", " ", ""]}, {"file_name": "sub/2.png", "text": "a bus"}]
    found = read_pairs(write(folder, [*rows, {"file_name": "1.jpg", "text": " a  bus"}]))
    assert found.texts == ["a bus", "a bus"]
    assert found.notes == (
        "metadata.jsonl: 2 empty captions are left out, the first in line 1",
        "metadata.jsonl: 1 captions are given again and count once, 'a bus' of 1.jpg",
    )
    assert found.shared == {"a bus": 2}
    assert fitting(found, lambda texts: [], "skip")[0].notes == held_out(found, 0.5, 0)[0].notes == found.notes
    assert read_pairs(write(folder, rows[1:])).notes == ()


def test_spaces_and_quotes_in_a_csv(folder: Path) -> None:
    write(folder, ["file_name, text", '1.jpg, "a cat, asleep"', "sub/2.png, a dog"], "captions.csv")
    assert read_pairs(folder).texts == ["a cat, asleep", "a dog"]
    write(folder, ["file_name,text", '1.jpg,"a cat', "sub/2.png,a dog"], "captions.csv")  # else one caption of two rows
    with pytest.raises(InputError, match="a caption that begins with a quote must end with one"):
        read_pairs(folder)


def test_pictures_that_cannot_be_used_are_named(folder: Path) -> None:
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    picture(folder / "small.png", (4, 4))
    rows = [{"file_name": n, "text": "x"} for n in ("torn.jpg", "1.jpg", "small.png")]
    found = read_pairs(write(folder, rows))
    assert [p.path.name for p in found.pairs] == ["1.jpg"]
    told = [str(r) for r in found.rejected]
    assert told[0].startswith("torn.jpg: truncated or corrupt") and "4 x 4 pixels is too small" in told[1]
    with pytest.raises(InputError, match=r"names no usable picture: torn.jpg"):
        read_pairs(write(folder, rows[:1]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1: not JSON"),
        ([[1]], "line 1: a list, no object"),
        ([{"text": "x"}], "line 1: no file_name, but text"),
        ([{"file_name": "1.jpg"}], "line 1: no text, but file_name"),
        ([{"file_name": "1.jpg", "text": "x"}, {"file_name": "1.jpg", "text": "  "}], "line 2: no caption for '1.jpg'"),
        ([{"file_name": "1.jpg", "text": []}], "line 1: no caption"),
        ([{"file_name": "1.jpg", "text": [3]}], "must be texts"),
        ([{"file_name": "3.jpg", "text": "x"}], "names '3.jpg', which is not in"),
        ([{"file_name": "../1.jpg", "text": "x"}], "is no path within"),
        ([{"file_name": "/1.jpg", "text": "x"}], "is no path within"),
        ([], "it has no rows"),
    ],
)
def test_malformed_rows_are_named_by_their_line(folder: Path, rows: list[object], message: str) -> None:
    write(folder, rows)
    with pytest.raises(InputError, match=message):
        read_pairs(folder)


def test_malformed_tables(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no metadata.jsonl and no csv file"):
        read_pairs(folder)
    with pytest.raises(InputError, match=r"there is no .*nowhere"):
        read_pairs(folder / "nowhere")
    write(folder, ["file_name,text", "1.jpg,a cat, asleep"], "a.csv")
    with pytest.raises(InputError, match=r"line 2: not as many fields .* put quotes"):
        read_pairs(folder)
    write(folder, ["name,text", "1.jpg,a cat"], "a.csv")
    with pytest.raises(InputError, match="no file_name, but name, text"):
        read_pairs(folder)
    write(folder, ["file_name,text"], "b.csv")
    with pytest.raises(InputError, match="2 csv files; write the file itself"):
        read_pairs(folder)
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "1.jpg", "text": "\xe9"}')
    with pytest.raises(InputError, match="is not UTF-8"):
        read_pairs(folder)


def pairs(*texts: tuple[str, ...]) -> Pairs:
    return Pairs(tuple(Pair(Path(f"{i}.jpg"), each) for i, each in enumerate(texts)))


def longer(texts: Sequence[str]) -> list[int]:
    return [i for i, text in enumerate(texts) if len(text) > 3]


def test_long_captions_are_cut_left_out_or_refused_and_told() -> None:
    given = pairs(("abc", "abcd"), ("abcde",), ("a",))
    same, told = fitting(given, longer, "truncate")
    assert same == given and told == ["abcd", "abcde"]
    fewer, told = fitting(given, longer, "skip")
    assert [p.texts for p in fewer.pairs] == [("abc",), ("a",)] and told == ["abcd", "abcde"]
    assert fewer.image_of == [0, 1]
    with pytest.raises(InputError, match=r"2 captions are longer .* such as 'abcd'; shorten them"):
        fitting(given, longer, "error")
    with pytest.raises(InputError, match="every caption is longer"):
        fitting(pairs(("abcd",)), longer, "skip")
    assert fitting(pairs(("a",)), longer, "error") == (pairs(("a",)), [])


def test_held_out_pictures_are_drawn_by_the_seed() -> None:
    given = pairs(*[(str(i),) for i in range(10)])
    train, val = held_out(given, 0.3, 0)
    assert len(val.pairs) == 3 and sorted(train.texts + val.texts) == sorted(given.texts)
    assert held_out(given, 0.3, 0) == (train, val) != held_out(given, 0.3, 1)
    with pytest.raises(InputError, match="too few to hold some out"):
        held_out(pairs(("a",)), 0.5, 0)
