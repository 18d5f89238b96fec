"""The tab Create: pictures by several adapters at once, before and after, a sheet of strengths."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from vismodal.errors import InputError

from .chosen import Chosen
from .jobs import RUN
from .page import Served, number_in, on, optional, plain
from .progress import duration
from .store import ACTIVE, Job
from .watch import UNSEEN, Seen
from .work import STRENGTHS, Studio


class Create:
    """Builds the tab inside a page."""

    def __init__(self, studio: Studio, served: Served) -> None:
        self.studio, self.served = studio, served
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self._fields()
            with gr.Column(min_width=320):
                self.job = gr.Dropdown([], label="Drawing", allow_custom_value=True)
                self.status = gr.Markdown("Nothing drawn yet.", elem_classes="status")
                self.slider = gr.ImageSlider(
                    label="Without and with the adapters", interactive=False, buttons=[], visible=False
                )
                self.gallery = gr.Gallery(
                    label="Pictures; each png carries its settings", columns=3, format="png", height="auto",
                    object_fit="contain", interactive=False, buttons=["download", "fullscreen"], visible=False,
                )  # fmt: skip
                self.sheet = gr.Gallery(
                    show_label=False, columns=1, format="png", height="auto", interactive=False, visible=False,
                    elem_classes="sheets",
                )  # fmt: skip
        self.seen = gr.State(UNSEEN)

    def _fields(self) -> None:
        self.prompt = gr.Textbox(
            "a drawing of sks robot on a blue background",
            lines=3,
            label="Prompts, one a line",
            info="A line with <lora:NAME:0.8> in it is drawn by these adapters alone; <lora:none> by none.",
        )
        self.adapters = Chosen(self.studio, "Strength", 0, 2, 1)
        with gr.Row():
            self.seed = optional("Seed", "drawn, and shown")
            self.count = gr.Slider(1, 16, value=4, step=1, label="Pictures of each prompt", min_width=120)
        self.compare = gr.Checkbox(True, label="Draw each without adapters too, to compare")
        with gr.Accordion("Advanced", open=False):
            self.negative = gr.Textbox("", label="What to lead away from")
            names = ["", *self.studio.models]
            self.model = gr.Dropdown(names, value="", label="Base model; empty is that of the adapters")
            with gr.Row():
                self.steps = optional("Steps", "as usual")
                self.guidance = optional("Guidance", "as usual")
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary")
            self.sweep = gr.Button("Grid of strengths by seeds")

    def tie(self, timer: gr.Timer, page: gr.Blocks, tab: gr.Tab) -> None:
        """To the page's events."""
        shown = [self.job, self.status, self.slider, self.gallery, self.sheet, self.seen]
        fields = [self.prompt, self.seed, self.count, self.compare, self.negative, self.model]
        fields += [self.steps, self.guidance, *self.adapters.inputs()]
        on(page.load, lambda: self.show(None, UNSEEN), [], shown, quiet=True)
        on([timer.tick, tab.select, self.job.input], self.show, [self.job, self.seen], shown, quiet=True)
        self.adapters.tie(page.load)
        on(self.draw.click, self.begin, fields, [self.seed, *shown])
        on(self.sweep.click, self.begin_sweep, fields, [self.seed, *shown])

    def begin(self, *fields: Any) -> list[Any]:
        return self._begin((), *fields)

    def begin_sweep(self, *fields: Any) -> list[Any]:
        return self._begin(STRENGTHS, *fields)

    def _begin(
        self, sweep: tuple[float, ...], prompt: str, seed: str, count: float, compare: bool, negative: str, model: str,
        steps: str, guidance: str, chosen: list[str], *strengths: float,
    ) -> list[Any]:  # fmt: skip
        given: dict[str, Any] = {"steps": number_in("Steps", steps), "guidance": number_in("Guidance", guidance)}
        given["negative"] = negative or None
        worn, start = list(zip(chosen, strengths, strict=False)), number_in("Seed", seed)
        if isinstance(start, float):
            raise InputError(f"Seed is {seed}; write a whole number, or nothing")
        job = self.studio.draw(
            prompt.splitlines(), worn, start, int(count), compare and bool(chosen), sweep, model, given
        )
        self.studio.jobs.tick()
        used = self.studio.jobs.settings(job)["seeds"][0]
        return [str(used), *self.show(job.id, UNSEEN)]

    def show(self, number: int | None, seen: Seen) -> list[Any]:
        """A drawing, or else the newest: how it is getting on, and then its pictures; what has changed since `seen`."""
        jobs = [job for job in reversed(self.studio.jobs.store.all()) if job.kind == "generate"]
        job = next((job for job in jobs if job.id == number), jobs[0] if jobs else None)
        if job is None:
            return [gr.update(choices=[], value=None), "Nothing drawn yet.", *[gr.update(visible=False)] * 3, UNSEEN]
        choices = [(f"{j.id} · {j.title} · {j.state}", j.id) for j in jobs]
        now = (f"{job.id} {choices}", f"{job.id} {job.state}")
        chosen = gr.update(choices=choices, value=job.id) if now[0] != seen[0] else gr.skip()
        parts = self._parts(job) if now[1] != seen[1] else [gr.skip()] * 3
        return [chosen, self._words(job), *parts, now]

    def _words(self, job: Job) -> str:
        """How far a drawing is."""
        if job.state == "failed":
            return f"Failed: {plain(job.error)}"
        if job.state in ACTIVE:
            return f"Drawing, for {duration(time.time() - job.started)} …"
        first = self.studio.jobs.settings(job)["seeds"][0]
        return f"Done in {duration(job.ended - job.started)}, from seed {first}" if job.state == "done" else job.state

    def _parts(self, job: Job) -> list[Any]:
        """The slider, the pictures and the sheets, where there are any."""
        found = pictures(self.studio, job) if job.state == "done" else []
        sheets = sorted((self.studio.jobs.folder(job) / RUN).glob("sheet*.png")) if len(found) > 1 else []
        pair = before_and_after(found)
        values = (
            tuple(map(self.served, pair)) if pair else None,
            [(self.served(path), text) for path, text, _ in found],
            [self.served(path) for path in sheets],
        )
        return [gr.update(value=value, visible=bool(value)) for value in values]


def pictures(studio: Studio, job: Job) -> list[tuple[Path, str, dict[str, Any]]]:
    """The pictures of a job in order, each with a line about it, and the settings that it carries."""
    folder = studio.jobs.folder(job) / RUN
    found = []
    for path in sorted(folder.glob("[0-9]*.png")):
        with Image.open(path) as image:
            carried = json.loads(getattr(image, "text", {}).get("vismodal", "{}"))
        worn = " ".join(f"[{each['name']} {each['strength']:g}]" for each in carried.get("adapters", ()))
        line = f"{worn} seed {carried.get('seed', '?')}: {carried.get('prompt', '')}"  # a page cuts off its end
        found.append((path, " ".join(line.split()), carried))
    return found


def before_and_after(found: list[tuple[Path, str, dict[str, Any]]]) -> tuple[Path, Path] | None:
    """The first two of one prompt and seed, without adapters and with them."""
    for path, _, with_them in found:
        for other, _, without in found:
            alike = all(with_them.get(name) == without.get(name) for name in ("prompt", "seed"))
            if alike and with_them.get("adapters") and not without.get("adapters"):
                return other, path
    return None
