"""Methods measured on the embedded Stable Diffusion, with the truth at hand: a style and a subject from emoji.

    vismodal bench emoji --data DATA
    vismodal bench emoji --data DATA --methods lora "lora(rank=2)" "tune(sites=('norm',), lr=1e-3)"
    vismodal bench emoji --data DATA --methods textualinversion "lora + textualinversion"
    vismodal bench emoji --config runs/bench-emoji-1/config.yaml --resume --methods lora tune   # lora is not run again

DATA holds `emoji/{noto,fluent}` and `weights/`. The model draws Noto's emoji; the same emoji by Fluent were kept from
its UNet, so what an adapter should draw is known. `vismodal/evaluation/` has the tasks (`emoji_tasks.py`) and scores,
each by its definition (`emoji_scores.py`), `vismodal/entries.py` the methods' settings. Everybody learns from the same
batches, noise and noise levels, for the same steps; what is scored was loaded from the saved file. With textual
inversion the tasks' word becomes a new one: alone, with crossattention (Custom Diffusion), with LoRA (pivotal tuning).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from PIL import Image

import vismodal as vm
from vismodal import runs
from vismodal.data.emoji import prompt_for
from vismodal.data.photos import Photo
from vismodal.diffusion.kinds import Pipe
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.words import teach
from vismodal.draw import seed_of
from vismodal.entries import Entry, entry
from vismodal.errors import InputError
from vismodal.evaluation import emoji_tasks
from vismodal.evaluation.contest import Lesson, adapt, learn, worded
from vismodal.evaluation.drawn import Drawn, draw, remembered
from vismodal.evaluation.emoji_scores import Truth, answers, asked_scores, plain_scores, through
from vismodal.evaluation.emoji_tasks import Emojis, Question, Task
from vismodal.evaluation.judge import dino
from vismodal.fingerprint import fingerprint
from vismodal.paths import asset
from vismodal.reports.emoji import Result, write_results
from vismodal.runs import known
from vismodal.train import Plan

Name = Literal["style", "subject"]


@dataclass(frozen=True)
class Config:
    """Measure methods on the embedded Stable Diffusion: a style and a subject, with the true pictures at hand.

    Args:
        data: folder that holds emoji/noto, emoji/fluent, and the judge's weights in weights/.
        methods: by name, or with options and a learning rate: lora "lora(rank=4, lr=2e-3)" tune. Several with + between
            learn together: "lora + textualinversion(vectors=(4,))".
        tasks: style, subject.
        model: folder of a model that draws Noto emoji as tiny-sd does. Without it, the embedded one.
        output: folder for the results. Without it, the next free runs/bench-emoji-N.
        resume: go on with the run in `output`; methods that were finished with the same settings are not run again.
        quick: a few steps and pictures, to see it work; its figures mean nothing.
        subject: name of the emoji that is the subject.
        word: that stands for the style and the subject; a rare one.
        emoji: how many emoji the style is learnt from.
        views: composites of each of them.
        steps: updates, the same for all.
        batch: pictures for each update; half of them are usual ones where there is a prior.
        prior: weight of the loss on usual pictures (Noto emoji without the word) beside the subject's; 0 is off.
        warmup: updates over which the learning rate rises from zero; it then falls as a cosine.
        held_out: how many emoji the style is asked of; none is learnt from.
        subject_pictures: how often the subject is asked for on each of three grounds.
        plain: prompts without the word, for the drift.
        truths: places in which the judge sees each true picture.
        sample_steps: denoising steps.
        guidance: classifier-free guidance.
        seed: of everything random.
        threads: of the CPU; the model is too small to be shared out.
    """

    data: Path | None = None
    methods: tuple[str, ...] = ("lora", "tune")
    tasks: tuple[Name, ...] = ("style", "subject")
    model: str | None = None
    output: Path | None = None
    resume: bool = False
    quick: bool = False
    subject: str = "penguin"
    word: str = "sks"
    emoji: int | None = None
    views: int | None = None
    steps: int | None = None
    batch: int = 8
    prior: float = 1.0
    warmup: int = 20
    held_out: int | None = None
    subject_pictures: int | None = None
    plain: int | None = None
    truths: int | None = None
    sample_steps: int | None = None
    guidance: float = 4.0
    seed: int = 0
    threads: int = 1


# In earnest, and --quick.
BY_SIZE = {
    "emoji": (64, 2),
    "views": (4, 1),
    "steps": (400, 2),
    "held_out": (64, 4),
    "subject_pictures": (8, 1),
    "plain": (32, 2),
    "truths": (3, 1),
    "sample_steps": (20, 2),
}
# What may differ where a finished method's result is taken over.
PLACES = {"data", "model", "output", "resume"}
FREE = PLACES | {"methods", "tasks", "quick", "threads", "truths"}


@dataclass(frozen=True)
class Bench:
    """What all contestants share."""

    config: Config
    pipe: Pipe
    accelerator: Accelerator
    emojis: Emojis
    plain: Sequence[Question]
    folder: Path

    def draw(self, questions: Sequence[Question], key: str) -> list[Image.Image]:
        """A picture for each question, by seeds that depend on `key` and its number alone."""
        c, prompts = self.config, [q.prompt for q in questions]
        seeds = [seed_of(c.seed, key, i) for i in range(len(prompts))]
        return draw(self.pipe, prompts, seeds, what=key, steps=known(c.sample_steps), guidance=c.guidance)

    def draw_all(self, task: Task, other: str = "") -> dict[str, list[Image.Image]]:
        """Pictures with the word and without it, of the pipeline as it is."""
        asked, plain = f"{other}{task.name}", f"{other}without the word"
        return {"asked": self.draw(task.questions, asked), "plain": self.draw(self.plain, plain)}


def main(config: Config) -> Path:
    """Measures and gives the folder of the results. Raises `InputError` for input that cannot be used."""
    config = checked(config)
    with runs.cpu_threads(config.threads):
        return run(config)


def checked(config: Config) -> Config:
    """The settings filled in. Raises `InputError` for what makes no sense."""
    if config.data is None:
        raise InputError("the data folder is missing; write --data FOLDER with emoji/noto, emoji/fluent and weights/")
    unset = {name: values[config.quick] for name, values in BY_SIZE.items() if getattr(config, name) is None}
    config = replace(config, **unset)  # type: ignore[arg-type]
    runs.at_least(config, 1, *BY_SIZE, "batch", "threads")
    runs.at_least(config, 0, "prior", "warmup")
    if config.prior and config.batch % 2:
        raise InputError(f"batch must be even, half of it is for the prior, not {config.batch}; or write --prior 0")
    if known(config.plain) > known(config.held_out):
        raise InputError(f"plain must be at most held_out, {config.held_out}, not {config.plain}")
    if not re.fullmatch(r"\w+", config.word):
        raise InputError(f"word must be one word, such as sks, not {config.word!r}")
    return config


def run(config: Config) -> Path:
    """`main` for settings that are filled in."""
    data, entries = known(config.data), [entry(text) for text in config.methods]
    if len({e.slug for e in entries}) < len(entries):
        raise InputError(f"two of the methods are the same: {', '.join(config.methods)}")
    emojis = emoji_tasks.read(data, config.subject, known(config.held_out), config.seed)
    judge = dino(data)
    accelerator = runs.start_accelerator("no", None)
    pipe = load_pipeline(config.model or asset("tiny-sd"), device=accelerator.device)
    tasks = tasks_of(config, emojis)
    for task in tasks:
        for each in entries:  # what does not fit is told before anything is written
            adapt(pipe, worded(pipe, each, config.word, task.begin), config.seed).detach()
    folder = runs.claim(config.output, "bench-emoji", config.resume, accelerator)
    config = replace(config, output=folder)
    runs.save_config(config, folder)
    bench = Bench(config, pipe, accelerator, emojis, emoji_tasks.plain(emojis, known(config.plain)), folder)
    truth = Truth(judge, emojis, known(config.truths), config.seed)
    try:
        results = {task.name: measure(bench, truth, task, entries) for task in tasks}
    except KeyboardInterrupt:
        print(f"stopped; go on with: {runs.resume_command('bench emoji', folder)}", file=sys.stderr)
        raise
    write_results(folder, judge.name, results, {n: v for n, v in asdict(config).items() if n not in PLACES})
    if config.quick:
        print("this was --quick: the figures mean nothing")
    return folder


def tasks_of(config: Config, emojis: Emojis) -> list[Task]:
    """The tasks that were asked for."""
    c, size = config, (known(config.emoji), known(config.views), config.seed)
    makers: dict[Name, Callable[[], Task]] = {
        "style": lambda: emoji_tasks.style(emojis, c.word, *size),
        "subject": lambda: emoji_tasks.subject(emojis, c.word, known(c.subject_pictures), *size),
    }
    return [makers[name]() for name in dict.fromkeys(c.tasks)]


# -- one task --------------------------------------------------------------------------------------------------------


def measure(bench: Bench, truth: Truth, task: Task, entries: Sequence[Entry]) -> Result:
    """The figures of every row, and rows of pictures for the sheet."""
    true = {style: answers(task, getattr(bench.emojis, style), bench.config.seed) for style in ("fluent", "noto")}
    bounds = {
        "true Fluent, elsewhere": true["fluent"],
        "through the autoencoder": through(bench.pipe, true["fluent"]),
        "true Noto, elsewhere": true["noto"],
    }
    scores = {label: asked_scores(truth, task.questions, pictures) for label, pictures in bounds.items()}
    key, emoji = task.name, bench.emojis.noto
    bare = [replace(q, prompt=prompt_for(emoji[q.emoji], q.ground)) for q in task.questions]
    drawn = {
        "base, without the word": kept(bench, task, "base-bare", lambda: Drawn({"asked": bench.draw(bare, key)}, {})),
        "base": kept(bench, task, "base", lambda: Drawn(bench.draw_all(task), {})),
        "base, other seeds": kept(bench, task, "other-seeds", lambda: Drawn(bench.draw_all(task, "other "), {})),
    }
    for e in [worded(bench.pipe, each, bench.config.word, task.begin) for each in entries]:
        drawn[e.label] = kept(bench, task, e.slug, partial(contest, bench, task, e), **e.identity)
    base = drawn["base"].pictures["plain"]
    for label, d in drawn.items():
        scores[label] = {**asked_scores(truth, task.questions, d.pictures["asked"]), **d.facts}
        if "plain" in d.pictures:
            scores[label] |= plain_scores(truth, bench.plain, d.pictures["plain"], base)
    del drawn["base, other seeds"], drawn["base, without the word"]  # figures are enough
    rows = [("true Fluent", true["fluent"]), *((label, d.pictures["asked"]) for label, d in drawn.items())]
    rows += [(f"without the word, {label}", d.pictures["plain"]) for label, d in drawn.items()]
    c = bench.config
    prior = f", half of them usual ones at weight {c.prior:g}" if c.prior and task.usual else ""
    learnt = f"{len(task.learnt.images)} pictures, {c.steps} steps of {c.batch}{prior}; {len(emoji)} candidates"
    asked = f'{len(task.questions)} questions such as "{task.questions[0].prompt}", {len(bench.plain)} without the word'
    return Result(f"{learnt}; {asked}.", scores, rows)


def kept(bench: Bench, task: Task, name: str, make: Callable[[], Drawn], **identity: Any) -> Drawn:
    """What `make` draws, or what it drew when the run that goes on here had the same settings, model and emoji."""
    models = {part: fingerprint(getattr(bench.pipe, part)) for part in ("unet", "vae", "text_encoder")}
    bases = {part: f"{base.shapes} {base.values}" for part, base in models.items()}
    photos = [Photo(Path(), *pair) for pair in zip(task.learnt.images, task.learnt.captions, strict=True)]
    settled = runs.identity(bench.config, FREE, **bases, **identity, learnt=runs.digest(photos))
    return remembered(bench.folder / task.name, name, settled, make)


# -- one method ------------------------------------------------------------------------------------------------------


def contest(bench: Bench, task: Task, each: Entry) -> Drawn:
    """Adapts, saves, loads again what was saved, and draws."""
    c, pipe = bench.config, bench.pipe
    file = bench.folder / task.name / f"{each.slug}.safetensors"
    plan = Plan(known(c.steps), seed=c.seed, schedule="cosine", warmup=c.warmup)
    adapter = adapt(pipe, each, c.seed)
    try:
        minutes = learn(pipe, each, adapter, Lesson(task, plan, c.batch, c.prior), bench.accelerator) / 60
        vm.save(adapter, file)
        lr = each.members[0].lr
        facts = {"parameters": adapter.num_parameters, "bytes": file.stat().st_size, "minutes": minutes, "lr": lr}
    finally:
        adapter.detach()
    loaded = vm.load(each.models(pipe), file, "bench")
    try:
        teach(pipe, loaded)
        return Drawn(bench.draw_all(task), facts)
    finally:
        loaded.detach()


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["bench", "emoji", *sys.argv[1:]]))
