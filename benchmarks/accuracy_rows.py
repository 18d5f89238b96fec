"""Parts of `accuracy.py`: the rows that were measured, and the search of a rate by them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from contest import climb
from entrants import Job, Row


class Rows:
    """The rows of a file, by what names them. Failed ones are tried again by the next run."""

    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, dict[str, Row]()
        for line in file.read_text().splitlines() if file.exists() else ():
            self._put(json.loads(line))

    def _put(self, row: Row) -> None:
        if "failed" in row:
            self.rows.setdefault(name_of(row), row)
        else:
            self.rows[name_of(row)] = row

    def add(self, row: Row) -> None:
        self._put(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def get(self, key: Row) -> Row | None:
        """Of a training that ended."""
        row = self.rows.get(name_of(key))
        return None if row is None or "failed" in row else row


KEY = ("model", "label", "set", "lr", "seed", "pilot", "recipe")


def name_of(row: Row) -> str:
    """A whole training goes without its rate: the rate was chosen before."""
    return json.dumps([None if k == "lr" and not row["pilot"] else row[k] for k in KEY], sort_keys=True)


class _Unknown(Exception):
    """A rate of which the loss is not known yet."""


def search(job: Job, rows: Rows) -> tuple[float, bool]:
    """The rate that is to be tried next, and False; or the best one, and True."""
    accuracy = {}

    def loss(lr: float) -> float:
        row = rows.get(replace(job, lr=lr).key())
        if row is None:
            raise _Unknown(lr)
        accuracy[lr] = row["val"]
        return math.inf if row["val_loss"] is None else row["val_loss"]

    try:
        tried = climb(job.lr, loss)
    except _Unknown as unknown:
        return unknown.args[0], False
    return max(tried, key=lambda lr: (accuracy[lr], -tried[lr])), True
