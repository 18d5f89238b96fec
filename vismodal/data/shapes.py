"""Where a picture is cut, and which shape a picture keeps: plain arithmetic on widths and heights."""

from __future__ import annotations

import math

import torch

LONGEST = 2.0  # a bucket's longer side over its shorter one: beyond, models draw their subject twice


def bucket(width: int, height: int, size: int, grid: int) -> tuple[int, int]:
    """The shape (height, width) of a picture that keeps its own: about as many pixels as a square of `size`.

    The sides of that area and the picture's ratio, each rounded to the next multiple of `grid`; the ratio goes up to
    2:1, and what a picture has beyond is cut. A square keeps `size`, where that is a multiple of `grid`.
    """
    ratio = min(max(width / height, 1 / LONGEST), LONGEST)
    sides = size / math.sqrt(ratio), size * math.sqrt(ratio)
    tall, wide = (max(1, math.floor(side / grid + 0.5)) * grid for side in sides)
    return tall, wide


def cut_box(
    width: int, height: int, shape: tuple[int, int], generator: torch.Generator | None = None
) -> tuple[float, float, float, float]:
    """The largest box of the shape's ratio within a picture: (left, top, right, bottom) in the picture's pixels.

    It lies in the middle, or where `generator` puts it. `shape` is (height, width) of what becomes of it.
    """
    tall, wide = shape
    if wide * height >= tall * width:  # the picture's whole width
        start, length = _place(height, width, tall, wide, generator)
        return (0, start, width, start + length)
    start, length = _place(width, height, wide, tall, generator)
    return (start, 0, start + length, height)


def _place(long: int, short: int, along: int, across: int, generator: torch.Generator | None) -> tuple[float, float]:
    """Start and length of the box along the side that it does not fill."""
    # Whole steps of *output* pixels: a picture that has the right size already is then cut, not interpolated.
    steps = max(0, round(long * across / short) - along)
    step = steps // 2 if generator is None else int(torch.randint(steps + 1, (), generator=generator))
    length = min(along * short / across, long)  # no rounding beyond the picture's end
    return min(step * short / across, long - length), length
