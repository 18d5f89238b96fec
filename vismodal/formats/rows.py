"""Rows of one matrix as layers of their own, and such layers as one: halves of a GEGLU, q, k and v in one matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.formats.layers import Layer, algorithm, method_of, plain, scaled, scaling

Heights = Mapping[str, int]  # the rows of each part, in the order in which they stand

# tensors that have the weight's rows
_ROWS = {
    "lora": ("lora_up.weight", "dora_scale"),
    "loha": ("hada_w1_a", "hada_w2_a", "dora_scale"),
    "full": ("diff", "diff_b"),
}


def split(module: str, layer: Layer, heights: Heights) -> dict[str, dict[str, Tensor]]:
    """A layer as one for each part of its rows; what all parts read with (down, w_b) is shared.

    Raises `InputError` where the rows of a part are no layer of that method: of LoKr, of rotations across parts, of
    DoRA's magnitudes for columns.
    """
    name, layer, whole = algorithm(module, layer), plain(layer), list(heights.values())
    if name == "oft" and not _bounded(layer) and not any(h % layer["oft_blocks"].shape[1] for h in whole):
        blocks = [h // layer["oft_blocks"].shape[1] for h in whole]
        found = [{**layer, "oft_blocks": t} for t in layer["oft_blocks"].split(blocks)]
        if "rescale" in layer:
            found = [{**f, "rescale": t} for f, t in zip(found, layer["rescale"].split(whole), strict=True)]
        return dict(zip(heights, found, strict=True))
    cut = [n for n in _ROWS.get(name, ()) if n in layer]
    if not cut or any(len(layer[n]) != sum(whole) for n in cut):
        what = method_of(module, layer)
        raise InputError(f"{module}: {what} on {', '.join(heights)} as one matrix cannot be said of each by itself")
    pieces = {n: layer[n].split(whole) for n in cut}
    parts = ({**layer, **{n: t[i] for n, t in pieces.items()}} for i in range(len(whole)))
    return {part: _without_zeros(one) for part, one in zip(heights, parts, strict=True)}


def _without_zeros(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """LoRA without ranks whose `up` is zero, as `stack` leaves them in each part; at the same strength."""
    up = layer.get("lora_up.weight")
    kept = None if up is None else up.flatten(1).any(0)
    if up is None or kept is None or kept.all() or not kept.any():
        return layer
    strength, count = scaling(layer), int(kept.sum())
    down = layer["lora_down.weight"][kept]
    return {**layer, "lora_down.weight": down, "lora_up.weight": up[:, kept], "alpha": torch.tensor(strength * count)}


def stack(module: str, parts: Mapping[str, Layer], heights: Heights, instead: str) -> dict[str, Tensor]:
    """The layers of parts as one layer, with zeros where a part has none.

    Args:
        module: what errors name.
        parts: some or all of those in `heights`.
        heights: of all parts, in their order.
        instead: what errors advise.

    Raises `InputError` for methods that differ, or that no whole matrix can have.
    """
    kinds = {method_of(module, layer) for layer in parts.values()}
    one = next(iter(kinds))
    lacking = parts.keys() != heights.keys()
    if len(kinds) > 1 or one not in ("LoRA", "DoRA", "LoHa", "OFT", "full") or (lacking and one == "DoRA"):
        raise InputError(
            f"{module}: no file can say {' and '.join(sorted(kinds))} on {', '.join(parts)} of one matrix; {instead}"
        )
    parts = {part: plain(parts[part]) for part in heights if part in parts}
    return _STACKS[algorithm(module, next(iter(parts.values())))](parts, heights)


def _block(parts: Mapping[str, Layer], name: str, heights: Heights) -> Tensor:
    """Matrices height x r one below the other and beside each other, with zeros for a part that is not there."""
    found = {part: layer[name].flatten(1) for part, layer in parts.items()}
    whole = torch.zeros(sum(heights.values()), sum(t.shape[1] for t in found.values()))
    start = column = 0
    for part, height in heights.items():
        if part in found:
            width = found[part].shape[1]
            whole[start : start + height, column : column + width] = found[part]
            column += width
        start += height
    return whole


def _below(parts: Mapping[str, Layer], name: str, heights: Heights, fill: float = 0.0) -> Tensor:
    """Rows one below the other, with `fill` for a part that is not there."""
    like = next(layer[name] for layer in parts.values() if name in layer)
    return torch.cat([
        parts[p][name] if p in parts and name in parts[p] else torch.full((h, *like.shape[1:]), fill)
        for p, h in heights.items()
    ])  # fmt: skip


def _common(parts: Mapping[str, Layer], name: str) -> tuple[dict[str, dict[str, Tensor]], float]:
    """The parts with what their strengths differ by in `name`, and the strength that they then share."""
    strengths = {scaling(layer) for layer in parts.values()}
    common = strengths.pop() if len(strengths) == 1 else 1.0
    return {p: {**la, name: scaled(la[name], scaling(la) / common)} for p, la in parts.items()}, common


def _lora(parts: Mapping[str, Layer], heights: Heights) -> dict[str, Tensor]:
    parts, strength = _common(parts, "lora_up.weight")
    downs = [layer["lora_down.weight"] for layer in parts.values()]
    shared = all(torch.equal(downs[0], other) for other in downs[1:])  # as `split` gives it
    down = downs[0] if shared else torch.cat(downs)
    ups = {part: {"up": layer["lora_up.weight"].flatten(1)} for part, layer in parts.items()}
    joined = {
        "lora_down.weight": down,
        "lora_up.weight": (_below if shared else _block)(ups, "up", heights),
        "alpha": torch.tensor(strength * len(down)),
    }
    if all("dora_scale" in layer for layer in parts.values()):
        joined["dora_scale"] = _below(parts, "dora_scale", heights)
    return joined


def _loha(parts: Mapping[str, Layer], heights: Heights) -> dict[str, Tensor]:
    parts, strength = _common(parts, "hada_w1_a")
    joined: dict[str, Tensor] = {}
    for i in (1, 2):
        joined[f"hada_w{i}_a"] = _block(parts, f"hada_w{i}_a", heights)
        joined[f"hada_w{i}_b"] = torch.cat([layer[f"hada_w{i}_b"] for layer in parts.values()])
    return {**joined, "alpha": torch.tensor(strength * len(joined["hada_w1_b"]))}


def _bounded(layer: Layer) -> bool:
    """Whether a rotation is COFT's, whose bound is on all of a matrix."""
    return bool(layer.get("alpha"))


def _oft(parts: Mapping[str, Layer], heights: Heights) -> dict[str, Tensor]:
    size = next(iter(parts.values()))["oft_blocks"].shape[1]
    if any(_bounded(la) or la["oft_blocks"].shape[1] != size for la in parts.values()):
        raise InputError(f"rotations of {', '.join(parts)} that are bounded, or in blocks of other sizes, are not one")
    blocks = {part: height // size for part, height in heights.items()}
    joined = {"oft_blocks": _below(parts, "oft_blocks", blocks), "alpha": torch.tensor(0.0)}
    if any("rescale" in layer for layer in parts.values()):
        joined["rescale"] = _below(parts, "rescale", heights, 1.0)
    return joined


def _full(parts: Mapping[str, Layer], heights: Heights) -> dict[str, Tensor]:
    there = [name for name in ("diff", "diff_b") if any(name in layer for layer in parts.values())]
    return {name: _below(parts, name, heights) for name in there}


_STACKS = {"lora": _lora, "loha": _loha, "oft": _oft, "full": _full}
