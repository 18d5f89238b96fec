"""The studio's queue with a stand-in for a training: it behaves like `fit`, and takes no time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from vismodal.cli import load_app
from vismodal.errors import InputError

jobs_module = load_app("studio.jobs")
progress_module = load_app("studio.progress")
Jobs, alive = jobs_module.Jobs, load_app("studio.folders").alive

# Settings are as `fit`'s: `steps`; `pause` seconds a step; `end` says how it ends. SIGINT: it saves and leaves with 0.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
Path("pid").write_text(str(os.getpid()))
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(1))
text = Path("job.yaml").read_text()
given = dict(line.split(": ", 1) for line in text.splitlines())
run = Path("run"); (run / "samples").mkdir(parents=True, exist_ok=True)
resumed = "--resume=true" in sys.argv
saved = int((run / "saved").read_text()) if resumed and (run / "saved").exists() else 0
(run / "config.yaml").write_text(f"steps: {given['steps']}\\n")
log = run / "metrics.jsonl"
rows = log.read_text().splitlines(True)[:saved] if saved else []
log.write_text("".join(rows))
(run / "samples" / "step-0000000.png").write_bytes(b"x")
for step in range(saved + 1, int(given["steps"]) + 1):
    time.sleep(float(given.get("pause", 0)))
    with log.open("a") as file:
        file.write(json.dumps({"step": step, "seconds": step * 0.5, "loss": 1 / step}) + "\\n")
    if step % int(given.get("every", 10**9)) == 0:
        (run / "part").write_text(str(step)); os.replace(run / "part", run / "saved")
    if stop:
        (run / "saved").write_text(str(step)); Path("exit").write_text("0"); sys.exit(0)
if given.get("end") == "error":
    print("error: the prompt is missing", file=sys.stderr); Path("exit").write_text("2"); sys.exit(2)
if given.get("end") == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
(run / "saved").write_text(given["steps"]); (run / "adapter.safetensors").write_bytes(b"x")
Path("exit").write_text("0")
"""


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str, Sequence[str]], list[str]]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return lambda kind, arguments: [sys.executable, "-S", str(script), *arguments]


@pytest.fixture
def jobs(tmp_path: Path, command) -> Iterator:
    made = Jobs(tmp_path / "home", command=command)
    yield made
    end(made)


def end(jobs) -> None:
    """Nothing of it lives on."""
    for job in jobs.store.all():
        if alive(jobs.folder(job)):
            jobs.force_stop(job)
    for child in jobs.children.values():
        child.wait()


def until(jobs, condition: Callable[[], bool], seconds: float = 20) -> None:
    """Ticks until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [(j.id, j.state, j.error) for j in jobs.store.all()]
        jobs.tick()
        time.sleep(0.02)


def state(jobs, job) -> str:
    return jobs.store.get(job.id).state


def steps(jobs, job) -> list[int]:
    return [int(row["step"]) for row in progress_module.metrics(jobs.folder(job))]


def test_one_trainer_at_a_time_in_order_and_drawing_beside_it(jobs):
    first, second = (jobs.submit("dreambooth", f"job {i}", {"steps": 40, "pause": 0.02}) for i in range(2))
    beside = jobs.submit("generate", "pictures", {"steps": 1})
    jobs.tick()
    assert [state(jobs, j) for j in (first, second, beside)] == ["running", "queued", "running"]
    until(jobs, lambda: state(jobs, first) == "done")
    until(jobs, lambda: state(jobs, second) == "done")
    ended, began = jobs.store.get(first.id).ended, jobs.store.get(second.id).started
    assert state(jobs, beside) == "done" and ended <= began
    assert steps(jobs, first) == list(range(1, 41))
    assert (jobs.folder(first).stat().st_mode | jobs.root.stat().st_mode) & 0o077 == 0  # nobody else's to read


def test_stop_saves_resume_goes_on_and_extend_goes_further(jobs):
    job = jobs.submit("dreambooth", "dog", {"steps": 60, "pause": 0.05})
    until(jobs, lambda: len(steps(jobs, job)) > 3)
    jobs.stop(job)
    jobs.stop(job)  # a second one must not break it off
    assert state(jobs, job) == "stopping"
    until(jobs, lambda: state(jobs, job) == "stopped")
    done = len(steps(jobs, job))
    assert 3 < done < 60 and (jobs.folder(job) / "run/saved").read_text() == str(done)
    jobs.extend(job, done + 2)  # of a stopped one too
    until(jobs, lambda: state(jobs, job) == "done")
    assert steps(jobs, job) == list(range(1, done + 3))
    jobs.extend(job, done + 4)
    until(jobs, lambda: state(jobs, job) == "done")
    assert steps(jobs, job) == list(range(1, done + 5)) and jobs.settings(job)["steps"] == done + 4
    with pytest.raises(InputError, match="only one that stopped or failed goes on"):
        jobs.resume(job)


def test_how_jobs_end(jobs):
    wrong = jobs.submit("dreambooth", "wrong", {"steps": 1, "end": "error"})
    killed = jobs.submit("dreambooth", "killed", {"steps": 1, "end": "crash"})
    forced = jobs.submit("dreambooth", "forced", {"steps": 1000, "pause": 0.05})
    waiting = jobs.submit("dreambooth", "waiting", {"steps": 1})
    until(jobs, lambda: bool(steps(jobs, forced)))
    jobs.force_stop(forced)
    jobs.stop(waiting)
    until(jobs, lambda: state(jobs, forced) == "stopped")
    assert jobs.store.get(wrong.id).error == "the prompt is missing" and state(jobs, wrong) == "failed"
    assert "killed, or out of memory" in jobs.store.get(killed.id).error
    assert state(jobs, waiting) == "stopped" and not (jobs.folder(waiting) / "run").exists()
    for job in (wrong, killed):
        jobs.resume(job)
    until(jobs, lambda: state(jobs, killed) == "failed")


def test_deleting_needs_a_job_that_does_not_run_and_takes_its_folder(jobs):
    job = jobs.submit("dreambooth", "dog", {"steps": 1000, "pause": 0.05})
    until(jobs, lambda: bool(steps(jobs, job)))
    with pytest.raises(InputError, match="stop it first"):
        jobs.delete(job)
    jobs.force_stop(job)
    until(jobs, lambda: state(jobs, job) == "stopped")
    jobs.delete(job)
    assert jobs.store.all() == [] and list(jobs.root.iterdir()) == []
    with pytest.raises(InputError, match="there is no job 1"):
        jobs.store.get(job.id)
    assert jobs.submit("dreambooth", "next", {"steps": 1}).id == 2


WEB = """
import sys, time
sys.path.insert(0, {root!r})
from vismodal.cli import load_app
command = lambda kind, arguments: [sys.executable, "-S", {script!r}, *arguments]
jobs = load_app("studio.jobs").Jobs(home={home!r}, command=command)
print("up", flush=True)
while True:
    jobs.tick()
    time.sleep(0.02)
""".replace("home={home!r}", "home=__import__('pathlib').Path({home!r})")


def test_kill_9_of_the_web_process_loses_nothing_and_the_next_one_finds_the_training(jobs, tmp_path):
    long = jobs.submit("dreambooth", "long", {"steps": 2000, "pause": 0.02})
    short = jobs.submit("generate", "short", {"steps": 20, "pause": 0.02})
    waiting = jobs.submit("dreambooth", "waiting", {"steps": 1})
    code = WEB.format(root=str(Path(__file__).parents[1]), home=str(jobs.home), script=str(tmp_path / "stand_in.py"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as web:
        deadline = time.monotonic() + 30
        while not (steps(jobs, long) and steps(jobs, short)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        web.kill()
    reached = len(steps(jobs, long))
    again = Jobs(jobs.home, command=jobs.command)
    until(again, lambda: state(again, short) == "done")  # it ended with nobody there to see it
    until(again, lambda: len(steps(again, long)) > reached + 2)  # it went on by itself
    assert [state(again, j) for j in (long, waiting)] == ["running", "queued"]
    again.stop(long)
    until(again, lambda: state(again, long) == "stopped")
    assert int((again.folder(long) / "run/saved").read_text()) == len(steps(again, long))
    end(again)


def test_kills_at_any_moment_lose_no_job_and_no_step(jobs, tmp_path):
    """The web process each time, the trainer every other time; `make stress` does it 20 times."""
    rounds = int(os.environ.get("VISMODAL_STRESS_KILLS", "2"))
    dice = random.Random(rounds)
    job = jobs.submit("dreambooth", "long", {"steps": 10**6, "pause": 0.01, "every": 7})
    rest = [jobs.submit("generate", f"{i}", {"steps": 3}) for i in range(rounds)]
    code = WEB.format(root=str(Path(__file__).parents[1]), home=str(jobs.home), script=str(tmp_path / "stand_in.py"))
    killed = 0

    def resume() -> None:
        """What a web process has found dead, which was killed together with the one before it."""
        for each in jobs.store.all():
            if each.state in ("failed", "stopped"):
                jobs.resume(each)

    for number in range(rounds):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as web:
            assert web.stdout is not None and web.stdout.readline() == "up\n"
            try:
                deadline = time.monotonic() + 30
                while not alive(jobs.folder(job)) or not (jobs.folder(job) / "pid").exists():
                    assert time.monotonic() < deadline, [(each.id, each.state) for each in jobs.store.all()]
                    resume()
                    time.sleep(0.01)
                time.sleep(dice.random() * 0.6)
                if number % 2:
                    killed += jobs._signal(job, signal.SIGKILL)
            finally:
                web.kill()
    assert killed == rounds // 2
    again = Jobs(jobs.home, command=jobs.command)

    def settled(*states: str) -> bool:
        for each in again.store.all():
            if each.state == "failed":
                again.resume(each)
        return {each.state for each in again.store.all()} <= set(states)

    until(again, lambda: settled("running", "done"), 60)
    again.stop(job)
    until(again, lambda: settled("stopped", "done"), 60)
    length = len(steps(again, job)) + 20
    again.extend(job, length)
    until(again, lambda: settled("done"), 60)
    assert [each.id for each in again.store.all()] == [job.id, *(each.id for each in rest)]
    assert steps(again, job) == list(range(1, length + 1))
    end(again)


def test_what_was_stopped_at_its_last_step_is_not_done(jobs):
    """A training that is stopped while it draws its last samples has made all steps, and has no adapter, or an old."""
    job = jobs.submit("dreambooth", "dog", {"steps": 3})
    until(jobs, lambda: state(jobs, job) == "done")
    run = jobs.folder(job) / "run"
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-0000003.safetensors").write_bytes(b"x")  # newer than the adapter
    assert not progress_module.complete(jobs.folder(job))
    (run / "adapter.safetensors").write_bytes(b"y")
    assert progress_module.complete(jobs.folder(job))
    (run / "adapter.safetensors").unlink()
    assert not progress_module.complete(jobs.folder(job))


def test_a_job_owns_its_pictures_and_what_others_need_stays(jobs, tmp_path):
    photos = tmp_path / "set"
    photos.mkdir()
    (photos / "1.txt").write_text("before")
    job = jobs.submit("dreambooth", "dog", {"steps": 1, "photos": str(photos)})
    part = photos / "part"
    part.write_text("after")
    part.replace(photos / "1.txt")  # as captions are written
    given = Path(jobs.settings(job)["photos"])
    assert given.is_relative_to(jobs.folder(job)) and (given / "1.txt").read_text() == "before"
    until(jobs, lambda: state(jobs, job) == "done")
    with pytest.raises(InputError, match="has made 1 steps already"):
        jobs.extend(job, 0)
    adapter = str(jobs.folder(job) / "run/adapter.safetensors")
    user = jobs.submit("generate", "needs it", {"steps": 1, "adapters": adapter})
    with pytest.raises(InputError, match="needs it, needs what job"):
        jobs.delete(job)
    until(jobs, lambda: state(jobs, user) == "done")
    jobs.delete(job)
    assert not jobs.folder(job).exists()


def test_no_job_begins_where_the_studio_has_no_room_left(tmp_path, command):
    jobs = Jobs(tmp_path / "home", total=10, command=command)
    job = jobs.submit("dreambooth", "late", {"steps": 1})
    jobs.tick()
    assert (state(jobs, job), "delete some jobs" in jobs.store.get(job.id).error) == ("failed", True)


def test_a_restart_settles_the_dead_and_clears_what_was_cut_off(jobs):
    dead, unborn, reused = (jobs.submit("dreambooth", name, {"steps": 1}) for name in ("dead", "unborn", "reused"))
    for job in (dead, unborn, reused):
        jobs.store.move(job, ("queued",), "running")
    (jobs.folder(dead) / "pid").write_text("999999999")
    (jobs.folder(reused) / "pid").write_text(str(os.getpid()))  # another process has that number now: this one
    (jobs.root / "cut-off").mkdir()
    again = Jobs(jobs.home, lanes={"training": 0, "drawing": 0}, command=jobs.command)
    again.tick()
    assert [state(again, j) for j in (dead, unborn, reused)] == ["failed", "queued", "failed"]
    assert not (jobs.root / "cut-off").exists()
    assert not again._signal(again.store.get(reused.id), signal.SIGKILL)  # or this test would be dead


def test_a_job_that_fills_the_disk_is_stopped(tmp_path, command):
    jobs = Jobs(tmp_path / "home", most=3000, command=command)
    job = jobs.submit("dreambooth", "large", {"steps": 2000, "pause": 0.01})
    until(jobs, lambda: state(jobs, job) == "stopped")
    assert "grew over" in jobs.store.get(job.id).error
    end(jobs)


def test_progress_is_read_off_the_folder(jobs):
    job = jobs.submit("dreambooth", "dog", {"steps": 6})
    folder = jobs.folder(job)
    assert str(progress_module.progress("queued", folder)) == "queued"
    assert str(progress_module.progress("running", folder)) == "loading"
    until(jobs, lambda: state(jobs, job) == "done")
    (folder / "log.txt").write_text("training:   0%|  | 0/6 [00:00<?]\rtraining:  50%|#  | 3/6 [00:01<00:01]")
    (folder / "run/config.yaml").write_text("steps: 12\n")
    with (folder / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "seconds"')  # a line that is being written
    found = progress_module.progress("running", folder)
    assert (found.phase, found.step, found.total, found.speed, found.left) == ("training", 6, 12, 2.0, 3.0)
    assert str(found) == "training · step 6 of 12 · 2 steps/s · 3 s left"
    (folder / "run/metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "seconds": {i}, "loss": {i}}}\n' for i in range(1, 9))
    )
    assert progress_module.losses(folder, most=4) == [(2, 1.5), (4, 3.5), (6, 5.5), (8, 7.5)]
    with (folder / "run/metrics.jsonl").open("a") as file:  # it grows, by a damaged row and one that is cut
        file.write('no row\n{"step": 9, "seconds": 9, "loss": 9}\n{"step": 10, "sec')
    assert [row["step"] for row in progress_module.metrics(folder)] == list(range(1, 10))
    with (folder / "run/metrics.jsonl").open("a") as file:
        file.write('onds": 10, "loss": 10}\n')
    assert [row["step"] for row in progress_module.metrics(folder)] == list(range(1, 11))
    rows = [f'{{"step": {i}, "seconds": {i}, "loss": 0}}\n' for i in range(1, 14)]
    (folder / "run/metrics.jsonl").write_text("".join(rows))  # as a resume does, here to a longer one
    assert {row["loss"] for row in progress_module.metrics(folder)} == {0} and len(
        progress_module.metrics(folder)
    ) == 13
    assert [step for step, _ in progress_module.samples(folder)] == [0]
    assert progress_module.duration(7500) == "2 h 05 min"
