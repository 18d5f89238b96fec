"""The settings of DreamBooth filled in: by the model's kind, by what was written. What makes no sense is told here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

import torch

from vismodal import runs
from vismodal.data.subject import CLASS_PROMPT, PROMPT
from vismodal.diffusion.adapting import NONE, is_free, method_of, read_tokens
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.objective import is_masked, weights_of
from vismodal.diffusion.processes import Flow
from vismodal.diffusion.prompts import check_class, check_subject, has_word, without_word
from vismodal.diffusion.recipe import BY_MODEL, PHOTO, Adaptation, Recipe, Task
from vismodal.diffusion.subjects import Shown, subjects_of
from vismodal.errors import InputError
from vismodal.runs import known

Chosen = TypeVar("Chosen", bound=Recipe)


def checked(config: Chosen) -> Chosen:
    """The settings with prompts and class prompts filled in. Raises `InputError` for what makes no sense."""
    if config.prompt is None and config.photos is not None:
        raise InputError(f'the prompt is missing; write what the photos show, such as --prompt "{PHOTO}"')
    check_adaptation(config)
    check_idle(config)
    embedded = config.model is None
    if config.learning_rate is None and config.optimizer == "prodigy":
        config = replace(config, learning_rate=1.0)
    if config.threads is None:
        config = replace(config, threads=1 if embedded else torch.get_num_threads())
    unset = {name: values[embedded] for name, values in BY_MODEL.items() if getattr(config, name) is None}
    if has_own_places(config):
        unset["sites"] = config.sites
    config = replace(config, **unset)  # type: ignore[arg-type]
    config = checked_subjects(config) if config.subjects else checked_subject(config)
    runs.at_least(config, 1, "batch", "threads", "class_images", "sample_count", "sample_steps", "keep", "rank")
    runs.at_least(
        config, 0, "prior", "min_snr", "offset_noise", "sample_every", "save_every", "learning_rate", "weight_decay"
    )
    if config.resolution is not None and (config.resolution < 8 or config.resolution % 8):
        raise InputError(f"resolution must be a multiple of 8, not {config.resolution}")
    check_shares(config)
    if config.tokens:
        check_tokens(config)
    if config.prior:
        check_classes(config)
    return config


def check_shares(config: Recipe) -> None:
    """Raises `InputError` for shares and decays that are none, and for a manner of keeping the class with no weight."""
    for name in ("caption_dropout", "mask_floor", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 0 and less than 1, not {getattr(config, name)}")
    if config.prior_by != "images" and not config.prior:
        raise InputError(f"prior_by {config.prior_by} says how the class is kept, but its weight is 0; write --prior 1")


def checked_subject(config: Chosen) -> Chosen:
    """With the prompts of the one subject."""
    prompt, word = config.prompt or PROMPT, config.subject
    check_subject(prompt, word)
    class_prompt = config.class_prompt
    if config.prior:
        class_prompt = class_prompt or (CLASS_PROMPT if prompt == PROMPT else without_word(prompt, word))
        check_class(class_prompt, word)
    new = tuple(f"{prompt} on a {colour} background" for colour in ("white", "orange"))  # no photo has these
    samples = config.sample_prompts or (new if config.photos is None else (prompt,))
    return replace(config, prompt=prompt, class_prompt=class_prompt, sample_prompts=samples)


def checked_subjects(config: Chosen) -> Chosen:
    """With the class prompts of several subjects."""
    own = ("photos", "prompt", "class_prompt", "class_folder")
    beside = [name for name in own if getattr(config, name) is not None]
    if beside or config.subject != Task().subject:
        raise InputError(f"{(*beside, 'subject')[0]} is each subject's own; write it within subjects")
    found = list(config.subjects)
    if config.prior:
        found = [replace(s, class_prompt=s.class_prompt or without_word(s.prompt, s.subject)) for s in found]
    for i, each in enumerate(found):
        check_subject(each.prompt, each.subject)
        if config.prior:
            check_class(each.class_prompt or "", each.subject)
        if any(has_word(each.prompt, other.subject) for other in found[:i] + found[i + 1 :]):
            raise InputError(f"the prompt {each.prompt!r} has another subject's word; each subject needs its own")
    prompts = tuple(each.prompt for each in found)
    return replace(config, subjects=tuple(found), sample_prompts=config.sample_prompts or prompts)


def check_adaptation(config: Recipe) -> None:
    """Raises `InputError` for settings of what is trained that contradict each other, or leave nothing to train."""
    if config.method is not None:
        usual = Adaptation()
        beside = [name for name in ("rank", "alpha", "dropout") if getattr(config, name) != getattr(usual, name)]
        if beside:
            raise InputError(
                f"{beside[0]} is the default LoRA's, and the method is {config.method}; "
                f'write --method "lora({beside[0]}={getattr(config, beside[0])})" or the like'
            )
    if config.method == NONE:
        if not config.tokens:
            raise InputError("method none leaves nothing to train; write --tokens too, such as --tokens sks")
        if config.train_text_encoder or config.sites:
            raise InputError("method none trains new words alone; leave out train_text_encoder and sites")
    elif "sites" in method_of(config)[1] and config.sites:
        raise InputError(f"sites are said twice, in {config.method} and as {', '.join(config.sites)}; leave out one")
    if not config.tokens and (config.token_init or config.token_steps is not None):
        raise InputError("token_init and token_steps are about new words; write --tokens too, such as --tokens sks")


def check_idle(config: Recipe) -> None:
    """Raises `InputError` for a setting that another one leaves without any effect."""
    class_images = ("class_images", "class_folder")
    told = (
        (not config.prior, ("class_prompt", "class_folder"), "the class, which is not kept; write --prior 1 too"),
        (config.prior_by == "photos", class_images, "class images, and prior_by photos has none; leave it out"),
        (not config.masks, ("mask_floor",), "masks, which are not read; leave it out, or write --masks true"),
        (not config.tokens, ("token_learning_rate",), "new words; write --tokens too, such as --tokens sks"),
        (not config.train_text_encoder, ("text_sites",), "text encoders; write --train_text_encoder too"),
    )
    usual = {field.name: field.default for field in fields(Recipe)}
    for idle, names, about in told:
        for name in names if idle else ():
            if getattr(config, name) != usual[name] or any(getattr(s, name, None) for s in config.subjects):
                raise InputError(f"{name} is about {about}")


def check_classes(config: Recipe) -> None:
    """Raises `InputError` for classes that cannot be kept as they are said to be."""
    folders: dict[Path, str] = {}
    for subject in subjects_of(config):
        prompt, folder = known(subject.class_prompt), subject.class_folder
        for word in read_tokens(config):
            if has_word(prompt, word):
                raise InputError(
                    f"the class prompt {prompt!r} has the new word {word!r}, which the model does not know yet; "
                    "write a class_prompt without it"
                )
        if folder and folders.setdefault(folder, prompt) != prompt:
            raise InputError(
                f"the class_folder {folder} is of two class prompts, {folders[folder]!r} and {prompt!r}; give each its "
                "own, or leave it out"
            )
    if config.method == NONE:
        raise InputError(
            "prior keeps the class, and method none trains new words alone, which class prompts do not have: nothing "
            "could change it; write --prior 0"
        )


def has_own_places(config: Recipe) -> bool:
    """Whether the presets of sites are not meant for the method: it has sites of its own, or was given some."""
    if config.method == NONE:
        return True
    method, options = method_of(config)
    return "sites" in options or not is_free(method)


def check_tokens(config: Recipe) -> None:
    """Raises `InputError` for new words that no photo's prompt has, and settings that do not fit them."""
    tokens, prompts = read_tokens(config), [each.prompt for each in subjects_of(config)]
    for word in tokens:
        if not any(has_word(prompt, word) for prompt in prompts):
            raise InputError(f"the new token {word!r} is not in the prompt {prompts[0]!r}, and would learn nothing")
    if len(config.token_init) not in (0, 1, len(tokens)):
        raise InputError(
            f"{len(tokens)} tokens have {len(config.token_init)} words in token_init; give one, or one each"
        )
    for name in ("token_learning_rate", "learning_rate"):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} must be above 0 where new tokens are trained, not {getattr(config, name)}")
    if config.token_steps is not None and config.token_steps < 1:
        raise InputError(f"token_steps must be at least 1, not {config.token_steps}")
    if config.method == NONE and config.token_steps and config.token_steps < known(config.steps):
        raise InputError(f"with method none nothing learns after token_steps; write --steps {config.token_steps}")


def check_read(config: Recipe, subjects: Sequence[Shown]) -> None:
    """Raises `InputError` for what the photos, now that they are read, leave without any effect."""
    if config.mask_floor and not is_masked(subjects):
        raise InputError(
            "mask_floor is about masks, and no photo has one; put NAME.mask.png beside it, or leave it out"
        )
    said = [prompt for shown in subjects for prompt in shown.prompts]
    for word in read_tokens(config):
        if not any(has_word(prompt, word) for prompt in said):
            raise InputError(
                f"the new token {word!r} is in the caption of no photo, and would learn nothing; "
                "write it into captions, or --captions false"
            )


def fitted(config: Chosen, pipe: Pipe) -> Chosen:
    """The settings with what hangs on the model filled in. Raises `InputError` for what it cannot do."""
    kind = kind_of(pipe)
    size, step = config.resolution or kind.native(pipe), pipe.vae_scale_factor * kind.patch(pipe)
    if size % step:
        raise InputError(f"resolution must be a multiple of {step} for a {type(pipe).__name__}, not {size}")
    process = weights_of(config).process(pipe)
    if config.levels != Recipe().levels and not isinstance(process, Flow):
        raise InputError("levels are of flow matching, and this model is trained by diffusion; leave them out")
    return replace(config, resolution=size, guidance=kind.guidance if config.guidance is None else config.guidance)
