"""Folders of labelled pictures: both layouts, parts that are drawn, k shots, and everything that can be wrong."""

from __future__ import annotations

import io
import threading
import unicodedata
import warnings

import numpy as np
import pytest
from pictures import COLOURS, folder, picture
from PIL import Image

from vismodal.data import decode
from vismodal.data.decode import Unusable
from vismodal.data.folder import few, read_folder, read_labelled
from vismodal.data.photos import read_picture
from vismodal.data.pictures import Kept
from vismodal.errors import InputError


def names(items):
    return sorted(f"{item.path.parent.name}/{item.path.name}" for item in items)


def test_given_parts_are_taken_as_they_are(tmp_path):
    found = read_folder(folder(tmp_path / "d"))
    assert found.classes == ("blue", "green", "red") and found.notes == ()
    assert (len(found.train), len(found.val), len(found.test)) == (12, 6, 9)
    assert all(found.classes[i.label] == i.path.parent.name for i in (*found.train, *found.val, *found.test))


def test_parts_are_drawn_class_by_class_and_do_not_overlap(tmp_path):
    root = folder(tmp_path / "d", {"": 10})
    a, b, other = read_folder(root), read_folder(root), read_folder(root, seed=1)
    parts = [names(p) for p in (a.train, a.val, a.test)]
    assert [len(p) for p in parts] == [18, 6, 6]
    assert [sum(n.startswith("red/") for n in p) for p in parts] == [6, 2, 2]
    assert len(set().union(*parts)) == 30
    assert a == b and names(other.test) != parts[2] and a.digest != other.digest
    # a class draws by its name: another class beside it changes nothing
    folder(root, {"": 7}, {"amber": (200, 200, 0)})
    assert [n for n in names(read_folder(root).test) if "amber" not in n] == parts[2]


def test_the_digest_is_of_contents_not_places(tmp_path):
    a, b = read_folder(folder(tmp_path / "a")), read_folder(folder(tmp_path / "b"))
    assert a.digest == b.digest
    picture((1, 2, 3), 0).save(tmp_path / "b/train/red/0.png")
    assert read_folder(tmp_path / "b").digest != a.digest


def test_without_val_a_share_of_train_is_taken_and_noted(tmp_path):
    found = read_folder(folder(tmp_path / "d", {"train": 10, "test": 1}))
    assert (len(found.train), len(found.val), len(found.test)) == (24, 6, 3)
    assert found.notes == ("no val folder: 6 pictures of train are taken for selection",)


def test_shots_are_drawn_by_seed_and_lacks_are_noted(tmp_path):
    found = read_folder(folder(tmp_path / "d"))
    chosen, notes = few(found, 2, seed=0)
    assert [i.label for i in chosen] == [0, 0, 1, 1, 2, 2] and not notes
    assert chosen == few(found, 2, seed=0)[0] != few(found, 2, seed=3)[0]
    chosen, notes = few(found, 9, seed=0)
    assert len(chosen) == 12 and notes[0] == "class 'blue' has 4 training pictures, fewer than the 9 shots"


# -- decoding in threads -----------------------------------------------------------------------------------------------


def test_threads_that_overlap_leave_the_warnings_filters_as_they_were(monkeypatch):
    """The first to come leaves first: with `catch_warnings` in each, the second would put "ignore" back for good."""
    inside, left, before = threading.Barrier(2), threading.Event(), list(warnings.filters)

    def opened(stream):
        inside.wait(10)
        if stream is last:
            assert left.wait(10)
        raise decode.Unusable("enough")

    monkeypatch.setattr(decode, "_opened", opened)
    first, last = io.BytesIO(b"1"), io.BytesIO(b"2")

    def use(stream):
        with pytest.raises(decode.Unusable):
            decode.decode(stream)
        left.set()

    threads = [threading.Thread(target=use, args=(stream,)) for stream in (first, last)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert left.is_set() and not any(thread.is_alive() for thread in threads) and warnings.filters == before


def test_only_pils_own_warnings_are_off_while_decoding():
    with decode._quiet, decode._quiet:
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "x.py", 1, module="PIL.TiffImagePlugin")
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn_explicit("mine", UserWarning, "y.py", 1, module="mine")


def test_a_picture_that_went_bad_meanwhile_is_named(tmp_path):
    items = read_folder(folder(tmp_path / "d")).train
    kept = Kept([item.path for item in items], lambda image: image.size, lambda size: 1, keep=2)
    sizes = [(20 + i % 4, 22 - i // 4) for i in range(12)]
    assert kept.get([5, 0, 5, 11]) == [sizes[5], sizes[0], sizes[5], sizes[11]] and set(kept.kept) == {5, 0}
    for item in items:
        item.path.write_bytes(b"no more")
    assert kept.get([0, 5]) == [sizes[0], sizes[5]]  # in memory
    with pytest.raises(InputError, match=r"red.3.png was a picture when the run began, and is so no more: its content"):
        kept.get([11])


# -- odd pictures are used as what they are, or named ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "P", "LA", "1"])
def test_odd_modes_are_used_and_look_as_they_should(tmp_path, mode):
    root = folder(tmp_path / "d")
    grey = Image.fromarray(np.tile(np.linspace(0, 255, 24, dtype=np.uint8), (24, 1)))
    if mode == "I;16":
        odd, truth = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), grey.convert("RGB")
    elif mode == "CMYK":
        odd = grey.convert("RGB").convert("CMYK")
        truth = grey.convert("RGB")
    else:
        odd = picture((200, 30, 90), 1).quantize(8) if mode == "P" else grey.convert(mode)
        truth = odd.convert("RGB")
    file = root / "train/red" / ("odd.jpg" if mode == "CMYK" else "odd.png")
    odd.save(file, **({"quality": 100} if mode == "CMYK" else {}))
    found = read_folder(root)
    assert len(found.train) == 13 and found.notes == ()
    difference = np.abs(np.asarray(read_picture(file), int) - np.asarray(truth, int))
    assert difference.max() <= (4 if mode == "CMYK" else 1)


def test_files_that_cannot_be_used_are_named(tmp_path):
    root = folder(tmp_path / "d")
    good = (root / "train/red/0.png").read_bytes()
    (root / "train/red/cut.png").write_bytes(good[: len(good) // 2])
    (root / "train/red/no picture.jpg").write_text("hello")
    (root / "train/red/note.txt").write_text("hello")
    (root / "train/red/more").mkdir()
    (root / "train/stray.png").write_bytes(good)
    (root / "extra").mkdir()
    picture((9, 9, 9), 0, (4, 4)).save(root / "val/red/small.png")
    found = read_folder(root)
    told = "\n".join(found.notes)
    for name in (
        "train/red/cut.png: truncated", "train/red/no picture.jpg: its content", "train/red/note.txt: not a jpg",
        "train/red/more: a folder", "train/stray.png: not in the folder", "extra: beside train",
        "val/red/small.png: 4 x 4",
    ):  # fmt: skip
        assert name in told
    assert len(found.notes) == 7 and len(found.train) == 12 and len(found.val) == 6


def test_a_picture_in_two_parts_is_noted(tmp_path):
    root = folder(tmp_path / "d")
    (root / "test/red/again.png").write_bytes((root / "train/red/1.png").read_bytes())
    assert read_folder(root).notes == ("1 of test's files are in train too, byte for byte (again.png = 1.png)",)


def test_names_that_are_not_ascii(tmp_path):
    classes = {
        unicodedata.normalize("NFC", n): c for n, c in zip(("café", "日本", "a b"), COLOURS.values(), strict=True)
    }
    root = folder(tmp_path / "d", classes=classes)
    (root / "val/café").rename(root / "val" / unicodedata.normalize("NFD", "café"))  # as macOS writes it
    (root / "train/日本/0.png").rename(root / "train/日本/ü.png")
    found = read_folder(root)
    assert set(found.classes) == set(classes) and found.notes == () and len(found.val) == 6
    for name in ("NFC", "NFD"):
        (root / "train" / unicodedata.normalize(name, "é")).mkdir()
    with pytest.raises(InputError, match="two folders named 'é'"):
        read_folder(root)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "change", "message"),
    [
        ({"": 1}, None, r"the class 'blue' has 1 picture; 3 are needed for train, val and test"),
        ({"train": 1}, None, r"the class 'blue' has 1 picture; 2 are needed, since there is no val"),
        ({"train": 2, "val": 1}, "empty", r"'red' has no usable picture: in .*red it is empty"),
        ({"": 4}, "broken", r"'red' has no usable picture: in .*red all its files were skipped"),
        (None, "strange", r"has the class 'teal', which .*train lacks; it has blue, green, red"),
        (None, "twice", r"has val and valid; keep one"),
        (None, "noval", r"val holds no usable picture"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(tmp_path, counts, change, message):
    root = folder(tmp_path / "d", counts)
    match change:
        case "empty":
            for file in (root / "train/red").iterdir():
                file.unlink()
        case "broken":
            for file in (root / "red").iterdir():
                file.write_text("nothing")
        case "strange":
            folder(root, {"test": 1}, {"teal": (0, 128, 128)})
        case "twice":
            (root / "valid").mkdir()
        case "noval":
            for file in (root / "val").rglob("*.png"):
                file.unlink()
    with pytest.raises(InputError, match=message):
        read_folder(root)


def test_a_folder_of_data_sets_is_no_data_set(tmp_path):
    folder(tmp_path / "all/one"), folder(tmp_path / "all/two")
    with pytest.raises(
        InputError, match=r"the class 'one' has no usable picture: in .*deeper \(--data .*all.one, perhaps\)"
    ):
        read_folder(tmp_path / "all")


def test_other_places_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder owner/pets.*hf download owner/pets"):
        read_folder(type(tmp_path)("owner/pets"))
    with pytest.raises(InputError, match="has no class folders"):
        read_folder(tmp_path)
    folder(tmp_path, {"": 3}, {"red": (255, 0, 0)})
    with pytest.raises(InputError, match="has one class, 'red'"):
        read_folder(tmp_path)
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="is a file"):
        read_folder(tmp_path / "f")


def test_labelled_pictures_have_exactly_the_classes_asked_for(tmp_path):
    root = folder(tmp_path / "d", {"": 2})
    items, notes = read_labelled(root, ["red", "green", "blue"])
    assert [("red", "green", "blue")[i.label] for i in items] == [i.path.parent.name for i in items] and notes == []
    with pytest.raises(InputError, match=r"has 'blue', which the adapter does not know and lacks 'teal'"):
        read_labelled(root, ["red", "green", "teal"])
    with pytest.raises(InputError, match=r"lacks 'teal'"):
        read_labelled(root, ["red", "green", "blue", "teal"])
    with pytest.raises(Unusable):
        read_picture(root)
