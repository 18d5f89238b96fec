"""Stronger and weaker adapters: a factor on what a file does, folded into its tensors, and the way between two files.

    write_saved(scale(read_saved("style.safetensors"), 0.7), "weaker.safetensors")
    halfway = interpolate(a, b, 0.5)                     W + 0.5 dW_a + 0.5 dW_b

A scaled file is the adapter at `adapter.scale = s`: W + s (W' - W). Where a tensor of the method is a factor of W' - W
that is exact (`FOLDS`), and so it is where gain and shift are: 1 + s (gain - 1), s shift. A trained copy needs the
base's values, and a rotation or a magnitude cannot be scaled at all: its interpolation is no rotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vismodal.checkpoint import header_of
from vismodal.errors import InputError
from vismodal.methods import (
    IA3,
    SSF,
    AdaLoRA,
    DyLoRA,
    FacT,
    LoHa,
    LoKr,
    LoRA,
    Method,
    PiSSA,
    RepAdapter,
    SparseMask,
    Tune,
    VeRA,
)
from vismodal.pruning import Keep
from vismodal.tools.combine import Recipe, Value
from vismodal.tools.live import Models, changes_on
from vismodal.tools.merge import Made, merge
from vismodal.tools.saved import NEEDS_BASE, Saved, check_is_weights

# tensors of which W' - W and b' - b are a multiple
FOLDS: Mapping[type[Method], tuple[str, ...]] = {
    LoRA: ("B",), DyLoRA: ("B",), PiSSA: ("B", "B0"), AdaLoRA: ("l",), VeRA: ("b",), FacT: ("V",), LoHa: ("w1a",),
    LoKr: ("w1", "w1a"), RepAdapter: ("B", "u"), SparseMask: ("value",), SSF: ("shift",), IA3: (),
}  # fmt: skip
GAINS: Mapping[type[Method], str] = {IA3: "l", SSF: "scale"}  # that multiply W


def scale(saved: Saved, strength: float, models: Models | None = None) -> Saved:
    """The same adapter at another strength: 0 is the base, 1 as it is, negative the opposite.

    Raises `InputError` for a method that cannot be scaled, and for a trained copy without `models`, the base by prefix.
    """
    if not math.isfinite(strength):
        raise InputError(f"the strength is a number, not {strength}")
    for method in saved.methods.values():
        check_is_weights(saved, method)
        if type(method) not in FOLDS and not isinstance(method, Tune):
            raise InputError(
                f"{saved.name}: no tensors of {type(method).__name__} are its change at another strength. Set "
                "adapter.scale where it runs, bake it at a strength, or merge it into a LoRA (--model and --rank)"
            )
    tensors = {k: _folded(saved.methods[k.partition("/")[0]], k, t, strength) for k, t in saved.tensors.items()}
    copies = [slot for slot, method in saved.methods.items() if isinstance(method, Tune)]
    if copies and strength != 1:
        if models is None:
            raise InputError(f"{saved.name}: {', '.join(copies)} holds trained copies, whose change {NEEDS_BASE}")
        tensors |= _moved(saved, copies, strength, models)
    return Saved(saved.name, saved.header, tensors)


def _folded(method: Method, key: str, tensor: Tensor, strength: float) -> Tensor:
    name = key.rpartition(".")[2]
    if name == GAINS.get(type(method)):
        return 1 + strength * (tensor - 1)
    return strength * tensor if name in FOLDS.get(type(method), ()) else tensor


def _moved(saved: Saved, slots: Sequence[str], strength: float, models: Models) -> dict[str, Tensor]:
    """W + strength (V - W) of trained copies V."""
    alone = {k: t for k, t in saved.tensors.items() if k.partition("/")[0] in slots}
    methods = {slot: saved.methods[slot] for slot in slots}
    found = changes_on(models, Saved(saved.name, header_of(methods, saved.bases), alone))
    state = dict(alone)
    for key, tensor in alone.items():
        change = found.get(key.partition("/")[2].rpartition(".")[0])  # none where it is as in the base
        if isinstance(change, Value) and change.W is not None:
            state[key] = torch.lerp(change.W, change.V, strength).to(tensor.dtype)
    return state


def interpolate(a: Saved, b: Saved, share: float, keep: Keep | None = None, models: Models | None = None) -> Made:
    """W + (1 - share) dW_a + share dW_b: a at 0, b at 1. The ranks add up unless `keep` says otherwise."""
    return merge([a, b], [1 - share, share], Recipe("linear"), keep, models)
