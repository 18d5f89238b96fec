"""What is uploaded to the studio: taken, named with its reason, or refused; never written outside its folder."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from vismodal.cli import load_app
from vismodal.data.photos import read_photos
from vismodal.errors import InputError

intake_module, archives = load_app("studio.intake"), load_app("studio.archives")
Intake, Limits = intake_module.Intake, intake_module.Limits


@pytest.fixture
def intake(tmp_path: Path):
    return Intake(tmp_path / "home", Limits())


def picture(size: tuple[int, int] = (24, 32), kind: str = "png", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


def put(folder: Path, files: dict[str, bytes | str]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return [folder / name for name in files]


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A png that says it is huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 10_000))
        + chunk(b"IEND", b"")
    )


def test_pictures_keep_every_pixel_lose_all_else_and_find_their_captions(intake, tmp_path):
    files = {"a.png": picture(seed=1) + b"<script>alert(1)</script>", "b.webp": picture(kind="webp", seed=2)}
    loose = put(tmp_path / "loose", {**files, "a.txt": "sks dog\nruns"})
    rows = '{"file_name": "c.png", "text": "by row"}\n{"file_name": "d.png", "text": "row"}\n'
    inside = {
        "in/c.png": picture(seed=3),
        "in/d.png": picture(seed=4),
        "in/d.txt": "by text",
        "in/metadata.jsonl": rows,
    }
    upload = intake.pictures([*loose, zipped(tmp_path / "more.zip", inside)])
    assert upload.rejected == ()
    assert list(upload.pictures.values()) == ["a.png", "b.webp", "in/c.png", "in/d.png"]
    found = read_photos(intake.folder(upload.id))
    assert found.rejected == ()
    assert [photo.caption for photo in found.photos] == ["sks dog runs", None, "by row", "by text"]
    for photo, seed in zip(found.photos, range(1, 5), strict=True):
        assert np.array_equal(np.asarray(photo.image), np.asarray(Image.open(io.BytesIO(picture(seed=seed)))))
        assert b"script" not in photo.path.read_bytes()
    intake.caption(upload.id, "0002.png", " sks  dog sits ")
    intake.caption(upload.id, "0001.png", "")
    assert [text for _, _, text in intake.captions(upload.id)] == ["", "sks dog sits", "by row", "by text"]
    for name in ("../" + upload.id, "..", "", "a" * 16, str(intake.folder(upload.id))):
        with pytest.raises(InputError, match="not here any more"):
            intake.folder(name)
    with pytest.raises(InputError, match="no picture"):
        intake.caption(upload.id, "../0001.png", "x")


HOSTILE = {
    "bomb.png": (bomb(), "decompression bomb"),
    "empty.png": (b"", "empty file"),
    "cut.png": (picture()[:200], "truncated or corrupt"),
    "text.png": ("no picture " * 100, "its content is no jpg, png or webp"),
    "svg.png": ('<svg xmlns="http://www.w3.org/2000/svg"/>', "its content is no jpg, png or webp"),
    "tiny.png": (picture((4, 4)), "too small"),
    "page.html": ("<script>", "not a jpg, png or webp picture"),
    "pickle.pt": (b"\x80\x04.", "not a jpg, png or webp picture"),
    "big.png": (picture() + b"\0" * 200_000, "more than 0.0954 MiB"),
    "lonely.txt": ("a caption", "belongs to no picture"),
    "a\nb\x1b[2J.png": (b"x", "its content is no jpg"),
    "fifty-mb.png": ("text " * 10_000_000, "more than 0.0954 MiB"),
}


def test_hostile_files_are_named_with_their_reason_and_leave_nothing(intake, tmp_path):
    intake.limits = replace(intake.limits, file=100_000)
    paths = put(tmp_path / "hostile", {name: data for name, (data, _) in HOSTILE.items()})
    before = set(tmp_path.rglob("*"))
    upload = intake.pictures([*paths, *put(tmp_path / "good", {"good.png": picture()})])
    assert list(upload.pictures.values()) == ["good.png"] and len(upload.rejected) == len(HOSTILE)
    for name, (_, reason) in HOSTILE.items():
        line = next(text for text in upload.rejected if text.startswith(name.split("\n")[0].split(".")[0]))
        assert reason in line and line.isprintable()
    with pytest.raises(InputError, match=r"no usable picture: bomb\.png: 60000 x 60000"):
        intake.pictures(paths[:1])
    new = set(tmp_path.rglob("*")) - before
    inside = intake.folder(upload.id)
    assert {path for path in new if path.is_relative_to(tmp_path / "home")} == {
        inside,
        inside / "0001.png",
        inside / ".names.json",
    }


def test_damaged_files_never_bring_it_down(intake, tmp_path):
    """Whole pictures and zips with bytes cut, flipped, doubled or swapped; `make stress` tries 200."""
    dice = random.Random(1)
    whole = [
        picture(),
        picture(kind="jpeg"),
        picture(kind="webp"),
        zipped(tmp_path / "z.zip", {"a.png": picture()}).read_bytes(),
    ]
    folder = tmp_path / "up"
    for number in range(int(os.environ.get("VISMODAL_STRESS_UPLOADS", "24"))):
        data = bytearray(dice.choice(whole))
        at, to = sorted(dice.randrange(len(data)) for _ in range(2))
        match number % 4:
            case 0:
                del data[at:to]
            case 1:
                for place in range(at, min(to, at + 40)):
                    data[place] = dice.randrange(256)
            case 2:
                data[at:at] = data[:to]
            case 3:
                data = data[:at] + dice.choice(whole)[to:]
        (path,) = put(folder, {f"{number}.{dice.choice(('png', 'jpg', 'webp', 'zip'))}": bytes(data)})
        try:
            upload = intake.pictures([path])
            for photo in read_photos(intake.folder(upload.id)).photos:
                assert photo.image.mode == "RGB"
        except InputError as error:
            assert "no usable picture" in str(error)
    ours = (folder, tmp_path / "z.zip")
    inside = [path for path in tmp_path.rglob("*") if path not in ours and path.parent != folder]
    assert all(path.is_relative_to(intake.home) for path in inside)


def test_hostile_zips_stay_inside(intake, tmp_path):
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../../up.png", "/abs.png", "a/../../b.png", "..\\win.png", "C:/drive.png"):
            archive.writestr(name, picture())
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("inner.zip", b"PK\x03\x04")
        archive.writestr("good.png", picture())
        archive.writestr("__MACOSX/._good.png", b"x")
    upload = intake.pictures([path])
    assert list(upload.pictures.values()) == ["good.png"]
    reasons = " ".join(upload.rejected)
    assert reasons.count("leads out of the zip") == 5 and "a link" in reasons and "a zip in a zip" in reasons
    written = [p.relative_to(tmp_path) for p in tmp_path.rglob("*.png")]
    assert written == [Path("home/sets") / upload.id / "0001.png"]
    with pytest.raises(InputError, match="no zip that can be read"):
        intake.pictures(put(tmp_path / "bad", {"bad.zip": b"PK\x03\x04nonsense"}))


def test_caps_refuse_the_whole_upload_and_lies_about_sizes_do_not_help(intake, tmp_path):
    many = zipped(tmp_path / "many.zip", {f"{i}.png": picture() for i in range(5)})
    zeros = zipped(tmp_path / "zeros.zip", {"zeros.png": b"\0" * 3_000_000})
    intake.limits = replace(Limits(), count=4)
    with pytest.raises(InputError, match="more than 4 files"):
        intake.pictures([many])
    intake.limits = replace(Limits(), upload=2_000_000)
    with pytest.raises(InputError, match="came at once, unpacked"):
        intake.pictures([zeros])
    intake.limits = replace(Limits(), file=1000)
    with zipfile.ZipFile(zeros) as archive:
        info = archive.infolist()[0]
        lying = archives.Entry(PurePosixPath("x.png"), 10, (archive, info))
        with pytest.raises(archives.Unusable, match="more than"):
            archives.read(lying, 1000)
    intake.limits = replace(Limits(), total=10)
    put(intake.home, {"used": b"x" * 20})
    with pytest.raises(InputError, match="delete some jobs"):
        intake.pictures([many])
    assert list(intake.sets.iterdir()) == []


def test_a_zip_of_very_many_names_is_refused_before_it_is_read(intake, tmp_path, monkeypatch):
    intake.limits = replace(intake.limits, count=10)
    path = zipped(tmp_path / "many.zip", {f"{'x' * 200}{i}.txt": "" for i in range(100)})
    with monkeypatch.context() as patch, pytest.raises(InputError, match="more than 10 files"):
        patch.delattr(load_app("studio.archives").zipfile, "ZipFile")
        intake.pictures([path])
    junk = {f"__MACOSX/{i}": b"" for i in range(21)} | {"good.png": picture()}
    with pytest.raises(InputError, match="more than 10 files"):  # none of it silently: a good one may come last
        intake.pictures([zipped(tmp_path / "junk.zip", junk)])


def test_a_file_with_two_names_takes_its_bytes_once(tmp_path):
    size_of = load_app("studio.folders").size_of
    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "c").write_bytes(b"x" * 10)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert size_of(tmp_path) == 1010


def test_classes_come_from_the_folders_of_a_zip(intake, tmp_path):
    names = [f"pets/{label}/{i}.png" for label in ("cat", "../dog".replace("../", "dög ")) for i in range(3)]
    path = zipped(tmp_path / "pets.zip", {**{n: picture(seed=i) for i, n in enumerate(names)}, "loose.png": picture()})
    upload = intake.pictures([path], classes=True)
    folder = intake.folder(upload.id)
    assert upload.rejected == ("loose.png: not in the folder of a class",)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["class-000", "class-001"]
    assert set(json.loads((folder / ".vismodal.json").read_text())["classes"].values()) == {"cat", "dög dog"}
    with pytest.raises(InputError, match="one class only"):
        intake.pictures([zipped(tmp_path / "one.zip", {"cat/1.png": picture()})], classes=True)


def test_adapter_files_are_safetensors_or_refused(intake, tmp_path):
    from safetensors.numpy import save

    good, pickle, cut = put(
        tmp_path / "up",
        {"a.safetensors": save({"x": np.ones(3)}), "b.pt": b"\x80\x04.", "c.safetensors": b"\x08\0\0\0"},
    )
    kept = intake.adapter(good)
    assert kept.parent == intake.files and kept.read_bytes() == good.read_bytes()
    for bad in (pickle, cut):
        with pytest.raises(InputError, match="pickles are never read"):
            intake.adapter(bad)
    assert list(intake.files.iterdir()) == [kept]
