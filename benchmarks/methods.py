"""All methods on the three embedded models, each with a small real task: does it learn, and what does it cost?

    python benchmarks/methods.py --data DATA                              # most of an hour on 2 cores
    python benchmarks/methods.py --data DATA --models tiny-vit --methods LoRA VPT
    python benchmarks/methods.py --data DATA --quick true --out /tmp/x    # minutes; shows that all runs

DATA holds transfer/ and emoji/. A row is written to results/methods.jsonl as soon as it is measured, and a run skips
those that are there with the same settings. The times of a step are measured when all training is over, interleaved.

Everybody gets the same pictures in the same order for the same number of updates, by AdamW without weight decay, warmed
up over a tenth of them and falling as a cosine, gradients clipped to norm 1; the classifiers under bf16 autocast, and
judged in fp32. Learning rates 1e-5, 3e-5, ..., 3e-1 are tried by one rule: the whole training at neighbouring ones,
upwards from the first guess in benchmarks/contestants.py while the validation part gets better, or else downwards, five
at most; accuracy there chooses, then loss. Options are the methods' own defaults but for those in that file. What is
tested was loaded from the saved file. Lift is over the first row, on the test pictures, ± one standard error of the
paired difference over them (one seed: not over trainings). A method *learns* if its lift is above two of these.
"""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from contest import Length, Row, compared, contest, stepping
from contestants import NAMES, Name, contestants
from jsonargparse import auto_cli
from measure import Effort, median
from page import write_page
from tasks import Judged, Task, task
from tqdm import tqdm

import vismodal as vm

LENGTHS: Mapping[Name, Mapping[str, int]] = {
    "tiny-vit": {"steps": 200, "batch": 16},
    "tiny-clip": {"steps": 100, "batch": 16},
    "tiny-sd": {"steps": 150, "batch": 8},
}
QUICK = {"steps": 2, "batch": 4}
BASELINE = "baseline"  # of the survey's classes


@dataclass(frozen=True)
class Config:
    """Measure methods on the embedded models.

    Args:
        data: folder with transfer/ and emoji/.
        models: which.
        methods: by the labels of the table, or all.
        steps: updates; by default those of LENGTHS.
        quick: two updates; its figures mean nothing.
        seed: of everything random.
        jobs: processes that train, each on one thread.
        threads: of torch for the times.
        rounds: of the times; 0 measures none.
        sizes: options of the tasks, by model.
        out: of the results, without a suffix.
    """

    data: Path = Path("../shared/data")
    models: tuple[Name, ...] = NAMES
    methods: tuple[str, ...] = ()
    steps: int | None = None
    quick: bool = False
    seed: int = 0
    jobs: int = 2
    threads: int = 2
    rounds: int = 5
    sizes: Mapping[Name, Mapping[str, Any]] | None = None
    out: Path = Path(__file__).parent / "results" / "methods"


@dataclass(frozen=True)
class Job:
    """One row to be measured; without a label, the baselines."""

    model: Name
    label: str
    data: Path
    sizes: str
    length: Length

    def key(self) -> dict[str, Any]:
        return {"model": self.model, "label": self.label, "settings": asdict(self.length)}


def jobs(c: Config) -> list[Job]:
    """Everything that is asked for, baselines first."""
    found = []
    for model in c.models:
        each: dict[str, int] = {**(QUICK if c.quick else LENGTHS[model])}
        length = Length(**{**each, **({"steps": c.steps} if c.steps else {})}, seed=c.seed)
        labels = list(contestants(model))
        lower = {m.lower() for m in c.methods}
        chosen = [label for label in labels if not lower or label.lower() in lower]
        sizes = json.dumps((c.sizes or {}).get(model, {}))
        found += [Job(model, label, c.data, sizes, length) for label in ("", *chosen)]
    known = {label.lower() for model in NAMES for label in contestants(model)}
    if wrong := [m for m in c.methods if m.lower() not in known]:
        raise vm.InputError(f"no method {wrong[0]!r} in this benchmark; it has {', '.join(sorted(known))}")
    return found


# -- a worker --------------------------------------------------------------------------------------------------------


@cache
def loaded(model: Name, data: Path, seed: int, sizes: str) -> tuple[Task, dict[str, dict[str, Judged]]]:
    """The task and its baselines, with the first of which contestants are compared."""
    made = task(model, data, seed, json.loads(sizes))
    return made, made.baselines()


def measured(job: Job) -> list[Row]:
    """The rows of a job. A method that fails is a row too: with the error."""
    made, baselines = loaded(job.model, job.data, job.length.seed, job.sizes)
    base = next(iter(baselines.values()))["test"]
    if not job.label:
        rows = []
        for label, parts in baselines.items():
            row = {"label": label, "survey": BASELINE, "val": parts["val"].scores.mean().item()}
            row |= {"val_loss": parts["val"].loss, "test": parts["test"].scores.mean().item(), "_": parts["test"]}
            rows.append({**job.key(), **compared(row, base), "about": made.about})
        return [{**job.key(), "rows": len(rows)}, *rows]
    try:
        row = contest(made, contestants(job.model)[job.label], job.length)
        return [{**job.key(), **compared(row, base)}]
    except Exception as error:
        traceback.print_exc()
        return [{**job.key(), "failed": f"{type(error).__name__}: {error}"}]


def trained(todo: Sequence[Job], processes: int) -> Iterator[list[Row]]:
    """The rows of each job as it ends."""
    if processes <= 1:
        yield from map(measured, todo)
        return
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(measured, todo)


# -- the file of rows ------------------------------------------------------------------------------------------------


def read(file: Path) -> list[Row]:
    """The rows, those of one model, label and settings joined, the latest last."""
    rows: dict[str, Row] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        row = json.loads(line)
        key = json.dumps([row["model"], row["label"], row["settings"]])
        rows[key] = {**({} if "failed" in rows.get(key, {}) else rows.get(key, {})), **row}
    return list(rows.values())


def write(file: Path, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def missing(todo: Sequence[Job], rows: Sequence[Row]) -> list[Job]:
    there = [{k: row[k] for k in ("model", "label", "settings")} for row in rows if "failed" not in row]
    return [job for job in todo if job.key() not in there]


# -- times -----------------------------------------------------------------------------------------------------------


def times(c: Config, todo: Sequence[Job], rows: Sequence[Row]) -> Iterator[Row]:
    """Milliseconds of a training step, of the methods that were measured: medians over interleaved rounds."""
    for model in c.models:
        mine = [job for job in todo if job.model == model and job.label]
        found = {job.label: row for job in mine for row in rows if job.key().items() <= row.items()}
        found = {label: row for label, row in found.items() if "failed" not in row}
        if not mine or all("ms" in row for row in found.values()):
            continue
        made, _ = loaded(model, c.data, c.seed, mine[0].sizes)
        made_by = {label: stepping(made, row, mine[0].length) for label, row in found.items()}
        steps = {label: step for label, step in made_by.items() if step}
        samples = Effort(rounds=c.rounds, least=c.rounds, seconds=3600).interleave(steps)
        for job in mine:
            if job.label in found:
                ms = 1e3 * median(samples[job.label]) if job.label in steps else None
                yield {**job.key(), "ms": ms}


# -- the run ---------------------------------------------------------------------------------------------------------


def main(c: Config) -> list[Row]:
    """Measure what is missing, and write the page."""
    file, todo = c.out.with_suffix(".jsonl"), jobs(c)
    left = missing(todo, read(file))
    with tqdm(total=len(todo), initial=len(todo) - len(left), desc="methods", unit="row", smoothing=0) as bar:
        for rows in trained(left, c.jobs):
            write(file, rows)
            bar.update()
            bar.write("  ".join(shown(rows[-1])))
    if c.rounds:
        torch.set_num_threads(c.threads)
        for row in tqdm(times(c, todo, read(file)), desc="times", unit="row"):
            write(file, [row])
    rows = read(file)
    write_page(
        c.out, [row for row in rows if "rows" not in row], (__doc__ or "").split("\n\n", 3)[-1].strip(), c.threads
    )
    return rows


def shown(row: Row) -> list[str]:
    if "failed" in row:
        return [row["model"], row["label"], "FAILED", row["failed"]]
    cells = [row["model"], row["label"], f"test {row['test']:.4f}", f"lift {row['lift']:+.4f} ± {row['error']:.4f}"]
    return [*cells, f"lr {row['lr']}", f"{row['seconds']} s"] if "lr" in row else cells


if __name__ == "__main__":
    main(auto_cli(Config, as_positional=False))
