"""What `vismodal clip` and `vismodal clip pairs` leave for people: tables, plots and cards."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vismodal.clip import Templates
from vismodal.files import write_file
from vismodal.pretrained import hub_name
from vismodal.table import markdown

SCORES = {"test": "accuracy", "base": "base", "new": "new", "H": "H"}
_BLUE, _ORANGE, _GREEN = "#1f4e79", "#c55a11", "#548235"


# -- few-shot --------------------------------------------------------------------------------------------------------


def summary(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method, in order: mean and deviation over seeds of each score."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        rows.setdefault(result["method"], []).append(result)
    return [
        {
            "method": name,
            "seeds": len(each),
            **{key: _mean([r[key] for r in each]) for key in SCORES if key in each[0]},
            "parameters": each[0]["parameters"],
            "lr": each[0].get("lr", 0.0),
            "seconds": statistics.mean(r["seconds"] for r in each),
            "text": each[0]["text features"],
            "images": each[0]["image features"],
        }
        for name, each in rows.items()
    ]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def few_shot_table(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows."""
    rows = summary(results)
    scores = [key for key in SCORES if key in rows[0]]
    costs = ["parameters", "rate", "seconds", "text features", "image features"]
    return ["method", *(SCORES[s] for s in scores), *costs], [
        [r["method"], *(_percent(r[s], r["seeds"]) for s in scores), f"{r['parameters']:,}",
         f"{r['lr']:g}" if r["lr"] else "", f"{r['seconds']:.0f}", r["text"], r["images"]]
        for r in rows
    ]  # fmt: skip


def _percent(score: tuple[float, float], seeds: int) -> str:
    mean, deviation = score
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}" if seeds > 1 else f"{100 * mean:.1f}"


def accuracy_plot(results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Each method's scores with their deviation over seeds."""
    rows = summary(results)[::-1]
    figure, axes = _figure(8, 1.2 + 0.45 * len(rows))
    for key, colour in zip([k for k in SCORES if k in rows[0]], (_BLUE, _ORANGE, _GREEN), strict=False):
        means, spread = [100 * r[key][0] for r in rows], [100 * r[key][1] for r in rows]
        axes.errorbar(means, range(len(rows)), xerr=spread, fmt="o", color=colour, capsize=3, label=SCORES[key])
    axes.set_yticks(range(len(rows)), [r["method"] for r in rows])
    axes.set_xlabel("accuracy on test data, %")
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.grid(axis="x", alpha=0.3)
    if "base" in rows[0]:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def described(templates: Templates) -> list[str]:
    """Templates in words."""
    if isinstance(templates, Mapping):
        return ["of each class its own"]
    each = [templates] if isinstance(templates, str) or callable(templates) else list(templates)
    return [one if isinstance(one, str) else "a function of the name" for one in each]


def few_shot_card(folder: Path, results: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Path:
    """README.md of a run of `vismodal clip`."""
    head, rows = few_shot_table(results)
    names = list(dict.fromkeys(r["method"] for r in results))
    seeds = settings["seeds"]
    body = _FEW_SHOT.format(
        names=", ".join(names) if len(names) < 4 else f"{len(names)} methods",
        model=_model(settings["model"]),
        table=markdown(head, rows),
        shots=settings["shots"] or "all",
        seeds="one seed" if seeds == 1 else f"{seeds} seeds",
        settings=_settings(settings, ("model", "data", "output", "resume", "adapter")),
    )
    return _card(folder, settings["model"], "zero-shot-image-classification", ["clip", "few-shot", "vismodal"], body)


# -- pairs -----------------------------------------------------------------------------------------------------------


def retention_plot(rows: Sequence[Mapping[str, float]], path: Path) -> Path:
    """What was learnt and what was kept, over the place alpha between the base (0) and the adapted model (1)."""
    figure, axes = _figure(7, 4)
    alphas = [row["alpha"] for row in rows]
    lines = {"text to image R@1": _BLUE, "image to text R@1": _ORANGE, "zero-shot": _GREEN}
    for key, colour in lines.items():
        if key in rows[0]:
            label = "zero-shot accuracy on other data" if key == "zero-shot" else key
            axes.plot(alphas, [100 * row[key] for row in rows], "o-", color=colour, label=label)
    axes.set(xlabel="alpha: 0 is the base, 1 the adapted model", ylabel="%", ylim=(0, None))
    axes.legend(frameon=False)
    return _save(figure, path)


def pairs_table(rows: Sequence[Mapping[str, float]]) -> str:
    """The sweep over alpha as markdown."""
    keys = [key for key in rows[0] if key != "alpha"]
    body = [[f"{row['alpha']:g}", *(f"{100 * row[key]:.1f}" for key in keys)] for row in rows]
    return markdown(["alpha", *keys], body)


def pairs_card(
    folder: Path,
    rows: Sequence[Mapping[str, float]],
    settings: Mapping[str, Any],
    parameters: int,
    data: Mapping[str, str],
    exports: str,
) -> Path:
    """README.md of a run of `vismodal clip pairs`; `data` says how much there is of "train" and "val"."""
    private = ("model", "pairs", "val", "retain", "output", "resume")
    body = _PAIRS.format(
        method=settings["method"], model=_model(settings["model"]), table=pairs_table(rows), parameters=parameters,
        **data, exports=exports, settings=_settings(settings, private),
    )  # fmt: skip
    return _card(folder, settings["model"], "zero-shot-image-classification", ["clip", "retrieval", "vismodal"], body)


# -- alike in both ---------------------------------------------------------------------------------------------------


def _model(source: str | None) -> str:
    return Path(source).name if source else "the tiny CLIP that comes with vismodal"  # without its place


def _settings(settings: Mapping[str, Any], private: Sequence[str]) -> str:
    rows = [[key, _setting(value)] for key, value in settings.items() if key not in private and value is not None]
    return markdown(["setting", "value"], rows)


def _setting(value: Any) -> str:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return ", ".join(f"`{each}`" for each in value) if several else f"`{value}`"


def _card(folder: Path, source: str | None, task: str, tags: list[str], body: str) -> Path:
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(base_model=hub_name(source), pipeline_tag=task, tags=tags)
    return write_file(folder / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")))


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return write_file(path, buffer.getvalue())


_FEW_SHOT = """\
# {names} on {model}

Trained with [vismodal](https://pypi.org/project/vismodal/) on {shots} pictures a class, {seeds}. Accuracy in percent on
test data, which decided nothing; with several seeds mean ± deviation. `rate` is AdamW's learning rate; the last columns
say which features were computed once, and which at every step.

{table}

![accuracy](accuracy.png)

To use the adapter of a method, with the model's own `model`, `preprocess` and `tokenizer`:

```python
import json, vismodal as vm
from vismodal.checkpoint import read

file = "METHOD/seed-0/adapter.safetensors"
header, _ = read(file)
prompts = json.loads(header["prompts"])  # by class
classifier = vm.CLIPClassifier(model, tokenizer, list(prompts), prompts)
adapter = vm.load(classifier, file)
adapter.scale = float(header.get("scale", 1))
logits = classifier.eval()(preprocess(picture)[None])
```

{settings}
"""
_PAIRS = """\
# {method} on pictures and their texts, from {model}

Trained with [vismodal](https://pypi.org/project/vismodal/): {parameters:,} parameters on {train}. In percent, on
{val} that training did not see; `zero-shot` is the accuracy on other data, which training should not cost too
much. alpha lies between the base (0) and the adapted model (1).

{table}

![what was learnt and what was kept](retention.png)

{exports}

```python
import vismodal as vm

adapter = vm.load(model, "adapter.safetensors")
adapter.scale = 0.5  # between the two, where the method allows it
```

{settings}
"""
