"""Parts of `methods.py`: one method on one task: a rate for it, training, its file, and what the file is worth."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from contestants import Contestant
from measure import Time, kept_bytes, seconds
from safetensors.torch import load_file, save_file
from tasks import Judged, Task
from torch import Tensor, nn

import vismodal as vm
from vismodal.checkpoint import from_json, to_json
from vismodal.draw import seed_of
from vismodal.methods import NOAH, Method, TipAdapter
from vismodal.methods.sparse import SparseMask
from vismodal.train import Micro, Plan, fit

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
TRIALS = 5  # rates that are tried at most
PASSES = 10  # of Tip-Adapter over its pictures, as in the paper
SAMPLES = 4  # batches that SparseMask sees
SEARCH = {"generations": 3, "population": 8, "parents": 4, "mutations": 4, "crossings": 4}  # of NOAH's subnets


@dataclass(frozen=True)
class Length:
    """How long everybody trains.

    Args:
        steps: updates.
        batch: pictures for each update.
        seed: of everything random.
    """

    steps: int
    batch: int
    seed: int


Row = dict[str, Any]
Loss = TypeVar("Loss", float, tuple[float, float])


def contest(task: Task, given: Contestant, c: Length) -> Row:
    """What is measured of one method: trained whole at several rates, of which the validation part chooses one."""
    start = time.perf_counter()
    model, method = copy.deepcopy(task.base), given.method
    row: Row = {"survey": method.survey if method else ""}
    if isinstance(method, NOAH) and not method.subnet:
        method = _searched(task, method, given.lr, c)
        row["note"] = f"subnet {'-'.join(map(str, method.subnet))}"
    with _Trained(task, model, method, c) as probe:
        trains = any(p.requires_grad for _, p in probe.named_parameters())
    with TemporaryDirectory() as folder:
        rows: dict[float, Row] = {}

        def result(lr: float) -> tuple[float, float]:
            rows[lr] = _measured(task, model, method, lr, c, Path(folder) / f"{lr:g}.safetensors")
            return -rows[lr]["val"], rows[lr]["val_loss"]

        tried = climb(given.lr, result) if trains else {given.lr: result(given.lr)}
        lr = min(tried, key=tried.__getitem__)
        row |= rows[lr] | {"_": _tested(task, rows[lr], Path(folder) / f"{lr:g}.safetensors")}
    row |= {"test": row["_"].scores.mean().item(), "lr": lr if trains else None}
    row["tried"] = {f"{rate:g}": values for rate, values in tried.items()} if trains else {}
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _measured(task: Task, model: nn.Module, method: Method | None, lr: float, c: Length, file: Path) -> Row:
    """Trains, judges on the validation part, saves, and takes all off again. A rate that diverges is infinitely bad."""
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    with _Trained(task, model, method, c) as trained:
        try:
            trained.learn(lr, c.steps)
        except vm.InputError as error:
            if "Lower the learning rate" not in str(error):
                raise
            return {"val": -math.inf, "val_loss": math.inf}
        row: Row = {"method": to_json(method) if method else None, "parameters": trained.own, "kept": trained.kept()}
        val = task.judged(model, "val")
        row |= {"bytes": trained.save(file), "val": val.scores.mean().item(), "val_loss": val.loss}
    changed = [name for name, p in model.state_dict().items() if not torch.equal(p, before.pop(name))]
    if changed or before:
        raise RuntimeError(f"the base was changed: {', '.join([*changed, *before][:4])}")
    return row


def _tested(task: Task, row: Row, file: Path) -> Judged:
    """On the test part, what the file makes of an untouched copy of the base."""
    model = copy.deepcopy(task.base)
    if row["method"] is None:
        model.load_state_dict(load_file(file))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vm.load(model, file, "again")
    again = task.judged(model, "val").loss
    if not math.isclose(again, row["val_loss"], rel_tol=1e-4):
        raise RuntimeError(f"the file's loss is {again}, the trained adapter's {row['val_loss']}")
    return task.judged(model, "test")


def compared(row: Row, base: Judged) -> Row:
    """With the lift over the base on the test part, and its standard error over the pictures."""
    gain = row.pop("_").scores - base.scores
    return row | {"lift": gain.mean().item(), "error": gain.std().item() / math.sqrt(len(gain))}


# -- the rate --------------------------------------------------------------------------------------------------------


def climb(start: float, loss: Callable[[float], Loss]) -> dict[float, Loss]:
    """The loss of rates around `start`: upwards as long as it falls, or else downwards; at most `TRIALS` of them."""
    at = RATES.index(start)
    tried = {start: loss(start)}
    for way in (1, -1):
        i = at + way
        while 0 <= i < len(RATES) and len(tried) < TRIALS:
            best = min(tried.values())
            tried[RATES[i]] = loss(RATES[i])
            if not tried[RATES[i]] < best:
                break
            i += way
        if min(tried, key=tried.__getitem__) != start:
            break
    return tried


# -- one training ----------------------------------------------------------------------------------------------------


class _Trained:
    """A method attached to a model, or all of the model's parameters; taken off again at the end."""

    def __init__(self, task: Task, model: nn.Module, method: Method | None, c: Length) -> None:
        self.task, self.model, self.c = task, model, c
        self.loss = task.loss(model, c.batch)
        self.heads = {type(head) for head in task.heads}
        methods = [method, *(h for h in task.heads if type(h) is not type(method))]
        self.adapter: vm.Adapter | Whole
        if method is None:
            self.adapter = Whole(model)
        else:
            self.adapter = vm.adapt(model, [m for m in methods if m], "contest", seed=seed_of(c.seed, "adapter"))

    def __enter__(self) -> _Trained:
        return self

    def __exit__(self, *_: object) -> None:
        self.adapter.detach()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.adapter.named_parameters()

    @property
    def own(self) -> int:
        """Parameters that are trained, without those of the head."""
        if isinstance(self.adapter, Whole):
            head = len(self.heads) and sum(p.numel() for n, p in self.model.named_parameters() if n.startswith("head."))
            return sum(p.numel() for p in self.model.parameters()) - head
        heads = {slot for slot, m in self.adapter.methods.items() if type(m) in self.heads}
        named = [(k.partition("/")[0], p) for k, p in self.named_parameters() if p.requires_grad]
        return sum(p.numel() for slot, p in named if slot not in heads)

    def methods(self) -> Mapping[str, Method]:
        return self.adapter.methods if isinstance(self.adapter, vm.Adapter) else {}

    def prepare(self) -> None:
        """What methods that choose by data want to see before they are trained."""
        methods = self.methods().values()
        if any(isinstance(m, TipAdapter) for m in methods):
            task: Any = self.task
            TipAdapter.remember(self.adapter, (task.turn(self.c.seed, i) for i in range(PASSES)))  # type: ignore[arg-type]
        if any(isinstance(m, SparseMask) for m in methods) and isinstance(self.adapter, vm.Adapter):
            with self.adapter.calibrating():
                for i in range(SAMPLES):
                    self.loss(Micro(self.c.seed, 0, i))["loss"].backward()
            for p in self.adapter.parameters():
                p.grad = None

    def learn(self, lr: float, steps: int) -> None:
        self.prepare()
        groups = self.adapter.groups(lr)
        if groups:
            self.model.train()
            plan = Plan(steps, seed=self.c.seed, schedule="cosine", warmup=steps // 10)
            fit(self.loss, self.adapter, torch.optim.AdamW(groups, lr=lr), plan=plan)
        self.model.eval()
        if any(isinstance(m, TipAdapter) for m in self.methods().values()):
            task: Any = self.task
            TipAdapter.search(self.adapter, task.parts["val"].batches())  # type: ignore[arg-type]

    def kept(self) -> int:
        """Bytes that a training step keeps for its backward."""
        self.model.train()
        size = kept_bytes(self.model, lambda: self.loss(Micro(self.c.seed, 0, 0))["loss"])
        self.model.eval()
        return size

    def save(self, file: Path) -> int:
        if isinstance(self.adapter, vm.Adapter):
            vm.save(self.adapter, file)
        else:
            save_file({k: t.contiguous() for k, t in self.model.state_dict().items()}, file)
        return file.stat().st_size


class Whole:
    """All parameters of a model, as `fit` wants them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(True)
        self.before = {name: t.clone() for name, t in model.state_dict().items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "lr": lr, "weight_decay": 0.0}]

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(state)

    def unused(self) -> list[str]:
        return []

    def penalty(self) -> None:
        return None

    def advance(self, step: int, steps: int) -> None:
        pass

    def detach(self) -> None:
        self.load_state_dict(self.before)


def _searched(task: Task, method: NOAH, lr: float, c: Length) -> NOAH:
    """Trains the supernet and gives the best subnet of half its parameters by the loss on the validation part."""
    model = copy.deepcopy(task.base)
    with _Trained(task, model, method, c) as trained:
        trained.learn(lr, c.steps)
        assert isinstance(trained.adapter, vm.Adapter)
        slots = {k: m for k, m in trained.adapter.modules.items() if k.startswith("noah/")}
        budget = method.count(list(slots.values()), method.chosen(list(slots.values()))) // 2
        found = vm.evolve(trained.adapter, lambda: -task.judged(model, "val").loss, budget, **SEARCH, seed=c.seed)
    return found.method


# -- time ------------------------------------------------------------------------------------------------------------


def stepping(task: Task, row: Row, c: Length) -> Callable[[], Time] | None:
    """What makes one training step of a measured method on a copy of its own; None for one that trains nothing."""
    if row["lr"] is None:
        return None
    method = from_json(row["method"]) if row["method"] else None
    model = copy.deepcopy(task.base)
    trained = _Trained(task, model, method, c)
    trained.prepare()
    optimizer = torch.optim.AdamW(trained.adapter.groups(row["lr"]))
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        loss, penalty = trained.loss(Micro(c.seed, 0, 0))["loss"], trained.adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        trained.adapter.advance(1, 10**6)

    return lambda: seconds(step)
