"""Data sets of the package `datasets` as folders of pictures: columns, splits, names, bytes, and what can be wrong."""

from __future__ import annotations

import io
import sys

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as Encoded
from pictures import COLOURS, folder, picture, tiny_vit

from vismodal import cli
from vismodal.data import hub
from vismodal.data.folder import read_folder, read_labelled
from vismodal.data.hub import as_folder
from vismodal.errors import InputError

NAMES = ["a/b unit", "..", "собака"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def jpeg(seed=0, kind="JPEG", mode="RGB"):
    out = io.BytesIO()
    picture(list(COLOURS.values())[seed % 3], seed).convert(mode).save(out, kind)
    return out.getvalue()


def table(count, kind=None, first=0, **columns):
    """Pictures as bytes, and labels 0, 1, 2, 0, ..."""
    rows = {"image": [{"bytes": jpeg(first + i), "path": None} for i in range(count)]}
    rows["label"] = [i % 3 for i in range(count)]
    features = {"image": Encoded(), "label": kind or ClassLabel(names=NAMES)}
    return Dataset.from_dict(rows | columns, features=Features(features))


def saved(place, data):
    data.save_to_disk(place)
    return place


def read(place, tmp_path, **columns):
    return read_folder(as_folder(place, tmp_path / "cache", **columns))


def rows_of(found, part):
    """Row, class and content of each picture."""
    return sorted((int(i.path.stem), found.classes[i.label], i.path.read_bytes()) for i in getattr(found, part))


def test_splits_classes_and_bytes_are_those_of_the_data(tmp_path):
    data = DatasetDict({"train": table(9), "valid": table(3, first=20), "test": table(6, first=40)})
    found = read(saved(tmp_path / "d", data), tmp_path)
    assert found.classes == tuple(NAMES) and found.notes == ()  # in the data's order, under their true names
    for part, count, first in (("train", 9, 0), ("val", 3, 20), ("test", 6, 40)):
        assert rows_of(found, part) == [(i, NAMES[i % 3], jpeg(first + i)) for i in range(count)]
    items, notes = read_labelled(found.root / "test", NAMES)  # what `vismodal predict --data` reads
    assert [NAMES[i.label] for i in items] == [found.classes[i.label] for i in found.test] and notes == []


def test_one_split_has_no_parts(tmp_path):
    for name, data in (("a", table(15)), ("b", DatasetDict({"train": table(15)}))):
        found = read(saved(tmp_path / name, data), tmp_path)
        assert (len(found.train), len(found.val), len(found.test), found.classes) == (9, 3, 3, tuple(NAMES))


def test_a_folder_of_parquet_and_an_id(tmp_path, monkeypatch):
    place = tmp_path / "p" / "data"
    place.mkdir(parents=True)
    table(6).to_parquet(place / "train-00000-of-00001.parquet")
    table(3, first=20).to_parquet(place / "test-00000-of-00001.parquet")
    found = read(place.parent, tmp_path)
    assert found.classes == tuple(NAMES) and len(found.train) == 3 and len(found.test) == 3
    loaded, asked = datasets.load_dataset, []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or loaded(str(place.parent)))
    again = read(type(tmp_path)("owner/pets"), tmp_path)
    assert asked == ["owner/pets"] and again.digest == found.digest and again.root.name.startswith("owner--pets-")


def test_written_once_for_each_content_and_choice_of_columns(tmp_path, monkeypatch):
    place, cache = tmp_path / "d", tmp_path / "cache"
    first = as_folder(saved(place, table(9)), cache)
    monkeypatch.setattr(hub, "_write", None)
    assert as_folder(place, cache) == first
    monkeypatch.undo()
    assert as_folder(saved(tmp_path / "e" / "d", table(9, first=5)), cache) != first
    both = table(9).add_column("other", [str(i % 2) for i in range(9)])
    a, b = (as_folder(saved(tmp_path / "b", both), cache, label=label) for label in (None, "other"))
    assert a != b and read_folder(b).classes == ("0", "1")
    assert not list(cache.glob(".*"))


def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    place = saved(tmp_path / "d", table(9))
    whole, seen = hub._file, []

    def stopped(content):
        seen.append(content)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return whole(content)

    monkeypatch.setattr(hub, "_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        as_folder(place, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(list(as_folder(place, tmp_path / "cache").glob("*/*.jpg"))) == 9


@pytest.mark.parametrize(
    ("kind", "values", "classes"),
    [
        ("string", ["é", "e\u0301", "z/10", "z/2", "", None], ("z/2", "z/10", "é")),
        ("int64", [10, 10, 2, 2, -1, None], ("2", "10", "-1")),
        ("bool", [True, False, True, False, True, None], ("False", "True")),
    ],
)
def test_without_class_labels(tmp_path, kind, values, classes):
    data = table(24, Value(kind), label=values * 4)
    found = read(saved(tmp_path / "d", data), tmp_path)
    assert found.classes == classes
    lacking = [i for i in range(24) if values[i % 6] in ("", None)]
    assert list(found.notes)[: len(lacking)] == [f"train, row {i}: no label" for i in lacking]


def test_rows_and_splits_that_cannot_serve_are_named(tmp_path):
    pictures = [{"bytes": jpeg(i), "path": None} for i in range(9)]
    pictures[1], pictures[5] = None, {"bytes": b"no picture", "path": "x.jpg"}
    train = table(9, image=pictures, label=[0, 1, 1, 0, 1, 1, -1, None, 0])
    parts = {"train": train, "val": table(2, first=20), "test": table(4, label=[-1] * 4), "raw": table(1)}
    found = read(saved(tmp_path / "d", DatasetDict(parts)), tmp_path)
    assert [n.partition(" is none")[0] for n in found.notes] == [
        "the split test: not read, since none of its rows has a label",
        "the split raw: not read, since its name",
        "classes without a picture: собака",
        "train, row 1: no picture",
        "train, row 6: no label",
        "train, row 7: no label",
        "train/1__/5.bin: not a jpg, png or webp picture",
    ]


@pytest.mark.parametrize(("kind", "mode"), [("BMP", "RGB"), ("TIFF", "CMYK"), ("GIF", "P"), ("TIFF", "F")])
def test_other_formats_become_png_or_are_named(kind, mode):
    content = jpeg(0, kind, mode)
    written, suffix = hub._file(content)
    if mode == "F":  # what grey is white, nobody knows
        assert (written, suffix) == (content, ".bin")
    else:
        from PIL import Image

        a, b = (Image.open(io.BytesIO(x)).convert("RGB") for x in (content, written))
        assert suffix == ".png" and a.tobytes() == b.tobytes()


def test_columns_that_do_not_tell(tmp_path):
    def refused(data, **columns):
        with pytest.raises(InputError) as error:
            as_folder(saved(tmp_path / f"d{len(list(tmp_path.iterdir()))}", data), tmp_path / "cache", **columns)
        return str(error.value)

    data = table(6)
    two = data.add_column("fine", [0] * 6).cast_column("fine", ClassLabel(names=["x", "y"]))
    assert "several columns that may be the label, label, fine; write --label_column NAME" in refused(two)
    assert "has no column 'kind'; it has image (Image), label (ClassLabel)" in refused(data, label="kind")
    assert "no column of type image; write --image_column" in refused(data.remove_columns("image"))
    assert "holds no names or numbers of classes" in refused(data, label="image")
    assert "has a label" in refused(table(3, Value("string"), label=[None] * 3))
    assert "has the splits val, test" in refused(DatasetDict({"val": data, "test": data}))
    assert "has the splits train, val, dev" in refused(DatasetDict({"train": data, "val": data, "dev": data}))


def test_a_column_of_bytes_is_taken_where_it_is_named(tmp_path):
    plain = Dataset.from_dict({"file": [jpeg(i) for i in range(15)], "label": [f"n{i % 3}" for i in range(15)]})
    found = read(saved(tmp_path / "d", plain), tmp_path, image="file")
    assert found.classes == ("n0", "n1", "n2") and len(found.train) == 9


def test_a_folder_of_pictures_stays_one(tmp_path):
    place = folder(tmp_path / "d")
    table(3).to_parquet(place / "more.parquet")
    assert as_folder(place, tmp_path / "cache") == place and as_folder(None, tmp_path) is None
    assert as_folder(tmp_path / "gone", tmp_path) == tmp_path / "gone"  # `read_folder` says that it is not there
    with pytest.raises(InputError, match="leave them out"):
        as_folder(place, tmp_path / "cache", label="label")


def test_without_the_package_or_the_data(tmp_path, monkeypatch):
    def nothing(name):
        raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", nothing)
    pets, local = type(tmp_path)("owner/pets"), saved(tmp_path / "d", table(3))
    with pytest.raises(InputError, match=r"no folder owner/pets.*hf download owner/pets.*doesn't exist on the Hub"):
        as_folder(pets, tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hf download owner/pets.*pip install \"vismodal\[datasets\]\""):
        as_folder(pets, tmp_path)
    with pytest.raises(InputError, match=r"d is a data set .* not installed; write pip install"):
        as_folder(local, tmp_path)


def test_classify_learns_from_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = saved(tmp_path / "d", table(15))
    model = tiny_vit(tmp_path / "model")
    line = f"classify --data {data} --model {model} --epochs 1 --output out --label_column label --threads 1"
    assert cli.main(line.split()) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "runs" / "datasets").glob("d-*/*/*.jpg"))) == 15
    assert "a/b unit" in (tmp_path / "out" / "results.json").read_text()
