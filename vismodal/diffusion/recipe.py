"""The settings of DreamBooth, in groups. A pipeline's `Config` inherits them all: on the command line they are flat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vismodal.diffusion.pictures import Crop
from vismodal.diffusion.processes import Density
from vismodal.optimizers import OptimizerName
from vismodal.train import Schedule


@dataclass(frozen=True)
class Subject:
    """One of several subjects.

    Args:
        photos: folder with a few photos of it.
        prompt: what a photo shows, with the subject's word in it.
        subject: that word, another one for each subject.
        class_prompt: prompt of its class images; without it, the prompt without the subject's word.
        class_folder: where they are found, or made and kept; without it, a folder in the output for each class prompt.
    """

    photos: Path
    prompt: str
    subject: str = "sks"
    class_prompt: str | None = None
    class_folder: Path | None = None


@dataclass(frozen=True)
class Task:
    """What is learnt, by which model, and where the results go.

    Args:
        photos: folder with a few photos of the subject: jpg, png, webp; captions from NAME.txt or metadata.jsonl.
            Without it, the six drawings of a robot that come with vismodal.
        prompt: what a photo shows, with the subject's word in it, such as "a photo of sks dog".
        subject: the word in the prompt that stands for the subject; a rare one, so that it means nothing else yet.
        subjects: several at once instead, each with its own photos, prompt, subject, and if wanted class_prompt and
            class_folder: '[{"photos": "rex", "prompt": "a photo of sks dog", "subject": "sks"}, ...]', or in a config.
        model: folder in diffusers' layout, or Hub id. Without it, the embedded small Stable Diffusion.
        output: folder for the results. Without it, the next free runs/dreambooth-N.
        resume: go on with the run in `output`; to the bit what it would have become without the stop, on a GPU as far
            as its kernels repeat themselves.
    """

    photos: Path | None = None
    prompt: str | None = None
    subject: str = "sks"
    subjects: tuple[Subject, ...] = ()
    model: str | None = None
    output: Path | None = None
    resume: bool = False


@dataclass(frozen=True)
class Data:
    """How pictures are read, and those of the class that keep the class as it is.

    Args:
        captions: use the photos' captions where they have one; the prompt goes before those without the subject's word.
        caption_dropout: share of the photos' rows with an empty prompt, usually 0.1, which guidance leads away from.
        masks: use NAME.mask.png beside NAME.jpg, of its size: what is white is learnt, what is black is not.
        mask_floor: what black counts, from 0 to 1, beside the 1 of white; each photo's loss is the mean so weighted.
        resolution: side in pixels of the training squares and the samples. Without it, what the model was made for.
        buckets: let photos keep their shape, up to 2:1, with as many pixels as the square; sides are multiples of what
            the UNet's floors need (64 pixels for Stable Diffusion 1, 32 for XL). Shapes never share a forward pass.
        crop: the square in the middle of a photo, or anywhere (then latents are not cached).
        flip: mirror photos half of the times; not for subjects with writing on them or a side.
        prior: weight of the prior-preservation loss, which keeps the class as it is; 1 is the paper's, 0 is off.
        prior_by: how the class is kept. images: on class images, by the noise that they were given, as in the paper;
            base: on class images, by what the model without the adapter says of them; photos: on the photos with the
            class prompt, by what that model says of them, without class images. Both need one more pass without
            gradients.
        class_prompt: prompt of the class images; without it, the prompt without the subject's word.
        class_images: how many class images there are to be.
        class_folder: where they are found, or made and kept. Without it, OUTPUT/class.
    """

    captions: bool = True
    caption_dropout: float = 0.0
    masks: bool = True
    mask_floor: float = 0.0
    resolution: int | None = None
    buckets: bool = False
    crop: Crop = "center"
    flip: bool = False
    prior: float = 0.0
    prior_by: Literal["images", "base", "photos"] = "images"
    class_prompt: str | None = None
    class_images: int = 100
    class_folder: Path | None = None


@dataclass(frozen=True)
class Adaptation:
    """What is trained.

    Args:
        method: any that `vm.methods()` lists, as in "dora" or "loha(rank=4)"; or none, for new tokens alone (textual
            inversion). Without it, LoRA with the rank, alpha and dropout below. Its sites, where and layers are those
            in the UNet or transformer.
        train_text_encoder: adapt the CLIP text encoders too.
        sites: where the method attaches in the UNet or transformer: attention, +ff, +conv (each with those before it),
            all; or kinds of sites, which `vm.sites(unet)` lists. Without it, attention, and with the embedded model
            +conv; and of methods that have places of their own these.
        text_sites: where it attaches in the text encoders.
        rank: inner dimension of LoRA.
        alpha: LoRA acts with alpha / rank; without it, with 1.
        dropout: probability of dropping LoRA's inputs while training.
        tokens: words of the prompts that become new tokens of the CLIP text encoders, such as sks, or sks:4 with four
            vectors; with LoRA that is pivotal tuning, with --method crossattention Custom Diffusion.
        token_init: words that they begin as, one for each or one for all, such as dog; without it, as they are read.
        token_learning_rate: of the new tokens.
        token_steps: the step after which they stay as they are, if any.
    """

    method: str | None = None
    train_text_encoder: bool = False
    sites: tuple[str, ...] | None = None
    text_sites: tuple[str, ...] = ("attn.*",)
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    tokens: tuple[str, ...] = ()
    token_init: tuple[str, ...] = ()
    token_learning_rate: float = 5e-3
    token_steps: int | None = None


@dataclass(frozen=True)
class Optimisation:
    """The loss and its descent.

    Args:
        steps: updates in all; 500, or 600 with the embedded model. More with --resume extends a finished run.
        batch: photos for each forward pass, and as many class images on top; 1, or 4 with the embedded model.
        accumulate: forward passes for each update.
        optimizer: adamw; adamw8bit, with less memory (pip install "vismodal[8bit]", for a GPU); prodigy, which finds
            its own learning rate (pip install "vismodal[prodigy]").
        learning_rate: after warming up; 1e-4, or 1e-3 with the embedded model. For prodigy a factor: 1.
        schedule: course of the learning rate; constant, or cosine with the embedded model.
        warmup: updates over which it rises from zero.
        weight_decay: of the optimiser.
        clip: largest norm of the gradient; 0 is off.
        min_snr: gamma of the Min-SNR loss weights (arXiv 2303.09556), usually 5; 0 is off.
        offset_noise: strength of offset noise, usually 0.05 to 0.1; 0 is off.
        zero_snr: let noise end in noise alone, so that pictures can be dark or light as a whole (arXiv 2305.08891); for
            models that predict v. Training and all samples then follow DDIM's rescaled betas with trailing steps.
        ema: decay of an average of the adapter's parameters, usually 0.999; 0 is off. After step n it is at most
            (1 + n) / (10 + n). Samples and the saved adapter are of the average, which training itself never sees.
        levels: density of the noise levels where the model is trained by flow matching (SD3, Flux).
        seed: of everything random.
    """

    steps: int | None = None
    batch: int | None = None
    accumulate: int = 1
    optimizer: OptimizerName = "adamw"
    learning_rate: float | None = None
    schedule: Schedule | None = None
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    min_snr: float = 0.0
    offset_noise: float = 0.0
    zero_snr: bool = False
    ema: float = 0.0
    levels: Density = "logit_normal"
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """The pictures that are drawn on the way.

    Args:
        sample_every: make sample images before, after, and every so many steps; 0 before and after only. A file
            `sample-now` in the output folder asks for more at once.
        sample_prompts: of the samples. Without them, the prompt, and for the embedded subject on two new backgrounds.
        sample_count: samples for each prompt, with seeds that stay the same.
        sample_steps: denoising steps of samples and class images; 25, or 20 with the embedded model.
        guidance: classifier-free guidance of samples and class images; as usual with the kind of model (7.5 for Stable
            Diffusion 1 and 2), or 4 with the embedded one.
    """

    sample_every: int = 100
    sample_prompts: tuple[str, ...] = ()
    sample_count: int = 4
    sample_steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Machine:
    """Time, memory and disk.

    Args:
        mixed_precision: precision of the frozen model and of the computation; fp16 needs a GPU.
        base: precision of the frozen UNet or transformer: float as above, or its linear layers in int8 (pip install
            "vismodal[quantised]"), which takes less memory with gradient_checkpointing.
        gradient_checkpointing: less memory for more time.
        cache: encode photos and prompts once instead of at every step.
        save_every: save a checkpoint every so many steps; a stop and the end save one anyway.
        keep: how many checkpoints stay.
        threads: of the CPU; torch's own choice, or 1 with the embedded model, which is too small to be shared out. A
            resume is exact to the bit with as many.
        track: one of accelerate's trackers, such as tensorboard or wandb.
    """

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    base: Literal["float", "int8"] = "float"
    gradient_checkpointing: bool = False
    cache: bool = True
    save_every: int = 100
    keep: int = 2
    threads: int | None = None
    track: str | None = None


@dataclass(frozen=True)
class Recipe(Machine, Sampling, Optimisation, Adaptation, Data, Task):
    """All of them. A dataclass lists the fields of its last base first: from the task to the machine."""


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

# What may change between a stop and its resume, since it does not touch what the adapter becomes; or (photos, subjects,
# model, class_folder) because the content is compared, not the place; or (steps) because a resume may extend a run.
FREE = {
    "photos", "subjects", "model", "output", "resume", "class_folder", "steps", "gradient_checkpointing", "cache",
    "sample_every", "save_every", "keep", "threads", "track",
}  # fmt: skip
