"""What DreamBooth trains: a method on the denoiser and, if asked for, the text encoders; new words; or both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

import vismodal as vm
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.load import tokenizer_of
from vismodal.diffusion.presets import adapted, checkpoint_gradients, encoders_of, sites_of
from vismodal.diffusion.recipe import Adaptation, Recipe
from vismodal.diffusion.words import teach
from vismodal.draw import seed_of
from vismodal.entries import written
from vismodal.errors import InputError
from vismodal.methods import Method
from vismodal.runs import known

NONE = "none"  # the method of those who train new words alone
PLACES = ("sites", "where", "layers")  # of a method that is written for the denoiser


def adapt(config: Recipe, pipe: Pipe) -> vm.Adapter:
    """An adapter of all that is trained; the models are in training mode then, and the prompts may hold its words."""
    kind, models, methods = kind_of(pipe), dict[str, nn.Module](), list[Method]()
    if config.method != NONE:
        models |= adapted(pipe, config.train_text_encoder)
        methods += [placed(config, pipe, name) for name in models]
    if config.tokens:
        models |= encoders_of(pipe)
        methods += [new_words(config, pipe, name) for name in encoders_of(pipe)]
    denoiser = kind.model(pipe)
    for other in kind.modules(pipe):
        if other not in models.values():
            other.requires_grad_(False)  # it is not adapted, yet gradients may go through it, or past it (T5)
    adapter = vm.adapt(models, methods, name="dreambooth", seed=seed_of(config.seed, "adapter"))
    for model in models.values():
        model.train()
    if config.gradient_checkpointing:
        denoiser.train()
        checkpoint_gradients({kind.denoiser: denoiser, **models})
    teach(pipe, adapter)
    return adapter


def placed(config: Recipe, pipe: Pipe, name: str) -> Method:
    """The method on one of the pipeline's models. Raises `InputError` where it has no place there."""
    kind, model = kind_of(pipe), getattr(pipe, name)
    cls, options = method_of(config)
    if name != kind.denoiser:
        options = {option: value for option, value in options.items() if option not in PLACES}
        asked = config.text_sites if is_free(cls) or config.text_sites != Adaptation().text_sites else None
    else:
        asked = config.sites
    sites = options.get("sites") or (sites_of(model, asked, cls) if asked else _own_sites(cls, model))
    usual = {"where": within(name, model, sites), "layers": kind.layers.get(name)}
    return cls(**{**usual, **options, "sites": sites})


def within(name: str, model: nn.Module, kinds: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Globs on the paths of a model's sites of these kinds: some spans are over the whole model."""
    asked = (kinds,) if isinstance(kinds, str) else kinds
    paths = {site.path for site in vm.sites(model) if any(fnmatchcase(site.kind, kind) for kind in asked)}
    below = f"{name}.*"
    return below if "" not in paths else (name, below) if len(paths) > 1 else name


def method_of(config: Recipe) -> tuple[type[Method], Mapping[str, Any]]:
    """The class of the method and the options that are given. Raises `InputError` for what cannot be read."""
    if config.method is None:
        return vm.LoRA, {"rank": config.rank, "alpha": config.alpha, "dropout": config.dropout}
    read = written(config.method, own=())
    read.make()
    if read.method.calibrating is not Method.calibrating:
        raise InputError(f"{read.text} chooses by data what to train, which this command does not let it do")
    return read.method, read.options


def is_free(method: type[Method]) -> bool:
    """Whether a method goes on any matrix, so that presets of sites are meant for it: one with LoRA's default sites."""
    return method().sites == vm.LoRA().sites


def _own_sites(method: type[Method], model: nn.Module) -> tuple[str, ...]:
    found = method.takes(vm.sites(model))
    if not found:
        raise InputError(f"{method.__name__} has no place in a {type(model).__name__}; see vm.methods()")
    return found


# -- new words ---------------------------------------------------------------------------------------------------------


def read_tokens(config: Adaptation) -> dict[str, int]:
    """The new words and how many vectors each has: ("sks:4", "<cat>") is {"sks": 4, "<cat>": 1}.

    Raises `InputError` for a number that is none.
    """
    found: dict[str, int] = {}
    for text in config.tokens:
        match = re.fullmatch(r"(.*?\S)(?::(\d+))?", text)
        if match is None or match[1] in found or match[2] == "0":
            raise InputError(f"tokens are words, each once, with a number of vectors: sks or sks:4; not {text!r}")
        found[match[1]] = int(match[2] or 1)
    return found


def new_words(config: Recipe, pipe: Pipe, name: str) -> Method:
    """The new words of one text encoder."""
    tokens, tokenizer = read_tokens(config), getattr(pipe, tokenizer_of(name))
    begin = config.token_init * (len(tokens) if len(config.token_init) == 1 else 1)
    starts: list[int] = []
    for i, (word, n) in enumerate(tokens.items()):
        ids = tokenizer(begin[i] if begin else word, add_special_tokens=False).input_ids
        if begin and len(ids) > n:
            raise InputError(
                f"token_init {begin[i]!r} is {len(ids)} tokens of the {name}, and {word} has {n}; "
                f"write --tokens {word}:{len(ids)}, or a shorter word"
            )
        starts += [ids[j % len(ids)] for j in range(n)]
    return vm.TextualInversion(
        words=tuple(tokens),
        vectors=tuple(tokens.values()),
        starts=tuple(starts),
        where=_table_of(pipe, name),
        lr_ratio=config.token_learning_rate / known(config.learning_rate),
        until=config.token_steps,
    )


def _table_of(pipe: Pipe, name: str) -> str:
    """The path of what reads the ids in a text encoder. Raises `InputError` where new words have no place."""
    found = [site.path for site in vm.sites(getattr(pipe, name)) if vm.TextualInversion.fits(site)]
    if not found:
        raise InputError(f"new words have no place in the {name}, a {type(getattr(pipe, name)).__name__}")
    return f"{name}.{found[0]}".strip(".")
