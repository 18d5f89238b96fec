"""What all tabs share: files that may be shown, errors as toasts, and how a handler is tied to its event.

Lists whose choices change take any value (`allow_custom_value`): Gradio forgets a page's choices when the server ends,
and would then refuse all that an older page shows. The handlers look up what they are given anyway.
"""

from __future__ import annotations

import functools
import hashlib
import html
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from vismodal.errors import InputError, one_line

HEAVY: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "intake"}  # of what decodes pictures
KEY = 32  # letters of the folders in which files are served; those of uploads are longer
P = ParamSpec("P")
R = TypeVar("R")

CSS = """
.gradio-container { max-width: 1280px !important; width: 100% !important; margin: 0 auto !important; }
.low { align-self: end; }
.sheets .grid-container { grid-template-rows: none !important; grid-auto-rows: max-content !important; }
.sheets .thumbnail-lg { aspect-ratio: auto !important; height: auto !important; }
.quiet { opacity: .75; font-size: .9em; }
.status p { font-size: 1.05em; font-weight: 600; }
.log textarea { font-family: ui-monospace, monospace; font-size: .8em; white-space: pre; }
@media (max-width: 640px) {
    .gradio-container, .gradio-container main { padding: 4px !important; }
    button[role=tab] { padding: 0 10px !important; }
}
"""


class Served:
    """Files that a page may show: single ones, by names that nobody can guess, never a folder.

    Args:
        cache: the folder of Gradio's cache, from which alone it serves.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def __call__(self, path: Path, name: str = "") -> str:
        """Where Gradio finds a file of the studio; `name` is what a download is called."""
        state = path.stat()
        key = hashlib.sha256(f"{path}\0{state.st_mtime_ns}\0{state.st_size}\0{name}".encode()).hexdigest()[:KEY]
        target = self.cache / key / (name or path.name)
        if not target.exists():
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                os.link(path, target)  # files here are replaced, never changed
            except FileExistsError:  # another page was faster
                pass
            except OSError:
                shutil.copyfile(path, target)
        return str(target)

    def forget(self) -> None:
        """Takes away what only a page still has: the files of jobs that are deleted."""
        for folder in self.cache.iterdir():
            if len(folder.name) == KEY and all(path.stat().st_nlink == 1 for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)

    def uploaded(self, path: str) -> Path:
        """A file that was uploaded. Raises `InputError` for any other path, whoever gives it."""
        found = Path(path).resolve()
        if not found.is_relative_to(self.cache.resolve()) or not found.is_file():
            raise InputError("this is no file that was uploaded here; upload it again")
        return found


def told(function: Callable[P, R]) -> Callable[P, R]:
    """The same, with its `InputError` as a toast; names in it may come from files, so that they are no HTML."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except InputError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
        except OSError as error:
            raise gr.Error(html.escape(f"{error.strerror or error}; free some space, or see the log")) from error

    return inner


def on(
    events: Any,
    function: Callable[..., Any],
    inputs: Sequence[Any] = (),
    outputs: Sequence[Any] = (),
    quiet: bool = False,
    heavy: bool = False,
) -> None:
    """Ties a handler to an event of the page, or to several; programs have endpoints of their own. Heavy ones wait for
    each other."""
    gr.on(
        events if isinstance(events, list) else [events],
        told(function),
        list(inputs),
        list(outputs),
        api_visibility="private",
        show_progress="hidden" if quiet else "minimal",
        queue=not quiet,
        **(HEAVY if heavy else {"concurrency_limit": None}),
    )


def optional(label: str, hint: str) -> gr.Textbox:
    """A number that may be left out; `hint` says what counts then. Gradio's own field for numbers cannot be empty."""
    return gr.Textbox("", label=label, placeholder=hint, max_lines=1, min_width=120)


def number_in(label: str, text: str) -> float | None:
    """What such a field holds, an int where it is whole. Raises `InputError` where it is no number."""
    text = text.strip()
    try:
        return (int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)) if text else None
    except ValueError:
        raise InputError(f"{label} is {text!r}; write a number, or nothing") from None


def plain(text: str) -> str:
    """Text from outside in Markdown, as it is written."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-!|~&" else c for c in one_line(text))
