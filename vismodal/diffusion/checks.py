"""The settings of DreamBooth filled in: by the model's kind, by what was written. What makes no sense is told here."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from vismodal import runs
from vismodal.data.subject import CLASS_PROMPT, PROMPT
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.objective import weights_of
from vismodal.diffusion.prompts import check_class, check_subject, without_word
from vismodal.diffusion.recipe import BY_MODEL, PHOTO, Recipe
from vismodal.errors import InputError

Chosen = TypeVar("Chosen", bound=Recipe)


def checked(config: Chosen) -> Chosen:
    """The settings with prompt and class prompt filled in. Raises `InputError` for what makes no sense."""
    if config.prompt is None and config.photos is not None:
        raise InputError(f'the prompt is missing; write what the photos show, such as --prompt "{PHOTO}"')
    embedded = config.model is None
    if config.learning_rate is None and config.optimizer == "prodigy":
        config = replace(config, learning_rate=1.0)
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
    if config.prior_by != "images" and not config.prior:
        raise InputError(f"prior_by {config.prior_by} says how the class is kept, but its weight is 0; write --prior 1")
    for name in ("caption_dropout", "mask_floor", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 0 and less than 1, not {getattr(config, name)}")
    if config.resolution is not None and (config.resolution < 8 or config.resolution % 8):
        raise InputError(f"resolution must be a multiple of 8, not {config.resolution}")
    new = tuple(f"{prompt} on a {colour} background" for colour in ("white", "orange"))  # no photo has these
    samples = config.sample_prompts or (new if config.photos is None else (prompt,))
    return replace(config, prompt=prompt, class_prompt=class_prompt, sample_prompts=samples)


def fitted(config: Chosen, pipe: Pipe) -> Chosen:
    """The settings with what hangs on the model filled in. Raises `InputError` for what it cannot do."""
    kind = kind_of(pipe)
    size, step = config.resolution or kind.native(pipe), pipe.vae_scale_factor * kind.patch(pipe)
    if size % step:
        raise InputError(f"resolution must be a multiple of {step} for a {type(pipe).__name__}, not {size}")
    weights_of(config).process(pipe)
    return replace(config, resolution=size, guidance=kind.guidance if config.guidance is None else config.guidance)
