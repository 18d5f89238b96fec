"""The tab Teach: photos with captions, a preset, and the training as it goes."""

from __future__ import annotations

from typing import Any

import gradio as gr
import yaml

from vismodal.data.photos import read_picture
from vismodal.data.subject import PROMPT
from vismodal.errors import InputError

from .page import Served, number_in, on, optional, plain
from .watch import Watch
from .work import EXAMPLE, PRESETS, Studio

NUMBERS = {  # under Advanced
    "rank": "Rank of LoRA",
    "learning_rate": "Learning rate",
    "resolution": "Resolution, pixels",
    "prior": "Weight of the prior",
    "class_images": "Class images, for the prior",
    "batch": "Photos a step",
    "min_snr": "Min-SNR gamma",
    "offset_noise": "Offset noise",
    "sample_every": "Samples every … steps",
    "seed": "Seed",
}


class Teach:
    """Builds the tab inside a page."""

    def __init__(self, studio: Studio, served: Served) -> None:
        self.studio, self.served = studio, served
        self.set = gr.State("")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self._photos()
                self._fields()
            with gr.Column(min_width=320):
                gr.Markdown("### As it goes")
                self.watch = Watch(studio, served, ("dreambooth",), extends=True, pictures=True)

    def _photos(self) -> None:
        gr.Markdown("### 1. Photos")
        self.files = gr.File(
            label="Photos, or a zip; captions in .txt or metadata.jsonl",
            file_count="multiple",
            file_types=[".jpg", ".jpeg", ".png", ".webp", ".zip", ".txt", ".jsonl"],
            height=140,
        )
        self.example = gr.Button("Use the example: six drawings of a robot", size="sm")
        self.told = gr.Markdown("", elem_classes="quiet")
        self.preview = gr.Gallery(
            label="As the model sees them: the square in the middle", columns=4, height="auto", format="png",
            interactive=False, visible=False,
        )  # fmt: skip
        self.captions = gr.Dataframe(
            headers=["picture", "file", "caption"], type="array", interactive=True, static_columns=[0, 1],
            label="Captions", visible=False, wrap=True, column_count=3,
        )  # fmt: skip
        self.save = gr.Button("Save captions", size="sm", visible=False)

    def _fields(self) -> None:
        gr.Markdown("### 2. What to learn")
        first = next(iter(PRESETS))
        self.preset = gr.Radio(list(PRESETS), value=first, label="Preset")
        self.prompt = gr.Textbox(PROMPT, label="What the photos show, with a rare word for the subject")
        with gr.Row():
            self.word = gr.Textbox("sks", label="That word", min_width=120)
            self.steps = gr.Number(PRESETS[first]["steps"], label="Steps", precision=0, minimum=1, min_width=120)
        with gr.Row():
            names = list(self.studio.models)
            self.model = gr.Dropdown(names, value=names[0], label="Base model", min_width=120)
            self.title = gr.Textbox("", label="Name", placeholder="of the adapter", min_width=120)
        with gr.Accordion("Advanced", open=False):
            self.numbers = []
            labels = list(NUMBERS.values())
            for i in range(0, len(labels), 2):
                with gr.Row():
                    self.numbers += [optional(label, "the preset's, or as usual") for label in labels[i : i + 2]]
            self.encoder = gr.Checkbox(False, label="Adapt the text encoders too")
            self.flip = gr.Checkbox(False, label="Mirror photos half of the times")
            self.rest = gr.Textbox(
                "", lines=2, label="Other settings of vismodal dreambooth, one a line", placeholder="sites: [+ff]"
            )
        self.start = gr.Button("Start", variant="primary")

    def tie(self, timer: gr.Timer, page: gr.Blocks, tab: gr.Tab) -> None:
        """To the page's events."""
        shown = [self.set, self.told, self.preview, self.captions, self.save]
        on(self.files.upload, self.take, [self.files], [*shown, self.files], heavy=True)
        on(self.example.click, self.use_example, [], shown)
        on(self.save.click, self.write_captions, [self.set, self.captions], [self.told])
        on(self.preset.change, lambda name: PRESETS[name]["steps"], [self.preset], [self.steps], quiet=True)
        fields = [self.set, self.captions, self.preset, self.prompt, self.word, self.steps, self.model, self.title]
        fields += [self.encoder, self.flip, self.rest, *self.numbers]
        self.watch.tie(timer, page, tab)
        on(self.start.click, self.begin, fields, self.watch.outputs())

    def take(self, files: list[str] | None) -> list[Any]:
        """Takes an upload, and shows what was taken and what was not."""
        upload = self.studio.intake.pictures([self.served.uploaded(file) for file in files or []])
        folder = self.studio.intake.folder(upload.id)
        squares = [(square(read_picture(folder / new)), old) for new, old in upload.pictures.items()]
        lines = [f"{len(upload.pictures)} pictures taken."]
        if left := [f"- {plain(text)}" for text in upload.rejected]:
            lines += ["", f"**{len(left)} left out:**", "", *left]
        rows = [list(row) for row in self.studio.intake.captions(upload.id)]
        table, button = gr.update(value=rows, visible=True), gr.update(visible=True)
        return [upload.id, "\n".join(lines), gr.update(value=squares, visible=True), table, button, None]

    def use_example(self) -> list[Any]:
        hidden = gr.update(visible=False)
        return [EXAMPLE, "The six drawings of a robot that come with vismodal.", hidden, hidden, hidden]

    def write_captions(self, name: str, rows: list[list[str]]) -> str:
        for picture, _, text in rows:
            self.studio.intake.caption(name, str(picture), str(text or ""))
        return "The captions are saved."

    def begin(
        self, photos: str, captions: list[list[str]], preset: str, prompt: str, word: str, steps: int, model: str,
        title: str, encoder: bool, flip: bool, rest: str, *numbers: str,
    ) -> list[Any]:  # fmt: skip
        """Starts the training, and follows it."""
        if not photos:
            raise InputError("there are no photos yet; upload some, or use the example")
        if photos != EXAMPLE:
            self.write_captions(photos, captions)
        given: dict[str, Any] = {"steps": steps, "train_text_encoder": encoder or None, "flip": flip or None}
        given |= read_rest(rest)
        written = ((name, number_in(NUMBERS[name], text)) for name, text in zip(NUMBERS, numbers, strict=True))
        given |= {name: value for name, value in written if value is not None}
        job = self.studio.teach(photos, prompt, word, preset, model, title, given)
        self.studio.jobs.tick()
        return self.watch.show(job.id)


def read_rest(text: str) -> dict[str, Any]:
    """Settings as `name: value`, one a line. Raises `InputError` for anything else."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):  # a few of them fill the memory
            raise InputError("the other settings have an alias (*); write each value out")
        given = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"the other settings cannot be read: {error}; write name: value, one a line") from error
    if not isinstance(given, dict):
        raise InputError(f"the other settings are {text!r}; write name: value, one a line, as in rank: 16")
    return {str(name): value for name, value in given.items()}


def square(image: Any, side: int = 160) -> Any:
    """The square in the middle, small."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize((side, side), box=(left, top, left + short, top + short))
