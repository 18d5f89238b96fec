"""open_clip's CLIP in the words of transformers' `CLIPModel`: state dict to state dict, config to config.

The two differ in names; in `nn.MultiheadAttention`'s fused rows (q, k, v), which transformers keeps apart; and in the
projections, x @ P there and x @ W.T here. What transformers' CLIP has no words for raises by its name, and every tensor
must find its place: nothing is lost in silence. What is equal either way passes: `final_ln_after_pool` on a class token
(the norm works token by token), and sine positions, which are tensors like others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vismodal.errors import InputError

HAS = "transformers' CLIP"
_PLAIN_LAYER = {
    "ls_init_value": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
# Fields of open_clip's config, and the one value of each that transformers' CLIP has.
_ONLY: dict[str, dict[str, Any]] = {
    "model_cfg": {"init_logit_bias": None, "multimodal_cfg": None},
    "vision_cfg": {
        **_PLAIN_LAYER,
        "timm_model_name": None,
        "attentional_pool": False,
        "no_ln_pre": False,
        "pool_type": "tok",
        "patch_dropout": 0.0,
    },
    "text_cfg": {
        **_PLAIN_LAYER,
        "hf_model_name": None,
        "embed_cls": False,
        "no_causal_mask": False,
        "proj_type": "linear",
        "proj_bias": False,
    },
}
_HINTS = {"patch_dropout": "; it acts in training only: write model.visual.patch_dropout = torch.nn.Identity()"}

_TENSORS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_LAYERS = {"visual.transformer.resblocks": "vision", "transformer.resblocks": "text"}
_LAYER = {
    "ln_1.": ("layer_norm1.",),
    "ln_2.": ("layer_norm2.",),
    "attn.in_proj_": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    "attn.out_proj.": ("self_attn.out_proj.",),
    "mlp.c_fc.": ("mlp.fc1.",),
    "mlp.c_proj.": ("mlp.fc2.",),
}


class Ids(NamedTuple):
    """The special ids of a tokenizer, and the largest that it gives."""

    bos: int
    eos: int
    pad: int
    largest: int


def to_transformers(
    state: Mapping[str, Tensor], model_cfg: Mapping[str, Any], ids: Ids
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a `CLIPModel`, in fp32, and its `config.json`.

    Args:
        state: the state dict of a `CLIP`, or of a `CustomTextCLIP` (names with "text.").
        model_cfg: what `open_clip_config.json` has under that name; `model_cfg_of` reads it from a model.
        ids: the special ids of the model's tokenizer.

    Raises `InputError` naming what transformers' CLIP cannot be: a setting, or a tensor too many or too few.
    """
    config = _config(model_cfg, ids)
    mine = {name.removeprefix("text."): tensor.detach().float() for name, tensor in state.items()}
    places = dict(_places({kind: config[f"{kind}_config"]["num_hidden_layers"] for kind in _LAYERS.values()}))
    extra, missing = mine.keys() - places.keys() - {"logit_scale"}, places.keys() - mine.keys()
    if extra or missing:
        raise InputError(f"this is no CLIP that {HAS} can be: no place for {_some(extra)}; missing {_some(missing)}")
    named = {"logit_scale": mine["logit_scale"].reshape(())}
    for ours, theirs in places.items():
        tensor = mine[ours].T if ours in _TRANSPOSED else mine[ours]
        parts = [part.clone(memory_format=torch.contiguous_format) for part in tensor.chunk(len(theirs))]
        named |= dict(zip(theirs, parts, strict=True))
    return named, config


def _places(layers: Mapping[str, int]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each name of open_clip's with those of transformers, among which its rows are shared out evenly."""
    for ours, theirs in {**_TENSORS, **_TRANSPOSED}.items():
        yield ours, (theirs,)
    for part in ("weight", "bias"):
        for ours, theirs in _NORMS.items():
            yield f"{ours}.{part}", (f"{theirs}.{part}",)
        for blocks, kind in _LAYERS.items():
            for i in range(layers[kind]):
                for o, names in _LAYER.items():
                    yield f"{blocks}.{i}.{o}{part}", tuple(f"{kind}_model.encoder.layers.{i}.{n}{part}" for n in names)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:4]) or "none"
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


# -- the config ------------------------------------------------------------------------------------------------------


def _config(model_cfg: Mapping[str, Any], ids: Ids) -> dict[str, Any]:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision, text = asdict(CLIPVisionCfg(**model_cfg["vision_cfg"])), asdict(CLIPTextCfg(**model_cfg["text_cfg"]))
    for name, cfg in (("model_cfg", model_cfg), ("vision_cfg", vision), ("text_cfg", text)):
        for field, only in _ONLY[name].items():
            if cfg.get(field) != only:
                hint = _HINTS.get(field, "")
                raise InputError(f"{HAS} has {field} {only!r} only; this {name} has {cfg[field]!r}{hint}")
    if not isinstance(vision["layers"], int):
        raise InputError(f"{HAS} has no ResNet; this vision_cfg has layers {vision['layers']}")
    _check_pooling(text, ids)
    common = (bool(model_cfg.get("quick_gelu")), int(model_cfg["embed_dim"]))
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": model_cfg["embed_dim"],
        "vision_config": {
            **_tower(vision, vision["width"] // vision["head_width"], *common),
            "image_size": square("image_size", vision["image_size"]),
            "patch_size": square("patch_size", vision["patch_size"]),
        },
        "text_config": {
            **_tower(text, text["heads"], *common),
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": ids.bos,
            "eos_token_id": ids.eos,
            "pad_token_id": ids.pad,
        },
    }


def _tower(cfg: Mapping[str, Any], heads: int, quick_gelu: bool, embed_dim: int) -> dict[str, Any]:
    tanh = (cfg["act_kwargs"] or {}).get("approximate") == "tanh"
    return {
        "hidden_size": cfg["width"],
        "intermediate_size": int(cfg["width"] * cfg["mlp_ratio"]),
        "projection_dim": embed_dim,
        "num_hidden_layers": cfg["layers"],
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": (cfg["norm_kwargs"] or {}).get("eps", 1e-5),
    }


def square(name: str, size: int | Sequence[int]) -> int:
    """The side of a square size; `InputError` for another, since transformers' CLIP has squares only."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise InputError(f"{HAS} has squares only; here {name} is {size}")
    return sides.pop()


def _check_pooling(text: Mapping[str, Any], ids: Ids) -> None:
    """transformers reads a text off its first end; but off its largest id where the config says that the end is 2."""
    pool, wanted = text["pool_type"], {"argmax": ids.largest, "eos": text["eos_id"]}
    if pool not in wanted:
        raise InputError(f"{HAS} reads a text off its end only; this text_cfg has pool_type {pool!r}")
    if wanted[pool] != ids.eos:
        raise InputError(
            f"by its pool_type {pool!r} the model reads a text off id {wanted[pool]}, but the tokenizer ends it with "
            f"{ids.eos}; give the tokenizer that the model was trained with"
        )
    if ids.eos == 2 and ids.largest != 2:
        raise InputError(f"{HAS} reads a text off its largest id if the end of text is 2, as it is here")
    if ids.largest >= text["vocab_size"]:
        raise InputError(f"the tokenizer gives ids up to {ids.largest}; the model knows {text['vocab_size']} tokens")


# -- a live model's config -------------------------------------------------------------------------------------------


def model_cfg_of(model: nn.Module) -> dict[str, Any]:
    """`model_cfg`, as `open_clip_config.json` has it, read from the modules of a `CLIP` or `CustomTextCLIP`.

    Raises `InputError` for towers that are not open_clip's own transformers, and for layers that differ in one tower.
    """
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer

    if not isinstance(model, CLIP | CustomTextCLIP):
        raise InputError(f"a {type(model).__name__} is no CLIP or CustomTextCLIP of open_clip; write one of these")
    custom = isinstance(model, CustomTextCLIP)
    text: Any = model.text if custom else model
    for tower, kind in ((model.visual, VisionTransformer), (text, TextTransformer if custom else CLIP)):
        if not isinstance(tower, kind):
            raise InputError(f"{HAS} has no {type(tower).__name__}; this tower must be open_clip's {kind.__name__}")
    visual: Any = model.visual
    image, image_act = _layers(visual.transformer.resblocks, [visual.ln_pre, visual.ln_post])
    words, act = _layers(text.transformer.resblocks, [text.ln_final])
    if act != image_act:
        raise InputError(f"open_clip's config has one activation; these towers have {image_act} and {act}")
    heads, bias, head = image.pop("heads"), model.logit_bias, text.text_projection
    return {
        "embed_dim": visual.output_dim,
        "quick_gelu": act[0] is QuickGELU,
        "init_logit_bias": None if bias is None else bias.item(),
        "vision_cfg": {
            **image,
            "head_width": image["width"] // heads,
            "image_size": visual.image_size,
            "patch_size": visual.patch_size,
            "attentional_pool": visual.attn_pool is not None,
            "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
            "pool_type": visual.pool_type,
            "patch_dropout": getattr(visual.patch_dropout, "prob", 0.0),
        },
        "text_cfg": {
            **words,
            "context_length": len(text.positional_embedding),
            "vocab_size": text.token_embedding.num_embeddings,
            "embed_cls": getattr(text, "cls_emb", None) is not None,
            "no_causal_mask": text.attn_mask is None,
            "pool_type": text.pool_type if custom else text.text_pool_type,
            "eos_id": text.eos_id if custom else text.text_eos_id,
            "proj_type": "none" if head is None else "linear",
            "proj_bias": isinstance(head, nn.Linear),
        },
    }


def _layers(blocks: Sequence[Any], norms: list[nn.Module]) -> tuple[dict[str, Any], tuple[type, str]]:
    """What a tower's layers have in common, and their activation with its approximation."""
    from open_clip.transformer import QuickGELU

    norms = [n for n in norms if not isinstance(n, nn.Identity)] + [n for b in blocks for n in (b.ln_1, b.ln_2)]
    found = {
        (b.attn.num_heads, b.mlp.c_fc.out_features, type(b.mlp.gelu), getattr(b.mlp.gelu, "approximate", "none"))
        for b in blocks
    }
    eps = {n.eps if isinstance(n, nn.LayerNorm) else type(n).__name__ for n in norms}
    if len(found) != 1 or len(eps) != 1 or not isinstance(next(iter(eps)), float):
        raise InputError(f"{HAS} has layers of one shape in a tower, with layer norms; these have {found}, {eps}")
    heads, hidden, act, approximate = found.pop()
    if act not in (nn.GELU, QuickGELU):
        raise InputError(f"open_clip's activations are GELU and QuickGELU; this tower has {act.__name__}")
    width = blocks[0].ln_1.normalized_shape[0]
    scale = getattr(blocks[0].ls_1, "gamma", None)
    ratio = hidden / width
    shape = {
        "layers": len(blocks),
        "width": width,
        "heads": heads,
        # open_clip cuts width * ratio off to a whole number, which may be one below
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "norm_kwargs": {"eps": eps.pop()},
        "act_kwargs": {"approximate": approximate} if approximate != "none" else None,
        "ls_init_value": None if scale is None else scale[0].item(),
    }
    return shape, (act, approximate)
