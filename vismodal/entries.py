"""The contestants of a benchmark, written as one writes a method: `lora`, `lora(rank=4)`, `tune(sites=("norm",))`.

A method is named by its class in any case. What is not written comes from `SETTINGS`, which a new method joins by one
line, or by none where its own defaults do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from vismodal.checkpoint import to_json
from vismodal.errors import InputError
from vismodal.methods import METHODS, Method

if TYPE_CHECKING:
    from vismodal.diffusion import Pipe

WEIGHTS = ("attn.*", "xattn.*", "mlp.*", "conv")  # of a UNet


@dataclass(frozen=True)
class Setting:
    """How a method runs on tiny-sd unless its entry says otherwise.

    Args:
        lr: AdamW's learning rate, the best of those that were tried (LOG.md).
        parts: of the pipeline that it adapts: "unet", "text_encoder".
        options: fields of the method that differ from its defaults.
    """

    lr: float = 1e-3
    parts: tuple[str, ...] = ("unet",)
    options: Mapping[str, Any] = field(default_factory=dict)


SETTINGS = {
    "LoRA": Setting(lr=3e-3, options={"sites": WEIGHTS}),
    "Tune": Setting(lr=3e-4, options={"sites": WEIGHTS}),  # all of the UNet's matrices: full fine-tuning
}


@dataclass(frozen=True)
class Entry:
    """A contestant: what was written, and what that means."""

    label: str
    method: Method
    lr: float
    parts: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The label as a file name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-").lower()

    def models(self, pipe: Pipe) -> dict[str, nn.Module]:
        """The parts of a pipeline that it adapts."""
        return {part: getattr(pipe, part) for part in self.parts}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the outcome, as JSON values."""
        return {"method": to_json(self.method), "lr": self.lr, "parts": list(self.parts)}


def entry(text: str) -> Entry:
    """The contestant that `text` describes. Raises `InputError` naming what there is."""
    name, given = _parsed(text)
    known = {m.__name__.lower(): m for m in METHODS}
    if name.lower() not in known:
        raise InputError(f"no method {name!r}; write one of {', '.join(known)}, or with options {EXAMPLE}")
    method = known[name.lower()]
    setting = SETTINGS.get(method.__name__, Setting())
    lr, parts = given.pop("lr", setting.lr), given.pop("parts", setting.parts)
    options = [f.name for f in fields(method)]
    if wrong := [option for option in given if option not in options]:
        raise InputError(f"{text}: {name} has no option {wrong[0]!r}; it has lr, parts, {', '.join(options)}")
    if not isinstance(lr, int | float) or not lr > 0:
        raise InputError(f"{text}: lr must be a number above 0, not {lr!r}")
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    if not parts or not set(parts) <= {"unet", "text_encoder"}:
        raise InputError(f"{text}: parts are of unet and text_encoder, not {', '.join(map(repr, parts)) or 'nothing'}")
    try:
        return Entry(text, method(**{**setting.options, **given}), float(lr), parts)
    except TypeError as error:
        raise InputError(f"{text}: {error}") from error


EXAMPLE = "'lora(rank=4, sites=(\"attn.*\",), lr=2e-3)'"


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options, which are Python literals."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            options = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
            if len(options) == len(node.keywords):  # otherwise there is a **
                return node.func.id, options
    except (SyntaxError, ValueError):
        pass
    raise InputError(f"{text!r} describes no method; write a name such as lora, or with options {EXAMPLE}")
