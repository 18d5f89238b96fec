"""What is to be drawn: prompts with the adapters of their own, and many of them in one batch.

a photo of sks dog                             with the adapters that are given for all
a photo of sks dog <lora:dog:0.8>              with these alone, as web UIs write it (whatever the method)
a photo of sks dog <lora:dog> <lora:style:0.5>
a photo of a dog <lora:none>                   with none
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import vismodal as vm
from vismodal.diffusion.adapters import NONE, Shelf, Use
from vismodal.diffusion.generate import generate
from vismodal.diffusion.kinds import Flux, Pipe, kind_of
from vismodal.errors import InputError

_TAG = re.compile(r"<lora:([^:<>]*)(?::([^:<>]*))?>")
_LIKE_A_TAG = re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:", re.IGNORECASE)  # of web UIs, and slips of the pen


@dataclass(frozen=True)
class Request:
    """One picture: its prompt, its seed, and the adapters that act on it, in order."""

    prompt: str
    seed: int
    uses: tuple[Use, ...] = ()


@dataclass(frozen=True)
class Manner:
    """How pictures are drawn, the same for all of a batch: side in pixels, denoising steps, guidance."""

    size: int
    steps: int
    guidance: float
    negative: str = ""

    @classmethod
    def fitting(cls, pipe: Pipe, size: int | None, steps: int, guidance: float | None, negative: str = "") -> Manner:
        """With what is usual for the pipeline in the place of None. Raises `InputError` for what it cannot do."""
        kind = kind_of(pipe)
        size, step = size or kind.native(pipe), pipe.vae_scale_factor * kind.patch(pipe)
        if size < step or size % step:
            raise InputError(f"resolution must be a multiple of {step} for a {type(pipe).__name__}, not {size}")
        if negative and isinstance(kind, Flux):
            raise InputError("Flux has its guidance built in, and leads away from nothing; leave out negative")
        guidance = kind.guidance if guidance is None else guidance
        if negative and not guidance > 1:
            raise InputError(f"guidance {guidance:g} leads away from nothing; write one above 1, or leave out negative")
        return cls(size, steps, guidance, negative)


def usual(model: str | None, steps: int | None, guidance: float | None, threads: int | None) -> dict[str, Any]:
    """The settings `steps`, `guidance` and `threads`, filled in; the embedded model, which is no `model`, has its own.
    Guidance may stay None, for the kind of pipeline to say."""
    embedded = model is None
    return {
        "steps": steps or (20 if embedded else 25),
        "guidance": 4.0 if embedded and guidance is None else guidance,
        "threads": threads or (1 if embedded else torch.get_num_threads()),
    }


def parse_prompt(text: str, usual: Sequence[Use]) -> tuple[str, tuple[Use, ...]]:
    """The prompt without its tags, and its adapters: those of the tags, or the `usual` ones where there is none.

    Raises `InputError` for a tag that cannot be read, and for a prompt of nothing but tags.
    """
    tags = list(_TAG.finditer(text))
    if len(tags) != len(_LIKE_A_TAG.findall(text)):
        raise InputError(f"the tag in {text!r} is not whole; write <lora:NAME> or <lora:NAME:STRENGTH>")
    uses = tuple(_use(tag, text) for tag in tags)
    named = tuple(use for use in uses if use.name != NONE)
    if tags and len(named) < len(uses) and named:
        raise InputError(f"{text!r} asks for none and for {named[0].name}; write one of them")
    prompt = " ".join(_TAG.sub(" ", text).split()) if tags else text.strip()
    if not prompt:
        raise InputError(f"the prompt {text!r} says nothing; write what is to be drawn")
    return prompt, named if tags else tuple(usual)


def _use(tag: re.Match[str], text: str) -> Use:
    name, strength = tag[1].strip(), tag[2]
    try:
        found = Use(name, 1.0 if strength is None else float(strength))
    except ValueError:
        raise InputError(f"the strength in {text!r} is no number: {strength!r}; write <lora:{name}:0.8>") from None
    if not name or not abs(found.strength) < float("inf"):
        raise InputError(f"the tag {tag[0]} in {text!r} is not whole; write <lora:NAME> or <lora:NAME:STRENGTH>")
    return found


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file (UTF-8), one a line; empty lines and those that begin with # are left out.

    Raises `InputError` where there is no such file, or no prompt in it.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts in {path}: {error}; give a text file in UTF-8") from error
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise InputError(f"{path} holds no prompt; write one on each line")
    return found


def draw(
    pipe: Pipe, shelf: Shelf, requests: Sequence[Request], manner: Manner, batch: int = 4, what: str = "drawing"
) -> list[Image.Image]:
    """A picture for each request, `batch` at a time, whatever their adapters: as a run of each one alone gives it."""
    rows = [shelf.row(request.uses) for request in requests]
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(requests), batch), desc=what, unit="batch", leave=False):
        part = requests[start : start + batch]
        shelf.give(len(part))
        with vm.route(shelf.models, rows[start : start + batch]):
            images += generate(
                pipe,
                [shelf.spell(request.prompt, request.uses) for request in part],
                [request.seed for request in part],
                size=manner.size,
                steps=manner.steps,
                guidance=manner.guidance,
                negative=[shelf.spell(manner.negative, request.uses) for request in part],
                batch=batch,
            )
    return images
