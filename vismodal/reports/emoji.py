"""Tables and a sheet of pictures from the figures of `vismodal bench emoji`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vismodal.files import write_file
from vismodal.reports.run import grid, sheet, write_image
from vismodal.table import markdown, table

COLUMNS = ("likeness", "lean", "style", "named", "ground", "drift", "kept", "parameters", "KB", "lr", "minutes")
FORMATS = {
    "likeness": "{:.3f}",
    "lean": "{:+.3f}",
    "drift": "{:.3f}",
    "parameters": "{:,.0f}",
    "minutes": "{:.1f}",
    "lr": "{:g}",
}
SHOWN = 12  # pictures in a row of the sheet
LEGEND = """\
likeness: cosine with the nearest true Fluent picture on the same ground. lean: that, less the cosine with the nearest
Noto picture of the same emoji. style: share that leans to Fluent. named: share that is nearest to the right candidate.
ground: share with the right colour. drift: 1 - cosine with the base's picture of the same prompt and seed, without the
word. kept: share of those that is nearest to the right candidate's Noto picture. How far "base, other seeds" is from
"base" shows what is noise. lr: of an entry's first method. minutes: of training, on one core.
Judge: {judge}. Definitions: `vismodal/evaluation/emoji_scores.py`."""


@dataclass(frozen=True)
class Result:
    """One task's figures, by row and column, what they are of, and labelled rows of pictures."""

    about: str
    scores: Mapping[str, Mapping[str, float]]
    rows: Sequence[tuple[str, Sequence[Image.Image]]]


def write_results(folder: Path, judge: str, results: Mapping[str, Result], settings: Mapping[str, Any]) -> None:
    """table.md, metrics.json and sheet.png; prints the tables too."""
    head, pages = ["", *COLUMNS], [f"# vismodal bench emoji\n\n{LEGEND.format(judge=judge)}\n"]
    for task, result in results.items():
        cells = [[label, *_cells(scores)] for label, scores in result.scores.items()]
        print(f"\n{task}: {result.about}\n\n{table(head, cells)}")
        pages.append(f"## {task}\n\n{result.about}\n\n{markdown(head, cells)}\n")
    write_file(folder / "table.md", "\n".join(pages))
    figures = {"judge": judge, "settings": settings, "tasks": {task: r.scores for task, r in results.items()}}
    write_file(folder / "metrics.json", json.dumps(figures, indent=1) + "\n")
    rows = [(f"{task}: {label}", _some(p)) for task, r in results.items() for label, p in r.rows]
    write_image(folder / "sheet.png", sheet([(label, grid(p, SHOWN)) for label, p in rows]))
    print(f"\ntable: {folder / 'table.md'}\nfigures: {folder / 'metrics.json'}\npictures: {folder / 'sheet.png'}")


def _cells(scores: Mapping[str, float]) -> list[str]:
    """A row's cells; empty where it has no such figure."""
    shown = {name: FORMATS.get(name, "{:.2f}").format(value) for name, value in scores.items()}
    shown["KB"] = f"{scores['bytes'] / 1000:,.0f}" if "bytes" in scores else ""
    return [shown.get(name, "") for name in COLUMNS]


def _some(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """At most `SHOWN` of them, evenly spaced."""
    count = min(SHOWN, len(pictures))
    return [pictures[i * len(pictures) // count] for i in range(count)]
