"""A panel that follows a job: phase, speed, time left, the loss, samples; and what can be done with it.

It reads what is on the disk at every tick of the page's timer, so that any tab, at any time, sees the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from vismodal.errors import InputError

from .page import Served, on, plain
from .progress import losses, progress, shown, tail
from .store import ACTIVE, Job
from .work import Studio

Seen = tuple[str, str, str]  # what a page shows already: the choices with the buttons, the curve, the pictures
UNSEEN = ("", "", "")


class Watch:
    """The panel for jobs of some kinds.

    Args:
        studio: whose jobs.
        served: files for the page.
        kinds: those that it follows.
        extends: whether they can be made longer.
        pictures: whether they draw samples on the way.
    """

    def __init__(self, studio: Studio, served: Served, kinds: Sequence[str], extends: bool, pictures: bool) -> None:
        self.studio, self.served, self.kinds, self.pictures = studio, served, kinds, pictures
        self.job = gr.Dropdown(label="Job", choices=[], interactive=True, allow_custom_value=True)
        self.status = gr.Markdown("No job yet.", elem_classes="status")
        with gr.Row():
            self.stop = gr.Button("Stop and save", size="sm", min_width=120, interactive=False)
            self.resume = gr.Button("Resume", size="sm", min_width=120, interactive=False)
            self.force = gr.Button("Force stop", size="sm", variant="stop", min_width=120, interactive=False)
        with gr.Row(visible=extends):
            self.length = gr.Number(1200, label="Steps in all", precision=0, minimum=1, min_width=120)
            self.extend = gr.Button("Extend to these", size="sm", interactive=False, min_width=120, elem_classes="low")
        with gr.Row(visible=pictures):
            self.now = gr.Button("Sample now", size="sm", interactive=False, min_width=120)
            self.grid = gr.Button("Grid of checkpoints by strengths", size="sm", interactive=False, min_width=120)
        self.plot = gr.LinePlot(value=curve([]), x="step", y="loss", label="Loss", height=260, visible=False)
        self.slider = gr.ImageSlider(label="Before (step 0) and now", interactive=False, buttons=[], visible=False)
        self.samples = gr.Gallery(
            label="Samples by step" if pictures else "Results", columns=1, format="png", height="auto",
            object_fit="contain", interactive=False, visible=False, elem_classes="sheets",
        )  # fmt: skip
        with gr.Accordion("What it says", open=False):
            self.log = gr.Textbox(lines=10, max_lines=10, show_label=False, elem_classes="log", interactive=False)
        self.seen = gr.State(UNSEEN)
        self.mark = gr.Textbox(visible="hidden")  # a State would tell of its change through the queue only

    def outputs(self) -> list[Any]:
        buttons = [self.stop, self.resume, self.force, self.extend, self.now, self.grid]
        return [self.job, self.status, *buttons, self.plot, self.slider, self.samples, self.log, self.seen]

    def tie(self, timer: gr.Timer, page: gr.Blocks, tab: gr.Tab) -> None:
        """To the timer, to the beginning of the page and of its tab, and to its own buttons."""
        on(page.load, lambda: self.show(None, UNSEEN), [], self.outputs(), quiet=True)
        parts = [self.status, self.plot, self.log, self.seen, self.mark]
        on([timer.tick, tab.select], self.follow, [self.job, self.seen], parts, quiet=True)
        on(self.mark.change, self.show, [self.job, self.seen], self.outputs(), quiet=True)
        on(self.job.input, self.show, [self.job, self.seen], self.outputs(), quiet=True)
        jobs = self.studio.jobs
        for button, action in ((self.stop, jobs.stop), (self.resume, jobs.resume), (self.force, jobs.force_stop)):
            on(button.click, self._act(action), [self.job, self.seen], self.outputs())
        on(self.extend.click, self._extend, [self.job, self.length, self.seen], self.outputs())
        on(self.now.click, self._sample, [self.job])
        on(self.grid.click, self._grid, [self.job])

    def mine(self) -> list[Job]:
        """The jobs that it may follow, the newest first."""
        return [job for job in reversed(self.studio.jobs.store.all()) if job.kind in self.kinds]

    def choose(self, number: int | None) -> Job | None:
        """The job of that number, or else the one that is at work, or else the newest."""
        jobs = self.mine()
        active = [job for job in jobs if job.state in ACTIVE]
        return next((job for job in jobs if job.id == number), None) or next(iter([*active, *jobs]), None)

    def follow(self, number: int | None, seen: Seen = UNSEEN) -> list[Any]:
        """What changes at every step; and a mark which changes where the rest has to be shown anew.

        An output takes the server longer than all else here, even if it is skipped: twenty pages would slow a training.
        """
        job = self.choose(number)
        if job is None:
            return ["No job yet.", gr.skip(), "", UNSEEN, ""]
        folder, now = self.studio.jobs.folder(job), self._marks(job)
        plot = curve(losses(folder)) if now[1] != seen[1] else gr.skip()
        digest = hashlib.sha256(f"{now[0]} {now[2]}".encode()).hexdigest()[:16]
        return [self._says(job), plot, tail(folder), (seen[0], now[1], seen[2]), digest]

    def show(self, number: int | None, seen: Seen = UNSEEN) -> list[Any]:
        """All parts of the panel; choices, buttons, curve and pictures only where they have changed since `seen`.

        What is sent again would close a list that somebody has open, and take a picture from under the pointer.
        """
        job = self.choose(number)
        live = self._live(job)
        if job is None:
            hidden, buttons = [gr.update(visible=False)] * 3, [gr.update(interactive=False) for _ in live]
            return [gr.update(choices=[], value=None), "No job yet.", *buttons, *hidden, "", UNSEEN]
        folder, now = self.studio.jobs.folder(job), self._marks(job)
        listed, drawn, pictured = (new != old for new, old in zip(now, seen, strict=True))
        chosen = gr.update(choices=self._choices(), value=job.id) if listed else gr.skip()
        buttons = [gr.update(interactive=active) if listed else gr.skip() for active in live]
        points = losses(folder)
        plot = gr.update(value=curve(points), visible=len(points) > 1) if listed or drawn else gr.skip()
        pictures = self._pictures(shown(folder)) if pictured else [gr.skip(), gr.skip()]
        return [chosen, self._says(job), *buttons, plot, *pictures, tail(folder), now]

    def _marks(self, job: Job) -> Seen:
        """These change with the choices and the buttons, with the curve, and with the pictures."""
        folder = self.studio.jobs.folder(job)
        points, run = losses(folder), f"{job.id} {job.started}"
        listed = f"{job.id} {self._choices()} {self._live(job)} {len(points) > 1}"
        return listed, f"{run} {points[-1:]}", f"{run} {len(shown(folder))}"

    def _choices(self) -> list[tuple[str, int]]:
        return [(f"{job.id} · {job.title} · {job.state}", job.id) for job in self.mine()]

    def _says(self, job: Job) -> str:
        now = progress(job.state, self.studio.jobs.folder(job))
        return f"{now}" + (f"\n\n{plain(job.error)}" if job.error else "")

    def _pictures(self, sheets: Sequence[tuple[str, Path]]) -> list[Any]:
        """The first beside the last, and all of them, the last first."""
        found = [(self.served(path), text) for text, path in sheets]
        pair = (found[0][0], found[-1][0]) if self.pictures and len(found) > 1 else None
        return [gr.update(value=pair, visible=pair is not None), gr.update(value=found[::-1], visible=bool(found))]

    def _live(self, job: Job | None) -> list[bool]:
        """Which buttons can be pressed."""
        state = job.state if job else ""
        kept = job is not None and bool(self.studio.checkpoints(job))
        return [
            state in ("queued", "running"), state in ("stopped", "failed"), state in ACTIVE,
            state in ("stopped", "done"), state == "running", kept,
        ]  # fmt: skip

    def _act(self, action: Callable[[Job], None]) -> Callable[..., list[Any]]:
        def act(number: int | None, seen: Seen) -> list[Any]:
            action(self._job(number))
            return self.show(number, seen)

        return act

    def _extend(self, number: int | None, length: float, seen: Seen) -> list[Any]:
        self.studio.extend(self._job(number).id, int(length or 0))
        return self.show(number, seen)

    def _sample(self, number: int | None) -> None:
        self.studio.sample(self._job(number).id)
        gr.Info("The samples are drawn after this step, and then shown below.")

    def _grid(self, number: int | None) -> None:
        job = self.studio.grid(self._job(number).id)
        gr.Info(f"Job {job.id} draws its checkpoints at several strengths; the sheets are then in Create.")

    def _job(self, number: int | None) -> Job:
        if number is None:
            raise InputError("there is no job yet; start one")
        return self.studio.jobs.store.get(number)


def curve(points: Sequence[tuple[int, float]]) -> pd.DataFrame:
    """For the plot."""
    return pd.DataFrame({"step": [step for step, _ in points], "loss": [loss for _, loss in points]}, dtype=float)
