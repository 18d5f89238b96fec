"""How far a job is, by what its run leaves on the disk: nothing is asked of the process itself."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

RUN = "run"  # the pipeline's own folder inside the job's
LATEST = 40  # steps over which the speed is measured
_BAR = re.compile(r"training:[^\r\n]*?(\d+)/(\d+) \[")
_MAKING = re.compile(r"making [^\r\n]*?images:[^\r\n]*?(\d+)/(\d+) \[")


@dataclass(frozen=True)
class Progress:
    """Where a job stands: what it does, its step of `total`, steps a second, seconds left; None where not known."""

    phase: str
    step: int = 0
    total: int | None = None
    speed: float | None = None
    left: float | None = None

    def __str__(self) -> str:
        of = f"step {self.step:,} of {self.total:,}" if self.total else ""
        speed = f"{self.speed:.3g} steps/s" if self.speed and self.phase == "training" else ""
        left = f"{duration(self.left)} left" if self.left is not None and self.phase == "training" else ""
        return " · ".join(part for part in (self.phase, of, speed, left) if part)


def duration(seconds: float) -> str:
    """As people say it: 45 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def settings(folder: Path) -> dict[str, Any]:
    """The settings of a run, filled in; empty before it has begun."""
    path = folder / RUN / "config.yaml"
    try:
        state = path.stat()
        return dict(_settings(state.st_mtime_ns, state.st_size, path))
    except OSError:
        return {}


@lru_cache(maxsize=64)
def _settings(time: int, size: int, path: Path) -> dict[str, Any]:
    """Of a file as it was at a time and a size: to parse it takes longer than all else that a page asks for."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of the log of the training that was last at work. What is half written or damaged is left out."""
    logs = [folder / RUN / "metrics.jsonl", *(folder / RUN).glob("runs/*/metrics.jsonl")]
    try:
        there = [(path.stat().st_mtime_ns, path) for path in logs if path.is_file()]
        return _log(max(there)[1]).rows() if there else []
    except FileNotFoundError:  # deleted meanwhile
        return []


class Log:
    """A log that grows at each step and that many pages ask for: only what is new is read."""

    def __init__(self, path: Path) -> None:
        self.path, self.turn = path, threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.found: list[dict[str, float]] = []
        self.end, self.last = 0, b""  # how far it is read, and the last line there

    def rows(self) -> list[dict[str, float]]:
        """All whole rows so far."""
        with self.turn, self.path.open("rb") as file:
            file.seek(self.end - len(self.last))
            if file.read(len(self.last)) != self.last:  # a resume writes it anew
                self._forget()
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.end, self.last = self.end + len(line), line
                if row := _row(line):
                    self.found.append(row)
            return self.found[:]


@lru_cache(maxsize=64)
def _log(path: Path) -> Log:
    return Log(path)


def _row(line: bytes) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) and {"step", "seconds", "loss"} <= row.keys() else {}


def progress(state: str, folder: Path) -> Progress:
    """Of a job in `state` whose folder is `folder`."""
    rows, given, log = metrics(folder), settings(folder), tail(folder, 20_000)
    step = int(rows[-1]["step"]) if rows else 0
    total = given.get("steps") if isinstance(given.get("steps"), int) else None
    if total is None and (bars := _BAR.findall(log)):
        total = int(bars[-1][1])
    if state not in ("running", "stopping"):
        return Progress(state, step, total)
    if state == "stopping":
        return Progress("saving, then stopping", step, total)
    speed = speed_of(rows[-LATEST:])
    left = (total - step) / speed if total and speed else None
    return Progress(_phase(folder, given, log, step, total), step, total, speed, left)


def _phase(folder: Path, given: dict[str, Any], log: str, step: int, total: int | None) -> str:
    if "training:" in log:
        return "writing the results" if total and step >= total else "training"
    if made := _MAKING.findall(log):
        return f"making class images, batch {made[-1][0]} of {made[-1][1]}"
    if given and "steps" in given and not list((folder / RUN / "samples").glob("step-*.png")):
        return "drawing the first samples"
    return "loading"


def speed_of(rows: list[dict[str, float]]) -> float | None:
    """Steps a second; None of less than two rows."""
    if len(rows) < 2 or rows[-1]["seconds"] <= rows[0]["seconds"]:
        return None
    return (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["seconds"] - rows[0]["seconds"])


def steps_made(folder: Path) -> int:
    """Those that a training has logged."""
    rows = metrics(folder)
    return int(rows[-1]["step"]) if rows else 0


def complete(folder: Path) -> bool:
    """Whether a training has made all its steps, and written its result after its last checkpoint: one that was stopped
    at its end has none, or that of before it was extended."""
    result, steps = folder / RUN / "adapter.safetensors", settings(folder).get("steps")
    kept = (path.stat().st_mtime_ns for path in (folder / RUN).rglob("checkpoints/step-*.safetensors"))
    made = not isinstance(steps, int) or steps_made(folder) >= steps
    return made and result.is_file() and result.stat().st_mtime_ns >= max(kept, default=0)


def losses(folder: Path, most: int = 200) -> list[tuple[int, float]]:
    """Step and loss, as the mean of neighbours where there are more than `most` steps."""
    rows = metrics(folder)
    width = max(1, -(-len(rows) // most))
    groups: Iterable[list[dict[str, float]]] = (rows[i : i + width] for i in range(0, len(rows), width))
    return [(int(group[-1]["step"]), sum(row["loss"] for row in group) / len(group)) for group in groups]


def samples(folder: Path) -> list[tuple[int, Path]]:
    """Step and sheet of the samples, in order; they are written whole."""
    found = [(int(path.stem.partition("-")[2]), path) for path in (folder / RUN / "samples").glob("step-*.png")]
    return sorted(found)


def shown(folder: Path) -> list[tuple[str, Path]]:
    """What a training has to show, with words: samples by step, or at its end the plots of a classifier."""
    plots = {"confusion on the test pictures": "confusion.png", "learning curves": "curves.png"}
    there = ((text, folder / RUN / name) for text, name in plots.items())
    return [(f"step {step}", path) for step, path in samples(folder)] + [(t, p) for t, p in there if p.is_file()]


def tail(folder: Path, most: int = 4000) -> str:
    """The end of what the job said, of a bar its last state only."""
    return "\n".join(part for name in ("said.txt", "log.txt") if (part := _end(folder / name, most)))


def _end(path: Path, most: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")).strip()
