"""The tab Recognise: a vision model learns the classes of an uploaded folder, and says what is in other pictures."""

from __future__ import annotations

from typing import Any

import gradio as gr

from vismodal.errors import InputError

from .page import Served, on, plain
from .watch import Watch
from .work import EXAMPLE, Studio

METHODS = ("lora", "linearprobe", "adaptformer", "vpt(tokens=8)", "bitfit", "ssf")


class Recognise:
    """Builds the tab inside a page."""

    def __init__(self, studio: Studio, served: Served) -> None:
        self.studio, self.served = studio, served
        self.set, self.asked = gr.State(""), gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                gr.Markdown("### 1. Classes")
                self.files = gr.File(label="A zip with a folder for each class", file_types=[".zip"], height=140)
                self.example = gr.Button("Use the example: 1,797 handwritten digits", size="sm")
                self.told = gr.Markdown("", elem_classes="quiet")
                self.method = gr.Radio(METHODS, value="lora", label="Method")
                with gr.Row():
                    self.epochs = gr.Number(10, label="Epochs", precision=0, minimum=1, maximum=1000, min_width=120)
                    names = list(self.studio.vision)
                    self.model = gr.Dropdown(names, value=names[0], label="Model", min_width=120)
                    self.title = gr.Textbox("", label="Name", min_width=120)
                self.start = gr.Button("Learn", variant="primary")
                gr.Markdown("### 2. Try it")
                self.images = gr.File(label="Pictures", file_count="multiple", height=140)
                self.ask = gr.Button("What is it?")
                self.answer = gr.Markdown("")
            with gr.Column(min_width=320):
                gr.Markdown("### As it goes")
                self.watch = Watch(studio, served, ("classify",), extends=False, pictures=False)
                self.fetch = gr.Button("Download report and adapter", size="sm")
                self.made = gr.File(label="Report and adapter", interactive=False, visible=False)

    def tie(self, timer: gr.Timer, page: gr.Blocks, tab: gr.Tab) -> None:
        """To the page's events."""
        self.watch.tie(timer, page, tab)
        on(self.files.upload, self.take, [self.files], [self.set, self.told, self.files], heavy=True)
        on(self.example.click, self.use_example, [], [self.set, self.told])
        on(self.fetch.click, self.files_of, [self.watch.job], [self.made])
        fields = [self.set, self.title, self.method, self.epochs, self.model]
        on(self.start.click, self.begin, fields, self.watch.outputs())
        on(self.ask.click, self.question, [self.watch.job, self.images], [self.asked, self.answer], heavy=True)
        on([timer.tick, tab.select], self.follow, [self.asked], [self.asked, self.answer], quiet=True)

    def take(self, file: str | None) -> list[Any]:
        """Takes a zip, and says what is in it."""
        upload = self.studio.intake.pictures([self.served.uploaded(file)] if file else [], classes=True)
        classes = {new.partition("/")[0] for new in upload.pictures}
        lines = [f"{len(upload.pictures)} pictures of {len(classes)} classes taken."]
        lines += [f"- left out: {plain(text)}" for text in upload.rejected]
        return [upload.id, "\n\n".join(lines[:1]) + "\n\n" + "\n".join(lines[1:]), None]

    def use_example(self) -> list[Any]:
        return [EXAMPLE, "Handwritten digits of scikit-learn, 8 x 8 pixels, in ten classes."]

    def begin(self, pictures: str, title: str, method: str, epochs: float, model: str) -> list[Any]:
        if not pictures:
            raise InputError("there are no classes yet; upload a zip with a folder of pictures for each")
        job = self.studio.learn(pictures, title, {"method": method, "epochs": int(epochs or 0)}, model)
        self.studio.jobs.tick()
        return self.watch.show(job.id)

    def files_of(self, number: int | None) -> Any:
        """The report, which opens without a network, and the adapter."""
        if number is None:
            raise InputError("nothing has learnt any classes yet; let it learn first")
        file = self.studio.classifier(number)
        return gr.update(value=[self.served(file.with_name("report.html")), self.served(file)], visible=True)

    def question(self, number: int | None, files: list[str] | None) -> list[Any]:
        """Asks what is in pictures."""
        if number is None:
            raise InputError("nothing has learnt any classes yet; let it learn first")
        upload = self.studio.intake.pictures([self.served.uploaded(file) for file in files or []])
        return [self.studio.recognise(number, upload.id).id, "Looking …"]

    def follow(self, number: int | None) -> list[Any]:
        """The answer, once it is there."""
        if number is None:
            return [gr.skip(), gr.skip()]
        job = self.studio.jobs.store.find(number)
        if job is None:
            return [None, ""]
        if job.state in ("failed", "stopped"):
            return [None, f"No answer: {plain(job.error or job.state)}"]
        if job.state != "done":
            return [gr.skip(), gr.skip()]
        rows = ["| picture | likeliest | then |", "| --- | --- | --- |"]
        for each in self.studio.answers(number):
            first, *rest = [f"{plain(c['class'])} {100 * c['probability']:.1f}%" for c in each["classes"]]
            rows.append(f"| {plain(each['file'])} | **{first}** | {', '.join(rest)} |")
        return [None, "\n".join(rows)]
