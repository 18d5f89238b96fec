"""What the training scripts of this folder share: schedule, moving average, checkpoints, log, a clean stop.

A checkpoint is one safetensors file (weights, their moving average, AdamW's moments) written to a temporary name and
renamed. It resumes exactly; one without moments or average (an exported model, say) resumes from the weights alone.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Generic, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

M = TypeVar("M", bound=nn.Module)
SAVE_EVERY = 300.0  # seconds between checkpoints


@dataclass
class Schedule:
    """Linear warm-up, then cosine to 2%, over `steps` or `minutes`, whichever is used up first.

    Minutes because other work shares the machine: a run that is given an hour then ends its decay on time.
    """

    lr: float
    steps: int
    minutes: float
    warmup: int
    step: int = 0
    seconds: float = 0.0

    @property
    def progress(self) -> float:
        """How much of the run is over, 0 to 1."""
        return min(1.0, max(self.step / self.steps, self.seconds / (60 * self.minutes)))

    def rate(self) -> float:
        """The learning rate of the coming step."""
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress))
        return self.lr * cosine * min(1.0, (self.step + 1) / self.warmup)


@dataclass
class Average(Generic[M]):
    """An exponential moving average of a model; young averages forget faster, or the random start would linger."""

    model: M
    decay: float
    copy: M = field(init=False)

    def __post_init__(self) -> None:
        self.copy = deepcopy(self.model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average one step towards the model."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours: list[Tensor] = list(self.copy.parameters())
        theirs: list[Tensor] = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - decay)


class Stop:
    """True once SIGTERM or SIGINT came; the loop then saves and leaves."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Handles both signals inside, and puts the former handlers back after."""
        former = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def save_state(file: Path, average: Average[M], optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """Writes everything that a resume needs."""
    tensors = {f"model.{k}": v for k, v in average.model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.copy.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    # clone: tied or channels_last tensors are refused by safetensors as they lie
    save_file(
        {k: v.clone().contiguous() for k, v in tensors.items()},
        temporary,
        {"step": str(schedule.step), "seconds": str(schedule.seconds)},
    )
    os.replace(temporary, file)


def load_state(file: Path, average: Average[M], optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """Restores a checkpoint; without moments or average in it, the weights alone."""
    with safe_open(file, "pt") as stored:
        tensors: dict[str, Tensor] = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        header = stored.metadata() or {}
    weights = _under(tensors, "model.")
    average.model.load_state_dict(weights)
    average.copy.load_state_dict(_under(tensors, "average.") or weights)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _under(tensors, "optimizer.").items():
        i, name = key.split(".")
        moments.setdefault(int(i), {})[name] = value
    if moments:
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    schedule.step, schedule.seconds = int(header.get("step", 0)), float(header.get("seconds", 0))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Log:
    """Lines of JSON in `metrics.jsonl`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"

    def write(self, **values: float | int | str) -> None:
        """Appends one line, numbers rounded to five places."""
        line = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")


def ticks(schedule: Schedule, optimizer: torch.optim.Optimizer, stop: Stop, label: str) -> Iterator[tuple[int, tqdm]]:
    """The steps of a run: sets the learning rate, counts, ends when the schedule does or when asked."""
    with tqdm(initial=schedule.step, total=schedule.steps, desc=label, mininterval=5) as bar:
        while schedule.progress < 1 and not stop.asked:
            started = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate()
            yield schedule.step, bar
            schedule.step += 1
            schedule.seconds += time.monotonic() - started
            bar.update()


def single_core_threads(count: int) -> ThreadPoolExecutor:
    """Threads that use one core each."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


class Workers:
    """Gradients of the parts of a batch, each in a thread of its own that uses one core.

    Not one part over all cores: oneDNN's threads wait for each other by spinning, and where other work holds a core
    that made a step of 0.2 s last 2 to 5 s. Workers meet once a step. `autograd.grad`, since two `backward` calls
    would race for `.grad`.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        torch.set_num_threads(1)
        # The CPU's flash attention is slow backwards at tens of tokens: 0.31 CPU-seconds a step of 20 instead of 0.22.
        torch.backends.cuda.enable_flash_sdp(False)  # the switch holds for the CPU too, its name notwithstanding
        self.parameters, self.count = list(model.parameters()), count
        self.pool = single_core_threads(count)

    def backward(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        """Sets `.grad` to the gradient of the mean of the losses, one per worker, and returns that mean."""
        done = list(self.pool.map(self._gradients, losses))
        for i, p in enumerate(self.parameters):
            p.grad = torch.stack([gradients[i] for _, gradients in done]).mean(0)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        value = sum(loss for loss, _ in done) / len(done)
        if not math.isfinite(value):
            raise FloatingPointError("the loss is not finite: lower --lr, or resume from the last checkpoint")
        return value

    def _gradients(self, loss_of: Callable[[], Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        loss = loss_of()
        return float(loss.detach()), torch.autograd.grad(loss, self.parameters)
