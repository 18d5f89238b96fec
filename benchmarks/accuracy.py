"""Accuracy on six small data sets against full fine-tuning, a linear probe and peft's LoRA, and of all vision methods.

    python benchmarks/accuracy.py --data DATA                             # hours on 2 cores; stop and go on at will
    python benchmarks/accuracy.py --data DATA --minutes 60                # an hour of it
    python benchmarks/accuracy.py --data DATA --page true                 # only writes the page, from what is there
    python benchmarks/accuracy.py --data DATA --quick true --out /tmp/x   # minutes; shows that all runs

DATA holds transfer/ and weights/. A row is appended to results/accuracy.jsonl as soon as it is measured, and a run
skips those that are there with the same settings. Times of a step are measured when all training is over, interleaved.

Everybody starts from the same pretrained model and a new head, sees the same views of the same pictures in the same
order (random crops, no mirroring: a mirrored 3 is none), for the same number of epochs, by AdamW without weight decay,
warmed up over a tenth of the updates and falling as a cosine, gradients clipped to norm 1, in bf16 autocast. The head
learns at one rate in all of them; the rate of everything else (of the head, in the linear probe) is searched for each
contestant and set by one rule, on the validation part alone, with one seed: short trainings at neighbouring rates 1e-5,
3e-5, ..., 3e-1, upwards from a first guess while the validation loss falls, or else downwards; of all that were tried
the one with the highest validation accuracy counts, of equal ones the one with the lowest loss. The test part is looked
at once, by the last epoch of a whole training. Which two methods are "the best two" the validation part decides, by the
short trainings of all candidates. The linear probe trains on kept features, which changes nothing but its time; all
attend by plain matrix products, which on this processor train up to twice as fast as torch's fused attention.

PPT is the Performance-Parameter Trade-off of V-PETL Bench (NeurIPS 2024): M exp(-log10(P / 1e7 + 1)), of the accuracy M
and the trained parameters P without the head's.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
from accuracy_page import write_page
from accuracy_rows import Rows, name_of, search
from entrants import CORE, Job, Model, Recipe, Row, entrants, measured, stepping
from jsonargparse import auto_cli
from measure import Effort, seconds
from tqdm import tqdm

import vismodal as vm

SETS = ("cifar10", "fashion10", "flowers5", "handdigits10", "signs43", "textures10")
RECIPES: Mapping[Model, Recipe] = {"vit-s": Recipe(), "tiny-vit": Recipe(epochs=4, pilot=1)}
SEEDS: Mapping[Model, tuple[int, ...]] = {"vit-s": (0, 1, 2), "tiny-vit": (0,)}
QUICK = Recipe(epochs=1, pilot=1, batch=4)
BEST = 2  # of the candidates, that run with all seeds
FILE = Path(__file__).parent / "results" / "accuracy"


@dataclass(frozen=True)
class Config:
    """Measure accuracy on the six sets.

    Args:
        data: folder with transfer/ and weights/.
        models: which.
        labels: of the contestants, or all.
        sets: which.
        minutes: after these no training begins; 0 is no limit.
        jobs: processes that train, each on one thread.
        rounds: of the times of a step; 0 measures none.
        threads: of torch for the times.
        page: train nothing, write the page.
        quick: one epoch; its figures mean nothing.
        recipes: other ones, by model.
        out: of the results, without a suffix.
    """

    data: Path = Path("../shared/data")
    models: tuple[Model, ...] = get_args(Model)
    labels: tuple[str, ...] = ()
    sets: tuple[str, ...] = SETS
    minutes: float = 0
    jobs: int = 2
    rounds: int = 5
    threads: int = 1
    page: bool = False
    quick: bool = False
    recipes: Mapping[Model, Recipe] = field(default_factory=dict)
    out: Path = FILE


def recipe(c: Config, model: Model) -> Recipe:
    return QUICK if c.quick else c.recipes.get(model, RECIPES[model])


def chosen(c: Config, model: Model) -> list[str]:
    """Labels in the order in which they run."""
    lower = {label.lower() for label in c.labels}
    return [label for label in entrants(model) if not lower or label.lower() in lower]


# -- what is to be done ----------------------------------------------------------------------------------------------


def labels(c: Config, model: Model, rows: Rows) -> list[str]:
    """Who has whole trainings, as far as it is known: all, or those that must and the best of the candidates."""
    if not candidates(c, model):
        return chosen(c, model)
    return [label for label in chosen(c, model) if label in (*CORE, *(finalists(c, model, rows) or ()))]


def candidates(c: Config, model: Model) -> list[str]:
    """Of which only the best have whole trainings: only where there are several seeds."""
    return [label for label in chosen(c, model) if label not in CORE] if len(SEEDS[model]) > 1 else []


def finalists(c: Config, model: Model, rows: Rows) -> list[str] | None:
    """The candidates that were best on the validation parts, at their best rates; None before all of them are known."""
    scores = {label: score(c, model, label, rows) for label in candidates(c, model)}
    known = {label: each for label, each in scores.items() if each is not None}
    return sorted(known, key=known.__getitem__, reverse=True)[:BEST] if len(known) == len(scores) else None


def score(c: Config, model: Model, label: str, rows: Rows) -> tuple[float, float] | None:
    """Mean validation accuracy and negative loss over the sets, of short trainings at the best rates."""
    pilots = [first(c, model, label, name) for name in c.sets]
    found = [search(pilot, rows) for pilot in pilots]
    if not all(known for _, known in found):
        return None
    best = [rows.rows[name_of(replace(p, lr=lr).key())] for p, (lr, _) in zip(pilots, found, strict=True)]
    losses = [math.inf if row["val_loss"] is None else row["val_loss"] for row in best]
    return statistics.fmean(row["val"] for row in best), -statistics.fmean(losses)


def first(c: Config, model: Model, label: str, name: str) -> Job:
    """The first short training of a contestant on a set."""
    return replace(whole(c, model, label, name, SEEDS[model][0]), pilot=True, lr=entrants(model)[label].lr)


def whole(c: Config, model: Model, label: str, name: str, seed: int, lr: float = 0.0) -> Job:
    return Job(model, label, name, lr, seed, False, c.data, recipe(c, model))


def cells(c: Config, rows: Rows) -> Iterator[Job]:
    """Whole trainings, those that are known to be needed; seeds outermost, then contestants, then sets."""
    for model in c.models:
        for seed in SEEDS[model]:
            for label, name in itertools.product(labels(c, model, rows), c.sets):
                yield whole(c, model, label, name, seed)


def ready(c: Config, rows: Rows) -> Iterator[Job]:
    """Trainings that can begin now, each once, what comes first first; whole ones before the candidates' short ones."""
    seen = set()
    short = [first(c, m, label, name) for m in c.models for label in candidates(c, m) for name in c.sets]
    for job in itertools.chain(cells(c, rows), short):
        if not job.pilot and rows.get(job.key()):
            continue
        lr, known = search(first(c, job.model, job.label, job.set), rows)
        if known and job.pilot:
            continue
        job = replace(job, lr=lr) if known else replace(job, pilot=True, seed=SEEDS[job.model][0], lr=lr)
        if name_of(job.key()) not in seen:
            seen.add(name_of(job.key()))
            yield job


# -- the run ---------------------------------------------------------------------------------------------------------


def attempt(job: Job) -> Row:
    """A training that fails is a row too: with the error."""
    try:
        return measured(job)
    except Exception as error:
        traceback.print_exc()
        return job.key() | {"failed": f"{type(error).__name__}: {error}"}


def ended(c: Config, rows: Rows) -> Iterator[Row]:
    """Rows as they end: whatever can begin is begun until time is up, `jobs` of them at once."""
    end = time.monotonic() + 60 * c.minutes if c.minutes else math.inf
    tried: set[str] = set()

    def following() -> Job | None:
        if time.monotonic() > end:
            return None
        job = next((j for j in ready(c, rows) if name_of(j.key()) not in tried), None)
        if job is not None:
            tried.add(name_of(job.key()))
        return job

    if c.jobs <= 1:
        while (job := following()) is not None:
            yield attempt(job)
        return
    context = multiprocessing.get_context("spawn")
    quiet = patch.dict(os.environ, {"TQDM_DISABLE": "1"})
    with quiet, ProcessPoolExecutor(c.jobs, context, torch.set_num_threads, (1,)) as pool:
        running: set[Future[Row]] = set()
        try:
            while True:
                while len(running) < c.jobs and (job := following()) is not None:
                    running.add(pool.submit(attempt, job))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def times(c: Config, rows: Rows) -> Iterator[Row]:
    """Seconds of a training step by the wall clock and of the processor, interleaved; on the first of the sets."""
    for model in c.models:
        found = {label: whole(c, model, label, c.sets[0], SEEDS[model][0]) for label in chosen(c, model)}
        found = {label: job for label, job in found.items() if rows.get(job.key())}
        if all(rows.get(timed(job)) for job in found.values()):
            continue
        steps = {label: stepping(replace(job, lr=1e-5)) for label, job in found.items()}
        calls = {label: lambda step=step: seconds(step) for label, step in steps.items()}
        samples = Effort(c.rounds, c.rounds, 0).interleave(calls)
        for label, job in found.items():
            wall, cpu = (sorted(each)[len(each) // 2] for each in zip(*samples[label], strict=True))
            yield timed(job) | {"wall": wall, "step_cpu": cpu, "threads": c.threads}


def timed(job: Job) -> Row:
    return job.key() | {"set": "", "lr": "time", "pilot": True}


def main(c: Config) -> Rows:
    """Train what is missing, and write the page."""
    check(c)
    rows = Rows(c.out.with_suffix(".jsonl"))
    if not c.page:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes too
        try:
            train(c, rows)
        finally:
            signal.signal(signal.SIGTERM, before)
        if c.rounds and not any(True for _ in ready(c, rows)):
            torch.set_num_threads(c.threads)
            for row in times(c, rows):
                rows.add(row)
    note = "\n\n".join((__doc__ or "").strip().split("\n\n")[3:])
    write_page(c.out, contents(c, rows), note)
    return rows


def train(c: Config, rows: Rows) -> None:
    total = list(cells(c, rows))
    done = sum(rows.get(job.key()) is not None for job in total)
    with tqdm(total=len(total), initial=done, desc="accuracy", unit="training", smoothing=0) as bar:
        for row in ended(c, rows):
            rows.add(row)
            bar.write(shown(row))
            if not row["pilot"]:
                bar.total = len(list(cells(c, rows)))
                bar.update()


def contents(c: Config, rows: Rows) -> list[dict[str, Any]]:
    """What the page tells of each model: rows by label, set and seed, times, and what is missing."""
    found = []
    for model in c.models:
        jobs = [job for job in cells(c, rows) if job.model == model]
        each = {(job.label, job.set, job.seed): rows.rows.get(name_of(job.key())) for job in jobs}
        seed = SEEDS[model][0]
        clock = {label: rows.get(timed(whole(c, model, label, "", seed))) for label in chosen(c, model)}
        about = {"model": model, "recipe": recipe(c, model), "sets": c.sets, "seeds": SEEDS[model]}
        about |= {"labels": labels(c, model, rows), "core": CORE, "best": finalists(c, model, rows)}
        about |= {"candidates": {label: score(c, model, label, rows) for label in candidates(c, model)}}
        found.append({**about, "rows": each, "times": {k: v for k, v in clock.items() if v}})
    return found


def check(c: Config) -> None:
    known = {label.lower(): label for model in c.models for label in entrants(model)}
    if wrong := [label for label in c.labels if label.lower() not in known]:
        raise vm.InputError(f"no contestant {wrong[0]!r}; there are {', '.join(known.values())}")
    needed = [c.data / "transfer" / name for name in c.sets] if not c.page else []
    if missing := [path for path in needed if not path.is_dir()]:
        raise vm.InputError(f"{missing[0]} is missing: write --data FOLDER with transfer/ and weights/")


def shown(row: Row) -> str:
    what = [row["model"], row["set"], row["label"], f"lr {row['lr']:g}", f"seed {row['seed']}"]
    if "failed" in row:
        return "  ".join([*what, f"FAILED {row['failed']}"])
    loss = "diverged" if row["val_loss"] is None else f"{row['val_loss']:.3f}"
    what += [f"val {row['val']:.3f} {loss}"] + ([] if row["pilot"] else [f"test {row['test']:.3f}"])
    return "  ".join([*what, f"{row['seconds']:.0f} s, {row['cpu']:.0f} s of processor"])


if __name__ == "__main__":
    main(auto_cli(Config, as_positional=False))
