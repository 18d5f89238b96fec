"""Captions beside photos: from `.txt` and `metadata.jsonl`, which of them wins, and what is wrong in which line."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vismodal.data.photos import read_photos
from vismodal.errors import InputError


def save(path: Path) -> None:
    Image.new("RGB", (32, 32)).save(path)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder with one good photo, `good.png`."""
    save(tmp_path / "good.png")
    return tmp_path


def captions(folder: Path) -> dict[str, str | None]:
    return {photo.path.name: photo.caption for photo in read_photos(folder).photos}


def write_rows(folder: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_captions_from_both_sources_and_the_text_file_wins(tmp_path: Path) -> None:
    for name in "abcdef":
        save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("  from\n the  text ")
    (tmp_path / "b.TXT").write_text("text only")
    (tmp_path / "c.txt").write_text(" \n")  # empty: the row counts
    write_rows(
        tmp_path,
        {"file_name": "a.png", "text": "from the row"},
        {"file_name": "c.png", "caption": "row c", "extra": 1},
        "",
        {"file_name": "./d.png", "text": "row d", "caption": "text goes before caption"},
        {"file_name": "e.png", "text": None},
    )
    assert captions(tmp_path) == {
        "a.png": "from the text",
        "b.png": "text only",
        "c.png": "row c",
        "d.png": "row d",
        "e.png": None,
        "f.png": None,
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_caption_file_is_never_an_error(good: Path, encoding: str) -> None:
    (good / "good.txt").write_bytes("ein Foto von sks Dackel, schön".encode(encoding))
    assert captions(good)["good.png"] == "ein Foto von sks Dackel, schön"


def test_binary_and_huge_caption_files_are_no_error_either(good: Path) -> None:
    (good / "good.txt").write_bytes(bytes(range(256)) * 4000)
    caption = captions(good)["good.png"]
    assert caption is not None and len(caption) <= 2**16


def test_a_caption_is_no_stray_file_because_its_photo_is_broken(good: Path) -> None:
    (good / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (good / "broken.txt").write_text("a photo of sks dog")
    assert [skipped.path.name for skipped in read_photos(good).rejected] == ["broken.jpg"]


def test_metadata_may_name_a_rejected_photo_and_other_accents(good: Path) -> None:
    (good / "broken.jpg").write_bytes(b"")
    save(good / "cafe\u0301.png")  # as macOS writes it
    write_rows(good, {"file_name": "broken.jpg", "text": "x"}, {"file_name": "caf\u00e9.png", "text": "a café"})
    assert captions(good) == {"cafe\u0301.png": "a café", "good.png": None}


@pytest.mark.parametrize(
    "row, part",
    [
        ("{not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ({"text": "x"}, "no file_name, but text"),
        ({"file_name": 3, "text": "x"}, "no file_name"),
        ({"file_name": "good.png", "label": 1}, "no text or caption, but file_name, label"),
        ({"file_name": "good.png", "text": 3}, "text is 3, not a text"),
        (
            {"file_name": "god.png", "text": "x"},
            "names 'god.png', which is not in this folder; did you mean 'good.png'?",
        ),
        ({"file_name": "zzz", "text": "x"}, "correct the name or delete the line"),
        ({"file_name": "sub/good.png", "text": "x"}, "not directly in this folder"),
        ({"file_name": "../good.png", "text": "x"}, "not directly in this folder"),
        ({"file_name": "good.png", "text": "again"}, "was named in line 1 already"),
    ],
)
def test_wrong_metadata_names_the_line(good: Path, row: object, part: str) -> None:
    write_rows(good, {"file_name": "good.png", "text": "x"}, "", row)
    with pytest.raises(InputError) as caught:
        read_photos(good)
    message = str(caught.value)
    assert "\n" not in message and f"{good / 'metadata.jsonl'}, line 3: " in message and part in message


def test_metadata_that_is_not_utf8_names_the_line(good: Path) -> None:
    (good / "metadata.jsonl").write_bytes(b'{"file_name": "good.png", "text": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 1: not JSON"):
        read_photos(good)
