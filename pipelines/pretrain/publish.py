"""How a model gets into `assets/`: a whole folder at once, with its figures in a file of their own, and a sheet."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw

FIGURES = "figures.json"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` if nothing goes wrong.

    A reader sees the old folder or the new one, but for an instant.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for file in temporary.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes them for their owner alone
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_figures(folder: Path, figures: dict[str, float]) -> None:
    """What the card says, for `evaluate.py` to compare with."""
    rounded = {k: round(v, 5) for k, v in figures.items()}
    (folder / FIGURES).write_text(json.dumps(rounded, indent=1) + "\n")


def read_figures(folder: Path) -> dict[str, float]:
    """What `write_figures` wrote; empty where it did not."""
    file = folder / FIGURES
    return dict(json.loads(file.read_text())) if file.exists() else {}


def save_sheet(file: Path, pictures: Sequence[Image.Image], lines: Sequence[str], columns: int = 6) -> None:
    """The pictures in 128 px, each over its line."""
    side, text = 128, 36
    sheet = Image.new("RGB", (columns * (side + 8), -(-len(pictures) // columns) * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, line) in enumerate(zip(pictures, lines, strict=True)):
        x, y = i % columns * (side + 8), i // columns * (side + text)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x + 4, y + 2))
        draw.multiline_text((x + 4, y + side + 3), _wrapped(line), fill="black", font_size=9, spacing=1)
    sheet.save(file, optimize=True)


def _wrapped(line: str, width: int = 21, most: int = 3) -> str:
    lines = [""]
    for word in line.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:most])
