"""What an adapter file remembers of its base model: a name, a hash of all shapes, and a few values."""

from __future__ import annotations

import json
from collections.abc import Collection
from hashlib import sha256
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
from torch import nn

from vismodal.quantised import is_quantised

SAMPLES = 16
DIGITS = 12  # of a hash
BANK = "_vismodal"  # attribute of a model that holds its adapters, which are no part of it


class Fingerprint(NamedTuple):
    """`shapes` must match for an adapter to fit; other `values` are another checkpoint of the same architecture."""

    name: str
    shapes: str  # hash of every parameter's name and shape
    values: str  # SAMPLES values as hexadecimal fp16, the same for a base in fp32, fp16 or bf16 up to rounding
    head: str = ""  # of a classification head, which is in neither: its shapes and values, each as above

    def same_values(self, other: Fingerprint) -> bool:
        """Equal up to the rounding of bf16. Values that are quantised or were never there (meta device) say nothing."""
        return _close(self.values, other.values)

    def same_head(self, other: Fingerprint) -> bool:
        """Whether heads of the same shapes have the same values too; others say nothing."""
        shapes, theirs = self.head[:DIGITS], other.head[:DIGITS]
        return shapes != theirs or _close(self.head[DIGITS:], other.head[DIGITS:])


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> Fingerprint:
    """Of a model as it is; `without` names parameters that change from task to task: a classification head."""
    return Fingerprint(base_name(model), *_looks([(n, p) for n, p in _own(model) if n not in without]))


def head_of(model: nn.Module, names: Collection[str]) -> str:
    """Of the parameters that `fingerprint` leaves out, as they are now; "" where there are none."""
    return "".join(_looks(head)) if (head := [(n, p) for n, p in _own(model) if n in names]) else ""


def _own(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if not n.startswith(f"{BANK}.")]


def _looks(params: list[tuple[str, nn.Parameter]]) -> tuple[str, str]:
    """A hash of names and shapes, and values."""
    shapes = sha256(json.dumps([(n, list(p.shape)) for n, p in params]).encode()).hexdigest()[:DIGITS]
    picked = [params[i * len(params) // SAMPLES][1] for i in range(SAMPLES)] if params else []
    hidden = [p.is_meta or is_quantised(p) for p in picked]  # quantising a checkpoint makes it no other one
    values = [
        float("nan") if unknown else p.detach().flatten()[p.numel() // 2].item()
        for p, unknown in zip(picked, hidden, strict=True)
    ]
    return shapes, np.array(values, "<f2").tobytes().hex()


def _close(some: str, others: str) -> bool:
    mine, theirs = (np.frombuffer(bytes.fromhex(values), "<f2").astype("f4") for values in (some, others))
    if len(mine) != len(theirs):
        return False
    return bool(np.all(np.isclose(mine, theirs, rtol=1e-2, atol=1e-4) | np.isnan(mine) | np.isnan(theirs)))


def base_name(model: nn.Module) -> str:
    """What the model calls itself: a timm architecture, a hub id or folder, else its class.

    Of a folder the end alone, and of the Hub's cache the id: where files lie on this machine is in no file of ours.
    """
    timm = getattr(model, "pretrained_cfg", None)
    name = timm.get("architecture") if isinstance(timm, dict) else None
    config = getattr(model, "config", None)
    name = name or getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    return _without_place(str(name or type(model).__name__))


def _without_place(name: str) -> str:
    """ "my-model/unet" of "/home/me/my-model/unet", "OWNER/NAME/unet" of a place in the Hub's cache; others as is."""
    path = PurePath(name)
    if not path.is_absolute() and path.parts[:1] not in ((".",), ("..",), ("~",)):
        return name
    at = next((i for i, part in enumerate(path.parts) if part.startswith("models--")), None)
    if at is not None:
        owner = path.parts[at].removeprefix("models--").replace("--", "/")
        return "/".join((owner, *path.parts[at + 3 :]))  # behind snapshots/HASH
    is_part = path.name.startswith(("unet", "transformer", "text_encoder"))
    return "/".join(path.parts[-2:]) if is_part and len(path.parts) > 2 else path.name or name
