"""The halves of a GEGLU's matrix, which our sites `proj:up` and `proj:gate` adapt apart, as one layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.formats.layers import Layer, algorithm, method_of, scaled, scaling

_PLACES = {"up": 0, "gate": 1}  # the rows in which each stands
_WHOLE = {"", "in"}


def join(module: str, parts: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The parts of one layer as one, with zeros where a half has none.

    Args:
        module: what errors name.
        parts: by the part of our site's key: "" or "in" for the whole, "up", "gate".

    Raises `InputError` for parts or methods that no whole layer can say.
    """
    if len(parts) == 1 and parts.keys() <= _WHOLE:
        return dict(next(iter(parts.values())))
    if not parts.keys() <= _PLACES.keys():
        raise InputError(f"{module} is adapted in parts ({', '.join(parts)}); diffusers has only {', '.join(_PLACES)}")
    kinds = {method_of(module, layer) for layer in parts.values()}
    one = next(iter(kinds))
    half = len(parts) == 1
    if len(kinds) > 1 or one not in ("LoRA", "DoRA", "LoHa", "OFT", "full") or (half and one == "DoRA"):
        what = f"the {next(iter(parts))} half" if half else "the halves"
        raise InputError(
            f'{module}: no file can say {" and ".join(sorted(kinds))} on {what} of one matrix; adapt sites=("mlp.in",)'
        )
    return _JOINS[algorithm(module, next(iter(parts.values())))](parts)


def _block(parts: Mapping[str, Layer], name: str, height: int) -> Tensor:
    """Matrices height x r one below the other and beside each other, with zeros for a half that is not there."""
    found = {part: layer[name].flatten(1) for part, layer in parts.items()}
    whole = torch.zeros(2 * height, sum(t.shape[1] for t in found.values()))
    column = 0
    for part, t in found.items():
        start = _PLACES[part] * height
        whole[start : start + height, column : column + t.shape[1]] = t
        column += t.shape[1]
    return whole


def _stacked(parts: Mapping[str, Layer], name: str) -> Tensor:
    """The halves' rows one below the other, with zeros for a half that is not there."""
    some = next(iter(parts.values()))[name]
    return torch.cat([parts[p][name] if p in parts else torch.zeros_like(some) for p in _PLACES])


def _common(parts: Mapping[str, Layer], name: str) -> tuple[dict[str, dict[str, Tensor]], float]:
    """The parts with what their strengths differ by in `name`, and the strength that they then share."""
    strengths = {scaling(layer) for layer in parts.values()}
    common = strengths.pop() if len(strengths) == 1 else 1.0
    return {p: {**la, name: scaled(la[name], scaling(la) / common)} for p, la in parts.items()}, common


def _lora(parts: Mapping[str, Layer]) -> dict[str, Tensor]:
    parts, strength = _common(parts, "lora_up.weight")
    down = torch.cat([layer["lora_down.weight"] for layer in parts.values()])
    height = len(next(iter(parts.values()))["lora_up.weight"])
    joined = {
        "lora_down.weight": down,
        "lora_up.weight": _block(parts, "lora_up.weight", height),
        "alpha": torch.tensor(strength * len(down)),
    }
    if all("dora_scale" in layer for layer in parts.values()):
        joined["dora_scale"] = _stacked(parts, "dora_scale")
    return joined


def _loha(parts: Mapping[str, Layer]) -> dict[str, Tensor]:
    parts, strength = _common(parts, "hada_w1_a")
    height = len(next(iter(parts.values()))["hada_w1_a"])
    joined: dict[str, Tensor] = {}
    for i in (1, 2):
        joined[f"hada_w{i}_a"] = _block(parts, f"hada_w{i}_a", height)
        joined[f"hada_w{i}_b"] = torch.cat([layer[f"hada_w{i}_b"] for layer in parts.values()])
    return {**joined, "alpha": torch.tensor(strength * len(joined["hada_w1_b"]))}


def _oft(parts: Mapping[str, Layer]) -> dict[str, Tensor]:
    some = next(iter(parts.values()))
    joined = {"oft_blocks": _stacked(parts, "oft_blocks"), "alpha": torch.tensor(0.0)}
    if any("rescale" in layer for layer in parts.values()):
        ones = torch.ones(some["oft_blocks"].shape[0] * some["oft_blocks"].shape[1], 1)
        joined["rescale"] = torch.cat([parts.get(p, {}).get("rescale", ones) for p in _PLACES])
    return joined


def _full(parts: Mapping[str, Layer]) -> dict[str, Tensor]:
    return {"diff": _stacked(parts, "diff")}


_JOINS = {"lora": _lora, "loha": _loha, "oft": _oft, "full": _full}
