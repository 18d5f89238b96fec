"""The studio: teach a model a subject, draw with it, keep and exchange adapters, recognise pictures; in the browser.

    vismodal studio                                        # on this machine alone, with the embedded model
    vismodal studio --models sd15=models/stable-diffusion-v1-5 --home my_studio
    vismodal studio --address 0.0.0.0 --password_file password.txt

Jobs are processes of their own: they go on when the page is closed and when the studio ends, and it finds them again.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismodal.errors import InputError
from vismodal.files import lock_folder

from .guard import HERE


@dataclass(frozen=True)
class Config:
    """A web app for personalised pictures: teach, create, library, recognise.

    Args:
        home: folder for the jobs, what is uploaded and what is made. Nobody else may read it.
        models: base models that may be chosen, as NAME=FOLDER, or NAME=OWNER/NAME where the Hub's cache has it.
        vision: vision models for Recognise likewise, and names of timm that are cached.
        address: where it listens; on another one than this machine's own a password is needed.
        port: without it, the first free one from 7860 on.
        password_file: text file with the password on its first line.
        trainers: trainings at a time.
        largest: MiB of one upload, unpacked.
        disk: GiB that the folder may have; above it nothing new is taken.
        run_disk: GiB of one job, which is stopped above it.
        warm: keep a process that has imported all that drawing needs, so that it begins at once; it takes 0.6 GB.
    """

    home: Path = Path("runs/studio")
    models: tuple[str, ...] = ()
    vision: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    port: int | None = None
    password_file: Path | None = None
    trainers: int = 1
    largest: int = 500
    disk: float = 50.0
    run_disk: float = 8.0
    warm: bool = True


def main(config: Config) -> None:
    """Serves until it is interrupted. Raises `InputError` for settings that cannot be used."""
    password = checked(config)
    asked = threading.Event()
    with serving(config, password) as address:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: asked.set())
        print(f"studio: {address}\nfolder: {config.home.resolve()}\nCtrl-C ends it; jobs go on", flush=True)
        asked.wait()
    print("studio: ended; jobs that run go on, and are found again at the next start", file=sys.stderr)


def checked(config: Config) -> str | None:
    """The password. Raises `InputError` for what makes no sense."""
    for name, least in (("trainers", 1), ("largest", 1), ("disk", 0.001), ("run_disk", 0.001)):
        if not getattr(config, name) >= least:
            raise InputError(f"{name} must be at least {least}, not {getattr(config, name)}")
    if config.password_file is None:
        if config.address not in HERE:
            raise InputError(f"on {config.address} others can reach it; write --password_file FILE, or no address")
        return None
    lines = config.password_file.expanduser().read_text(encoding="utf-8").splitlines()
    password = lines[0].strip() if lines else ""
    if len(password) < 8:
        raise InputError(f"the password in {config.password_file} has less than 8 characters; write a longer one")
    return password


def named(texts: Sequence[str], taken: str) -> dict[str, str]:
    """Models by name, from NAME=PLACE. Raises `InputError` for other texts, and names that come twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not (name and equals and place) or name in (taken, *found):
            raise InputError(f"models are NAME=FOLDER, each with a name of its own, not {text!r}")
        folder = Path(place).expanduser()
        found[name] = str(folder.resolve()) if folder.is_dir() else place
    return found


@contextmanager
def serving(config: Config, password: str | None = None) -> Iterator[str]:
    """The studio at work; gives its address."""
    home = config.home.expanduser().resolve()
    models = {"tiny-sd": None, **named(config.models, "tiny-sd")}
    vision = {"tiny-vit": "tiny-vit", **named(config.vision, "tiny-vit")}
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.umask(0o077)  # nobody else reads what is made here
    lock = lock_folder(home)
    if lock is None:
        raise InputError(f"a studio runs in {home} already; open its page, or give another --home")
    cache = home / "cache"
    os.environ.update(  # before gradio is imported: nothing is told to anybody, and files lie in our own folder
        GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(cache), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1"
    )
    from .build import launch
    from .intake import MIB, Limits
    from .jobs import Jobs
    from .warm import Spare
    from .work import Studio

    shutil.rmtree(cache, ignore_errors=True)  # what an earlier studio served, and was sent
    limits = Limits(upload=config.largest * MIB, total=int(config.disk * 2**30), run=int(config.run_disk * 2**30))
    spare = Spare() if config.warm else None
    jobs = Jobs(home, {"training": config.trainers, "drawing": 1}, limits.run, limits.total, spare=spare)
    studio = Studio(home, models, limits, jobs, vision)
    jobs.tick()  # what has ended meanwhile is settled before anybody looks
    stop = threading.Event()
    watch = threading.Thread(target=jobs.watch, args=(stop,), daemon=True)
    watch.start()
    page: Any = None
    try:
        page, address = launch(studio, cache, config.address, config.port, password)
        yield address
    finally:
        stop.set()
        watch.join()
        if page is not None:
            page.close(verbose=False)
        if spare is not None:
            spare.close()
        lock.close()
