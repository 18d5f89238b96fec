"""The figures of `vismodal classify`: tables, results.json, metrics.jsonl, learning curves, a confusion matrix."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismodal.callbacks import read_log
from vismodal.classification.learning import EPOCHS
from vismodal.files import write_file
from vismodal.table import markdown, table

HEAD = ("method", "lr", "scale", "val", "test", "macro-F1", "test, last epoch", "parameters", "KB", "seconds")
_NAMED = 40  # classes with their names on the axes of the confusion matrix
_NUMBERED = 15  # classes with numbers in its cells
LEGEND = (
    "Accuracy and macro-F1 in percent, mean ± standard deviation over the seeds. Validation accuracy alone chooses the "
    "epoch, the learning rate and the scale; test data decides nothing. Beside it the test accuracy of the last epoch. "
    "Macro-F1 is of test data, or of validation data where there is no test. Scale: factor on the method's own. "
    "Seconds: of training and validating."
)


@dataclass(frozen=True)
class Outcome:
    """One training run: its folder, what it was, and its figures (as in its result.json)."""

    folder: Path
    label: str
    seed: int
    lr: float
    scale: float
    figures: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.figures[name]


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def percent(values: Sequence[float]) -> str:
    """91.2 ± 0.4, or without the deviation of a single value; nothing of none."""
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def cells(outcomes: Sequence[Outcome]) -> list[str]:
    """A contestant's row."""
    first, tested = outcomes[0], [o for o in outcomes if o["test"]]
    return [
        first.label,
        f"{first.lr:g}",
        f"{first.scale:g}",
        percent([o["val"]["accuracy"] for o in outcomes]),
        percent([o["test"]["accuracy"] for o in tested]),
        percent([(o["test"] or o["val"])["macro_f1"] for o in outcomes]),
        percent([o["last"]["test"]["accuracy"] for o in tested]),
        f"{first['parameters']:,}",
        f"{first['bytes'] / 1000:,.0f}",
        f"{statistics.fmean(o['seconds'] for o in outcomes):.0f}",
    ]


def write_table(path: Path, results: Sequence[Sequence[Outcome]], about: str) -> str:
    """table.md; the same for a terminal."""
    body = [cells(outcomes) for outcomes in results]
    write_file(path, f"{about}\n\n{LEGEND}\n\n{markdown(HEAD, body)}\n")
    return table(HEAD, body)


def write_results(path: Path, results: Sequence[Sequence[Outcome]], more: Mapping[str, Any]) -> Path:
    """results.json: every run's figures, and mean and deviation of each contestant."""
    methods = []
    for outcomes in results:
        entry: dict[str, Any] = {"method": outcomes[0].label, "lr": outcomes[0].lr, "scale": outcomes[0].scale}
        for part in ("val", "test"):
            values = [o[part]["accuracy"] for o in outcomes if o[part]]
            mean, deviation = spread(values) if values else (None, None)
            entry[part] = {"accuracy": mean, "deviation": deviation}
        entry["runs"] = [{"seed": o.seed, "folder": f"runs/{o.folder.name}", **o.figures} for o in outcomes]
        methods.append(entry)
    return write_file(path, json.dumps({**more, "methods": methods}, indent=1, ensure_ascii=False) + "\n")


def write_metrics(path: Path, results: Sequence[Sequence[Outcome]]) -> Path:
    """metrics.jsonl: the steps of all runs and, where an epoch was scored, its validation figures."""
    lines = []
    for outcome in (o for outcomes in results for o in outcomes):
        which = {"method": outcome.label, "seed": outcome.seed}
        scored = {row["step"]: row for row in read_log(outcome.folder / EPOCHS)}
        for row in read_log(outcome.folder / "metrics.jsonl"):
            extra = {f"val_{name}": value for name, value in scored.get(row["step"], {}).items()}
            for name in ("val_step", "val_seconds"):
                extra.pop(name, None)
            lines.append(json.dumps({**which, **row, **extra}, ensure_ascii=False) + "\n")
    return write_file(path, "".join(lines))


# -- pictures ----------------------------------------------------------------------------------------------------------


def learning_curves(path: Path, results: Sequence[Sequence[Outcome]]) -> Path:
    """The training loss (a running mean) and the validation accuracy over the epochs, a line for each run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, outcomes in enumerate(results):
        colour = colormaps["tab10"](number % 10)
        for i, outcome in enumerate(outcomes):
            label = outcome.label if i == 0 else None
            scored = read_log(outcome.folder / EPOCHS)
            losses = [row["loss"] for row in read_log(outcome.folder / "metrics.jsonl")]
            epochs = [(step + 1) * scored[-1]["epoch"] / len(losses) for step in range(len(losses))]
            left.plot(epochs, _running(losses), color=colour, linewidth=1, label=label)
            accuracy = [100 * row["accuracy"] for row in scored]
            right.plot([r["epoch"] for r in scored], accuracy, color=colour, marker=".", linewidth=1, label=label)
    left.set(xlabel="epoch", ylabel="loss", title="training loss, running mean")
    right.set(xlabel="epoch", ylabel="%", title="validation accuracy")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8)
    return _write(figure, path)


def _running(values: Sequence[float]) -> list[float]:
    means: list[float] = []
    for value in values:
        means.append(value if not means else 0.9 * means[-1] + 0.1 * value)
    return means


def confusion_plot(path: Path, confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Path:
    """Shares of each true class (rows) that were given each class (columns)."""
    from matplotlib.figure import Figure

    count = len(classes)
    shares = [[n / max(1, sum(row)) for n in row] for row in confusion]
    side = min(12.0, max(4.5, 0.35 * count + 2))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="given", ylabel="true", title=title)
    if count <= _NAMED:
        axes.set_xticks(range(count), [_plain(name) for name in classes], rotation=90, fontsize=8)
        axes.set_yticks(range(count), [_plain(name) for name in classes], fontsize=8)
    if count <= _NUMBERED:
        for i, row in enumerate(confusion):
            for j, n in enumerate(row):
                axes.text(j, i, str(n), ha="center", va="center", fontsize=8, color="w" if shares[i][j] > 0.5 else "k")
    figure.colorbar(image, shrink=0.8, label="share of the true class")
    return _write(figure, path)


def _plain(name: str) -> str:
    """A class's name as a plot can show it: letters that its font lacks as question marks, and no formulas."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    return "".join(c if ord(c) in known else "?" for c in name).replace("$", r"\$")


def _write(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return write_file(path, buffer.getvalue())
