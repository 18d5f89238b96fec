"""The studio's spare process, with a command that takes no time in the real `runner.main`; and one real drawing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vismodal.cli import load_app, load_pipeline

jobs_module, warm = load_app("studio.jobs"), load_app("studio.warm")
alive = load_app("studio.folders").alive
STUDIO = Path(warm.__file__).parent

# A job and a spare: the command leaves what its process is like, and goes on for `pause` seconds.
STAND_IN = f"""
import json, os, runpy, stat, sys, time, types
from pathlib import Path

def command(arguments):
    pause = float(Path("job.yaml").read_text().split("pause: ")[1].split()[0])
    print("said", arguments, flush=True)
    print("logged", file=sys.stderr, flush=True)
    old = os.umask(0)
    os.umask(old)
    others = [f for f in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{{f}}") and int(f) > 2]
    files = sorted(os.readlink(f"/proc/self/fd/{{f}}") for f in others)
    facts = [os.getcwd(), os.getsid(0) == os.getpid(), old, sys.stdin.read(), files, os.environ["HF_HUB_OFFLINE"]]
    Path("run").mkdir()
    Path("run/facts").write_text(json.dumps(facts))
    try:
        time.sleep(pause)
    except KeyboardInterrupt:
        return 130
    return 0

sys.modules["vismodal"] = types.ModuleType("vismodal")
sys.modules["vismodal.cli"] = types.SimpleNamespace(main=command)
given = sys.argv[1:]
if given[0] == "--wait":
    given = runpy.run_path({str(STUDIO / "warm.py")!r})["wait"](int(given[1]), lambda: time.sleep(0.05))
sys.exit(runpy.run_path({str(STUDIO / "runner.py")!r})["main"](given) if given else 0)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return path


@pytest.fixture
def jobs(tmp_path: Path, script: Path) -> Iterator:
    made = jobs_module.Jobs(
        tmp_path / "home",
        command=lambda kind, arguments: [sys.executable, "-S", str(script), kind, *arguments],
        spare=warm.Spare(lambda number: [sys.executable, "-S", str(script), "--wait", str(number)]),
    )
    yield made
    if made.spare:
        made.spare.close()
    for job in made.store.all():
        if alive(made.folder(job)):
            made.force_stop(job)
    for child in made.children.values():
        child.wait()


def until(jobs, condition: Callable[[], bool], seconds: float = 20, every: float = 0.01) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [(j.id, j.state, j.error) for j in jobs.store.all()]
        jobs.tick()
        time.sleep(every)


def ended(jobs, job) -> str:
    until(jobs, lambda: jobs.store.get(job.id).state not in ("queued", "running", "stopping"))
    return jobs.store.get(job.id).state


def spare(jobs) -> int:
    """The pid of the idle one."""
    jobs.tick()
    return jobs.spare.idle[0].pid


def test_a_job_through_the_spare_leaves_what_it_leaves_without(jobs):
    pid = spare(jobs)
    job, training = (jobs.submit(kind, kind, {"pause": 0}) for kind in ("generate", "dreambooth"))
    jobs.tick()
    assert alive(jobs.folder(job)) and jobs.spare.idle is None  # locked at once; the next one waits for its end
    assert ended(jobs, job) == "done" and spare(jobs) != pid
    assert made_by(jobs, job) == pid != made_by(jobs, training)
    found = contents(jobs.folder(job))
    assert "lock" in found["run/facts"] and "said" in found["said.txt"]
    jobs.spare.close()
    jobs.spare = None
    assert jobs.store.move(job, ("done",), "queued")
    assert ended(jobs, job) == "done" and made_by(jobs, job) != pid
    assert contents(jobs.folder(job)) == found


def made_by(jobs, job) -> int:
    ended(jobs, job)
    return int((jobs.folder(job) / "pid").read_text())


def contents(folder: Path) -> dict[str, str]:
    """What lies in the folder of a job, but for who made it, with who may read it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "pid"]
    return {str(path.relative_to(folder)): f"{path.stat().st_mode:o} {path.read_text()}" for path in files}


@pytest.mark.parametrize("ready", [True, False])
def test_stop_and_force_stop_reach_it_at_any_moment(jobs, ready):
    for state, code in (("stop", "130"), ("force_stop", None)):
        pid = spare(jobs)
        job = jobs.submit("generate", "drawing", {"pause": 60})
        jobs.tick()
        exit_file = jobs.folder(job) / "exit"
        if ready:
            until(jobs, lambda job=job: (jobs.folder(job) / "run/facts").exists())
        assert jobs.children[job.id].pid == pid
        getattr(jobs, state)(job)
        assert ended(jobs, job) == "stopped"
        assert not ready or (exit_file.read_text() if exit_file.exists() else None) == code
        until(jobs, lambda pid=pid: not Path(f"/proc/{pid}").exists())  # no zombie either


def test_a_dead_spare_is_done_without_and_replaced_after_the_job(jobs):
    pid = spare(jobs)
    os.kill(pid, signal.SIGKILL)
    until(jobs, lambda: not Path(f"/proc/{pid}").exists())
    assert jobs.spare.idle[0].pid == pid  # not replaced at every tick
    job = jobs.submit("generate", "drawing", {"pause": 0})
    assert ended(jobs, job) == "done" and spare(jobs) != pid
    pid = spare(jobs)
    jobs.spare.idle[1].shutdown(socket.SHUT_RDWR)  # as of one that dies between the look and the hand-over
    job = jobs.submit("generate", "drawing", {"pause": 0})
    assert ended(jobs, job) == "done" and made_by(jobs, job) != pid and not running(pid)


WEB = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from vismodal.cli import load_app
warm = load_app("studio.warm")
jobs = load_app("studio.jobs").Jobs(
    Path({home!r}), spare=warm.Spare(lambda number: [sys.executable, "-S", {script!r}, "--wait", str(number)])
)
jobs.tick()
first = jobs.spare.idle[0].pid
jobs.submit("generate", "drawing", {{"pause": 1.5}})
jobs.tick()
jobs.spare.start({{}})
print(first, jobs.spare.idle[0].pid, flush=True)
time.sleep(60)
"""


def test_kill_9_of_the_web_process_ends_an_idle_spare_and_not_one_that_draws(tmp_path, script):
    home = tmp_path / "home"
    code = WEB.format(root=str(Path(__file__).parents[1]), home=str(home), script=str(script))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as web:
        assert web.stdout is not None
        drawing, idle = map(int, web.stdout.readline().split())
        web.kill()
    again = jobs_module.Jobs(home)
    (job,) = again.store.all()
    assert alive(again.folder(job))
    until(again, lambda: not running(idle))
    assert running(drawing) and ended(again, job) == "done"
    assert (again.folder(job) / "pid").read_text() == str(drawing)


def running(pid: int) -> bool:
    """Whether there is a process of that number, which has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_real_spare_draws_to_the_bit_what_the_function_draws(tmp_path):
    pytest.importorskip("diffusers")

    def none(*_: object) -> list[str]:
        raise AssertionError("a new process")

    jobs = jobs_module.Jobs(tmp_path / "home", command=none, spare=warm.Spare())
    spare(jobs)
    settings = {"prompts": ["a drawing of a cat"], "seeds": [5], "steps": 1, "count": 1}
    job = jobs.submit("generate", "drawing", settings)
    until(jobs, lambda: jobs.store.get(job.id).state in ("done", "failed"), 240, 0.2)
    jobs.spare.close()
    assert jobs.store.get(job.id).state == "done", jobs.store.get(job.id).error
    pipeline = load_pipeline("generate")
    pipeline.main(pipeline.Config(("a drawing of a cat",), seeds=(5,), steps=1, count=1, output=tmp_path / "by_hand"))
    assert (jobs.folder(job) / "run/0000.png").read_bytes() == (tmp_path / "by_hand/0000.png").read_bytes()
