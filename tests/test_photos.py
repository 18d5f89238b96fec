"""Photo folders as people have them: usable pictures come out right, every other file is named with its reason."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from vismodal.data.photos import Photo, Photos, pixels, read_photos
from vismodal.errors import InputError


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth picture that no turn or mirroring leaves as it is."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    red, green = 255 * x / width, 255 * y / height
    return Image.fromarray(np.stack([red, green, 80 + 60 * (x > y)], axis=-1).astype(np.uint8))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, data: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand: what PIL cannot write, and headers that lie."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = header + extra + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def only(folder: Path) -> Photo:
    found = read_photos(folder)
    assert len(found.photos) == 1 and not found.rejected
    return found.photos[0]


def reasons(found: Photos) -> dict[str, str]:
    return {skipped.path.name: skipped.reason for skipped in found.rejected}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder with one good photo, `good.png`."""
    scene().save(tmp_path / "good.png")
    return tmp_path


# --- pictures that are used


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.png", "a.webp", "A.JPG", "a.b.Png"])
def test_reads_every_format(tmp_path: Path, name: str) -> None:
    scene().save(tmp_path / name, quality=95)
    photo = only(tmp_path)
    assert photo.path == tmp_path / name and photo.image.mode == "RGB" and photo.image.size == (48, 32)
    assert np.abs(array(photo.image) - array(scene())).mean() < (1e-9 if name.lower().endswith("png") else 4)


def test_the_content_says_the_format_not_the_name(tmp_path: Path) -> None:
    scene().save(tmp_path / "really_webp.jpg", format="WEBP", lossless=True)
    assert (array(only(tmp_path).image) == array(scene())).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    """What is stored is the true picture put wrong; reading gives the true one."""
    wrong = {  # how a camera stores the upright picture under each value
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(wrong[orientation](np.asarray(scene()))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif, lossless=True, quality=100)
    image = only(tmp_path).image
    assert image.size == (48, 32)
    assert np.abs(array(image) - array(scene())).mean() <= (4 if suffix == "jpg" else 0)
    assert np.abs(array(image) - array(ImageOps.exif_transpose(Image.open(tmp_path / f"a.{suffix}")))).max() == 0


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0MM\0*"])
def test_damaged_exif_leaves_the_picture_as_stored(tmp_path: Path, exif: bytes) -> None:
    scene().save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert only(tmp_path).image.size == (48, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA-like", "P-transparent", "RGB-key", "webp"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    """Left half opaque grey 60, right half transparent *black*: dropping the alpha would show the black."""
    rgba = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    rgba.paste((60, 60, 60, 255), (0, 0, 16, 32))
    path = tmp_path / "a.png"
    if mode == "LA":
        rgba.convert("LA").save(path)
    elif mode == "PA-like":  # a palette whose entries each have their own alpha
        rgba.quantize(4).save(path)
    elif mode == "P-transparent":  # one entry of the palette is clear
        flat = Image.new("P", (32, 32), 1)
        flat.putpalette([60, 60, 60, 0, 0, 0])
        flat.paste(0, (0, 0, 16, 32))
        flat.save(path, transparency=1)
    elif mode == "RGB-key":
        rgba.convert("RGB").save(path, transparency=(0, 0, 0))
    elif mode == "webp":
        rgba.save(tmp_path / "a.webp", lossless=True, exact=True)
    else:
        rgba.save(path)
    colours = array(only(tmp_path).image)
    assert (colours[:, :16] == 60).all() and (colours[:, 16:] == 255).all()


def test_half_transparency_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert array(only(tmp_path).image)[0, 0].tolist() == [255, 127, 127]


def test_cmyk(tmp_path: Path) -> None:
    scene().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(array(only(tmp_path).image) - array(scene())).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette(tmp_path: Path, mode: str) -> None:
    stored = scene().convert(mode)
    stored.save(tmp_path / "a.png")
    assert (array(only(tmp_path).image) == array(stored)).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.abs(array(only(tmp_path).image)[..., 0] - ramp / 257).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("colour, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("key", [False, True])
def test_sixteen_bit_png_of_every_kind(tmp_path: Path, colour: int, channels: int, key: bool) -> None:
    """Value 200 of 255 in 16 bits, alpha full; a transparent colour key that no pixel has changes nothing."""
    values = np.full((32, 32, channels), 200 * 257, dtype=">u2")
    if colour in (4, 6):
        values[..., -1] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    extra = (
        png_chunk(b"tRNS", struct.pack(">" + "H" * channels, *[1000] * channels)) if key and colour in (0, 2) else b""
    )
    (tmp_path / "a.png").write_bytes(png(32, 32, 16, colour, rows, extra))
    assert (array(only(tmp_path).image) == 200).all()


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert array(only(tmp_path).image)[5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(16, 16), (17, 301), (333, 19), (16, 5000)])
def test_odd_sizes_are_kept(tmp_path: Path, size: tuple[int, int]) -> None:
    scene(*size).save(tmp_path / "a.png")
    image = only(tmp_path).image
    assert image.size == size
    assert pixels(image, 64).shape == (3, 64, 64)


def test_pictures_outlive_their_files_and_pickle(good: Path) -> None:
    import pickle

    photo = pickle.loads(pickle.dumps(only(good)))
    (good / "good.png").unlink()
    assert (array(photo.image) == array(scene())).all()


def test_side_shrinks_on_reading_and_never_enlarges(tmp_path: Path) -> None:
    scene(400, 200).save(tmp_path / "big.png")
    scene(30, 20).save(tmp_path / "small.png")
    sizes = {photo.path.stem: photo.image.size for photo in read_photos(tmp_path, side=50).photos}
    assert sizes == {"big": (100, 50), "small": (30, 20)}


def test_order_is_natural_and_ignores_case(tmp_path: Path) -> None:
    names = ["10.png", "2.png", "b1.png", "B02.png", "a10b2.png", "a9b11.png", "a9b2.png", "01.png", "1.png"]
    for name in names:
        scene().save(tmp_path / name)
    found = [photo.path.name for photo in read_photos(tmp_path).photos]
    assert found == ["01.png", "1.png", "2.png", "10.png", "a9b2.png", "a9b11.png", "a10b2.png", "b1.png", "B02.png"]


# --- files that are named and skipped


def bad_files(folder: Path) -> dict[str, str]:
    """Writes one file of each bad kind; says what its reason must mention."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for suffix in ("jpg", "png", "webp"):
        whole = folder / f"whole.{suffix}"
        noise.save(whole)
        for percent in (20, 60, 90):
            cut = whole.stat().st_size * percent // 100
            (folder / f"cut{percent}.{suffix}").write_bytes(whole.read_bytes()[:cut])
        whole.unlink()
    scene().save(folder / "flipped.png")
    damaged = bytearray((folder / "flipped.png").read_bytes())
    damaged[60] ^= 0xFF
    (folder / "flipped.png").write_bytes(damaged)
    (folder / "bomb.png").write_bytes(png(60000, 60000, 8, 2, b"\0" * 1000))
    Image.new("RGB", (1, 1)).save(folder / "one_pixel.png")
    scene(500, 15).save(folder / "strip.jpg")
    (folder / "words.jpg").write_text("I am no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "magic_only.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "notes.txt").write_text("shopping list")
    (folder / "archive.zip").write_bytes(b"PK")
    scene().save(folder / "old.bmp")
    (folder / "more").mkdir()
    (folder / "nowhere.jpg").symlink_to(folder / "missing.jpg")
    os.mkfifo(folder / "pipe.png")
    cuts = {f"cut{p}.{s}": "truncated or corrupt" for p in (20, 60, 90) for s in ("jpg", "png", "webp")}
    return cuts | {
        "flipped.png": "truncated or corrupt",
        "bomb.png": "60000 x 60000 pixels is too large",
        "one_pixel.png": "1 x 1 pixels is too small",
        "strip.jpg": "500 x 15 pixels is too small",
        "words.jpg": "content is no jpg, png or webp",
        "empty.png": "an empty file",
        "magic_only.jpg": "truncated or corrupt",
        "notes.txt": "belongs to no photo",
        "archive.zip": "not a jpg, png or webp picture",
        "old.bmp": "save it as one of these",
        "more": "a folder",
        "nowhere.jpg": "a broken link",
        "pipe.png": "a broken link or a device",
    }


def test_every_bad_file_is_named_with_its_reason(good: Path) -> None:
    expected = bad_files(good)
    found = read_photos(good)
    assert [photo.path.name for photo in found.photos] == ["good.png"]
    told = reasons(found)
    assert set(told) == set(expected)
    for name, part in expected.items():
        assert part in told[name], (name, told[name])
        assert "\n" not in told[name] and "<_io" not in told[name]
    names = [skipped.path.name for skipped in found.rejected]
    assert names.index("cut20.jpg") < names.index("cut60.jpg") < names.index("notes.txt") < names.index("words.jpg")


@pytest.mark.parametrize("limit", [None, 1, 100, 10**12])
def test_the_bomb_check_is_independent_of_pils(good: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    """PIL's own limit may be off or absurdly low: ours decides, and PIL's is left as it was."""
    (good / "bomb.png").write_bytes(png(60000, 60000, 8, 2, b"\0"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    found = read_photos(good)
    assert [photo.path.name for photo in found.photos] == ["good.png"]
    assert pixels(found.photos[0].image, 32).shape == (3, 32, 32)
    assert "too large" in reasons(found)["bomb.png"]
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_bomb_is_never_decoded(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL.PngImagePlugin import PngImageFile

    decoded: set[tuple[int, int]] = set()
    load = PngImageFile.load

    def recorded(self: PngImageFile) -> object:
        decoded.add(self.size)
        return load(self)

    monkeypatch.setattr(PngImageFile, "load", recorded)
    (good / "bomb.png").write_bytes(png(60000, 60000, 8, 2, b"\0"))
    read_photos(good)
    assert decoded == {(48, 32)}


def test_max_pixels_is_a_bound_that_counts_itself_in(good: Path) -> None:
    assert len(read_photos(good, max_pixels=48 * 32).photos) == 1
    with pytest.raises(InputError, match=r"48 x 32 pixels is too large.*at most 1,535 pixels"):
        read_photos(good, max_pixels=48 * 32 - 1)


def test_hidden_files_are_ignored_silently(good: Path) -> None:
    for name in (".DS_Store", "._good.png", ".hidden.jpg", "Thumbs.db", "desktop.ini"):
        (good / name).write_bytes(b"x")
    (good / "__MACOSX").mkdir()
    assert only(good).path.name == "good.png"


def test_names_cannot_break_the_line(good: Path) -> None:
    name = os.fsdecode(b"evil\nname\x1b[31m\xff.jpg")
    (good / name).write_bytes(b"")
    (skipped,) = read_photos(good).rejected
    assert str(skipped) == "evil name\\x1b[31m\\udcff.jpg: an empty file"
    str(skipped).encode("utf-8")


# --- folders that are errors


def error(folder: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        read_photos(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folder_names_a_near_one(good: Path) -> None:
    (good / "my_photos").mkdir()
    assert f"did you mean {good / 'my_photos'}?" in error(good / "my_photo")
    assert "there is no folder" in error(good / "gone" / "deeper")
    assert "there is no folder" in error("x" * 5000)
    assert "name is empty" in error("")


def test_a_file_instead_of_a_folder(good: Path) -> None:
    assert f"good.png is a file, not a folder; put the photos into a folder, or write {good}" in error(
        good / "good.png"
    )


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert error(tmp_path).startswith(f"{tmp_path} is empty; put a few jpg, png or webp pictures")


def test_a_folder_of_rejected_files_names_the_first_few(tmp_path: Path) -> None:
    for number in range(1, 13):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    message = error(tmp_path)
    assert "1.jpg (an empty file); 2.jpg (an empty file); 3.jpg (an empty file); and 9 more" in message


def test_pictures_in_subfolders_only(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    scene().save(tmp_path / "dog" / "1.jpg")
    (tmp_path / "readme.md").write_text("x")
    assert f"subfolders only, which are not read; write one of them, like {tmp_path / 'dog'}" in error(tmp_path)


def test_a_broken_picture_beside_subfolders_is_what_gets_named(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    scene().save(tmp_path / "dog" / "1.jpg")
    (tmp_path / "mine.jpg").write_bytes(b"")
    assert "no usable photo: dog (a folder;" in error(tmp_path) and "mine.jpg (an empty file)" in error(tmp_path)
