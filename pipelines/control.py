"""Steer a diffusion model by edges (T2I-Adapter, arXiv 2302.08453) or by a picture (IP-Adapter, arXiv 2308.06721).

    vismodal control                                       # edges, on the six embedded drawings
    vismodal control --control picture --photos my_photos --model OWNER/STABLE-DIFFUSION
    vismodal control --data DATA --steps 800               # emoji: DATA holds emoji/noto
    vismodal generate "a drawing of a cat" --adapters runs/control-1 --conditions my_sketch.png

The same from Python: `main(Config(control="edges", photos=Path("my_photos")))`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import vismodal as vm
from vismodal import runs
from vismodal.callbacks import Every, watchers
from vismodal.data.emoji import load_emoji
from vismodal.data.photos import Photo
from vismodal.data.subject import subject_folder
from vismodal.diffusion.control import Control, Loss, Steered, control_of, draw, steering
from vismodal.diffusion.denoise import Prompts, Weights, denoising
from vismodal.diffusion.encode import warn_of_long
from vismodal.diffusion.generate import Samples
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.presets import checkpoint_gradients
from vismodal.diffusion.requests import Manner
from vismodal.draw import seed_of
from vismodal.errors import InputError
from vismodal.evaluation.emoji_tasks import composites
from vismodal.paths import asset
from vismodal.reports import control as card
from vismodal.reports import run as report
from vismodal.resume import Checkpoints
from vismodal.runs import known
from vismodal.train import Plan, Schedule, fit


@dataclass(frozen=True)
class Config:
    """Train an adapter by which edges, or a picture, steer a Stable Diffusion beside the prompt.

    Args:
        control: edges of a picture (T2I-Adapter), or a picture (IP-Adapter).
        photos: folder with pictures, captions in NAME.txt or metadata.jsonl. Without it, the six embedded drawings.
        data: folder that holds emoji/noto, to learn from composites of emoji instead.
        emoji: how many emoji of `data` are learnt from, in four places each.
        prompt: of pictures without a caption, and of all samples; without it, samples have their own captions.
        captions: use the pictures' captions where they have one.
        held_out: how many of the pictures are not learnt from; the samples are steered by them.
        encoder: of the pictures: ARCH/TAG of open_clip, a folder, or a Hub id; without it, tiny-clip.
        drop: how often a text is left out, and as often the picture, and as often both; edges always stay.
        model: folder in diffusers' layout, or Hub id. Without it, the embedded small Stable Diffusion.
        output: folder for the results. Without it, the next free runs/control-N.
        resume: go on with the run in `output`; to the bit what it would have become without the stop, on a GPU as far
            as its kernels repeat themselves.
        resolution: side in pixels of the training squares and the samples. Without it, what the model was made for.
        steps: updates in all. More with --resume extends a finished run.
        batch: pictures for each forward pass; 1, or 8 with the embedded model.
        accumulate: forward passes for each update.
        learning_rate: of AdamW, after warming up; 1e-4, or 1e-3 with the embedded model.
        schedule: course of the learning rate; constant, or cosine with the embedded model.
        warmup: updates over which it rises from zero.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; 0 is off.
        seed: of everything random.
        mixed_precision: precision of the frozen model and of the computation; fp16 needs a GPU.
        gradient_checkpointing: less memory for more time.
        sample_every: draw samples before, after, and every so many steps; 0 before and after only. A file `sample-now`
            in the output folder asks for more at once.
        sample_count: samples for each picture that is held out, with seeds that stay the same.
        sample_steps: denoising steps of samples; 25, or 20 with the embedded model.
        guidance: classifier-free guidance of samples; as usual with the kind of model, or 4 with the embedded one.
        save_every: save a checkpoint every so many steps; a stop and the end save one anyway.
        keep: how many checkpoints stay.
        threads: of the CPU; torch's own choice, or 1 with the embedded model.
        track: one of accelerate's trackers, such as tensorboard or wandb.
    """

    control: Literal["edges", "picture"] = "edges"
    photos: Path | None = None
    data: Path | None = None
    emoji: int = 200
    prompt: str | None = None
    captions: bool = True
    held_out: int = 2
    encoder: str | None = None
    drop: float = 0.05
    model: str | None = None
    output: Path | None = None
    resume: bool = False
    resolution: int | None = None
    steps: int = 500
    batch: int | None = None
    accumulate: int = 1
    learning_rate: float | None = None
    schedule: Schedule | None = None
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    sample_every: int = 0
    sample_count: int = 2
    sample_steps: int | None = None
    guidance: float | None = None
    save_every: int = 100
    keep: int = 2
    threads: int | None = None
    track: str | None = None


# The usual value, and the one that suits the embedded model.
BY_MODEL = {
    "batch": (1, 8),
    "learning_rate": (1e-4, 1e-3),
    "schedule": ("constant", "cosine"),
    "sample_steps": (25, 20),
    "guidance": (None, 4.0),  # None: by the kind of model
}
# What may change between a stop and its resume, or is compared by content.
FREE = {
    "photos", "data", "model", "output", "resume", "steps", "gradient_checkpointing", "sample_every", "save_every",
    "keep", "threads", "track",
}  # fmt: skip
VIEWS = 4  # composites of each emoji
COLUMNS = 8  # of the sheet


@dataclass(frozen=True)
class Result:
    """Where the results lie, how many steps the adapter has seen, and how well samples follow before and after."""

    output: Path
    step: int
    agreement: tuple[float, float] | None = None  # the main process has it, at the end of a run


def main(config: Config) -> Result:
    """Trains, draws by what is held out, and writes the results into a folder. Raises `InputError` for bad input."""
    config = checked(config)
    with runs.cpu_threads(known(config.threads)):
        return run(config)


def run(config: Config) -> Result:
    """`main` for settings that are filled in."""
    plan = Plan(config.steps, config.accumulate, config.seed, known(config.schedule), config.warmup, config.clip)
    accelerator = runs.start_accelerator(config.mixed_precision, config.track)
    pipe = load_pipeline(config.model or asset("tiny-sd"), config.mixed_precision, accelerator.device)
    manner = Manner.fitting(pipe, config.resolution, known(config.sample_steps), config.guidance)
    config = replace(config, resolution=manner.size, guidance=manner.guidance)
    learnt, asked = pictures_of(config)
    warn_of_long(pipe, [known(p.caption) for p in (*learnt, *asked)])
    header = {"control": config.control, **({"encoder": config.encoder} if config.encoder else {})}
    control = known(control_of(header, pipe, manner.size))
    denoiser = kind_of(pipe).model(pipe)
    adapter = vm.adapt(denoiser, control.method(), name="control", seed=seed_of(config.seed, "adapter"))
    denoiser.train()
    if config.gradient_checkpointing:
        checkpoint_gradients({"denoiser": denoiser})
    config = replace(config, output=runs.claim(config.output, "control", config.resume, accelerator))
    output = known(config.output)  # until here nothing was written: bad input leaves no trace

    sample = samples(config, pipe, adapter, control, asked)
    content = {"learnt": runs.digest(learnt), "asked": runs.digest(asked), **runs.bases(adapter)}
    same = runs.identity(config, FREE, **content)
    checkpoints = Checkpoints(output / "checkpoints", same, config.save_every, config.keep)
    checkpoints.check(plan.steps)
    with accelerator.main_process_first(), adapter.disabled():
        if accelerator.is_main_process:
            runs.save_config(config, output)
            sample(0)
    accelerator.print(f"training {adapter.num_parameters:,} parameters on {len(learnt)} pictures, into {output}")
    drawing = Every(config.sample_every, sample, output / "sample-now")
    outcome = fit(
        loss_of(config, pipe, adapter, control, learnt),
        adapter,
        torch.optim.AdamW(adapter.groups(known(config.learning_rate), config.weight_decay)),
        plan=plan,
        accelerator=accelerator,
        checkpoints=checkpoints,
        log=output / "metrics.jsonl",
        callbacks=watchers(accelerator, config.track, "control", same, drawing),
    )
    if outcome.stopped:
        accelerator.print(f"stopped after step {outcome.step}; go on with: {runs.resume_command('control', output)}")
    if outcome.stopped or not accelerator.is_main_process:
        return Result(output, outcome.step)
    return Result(output, outcome.step, write_results(config, control, sample, adapter, asked))


def checked(config: Config) -> Config:
    """The settings filled in. Raises `InputError` for what makes no sense."""
    if config.photos is not None and config.data is not None:
        raise InputError("photos and data are given; leave out one of them")
    if config.encoder and config.control != "picture":
        raise InputError("an encoder is for --control picture; edges need none")
    embedded = config.model is None
    unset = {name: values[embedded] for name, values in BY_MODEL.items() if getattr(config, name) is None}
    config = replace(config, threads=config.threads or (1 if embedded else torch.get_num_threads()), **unset)  # type: ignore[arg-type]
    runs.at_least(config, 1, "emoji", "held_out", "batch", "sample_count", "sample_steps", "keep", "threads")
    runs.at_least(config, 0, "drop", "learning_rate", "sample_every", "save_every")
    if config.drop > 1 / 3:
        raise InputError(f"drop is of each of three cases, so at most 1/3, not {config.drop:g}")
    return config


def pictures_of(config: Config) -> tuple[list[Photo], list[Photo]]:
    """Pictures to learn from, and those that are held out, all with captions."""
    if config.data is not None:
        noto = load_emoji(config.data, "noto")
        new = composites([e for e in noto if e.held_out], "asked", config.held_out, 1, config.seed)
        old = composites([e for e in noto if not e.held_out], "learnt", config.emoji, VIEWS, config.seed)
        learnt, asked = ([Photo(Path(), *pair) for pair in zip(c.images, c.captions, strict=True)] for c in (old, new))
    else:
        found = runs.read_and_tell(config.photos or subject_folder(), config.resolution, config.captions)
        if len(found) <= config.held_out:
            raise InputError(
                f"{len(found)} pictures, of which {config.held_out} are held out, leave none to learn from"
            )
        learnt, asked = found[: -config.held_out], found[-config.held_out :]
    prompt, said = config.prompt or "", config.captions
    learnt = [replace(p, caption=(said and p.caption) or prompt) for p in learnt]
    asked = [replace(p, caption=prompt or (said and p.caption) or "") for p in asked]
    return learnt, asked


def samples(config: Config, pipe: Pipe, adapter: vm.Adapter, control: Control, asked: Sequence[Photo]) -> Samples:
    """What is drawn by the pictures that are held out."""
    rows = control.rows([p.image for p in asked]).repeat_interleave(config.sample_count, 0)
    size, steps, guidance = known(config.resolution), known(config.sample_steps), known(config.guidance)
    steered = partial(draw, pipe, adapter, rows, size=size, steps=steps, guidance=guidance)
    prompts = [known(p.caption) for p in asked]
    return Samples(steered, known(config.output) / "samples", prompts, config.sample_count, config.seed)


def loss_of(config: Config, pipe: Pipe, adapter: vm.Adapter, control: Control, learnt: Sequence[Photo]) -> Loss:
    """The loss of a micro-batch, over pictures that are steered by themselves."""
    images, prompts = [p.image for p in learnt], [known(p.caption) for p in learnt]
    given = control.method().condition(control.rows(images))
    pictures = Steered(pipe, "pictures", images, prompts, given, size=known(config.resolution), drop=config.drop)
    batch = known(config.batch)
    return steering(adapter, pictures, batch, denoising(pipe, [pictures], Prompts(pipe, cache=True), batch, Weights()))


def write_results(
    config: Config, control: Control, sample: Samples, adapter: vm.Adapter, asked: Sequence[Photo]
) -> tuple[float, float]:
    """The adapter and what people look at; then says what to do next. How well samples follow, before and after."""
    output = known(config.output)
    vm.save(adapter, output / "adapter.safetensors", control.header)
    by = [p.image for p in asked for _ in range(config.sample_count)]
    rows, drawn = control.rows(by), [report.cut(sample(step), known(config.resolution)) for step in (0, config.steps)]
    before, after = (control.agreement(rows, images) for images in drawn)
    labels = ("given", f"the base: {before:.3f}", f"steered: {after:.3f}")
    strips = ([control.shown(image) for image in by], *drawn)
    grids = [report.grid(images, min(len(by), COLUMNS)) for images in strips]
    report.write_image(output / "sheet.png", report.sheet(list(zip(labels, grids, strict=True))))
    report.loss_plot(output / "metrics.jsonl", output / "loss.png")
    card.control_card(output, asdict(config), adapter.num_parameters, (before, after))
    print(f"what is given and what is drawn agree by {before:.3f} (the base) and {after:.3f} (steered)")
    print(f"given, before and after: {output / 'sheet.png'}")
    model = f" --model {config.model}" if config.model else ""
    print(f'next: vismodal generate "{asked[0].caption}" --adapters {output} --conditions PICTURE.png{model}')
    return before, after


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["control", *sys.argv[1:]]))
