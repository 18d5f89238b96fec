"""One small training loop for every pipeline: exact to the bit when resumed, and silent about nothing.

    def loss(micro):                                   # one micro-batch; `micro` draws everything that is random
        places = micro.positions(batch)                # this micro-batch's rows in the endless reading of the data
        x = images[[shuffled(micro.seed, "images", len(images), p) for p in places]]
        noise = torch.stack([torch.randn(x[0].shape, generator=micro.generator("noise", p)) for p in places])
        return {"loss": ...}                           # a scalar; further scalars are logged beside it

    fit(loss, adapter, optimizer, plan=Plan(steps=500, accumulate=4), checkpoints=Checkpoints(folder, every=100))

A *step* is one update of the parameters, made of `accumulate` micro-batches on each of `world` processes. Random
numbers come from generators keyed by (seed, purpose, index), never from a running state: a run that is stopped anywhere
and resumed, also inside an epoch or an accumulation (which replays from its start), draws what it would have drawn.

accelerate gives device, precision and processes. Several processes share gradients by one all-reduce of the adapter's
flattened gradients per step: adapters are small, the models need no wrapper, and unused base parameters cost nothing.

FSDP2 is for bases that do not fit: `vm.adapt`, then `fully_shard` on the blocks and on the model, then the optimiser.
It shares the gradients itself; checkpoints gather what it sharded. All processes call `vm.save`. Callbacks run on the
main process alone, so that they must not run a sharded model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from vismodal.callbacks import Callback, Log
from vismodal.draw import generator, seed_of
from vismodal.ema import Ema
from vismodal.errors import InputError
from vismodal.interrupt import Interrupts
from vismodal.resume import Checkpoints, Trainable
from vismodal.sharding import is_sharded, whole

Schedule = Literal["constant", "linear", "cosine"]


# -- what a run is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Args:
        steps: updates in all, counted from the very start of the run.
        accumulate: micro-batches for each update.
        seed: of everything random.
        schedule: course of the learning rate after warming up: constant, or falling to zero.
        warmup: updates over which the learning rate rises linearly from zero.
        clip: largest norm of the gradient; 0 leaves it as it is.
    """

    steps: int
    accumulate: int = 1
    seed: int = 0
    schedule: Schedule = "constant"
    warmup: int = 0
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("accumulate", 1), ("warmup", 0), ("clip", 0)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """Factor on the optimiser's learning rates for the update after `step` updates."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        match self.schedule:
            case "constant":
                return 1.0
            case "linear":
                return 1 - done
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Micro:
    """Where the run stands: the micro-batch `index` (of all, over all steps) on process `rank` of `world`."""

    seed: int
    step: int
    index: int
    rank: int = 0
    world: int = 1

    def positions(self, batch: int) -> range:
        """Places of its rows in the endless reading of the data; no two micro-batches share one."""
        start = (self.index * self.world + self.rank) * batch
        return range(start, start + batch)

    def generator(self, purpose: str, position: int) -> torch.Generator:
        """The generator for one draw of one row; it does not depend on how rows are split into batches."""
        return generator(self.seed, purpose, position)


@dataclass(frozen=True)
class Outcome:
    """How training ended: after `step` updates, of which the last `metrics`, and whether somebody stopped it."""

    step: int
    metrics: Mapping[str, float]
    stopped: bool = False


# -- the loop --------------------------------------------------------------------------------------------------------


def fit(
    loss: Callable[[Micro], Mapping[str, Tensor]],
    adapter: Trainable,
    optimizer: Optimizer,
    *,
    plan: Plan,
    accelerator: Accelerator | None = None,
    checkpoints: Checkpoints | None = None,
    log: Path | None = None,
    callbacks: Sequence[Callback] = (),
    ema: Ema | None = None,
    patience: int = 1,
) -> Outcome:
    """Trains `adapter`'s parameters to lower `loss`, from the newest of `checkpoints` where there is one.

    `log` is the metrics.jsonl. `ema` takes in the parameters after each update; wearing it is left to the caller.
    `patience` is within how many steps each site has to get a gradient: 1, unless a loss may leave some out by chance.
    Ctrl-C and SIGTERM save a checkpoint and give an `Outcome` with `stopped`.
    Raises `InputError` if the loss or the gradient is not finite (the last good state is saved before), if a site of
    the adapter turns out dead, and if the checkpoint is another run's or has more than `plan.steps` steps.
    """
    run = _Run(loss, adapter, optimizer, plan, accelerator or Accelerator(), checkpoints, ema, patience)
    main = run.accelerator.is_main_process
    watchers = callbacks if main else ()
    lines = Log(log, run.step) if log is not None and main else None
    with run.stop.listening(), _own_randomness(run.accelerator.device):
        try:
            with run.stop.interruptible():
                for callback in watchers:
                    callback.begin(run.step, plan.steps)
                while run.step < plan.steps and not run.stop.asked:
                    run.update(lines)
                    if checkpoints and checkpoints.due(run.step):
                        run.save()
                    for callback in watchers:
                        callback.after(run.step, run.metrics)
        except Exception:
            if run.accelerator.num_processes == 1:  # the others would wait for this one forever
                with suppress(InputError):
                    run.save()
            raise
        finally:
            for callback in watchers:
                callback.end()
        run.save()
    optimizer.zero_grad()
    return Outcome(run.step, run.metrics, run.stop.asked)


class _Run:
    """The state of one call of `fit`. Outside `shielded` it is consistent, and may be saved, at every moment."""

    def __init__(
        self,
        loss: Callable[[Micro], Mapping[str, Tensor]],
        adapter: Trainable,
        optimizer: Optimizer,
        plan: Plan,
        accelerator: Accelerator,
        checkpoints: Checkpoints | None,
        ema: Ema | None,
        patience: int,
    ) -> None:
        self.loss, self.adapter, self.optimizer, self.plan, self.ema = loss, adapter, optimizer, plan, ema
        self.accelerator, self.checkpoints, self.scaler = accelerator, checkpoints, accelerator.scaler
        self.parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
        self.rates = [float(g["lr"]) for g in optimizer.param_groups]
        self.metrics: Mapping[str, float] = {}
        self.stop = Interrupts(flag_only=accelerator.num_processes > 1)
        if checkpoints:
            checkpoints.check(plan.steps)
        self.step, extra = checkpoints.restore(adapter, optimizer, ema) if checkpoints else (0, {})
        self.saved = self.first = self.step
        self.patience, self.dead = patience, list[str]()
        if self.scaler is not None and "scaler" in extra:
            self.scaler.load_state_dict(extra["scaler"])

    def update(self, log: Log | None) -> None:
        """One step: all micro-batches forward and backward, then the parameters, which until then are untouched."""
        self.optimizer.zero_grad()
        rate = self.plan.rate(self.step)
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        totals = self._share(self._backward())
        if self.step == self.first or self.dead:
            self._check_alive()
        self._rest()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        totals["gradient"] = whole(nn.utils.clip_grad_norm_(self.parameters, self.plan.clip or math.inf))
        values = torch.stack([value.reshape(()) for value in totals.values()]).tolist()  # one wait for the device
        metrics = dict(zip(totals, values, strict=True)) | {"lr": self.rates[0] * rate}
        self._check_finite(metrics)
        with self.stop.shielded():
            if self.scaler is not None:  # skips the step by itself where the scaled gradient overflowed
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
            self.adapter.advance(self.step + 1, self.plan.steps)
            if self.ema:
                self.ema.update(self.step + 1)
            self.step, self.metrics = self.step + 1, metrics
            if log:
                log.write(self.step, metrics)

    def _backward(self) -> dict[str, Tensor]:
        """Gradients of the mean over this process's micro-batches; returns the means of what `loss` gave."""
        count = self.plan.accumulate
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        totals: dict[str, Tensor] = {}
        for index in range(self.step * count, (self.step + 1) * count):
            torch.manual_seed(seed_of(self.plan.seed, "global", index, rank))  # dropout draws from the global generator
            with self.accelerator.autocast():
                values = dict(self.loss(Micro(self.plan.seed, self.step, index, rank, world)))
            penalty = self.adapter.penalty()
            if penalty is not None:
                values |= {"loss": values["loss"] + penalty, "penalty": penalty}
            self.accelerator.backward(values["loss"] / count)
            for name, value in values.items():
                mean = value.detach().float() / count
                totals[name] = totals[name] + mean if name in totals else mean
        return totals

    def _share(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over all processes, of the gradients in place. A process that was asked to stop stops all."""
        if self.accelerator.num_processes == 1:
            return totals
        parameters = [p for p in self.parameters if not is_sharded(p)]  # FSDP2 has shared the others' in its backward
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        stop = torch.tensor([float(self.stop.asked)], device=self.accelerator.device)
        parts = [*gradients, *totals.values(), stop]
        flat = self.accelerator.reduce(torch.cat([part.reshape(-1).float() for part in parts]), reduction="mean")
        *means, stop = flat.split([part.numel() for part in parts])
        for parameter, mean in zip(parameters, means, strict=False):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)
        self.stop.asked = bool(stop > 0)
        return dict(zip(totals, means[len(gradients) :], strict=True))

    def _rest(self) -> None:
        """What learns no more has no gradient: it neither moves, in any optimiser, nor counts in the norm."""
        for group in self.optimizer.param_groups:
            if self.step >= group.get("last", self.plan.steps):
                for parameter in group["params"]:
                    parameter.grad = None

    def _check_alive(self) -> None:
        mine = {id(p) for _, p in self.adapter.named_parameters()}
        strange = sum(id(p) not in mine for p in self.parameters)
        if strange:
            raise InputError(
                f"{strange} of the optimiser's {len(self.parameters)} parameters are not the adapter's, and would not "
                "learn; make the optimiser from adapter.groups(lr), after pruning, calibrating and fully_shard"
            )
        if len({is_sharded(p) for p in self.parameters}) > 1:
            raise InputError("some of the adapter is sharded and some is not; call fully_shard on the whole model too")
        dead = [site for site in self.adapter.unused() if self.step == self.first or site in self.dead]
        self.dead = dead
        if dead and self.step - self.first + 1 >= self.patience:
            shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
            when = "the first step" if self.patience == 1 else f"the first {self.patience} steps"
            raise InputError(
                f"{len(dead)} sites of the adapter did not run or got no gradient in {when}: {shown}. Leave "
                "them out with sites= or where=, or undo what was done to the model after adapt (fuse_qkv_projections?)"
            )

    def _check_finite(self, metrics: Mapping[str, float]) -> None:
        names = ("loss",) if self.scaler is not None else ("loss", "gradient")  # a scaler deals with overflows itself
        bad = [f"{name} is {metrics[name]}" for name in names if not math.isfinite(metrics[name])]
        if not bad:
            return
        self.save()
        folder = self.checkpoints.folder if self.checkpoints and self.saved else None
        kept = f"; the state after step {self.step} is in {folder}" if folder else ""
        raise InputError(
            f"{' and '.join(bad)} at step {self.step + 1}{kept}. Lower the learning rate (now {metrics['lr']:g}), "
            "or use mixed_precision bf16 or no"
        )

    def save(self) -> None:
        """Writes a checkpoint of the present step unless there is one."""
        with self.stop.shielded():
            if self.ema:  # a stop may have come while the adapter wore the averages
                self.ema.take_off()
        if self.checkpoints is None or self.saved == self.step:
            return
        with self.stop.shielded():
            extra = {"scaler": self.scaler.state_dict()} if self.scaler is not None else {}
            write = self.accelerator.is_main_process
            self.checkpoints.save(self.step, self.adapter, self.optimizer, extra, ema=self.ema, write=write)
            self.saved = self.step
        self.accelerator.wait_for_everyone()


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """The caller's global random state is as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
