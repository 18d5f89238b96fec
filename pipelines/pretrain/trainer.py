"""A training run: what the scripts of this folder have in common, from the first step to the exported assets."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from loop import SAVE_EVERY, Average, Log, Schedule, Stop, Workers, load_state, save_state, ticks
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Trainer(Generic[M]):
    """Goes on from `state.safetensors` in `out` where there is one.

    A script says what the losses of a step are, what is measured, and what is exported: `average.copy` is the model
    that both are about. `decay` is of that moving average; `export_every` are seconds, besides the end of the run.
    """

    def __init__(
        self,
        name: str,
        out: Path,
        model: M,
        workers: Workers,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        decay: float = 0.999,
        export_every: float = math.inf,
    ) -> None:
        self.name, self.log, self.state = name, Log(out), out / "state.safetensors"
        self.model, self.average = model, Average(model, decay)
        self.workers, self.optimizer, self.schedule = workers, optimizer, schedule
        self.export_every = export_every
        if self.state.exists():
            load_state(self.state, self.average, self.optimizer, self.schedule)

    def losses(self, step: int) -> Sequence[Callable[[], Tensor]]:
        """One for each worker, of its part of the batch."""
        raise NotImplementedError

    def measure(self) -> dict[str, float]:
        """Figures of the moving average, for the log."""
        raise NotImplementedError

    def write_assets(self) -> dict[str, float]:
        """Exports the moving average; returns the figures of what was exported."""
        raise NotImplementedError

    def step(self, step: int) -> float:
        """One step; returns the loss."""
        loss = self.workers.backward(self.losses(step))
        self.optimizer.step()
        self.average.update(step)
        return loss

    def save(self) -> None:
        """Checkpoint and figures."""
        save_state(self.state, self.average, self.optimizer, self.schedule)
        self.log.write(step=self.schedule.step, seconds=self.schedule.seconds, **self.measure())

    def export(self) -> dict[str, float]:
        """Exports, and logs the figures."""
        figures = self.write_assets()
        self.log.write(**figures)
        return figures

    def train(self) -> dict[str, float]:
        """Trains to the end of the schedule, or until asked to stop, and exports."""
        saved = exported = self.schedule.seconds
        with Stop().listening() as stop:
            for step, bar in ticks(self.schedule, self.optimizer, stop, self.name):
                loss = self.step(step)
                if step % 50 == 0:
                    bar.set_postfix(loss=f"{loss:.4f}")
                    self.log.write(step=step, seconds=self.schedule.seconds, loss=loss)
                if self.schedule.seconds - saved > SAVE_EVERY:
                    saved = self.schedule.seconds
                    self.save()
                if self.schedule.seconds - exported > self.export_every:
                    exported = self.schedule.seconds
                    self.export()
        self.save()
        return self.export()

    @property
    def figures(self) -> dict[str, float]:
        """How long the run has lasted, for the card."""
        return {"step": self.schedule.step, "minutes": self.schedule.seconds / 60}
