"""Measures the embedded models anew, and compares with what their cards say: `make assets-eval`.

    python pipelines/pretrain/evaluate.py --data ../shared/data
    python pipelines/pretrain/evaluate.py --data ../shared/data --models [tiny-clip]

Ends with 1 where a figure differs by more than `tolerance` (shares) or a tenth of a decibel (PSNR), and names it.
Figures of the training itself (steps, minutes, its validation loss, the teacher's accuracy) are shown as they are.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import clip_card
import sd_card
import torch
import transfer
import vit_card
from jsonargparse import auto_cli
from publish import read_figures
from rich.console import Console
from rich.table import Table

from vismodal.errors import InputError
from vismodal.paths import asset


@dataclass(frozen=True)
class Config:
    """Which models, on which data. `epochs` is what training from scratch gets, beside tiny-vit's linear probes; 0
    leaves that out, which takes most of the time."""

    data: Path
    models: tuple[str, ...] = ("tiny-vit", "tiny-clip", "tiny-sd")
    epochs: int = transfer.Config.epochs
    tolerance: float = 0.005
    threads: int = 2


MEASURE: dict[str, Callable[[Config], dict[str, float]]] = {
    "tiny-vit": lambda c: vit_card.measure(asset("tiny-vit"), c.data, c.epochs),
    "tiny-clip": lambda c: clip_card.measure_folder(asset("tiny-clip"), c.data),
    "tiny-sd": lambda c: sd_card.measure(asset("tiny-sd"), c.data, asset("tiny-clip")),
}


def allowed(name: str, tolerance: float) -> float:
    """How far a figure may be off: training from scratch is not the same on every machine, PSNR is in dB."""
    return 0.1 if name.startswith("psnr") else 0.05 if name.startswith("scratch") else tolerance


def main(c: Config) -> int:
    """Prints a table a model; returns how many figures differ."""
    if unknown := set(c.models) - MEASURE.keys():
        raise InputError(f"no embedded model {', '.join(sorted(unknown))}: write some of {', '.join(MEASURE)}")
    torch.set_num_threads(c.threads)
    wrong = 0
    for model in c.models:
        said, now = read_figures(asset(model)), MEASURE[model](c)
        table = Table("figure", "in the card", "now", "", title=model)
        for name, value in said.items():
            measured = now.get(name)
            off = measured is not None and abs(measured - value) > allowed(name, c.tolerance)
            wrong += off
            table.add_row(name, f"{value:g}", "" if measured is None else f"{measured:g}", "differs" if off else "")
        Console().print(table)
        if missing := now.keys() - said.keys():
            wrong += len(missing)
            print(f"{model}: its figures.json lacks {', '.join(sorted(missing))}; export it again")
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main(auto_cli(Config, as_positional=False))))
