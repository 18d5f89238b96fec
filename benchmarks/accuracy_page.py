"""Parts of `accuracy.py`: the tables and the plot, of what there is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import facts
from page import label as place_names

import vismodal as vm
from vismodal.files import write_file
from vismodal.table import markdown

NORMAL = 1e7  # C of the PPT score
TITLES = {"vit-s": "ViT-S/14 (DINOv2, then saliency), 98 px", "tiny-vit": "tiny-vit, 32 px"}
Found = Mapping[str, Any]


def ppt(accuracy: float, parameters: int) -> float:
    """Performance-Parameter Trade-off of V-PETL Bench (NeurIPS 2024)."""
    return accuracy * math.exp(-math.log10(parameters / NORMAL + 1))


class Table:
    """Means and deviations of one model's rows."""

    def __init__(self, found: Found) -> None:
        self.found, self.sets, self.labels = found, list(found["sets"]), list(found["labels"])
        self.rows = {k: row for k, row in found["rows"].items() if row and "failed" not in row}

    def seeds(self, label: str, name: str) -> list[float]:
        """Accuracy on a set, a figure for each seed."""
        return [row["test"] for (l, s, _), row in self.rows.items() if (l, s) == (label, name)]

    def means(self, label: str) -> list[float]:
        """Over the sets, a figure for each seed of which all sets are there."""
        found = [[self.rows.get((label, name, seed)) for name in self.sets] for seed in self.found["seeds"]]
        return [statistics.fmean(row["test"] for row in each if row) for each in found if all(each)]

    def any(self, label: str, key: str) -> Any:
        """Of the first row that says it: parameters and bytes do not depend on the seed."""
        return next((row[key] for (l, _, _), row in self.rows.items() if l == label and key in row), None)

    def cells(self, label: str) -> list[str]:
        mean, n = self.means(label), self.any(label, "parameters")
        kept, time = self.any(label, "kept"), self.found["times"].get(label)
        cells = [label, *(spread(self.seeds(label, name)) for name in self.sets), bold(spread(mean))]
        cells += ["" if n is None else f"{n:,}", "" if kept is None else f"{kept / 2**20:.1f} MiB"]
        cells += [f"{time['step_cpu']:.2f} s" if time else ""]
        return [*cells, f"{100 * ppt(statistics.fmean(mean), n):.1f}" if mean else ""]

    def paired(self, one: str, other: str) -> str:
        """Mean difference over pairs of one set and one seed, with its standard error."""
        both = [(row["test"], self.rows.get((other, *rest))) for (l, *rest), row in self.rows.items() if l == one]
        gaps = [100 * (a - b["test"]) for a, b in both if b]
        if len(gaps) < 2:
            return ""
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        return f"{one} over {other}: {statistics.fmean(gaps):+.1f} ± {error:.1f} points ({len(gaps)} pairs)."


def spread(values: Sequence[float]) -> str:
    """Per cent, and the standard deviation where there are several."""
    if not values:
        return "–"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def bold(text: str) -> str:
    return text if text == "–" else f"**{text}**"


def section(found: Found) -> str:
    """A table, what it says of the peers, and what is missing or failed."""
    table, recipe, core = Table(found), found["recipe"], list(found["core"])
    rest = [label for label in table.labels if label not in core]
    order = [label for label in core if label in table.labels]
    order += sorted(rest, key=lambda label: -statistics.fmean(table.means(label) or [0]))
    head = ["trained", *table.sets, "mean", "parameters", "kept", "step", "PPT"]
    parts = [f"## {TITLES.get(found['model'], found['model'])}", about(found)]
    parts += [markdown(head, [table.cells(label) for label in order])]
    best = found["best"] if found["candidates"] else [l for l in order if l not in core and table.means(l)][:1]
    pairs = [("LoRA", "peft LoRA"), *((b, p) for b in best or () for p in ("full fine-tuning", "peft LoRA"))]
    verdicts = [text for one, other in pairs if (text := table.paired(one, other))]
    parts += [" ".join([f"± is the standard error over the pairs. {' '.join(verdicts)}"])] if verdicts else []
    failed = [(k, row["failed"]) for k, row in found["rows"].items() if row and "failed" in row]
    parts += [f"Failed: {'; '.join(f'{l} on {s}, seed {n}: {why}' for (l, s, n), why in failed)}."] if failed else []
    missing = [key for key, row in found["rows"].items() if not row]
    parts += [f"**Missing**: {listed(missing)}."] if missing else []
    return "\n\n".join(parts) + f"\n\n{recipe_of(recipe)}\n"


def about(found: Found) -> str:
    seeds = len(found["seeds"])
    words = f"Accuracy on test in per cent, {found['recipe'].epochs} epochs, "
    words += f"mean ± standard deviation over {seeds} seeds." if seeds > 1 else "one seed."
    if not found["candidates"]:
        return words
    each = ", ".join(f"{k} {'–' if v is None else f'{100 * v[0]:.1f}'}" for k, v in found["candidates"].items())
    chosen = " and ".join(found["best"]) + " go on" if found["best"] is not None else "not decided yet"
    return f"{words} Candidates for the best two, mean validation accuracy after short trainings: {each}; {chosen}."


def recipe_of(recipe: Any) -> str:
    kind = "bf16 autocast" if recipe.bf16 else "fp32"
    words = f"Batches of {recipe.batch}, {recipe.pilot} epochs with each rate that is tried, crops of at least "
    return words + f"{recipe.crop:g} of the area, the head at {recipe.head:g}, {kind}."


def listed(missing: Sequence[tuple[str, str, int]]) -> str:
    """Sets by label and seed."""
    by: dict[tuple[str, int], list[str]] = {}
    for label, name, seed in missing:
        by.setdefault((label, seed), []).append(name)
    return "; ".join(f"{label}, seed {seed}: {', '.join(names)}" for (label, seed), names in by.items())


LEGEND = """\
Columns: *mean* is over the sets, its ± over the seeds; *parameters* are those that are trained, without the head;
*kept* is what autograd keeps of one forward for the backward, without the parameters; *step* is the median processor
time of a training step from pixels on one thread, interleaved with the others'; PPT in per cent."""


def write_page(out: Path, contents: Sequence[Found], note: str) -> None:
    """`out`.md and `out`.png."""
    about = {k: v for k, v in facts(("torch", "timm", "peft")).items() if k not in ("load before", "threads")}
    machine = ", ".join(f"{k} {v}" for k, v in {"vismodal": vm.__version__, **about}.items())
    parts = [f"# Accuracy against peers\n\n{note}\n\n{LEGEND}\n\nMeasured with {machine}.\n"]
    parts += [f"![mean accuracy against parameters]({out.name}.png)\n", *map(section, contents)]
    write_file(out.with_suffix(".md"), "\n".join(parts))
    write_file(out.with_suffix(".png"), lambda path: plot(path, [Table(found) for found in contents]))


def plot(path: Path, tables: Sequence[Table]) -> None:
    """A panel for each model: mean accuracy against trained parameters, peers in red; a linear probe is a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7 * len(tables)), layout="constrained")
    FigureCanvasAgg(figure)
    named = []
    for i, table in enumerate(tables):
        axes, points = figure.add_subplot(len(tables), 1, i + 1), []
        for label in table.labels:
            means, n = table.means(label), table.any(label, "parameters")
            if not means:
                continue
            y, peer = 100 * statistics.fmean(means), label in table.found["core"] and label != "LoRA"
            if not n:
                axes.axhline(y, color="gray", linestyle="--", linewidth=1)
                axes.annotate(label, (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
                continue
            error = 100 * statistics.stdev(means) if len(means) > 1 else None
            axes.errorbar(n, y, error, fmt="o", color="C3" if peer else "C0", markersize=5, capsize=3)
            points.append((n, y, label))
        title = TITLES.get(table.found["model"], table.found["model"])
        axes.set(xlabel="trained parameters", ylabel="mean accuracy on test, %", title=title)
        if points:
            axes.set_xscale("log")
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
        named.append((axes, points))
    for axes, points in named:  # now that all have their sizes
        if points:
            place_names(figure, axes, points)
    figure.savefig(path, dpi=110)
