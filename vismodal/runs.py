"""A run's folder, its config.yaml, what a resume compares, and the accelerator: alike in all pipelines."""

from __future__ import annotations

import hashlib
import itertools
import shlex
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from vismodal.adapter import Adapter
from vismodal.data.photos import Photo, read_photos
from vismodal.errors import InputError
from vismodal.files import write_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONFIG = "config.yaml"
WAIT = timedelta(hours=6)  # for a process that draws class images or samples; NCCL's ten minutes would end the others


def start_accelerator(mixed_precision: str, track: str | None) -> Accelerator:
    """Device, precision, processes and trackers. Raises `InputError` for what this machine cannot do."""
    if AcceleratorState._shared_state:  # an earlier run of this process; its precision would be refused or stay
        AcceleratorState._reset_state()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`log_with", category=UserWarning)  # told below, as an error
            accelerator = Accelerator(
                mixed_precision=mixed_precision,
                log_with=track,
                project_dir="runs",
                kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
            )
    except (ValueError, ImportError) as error:
        raise InputError(f"accelerate refuses mixed_precision={mixed_precision!r}, track={track!r}: {error}") from error
    if track and not accelerator.log_with:
        raise InputError(f"the tracker {track} is not installed; write pip install {track}, or leave out track")
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate lets it pass and does nothing
        raise InputError("mixed_precision=fp16 needs a GPU; write bf16 or no")
    return accelerator


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """With so many threads, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def claim(output: Path | None, name: str, resume: bool, accelerator: Accelerator) -> Path:
    """The run's folder: `output`, or without it the next free runs/NAME-N, the same for all processes.

    Raises `InputError` if it holds a run that is not to be resumed, or if there is none to resume.
    """
    if resume:
        if output is None or not (output / CONFIG).is_file():
            where = "give the run's folder: --config RUN/config.yaml --resume"
            raise InputError(f"nothing to resume: {f'{output} holds no {CONFIG}' if output else 'no output'}; {where}")
    elif output is not None and (output / CONFIG).exists():
        raise InputError(
            f"{output} holds a run already; go on with it by --config {output / CONFIG} --resume, or name another"
        )
    if output is None:
        names = (Path("runs") / f"{name}-{n}" for n in itertools.count(1))
        output = broadcast_object_list([next(path for path in names if not path.exists())])[0]
    assert output is not None
    if output.exists() and not output.is_dir():
        raise InputError(f"the output {output} is a file; give a folder")
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    accelerator.project_configuration.set_directories(str(output))
    accelerator.project_configuration.logging_dir = str(
        output
    )  # where trackers write; the line above keeps the first one
    return output


def new_folder(output: Path | None, name: str) -> Path:
    """The folder of a run that is not resumed: `output`, or without it the next free runs/NAME-N; it is made later.

    Raises `InputError` where something lies there already.
    """
    if output is None:
        return next(path for n in itertools.count(1) if not (path := Path("runs") / f"{name}-{n}").exists())
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"{output} is there already; choose another folder")
    return output


def save_config(config: DataclassInstance, folder: Path) -> None:
    """The settings as a YAML file that `--config` reads, ready for `--resume`."""
    plain = {name: _plain(value) for name, value in asdict(config).items() if name != "resume"}
    write_file(folder / CONFIG, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def identity(config: DataclassInstance, free: Collection[str], **more: Any) -> dict[str, Any]:
    """All settings but the `free` ones, and whatever else decides the outcome, for `Checkpoints.identity`."""
    return {name: _plain(value) for name, value in asdict(config).items() if name not in free} | more


def bases(adapter: Adapter) -> dict[str, str]:
    """The fingerprint of each model that an adapter is on, whatever its place or name."""
    return {f"the model's {part}": f"{base.shapes} {base.values[:16]}" for part, base in adapter.bases.items()}


def digest(photos: Iterable[Photo]) -> str:
    """Pictures, captions and masks as a short hash: their content, wherever they lie."""
    total, count = hashlib.sha256(), 0
    for photo in photos:
        total.update(repr((photo.image.size, photo.caption)).encode() + photo.image.tobytes())
        if photo.mask is not None:
            total.update(b"mask" + photo.mask.tobytes())
        count += 1
    return f"{count} pictures {total.hexdigest()[:12]}"


Setting = TypeVar("Setting")


def known(value: Setting | None) -> Setting:
    """A setting that has been filled in by the time it is used."""
    assert value is not None
    return value


def at_least(config: DataclassInstance, least: float, *names: str) -> None:
    """Raises `InputError` for the first of these settings that is smaller (or no number)."""
    for name in names:
        if not getattr(config, name) >= least:
            raise InputError(f"{name} must be at least {least}, not {getattr(config, name)}")


def read_and_tell(folder: Path, size: int | None = None, captions: bool = True, masks: bool = True) -> list[Photo]:
    """The photos of a folder, with their captions and masks or without; files that are left out are named on stderr.

    Photos are shrunk to twice the `size` they are used in, or 1024, so that a hundred from a phone fit into memory.
    """
    found = read_photos(folder, side=max(1024, 2 * (size or 0)))
    for rejected in found.rejected:
        print(f"skipped {rejected}", file=sys.stderr)
    without: dict[str, Any] = ({} if captions else {"caption": None}) | ({} if masks else {"mask": None})
    return [replace(photo, **without) for photo in found.photos]


def resume_command(pipeline: str, folder: Path) -> str:
    """What to type to go on with a run."""
    return f"vismodal {pipeline} --config {shlex.quote(str(folder / CONFIG))} --resume"
