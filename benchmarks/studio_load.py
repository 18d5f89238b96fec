"""The studio with 20 open tabs while it trains: how soon it answers, and what that costs the training.

    python benchmarks/studio_load.py                 # 3 to 4 minutes on 2 cores; writes results/studio_load.md
    python benchmarks/studio_load.py --quick true    # two tabs, under a minute; prints the page only

A studio of its own, in a temporary folder, trains the embedded model on the embedded subject. A tab does what the page
does: every 2 s it asks for all that the timer of the tab in view shows, here Teach, in a session of its own. All tabs
are in one further process. Phases without and with tabs take turns, and each with tabs is compared with the two beside
it, so that what else runs on the machine, and changes, moves both. Steps are timed by the log of the training.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from jsonargparse import auto_cli

RESULTS = Path(__file__).parent / "results" / "studio_load.md"
TRAINING = {"steps": 1_000_000, "sample_every": 0, "sample_steps": 1, "sample_count": 1, "save_every": 1_000_000}
GOALS = {"median": 0.5, "slower": 1.10}


@dataclass(frozen=True)
class Config:
    """Settings of the run.

    Args:
        quick: two tabs and short phases; its figures mean nothing.
        tabs: how many are open.
        every: seconds from one poll of a tab to its next.
        pairs: phases with tabs; there is one more without.
        seconds: of a phase.
        beside: what else ran on the machine, for the page.
    """

    quick: bool = False
    tabs: int = 20
    every: float = 2.0
    pairs: int = 6
    seconds: float = 10.0
    beside: str = "nothing"


@dataclass(frozen=True)
class Phase:
    """What was measured in one: processor seconds of the web process and of the training, steps and their seconds, and
    the response times of the tabs."""

    web: float
    training: float
    steps: float
    seconds: float
    responses: Sequence[float] = ()


def polls_of(address: str) -> list[dict[str, Any]]:
    """The requests of one tick of the page, as its own script sends them, from the page's description."""
    with urlopen(f"{address}config", timeout=60) as answer:
        config = json.load(answer)
    parts = {part["id"]: part for part in config["components"]}
    clock = next(i for i, part in parts.items() if part["type"] == "timer" and part["props"]["active"])
    ticks = [d for d in config["dependencies"] if [clock, "tick"] in [list(target) for target in d["targets"]]]
    return [
        {
            "data": [parts[i]["props"].get("value") if parts[i]["type"] != "state" else None for i in tick["inputs"]],
            "fn_index": tick["id"],
            "trigger_id": clock,
        }
        for tick in ticks
    ]


def poll(address: str, polls: Sequence[dict[str, Any]], count: int, every: float, seconds: float) -> list[float]:
    """In the process of the tabs: the seconds that each poll took. A thread for each tab, since that is cheapest."""
    place = urlsplit(address)

    def tab(number: int) -> list[float]:
        client = HTTPConnection(str(place.hostname), place.port, timeout=60)
        texts = [json.dumps({**poll, "session_hash": f"tab{number}"}) for poll in polls]
        took: list[float] = []
        due = begin + every * number / count
        while due < begin + seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            start = time.monotonic()
            for text in texts:
                client.request("POST", "/gradio_api/run/predict", text, {"Content-Type": "application/json"})
                answer = client.getresponse()
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status}: {answer.read().decode()}")
                answer.read()
            took.append(time.monotonic() - start)
            due = max(due + every, time.monotonic())
        client.close()
        return took

    begin = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        return [seconds for took in pool.map(tab, range(count)) for seconds in took]


class Training:
    """The training of a studio in `home`, by what it leaves on the disk."""

    def __init__(self, address: str, home: Path) -> None:
        from gradio_client import Client

        from vismodal.cli import load_app

        client = Client(address, verbose=False, analytics_enabled=False)
        job = client.predict("example", settings=TRAINING, api_name="/teach")
        self.folder = home / "jobs" / job["folder"]
        self.rows = load_app("studio.progress").metrics
        while len(self.rows(self.folder)) < 10:
            now = client.predict(job["id"], api_name="/job")
            if now["state"] not in ("queued", "running"):
                raise SystemExit(f"the training is {now['state']}: {now['error']}")
            time.sleep(1)
        self.pid = int((self.folder / "pid").read_text())
        self.client, self.job = client, job["id"]

    def step(self) -> tuple[float, float]:
        """The last one, and its time."""
        last = self.rows(self.folder)[-1]
        return last["step"], last["seconds"]

    def processor(self) -> float:
        """Its processor seconds so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.client.predict(self.job, api_name="/force_stop")
        while self.client.predict(self.job, api_name="/job")["state"] != "stopped":
            time.sleep(0.2)
        self.client.close()


def measure(c: Config, home: Path) -> list[Phase]:
    """The phases in order: without tabs, with, without, ..."""
    from vismodal.cli import load_app

    app = load_app("studio.app")
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
        app.serving(app.Config(home=home)) as address,
    ):
        training = Training(address, home)
        polls = polls_of(address)
        pool.submit(poll, address, polls, c.tabs, c.every, c.every).result()  # the first ones load and send everything
        phases = []
        for number in range(2 * c.pairs + 1):
            web, used, (step, at) = time.process_time(), training.processor(), training.step()
            if number % 2:
                responses = pool.submit(poll, address, polls, c.tabs, c.every, c.seconds).result()
            else:
                responses = []
                time.sleep(c.seconds)
            steps, seconds = (now - then for now, then in zip(training.step(), (step, at), strict=True))
            phases.append(
                Phase(time.process_time() - web, training.processor() - used, steps, seconds, tuple(responses))
            )
            print(f"{number}: {1000 * seconds / steps:.0f} ms a step, {len(responses)} polls", file=sys.stderr)
        training.stop()
    return phases


def page(c: Config, phases: Sequence[Phase]) -> str:
    """The results as Markdown."""
    import vismodal
    from vismodal.table import markdown

    quiet, loaded = phases[::2], phases[1::2]
    responses = sorted(seconds for phase in loaded for seconds in phase.responses)
    each = [phase.seconds / phase.steps for phase in phases]
    slower = [2 * each[i] / (each[i - 1] + each[i + 1]) for i in range(1, len(each), 2)]
    cost = (sum(p.web for p in loaded) - sum(p.web for p in quiet) * len(loaded) / len(quiet)) / len(responses)
    spent = [sum(p.training for p in part) / sum(p.steps for p in part) for part in (quiet, loaded)]
    rows = [
        ["response, median", f"{1000 * statistics.median(responses):.0f} ms", f"{1000 * GOALS['median']:.0f} ms"],
        ["response, 95th percentile", f"{1000 * responses[int(0.95 * (len(responses) - 1))]:.0f} ms", ""],
        ["a step without tabs, median", f"{1000 * statistics.median(each[::2]):.0f} ms", ""],
        ["a step with tabs, median", f"{1000 * statistics.median(each[1::2]):.0f} ms", ""],
        ["with over without, median", f"{statistics.median(slower):.3f}", f"{GOALS['slower']:.2f}"],
        ["with over without, all", ", ".join(f"{ratio:.2f}" for ratio in slower), ""],
        ["processor time of a step without tabs", f"{1000 * spent[0]:.1f} ms", ""],
        ["processor time of a step with tabs", f"{1000 * spent[1]:.1f} ms", ""],
        ["processor time of a poll, in the web process", f"{1000 * cost:.1f} ms", ""],
    ]
    note = (__doc__ or "").split("\n\n")[-1].strip()
    about = (
        f"{len(responses)} polls of {c.tabs} tabs, one each {c.every:g} s, in {c.pairs} phases of {c.seconds:g} s, and "
        f"{c.pairs + 1} without; vismodal {vismodal.__version__}, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}. Beside it ran: {c.beside}."
    )
    return f"# The studio under load\n\n{note}\n\n{about}\n\n{markdown(['', 'measured', 'at most'], rows)}\n"


def main(c: Config) -> None:
    """Measures, prints the page, and writes it where the run is a full one."""
    if c.quick:
        c = Config(quick=True, tabs=2, every=0.5, pairs=1, seconds=4, beside=c.beside)
    with tempfile.TemporaryDirectory() as folder:
        text = page(c, measure(c, Path(folder) / "home"))
    print(f"\n{text}")
    if not c.quick:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main(auto_cli(Config, as_positional=False))
