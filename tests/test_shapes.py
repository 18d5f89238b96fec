"""Cuts of any shape, buckets, and the masks that are cut with their pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vismodal import runs
from vismodal.data.masks import mask_values
from vismodal.data.photos import cut, read_photos
from vismodal.data.shapes import bucket, cut_box
from vismodal.errors import InputError


def square_by_hand(width: int, height: int, size: int, step: int | None) -> tuple[float, float, float, float]:
    """The box of a square as it was before there were shapes; `step` of the output's pixels, or in the middle."""
    short, long = min(width, height), max(width, height)
    steps = max(0, round(long * size / short) - size)
    start = min((steps // 2 if step is None else step) * short / size, long - short)
    return (start, 0, start + short, short) if width > height else (0, start, short, start + short)


def test_a_square_is_cut_as_ever() -> None:
    for width, height, size in [(48, 32, 32), (32, 48, 16), (33, 33, 8), (1000, 301, 512), (17, 90, 64)]:
        assert cut_box(width, height, (size, size)) == square_by_hand(width, height, size, None)
        steps = max(0, round(max(width, height) * size / min(width, height)) - size)
        for seed in range(5):
            drawn = int(torch.randint(steps + 1, (), generator=torch.Generator().manual_seed(seed)))
            box = cut_box(width, height, (size, size), torch.Generator().manual_seed(seed))
            assert box == square_by_hand(width, height, size, drawn)


def test_any_box_is_the_largest_of_its_ratio_within_the_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        width, height, tall, wide = (int(n) for n in torch.randint(3, 700, (4,), generator=generator))
        left, top, right, bottom = cut_box(width, height, (tall, wide), generator)
        assert min(left, top) >= 0 and right <= width + 1e-9 and bottom <= height + 1e-9
        assert (right - left, bottom - top) == pytest.approx(
            (min(width, height * wide / tall), min(height, width * tall / wide))
        )
        cut(Image.new("RGB", (width, height)), (8, 8), (left, top, right, bottom))  # PIL takes it


@pytest.mark.parametrize(("photo", "size", "grid", "shape"), [
    ((3000, 2000), 512, 64, (448, 640)),  # 418 x 627
    ((2000, 3000), 512, 64, (640, 448)),
    ((1024, 1024), 512, 64, (512, 512)),
    ((4000, 3000), 1024, 32, (896, 1184)),  # 886.8 x 1182.4
    ((9000, 1000), 512, 64, (384, 704)),  # 2:1 and no longer: 362 x 724
    ((5, 5), 16, 4, (16, 16)),
])  # fmt: skip
def test_buckets_by_hand(photo: tuple[int, int], size: int, grid: int, shape: tuple[int, int]) -> None:
    assert bucket(*photo, size, grid) == shape


def test_a_bucket_is_near_the_squares_area_and_the_pictures_ratio() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        width, height = (int(n) for n in torch.randint(500, 1000, (2,), generator=generator))
        tall, wide = bucket(width, height, 1024, 64)
        assert tall % 64 == wide % 64 == 0
        assert abs(wide - 1024 * (width / height) ** 0.5) <= 32 and abs(tall - 1024 * (height / width) ** 0.5) <= 32


# -- masks -----------------------------------------------------------------------------------------------------------


def test_masks_are_read_with_their_photos_and_are_no_photos(tmp_path: Path) -> None:
    for name, size in (("a.jpg", (60, 40)), ("b.png", (30, 30)), ("c.png", (20, 20)), ("e.png", (20, 20))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    left = Image.new("L", (60, 40))
    left.paste(255, (0, 0, 30, 40))
    left.save(tmp_path / "a.mask.png")
    left.save(tmp_path / "nobody.mask.png")
    left.save(tmp_path / "b.mask.png")  # another size
    Image.new("L", (20, 20)).save(tmp_path / "c.mask.png")  # black
    (tmp_path / "e.MASK.PNG").write_bytes(b"torn")
    found = read_photos(tmp_path, side=20)
    assert [p.path.name for p in found.photos] == ["a.jpg", "b.png", "c.png", "e.png"]
    first = found.photos[0]
    assert first.mask is not None and first.mask.size == first.image.size == (30, 20)
    assert np.asarray(first.mask)[0].tolist() == [255] * 15 + [0] * 15
    assert [p.mask for p in found.photos[1:]] == [None] * 3
    told = {r.path.name: r.reason for r in found.rejected}
    assert told.keys() == {"nobody.mask.png", "b.mask.png", "c.mask.png", "e.MASK.PNG"}
    assert "belongs to no photo (a.mask.png is the mask of a.jpg)" in told["nobody.mask.png"]
    assert "a mask of 60 x 40 pixels, where b.png has 30 x 30" in told["b.mask.png"]
    assert "black everywhere" in told["c.mask.png"]
    photos = runs.read_and_tell(tmp_path)
    assert runs.digest(photos) != runs.digest(runs.read_and_tell(tmp_path, masks=False))  # a resume compares them
    (tmp_path / "alone").mkdir()
    left.save(tmp_path / "alone" / "x.mask.png")
    with pytest.raises(InputError, match=r"holds no usable photo: x\.mask\.png \(a mask that belongs to no photo"):
        read_photos(tmp_path / "alone")


def test_values_of_a_mask_are_averages_of_areas() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (12, 16)).astype(np.uint8)
    values = mask_values(Image.fromarray(grey), (3, 2), (4, 0, 12, 12))
    by_hand = (grey[:, 4:12].reshape(3, 4, 2, 4) / 255).mean((1, 3))
    torch.testing.assert_close(values, torch.from_numpy(by_hand).float())
