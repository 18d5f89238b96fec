"""Measuring side by side: interleaved calls, medians, ratios of neighbours, and a table that is tracked."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vismodal.table import markdown


class Time(NamedTuple):
    """Seconds by the clock on the wall, and of this process on all its cores: other load moves mostly the first."""

    wall: float
    cpu: float

    def __truediv__(self, n: int) -> Time:
        return Time(self.wall / n, self.cpu / n)


Samples = dict[str, list[Time]]  # contender -> one time for each round, in the order of the rounds


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        rounds: measured rounds of what takes longest; what is cheap gets three times as many.
        least: of these, not to be cut.
        seconds: no further round of a comparison begins after this time.
        batch: pictures of 224 px.
    """

    rounds: int = 9
    least: int = 3
    seconds: float = 15
    batch: int = 4

    def interleave(self, contenders: Mapping[str, Callable[[], Time]], times: int = 1) -> Samples:
        """Every contender once a round, after one round that does not count; each is first, second, ... in turn."""
        samples: Samples = {name: [] for name in contenders}
        names = list(contenders)
        start = time.perf_counter()
        for i in range(times * self.rounds + 1):
            if i > self.least and time.perf_counter() - start > self.seconds:
                break
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                taken = contenders[name]()
                if i:
                    samples[name].append(taken)
        return samples


def seconds(call: Callable[[], object]) -> Time:
    """One call, with the garbage of what stood before it collected, and none collected within."""
    gc.collect()
    gc.disable()
    cpu, wall = time.process_time(), time.perf_counter()
    kept = call()
    taken = Time(time.perf_counter() - wall, time.process_time() - cpu)
    gc.enable()
    del kept  # freed outside the measured time
    return taken


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Storages that autograd keeps of a forward, each once, without the parameters themselves."""
    before = list(model.parameters())  # held too: peft's MultiheadAttention makes new ones in every forward
    parameters = {p.untyped_storage().data_ptr() for p in before}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(s.nbytes() for address, s in kept.items() if address not in parameters)


@dataclass(frozen=True)
class Row:
    """One line of the table: ours against a peer's.

    Args:
        task: what was measured.
        setting: on what, and with which of our settings.
        unit: "s", "us", "bytes", "count" or "error" (relative); less is better in all of them.
        ours: the median; of times, by the wall clock.
        peer: the peer's median.
        ratio: median over the rounds of ours / peer.
        spread: lower and upper quartile of the ratio over the rounds.
        cpu: the ratio of processor times.
        rounds: how many.
        note: what else a reader must know.
        group: heading of the table in which it stands; the first table has none.
    """

    task: str
    setting: str
    unit: str
    ours: float
    peer: float
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    cpu: float | None = None
    rounds: int = 1
    note: str = ""
    group: str = ""


def compare(task: str, setting: str, unit: str, ours: Sequence[Time], peer: Sequence[Time], note: str = "") -> Row:
    """A row of two contenders' samples. Ratios are of neighbours in time: load that comes and goes hits both."""
    ratios = [a.wall / b.wall for a, b in zip(ours, peer, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    cpu = statistics.median(a.cpu / b.cpu for a, b in zip(ours, peer, strict=True))
    return Row(task, setting, unit, median(ours), median(peer), ratio, (low, high), cpu, len(ratios), note)


def exact(task: str, setting: str, unit: str, ours: float, peer: float, note: str = "") -> Row:
    """A row of two figures that do not vary from round to round."""
    return Row(task, setting, unit, ours, peer, ours / peer if ours and peer else None, note=note)


def median(times: Sequence[Time]) -> float:
    return statistics.median(t.wall for t in times)


def fastest(samples: Samples, prefix: str) -> str:
    """The contender with the lowest median among those whose names start with `prefix`."""
    return min((n for n in samples if n.startswith(prefix)), key=lambda n: median(samples[n]))


def facts(packages: Sequence[str]) -> dict[str, str]:
    """What the figures depend on: the machine, what else ran on it, and the versions."""
    return {
        "date": date.today().isoformat(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        **{p: version(p) for p in packages},
    }


def show(value: float, unit: str) -> str:
    """Three significant digits and the unit that fits; counts and bytes of files whole."""
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "error":
        return f"{value:.1e}" if value else "0"
    if unit == "bytes":
        return f"{value:,.0f} B" if value < 2**22 else f"{value / 2**20:,.1f} MiB"
    if unit == "us":
        return f"{1e6 * value:.3g} µs"
    return f"{1e3 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def cells(row: Row) -> list[str]:
    ratio = "" if row.ratio is None or row.unit == "error" else f"{row.ratio:.2f}"
    spread = f" ({row.spread[0]:.2f}–{row.spread[1]:.2f})" if row.spread else ""
    cpu = f"{row.cpu:.2f}" if row.cpu else ""
    return [row.task, row.setting, show(row.ours, row.unit), show(row.peer, row.unit), ratio + spread, cpu, row.note]


def report(title: str, rows: Sequence[Row], about: Mapping[str, str], note: str, peer: str) -> str:
    """The table as Markdown, under what it depends on."""
    machine = ", ".join(f"{k} {v}" for k, v in about.items())
    head = ["what", "on", "vismodal", peer, "ratio (quartiles)", "ratio of CPU time", "note"]
    text = f"# {title}\n\n{note}\n\nMeasured with {machine}.\n"
    for group in sorted({row.group for row in rows}):
        heading = f"\n## {group}\n" if group else ""
        text += f"{heading}\n{markdown(head, [cells(r) for r in rows if r.group == group])}\n"
    return text


def write(text: str, rows: Sequence[Row], about: Mapping[str, str], path: Path) -> None:
    """`path`.md and `path`.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text)
    data = {"about": dict(about), "rows": [asdict(r) for r in rows]}
    path.with_suffix(".json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
