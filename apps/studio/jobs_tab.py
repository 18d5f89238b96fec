"""The tab Jobs: all that runs, waits or has ended."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from vismodal.errors import InputError

from .page import Served, on
from .progress import duration, progress, tail
from .store import ACTIVE
from .work import Studio

Seen = tuple[str, str]  # what a page shows already: the table, and the choices
UNSEEN = ("", "")


class JobsTab:
    """Builds the tab inside a page."""

    def __init__(self, studio: Studio, served: Served) -> None:
        self.studio, self.served = studio, served
        self.table = gr.Dataframe(
            headers=["job", "what", "title", "state", "how far", "since"], interactive=False, wrap=True,
            label="Jobs, the newest first", column_count=6, type="array", max_height=420,
        )  # fmt: skip
        with gr.Row():
            self.job = gr.Dropdown([], label="Job", min_width=160, allow_custom_value=True)
            self.stop = gr.Button("Stop", size="sm", min_width=100, elem_classes="low")
            self.resume = gr.Button("Resume", size="sm", min_width=100, elem_classes="low")
            self.force = gr.Button("Force stop", size="sm", variant="stop", min_width=100, elem_classes="low")
        with gr.Row():
            self.sure = gr.Checkbox(False, label="Yes, delete it with all it made", min_width=160)
            self.delete = gr.Button("Delete", size="sm", variant="stop", min_width=100, elem_classes="low")
        self.seen = gr.State(UNSEEN)
        self.log = gr.Textbox(label="What it says", lines=10, max_lines=10, elem_classes="log", interactive=False)

    def tie(self, timer: gr.Timer, page: gr.Blocks, tab: gr.Tab) -> None:
        """To the page's events."""
        shown, given = [self.table, self.job, self.log, self.seen], [self.job, self.seen]
        on(page.load, lambda: self.show(None), [], shown, quiet=True)
        on([timer.tick, tab.select], self.show, given, shown, quiet=True)
        on(self.job.input, self.show, given, shown, quiet=True)
        jobs = self.studio.jobs
        for button, action in ((self.stop, jobs.stop), (self.resume, jobs.resume), (self.force, jobs.force_stop)):
            on(button.click, self._act(action), [self.job], shown)
        on(self.delete.click, self.remove, [self.job, self.sure], [self.sure, *shown])

    def show(self, number: int | None, seen: Seen = UNSEEN) -> list[Any]:
        """The table and the choices where they have changed since `seen`, and the log of the one that is chosen."""
        jobs = self.studio.jobs.store.all()[::-1]
        rows = []
        for job in jobs:
            took = f"took {duration(job.ended - job.started)}" if job.started and job.ended else ""
            active = job.state in ACTIVE
            how = job.error or (str(progress(job.state, self.studio.jobs.folder(job))) if active else took)
            rows.append([job.id, job.kind, job.title, job.state, how, clock(job.ended or job.started or job.created)])
        chosen = next((job for job in jobs if job.id == number), jobs[0] if jobs else None)
        choices = [(f"{job.id} · {job.title}", job.id) for job in jobs]
        now = (f"{rows}", f"{choices}")
        table = rows if now[0] != seen[0] else gr.skip()
        listed = gr.skip()
        if now[1] != seen[1]:  # the choice itself is sent only where it has gone: somebody may just be choosing
            stays = chosen is not None and chosen.id == number
            value: dict[str, Any] = {} if stays else {"value": chosen.id if chosen else None}
            listed = gr.update(choices=choices, **value)
        return [table, listed, tail(self.studio.jobs.folder(chosen)) if chosen else "", now]

    def _act(self, action: Any) -> Any:
        def act(number: int | None) -> list[Any]:
            if number is None:
                raise InputError("there is no job yet")
            action(self.studio.jobs.store.get(number))
            return self.show(number)

        return act

    def remove(self, number: int | None, sure: bool) -> list[Any]:
        """Deletes a job, if that is confirmed."""
        if number is None:
            raise InputError("there is no job yet")
        if not sure:
            raise InputError("deleting cannot be undone; tick the box beside the button first")
        self.studio.jobs.delete(self.studio.jobs.store.get(number))
        self.served.forget()
        return [False, *self.show(None)]


def clock(seconds: float) -> str:
    """Local time."""
    return time.strftime("%d %b %H:%M:%S", time.localtime(seconds))
