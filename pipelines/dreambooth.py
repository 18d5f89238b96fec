"""DreamBooth with LoRA (Ruiz et al. 2023, arXiv 2208.12242): teach a model a subject from a few photos.

    vismodal dreambooth                                    # the embedded model and subject, 76 s on 2 cores
    vismodal dreambooth --photos my_dog --prompt "a photo of sks dog" --model OWNER/STABLE-DIFFUSION
    vismodal dreambooth --config runs/dreambooth-1/config.yaml --resume

The same from Python: `main(Config(photos=Path("my_dog"), prompt="a photo of sks dog", model="..."))`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import vismodal as vm
from vismodal import runs
from vismodal.callbacks import Every, Progress, Track
from vismodal.data.photos import Photo
from vismodal.data.subject import CLASS_PROMPT, PROMPT, subject_folder
from vismodal.diffusion.denoise import Crop, Pictures, Prompts, Weights, denoising
from vismodal.diffusion.encode import warn_of_long
from vismodal.diffusion.generate import Generate, Samples, fill_folder, generate
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.presets import adapted, checkpoint_gradients, sites_of
from vismodal.diffusion.processes import Density
from vismodal.diffusion.prompts import check_class, check_subject, prompts_for, without_word
from vismodal.draw import seed_of
from vismodal.errors import InputError
from vismodal.files import write_tensors
from vismodal.formats import peft
from vismodal.paths import asset
from vismodal.reports import run as report
from vismodal.resume import Checkpoints
from vismodal.runs import known
from vismodal.train import Micro, Plan, Schedule, fit


@dataclass(frozen=True)
class Config:
    """Teach Stable Diffusion 1, 2, XL or 3, Flux or PixArt a subject from a few photos (DreamBooth with LoRA).

    Args:
        photos: folder with a few photos of the subject: jpg, png, webp; captions from NAME.txt or metadata.jsonl.
            Without it, the six drawings of a robot that come with vismodal.
        prompt: what a photo shows, with the subject's word in it, such as "a photo of sks dog".
        subject: the word in the prompt that stands for the subject; a rare one, so that it means nothing else yet.
        model: folder in diffusers' layout, or Hub id. Without it, the embedded small Stable Diffusion.
        output: folder for the results. Without it, the next free runs/dreambooth-N.
        resume: go on with the run in `output`; to the bit what it would have become without the stop.
        captions: use the photos' captions where they have one; the prompt goes before those without the subject's word.
        resolution: side in pixels of the training squares and the samples. Without it, what the model was made for.
        crop: the square in the middle of a photo, or anywhere (then latents are not cached).
        flip: mirror photos half of the times; not for subjects with writing on them or a side.
        prior: weight of the prior-preservation loss, which keeps the class as it is; 1 is the paper's, 0 is off.
        class_prompt: prompt of the class images; without it, the prompt without the subject's word.
        class_images: how many class images there are to be.
        class_folder: where they are found, or made and kept. Without it, OUTPUT/class.
        train_text_encoder: adapt the CLIP text encoders too.
        sites: where LoRA attaches in the UNet or transformer: attention, +ff, +conv (each with those before it), all;
            or kinds of sites, which `vm.sites(unet)` lists. Without it, attention, and with the embedded model +conv.
        text_sites: where it attaches in the text encoders.
        rank: inner dimension of LoRA.
        alpha: LoRA acts with alpha / rank; without it, with 1.
        dropout: probability of dropping LoRA's inputs while training.
        steps: updates in all; 500, or 600 with the embedded model. More with --resume extends a finished run.
        batch: photos for each forward pass, and as many class images on top; 1, or 4 with the embedded model.
        accumulate: forward passes for each update.
        learning_rate: of AdamW, after warming up; 1e-4, or 1e-3 with the embedded model.
        schedule: course of the learning rate; constant, or cosine with the embedded model.
        warmup: updates over which it rises from zero.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; 0 is off.
        min_snr: gamma of the Min-SNR loss weights (arXiv 2303.09556), usually 5; 0 is off.
        offset_noise: strength of offset noise, usually 0.05 to 0.1; 0 is off.
        levels: density of the noise levels where the model is trained by flow matching (SD3, Flux).
        seed: of everything random.
        mixed_precision: precision of the frozen model and of the computation; fp16 needs a GPU.
        gradient_checkpointing: less memory for more time.
        cache: encode photos and prompts once instead of at every step.
        sample_every: make sample images before, after, and every so many steps; 0 before and after only.
        sample_prompts: of the samples. Without them, the prompt, and for the embedded subject on two new backgrounds.
        sample_count: samples for each prompt, with seeds that stay the same.
        sample_steps: denoising steps of samples and class images; 25, or 20 with the embedded model.
        guidance: classifier-free guidance of samples and class images; as usual with the kind of model (7.5 for Stable
            Diffusion 1 and 2), or 4 with the embedded one.
        save_every: save a checkpoint every so many steps; a stop and the end save one anyway.
        keep: how many checkpoints stay.
        threads: of the CPU; torch's own choice, or 1 with the embedded model, which is too small to be shared out. A
            resume is exact to the bit with as many.
        track: one of accelerate's trackers, such as tensorboard or wandb.
    """

    photos: Path | None = None
    prompt: str | None = None
    subject: str = "sks"
    model: str | None = None
    output: Path | None = None
    resume: bool = False
    captions: bool = True
    resolution: int | None = None
    crop: Crop = "center"
    flip: bool = False
    prior: float = 0.0
    class_prompt: str | None = None
    class_images: int = 100
    class_folder: Path | None = None
    train_text_encoder: bool = False
    sites: tuple[str, ...] | None = None
    text_sites: tuple[str, ...] = ("attn.*",)
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    steps: int | None = None
    batch: int | None = None
    accumulate: int = 1
    learning_rate: float | None = None
    schedule: Schedule | None = None
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    min_snr: float = 0.0
    offset_noise: float = 0.0
    levels: Density = "logit_normal"
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    cache: bool = True
    sample_every: int = 100
    sample_prompts: tuple[str, ...] = ()
    sample_count: int = 4
    sample_steps: int | None = None
    guidance: float | None = None
    save_every: int = 100
    keep: int = 2
    threads: int | None = None
    track: str | None = None


PHOTO = "a photo of sks dog"

# The usual value, and the one that suits the embedded model, which is small, fast and far less trained.
BY_MODEL = {
    "sites": (("attention",), ("+conv",)),
    "steps": (500, 600),
    "batch": (1, 4),
    "learning_rate": (1e-4, 1e-3),
    "schedule": ("constant", "cosine"),
    "sample_steps": (25, 20),
    "guidance": (None, 4.0),  # None: by the kind of model
}

# What may change between a stop and its resume, since it does not touch what the adapter becomes; or (photos, model,
# class_folder) because the content is compared, not the place; or (steps) because a resume may extend a run.
FREE = {
    "photos", "model", "output", "resume", "class_folder", "steps", "gradient_checkpointing", "cache", "sample_every",
    "save_every", "keep", "threads", "track",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Where the results lie, how many steps the adapter has seen, and whether the run was stopped before its end."""

    output: Path
    step: int
    stopped: bool = False


def main(config: Config) -> Result:
    """Trains and writes the results into a folder. Raises `InputError` for input that cannot be used."""
    config = checked(config)
    with runs.cpu_threads(known(config.threads)):
        return run(config)


def run(config: Config) -> Result:
    """`main` for settings that are filled in."""
    plan = Plan(known(config.steps), config.accumulate, config.seed, known(config.schedule), config.warmup, config.clip)
    photos = runs.read_and_tell(config.photos or subject_folder(), config.resolution, config.captions)
    accelerator = runs.start_accelerator(config.mixed_precision, config.track)
    pipe = load_pipeline(config.model or asset("tiny-sd"), config.mixed_precision, accelerator.device)
    config = fitted(config, pipe)
    prompts = prompts_for(photos, known(config.prompt), config.subject)
    warn_of_long(pipe, [*prompts, *config.sample_prompts])
    adapter = adapt(config, pipe)
    config = replace(config, output=runs.claim(config.output, "dreambooth", config.resume, accelerator))
    output = known(config.output)  # until here nothing was written: bad input leaves no trace

    size, guidance = known(config.resolution), known(config.guidance)
    draw = partial(generate, pipe, size=size, steps=known(config.sample_steps), guidance=guidance)
    sample = Samples(draw, output / "samples", config.sample_prompts, config.sample_count, config.seed)
    with accelerator.main_process_first(), adapter.disabled():  # the others find what the first process makes
        if accelerator.is_main_process and not config.resume:
            runs.save_config(config, output)
        class_photos = class_images(config, draw) if config.prior else []
        sample(0)
    content = {"photos": runs.digest(photos), "class_photos": runs.digest(class_photos), **runs.bases(adapter)}
    same = runs.identity(config, FREE, **content)
    checkpoints = Checkpoints(output / "checkpoints", same, config.save_every, config.keep)
    checkpoints.check(plan.steps)
    if accelerator.is_main_process:
        runs.save_config(config, output)
    accelerator.print(f"training {adapter.num_parameters:,} parameters on {len(adapter.modules)} sites, into {output}")
    outcome = fit(
        loss_of(config, pipe, photos, prompts, class_photos),
        adapter,
        torch.optim.AdamW(adapter.groups(known(config.learning_rate), config.weight_decay)),
        plan=plan,
        accelerator=accelerator,
        checkpoints=checkpoints,
        log=output / "metrics.jsonl",
        callbacks=[
            Progress(),
            Every(config.sample_every, sample),
            *([Track(accelerator, "dreambooth", same)] if config.track else []),
        ],
    )
    if outcome.stopped:
        again = runs.resume_command("dreambooth", output)
        accelerator.print(f"stopped after step {outcome.step} of {plan.steps}; go on with: {again}")
    elif accelerator.is_main_process:
        write_results(config, pipe, sample, adapter, photos)
    return Result(output, outcome.step, outcome.stopped)


def checked(config: Config) -> Config:
    """The settings with prompt and class prompt filled in. Raises `InputError` for what makes no sense."""
    if config.prompt is None and config.photos is not None:
        raise InputError(f'the prompt is missing; write what the photos show, such as --prompt "{PHOTO}"')
    embedded = config.model is None
    config = replace(config, threads=config.threads or (1 if embedded else torch.get_num_threads()))
    unset = {name: values[embedded] for name, values in BY_MODEL.items() if getattr(config, name) is None}
    config = replace(config, **unset)  # type: ignore[arg-type]
    prompt, word = config.prompt or PROMPT, config.subject
    check_subject(prompt, word)
    class_prompt = config.class_prompt or (CLASS_PROMPT if prompt == PROMPT else without_word(prompt, word))
    if config.prior:
        check_class(class_prompt, word)
    runs.at_least(config, 1, "batch", "class_images", "sample_count", "sample_steps", "keep", "rank")
    runs.at_least(config, 0, "prior", "min_snr", "offset_noise", "sample_every", "save_every", "learning_rate")
    if config.resolution is not None and (config.resolution < 8 or config.resolution % 8):
        raise InputError(f"resolution must be a multiple of 8, not {config.resolution}")
    new = tuple(f"{prompt} on a {colour} background" for colour in ("white", "orange"))  # no photo has these
    samples = config.sample_prompts or (new if config.photos is None else (prompt,))
    return replace(config, prompt=prompt, class_prompt=class_prompt, sample_prompts=samples)


def fitted(config: Config, pipe: Pipe) -> Config:
    """The settings with what hangs on the model filled in. Raises `InputError` for what it cannot do."""
    kind = kind_of(pipe)
    size, step = config.resolution or kind.native(pipe), pipe.vae_scale_factor * kind.patch(pipe)
    if size % step:
        raise InputError(f"resolution must be a multiple of {step} for a {type(pipe).__name__}, not {size}")
    weights_of(config).process(pipe)
    return replace(config, resolution=size, guidance=kind.guidance if config.guidance is None else config.guidance)


def weights_of(config: Config) -> Weights:
    return Weights(config.prior, config.min_snr, config.offset_noise, config.levels)


def class_images(config: Config, generate: Generate) -> list[Photo]:
    """The class images; those that are missing are generated first."""
    folder, prompt = config.class_folder or known(config.output) / "class", known(config.class_prompt)
    made = fill_folder(folder, config.class_images, lambda seeds: generate([prompt] * len(seeds), seeds), config.seed)
    print(f"class images of {prompt!r}: {made} made, the others found in {folder}")
    return runs.read_and_tell(folder, config.resolution)


def adapt(config: Config, pipe: Pipe) -> vm.Adapter:
    """LoRA on the denoiser and, where they are trained, the text encoders; the models are in training mode then."""
    lora = partial(vm.LoRA, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
    kind, models = kind_of(pipe), adapted(pipe, config.train_text_encoder)
    methods = [
        lora(
            sites=sites_of(model, known(config.sites) if name == kind.denoiser else config.text_sites),
            where=f"{name}.*",
            layers=kind.layers.get(name),
        )
        for name, model in models.items()
    ]
    adapter = vm.adapt(models, methods, name="dreambooth", seed=seed_of(config.seed, "adapter"))
    for model in models.values():
        model.train()
    if config.gradient_checkpointing:
        checkpoint_gradients(models)
    return adapter


def loss_of(
    config: Config, pipe: Pipe, photos: Sequence[Photo], prompts: Sequence[str], class_photos: Sequence[Photo]
) -> Callable[[Micro], Mapping[str, Tensor]]:
    """The loss of a micro-batch, over the photos and, with a prior, as many class images."""
    size, crop, flip, cache = known(config.resolution), config.crop, config.flip, config.cache
    pictures = partial(Pictures, pipe, size=size, crop=crop, flip=flip, cache=cache)
    named = {"instance": (photos, prompts)}
    if config.prior:
        named["class"] = (class_photos, [known(config.class_prompt)] * len(class_photos))
    sets = [
        pictures(name, [p.image for p in found], said, sizes=[p.size or p.image.size for p in found])
        for name, (found, said) in named.items()
    ]
    encode = Prompts(pipe, cache=cache and not config.train_text_encoder)
    return denoising(pipe, sets, encode, known(config.batch), weights_of(config))


def write_results(config: Config, pipe: Pipe, sample: Samples, adapter: vm.Adapter, photos: Sequence[Photo]) -> None:
    """The adapter in our format and in diffusers', and what people look at; then says what to do next."""
    output, steps = known(config.output), known(config.steps)
    vm.save(adapter, output / "adapter.safetensors", {"prompt": known(config.prompt), "subject": config.subject})
    readable, parts = kind_of(pipe).lora_files, list(adapter.models)
    if readable:
        tensors, header = peft.to_peft(adapter.state_dict(), peft.scaling_of(adapter.modules))
        write_tensors(output / peft.FILE, tensors, header)
    real = [report.square(photo.image, known(config.resolution)) for photo in photos[: config.sample_count]]
    report.write_sheet(output, real, sample(0), sample(steps), f"after {steps} steps")
    report.loss_plot(output / "metrics.jsonl", output / "loss.png")
    report.dreambooth_card(output, asdict(config), adapter.num_parameters, parts, readable)
    print(f"before and after: {output / 'sheet.png'}")
    other = f"and for pipe.load_lora_weights {output / peft.FILE}"
    nobody = f"a {type(pipe).__name__} has no load_lora_weights"
    print(f"adapter: {output / 'adapter.safetensors'}, {other if readable else nobody}")
    photos_of = f'--photos {config.photos or "FOLDER"} --prompt "{PHOTO if config.photos is None else config.prompt}"'
    more = f"{runs.resume_command('dreambooth', output)} --steps {2 * steps}"
    print(f"next: {more if config.model else f'vismodal dreambooth {photos_of} --model OWNER/STABLE-DIFFUSION'}")


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["dreambooth", *sys.argv[1:]]))
