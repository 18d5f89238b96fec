"""What `vismodal classify` leaves for people: a page that opens without a network, and a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vismodal.classification.learning import Scores
from vismodal.data.folder import Folder, Item
from vismodal.data.photos import read_picture
from vismodal.files import write_file
from vismodal.reports import classification as report
from vismodal.reports import html
from vismodal.reports.classification import HEAD, LEGEND, Outcome, cells
from vismodal.table import markdown

_MISTAKES = 24  # pictures that are shown
_PRIVATE = ("data", "model", "weights", "output", "resume", "track")  # places on this machine


@dataclass(frozen=True)
class Shown:
    """What page and card tell: the contestants' runs, and the one whose adapter lies beside them."""

    folder: Folder
    results: Sequence[Sequence[Outcome]]
    best: Outcome
    scores: Scores
    part: str  # that the scores are of
    settings: Mapping[str, Any]
    about: str


def write_all(output: Path, shown: Shown, logits: Tensor, base: str, hub: str | None, more: Mapping[str, Any]) -> str:
    """Tables, plots, report.html and README.md; gives the table for a terminal.

    Args:
        output: their folder.
        shown: what they tell.
        logits: n C of the part that the scores are of.
        base: what the base model is called.
        hub: its name on the Hub, where it has one.
        more: entries of results.json beside the figures.
    """
    for_terminal = report.write_table(output / "table.md", shown.results, shown.about)
    report.write_results(output / "results.json", shown.results, more)
    report.write_metrics(output / "metrics.jsonl", shown.results)
    report.learning_curves(output / "curves.png", shown.results)
    title = f"{shown.best.label} on {shown.part}: {100 * shown.scores.accuracy:.1f}%"
    report.confusion_plot(output / "confusion.png", shown.scores.confusion, shown.folder.classes, title)
    write_page(output, shown, logits)
    write_card(output, shown, base, hub)
    return for_terminal


def about(folder: Folder, base: str, epochs: int, shots: int) -> str:
    """What was adapted to what, in a line."""
    few = f" ({shots} shots of each class)" if shots else ""
    parts = f"{len(folder.train)} pictures for training{few}, {len(folder.val)} for validation"
    tested = f", {len(folder.test)} for the test" if folder.test else ""
    return f"{base} on {folder.root.name}: {len(folder.classes)} classes; {parts}{tested}; {epochs} epochs"


def _public(settings: Mapping[str, Any]) -> list[list[str]]:
    """Settings and values: without places on this machine, what was left open, and `method` where `compare` counts."""
    private = {*_PRIVATE, *(["method"] if settings.get("compare") else [])}
    return [[name, str(value)] for name, value in settings.items() if name not in private and value not in (None, ())]


def write_page(output: Path, shown: Shown, logits: Tensor) -> Path:
    """report.html."""
    best, items = shown.best, shown.folder.test or shown.folder.val
    name = f"{best.label}, seed {best.seed}"
    sections = [
        ("Results", html.paragraph(shown.about) + html.rows(HEAD, [cells(o) for o in shown.results])),
        ("What the figures mean", html.paragraph(LEGEND)),
        ("Learning curves", html.picture(output / "curves.png", "loss and validation accuracy over the epochs")),
        (f"Confusion on {shown.part}: {name}", html.picture(output / "confusion.png", "confusion matrix")),
        (f"Mistakes on {shown.part}, the surest first", _mistakes(shown.folder.classes, items, logits)),
        ("Left out, and noted", html.bullets(shown.folder.notes) if shown.folder.notes else html.paragraph("nothing")),
        ("Settings", html.rows(["setting", "value"], _public(shown.settings))),
    ]
    return write_file(output / "report.html", html.page(f"vismodal classify: {shown.folder.root.name}", sections))


def _mistakes(classes: Sequence[str], items: Sequence[Item], logits: Tensor) -> str:
    sure, given = logits.softmax(1).max(1)
    wrong = [i for i in sure.argsort(descending=True).tolist() if given[i] != items[i].label][:_MISTAKES]
    if not wrong:
        return html.paragraph("none")
    figures = []
    for i in wrong:
        caption = f"{classes[items[i].label]}, taken for {classes[int(given[i])]} ({100 * float(sure[i]):.0f}%)"
        figures.append(html.thumbnail(read_picture(items[i].path), caption))
    return "\n".join(figures)


def write_card(output: Path, shown: Shown, base: str, hub: str | None) -> Path:
    """README.md, as the Hub's model cards are. The licence is left for the user to state."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    figure = EvalResult(
        task_type="image-classification",
        dataset_type="imagefolder",
        dataset_name=shown.folder.root.name,
        dataset_split=shown.part,
        metric_type="accuracy",
        metric_value=round(shown.scores.accuracy, 4),
    )
    data = ModelCardData(
        base_model=hub,
        library_name="vismodal",
        pipeline_tag="image-classification",
        tags=["image-classification", "vismodal", "adapter"],
        model_name=output.name,
        eval_results=[figure],
    )
    body = _CARD.format(
        label=shown.best.label,
        seed=shown.best.seed,
        base=base,
        count=len(shown.folder.classes),
        classes=", ".join(shown.folder.classes),
        accuracy=f"{100 * shown.scores.accuracy:.1f}",
        f1=f"{100 * shown.scores.macro_f1:.1f}",
        part=shown.part,
        parameters=shown.best["parameters"],
        table=markdown(HEAD, [cells(outcomes) for outcomes in shown.results]),
        legend=LEGEND,
        about=shown.about,
        settings=markdown(["setting", "value"], [[name, f"`{value}`"] for name, value in _public(shown.settings)]),
    )
    return write_file(output / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")))


_CARD = """\
# A classifier of {count} classes: {label} on {base}

Trained with [vismodal](https://pypi.org/project/vismodal/): {parameters:,} parameters in `adapter.safetensors`, which
knows its base model, its classes and its preprocessing. {accuracy}% right on {part}, macro-F1 {f1}% (seed {seed}).

Classes: {classes}.

```sh
vismodal predict --adapter adapter.safetensors PICTURES
```

![confusion](confusion.png)

## Results

{about}

{table}

{legend}

![learning curves](curves.png)

## Settings

{settings}
"""
