"""The tab Create: pictures by several adapters at once, before and after, a sheet of strengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from vismodal.errors import InputError

from .jobs import RUN
from .page import Served, on, plain
from .store import ACTIVE, Job
from .work import Studio

MOST = 4  # sliders for adapters
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


class Create:
    """Builds the tab inside a page."""

    def __init__(self, studio: Studio, served: Served) -> None:
        self.studio, self.served = studio, served
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self._fields()
            with gr.Column(min_width=320):
                self.status = gr.Markdown("Nothing drawn yet.", elem_classes="status")
                self.slider = gr.ImageSlider(
                    label="Without and with the adapters",
                    interactive=False,
                    height=300,
                    buttons=[],
                    visible=False,
                )
                self.gallery = gr.Gallery(
                    label="Pictures; each png carries its settings", columns=3, format="png", height="auto",
                    object_fit="contain", interactive=False, buttons=["download", "fullscreen"],
                )  # fmt: skip
                self.sheet = gr.Gallery(label="Sheets", columns=1, format="png", height="auto", interactive=False)
        self.job, self.seen = gr.State(None), gr.State("")

    def _fields(self) -> None:
        self.prompt = gr.Textbox(
            "a drawing of sks robot on a blue background",
            lines=3,
            label="Prompts, one a line",
            info="A line with <lora:NAME:0.8> in it is drawn by these adapters alone; <lora:none> by none.",
        )
        self.adapters = gr.Dropdown([], label="Adapters", multiselect=True, max_choices=MOST, allow_custom_value=True)
        self.strengths = [
            gr.Slider(0, 2, value=1, step=0.05, label=f"Strength {i + 1}", visible=False) for i in range(MOST)
        ]
        with gr.Row():
            self.seed = gr.Number(None, label="Seed; empty draws one", precision=0, minimum=0, min_width=120)
            self.count = gr.Slider(1, 16, value=4, step=1, label="Pictures of each prompt", min_width=120)
        self.compare = gr.Checkbox(True, label="Draw each without adapters too, to compare")
        with gr.Accordion("Advanced", open=False):
            self.negative = gr.Textbox("", label="What to lead away from")
            names = ["", *self.studio.models]
            self.model = gr.Dropdown(names, value="", label="Base model; empty is that of the adapters")
            with gr.Row():
                self.steps = gr.Number(None, label="Steps", precision=0, minimum=1, maximum=200, min_width=120)
                self.guidance = gr.Number(None, label="Guidance", minimum=0, maximum=50, min_width=120)
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary")
            self.sweep = gr.Button("Grid of strengths by seeds")

    def tie(self, timer: gr.Timer, page: gr.Blocks) -> None:
        """To the page's events."""
        shown = [self.status, self.slider, self.gallery, self.sheet, self.seen]
        fields = [self.prompt, self.adapters, self.seed, self.count, self.compare, self.negative, self.model]
        fields += [self.steps, self.guidance, *self.strengths]
        on(
            page.load,
            lambda: [gr.update(choices=self.names()), self.newest()],
            [],
            [self.adapters, self.job],
            quiet=True,
        )
        on(timer.tick, self.show, [self.job, self.seen], shown, quiet=True)
        on(self.adapters.focus, lambda: gr.update(choices=self.names()), [], [self.adapters], quiet=True)
        on(self.adapters.change, self.label, [self.adapters], self.strengths, quiet=True)
        on(self.draw.click, self.begin, fields, [self.job, self.seed, *shown])
        on(self.sweep.click, self.begin_sweep, fields, [self.job, self.seed, *shown])

    def begin_page(self) -> list[Any]:
        return [gr.update(choices=self.names()), self.newest()]

    def names(self) -> list[tuple[str, str]]:
        return [(each.name, str(each.id)) for each in self.studio.shelf.adapters()]

    def newest(self) -> int | None:
        """The last job of drawing: a new tab goes on where the last one was."""
        return next((job.id for job in reversed(self.studio.jobs.store.all()) if job.kind == "generate"), None)

    def label(self, chosen: list[str]) -> list[Any]:
        """A slider for each adapter, with its name."""
        names = [self.studio.shelf.get(key).name for key in chosen]
        shown = [gr.update(visible=True, label=f"Strength of {name}") for name in names[:MOST]]
        return shown + [gr.update(visible=False)] * (MOST - len(shown))

    def begin(self, *fields: Any) -> list[Any]:
        return self._begin((), *fields)

    def begin_sweep(self, *fields: Any) -> list[Any]:
        return self._begin(STRENGTHS, *fields)

    def _begin(
        self, sweep: tuple[float, ...], prompt: str, chosen: list[str], seed: float | None, count: float, compare: bool,
        negative: str, model: str, steps: float | None, guidance: float | None, *strengths: float,
    ) -> list[Any]:  # fmt: skip
        if sweep and not chosen:
            raise InputError("the grid tries the strengths of adapters; choose one or more")
        given = {"negative": negative or None, "steps": steps, "guidance": guidance}
        worn = list(zip(chosen, strengths, strict=False))
        number = int(seed) if seed is not None else None
        job = self.studio.draw(
            prompt.splitlines(), worn, number, int(count), compare and bool(chosen), sweep, model, given
        )
        self.studio.jobs.tick()
        used = self.studio.jobs.settings(job)["seeds"][0]
        return [job.id, used, *self.show(job.id, "")]

    def show(self, number: int | None, seen: str) -> list[Any]:
        """How the drawing is getting on, and then the pictures."""
        nothing = [gr.skip(), gr.skip(), gr.skip()]
        job = next((job for job in self.studio.jobs.store.all() if job.id == number), None)
        if job is None:
            return ["Nothing drawn yet.", *nothing, ""]
        mark = f"{job.id} {job.state}"
        if job.state == "failed":
            return [f"Failed: {plain(job.error)}", *nothing, mark]
        if job.state != "done":
            word = "Drawing, about to show …" if job.state in ACTIVE else f"{job.state.capitalize()} …"
            return [word, *nothing, mark]
        if mark == seen:
            return [gr.skip(), *nothing, mark]
        found, sheets = pictures(self.studio, job), sorted((self.studio.jobs.folder(job) / RUN).glob("sheet*.png"))
        shown = [(self.served(path), text) for path, text, _ in found]
        pair = before_and_after(found)
        slider = gr.update(value=tuple(map(self.served, pair)) if pair else None, visible=pair is not None)
        seeds = f"{len(found)} pictures, from seed {self.studio.jobs.settings(job)['seeds'][0]}"
        return [seeds, slider, shown, [self.served(path) for path in sheets], mark]


def pictures(studio: Studio, job: Job) -> list[tuple[Path, str, dict[str, Any]]]:
    """The pictures of a job in order, each with a line about it, and the settings that it carries."""
    folder = studio.jobs.folder(job) / RUN
    found = []
    for path in sorted(path for path in folder.glob("*.png") if not path.name.startswith("sheet")):
        with Image.open(path) as image:
            carried = json.loads(getattr(image, "text", {}).get("vismodal", "{}"))
        worn = " ".join(f"[{each['name']} {each['strength']:g}]" for each in carried.get("adapters", ()))
        line = f"{carried.get('prompt', '')} {worn} seed {carried.get('seed', '?')}"
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
