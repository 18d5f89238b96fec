"""From a picture to the square tensor that a model trains on: exact, antialiased, drawn from a generator only."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vismodal.data.photos import pixels


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth picture that no turn or mirroring leaves as it is."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    red, green = 255 * x / width, 255 * y / height
    return Image.fromarray(np.stack([red, green, 80 + 60 * (x > y)], axis=-1).astype(np.uint8))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pixels_of_the_right_size_are_exact() -> None:
    image = scene(32, 32)
    tensor = pixels(image, 32)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 32, 32)
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(tensor, expected.float())
    white = pixels(Image.new("RGB", (20, 20), "white"), 8)
    assert torch.equal(white, torch.ones(3, 8, 8)) and torch.equal(
        pixels(Image.new("RGB", (9, 9)), 8), -torch.ones(3, 8, 8)
    )


@pytest.mark.parametrize("size", [(52, 32), (32, 52)])
def test_center_crop_cuts_the_middle_exactly(size: tuple[int, int]) -> None:
    image = scene(*size)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    assert torch.equal(pixels(image, 32), pixels(image.crop((left, top, left + 32, top + 32)), 32))


def test_shrinking_is_antialiased() -> None:
    """A one-pixel checkerboard shrinks to grey; without antialiasing it would stay black and white."""
    y, x = np.mgrid[0:256, 0:256]
    board = Image.fromarray((255 * ((x + y) % 2)).astype(np.uint8)).convert("RGB")
    assert pixels(board, 32)[:, 4:-4, 4:-4].abs().max() < 0.05


def test_resizing_agrees_with_resizing_the_whole_picture() -> None:
    image = scene(300, 200)
    whole = image.resize((96, 64), Image.Resampling.BICUBIC).crop((16, 0, 80, 64))
    assert (pixels(image, 64) - pixels(whole, 64)).abs().max() < 2.5 / 127.5


def test_random_crops_reach_both_ends_and_repeat_with_the_seed() -> None:
    image = scene(40, 32)  # 9 places
    crops = [pixels(image, 32, crop="random", generator=generator(seed)) for seed in range(80)]
    places = {round(float(crop[0, 0, 0] + 1) * 127.5 * 40 / 255) for crop in crops}
    assert places == set(range(9))
    assert torch.equal(crops[3], pixels(image, 32, crop="random", generator=generator(3)))


def test_flip_mirrors_half_of_the_times_and_does_not_move_the_crop() -> None:
    image, mirrored = scene(40, 32), 0
    for seed in range(60):
        plain = pixels(image, 32, crop="random", generator=generator(seed))
        flipped = pixels(image, 32, crop="random", flip=True, generator=generator(seed))
        assert torch.equal(flipped, plain) or torch.equal(flipped, plain.flip(-1))
        mirrored += not torch.equal(flipped, plain)
    assert 15 < mirrored < 45


def test_a_long_strip_costs_no_memory() -> None:
    """Resized whole to 512 this strip would have 1.6 gigapixels."""
    assert pixels(Image.new("RGB", (100_000, 16)), 512, crop="random", generator=generator(0)).shape == (3, 512, 512)


@pytest.mark.parametrize(
    "image, size, options, part",
    [
        (scene(), 8, {"flip": True}, "generator=torch.Generator()"),
        (scene(), 8, {"crop": "random"}, "generator=torch.Generator()"),
        (scene(), 8, {"crop": "centre"}, 'crop is "center" or "random", not \'centre\''),
        (scene().convert("L"), 8, {}, "an RGB picture and a size of at least 1, not L and 8"),
        (scene(), 0, {}, "an RGB picture and a size of at least 1, not RGB and 0"),
    ],
)
def test_wrong_calls_say_what_to_write(image: Image.Image, size: int, options: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)):
        pixels(image, size, **options)
