"""Which settings of a command a page or a client may give, and how much of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vismodal import cli
from vismodal.errors import InputError

# settings that name files without saying so by their type, or that are the server's to choose
OURS = {"model", "weights", "adapters", "conditions", "resume", "track", "json", "subjects", "threads"}
# the most that one visitor may ask of a machine which others use too
MOST = {
    "resolution": 2048,  # pixels
    "image_size": 1024,
    "rank": 1024,
    "batch": 256,
    "accumulate": 256,
    "steps": 1_000_000,
    "epochs": 10_000,
    "class_images": 10_000,
    "sample_count": 64,
    "sample_steps": 1000,
    "copies": 100,
    "tune": 100,
    "repeats": 100,
    "keep": 1000,
    "top": 1000,
}


def open_to_all(kind: str) -> set[str]:
    """The settings of a command that a page or a client may give: those that are no place on the disk."""
    return {f.name for f in fields(cli.load_pipeline(kind).Config) if f.name not in OURS and "Path" not in str(f.type)}


def allowed(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not None. Raises `InputError` for one that is not open to all, and for too much of one."""
    known = open_to_all(kind)
    if strange := sorted(settings.keys() - known):
        raise InputError(f"there is no setting {strange[0]!r} here; there are {', '.join(sorted(known))}")
    for name, value in settings.items():
        bounded(name, value)
    return {name: value for name, value in settings.items() if value is not None}


def bounded(name: str, value: Any) -> None:
    """Raises `InputError` for too much of a setting."""
    if isinstance(value, (int, float)) and value > MOST.get(name, value):
        raise InputError(
            f"{name} is {value:,}, and the studio takes {MOST[name]:,} at most; the command line has no bound"
        )
