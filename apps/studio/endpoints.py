"""The endpoints for programs: named, typed, the same functions as behind the page.

from gradio_client import Client, handle_file
studio = Client("http://127.0.0.1:7860")
photos = studio.predict([handle_file("1.jpg"), handle_file("2.jpg")], api_name="/upload")
job = studio.predict(photos["id"], "a photo of sks dog", api_name="/teach")
studio.predict(job["id"], api_name="/job")         # state, phase, step, total, speed, left, log
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gradio as gr

from vismodal.data.subject import PROMPT
from vismodal.errors import InputError

from .create import pictures
from .jobs import RUN
from .page import HEAVY, Served, told
from .progress import losses, progress, samples, tail
from .shelf import Adapter
from .store import Job
from .work import EMBEDDED, TINY_VIT, Studio


class Endpoints:
    """Every public function is an endpoint of its own name."""

    def __init__(self, studio: Studio, served: Served) -> None:
        self.studio, self.served = studio, served

    # -- pictures ----------------------------------------------------------------------------------------------------

    def upload(self, files: list[dict], classes: bool = False) -> dict:
        """Takes pictures with captions, or zips; with `classes` a zip with a folder for each class."""
        paths = [self.served.uploaded(str(file.get("path"))) for file in files]
        return asdict(self.studio.intake.pictures(paths, classes))

    def captions(self, pictures: str) -> list:
        """Name, what it was called, and caption of each picture of a set."""
        return [list(row) for row in self.studio.intake.captions(pictures)]

    def caption(self, pictures: str, name: str, text: str) -> list:
        """Writes the caption of a picture; an empty one removes it. Gives all of them."""
        self.studio.intake.caption(pictures, name, text)
        return self.captions(pictures)

    # -- jobs --------------------------------------------------------------------------------------------------------

    def jobs(self) -> list:
        """All jobs, the oldest first."""
        return [asdict(job) for job in self.studio.jobs.store.all()]

    def job(self, number: int) -> dict:
        """A job, how far it is, and what it says."""
        return self._job(self.studio.jobs.store.get(number))

    def loss(self, number: int) -> list:
        """Step and loss of a training."""
        return [list(point) for point in losses(self._folder(number))]

    def samples(self, number: int) -> list:
        """Step and sheet of the samples of a training."""
        return [[step, self._file(self.served(path))] for step, path in samples(self._folder(number))]

    def sample(self, number: int) -> dict:
        """Asks a training for samples after the step that it makes; `samples` then has them."""
        return self._job(self.studio.sample(number))

    def grid(self, number: int) -> dict:
        """Draws the checkpoints of a training at several strengths, as a job; `sheets` has what it draws."""
        return self._job(self.studio.grid(number))

    def stop(self, number: int) -> dict:
        """Takes a job out of the queue, or lets it save and stop."""
        self.studio.jobs.stop(self.studio.jobs.store.get(number))
        return self.job(number)

    def force_stop(self, number: int) -> dict:
        """Kills a job; a training goes back to its last checkpoint."""
        self.studio.jobs.force_stop(self.studio.jobs.store.get(number))
        return self.job(number)

    def resume(self, number: int) -> dict:
        """Lets a job that stopped or failed go on."""
        self.studio.jobs.resume(self.studio.jobs.store.get(number))
        return self.job(number)

    def extend(self, number: int, steps: int) -> dict:
        """Lets a training go on to so many steps in all."""
        return self._job(self.studio.extend(number, steps))

    def delete(self, number: int) -> list:
        """Deletes a job and all that it made; gives the others."""
        self.studio.jobs.delete(self.studio.jobs.store.get(number))
        self.served.forget()
        return self.jobs()

    # -- what the tabs do --------------------------------------------------------------------------------------------

    def teach(
        self, photos: str, prompt: str = PROMPT, subject: str = "sks", preset: str = "subject, fast",
        model: str = EMBEDDED, title: str = "", settings: dict | None = None,
    ) -> dict:  # fmt: skip
        """Teaches a subject or a style; "example" are the photos that come with vismodal."""
        return self._job(self.studio.teach(photos, prompt, subject, preset, model, title, settings))

    def draw(
        self, prompts: list, adapters: list | None = None, seed: int | None = None, count: int = 1,
        compare: bool = False, sweep: list | None = None, model: str = "", settings: dict | None = None,
    ) -> dict:  # fmt: skip
        """Draws each prompt by adapters, [id, strength] each; `sweep` are strengths to try instead."""
        worn, tried = adapters or [], tuple(sweep or ())
        return self._job(self.studio.draw(prompts, worn, seed, count, compare, tried, model, settings))

    def pictures(self, number: int) -> list:
        """The pictures of a drawing, with the settings that they carry."""
        job = self._drawn(number)
        found = pictures(self.studio, job)
        return [{"file": self._file(self.served(path)), **carried} for path, _, carried in found]

    def sheets(self, number: int) -> list:
        """The sheets of a drawing: prompts by seeds, or adapters by strengths."""
        folder = self.studio.jobs.folder(self._drawn(number)) / RUN
        return [self._file(self.served(path)) for path in sorted(folder.glob("sheet*.png"))]

    def adapters(self) -> list:
        """The library."""
        return [self._adapter(each) for each in self.studio.shelf.adapters()]

    def download(self, adapter: str) -> dict:
        """The file of an adapter in vismodal's own format."""
        each = self.studio.shelf.get(adapter)
        return self._file(self.served(each.file, f"{each.name}.safetensors"))

    def export(self, adapter: str, to: str) -> dict:
        """Writes an adapter for diffusers or kohya, as a job; `exported` gives the file."""
        return self._job(self.studio.export(adapter, to))

    def exported(self, number: int) -> dict:
        """The file of an export that is done."""
        job = self.studio.jobs.store.get(number)
        if job.kind != "convert" or job.state != "done":
            raise InputError(f"job {number} has no file: it is {job.state}")
        return self._file(self.served(self._folder(number) / RUN / "adapter.safetensors"))

    def bring(self, file: dict, base: str, title: str = "") -> dict:
        """Imports a safetensors file of diffusers, kohya or LyCORIS for sd1, sd2, sdxl or a model, as a job."""
        return self._job(self.studio.bring(self.served.uploaded(str(file.get("path"))), base, title))

    def merge(self, adapters: list, title: str = "") -> dict:
        """The weighted sum of adapters, [id, weight] each, as a job."""
        return self._job(self.studio.merge(adapters, title))

    def learn(self, pictures: str, title: str = "", settings: dict | None = None, model: str = TINY_VIT) -> dict:
        """Adapts a vision model to a set of pictures by class; "example" are handwritten digits."""
        return self._job(self.studio.learn(pictures, title, settings, model))

    def report(self, number: int) -> list:
        """The report of a job of `learn` that is done, and its adapter."""
        file = self.studio.classifier(number)
        return [self._file(self.served(path)) for path in (file.with_name("report.html"), file)]

    def recognise(self, number: int, pictures: str, top: int = 3) -> dict:
        """Says what is in a set of pictures, as a job; `answers` gives what it said."""
        return self._job(self.studio.recognise(number, pictures, top))

    def answers(self, number: int) -> list:
        """For each picture its name and the likeliest classes."""
        return self.studio.answers(number)

    # -- small parts -------------------------------------------------------------------------------------------------

    def _drawn(self, number: int) -> Job:
        """A job whose pictures are all there."""
        job = self.studio.jobs.store.get(number)
        if job.kind != "generate" or job.state != "done":
            raise InputError(f"job {number} has no pictures: it is {job.state}")
        return job

    def _folder(self, number: int) -> Any:
        return self.studio.jobs.folder(self.studio.jobs.store.get(number))

    def _job(self, job: Job) -> dict:
        folder = self.studio.jobs.folder(job)
        return {**asdict(job), **asdict(progress(job.state, folder)), "log": tail(folder)}

    def _adapter(self, each: Adapter) -> dict:
        return {name: getattr(each, name) for name in ("id", "name", "title", "model", "words", "size", "card")}

    def _file(self, path: str) -> dict:
        return gr.FileData(path=path).model_dump()

    def tie(self) -> None:
        """Every public function under its own name, inside a page."""
        for name in sorted(vars(Endpoints)):
            if not name.startswith("_") and name != "tie":
                function: Callable[..., Any] = getattr(self, name)
                limit: dict[str, Any] = HEAVY if name == "upload" else {"concurrency_limit": None}
                gr.api(told(function), api_name=name, **limit)
