"""The adapters that there are: what jobs of dreambooth, merge and import have made. Nothing else is kept of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismodal.errors import InputError

from .jobs import RUN, Jobs
from .store import Job

MADE_ON = "made_on.json"  # in the folder of a merge: the base model of its parts


@dataclass(frozen=True)
class Adapter:
    """An adapter of the library.

    Args:
        id: the number of its job.
        name: what prompts call it, as in <lora:NAME:0.8>; no two are alike.
        title: of its job.
        model: the base model that it is for; None is the embedded one.
        words: what brings it out: its prompt.
        file: in vismodal's format.
        size: bytes of it.
    """

    id: int
    name: str
    title: str
    model: str | None
    words: str
    file: Path
    size: int

    @property
    def preview(self) -> Path | None:
        """Before and after, where it was trained here."""
        path = self.file.with_name("sheet.png")
        return path if path.is_file() else None

    @property
    def card(self) -> str:
        """What its README says."""
        path = self.file.with_name("README.md")
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)

    @property
    def diffusers(self) -> Path | None:
        """The same for `load_lora_weights`, where the training has written it."""
        path = self.file.with_name("pytorch_lora_weights.safetensors")
        return path if path.is_file() else None


class Shelf:
    """The adapters of a studio's jobs."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def adapters(self) -> list[Adapter]:
        """All that are there whole, the oldest first."""
        return list(self._found())

    def get(self, key: str) -> Adapter:
        """By number or name. Raises `InputError` with those that there are."""
        found = self.adapters()
        for match in (lambda each: str(each.id) == key, lambda each: each.name == key):
            if each := next(filter(match, found), None):
                return each
        raise InputError(f"there is no adapter {key!r}; there are {', '.join(each.name for each in found) or 'none'}")

    def _found(self) -> Iterator[Adapter]:
        names: set[str] = set()
        for job in self.jobs.store.all():
            settings = self._settings(job)
            file = self.jobs.folder(job) / RUN / "adapter.safetensors"
            if settings is None or not file.is_file():
                continue
            name = _slug(job.title)
            while not name or name in (*names, "none") or name.isdigit():  # "none" and numbers mean something else
                name = f"{name or 'adapter'}-{job.id}"
            names.add(name)
            words = str(settings.get("prompt") or "")
            yield Adapter(job.id, name, job.title, self._model(job, settings), words, file, file.stat().st_size)

    def _settings(self, job: Job) -> dict[str, Any] | None:
        """Of a job that makes an adapter for pictures; None of any other."""
        if job.kind not in ("dreambooth", "merge", "convert"):
            return None
        settings = self.jobs.settings(job)
        return settings if settings.get("to", "vismodal") == "vismodal" else None

    def _model(self, job: Job, settings: dict[str, Any]) -> str | None:
        made_on = self.jobs.folder(job) / MADE_ON
        if "base" in settings:  # of an import
            return None if settings["base"] == "tiny-sd" else str(settings["base"])
        return json.loads(made_on.read_text()) if made_on.is_file() else settings.get("model")


def _slug(title: str) -> str:
    """Letters, digits, dashes: what stands in a tag."""
    return re.sub(r"[^\w.]+", "-", title).strip("-.")[:40]
