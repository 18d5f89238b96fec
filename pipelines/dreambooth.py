"""DreamBooth with LoRA (Ruiz et al. 2023, arXiv 2208.12242): teach Stable Diffusion a subject from a few photos.

    vismodal dreambooth                                    # the embedded model and subject, a few minutes on a laptop
    vismodal dreambooth --photos my_dog --prompt "a photo of sks dog" --model OWNER/STABLE-DIFFUSION
    vismodal dreambooth --config runs/dreambooth-1/config.yaml --resume

The same from Python: `main(Config(photos=Path("my_dog"), prompt="a photo of sks dog", model="..."))`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

import vismodal as vm
from vismodal import diffusion, report, runs
from vismodal.callbacks import Callback, Every, Progress, Track
from vismodal.data.photos import Photo
from vismodal.data.subject import CLASS_PROMPT, PROMPT, subject_folder
from vismodal.denoise import Crop, Pictures, Prompts, Weights, denoising
from vismodal.diffusion import Pipe
from vismodal.draw import seed_of
from vismodal.errors import InputError
from vismodal.files import write_tensors
from vismodal.formats import peft
from vismodal.paths import asset
from vismodal.prompts import check_class, check_subject, prompts_for, without_word
from vismodal.resume import Checkpoints
from vismodal.train import Plan, Schedule, fit


@dataclass(frozen=True)
class Config:
    """Teach Stable Diffusion a subject from a few photos (DreamBooth with LoRA).

    Args:
        photos: folder with a few photos of the subject: jpg, png, webp; captions from NAME.txt or metadata.jsonl.
            Without it, the six drawings of a robot that come with vismodal.
        prompt: what a photo shows, with the subject's word in it, such as "a photo of sks dog".
        subject: the word in the prompt that stands for the subject; a rare one, so that it means nothing else yet.
        model: folder in diffusers' layout, or Hub id, of a Stable Diffusion 1 or 2 model. Without it, the embedded one.
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
        train_text_encoder: adapt the text encoder too.
        sites: where LoRA attaches in the UNet; `vm.sites(unet)` lists what there is.
        text_sites: where it attaches in the text encoder.
        rank: inner dimension of LoRA.
        alpha: LoRA acts with alpha / rank; without it, with 1.
        dropout: probability of dropping LoRA's inputs while training.
        steps: updates in all. More with --resume extends a finished run.
        batch: photos for each forward pass; with a prior, as many class images on top.
        accumulate: forward passes for each update.
        learning_rate: of AdamW, after warming up.
        schedule: course of the learning rate.
        warmup: updates over which it rises from zero.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; 0 is off.
        min_snr: gamma of the Min-SNR loss weights (arXiv 2303.09556), usually 5; 0 is off.
        offset_noise: strength of offset noise, usually 0.05 to 0.1; 0 is off.
        seed: of everything random.
        mixed_precision: precision of the frozen model and of the computation; fp16 needs a GPU.
        gradient_checkpointing: less memory for more time.
        cache: encode photos and prompts once instead of at every step.
        sample_every: make sample images before, after, and every so many steps; 0 before and after only.
        sample_prompts: of the samples. Without them, the prompt.
        sample_count: samples for each prompt, with seeds that stay the same.
        sample_steps: denoising steps of samples and class images.
        guidance: classifier-free guidance of samples and class images.
        save_every: save a checkpoint every so many steps; a stop and the end save one anyway.
        keep: how many checkpoints stay.
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
    sites: tuple[str, ...] = ("attn.*", "xattn.*")
    text_sites: tuple[str, ...] = ("attn.*",)
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    steps: int = 500
    batch: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    min_snr: float = 0.0
    offset_noise: float = 0.0
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    cache: bool = True
    sample_every: int = 100
    sample_prompts: tuple[str, ...] = ()
    sample_count: int = 4
    sample_steps: int = 25
    guidance: float = 7.5
    save_every: int = 100
    keep: int = 2
    track: str | None = None


# What may change between a stop and its resume, since it does not touch what the adapter becomes; or (photos, model,
# class_folder) because the content is compared, not the place; or (steps) because a resume may extend a run.
FREE = {
    "photos", "model", "output", "resume", "class_folder", "steps", "gradient_checkpointing", "cache", "sample_every",
    "save_every", "keep", "track",
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
    plan = Plan(config.steps, config.accumulate, config.seed, config.schedule, config.warmup, config.clip)
    photos = runs.read_and_tell(config.photos or subject_folder(), captions=config.captions)
    accelerator = runs.start_accelerator(config.mixed_precision, config.track, config.output)
    half = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
    pipe = diffusion.load_pipeline(config.model or asset("tiny-sd"), half)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.to(accelerator.device)
    config = replace(config, resolution=config.resolution or diffusion.native_size(pipe))
    prompts = prompts_for(photos, str(config.prompt), config.subject)
    diffusion.warn_of_long(pipe, [*prompts, *config.sample_prompts])
    adapter = adapt(config, pipe)
    config = replace(config, output=runs.claim(config.output, "dreambooth", config.resume, accelerator))
    output = Path(str(config.output))  # until here nothing was written: bad input leaves no trace

    with accelerator.main_process_first(), adapter.disabled():  # the others find what the first process makes
        if accelerator.is_main_process and not config.resume:
            runs.save_config(config, output)
        class_photos = class_images(config, pipe) if config.prior else []
        sample(config, pipe, 0)
    bases = {f"the model's {part}": f"{base.shapes} {base.values[:16]}" for part, base in adapter.bases.items()}
    same = runs.identity(config, FREE, photos=runs.digest(photos), class_photos=runs.digest(class_photos), **bases)
    checkpoints = Checkpoints(output / "checkpoints", same, config.save_every, config.keep)
    checkpoints.check(config.steps)
    if accelerator.is_main_process:
        runs.save_config(config, output)

    sets = [pictures(config, pipe, "instance", photos, prompts)]
    if config.prior:
        sets.append(pictures(config, pipe, "class", class_photos, [str(config.class_prompt)] * len(class_photos)))
    print(f"training {adapter.num_parameters:,} parameters on {len(adapter.modules)} sites; results go to {output}")
    callbacks: list[Callback] = [Progress(), Every(config.sample_every, lambda step: sample(config, pipe, step))]
    if config.track:
        callbacks.append(Track(accelerator, "dreambooth", same))
    weights = Weights(config.prior, config.min_snr, config.offset_noise)
    encode = Prompts(pipe, cache=config.cache and not config.train_text_encoder)
    outcome = fit(
        denoising(pipe, sets, encode, config.batch, weights),
        adapter,
        torch.optim.AdamW(adapter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay),
        plan=plan,
        accelerator=accelerator,
        checkpoints=checkpoints,
        log=output / "metrics.jsonl",
        callbacks=callbacks,
    )
    if outcome.stopped:
        again = runs.resume_command("dreambooth", output)
        print(f"stopped after step {outcome.step} of {config.steps}; go on with: {again}")
    elif accelerator.is_main_process:
        write_results(config, pipe, adapter, photos)
    return Result(output, outcome.step, outcome.stopped)


def checked(config: Config) -> Config:
    """The settings with prompt and class prompt filled in. Raises `InputError` for what makes no sense."""
    if config.prompt is None and config.photos is not None:
        raise InputError('the prompt is missing; write what the photos show, such as --prompt "a photo of sks dog"')
    prompt, word = config.prompt or PROMPT, config.subject
    check_subject(prompt, word)
    class_prompt = config.class_prompt or (CLASS_PROMPT if prompt == PROMPT else without_word(prompt, word))
    if config.prior:
        check_class(class_prompt, word)
    runs.at_least(config, 1, "batch", "class_images", "sample_count", "sample_steps", "keep", "rank")
    runs.at_least(config, 0, "prior", "min_snr", "offset_noise", "sample_every", "save_every", "learning_rate")
    if config.resolution is not None and (config.resolution < 8 or config.resolution % 8):
        raise InputError(f"resolution must be a multiple of 8, not {config.resolution}")
    return replace(config, prompt=prompt, class_prompt=class_prompt)


def class_images(config: Config, pipe: Pipe) -> list[Photo]:
    """The class images; those that are missing are generated first."""
    folder = config.class_folder or Path(str(config.output)) / "class"
    made = diffusion.fill_folder(
        folder,
        config.class_images,
        lambda seeds: generate(config, pipe, [str(config.class_prompt)] * len(seeds), seeds),
        seed=config.seed,
    )
    print(f"class images of {config.class_prompt!r}: {made} made, {config.class_images - made} found in {folder}")
    return runs.read_and_tell(folder)


def pictures(config: Config, pipe: Pipe, name: str, photos: Sequence[Photo], prompts: Sequence[str]) -> Pictures:
    """Photos with their prompts, as latents."""
    images, size = [photo.image for photo in photos], int(config.resolution or 0)
    return Pictures(pipe, name, images, prompts, size=size, crop=config.crop, flip=config.flip, cache=config.cache)


def adapt(config: Config, pipe: Pipe) -> vm.Adapter:
    """LoRA on the UNet and, where that is trained, on the text encoder; the models are in training mode then."""
    rank, alpha, dropout = config.rank, config.alpha, config.dropout
    models: dict[str, torch.nn.Module] = {"unet": pipe.unet}
    methods = [vm.LoRA(sites=config.sites, where="unet.*", rank=rank, alpha=alpha, dropout=dropout)]
    if config.train_text_encoder:
        models["text_encoder"] = pipe.text_encoder
        where = "text_encoder.*"
        methods.append(vm.LoRA(sites=config.text_sites, where=where, rank=rank, alpha=alpha, dropout=dropout))
    adapter = vm.adapt(models, methods, name="dreambooth", seed=seed_of(config.seed, "adapter"))
    for model in models.values():
        model.train()
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        if config.train_text_encoder:
            pipe.text_encoder.activation_checkpointing_enable()
    return adapter


def generate(config: Config, pipe: Pipe, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """One image for each prompt and its seed."""
    size = int(config.resolution or 0)
    return diffusion.generate(pipe, prompts, seeds, size=size, steps=config.sample_steps, guidance=config.guidance)


def sample(config: Config, pipe: Pipe, step: int) -> Path:
    """samples/step-N.png, unless it is there: a row for each sample prompt, with the same seeds at every step."""
    path = Path(str(config.output)) / "samples" / f"step-{step:07d}.png"
    if not path.exists():
        prompts, count = config.sample_prompts or (str(config.prompt),), config.sample_count
        seeds = [seed_of(config.seed, "sample", i) for i in range(count)]
        images = generate(config, pipe, [p for p in prompts for _ in seeds], seeds * len(prompts))
        report.write_image(path, report.grid(images, count))
    return path


def write_results(config: Config, pipe: Pipe, adapter: vm.Adapter, photos: Sequence[Photo]) -> None:
    """The adapter in our format and in diffusers', the sheet, the plot and the model card; then what to do next."""
    output, step = Path(str(config.output)), config.steps
    before, after = sample(config, pipe, 0), sample(config, pipe, step)
    vm.save(adapter, output / "adapter.safetensors", {"prompt": str(config.prompt), "subject": config.subject})
    tensors, header = peft.to_peft(adapter.state_dict(), peft.scaling_of(adapter.modules))
    write_tensors(output / peft.FILE, tensors, header)
    size = int(config.resolution or 0)
    real = report.grid(
        [report.square(photo.image, size) for photo in photos[: config.sample_count]], config.sample_count
    )
    rows = [("the photos", real), ("before", Image.open(before)), (f"after {step} steps", Image.open(after))]
    report.write_image(output / "sheet.png", report.sheet(rows))
    report.loss_plot(output / "metrics.jsonl", output / "loss.png")
    report.dreambooth_card(output, asdict(config), adapter.num_parameters)
    print(f"before and after: {output / 'sheet.png'}")
    print(f"adapter: {output / 'adapter.safetensors'}, and for pipe.load_lora_weights {output / peft.FILE}")
    if config.photos is None:
        print('next: vismodal dreambooth --photos FOLDER --prompt "a photo of sks dog" --model OWNER/STABLE-DIFFUSION')
    else:
        print(f"train on: {runs.resume_command('dreambooth', output)} --steps {2 * step}")


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["dreambooth", *sys.argv[1:]]))
