"""Parts of `methods.py`: the tables and the plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import facts

import vismodal as vm
from vismodal.files import write_file
from vismodal.table import markdown

Row = Mapping[str, Any]
HEAD = ["method", "class", "lr", "{} on val", "{} on test", "lift", "learns", "parameters", "file", "kept", "step"]
WORDS = {"tiny-vit": "accuracy", "tiny-clip": "accuracy", "tiny-sd": "loss"}


def learns(row: Row) -> bool:
    """Whether the lift is above two standard errors."""
    return bool(row["lift"] > 2 * row["error"])


def write_page(out: Path, rows: Sequence[Row], note: str, threads: int) -> None:
    """`out`.md and `out`.png: a table for each model and length of training, those with most rows first."""
    packages = ("torch", "timm", "open_clip_torch", "diffusers")
    about = {k: v for k, v in facts(packages).items() if k not in ("load before", "threads")}
    machine = ", ".join(f"{k} {v}" for k, v in {"vismodal": vm.__version__, **about}.items())
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row["model"], row["settings"]]), []).append(row)
    found = sorted(groups.values(), key=lambda each: (-len(each), list(WORDS).index(each[0]["model"])))
    first = [next((each for each in found if each[0]["model"] == model), []) for model in WORDS]
    others = [each for each in found if not any(each is one for one in first)]
    parts = [f"# All methods\n\n{note}\n\n{LEGEND.format(threads=threads)}\n\nMeasured with {machine}.\n"]
    parts.append(f"![accuracy and loss against parameters]({out.name}.png)\n")
    parts += [section(each) for each in (*first, *others) if each]
    write_file(out.with_suffix(".md"), "\n".join(parts))
    shown = [row for each in first for row in each if "failed" not in row]
    write_file(out.with_suffix(".png"), lambda path: plot(path, shown))


LEGEND = """\
Columns: *parameters* are those that are trained, without the head; *file* is what `vm.save` writes, with the head;
*kept* is what autograd keeps of one forward for the backward, without the parameters; *step* is the median time of a
training step on {threads} threads. A loss is the mean square error of the prediction at fixed noise, less is better,
and its lift in per cent of the base's."""


def section(rows: Sequence[Row]) -> str:
    """One table: baselines, then the methods by lift, then what failed."""
    model, length = rows[0]["model"], rows[0]["settings"]
    word = WORDS[model]
    good = [row for row in rows if "failed" not in row]
    base = [row for row in good if "method" not in row]
    others = sorted((row for row in good if "method" in row), key=lambda row: -row["lift"])
    scale = abs(base[0]["test"]) / 100 if base and word == "loss" else 0.01  # per cent of the base's, or points
    cells = [_cells(row, word, scale) for row in (*base, *others)]
    cells += [[row["label"], *[""] * 4, f"failed: {row['failed']}", *[""] * 5] for row in rows if "failed" in row]
    rest = [row["label"] for row in others if not learns(row)]
    words = next((row["about"] for row in base if "about" in row), "").strip(".")
    words += f". {length['steps']} updates of {length['batch']}, seed "
    words += f"{length['seed']}. {len(others) - len(rest)} of {len(others)} learn"
    words += f"; not: {', '.join(rest)}." if rest else "."
    title = f"{model}, {length['steps']} updates"
    return f"## {title}\n\n{words}\n\n{markdown([h.format(word) for h in HEAD], cells)}\n"


def _cells(row: Row, word: str, scale: float) -> list[str]:
    sign = -1 if word == "loss" else 1
    figure = "{:.4f}" if word == "loss" else "{:.3f}"
    lift, error = (row[k] / scale for k in ("lift", "error"))
    unit = " %" if word == "loss" else ""
    first = [row["label"], row["survey"], f"{row['lr']:g}" if row.get("lr") else ""]
    first += [figure.format(sign * row["val"]), figure.format(sign * row["test"])]
    if "method" not in row:
        compared = "" if not row["error"] else f"{lift:+.1f} ± {error:.1f}{unit}"
        return [*first, compared, "", "", "", "", ""]
    ms = f"{row['ms']:.0f} ms" if row.get("ms") else ""
    kept = f"{row['kept'] / 2**20:.1f} MiB"
    size = f"{row['bytes'] / 1000:,.0f} kB"
    yes = "yes" if learns(row) else "no"
    return [*first, f"{lift:+.1f} ± {error:.1f}{unit}", yes, f"{row['parameters']:,}", size, kept, ms]


# -- the plot --------------------------------------------------------------------------------------------------------


def plot(path: Path, rows: Sequence[Row]) -> None:
    """A panel for each model: the figure on test against trained parameters, coloured by class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = [model for model in WORDS if any(row["model"] == model and row.get("parameters") for row in rows)]
    figure = Figure(figsize=(13, 8.5 * max(1, len(models))), layout="constrained")
    FigureCanvasAgg(figure)
    surveys = sorted({row["survey"] for row in rows if row.get("parameters") and row["survey"]})
    colours = {"": "black"} | {survey: f"C{i}" for i, survey in enumerate(surveys)}
    panels = [figure.add_subplot(len(models), 1, i + 1) for i in range(len(models))]
    for model, axes in zip(models, panels, strict=True):
        mine = [row for row in rows if row["model"] == model]
        for survey, colour in colours.items():
            points = [(x, y) for x, y, _ in _points(mine, survey)]
            if points:
                axes.scatter(*zip(*points, strict=True), color=colour, s=28, label=survey or "all of them", zorder=3)
        for row in (row for row in mine if "method" not in row):
            axes.axhline(abs(row["test"]), color="gray", linestyle="--", linewidth=1)
            axes.annotate(row["label"], (1, abs(row["test"])), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", fontsize=8, color="gray")  # fmt: skip
        axes.set(xscale="log", xlabel="trained parameters", ylabel=f"{WORDS[model]} on test", title=model)
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="best")
    for model, axes in zip(models, panels, strict=True):  # now that all have their sizes
        label(figure, axes, _points([row for row in rows if row["model"] == model]))
    figure.savefig(path, dpi=110)


def _points(rows: Sequence[Row], survey: str | None = None) -> list[tuple[float, float, str]]:
    """Parameters, the figure on test, and the label, of those that train any."""
    rows = [row for row in rows if row.get("parameters") and survey in (None, row["survey"])]
    return [(row["parameters"], abs(row["test"]), row["label"]) for row in rows]


def label(figure: Any, axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside the points, moved up and down until no two of them lie on one another."""
    figure.draw_without_rendering()
    places = axes.transData.transform([(x, y) for x, y, _ in points])
    taken = [(px - 5, px + 5, py) for px, py in places]  # left, right, middle, in pixels
    height, letter = 0.14 * figure.dpi, 0.075 * figure.dpi
    for (px, py), (x, y, name) in sorted(zip(places, points, strict=True), key=lambda each: -each[0][1]):
        left, right = px + 6, px + 6 + letter * len(name)
        for shift in sorted(range(-40, 41), key=abs):
            middle = py + shift * height / 2
            if not any(left < r and l < right and abs(middle - m) < height for l, r, m in taken):
                break
        taken.append((left, right, middle))
        line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.5} if middle != py else None
        axes.annotate(name, (x, y), (6 * 72 / figure.dpi, (middle - py) * 72 / figure.dpi), textcoords="offset points",
                      va="center", fontsize=8, arrowprops=line)  # fmt: skip
