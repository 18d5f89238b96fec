"""One method with one seed: trained, decided on validation data, saved, then measured on test data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from vismodal.adapter import Adapter
from vismodal.attach import adapt
from vismodal.callbacks import Progress
from vismodal.checkpoint import save
from vismodal.clip import CLIPClassifier
from vismodal.draw import seed_of, shuffled
from vismodal.errors import InputError
from vismodal.fewshot.data import Copies, Inputs, Part
from vismodal.fewshot.recipes import Contestant, search_scale
from vismodal.fewshot.task import Task, caches
from vismodal.files import write_file
from vismodal.methods import TipAdapter
from vismodal.reports import run as report
from vismodal.resume import Checkpoints
from vismodal.runs import known
from vismodal.train import Micro, Plan, fit


@dataclass(frozen=True)
class Budget:
    """What all methods of a run get alike.

    Args:
        plan: of training; its seed is the trial's.
        shots: training pictures of each class; 0 takes all.
        batch: pictures of an update, of all processes together.
        augment: augmented copies of each picture; 0 trains on itself.
        alphas: places between base and adapted model for search="scale".
        save_every: steps between checkpoints.
        settings: JSON values that decide the outcome, beside method, data, model and seed.
    """

    plan: Plan
    shots: int = 16
    batch: int = 32
    augment: int = 0
    alphas: tuple[float, ...] = (0.0, 1.0)
    save_every: int = 0
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Trial:
    """One method with one seed, and the folder that its results go to."""

    task: Task
    entry: Contestant
    seed: int
    budget: Budget
    folder: Path
    accelerator: Accelerator

    @property
    def name(self) -> str:
        return f"{self.entry.label}, seed {self.seed}"

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    def identity(self, clf: CLIPClassifier) -> dict[str, Any]:
        """What decides the outcome, as JSON values."""
        own = {"method": self.entry.identity, "prompts": clf.text.prompts, "seed": self.seed, **self.task.identity}
        plain: dict[str, Any] = json.loads(json.dumps({**(self.budget.settings or {}), **own}))
        return plain


def score(trial: Trial) -> dict[str, Any] | None:
    """Trains and measures: its scores, also in its folder, where they may be from before; None where it was stopped."""
    task, entry = trial.task, trial.entry
    clf = task.classifier(task.labels)
    same, done = trial.identity(clf), trial.folder / "results.json"
    if done.exists():
        return earlier(done, same)
    start, train = time.perf_counter(), task.shots(trial.budget.shots, trial.seed)
    found: dict[str, Any] | None
    if entry.method:
        found = adapted(trial, clf, train, same)
    elif entry.search == "probe":
        found = task.probe(clf, train, trial.folder / "probe.safetensors" if trial.main else None)
    else:
        found = {**task.scores(task.test.accuracy(clf)), "parameters": 0, **caches(clf)}
    if found is None:
        return None
    own = {"method": entry.label, "seed": trial.seed, "lr": entry.lr}
    scores = {**own, **found, "seconds": round(time.perf_counter() - start, 2)}
    if trial.main:
        write_file(done, json.dumps(scores | {"identity": same}, indent=1, ensure_ascii=False))
    return scores


def earlier(file: Path, same: Mapping[str, Any]) -> dict[str, Any]:
    """The scores in a file. Raises `InputError` where they were made with other settings, data or model."""
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    theirs: dict[str, Any] = kept.pop("identity", {})
    if differ := sorted(k for k in same.keys() | theirs.keys() if same.get(k) != theirs.get(k)):
        told = "; ".join(f"{k} was {_short(theirs.get(k))} and is now {_short(same.get(k))}" for k in differ[:3])
        raise InputError(
            f"{file.parent} holds results of other settings or data: {told}. Give the old ones, or another output"
        )
    return kept


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def adapted(trial: Trial, clf: CLIPClassifier, train: Part, same: Mapping[str, Any]) -> dict[str, Any] | None:
    """Trains a method, lets validation data decide what it leaves open, saves it, and only then sees test data."""
    task, file = trial.task, trial.folder / "adapter.safetensors"
    adapter = adapt(clf, known(trial.entry.method), name="clip", seed=seed_of(trial.seed, "adapter"))
    try:
        clf.train()
        inputs = prepared(trial, clf, adapter, train)
        cached = caches(clf, inputs)
        if trial.entry.lr and not trained(trial, clf, adapter, inputs, train.labels, same):
            return None
        clf.eval()
        facts = decided(trial, clf, adapter)
        if trial.main:
            save(adapter, file, task.header(clf, adapter))
        trial.accelerator.wait_for_everyone()
        test = task.test.accuracy(clf)
        count = adapter.num_parameters
    finally:
        adapter.detach()
    return {**task.scores(test, file), **facts, "parameters": count, **cached}


def prepared(trial: Trial, clf: CLIPClassifier, adapter: Adapter, train: Part) -> Inputs:
    """What training reads, as far as it can be computed before; Tip-Adapter has seen it then."""
    inputs = train.inputs(clf, Copies(trial.budget.augment, trial.task.model.size, trial.seed))
    if trial.entry.lr:
        inputs.fill(clf, trial.budget.plan.steps * trial.budget.batch, trial.accelerator.autocast)
    if isinstance(trial.entry.method, TipAdapter):
        TipAdapter.remember(adapter, inputs.passes(train.labels))
    told = ", ".join(f"{name} {'computed once' if how == 'once' else how}" for name, how in caches(clf, inputs).items())
    trial.accelerator.print(f"{trial.name}: {adapter.num_parameters:,} parameters; {told}")
    return inputs


def trained(
    trial: Trial, clf: CLIPClassifier, adapter: Adapter, inputs: Inputs, labels: Tensor, same: Mapping[str, Any]
) -> bool:
    """Whether training came to its end."""
    budget, entry, log = trial.budget, trial.entry, trial.folder / "metrics.jsonl"
    outcome = fit(
        loss_of(clf, inputs, labels, budget.batch),
        adapter,
        torch.optim.AdamW(adapter.groups(entry.lr, entry.weight_decay), eps=entry.eps),
        plan=replace(budget.plan, seed=trial.seed),
        accelerator=trial.accelerator,
        checkpoints=Checkpoints(trial.folder / "checkpoints", same, budget.save_every),
        log=log,
        callbacks=[Progress()],
    )
    if not outcome.stopped and trial.main:
        report.loss_plot(log, trial.folder / "loss.png")
    return not outcome.stopped


def decided(trial: Trial, clf: CLIPClassifier, adapter: Adapter) -> dict[str, Any]:
    """Searches on validation data: what they chose, and its accuracy there."""
    val = trial.task.val
    facts: dict[str, Any] = {}
    if trial.entry.search == "cache":
        tip = TipAdapter.search(adapter, val.inputs(clf).passes(val.labels)[0])
        facts = {"alpha": tip.alpha, "beta": tip.beta}
    elif trial.entry.search == "scale":
        place = search_scale(adapter, lambda: val.accuracy(clf), trial.budget.alphas)
        facts = {"scale": place.alpha, "validation by scale": {str(a): right for a, right in place.tried.items()}}
    return {**facts, "validation": val.accuracy(clf)}


def loss_of(clf: CLIPClassifier, inputs: Inputs, labels: Tensor, batch: int) -> Callable[[Micro], Mapping[str, Tensor]]:
    """Cross-entropy of a micro-batch, and its share of right answers."""

    def loss(micro: Micro) -> Mapping[str, Tensor]:
        places = micro.positions(batch // micro.world)
        items = [shuffled(micro.seed, "pictures", len(inputs), p) for p in places]
        logits = clf(inputs.batch(items, [inputs.copies.at(p) for p in places]))
        target = labels[items].to(logits.device)
        right = (logits.argmax(-1) == target).float().mean()
        return {"loss": F.cross_entropy(logits.float(), target), "accuracy": right}

    return loss
