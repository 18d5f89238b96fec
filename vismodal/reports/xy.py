"""Sheets of pictures by two settings, with what they are beside the rows and above the columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 4
_SMALLEST = 128  # pixels of a cell's side: smaller pictures are enlarged by whole factors


def xy_sheet(
    cells: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Image.Image:
    """Pictures of one size, `cells[row][column]`, with their labels. Enlarged pictures keep their pixels."""
    if [len(row) for row in cells] != [len(columns)] * len(rows) or not rows or not columns:
        raise ValueError(f"{len(rows)} rows and {len(columns)} columns do not fit {[len(row) for row in cells]}")
    font = ImageFont.load_default(size=14)
    factor = max(1, -(-_SMALLEST // min(cells[0][0].size)))
    width, height = (factor * side for side in cells[0][0].size)
    lines = [_wrapped(text, 24) for text in rows]
    left = max(_width(font, line) for text in lines for line in text.split("\n")) + 3 * _GAP
    heads = [_wrapped(text, max(8, width // 9)) for text in columns]
    caption = _wrapped(title, max(16, (left + len(columns) * width) // 9)) if title else ""
    above = 18 * (len(caption.split("\n")) if caption else 0) + _GAP
    top = above + 18 * max(text.count("\n") + 1 for text in heads) + _GAP
    page = Image.new(
        "RGB", (left + len(columns) * (width + _GAP) + _GAP, top + len(rows) * (height + _GAP) + _GAP), "white"
    )
    pen = ImageDraw.Draw(page)
    pen.multiline_text((_GAP, _GAP), caption, fill="black", font=font)
    for i, text in enumerate(heads):
        pen.multiline_text((left + i * (width + _GAP), above), text, fill="black", font=font)
    for i, (text, row) in enumerate(zip(lines, cells, strict=True)):
        y = top + i * (height + _GAP)
        pen.multiline_text((_GAP, y), text, fill="black", font=font)
        for k, image in enumerate(row):
            page.paste(image.resize((width, height), Image.Resampling.NEAREST), (left + k * (width + _GAP), y))
    return page


def _wrapped(text: str, letters: int) -> str:
    """At most six lines of so many letters."""
    return "\n".join(textwrap.wrap(text, letters, max_lines=6, placeholder=" ...")) or " "


def _width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, line: str) -> int:
    return int(font.getlength(line)) + 1
