"""The list of jobs, in SQLite: it survives a restart, a crash and a kill of the web process.

The folder of a job is written before its row, and deleted after it: a row never points at half a job.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from vismodal.errors import InputError

State = Literal["queued", "running", "stopping", "stopped", "done", "failed"]
ACTIVE: tuple[State, ...] = ("running", "stopping")


@dataclass(frozen=True)
class Job:
    """A job as the list has it.

    Args:
        id: its number, which is never given again.
        kind: the command of vismodal.
        title: for people.
        folder: the name of its folder, chosen by the server.
        state: queued, running, stopping, stopped, done or failed.
        created, started, ended: seconds since 1970; 0 where it has not come to that.
        error: why it failed, in one line.
    """

    id: int
    kind: str
    title: str
    folder: str
    state: State
    created: float
    started: float = 0.0
    ended: float = 0.0
    error: str = ""


COLUMNS = ", ".join(f.name for f in fields(Job))
TABLE = """
create table if not exists jobs (
    id integer primary key autoincrement, kind text not null, title text not null, folder text not null unique,
    state text not null, created real not null, started real not null, ended real not null, error text not null
)
"""


class Store:
    """The jobs in one file. Every call is a transaction of its own; threads and processes may share the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as db:
            db.execute("pragma journal_mode = wal")
            db.execute(TABLE)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=30)
        try:
            db.execute("pragma synchronous = full")
            with db:
                yield db
        finally:
            db.close()

    def add(self, kind: str, title: str, folder: str) -> Job:
        """A new job at the end of the queue."""
        job = Job(0, kind, title, folder, "queued", time.time())
        marks = ", ".join("?" * len(fields(Job)))
        with self._open() as db:
            number = db.execute(f"insert into jobs ({COLUMNS}) values ({marks})", (None, *astuple(job)[1:])).lastrowid
        return self.get(int(number or 0))

    def get(self, number: int) -> Job:
        """Raises `InputError` where there is no such job."""
        job = self.find(number)
        if job is None:
            raise InputError(f"there is no job {number}; it may have been deleted")
        return job

    def find(self, number: int) -> Job | None:
        with self._open() as db:
            row = db.execute(f"select {COLUMNS} from jobs where id = ?", (number,)).fetchone()
        return Job(*row) if row else None

    def all(self) -> list[Job]:
        """The oldest first, which is the order of the queue."""
        with self._open() as db:
            return [Job(*row) for row in db.execute(f"select {COLUMNS} from jobs order by id")]

    def move(self, job: Job, before: tuple[State, ...], state: State, error: str = "") -> bool:
        """From one of the states `before` to another; False where somebody else was faster."""
        times = {
            "queued": "started = 0, ended = 0",
            "running": f"started = {time.time()!r}, ended = 0",
            "stopping": "id = id",
        }
        marks = ", ".join("?" * len(before))
        change = times.get(state, f"ended = {time.time()!r}")
        with self._open() as db:
            done = db.execute(
                f"update jobs set state = ?, error = ?, {change} where id = ? and state in ({marks})",
                (state, error, job.id, *before),
            )
        return done.rowcount == 1

    def remove(self, job: Job) -> bool:
        """Forgets a job, unless it is active."""
        with self._open() as db:
            return db.execute("delete from jobs where id = ? and state not in (?, ?)", (job.id, *ACTIVE)).rowcount == 1
