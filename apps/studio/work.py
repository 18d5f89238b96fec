"""What the studio does, without a page: the tabs and the endpoints call these, and these submit jobs.

A job's settings are those of the command line, in a file that `vismodal COMMAND --config` reads: the studio has no way
of its own to train or to draw. Nothing that people write becomes a path: pictures, adapters and models are named by
what the server gave them.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vismodal import cli
from vismodal.data.subject import PROMPT
from vismodal.errors import InputError
from vismodal.formats.bases import NAMES

from . import progress
from .allowed import allowed, bounded
from .intake import CALLED, Intake, Limits
from .jobs import RUN, SETTINGS, Jobs
from .shelf import MADE_ON, Adapter, Shelf
from .store import Job

ASKED = "sample-now"  # the file in a run's folder that asks for samples
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # of a grid
EXAMPLE = "example"  # the photos of the embedded subject
EMBEDDED, TINY_VIT = "tiny-sd", "tiny-vit"
DAY = 86_400
MOST = 256  # pictures of a drawing
PRESETS: dict[str, dict[str, Any]] = {
    "subject, fast": {"steps": 600, "keep": 6},
    "subject, careful": {"steps": 1000, "rank": 16, "prior": 1.0, "keep": 6},
    "style": {"steps": 1000, "rank": 16, "flip": True, "sites": ["+conv"], "keep": 6},
}


class Studio:
    """One studio: its jobs, what was uploaded, and what they made.

    Args:
        home: its folder.
        models: the base models that may be used, by name: a folder or an id; None is the embedded one.
        limits: the most that is taken.
        vision: the vision models, by name: a name of timm, a folder or an id.
        jobs: other ones than the usual, for tests.
    """

    def __init__(
        self,
        home: Path,
        models: Mapping[str, str | None] | None = None,
        limits: Limits | None = None,
        jobs: Jobs | None = None,
        vision: Mapping[str, str] | None = None,
    ) -> None:
        home = home.resolve()
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)
        self.home, self.models, self.limits = home, dict(models or {EMBEDDED: None}), limits or Limits()
        self.vision = dict(vision or {TINY_VIT: TINY_VIT})
        self.intake = Intake(home, self.limits)
        self.jobs = jobs or Jobs(home, most=self.limits.run)
        self.shelf = Shelf(self.jobs)
        self.tidy()

    def tidy(self) -> None:
        """Deletes uploads of yesterday that no job uses, and what was cut off."""
        shutil.rmtree(self.home / "drafts", ignore_errors=True)
        used = "".join((self.jobs.folder(job) / SETTINGS).read_text(encoding="utf-8") for job in self.jobs.store.all())
        for path in (*self.intake.sets.iterdir(), *self.intake.files.iterdir()):
            if path.name not in used and time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    # -- teach -------------------------------------------------------------------------------------------------------

    def teach(
        self,
        photos: str,
        prompt: str = PROMPT,
        subject: str = "sks",
        preset: str = "subject, fast",
        model: str = EMBEDDED,
        title: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> Job:
        """Teaches a subject or a style from a set of photos; `settings` are those of dreambooth, over the preset's."""
        if preset not in PRESETS:
            raise InputError(f"there is no preset {preset!r}; choose one of {'; '.join(PRESETS)}")
        given = {**PRESETS[preset], **allowed("dreambooth", settings or {})}
        given |= {"prompt": prompt, "subject": subject, "model": self._model(model)}
        if photos != EXAMPLE:
            given["photos"] = str(self.intake.folder(photos))
        return self._submit("dreambooth", title or f"{subject}: {prompt}", given)

    def extend(self, number: int, length: int) -> Job:
        """More steps in all for a training."""
        job = self.jobs.store.get(number)
        bounded("steps", int(length))
        self.jobs.extend(job, int(length))
        return self.jobs.store.get(number)

    def checkpoints(self, job: Job) -> list[Path]:
        """What a training of pictures that is done has kept on its way, the earliest first."""
        folder = self.jobs.folder(job) / RUN / "checkpoints"
        return sorted(folder.glob("step-*.safetensors")) if job.kind == "dreambooth" and job.state == "done" else []

    def sample(self, number: int) -> Job:
        """Asks a training for samples after the step that it makes."""
        job = self.jobs.store.get(number)
        folder = self.jobs.folder(job) / RUN
        if job.kind != "dreambooth" or job.state != "running" or not (folder / "metrics.jsonl").is_file():
            raise InputError(f"job {number} makes no steps now, which samples could follow; wait for it, or resume it")
        (folder / ASKED).touch()
        return job

    def grid(self, number: int) -> Job:
        """Draws what a training has kept on its way at several strengths, on a sheet for each of its prompts."""
        job = self.jobs.store.get(number)
        kept = self.checkpoints(job)
        if not kept:
            raise InputError(f"job {number} has no checkpoints to show; wait for its end")
        trained = progress.settings(self.jobs.folder(job))
        given = {"prompts": trained["sample_prompts"], "steps": trained["sample_steps"], "seeds": [trained["seed"]]}
        given |= {name: trained[name] for name in ("model", "resolution", "guidance")}
        given |= {"adapters": [f"{path.stem}={path}" for path in kept], "sweep": list(STRENGTHS)}
        return self._submit("generate", f"checkpoints of {job.title}", given)

    # -- create ------------------------------------------------------------------------------------------------------

    def draw(
        self,
        prompts: Sequence[str],
        adapters: Sequence[Sequence[Any]] = (),
        seed: int | None = None,
        count: int = 1,
        compare: bool = False,
        sweep: Sequence[float] = (),
        model: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> Job:
        """Draws each prompt by these adapters, (id, strength) each; with `compare` by none as well.

        A prompt with tags, as in "sks dog <lora:dog:0.8>", has its own adapters, by their names in the library.
        `sweep` are strengths to try instead, on sheets. Without a seed one is drawn.
        """
        prompts = [text.strip() for text in prompts if text.strip()]
        if not prompts:
            raise InputError('there is no prompt; write what to draw, such as "a photo of sks dog on the beach"')
        chosen = self._weighted(adapters)
        named = {name for text in prompts for name in re.findall(r"<lora:([^:<>]*)", text)}
        if sweep and (named or not chosen):
            raise InputError("a grid tries the strengths of the adapters that are chosen: one or more, and no tags")
        used = {**chosen, **{each: 1.0 for each in self.shelf.adapters() if each.name in named and each not in chosen}}
        base = self._base(model, [each.model for each in used])
        bare = [text for text in prompts if "<lora:" not in text]
        if named:  # then each prompt says by what it is drawn
            tags = "".join(f" <lora:{each.name}:{strength:g}>" for each, strength in chosen.items()) or " <lora:none>"
            prompts = [text + tags if text in bare else text for text in prompts]
        if compare and not sweep:
            prompts = [*prompts, *(f"{text} <lora:none>" for text in bare)]
        if len(prompts) * int(count) * max(1, len(sweep) * len(chosen)) > MOST:
            raise InputError(f"these are more than {MOST} pictures; draw fewer at a time")
        given = {
            **allowed("generate", settings or {}),
            "prompts": prompts,
            "adapters": [f"{each.name}={each.file}" for each in used],
            "seeds": [secrets.randbelow(2**32) if seed is None else int(seed)],
            "count": int(count),
            "model": base,
        }
        given |= {"sweep": list(sweep)} if sweep else {"strengths": list(used.values())}
        return self._submit("generate", prompts[0], given)

    # -- library -----------------------------------------------------------------------------------------------------

    def bring(self, file: Path, base: str, title: str = "") -> Job:
        """Imports an adapter of diffusers, kohya or LyCORIS; `base` is sd1, sd2, sdxl or a model of the studio's."""
        base = base if base in NAMES else self._model(base) or EMBEDDED
        given = {"files": [str(self.intake.adapter(file))], "to": "vismodal", "base": base}
        return self._submit("convert", title or file.stem, given)

    def export(self, key: str, to: str) -> Job:
        """Writes an adapter as a file of diffusers or kohya."""
        if to not in ("diffusers", "kohya"):
            raise InputError(f"there is no format {to!r}; choose diffusers or kohya")
        each = self.shelf.get(key)
        given = {"files": [str(each.file)], "to": to, "base": each.model or EMBEDDED}
        return self._submit("convert", f"{each.name} for {to}", given)

    def merge(self, adapters: Sequence[Sequence[Any]], title: str = "") -> Job:
        """The weighted sum of adapters, (id, weight) each, as one."""
        chosen = self._weighted(adapters)
        if len(chosen) < 2:
            raise InputError("choose two adapters or more to merge")
        if len({each.model for each in chosen}) > 1:
            raise InputError("these adapters were made on different models; merge those of one")
        made_on = next(iter(chosen)).model
        given = {"adapters": [str(each.file) for each in chosen], "weights": list(chosen.values())}
        if made_on not in NAMES:
            given["model"] = made_on or EMBEDDED
        title = title or " + ".join(each.name for each in chosen)
        return self._submit("merge", title, given, {MADE_ON: json.dumps(made_on)})

    # -- recognise ---------------------------------------------------------------------------------------------------

    def learn(
        self, pictures: str, title: str = "", settings: Mapping[str, Any] | None = None, model: str = TINY_VIT
    ) -> Job:
        """Adapts a vision model to a set of pictures by class; `settings` are those of classify."""
        if model not in self.vision:
            raise InputError(f"there is no vision model {model!r}; choose one of {', '.join(self.vision)}")
        given = {**allowed("classify", settings or {}), "model": self.vision[model]}
        if pictures != EXAMPLE:
            given["data"] = str(self.intake.folder(pictures))
        return self._submit("classify", title or "pictures by class", given)

    def classifier(self, number: int) -> Path:
        """The file that a job of `learn` made."""
        learnt = self.jobs.store.get(number)
        file = self.jobs.folder(learnt) / RUN / "adapter.safetensors"
        if learnt.kind != "classify" or not file.is_file():
            raise InputError(f"job {number} has learnt no classes yet; choose one that is done")
        return file

    def recognise(self, number: int, pictures: str, top: int = 3) -> Job:
        """Says what is in a set of pictures, by what a job of `learn` made."""
        file, learnt = self.classifier(number), self.jobs.store.get(number)
        images = [str(self.intake.folder(pictures))]
        given = {"adapter": str(file), "images": images, "top": int(top), "json": True}
        return self._submit("predict", f"what is it? by {learnt.title}", given)

    def answers(self, number: int) -> list[dict[str, Any]]:
        """What a job of `recognise` said: for each picture its name and the likeliest classes."""
        job = self.jobs.store.get(number)
        if job.kind != "predict" or job.state != "done":
            raise InputError(f"job {number} has no answers: it is {job.state}")
        given: list[dict[str, Any]] = json.loads((self.jobs.folder(job) / "said.txt").read_text(encoding="utf-8"))
        folder = Path(self.jobs.settings(job)["images"][0])
        called = json.loads((folder / CALLED).read_text()) if folder.is_dir() else {}
        return [{**one, "file": called.get(Path(one["file"]).name, Path(one["file"]).name)} for one in given]

    # -- small parts -------------------------------------------------------------------------------------------------

    def _weighted(self, adapters: Sequence[Sequence[Any]]) -> dict[Adapter, float]:
        """Adapters with a number each, from pairs of an id and a number. Raises `InputError` for anything else."""
        try:
            pairs = [(str(key), float(number)) for key, number in adapters]
        except (TypeError, ValueError):
            raise InputError(f"adapters are pairs of an id and a number, as in [[1, 0.8]], not {adapters!r}") from None
        return {self.shelf.get(key): number for key, number in pairs}

    def _model(self, name: str) -> str | None:
        if name not in self.models:
            raise InputError(f"there is no model {name!r}; choose one of {', '.join(self.models)}")
        return self.models[name]

    def _base(self, model: str, made_on: Sequence[str | None]) -> str | None:
        """The model to draw with: the chosen one, or that of the adapters. Raises `InputError` where they differ."""
        known = {each for each in made_on if each not in NAMES}
        if len(known) > 1:
            raise InputError(f"these adapters were made on different models: {', '.join(sorted(map(str, known)))}")
        if not model and made_on and not known:
            raise InputError(f"these adapters are for any model of {made_on[0]}; choose the base model")
        base = self._model(model) if model else next(iter(known), None)
        if known and base not in known:
            raise InputError(f"these adapters were made on another model than {model}; leave the choice to them")
        return base

    def _submit(
        self, kind: str, title: str, settings: Mapping[str, Any], beside: Mapping[str, str] | None = None
    ) -> Job:
        """A job, if the command would take its settings. Raises `InputError` as the command line does."""
        self.intake.check_space()
        draft = self.home / "drafts" / secrets.token_hex(8)
        draft.mkdir(mode=0o700, parents=True)
        try:
            self.jobs.write(draft, kind, settings)
            config = cli.parse(cli.load_pipeline(kind).Config, "studio", ["--config", str(draft / SETTINGS)])
            if kind == "dreambooth":
                from vismodal.diffusion.checks import checked

                checked(config)  # type: ignore[type-var]
        finally:
            shutil.rmtree(draft)
        return self.jobs.submit(kind, title, settings, beside)
