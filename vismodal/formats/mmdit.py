"""SD3's and Flux's transformers by the names of their original form, in which kohya's scripts train them.

There q, k and v are one matrix, and Flux's single blocks have the MLP's first layer in it too (`linear1`). A LoRA on
such a matrix is one on each of its parts, that share A; and LoRA on the parts is one on the whole, whose ranks are the
parts' one after the other. The last modulations have shift before scale there, and scale before shift in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.formats.layers import Layer, Layers, algorithm, rows
from vismodal.formats.rows import split, stack

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

# modules of a block in the original, and what they are in diffusers
_DOUBLE = {
    "img_attn.qkv": _QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": _ADDED,
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_JOINT = {
    "x_block.attn.qkv": _QKV,
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": _ADDED,
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_BLOCKS = {
    "flux": {
        "double_blocks": ("transformer_blocks", _DOUBLE),
        "single_blocks": ("single_transformer_blocks", _SINGLE),
    },
    "sd3": {"joint_blocks": ("transformer_blocks", _JOINT)},
}
KINDS = tuple(_BLOCKS)
_EMBEDDER = "time_text_embed"
_TOP = {
    "flux": {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": f"{_EMBEDDER}.timestep_embedder.linear_1",
        "time_in.out_layer": f"{_EMBEDDER}.timestep_embedder.linear_2",
        "vector_in.in_layer": f"{_EMBEDDER}.text_embedder.linear_1",
        "vector_in.out_layer": f"{_EMBEDDER}.text_embedder.linear_2",
        "guidance_in.in_layer": f"{_EMBEDDER}.guidance_embedder.linear_1",
        "guidance_in.out_layer": f"{_EMBEDDER}.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    "sd3": {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": f"{_EMBEDDER}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{_EMBEDDER}.timestep_embedder.linear_2",
        "y_embedder.mlp.0": f"{_EMBEDDER}.text_embedder.linear_1",
        "y_embedder.mlp.2": f"{_EMBEDDER}.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
}
_PLACE = re.compile(r"(\w+?)[._](\d+)[._](.+)")
_MLP = 4  # the rows of `proj_mlp` for one of `to_q`


def kind_of(name: str) -> str | None:
    """ "flux" or "sd3", by the name of a module in a block, with underscores as kohya writes it; None for others."""
    return next((kind for kind, blocks in _BLOCKS.items() if name.startswith(tuple(f"{h}_" for h in blocks))), None)


def paths_of(name: str, kind: str) -> tuple[str, ...]:
    """The modules in diffusers that one of the original is: several, where it holds them in one matrix.

    Args:
        name: with underscores, `double_blocks_0_img_attn_qkv`.
        kind: "flux" or "sd3".

    Raises `InputError` for a name that is not there.
    """
    top = {original.replace(".", "_"): path for original, path in _TOP[kind].items()}
    if name in top:
        return (top[name],)
    found = _PLACE.fullmatch(name)
    head, table = _BLOCKS[kind].get(found[1], ("", {})) if found else ("", {})
    for original, parts in table.items():
        if found and original.replace(".", "_") == found[3]:
            return tuple(f"{head}.{found[2]}.{part}" for part in parts)
    raise InputError(f"the transformer of {kind} has no module {name}")


def apart(name: str, paths: tuple[str, ...], layer: Layer) -> Layers:
    """A layer of the original by the modules that `paths_of` gave. Raises `InputError` where it is no layer of each."""
    if len(paths) == 1:
        return {paths[0]: _turned(paths[0], layer)}
    unit = rows(layer) // (len(paths) if len(paths) == 3 else 3 + _MLP)
    return split(name, layer, dict.fromkeys(paths[:3], unit) | dict.fromkeys(paths[3:], _MLP * unit))


def to_original(layers: Mapping[str, Layer], kind: str) -> Layers:
    """Layers by paths in diffusers' transformer as those of the original, by its paths.

    Raises `InputError` for a path that is not there, and for parts that cannot be one layer.
    """
    top = {path: original for original, path in _TOP[kind].items()}
    whole: Layers = {}
    fused: dict[str, dict[str, Layer]] = {}
    order: dict[str, tuple[str, ...]] = {}
    for path, layer in layers.items():
        if path in top:
            whole[top[path]] = _turned(path, layer)
            continue
        original, parts = _place(path, kind)
        if len(parts) == 1:
            whole[original] = _turned(path, layer)
        else:
            fused.setdefault(original, {})[path] = layer
            order[original] = parts
    for original, parts_there in fused.items():
        paths = order[original]
        unit = max(rows(la) // (_MLP if p in paths[3:] else 1) for p, la in parts_there.items())
        heights = {path: _MLP * unit if path in paths[3:] else unit for path in paths}
        whole[original] = stack(original, parts_there, heights, "adapt them by one method, all of them for DoRA")
    return whole


def _place(path: str, kind: str) -> tuple[str, tuple[str, ...]]:
    """The original's module that a path is (a part of), and the paths of all its parts."""
    found = _PLACE.fullmatch(path)
    for head, (ours, table) in _BLOCKS[kind].items():
        if found is None or found[1] != ours:
            continue
        for original, parts in table.items():
            if found[3] in parts:
                return f"{head}.{found[2]}.{original}", tuple(f"{ours}.{found[2]}.{part}" for part in parts)
    raise InputError(f"kohya's files of {kind} have no name for transformer.{path}; leave it out")


def _turned(path: str, layer: Layer) -> dict[str, Tensor]:
    """A modulation of shift and scale alone with its halves the other way round; anything else as it is."""
    down = layer.get("lora_down.weight", layer.get("hada_w1_b", layer.get("diff")))
    last = path.endswith(("norm_out.linear", "norm1_context.linear"))
    if not last or (down is not None and rows(layer) != 2 * down.shape[1]):
        return dict(layer)
    if algorithm(path, layer) not in ("lora", "loha", "full"):
        raise InputError(f"{path}: shift and scale stand the other way round in the original; no file can say that")
    turned = ("lora_up.weight", "dora_scale", "hada_w1_a", "hada_w2_a", "diff", "diff_b")
    return {name: torch.roll(t, len(t) // 2, 0) if name in turned else t for name, t in layer.items()}
