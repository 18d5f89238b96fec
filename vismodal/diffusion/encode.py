"""Pictures as latents and back, and prompts as what the denoiser reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vismodal.diffusion.kinds import Pipe, Texts, kind_of
from vismodal.diffusion.load import tokenizer_of


def encode_images(pipe: Pipe, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, (B, c, h, w) each, of images (B, 3, H, W) in [-1, 1].

    Both are kept, not one sample: an image then gives another latent each time, as the autoencoder was trained. They
    are in the autoencoder's own precision, also within a training's autocast, in whose half it blurs or overflows.
    """
    with torch.no_grad(), torch.autocast(pipe.vae.device.type, enabled=False):
        posterior = pipe.vae.encode(images.to(pipe.vae.device, pipe.vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def draw_latents(pipe: Pipe, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Latents as the denoiser wants them, (B, c, h, w): a sample of the posterior, shifted and scaled."""
    return (mean + std * noise - _shift(pipe)) * pipe.vae.config.scaling_factor


def decode_latents(pipe: Pipe, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) of latents as the denoiser gives them, in the autoencoder's own precision."""
    whole = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor + _shift(pipe)
    images: Tensor = pipe.vae.decode(whole, return_dict=False)[0]
    return images


def _shift(pipe: Pipe) -> float:
    return getattr(pipe.vae.config, "shift_factor", None) or 0.0


def encode_prompts(pipe: Pipe, prompts: Sequence[str]) -> Texts:
    """The denoiser's text arguments, each with one row a prompt. Carries gradients to the text encoders."""
    return kind_of(pipe).encode(pipe, prompts)


def native_size(pipe: Pipe) -> int:
    """Side in pixels of the square images that the model was made for."""
    return kind_of(pipe).native(pipe)


def warn_of_long(pipe: Pipe, prompts: Sequence[str] | Mapping[str, str]) -> None:
    """Tells on stderr which prompts no text encoder sees to their end: as they are, or by the names that they have."""
    kind = kind_of(pipe)
    tokenizers = {name: getattr(pipe, tokenizer_of(name)) for name in kind.readers(pipe)}
    named = prompts if isinstance(prompts, Mapping) else {prompt: prompt for prompt in prompts}
    for prompt, called in named.items():
        with _unwarned():
            unseen = min(
                len(tokenizer(prompt).input_ids) - kind.tokens.get(name, tokenizer.model_max_length)
                for name, tokenizer in tokenizers.items()
            )
        if unseen > 0:
            print(f"warning: the text encoder does not see the last {unseen} tokens of {called!r}", file=sys.stderr)


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
