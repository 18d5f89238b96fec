"""The tab Library: adapters with their cards, to other tools and from them, merged, deleted."""

from __future__ import annotations

from typing import Any

import gradio as gr

from vismodal.errors import InputError
from vismodal.formats.bases import NAMES

from .chosen import Chosen
from .jobs import RUN
from .page import Served, on, plain
from .work import Studio


class Library:
    """Builds the tab inside a page."""

    def __init__(self, studio: Studio, served: Served) -> None:
        self.studio, self.served = studio, served
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self.adapter = gr.Dropdown([], label="Adapter", allow_custom_value=True)
                self.facts = gr.Markdown("No adapter yet: teach one, or import one.")
                self.preview = gr.Image(label="Before and after", format="png", interactive=False, buttons=["download"])
                with gr.Accordion("Card", open=False):
                    self.card = gr.Markdown("")
            with gr.Column(min_width=320):
                self._out()
                self._merging()
                self._importing()
                self._deleting()
        self.export = gr.State(None)

    def _out(self) -> None:
        gr.Markdown("### Download")
        with gr.Row():
            self.diffusers = gr.Button("For diffusers", size="sm")
            self.kohya = gr.Button("For web UIs and ComfyUI (kohya)", size="sm")
        self.status = gr.Markdown("", elem_classes="quiet")
        self.file = gr.File(label="File", interactive=False, visible=False)

    def _merging(self) -> None:
        gr.Markdown("### Merge")
        self.several = Chosen(self.studio, "Weight", -1, 2, 0.5)
        with gr.Row():
            self.merged = gr.Textbox("", label="Name", placeholder="of the new one", min_width=160)
            self.merge = gr.Button("Merge", size="sm", min_width=120, elem_classes="low")

    def _importing(self) -> None:
        gr.Markdown("### Import")
        self.upload = gr.File(label="A safetensors file of diffusers, kohya or LyCORIS", file_types=[".safetensors"])
        bases = [*self.studio.models, *NAMES]
        with gr.Row():
            self.base = gr.Dropdown(bases, value=bases[0], label="The model that it is for", min_width=160)
            self.bring = gr.Button("Import", size="sm", min_width=120, elem_classes="low")

    def _deleting(self) -> None:
        gr.Markdown("### Delete")
        with gr.Row():
            self.sure = gr.Checkbox(False, label="Yes, with its training and samples", min_width=160)
            self.delete = gr.Button("Delete this adapter", size="sm", variant="stop", min_width=120, elem_classes="low")

    def tie(self, timer: gr.Timer, page: gr.Blocks, tab: gr.Tab) -> None:
        """To the page's events."""
        shown = [self.facts, self.preview, self.card]
        on([page.load, tab.select, self.adapter.focus], self.refresh, [self.adapter], [self.adapter], quiet=True)
        on(self.adapter.change, self.show, [self.adapter], shown, quiet=True)
        self.several.tie()
        out = [self.export, self.status, self.file]
        on(self.diffusers.click, lambda key: self.begin_export(key, "diffusers"), [self.adapter], out)
        on(self.kohya.click, lambda key: self.begin_export(key, "kohya"), [self.adapter], out)
        on([timer.tick, tab.select], self.follow, [self.export], out, quiet=True)
        on(self.merge.click, self.begin_merge, [self.merged, *self.several.inputs()], [self.status])
        on(self.bring.click, self.begin_import, [self.upload, self.base], [self.status, self.upload])
        on(self.delete.click, self.remove, [self.adapter, self.sure], [self.sure, self.status, self.adapter])

    def refresh(self, key: str | None) -> Any:
        """The adapters that there are now."""
        names = [(each.name, str(each.id)) for each in self.studio.shelf.adapters()]
        keys = [value for _, value in names]
        return gr.update(choices=names, value=key if key in keys else (keys[-1] if keys else None))

    def show(self, key: str | None) -> list[Any]:
        if not key:
            return ["No adapter yet: teach one, or import one.", None, ""]
        each = self.studio.shelf.get(key)
        facts = [
            f"**{plain(each.name)}**",
            f"- in prompts: `<lora:{each.name}:0.8>`",
            f"- trigger words: {plain(each.words) or 'not known'}",
            f"- base model: {plain(each.model or 'the embedded one')}",
            f"- size: {each.size / 1e6:.2f} MB",
        ]
        preview = self.served(each.preview) if each.preview else None
        return ["\n".join(facts), preview, each.card]

    def begin_export(self, key: str | None, to: str) -> list[Any]:
        """The file at once where the training has written it, or else a job that makes it."""
        if not key:
            raise InputError("there is no adapter yet; teach one, or import one")
        each = self.studio.shelf.get(key)
        if to == "diffusers" and each.diffusers:
            return [None, "", self._ready(self.served(each.diffusers, f"{each.name}-diffusers.safetensors"))]
        job = self.studio.export(key, to)
        return [job.id, f"Writing the file for {to} …", gr.update(visible=False)]

    def follow(self, number: int | None) -> list[Any]:
        """The file of an export, once it is there."""
        if number is None:
            return [gr.skip(), gr.skip(), gr.skip()]
        job = self.studio.jobs.store.find(number)
        if job is None:
            return [None, "", gr.skip()]
        if job.state == "done":
            name = f"{job.title.replace(' for ', '-')}.safetensors"
            path = self.served(self.studio.jobs.folder(job) / RUN / "adapter.safetensors", name)
            return [None, "", self._ready(path)]
        if job.state in ("failed", "stopped"):
            return [None, f"No file: {plain(job.error or job.state)}", gr.skip()]
        return [gr.skip(), gr.skip(), gr.skip()]

    def _ready(self, path: str) -> Any:
        return gr.update(value=path, visible=True)

    def begin_merge(self, title: str, chosen: list[str], *weights: float) -> str:
        job = self.studio.merge(list(zip(chosen, weights, strict=False)), title)
        return f"Merging, as job {job.id}; it will be among the adapters."

    def begin_import(self, file: str | None, base: str) -> list[Any]:
        if file is None:
            raise InputError("there is no file yet; upload one")
        job = self.studio.bring(self.served.uploaded(file), base)
        return [f"Importing, as job {job.id}; it will be among the adapters, or say there what is wrong.", None]

    def remove(self, key: str | None, sure: bool) -> list[Any]:
        """Deletes an adapter, if that is confirmed."""
        if not key:
            raise InputError("there is no adapter to delete")
        if not sure:
            raise InputError("deleting cannot be undone; tick the box beside the button first")
        each = self.studio.shelf.get(key)
        self.studio.jobs.delete(self.studio.jobs.store.get(each.id))
        self.served.forget()
        return [False, f"{plain(each.name)} is deleted.", self.refresh(None)]
