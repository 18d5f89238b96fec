"""What is compared on a classification task: methods as they are written, each with a new head and a learning rate.

contestant("lora(rank=8)")                    LoRA and the head
contestant("vpt(tokens=8) + bitfit")         two methods as one
contestant("linearprobe")                     the head alone; tune(sites=("*",)) is nearly full fine-tuning
trials(contestant("adaptformer"), 8, seed=0)  itself, and seven others in learning rate and scale
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

import vismodal.attach
from vismodal.checkpoint import to_json
from vismodal.draw import generator
from vismodal.entries import split, written
from vismodal.errors import InputError
from vismodal.methods import Method, Tune
from vismodal.selection import select

# between what was best on tiny-vit (benchmarks/results/methods.md) and a third of it, since larger models want less;
# `--tune` finds better ones
LEARNING_RATE = 3e-3
LEARNING_RATES = {
    "BitFit": 1e-2,
    "IA3": 3e-2,
    "LoKr": 1e-2,
    "NormTuning": 1e-2,
    "Prefix": 1e-2,
    "SideTuning": 3e-4,
    "Tune": 3e-4,
    "VPT": 1e-2,
    "VeRA": 3e-2,
}
_LONG = 80  # characters of a folder's name; file systems allow 255 bytes
FACTORS = (1.0, 0.3, 3.0, 0.1, 10.0)  # of learning rate and scale, the usual one first


@dataclass(frozen=True)
class Contestant:
    """Methods that are trained together, and how fast; `scale` multiplies how strongly they act (`scalable`)."""

    label: str
    methods: tuple[Method, ...]
    lr: float
    scale: float = 1.0

    @property
    def slug(self) -> str:
        """The label as a folder's name: its letters and digits, and a hash where that is not all it says."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-").lower()
        plain = len(name) <= _LONG and re.fullmatch(r"(?:[\w.+(), =]|(?<=\de)-)*", self.label, re.ASCII)
        return name if plain else f"{name[:_LONG]}-{hashlib.sha256(self.label.encode()).hexdigest()[:6]}"

    @property
    def scaled(self) -> tuple[Method, ...]:
        """The methods at `scale`."""
        return tuple(_times(method, self.scale) for method in self.methods)

    @property
    def scalable(self) -> bool:
        """Whether one of the methods has a scale of its own: LoRA's alpha, AdaptFormer's s."""
        return any(_times(method, 2.0) != method for method in self.methods)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the outcome, as JSON values."""
        return {"methods": [to_json(method) for method in self.scaled], "lr": self.lr}


def contestants(texts: tuple[str, ...], lr: float | None = None) -> list[Contestant]:
    """Of a list in which each text may hold several, divided by `;` or `,`; `lr` is for those that name none.

    Raises `InputError` for two equal ones.
    """
    found = [contestant(part, lr) for text in texts for part in split(text)]
    if not found:
        raise InputError('no method was given; write one such as lora, or several: "lora; vpt(tokens=8)"')
    slugs = [each.slug for each in found]
    for each in found:
        if slugs.count(each.slug) > 1:
            raise InputError(f"two of the methods are the same: {each.label}")
    return found


def contestant(text: str, lr: float | None = None) -> Contestant:
    """What `text` describes: one method or several joined by `+`, with options. The learning rate is the `lr` that is
    written there, else the one that is given here, else the method's usual one."""
    read = [written(part) for part in split(text, "+")]
    rates = {each.own["lr"] for each in read if "lr" in each.own}
    if len(rates) > 1:
        raise InputError(f"{text}: write one lr for all of its methods, not {' and '.join(map(str, sorted(rates)))}")
    usual = lr or min(LEARNING_RATES.get(each.method.__name__, LEARNING_RATE) for each in read)
    return Contestant(text.strip(), tuple(each.make() for each in read), rates.pop() if rates else usual)


def trials(each: Contestant, count: int, seed: int) -> list[Contestant]:
    """`count` variants in learning rate and, where it has one, scale: itself first, the others drawn from the grid of
    `FACTORS` in both. Fewer where the grid has fewer."""
    grid = list(itertools.product(FACTORS, FACTORS if each.scalable else (1.0,)))[1:]
    order = torch.randperm(len(grid), generator=generator(seed, "trials")).tolist()
    chosen = [grid[i] for i in order[: max(0, count - 1)]]
    return [each, *(replace(each, lr=each.lr * faster, scale=stronger) for faster, stronger in chosen)]


def attach(each: Contestant, model: nn.Module, seed: int) -> vismodal.attach.Adapter:
    """The contestant on a model whose head is new: its methods, and the head unless they have it already."""
    methods = list(each.scaled)
    if not any(_has_head(method, model) for method in methods):
        methods.append(Tune(sites=("head",)))
    return vismodal.attach.adapt(model, methods, "classify", seed=seed)


def _has_head(method: Method, model: nn.Module) -> bool:
    """Whether it trains all of the head."""
    if not isinstance(method, Tune):
        return False
    chosen = select(vismodal.attach.sites(model), method.sites, method.where, method.layers, method.fits)
    return any(site.kind == "head" for site in chosen)


def _times(method: Method, factor: float) -> Method:
    """The method acting `factor` times as strongly; unchanged where it has no such setting."""
    if factor == 1:
        return method
    names = {field.name for field in fields(method)}
    values: Any = method
    if "scaling" in names:
        return replace(values, scaling=values.scaling * factor)
    if {"alpha", "rank"} <= names:
        return replace(values, alpha=(values.rank if values.alpha is None else values.alpha) * factor)
    return method
