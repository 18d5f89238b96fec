"""Methods as one writes them on a command line: `lora`, `lora(rank=4)`, `vpt(tokens=8, lr=5e-3)`.

A method is named by its class in any case. `written` reads one for every pipeline; `entry` is a contestant of the bench
on tiny-sd, of one method or of several that learn together, `lora + textualinversion`. What is not written there comes
from `SETTINGS`, which a new method joins by one line, or by none where its own defaults do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from vismodal.attach import slots
from vismodal.checkpoint import to_json
from vismodal.errors import InputError
from vismodal.methods import METHODS, Method, TextualInversion

if TYPE_CHECKING:
    from vismodal.diffusion.kinds import Pipe

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
    "DoRA": Setting(lr=3e-3, options={"sites": WEIGHTS}),
    "LoHa": Setting(options={"sites": WEIGHTS}),
    "LoKr": Setting(lr=1e-2, options={"sites": WEIGHTS}),
    "OFT": Setting(lr=1e-3, options={"sites": WEIGHTS}),
    "AdaptFormer": Setting(lr=3e-3),
    "Tune": Setting(lr=3e-4, options={"sites": WEIGHTS}),  # all of the UNet's matrices: full fine-tuning
    "TextualInversion": Setting(lr=5e-3, parts=("text_encoder",)),
}


@dataclass(frozen=True)
class Member:
    """A method of a contestant, its learning rate, and the parts of the pipeline that it adapts."""

    method: Method
    lr: float
    parts: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the outcome, as JSON values."""
        return {"method": to_json(self.method), "lr": self.lr, "parts": list(self.parts)}


@dataclass(frozen=True)
class Entry:
    """A contestant: what was written, and what that means."""

    label: str
    members: tuple[Member, ...]

    @property
    def slug(self) -> str:
        """The label as a file name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-").lower()

    @property
    def methods(self) -> list[Method]:
        """What its members do, which is one adapter's."""
        return [member.method for member in self.members]

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates by slot, for `adapter.groups`."""
        return {slot: m.lr for slot, m in zip(slots(self.methods), self.members, strict=True)}

    @property
    def parts(self) -> tuple[str, ...]:
        """Of the pipeline, all that it adapts."""
        return tuple(dict.fromkeys(part for member in self.members for part in member.parts))

    def models(self, pipe: Pipe) -> dict[str, nn.Module]:
        """The parts of a pipeline that it adapts."""
        return {part: getattr(pipe, part) for part in self.parts}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the outcome, as JSON values."""
        each = [member.identity for member in self.members]
        return each[0] if len(each) == 1 else {"methods": each}


def entry(text: str) -> Entry:
    """The contestant that `text` describes: NAME, NAME(option=value, ...), or several of them with + between.

    Raises `InputError` naming what there is.
    """
    parts = split(text, "+") or [text]
    return Entry(" + ".join(parts), tuple(_member(part) for part in parts))


def _member(text: str) -> Member:
    read = written(text, ("lr", "parts"))
    if read.method is TextualInversion and (wrong := [name for name in ("words", "ids") if name in read.options]):
        raise InputError(f"{text}: {wrong[0]} cannot be chosen here; the new word is the bench's own, --word")
    setting = SETTINGS.get(read.method.__name__, Setting())
    parts = read.own.get("parts", setting.parts)
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    if not parts or not set(parts) <= {"unet", "text_encoder"}:
        raise InputError(f"{text}: parts are of unet and text_encoder, not {', '.join(map(repr, parts)) or 'nothing'}")
    return Member(read.make(setting.options), read.own.get("lr", setting.lr), parts)


# -- what every pipeline reads alike -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What a text says: the class of a method, its options, and the settings of the caller's own."""

    text: str
    method: type[Method]
    options: Mapping[str, Any]
    own: Mapping[str, Any]

    def make(self, usual: Mapping[str, Any] | None = None) -> Method:
        """The method; options that are not written are the `usual` ones, or its defaults."""
        try:
            return self.method(**{**(usual or {}), **self.options})
        except TypeError as error:
            raise InputError(f"{self.text}: {error}") from error


def written(text: str, own: Sequence[str] = ("lr",)) -> Written:
    """Reads `name` or `name(option=value, ...)`; `own` are settings of the caller beside the method's options.

    Raises `InputError` naming what there is, for an unknown name or option, and an lr that is no positive number.
    """
    name, given = _parsed(text)
    known = {m.__name__.lower(): m for m in METHODS if not m.conditioned}  # `vismodal control` has those
    if name.lower() not in known:
        raise InputError(f"no method {name!r}; write one of {', '.join(known)}, or with options {EXAMPLE}")
    method = known[name.lower()]
    options = [f.name for f in fields(method)]
    if wrong := [option for option in given if option not in (*options, *own)]:
        raise InputError(f"{text}: {name} has no option {wrong[0]!r}; it has {', '.join((*own, *options))}")
    mine = {option: given.pop(option) for option in own if option in given}
    lr = mine.get("lr", 1.0)
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not lr > 0:
        raise InputError(f"{text}: lr must be a number above 0, not {lr!r}")
    if "lr" in mine:
        mine["lr"] = float(lr)
    return Written(text, method, given, mine)


def split(text: str, separators: str = ";,") -> list[str]:
    """The parts of a list of methods: only separators outside of brackets and quotes divide it."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote or c in "'\"":
            quote = "" if c == quote else quote or c
        depth += (c in "([{") - (c in ")]}") if not quote else 0
        if c in separators and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


EXAMPLE = "'lora(rank=4, sites=(\"attn.*\",), lr=2e-3)'"


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options: Python literals, `true`, `false` and `none` in any case, and slices."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            options = {k.arg: _value(k.value) for k in node.keywords if k.arg}
            if len(options) == len(node.keywords):  # otherwise there is a **
                return node.func.id, options
    except (SyntaxError, ValueError):
        pass
    raise InputError(f"{text!r} describes no method; write a name such as lora, or with options {EXAMPLE}")


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id.lower() in _WORDS:
        return _WORDS[node.id.lower()]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "slice" and node.args:
        return slice(*(_value(argument) for argument in node.args))
    return ast.literal_eval(node)


_WORDS = {"true": True, "false": False, "none": None}
