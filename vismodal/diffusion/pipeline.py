"""Stable Diffusion's pipeline for training: load it, encode pictures and prompts, generate images with given seeds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from vismodal.diffusion.losses import Prediction, prediction_type
from vismodal.draw import seed_of
from vismodal.errors import InputError
from vismodal.reports.run import grid, write_image

PIPELINES = ("StableDiffusionPipeline",)
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_WITH_WEIGHTS = ("unet", "vae", "text_encoder")


class Pipe(Protocol):
    """What is used of diffusers' pipelines, which their own types do not tell."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    image_processor: Any
    vae_scale_factor: int

    def encode_prompt(self, *args: Any) -> Any: ...
    def set_progress_bar_config(self, **kwargs: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


# -- loading ---------------------------------------------------------------------------------------------------------


PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(model: str | Path, precision: str = "no", device: torch.device | str = "cpu") -> Pipe:
    """A pipeline from a folder or the Hub, without its safety checker. Only safetensors are read.

    UNet and text encoder have the precision ("no", "bf16", "fp16"); the autoencoder stays in fp32, since in half
    precision it blurs or overflows.

    Raises `InputError` naming the missing part, or why the model cannot be read or trained.
    """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    elif folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") != 1:
        raise InputError(
            f"there is no model folder {model}; write a folder in diffusers' layout, or a Hub id OWNER/NAME"
        )
    dtype = PRECISIONS[precision]
    source = str(folder) if folder.is_dir() else str(model)
    try:
        with _quiet():
            kind = str(DiffusionPipeline.load_config(source).get("_class_name"))
            if kind not in PIPELINES:
                raise InputError(f"{model} is a {kind}; what can be trained here: {', '.join(PIPELINES)}")
            pipe: Pipe = StableDiffusionPipeline.from_pretrained(
                source,
                safety_checker=None,
                requires_safety_checker=False,
                use_safetensors=True,
                dtype={"unet": dtype, "text_encoder": dtype, "default": torch.float32},
            ).to(device)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        todo = "" if folder.is_dir() else " Check the id, that the Hub can be reached, and that you may read the model"
        raise InputError(f"the model {model} cannot be loaded: {why}{todo}") from error
    _check_parts(pipe, model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(f"{folder} lacks model_index.json; a model folder is what diffusers' save_pretrained writes")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{index} is no JSON: {error}") from error
    for part in PARTS:
        if not listed.get(part, [None])[0]:
            raise InputError(f"the model {folder} has no {part}: model_index.json does not name one")
        if not (folder / part).is_dir() or not any((folder / part).iterdir()):
            raise InputError(f"the model {folder} is missing its part {part!r}: there is no folder {folder / part}")
    for part in _WITH_WEIGHTS:
        if not (folder / part / "config.json").is_file():
            raise InputError(f"the model {folder} is missing its part {part!r}: {folder / part} has no config.json")
        if not any((folder / part).glob("*.safetensors")):
            pickled = next((folder / part).glob("*.bin"), None)
            hint = f"; {pickled.name} is a pickle, which is never read: convert it to safetensors" if pickled else ""
            raise InputError(f"the model {folder} is missing its part {part!r}: no weights (*.safetensors){hint}")


def _check_parts(pipe: Pipe, model: str | Path) -> None:
    wanted, given = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if wanted != given:
        raise InputError(
            f"{model} takes {wanted} channels, of {given} latent ones: inpainting models cannot be trained here"
        )
    prediction_type(str(pipe.scheduler.config.get("prediction_type")))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loading bars of diffusers and transformers; downloads keep theirs."""
    import diffusers.utils.logging as ours
    import transformers.utils.logging as theirs

    before = [module.is_progress_bar_enabled() for module in (ours, theirs)]
    for module in (ours, theirs):
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, enabled in zip((ours, theirs), before, strict=True):
            if enabled:
                module.enable_progress_bar()


def noise_schedule(pipe: Pipe) -> tuple[Prediction, Tensor]:
    """What the network predicts, and alpha_bar (T,) of its training noise levels, whatever the sampler makes of it."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return prediction_type(scheduler.config.prediction_type), scheduler.alphas_cumprod


def native_size(pipe: Pipe) -> int:
    """Side in pixels of the square images that the model was made for."""
    return int(pipe.unet.config.sample_size) * pipe.vae_scale_factor


def checkpoint_gradients(pipe: Pipe, text_encoder: bool) -> None:
    """Trades time for memory: activations of the UNet's blocks are computed again in the backward pass."""
    pipe.unet.enable_gradient_checkpointing()
    if text_encoder:
        pipe.text_encoder.activation_checkpointing_enable()


# -- encoding --------------------------------------------------------------------------------------------------------


def encode_images(pipe: Pipe, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, (B, c, h, w) each, of images (B, 3, H, W) in [-1, 1].

    Both are kept, not one sample: an image then gives another latent each time, as the autoencoder was trained.
    """
    with torch.no_grad():
        posterior = pipe.vae.encode(images.to(pipe.vae.device, pipe.vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def draw_latents(pipe: Pipe, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Latents as the UNet wants them, (B, c, h, w): a sample of the posterior, shifted and scaled."""
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    return (mean + std * noise - shift) * pipe.vae.config.scaling_factor


def encode_prompts(pipe: Pipe, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The UNet's text arguments by name, each with one row a prompt. Carries gradients to the text encoder."""
    embeddings = pipe.encode_prompt(list(prompts), pipe.text_encoder.device, 1, False)[0]
    return {"encoder_hidden_states": embeddings}


def warn_of_long(pipe: Pipe, prompts: Sequence[str]) -> None:
    """Tells on stderr which prompts the text encoder does not see to their end."""
    for prompt in dict.fromkeys(prompts):
        with _unwarned():
            unseen = len(pipe.tokenizer(prompt).input_ids) - pipe.tokenizer.model_max_length
        if unseen > 0:
            print(f"warning: the text encoder does not see the last {unseen} tokens of {prompt!r}", file=sys.stderr)


@contextmanager
def _unwarned() -> Iterator[None]:
    """The tokenizer logs a warning about a length that we ask for on purpose."""
    import transformers.utils.logging as logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


# -- generating ------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """In eval mode without gradients, and as before afterwards."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def generate(
    pipe: Pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: int,
    steps: int,
    guidance: float,
    batch: int = 4,
) -> list[Image.Image]:
    """One image for each prompt and its seed, as plain `pipe(prompt, generator=...)` gives it, `batch` at a time.

    The latents are decoded here because a UNet in half precision goes with an autoencoder in fp32, which the pipeline
    itself cannot mix.
    """
    images: list[Image.Image] = []
    with evaluating(pipe.unet, pipe.text_encoder, pipe.vae):
        for start in range(0, len(prompts), batch):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
            latents = pipe(
                list(prompts[start : start + batch]),
                generator=generators,
                height=size,
                width=size,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
            ).images
            decoded = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
            images += pipe.image_processor.postprocess(decoded.float(), output_type="pil")
    return images


Generate = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]  # an image for each prompt and its seed


@dataclass(frozen=True)
class Samples:
    """Sample images of a run, alike at every step: `samples(120)` makes `folder`/step-0000120.png unless it is there.

    A row for each prompt, a column for each of `count` seeds that depend on `seed`; edge to edge and lossless.
    """

    generate: Generate
    folder: Path
    prompts: Sequence[str]
    count: int
    seed: int

    def __call__(self, step: int) -> Path:
        path = self.folder / f"step-{step:07d}.png"
        if not path.exists():
            seeds = [seed_of(self.seed, "sample", i) for i in range(self.count)]
            images = self.generate([p for p in self.prompts for _ in seeds], seeds * len(self.prompts))
            write_image(path, grid(images, self.count))
        return path


def fill_folder(
    folder: Path, count: int, make: Callable[[Sequence[int]], Sequence[Image.Image]], seed: int, batch: int = 4
) -> int:
    """Makes the images `generated-*.png` that a folder of `count` pictures lacks, each by its seed; gives how many.

    Whoever finds them and whoever makes them reads the same: the files are lossless, seeds depend on numbers alone,
    and batches always hold the same numbers, also after a run that was stopped in between.
    """
    from vismodal.data.photos import SUFFIXES

    own = [p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("generated-")]
    names = [folder / f"generated-{i:05d}.png" for i in range(max(0, count - len(own)))]
    made = 0
    missing = [
        start for start in range(0, len(names), batch) if not all(p.exists() for p in names[start : start + batch])
    ]
    for start in tqdm(missing, desc=f"making {folder.name} images", unit="batch", disable=not missing):
        paths = names[start : start + batch]
        images = make([seed_of(seed, "class image", start + i) for i in range(len(paths))])
        for path, image in zip(paths, images, strict=True):
            write_image(path, image)
            made += 1
    return made
