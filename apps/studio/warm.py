"""A spare process that has imported what a drawing needs, and becomes the next one: imports take longer than to draw.

It waits at a socket for one job: its folder and arguments, and with them, already open, the lock of that folder and the
files for what it says. A lock belongs to the open file, so that it is held without a gap: in the web process, on the
way, and then here. Where the studio ends, however it does, so does the other end of the socket, and an idle spare.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# what the command itself imports only when it is asked for
LATER = (
    "jsonargparse",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
)


def waiting(number: int) -> list[str]:
    """The command line of a spare that waits at the file descriptor `number`."""
    return [sys.executable, "-P", str(Path(__file__).with_name("runner.py")), "--wait", str(number)]


class Spare:
    """The spare of one studio, in the web process.

    Args:
        command: gives the command line, by the file descriptor at which the spare waits; another one in tests.
    """

    def __init__(self, command: Callable[[int], list[str]] = waiting) -> None:
        self.command = command
        self.idle: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def start(self, environment: Mapping[str, str]) -> None:
        """Starts it, unless there is one. One that died is not replaced before the next job: it would die again."""
        if self.idle is not None:
            self.idle[0].poll()  # or a dead one would stay a zombie
            return
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    self.command(theirs.fileno()), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, start_new_session=True, pass_fds=(theirs.fileno(),), umask=0o077,
                )  # fmt: skip
            except OSError:  # no memory: jobs start without it
                ours.close()
                return
        self.idle = process, ours

    def take(self, folder: Path, arguments: Sequence[str], files: Sequence[int]) -> subprocess.Popen[bytes] | None:
        """Gives it a job, and returns its process, which is the job's from now on; None where none is alive.

        It may still be importing: then it begins a little later, and still before a new process would.
        `files` are the lock, and where it writes its output and its errors.
        """
        if self.idle is None:
            return None
        (process, ours), self.idle = self.idle, None
        with ours, suppress(OSError):
            if process.poll() is None:
                socket.send_fds(ours, [json.dumps([str(folder), *arguments]).encode()], files)
                return process
        process.kill()
        process.wait()
        return None

    def close(self) -> None:
        """Ends an idle one."""
        if self.idle is not None:
            (process, ours), self.idle = self.idle, None
            ours.close()
            process.kill()
            process.wait()


def imports() -> None:
    """What a drawing needs."""
    from vismodal.cli import load_pipeline

    load_pipeline("generate")
    for name in LATER:
        importlib.import_module(name)


def wait(number: int, prepare: Callable[[], None] = imports) -> list[str] | None:
    """In the spare: the arguments of its job, once it is in the job's place; None where the studio has ended."""
    with suppress(Exception):  # the job will meet it again, and tell
        prepare()
    with socket.socket(fileno=number) as theirs:
        told, files, _, _ = socket.recv_fds(theirs, 2**16, 3)
    if not told:
        return None
    folder, *arguments = json.loads(told)
    os.chdir(folder)
    for place, file in enumerate(files[1:], start=1):  # the first is the lock, and stays open
        os.dup2(file, place)
        os.close(file)
    return list(arguments)
