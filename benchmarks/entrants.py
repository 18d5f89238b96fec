"""Parts of `accuracy.py`: one training of one contestant on one of the six sets, and what is measured of it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from contest import SEARCH
from contestants import FULL, contestants
from measure import kept_bytes
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

import vismodal as vm
from vismodal.classification.learning import Objective, Run, answers, calibrate, model_of
from vismodal.classification.vision import Source, fresh_head, load_vision
from vismodal.data.folder import Folder, read_folder
from vismodal.data.views import Augment, Views
from vismodal.draw import seed_of
from vismodal.methods import NOAH, Method
from vismodal.train import Micro, Plan, fit

Model = Literal["vit-s", "tiny-vit"]
Row = dict[str, Any]

PROBE, PEER, OURS = "linear probe", "peft LoRA", "LoRA"
CORE = (FULL, PROBE, PEER, OURS)  # of vit-s; the others are candidates for the best two
RANK, SITES, TARGETS = 8, ("attn.qkv",), ("qkv",)  # of both LoRAs
EVERYWHERE = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
WEIGHTS = "weights/vit_small_patch14_dinov2_saliency.safetensors"


@dataclass(frozen=True)
class Contestant:
    """What is trained, besides a new head, and the learning rate that is tried first.

    Args:
        kind: "full" trains all parameters, "probe" the head alone, "peft" is peft's LoRA.
        method: of "ours".
    """

    kind: Literal["full", "probe", "peft", "ours"]
    lr: float
    method: Method | None = None


VIT_S: Mapping[str, Contestant] = {
    FULL: Contestant("full", 1e-4),
    PROBE: Contestant("probe", 3e-3),
    PEER: Contestant("peft", 3e-3),
    OURS: Contestant("ours", 3e-3, vm.LoRA(rank=RANK, sites=SITES)),
    "LoRA everywhere": Contestant("ours", 1e-3, vm.LoRA(rank=16, sites=EVERYWHERE)),
    "OFT everywhere": Contestant("ours", 3e-3, vm.OFT(sites=EVERYWHERE)),
    "Convpass": Contestant("ours", 1e-3, vm.Convpass()),
    "Pfeiffer": Contestant("ours", 1e-3, vm.Pfeiffer()),
}


@cache
def entrants(model: Model) -> Mapping[str, Contestant]:
    """By label, in the order in which they run."""
    if model == "vit-s":
        return VIT_S
    found = {FULL: Contestant("full", 1e-4), PROBE: Contestant("probe", 3e-3), PEER: Contestant("peft", 3e-3)}
    others = {k: v for k, v in contestants("tiny-vit").items() if k not in (FULL, "LinearProbe")}
    return found | {label: Contestant("ours", each.lr, each.method) for label, each in others.items()}


@dataclass(frozen=True)
class Recipe:
    """How everybody trains.

    Args:
        epochs: of the trainings that count.
        pilot: epochs with each rate that is tried.
        batch: pictures for each update.
        head: learning rate of the new head; a linear probe's is searched.
        crop: least share of a picture's area that a training view shows.
        bf16: autocast.
    """

    epochs: int = 10
    pilot: int = 3
    batch: int = 32
    head: float = 3e-3
    crop: float = 0.75
    bf16: bool = True


@dataclass(frozen=True)
class Job:
    """One training; a pilot, of which only the validation part is looked at, or a whole one."""

    model: Model
    label: str
    set: str
    lr: float
    seed: int
    pilot: bool
    data: Path
    recipe: Recipe

    def key(self) -> Row:
        """What names its row, wherever the data lie."""
        return {k: v for k, v in asdict(self).items() if k not in ("data", "recipe")} | {"recipe": asdict(self.recipe)}


# -- what stays in memory --------------------------------------------------------------------------------------------


def source(model: Model, data: Path) -> Source:
    if model == "tiny-vit":
        return Source()
    return Source("vit_small_patch14_dinov2", weights=str(data / WEIGHTS), image_size=98)


@cache
def base(model: Model, data: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    """The pretrained model, which contestants copy, and its preprocessing. It attends by plain matrix products: on a
    processor the backward of torch's fused attention is a quarter of a training step."""
    fused = use_fused_attn()
    set_fused_attn(False)
    try:
        vision = load_vision(source(model, data), classes=2)
    finally:
        set_fused_attn(fused)
    return vision.model.requires_grad_(False), vision.config


@cache
def prefix(model: Model, data: Path) -> vm.FrozenPrefix:
    """For linear probes: what the frozen model makes of each view is computed once in a process, for all seeds."""
    return vm.FrozenPrefix(copy.deepcopy(base(model, data)[0]))


@cache
def folder(data: Path, name: str) -> Folder:
    return read_folder(data / "transfer" / name)


@cache
def views(model: Model, data: Path, name: str, recipe: Recipe) -> Mapping[str, Views]:
    """The three parts, decoded once. Each epoch has its own view of a picture, whoever learns and by whichever seed."""
    found, (_, config) = folder(data, name), base(model, data)
    augment = Augment(crop=recipe.crop, copies=recipe.epochs)
    return {
        "train": Views(found.train, config, augment),
        "val": Views(found.val, config),
        "test": Views(found.test, config),
    }


# -- what is trained -------------------------------------------------------------------------------------------------


class Plain:
    """The parameters of a model that ask for gradients, as `fit` wants them: for what is not the library's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": [p for _, p in self.named_parameters()], "lr": lr, "weight_decay": 0.0}]

    def heads(self) -> set[nn.Parameter]:
        return set(self.model.get_submodule("head").parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        raise NotImplementedError("these trainings are not resumed")

    def unused(self) -> list[str]:
        return [name for name, p in self.named_parameters() if p.grad is None]

    def penalty(self) -> None:
        return None

    def advance(self, step: int, steps: int) -> None:
        pass

    def detach(self) -> None:
        pass


def attach(given: Contestant, model: nn.Module, seed: int) -> vm.Adapter | Plain:
    """`model`'s head is new already; everybody trains it."""
    if given.kind == "full":
        return Plain(model.requires_grad_(True))
    if given.kind == "peft":
        from peft import LoraConfig, inject_adapter_in_model

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(seed, "adapter"))
            inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)), model)
        model.get_submodule("head").requires_grad_(True)
        return Plain(model)
    methods = [m for m in (given.method, vm.LinearProbe()) if m]
    return vm.adapt(model, methods, "accuracy", seed=seed_of(seed, "adapter"))


def heads(adapter: vm.Adapter | Plain) -> set[nn.Parameter]:
    """The new head's parameters."""
    if isinstance(adapter, Plain):
        return adapter.heads()
    slots = {slot for slot, method in adapter.methods.items() if type(method) is vm.LinearProbe}
    return {p for name, p in adapter.named_parameters() if name.partition("/")[0] in slots}


def groups(adapter: vm.Adapter | Plain, lr: float, head: float) -> list[dict[str, Any]]:
    """For AdamW: the head at its own rate, no decay."""
    last = heads(adapter)
    found = [{**g, "params": [p for p in g["params"] if p not in last]} for g in adapter.groups(lr)]
    return [*(g for g in found if g["params"]), {"params": list(last), "lr": head, "weight_decay": 0.0}]


# -- one training ----------------------------------------------------------------------------------------------------


class Trained:
    """A contestant on a copy of the model, with the loss that it learns by. Linear probes share one copy, on which
    they take turns, unless `alone`."""

    def __init__(self, job: Job, method: Method | None = None, alone: bool = False) -> None:
        self.job, self.recipe = job, job.recipe
        self.given = entrants(job.model)[job.label]
        if method is not None:
            self.given = Contestant(self.given.kind, self.given.lr, method)
        self.views = views(job.model, job.data, job.set, job.recipe)
        shared = self.given.kind == "probe" and not alone
        self.run: Run = prefix(job.model, job.data) if shared else copy.deepcopy(base(job.model, job.data)[0])
        self.model = model_of(self.run)
        classes = len(folder(job.data, job.set).classes)
        fresh_head(self.model, classes, seed_of(job.seed, "head"))
        self.adapter = attach(self.given, self.model, job.seed)
        self.objective = Objective(classes, job.recipe.batch)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16)

    def loss(self, run: Run) -> Callable[[Micro], Mapping[str, Tensor]]:
        inner = self.objective.loss(run, self.views["train"])

        def loss(micro: Micro) -> Mapping[str, Tensor]:
            with self.autocast():
                return inner(micro)

        return loss

    def optimizer(self) -> torch.optim.Optimizer:
        head = self.job.lr if self.given.kind == "probe" else self.recipe.head
        return torch.optim.AdamW(groups(self.adapter, self.job.lr, head))

    def learn(self) -> None:
        """Raises `InputError` if it diverges."""
        loss, epochs = self.loss(self.run), self.recipe.pilot if self.job.pilot else self.recipe.epochs
        steps = math.ceil(len(self.views["train"]) * epochs / self.recipe.batch)
        self.model.train()
        if isinstance(self.adapter, vm.Adapter):
            calibrate(self.adapter, loss, self.job.seed)
        plan = Plan(steps, seed=self.job.seed, schedule="cosine", warmup=steps // 10)
        if fit(loss, self.adapter, self.optimizer(), plan=plan).stopped:
            raise KeyboardInterrupt

    def judged(self, part: str) -> tuple[float, float]:
        """Accuracy and mean cross-entropy."""
        seen = self.views[part]
        logits = answers(self.run, seen, 2 * self.recipe.batch, self.autocast)
        return (logits.argmax(1) == seen.labels).float().mean().item(), F.cross_entropy(logits, seen.labels).item()

    def kept(self) -> int:
        """Bytes that a training step keeps for its backward, without parameters."""
        self.model.train()
        return kept_bytes(self.model, lambda: self.loss(self.model)(Micro(0, 0, 0))["loss"])

    def parameters(self) -> int:
        """That are trained, without the head's."""
        last = heads(self.adapter)
        return sum(p.numel() for _, p in self.adapter.named_parameters() if p.requires_grad and p not in last)


def measured(job: Job) -> Row:
    """The row of a training. One that diverges has no loss; the test part is looked at after whole trainings alone."""
    start, cpu = time.perf_counter(), time.process_time()
    trained = Trained(job, searched(job))
    row: Row = job.key() | {"parameters": trained.parameters()}
    try:
        trained.learn()
        row["val"], row["val_loss"] = trained.judged("val")
        if not job.pilot:
            row["test"], row["test_loss"] = trained.judged("test")
            row["kept"] = trained.kept()
            row["survey"] = trained.given.method.survey if trained.given.method else ""
    except vm.InputError as error:
        if "Lower the learning rate" not in str(error):
            raise
        row |= {"val": 0.0, "val_loss": None} | ({} if job.pilot else {"test": 0.0})
    finally:
        trained.adapter.detach()
    row |= {"seconds": round(time.perf_counter() - start, 1), "cpu": round(time.process_time() - cpu, 1)}
    return row


def searched(job: Job) -> Method | None:
    """NOAH's subnet of half the supernet's parameters, which is found by the validation part and then trained anew."""
    method = entrants(job.model)[job.label].method
    if job.pilot or not isinstance(method, NOAH) or method.subnet:
        return None
    trained = Trained(job)
    trained.learn()
    assert isinstance(trained.adapter, vm.Adapter)
    slots = [m for k, m in trained.adapter.modules.items() if k.startswith("noah/")]
    budget = method.count(slots, method.chosen(slots)) // 2
    return vm.evolve(trained.adapter, lambda: -trained.judged("val")[1], budget, **SEARCH, seed=job.seed).method


def stepping(job: Job) -> Callable[[], None]:
    """What makes one training step, on a copy of its own and from pixels."""
    trained = Trained(job, alone=True)
    loss, optimizer = trained.loss(trained.model), trained.optimizer()
    trained.model.train()

    def step() -> None:
        optimizer.zero_grad()
        value, penalty = loss(Micro(0, 0, 0))["loss"], trained.adapter.penalty()
        (value if penalty is None else value + penalty).backward()
        optimizer.step()

    return step
