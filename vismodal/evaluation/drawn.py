"""What a contestant of a benchmark draws, and that kept in files, so that a run that goes on does not draw it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vismodal.diffusion.encode import native_size
from vismodal.diffusion.generate import generate
from vismodal.diffusion.kinds import Pipe
from vismodal.files import write_file
from vismodal.reports.run import grid, write_image

_BATCH = 16  # pictures that are drawn together: a sixth faster than 4 on one core
_COLUMNS = 16


@dataclass(frozen=True)
class Drawn:
    """Pictures by what was asked, all of one size, and facts such as parameters and minutes."""

    pictures: Mapping[str, Sequence[Image.Image]]
    facts: Mapping[str, float]


def draw(
    pipe: Pipe, prompts: Sequence[str], seeds: Sequence[int], *, what: str, steps: int, guidance: float
) -> list[Image.Image]:
    """One picture for each prompt and its seed, as `generate` gives it, with a progress bar that says `what`."""
    pictures: list[Image.Image] = []
    size = native_size(pipe)
    for start in tqdm(range(0, len(prompts), _BATCH), desc=f"drawing {what}", unit="batch"):
        part = slice(start, start + _BATCH)
        pictures += generate(pipe, prompts[part], seeds[part], size=size, steps=steps, guidance=guidance, batch=_BATCH)
    return pictures


def remembered(folder: Path, name: str, identity: Mapping[str, Any], make: Callable[[], Drawn]) -> Drawn:
    """What lies in `folder` under `name` if it has the same identity (JSON values), else what `make` draws now.

    The pictures are in lossless sheets `NAME-WHAT.png`; `NAME.json` is written last and says that they are whole.
    """
    path, now = folder / f"{name}.json", json.loads(json.dumps(dict(identity)))  # tuples are lists after saving
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("identity") == now:
        print(f"{folder.name}, {name}: found")
        sheets = found["sheets"].items()
        return Drawn({what: _pieces(folder / f"{name}-{what}.png", **s) for what, s in sheets}, found["facts"])
    print(f"{folder.name}, {name}:")
    path.unlink(missing_ok=True)  # its pictures are replaced one sheet after the other
    drawn = make()
    sheets = {what: {"count": len(p), "size": list(p[0].size)} for what, p in drawn.pictures.items()}
    for what, pictures in drawn.pictures.items():
        write_image(folder / f"{name}-{what}.png", grid(pictures, _COLUMNS))
    text = json.dumps({"identity": now, "facts": dict(drawn.facts), "sheets": sheets}, indent=1)
    write_file(path, text + "\n")
    return drawn


def _pieces(path: Path, count: int, size: tuple[int, int]) -> list[Image.Image]:
    """The pictures of a sheet."""
    width, height = size
    with Image.open(path) as sheet:
        corners = [(i % _COLUMNS * width, i // _COLUMNS * height) for i in range(count)]
        return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]
