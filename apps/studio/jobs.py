"""Jobs: commands of vismodal in processes of their own, from a queue that outlives the web process.

A job's folder holds its settings `job.yaml`, what it said, its pid, its exit code, and in `run/` what the command
makes. Whether a job lives is asked of the lock on its folder, which its process holds from its first moment on: unlike
a pid, it cannot pass to another process, and the system lets go of it however the process ends. What a dead job has
come to is read off its folder, so that it does not matter who was there to see it end.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import vismodal
from vismodal.errors import InputError
from vismodal.files import write_file

from .folders import alive, number, size_of, take
from .progress import RUN, complete, steps_made, tail
from .store import ACTIVE, Job, Store
from .warm import Spare

SETTINGS, GIVEN = "job.yaml", "given"
Command = Callable[[str, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Kind:
    """A command that jobs may run.

    Args:
        lane: jobs of one lane wait for each other.
        out: the setting that says where results go, and the place inside the job's folder.
        resumes: whether it goes on where it was stopped; what does not begins anew.
        length: the setting by which a finished one is extended.
        given: the setting that names a set of pictures, of which the job keeps its own links.
    """

    lane: str
    out: tuple[str, str] | None = ("output", RUN)
    resumes: bool = False
    length: str | None = None
    given: str | None = None


KINDS = {
    "dreambooth": Kind("training", resumes=True, length="steps", given="photos"),
    "classify": Kind("training", resumes=True, given="data"),
    "generate": Kind("drawing"),
    "predict": Kind("drawing", out=None, given="images"),
    "merge": Kind("drawing", out=("out", f"{RUN}/adapter.safetensors")),
    "convert": Kind("drawing", out=("out", f"{RUN}/adapter.safetensors")),
}


def runner(kind: str, arguments: Sequence[str]) -> list[str]:
    """The command line of a job; with -P the studio's own files hide no module of that name."""
    return [sys.executable, "-P", str(Path(__file__).with_name("runner.py")), kind, *arguments]


@dataclass
class Jobs:
    """All jobs of one studio.

    Args:
        home: its folder.
        lanes: how many jobs of a lane run at a time.
        most: bytes that the folder of a job may have.
        total: bytes that the studio's folder may have; above them no job begins.
        command: gives the command line of a job; another one in tests.
        spare: becomes the next job of the lane "drawing", if there is one.
    """

    home: Path
    lanes: Mapping[str, int] = field(default_factory=lambda: {"training": 1, "drawing": 1})
    most: int = 20 * 2**30
    total: int = 2**60
    command: Command = runner
    spare: Spare | None = None

    def __post_init__(self) -> None:
        self.root = self.home / "jobs"
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.store = Store(self.home / "studio.db")
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self.turn = threading.RLock()
        known = {job.folder for job in self.store.all()}
        for path in self.root.iterdir():  # of a submission or a deletion that was cut off
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)

    # -- what people ask for -----------------------------------------------------------------------------------------

    def submit(
        self, kind: str, title: str, settings: Mapping[str, Any], beside: Mapping[str, str] | None = None
    ) -> Job:
        """Puts a job into the queue; `settings` are plain values of the command's `Config`, `beside` other files."""
        name = secrets.token_hex(8)
        folder = self.root / name
        folder.mkdir(mode=0o700)
        self.write(folder, kind, {**settings, **self._linked(folder, KINDS[kind].given, settings)})
        for file, text in (beside or {}).items():
            write_file(folder / file, text)
        return self.store.add(kind, title[:80].strip() or kind, name)

    def write(self, folder: Path, kind: str, settings: Mapping[str, Any]) -> None:
        """The settings of a job in `folder`, with the place of its results."""
        out = KINDS[kind].out
        write_settings(folder, {**settings, **({out[0]: str(folder / out[1])} if out else {})})

    def _linked(self, folder: Path, name: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A set of pictures as it is now, in the job's own folder: others may change or delete it."""
        if name is None or name not in settings:
            return {}
        several = isinstance(settings[name], list)
        shutil.copytree(settings[name][0] if several else settings[name], folder / GIVEN, copy_function=os.link)
        return {name: [str(folder / GIVEN)] if several else str(folder / GIVEN)}

    def folder(self, job: Job) -> Path:
        return self.root / job.folder

    def settings(self, job: Job) -> dict[str, Any]:
        """As they were submitted, or extended."""
        given: dict[str, Any] = yaml.safe_load(self._text(job))
        return given

    def _text(self, job: Job) -> str:
        return (self.folder(job) / SETTINGS).read_text(encoding="utf-8")

    def stop(self, job: Job) -> None:
        """Takes a job out of the queue, or lets it save and stop. A second call changes nothing."""
        with self.turn:  # or a tick would tell it a second time
            if self.store.move(job, ("queued",), "stopped"):
                return
            if self.store.move(job, ("running",), "stopping"):
                self._tell(job)
            elif self.store.get(job.id).state != "stopping":
                raise InputError(f"job {job.id} does not run, so there is nothing to stop")

    def force_stop(self, job: Job) -> None:
        """Kills a job at once; a training goes back to its last checkpoint."""
        with self.turn:
            self.store.move(job, ("running",), "stopping")
            if self.store.get(job.id).state != "stopping":
                raise InputError(f"job {job.id} does not run, so there is nothing to stop")
            self._signal(job, signal.SIGKILL)

    def resume(self, job: Job) -> None:
        """Back into the queue: a training goes on where it stopped, anything else begins anew."""
        if not self.store.move(job, ("stopped", "failed"), "queued"):
            raise InputError(f"job {job.id} is {self.store.get(job.id).state}; only one that stopped or failed goes on")

    def extend(self, job: Job, length: int) -> None:
        """More steps for a training that is done or stopped."""
        name = KINDS[job.kind].length
        if name is None:
            raise InputError(f"a job of {job.kind} cannot be extended; start another one")
        with self.turn:
            now = self.store.get(job.id)
            if now.state in (*ACTIVE, "queued"):
                raise InputError(f"job {job.id} is {now.state}; stop it, or wait for its end, then extend it")
            if length < (made := steps_made(self.folder(job))):
                raise InputError(f"job {job.id} has made {made} steps already; extend it to more than that")
            write_settings(self.folder(job), {**self.settings(job), name: length})
            self.store.move(job, ("stopped", "failed", "done"), "queued")

    def delete(self, job: Job) -> None:
        """Forgets a job and all that it has made."""
        with self.turn:
            needed = (j for j in self.store.all() if j.id != job.id and j.state in (*ACTIVE, "queued"))
            if user := next((j for j in needed if job.folder in self._text(j)), None):
                raise InputError(f"job {user.id}, {user.title}, needs what job {job.id} made; let it end, or stop it")
            if alive(self.folder(job)) or not self.store.remove(job):
                raise InputError(f"job {job.id} still runs; stop it first")
            shutil.rmtree(self.folder(job), ignore_errors=True)

    # -- what goes on by itself --------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Looks who has ended, passes on what was asked, and starts what may start. Also what a restart begins with."""
        with self.turn:
            for job in self.store.all():
                if job.state in ACTIVE:
                    self._look(job)
            for key, child in list(self.children.items()):
                if child.poll() is not None:  # or it would stay a zombie
                    del self.children[key]
            busy = [KINDS[job.kind].lane for job in self.store.all() if job.state in ACTIVE]
            for job in self.store.all():
                lane = KINDS[job.kind].lane
                if job.state == "queued" and busy.count(lane) < self.lanes[lane]:
                    busy.append(lane)
                    self._start(job)
            if self.spare and "drawing" not in busy:  # beside a drawing it would take its cores
                self.spare.start(environment())

    def watch(self, stop: threading.Event, every: float = 0.5) -> None:
        """Ticks until `stop` is set; a tick that fails is told, and does not end the watch."""
        while not stop.wait(every):
            try:
                self.tick()
            except Exception as error:
                print(f"studio: {type(error).__name__}: {error}", file=sys.stderr)

    def _start(self, job: Job) -> None:
        folder = self.folder(job)
        lock = take(folder)
        if lock is None:
            return
        try:
            for name in ("pid", "exit", "told", "full", "said.txt"):  # first: they would speak for the new process
                (folder / name).unlink(missing_ok=True)
            if (used := size_of(self.home)) > self.total:
                why = f"the studio's folder has {used / 2**30:.1f} GiB, which is its most; delete some jobs"
                self.store.move(job, ("queued",), "failed", why)
            elif self.store.move(job, ("queued",), "running"):
                self.children[job.id] = self._process(job, folder, lock)
        except OSError as error:
            self.store.move(job, ("running",), "failed", f"cannot be started: {error.strerror}")
        finally:
            os.close(lock)  # the child has it now

    def _process(self, job: Job, folder: Path, lock: int) -> subprocess.Popen[bytes]:
        """Of a job, which goes on where it can: the spare, or a new one."""
        kind = KINDS[job.kind]
        again = kind.resumes and (folder / RUN / "config.yaml").is_file()
        if not again:
            shutil.rmtree(folder / RUN, ignore_errors=True)
        arguments = ["--config", str(folder / SETTINGS), *(["--resume=true"] if again else [])]
        with (folder / "said.txt").open("ab") as said, (folder / "log.txt").open("wb") as log:
            files = (lock, said.fileno(), log.fileno())
            spare = self.spare if kind.lane == "drawing" else None
            warm = spare.take(folder, [job.kind, *arguments], files) if spare else None
            return warm or subprocess.Popen(
                self.command(job.kind, arguments), cwd=folder, env=environment(), stdin=subprocess.DEVNULL,
                stdout=said, stderr=log, start_new_session=True, pass_fds=(lock,), umask=0o077,
            )  # fmt: skip

    def _look(self, job: Job) -> None:
        folder = self.folder(job)
        if alive(folder):
            size = size_of(folder)
            if job.state == "running" and size > self.most:
                self.stop(job)
                with suppress(InputError):  # the disk may be full as well
                    write_file(folder / "full", f"{size}")
            elif job.state == "stopping":
                self._tell(job)
            return
        if job.state == "running" and job.id not in self.children and not (folder / "pid").exists():
            self.store.move(job, ("running",), "queued")  # the web process died before it could start it
            return
        self.store.move(job, ACTIVE, *self._outcome(job, folder))

    def _outcome(self, job: Job, folder: Path) -> tuple[Any, str]:
        """What a job that lives no more has come to: its state and its error."""
        code = number(folder / "exit")
        if code == 0 and (not KINDS[job.kind].resumes or complete(folder)):
            return "done", ""
        if code in (0, 130) or job.state == "stopping":
            full = (folder / "full").exists()
            return "stopped", f"its folder grew over {self.most / 2**30:.3g} GiB" if full else ""
        lines = [line for line in tail(folder).splitlines() if line.strip()]
        told = next((line for line in reversed(lines) if line.startswith("error: ")), "")
        if told:
            return "failed", told.removeprefix("error: ")
        last = f"; its last words: {lines[-1]}" if lines else ""
        return "failed", f"it ended without a word: killed, or out of memory{last}" if code is None else lines[-1]

    def _tell(self, job: Job) -> None:
        """Asks a job to save and stop: once, since a second signal would break it off."""
        folder = self.folder(job)
        if not (folder / "told").exists() and self._signal(job, signal.SIGINT):
            (folder / "told").touch()

    def _signal(self, job: Job, what: signal.Signals) -> bool:
        """False while the process has not said its pid, or is gone. While it holds the lock, the pid is its own."""
        folder = self.folder(job)
        pid = number(folder / "pid")
        if pid is None and job.id in self.children:
            pid = self.children[job.id].pid
        if pid is None or not alive(folder):
            return False
        with suppress(ProcessLookupError):
            (os.killpg if what == signal.SIGKILL else os.kill)(pid, what)
        return True


# -- small parts -----------------------------------------------------------------------------------------------------


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """The file that `--config` reads."""
    write_file(folder / SETTINGS, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def environment() -> dict[str, str]:
    """Of a job: this vismodal, wherever its folder is, no request that leaves the machine, and bars that tell of it."""
    root = str(Path(vismodal.__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    ours = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")} | ours
