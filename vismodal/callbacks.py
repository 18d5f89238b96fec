"""What goes on beside training: a progress bar, the log of metrics, something every so many steps, trackers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from vismodal.errors import InputError
from vismodal.files import write_file


class Callback:
    """Something to do while training. All methods are called on the main process only."""

    def begin(self, step: int, total: int) -> None:
        """Before the first update of this process; `step` updates of `total` were made by earlier ones."""

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        """After update `step` (the first is 1), its line in the log and its checkpoint, where one was due."""

    def end(self) -> None:
        """Once, however training ends."""


class Progress(Callback):
    """A bar with loss (a running mean), speed and time left; where no terminal listens, a line now and then."""

    def begin(self, step: int, total: int) -> None:
        quiet = 0.1 if sys.stderr.isatty() else 15.0
        self.bar = tqdm(total=total, initial=step, desc="training", unit="step", mininterval=quiet, dynamic_ncols=True)
        self.mean: float | None = None

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        loss = metrics["loss"]
        self.mean = loss if self.mean is None else 0.95 * self.mean + 0.05 * loss
        self.bar.set_postfix(loss=f"{self.mean:.4f}", refresh=False)
        self.bar.update()

    def end(self) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class Every(Callback):
    """Calls `action(step)` before the first step and after every `steps`-th; 0 calls it never.

    After a resume `action` may be asked for a step that it has served already.

    Args:
        asked: a file that asks for one more call after the step that is being made; it is deleted then.
    """

    def __init__(self, steps: int, action: Callable[[int], object], asked: Path | None = None) -> None:
        self.steps, self.action, self.asked = steps, action, asked

    def begin(self, step: int, total: int) -> None:
        self._maybe(step)

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        self._maybe(step)

    def end(self) -> None:
        if self.asked is not None:
            self.asked.unlink(missing_ok=True)

    def _maybe(self, step: int) -> None:
        asked = self.asked is not None and self.asked.exists()
        if asked or (self.steps and step % self.steps == 0):
            self.action(step)
        if asked and self.asked is not None:  # afterwards: until then somebody waits for it
            self.asked.unlink(missing_ok=True)


class Track(Callback):
    """Sends the metrics to the trackers of accelerate's `log_with` (TensorBoard, W&B, ...)."""

    def __init__(self, accelerator: Accelerator, project: str, config: Mapping[str, Any]) -> None:
        self.accelerator = accelerator
        plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in config.items()}
        accelerator.init_trackers(project, config=plain)

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        self.accelerator.log(dict(metrics), step=step)

    def end(self) -> None:
        for tracker in self.accelerator.trackers:  # `end_training` would take the process group down as well
            tracker.finish()
        self.accelerator.trackers.clear()  # or the next run's metrics would go there too


def watchers(
    accelerator: Accelerator, track: str | None, project: str, config: Mapping[str, Any], *more: Callback
) -> list[Callback]:
    """The bar, then `more`, and accelerate's tracker where `track` asks for one: of the project, with its settings."""
    return [Progress(), *more, *([Track(accelerator, project, config)] if track else [])]


class Log:
    """`metrics.jsonl`: one JSON object for each step, flushed at once; lines after a resumed step are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [row for row in read_log(path) if row["step"] <= step] if step else []
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.before = kept[-1]["seconds"] if kept else 0.0
        self.start = time.perf_counter()
        self.path = path

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends {"step", "seconds" of training in all, metrics...}."""
        seconds = round(self.before + time.perf_counter() - self.start, 3)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "seconds": seconds, **metrics}) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that a killed process left half-written is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is not whole
    return [json.loads(line) for line in lines]
