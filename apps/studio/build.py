"""The page: its tabs, its endpoints, and how it is served."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from vismodal.errors import InputError

from .create import Create
from .endpoints import Endpoints
from .guard import HERE, Doors, Gate, Headers
from .jobs_tab import JobsTab
from .library import Library
from .page import CSS, Served, on
from .recognise import Recognise
from .teach import Teach
from .work import DAY, Studio


class Tab(Protocol):
    """What builds itself inside a page, and is then tied to its events: the timer's, the page's and its own tab's."""

    def tie(self, timer: gr.Timer, page: gr.Blocks, tab: gr.Tab) -> None: ...


EVERY = 2.0  # seconds from one look at the disk to the next
TABS: dict[str, Callable[[Studio, Served], Tab]] = {
    "Teach": Teach,
    "Create": Create,
    "Library": Library,
    "Recognise": Recognise,
    "Jobs": JobsTab,
}
FONTS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")


def page(studio: Studio, served: Served) -> gr.Blocks:
    """All of it; nothing of a job's state lives in here."""
    with gr.Blocks(title="vismodal studio", analytics_enabled=False, delete_cache=(DAY, DAY)) as blocks:
        gr.Markdown("# vismodal studio")
        timers = {name: gr.Timer(EVERY, active=i == 0) for i, name in enumerate(TABS)}
        with gr.Tabs(overflow_behavior="wrap"):
            for name, kind in TABS.items():
                with gr.Tab(name) as tab:
                    kind(studio, served).tie(timers[name], blocks, tab)
                on(tab.select, partial(only, name), [], list(timers.values()), quiet=True)
        Endpoints(studio, served).tie()
    quicken(blocks)
    return blocks


def only(name: str) -> list[gr.Timer]:
    """The timers, of which only that of the tab in view runs: the others have nothing to show."""
    return [gr.Timer(active=one == name) for one in TABS]


def quicken(page: gr.Blocks) -> None:
    """Makes the schema of each kind of component once.

    For an update of an output, and so for one that skips it, Gradio 6.31 sets up the component anew and asks it for its
    schema (gradio/state_holder.py, `_update_config`), which pydantic makes anew too: half of the time of a poll.
    """
    for block in page.blocks.values():
        model: Any = getattr(block, "data_model", None)
        if model is not None and "model_json_schema" not in vars(model):
            schema = model.model_json_schema()
            model.model_json_schema = partial(dict, schema)  # a copy, of which Gradio takes parts out


def middleware(address: str, studio: Studio) -> list[Middleware]:
    """On this machine's own address a name that leads here from a strange page is refused as well (DNS rebinding)."""
    ours = [Middleware(TrustedHostMiddleware, allowed_hosts=list(HERE))] if address in HERE else []
    return [Middleware(Headers), *ours, Middleware(Doors, most=2 * studio.limits.upload, full=studio.intake.full)]


def launch(studio: Studio, cache: Path, address: str, port: int | None, password: str | None) -> tuple[gr.Blocks, str]:
    """Serves the page in threads of its own; gives it and its address. Raises `InputError` if the port is taken."""
    cache.mkdir(mode=0o700, exist_ok=True)
    blocks = page(studio, Served(cache))
    blocks.queue(default_concurrency_limit=8, max_size=200)
    try:
        _, local, _ = blocks.launch(
            server_name=address, server_port=port, auth=Gate(password) if password else None,
            auth_message="Any name, and the password of this studio.", share=False, run_history=False,
            prevent_thread_lock=True, quiet=True, show_error=False, ssr_mode=False, enable_monitoring=False,
            max_file_size=studio.limits.upload, footer_links=["api", "settings"], pwa=False,
            app_kwargs={"middleware": middleware(address, studio)}, css=CSS,
            theme=gr.themes.Default(font=FONTS, font_mono=MONO, primary_hue="teal", radius_size="md"),
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"cannot listen on {address}: {error}; write another --port, or none") from error
    return blocks, local
