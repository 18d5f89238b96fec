"""Which base model a file is for, and that model's modules where a conversion needs them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from vismodal.errors import InputError
from vismodal.formats.layers import Layers
from vismodal.paths import asset

Kind = Literal["sd1", "sd2", "sdxl"]
NAMES: dict[Kind, str] = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
EMBEDDED = "tiny-sd"

# what the published UNets and text encoders have beside the defaults of their classes
_UNETS: dict[Kind, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_H = {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096}
_G = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120}
_TEXTS: dict[Kind, dict[str, dict[str, int]]] = {
    "sd1": {"text_encoder": _L},
    "sd2": {"text_encoder": _H},
    "sdxl": {"text_encoder": _L, "text_encoder_2": {**_G, "projection_dim": 1280}},
}


@dataclass(frozen=True)
class Base:
    """A base model: its kind, the residual blocks in a level of its UNet, and its folder where there is one."""

    kind: Kind
    n: int = 2
    folder: Path | None = None

    def __str__(self) -> str:
        return str(self.folder or NAMES[self.kind])


def base_of(name: str | Path) -> Base:
    """The base by its kind, "sd1", "sd2" or "sdxl", by a folder in diffusers' layout, or "tiny-sd".

    Raises `InputError` for anything else, and for a UNet of another build.
    """
    if name in NAMES:
        return Base(cast(Kind, name))
    folder = asset(EMBEDDED) if name == EMBEDDED else Path(name).expanduser()
    try:
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = ", ".join((*NAMES, EMBEDDED))
        raise InputError(f"no base model {name}; write {known}, or a folder with unet/config.json") from None
    n, width = config.get("layers_per_block", 2), config.get("cross_attention_dim")
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel" or not isinstance(n, int):
        raise InputError(f"{folder}/unet is no UNet of Stable Diffusion with one number of layers_per_block")
    xl = config.get("addition_embed_type") == "text_time"
    return Base("sdxl" if xl else "sd2" if width == 1024 else "sd1", n, folder)


def detect(layers: Layers, header: Mapping[str, str]) -> Kind | None:
    """The kind of base that a file is for, by its header, its modules or the width of its texts; None where unclear."""
    said = f"{header.get('ss_base_model_version', '')} {header.get('modelspec.architecture', '')}".lower()
    for kind, words in {
        "sdxl": ("sdxl", "xl-v1"),
        "sd1": ("sd_v1", "diffusion-v1"),
        "sd2": ("sd_v2", "diffusion-v2"),
    }.items():
        if any(word in said for word in words):
            return cast(Kind, kind)
    for module, layer in layers.items():
        if module.startswith(("text_encoder_2.", "unet.add_embedding")) or ".transformer_blocks.1." in module:
            return "sdxl"
        down = layer.get("lora_down.weight", layer.get("hada_w1_b", layer.get("diff")))
        if module.endswith(("attn2.to_k", "attn2.to_v")) and down is not None and down.dim() == 2:
            return {768: "sd1", 1024: "sd2", 2048: "sdxl"}.get(down.shape[1])  # type: ignore[return-value]
    return None


def models(base: Base, components: Iterable[str], weights: bool = False) -> dict[str, nn.Module]:
    """Components of the base by name, without storage unless `weights` are asked for, which only a folder has.

    Raises `InputError` for a component that it does not have.
    """
    if weights and base.folder is None:
        raise InputError(f"this needs the weights of {base}; write --base FOLDER, a model folder of diffusers")
    return {component: _load(base, component) if weights else _build(base, component) for component in components}


def _class(component: str) -> Any:
    if component == "unet":
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel
    import transformers

    return getattr(
        transformers, {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}[component]
    )


def _load(base: Base, component: str) -> nn.Module:
    assert base.folder is not None
    try:
        return cast(nn.Module, _class(component).from_pretrained(base.folder / component, use_safetensors=True))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{base.folder / component} cannot be loaded: {why}") from error


def _build(base: Base, component: str) -> nn.Module:
    made, options = _class(component), _options(base, component)
    with torch.device("meta"):
        if component == "unet":
            return cast(nn.Module, made.from_config(options) if base.folder else made(**options))
        return cast(nn.Module, made(made.config_class(**options)))


def _options(base: Base, component: str) -> dict[str, Any]:
    if base.folder is None:
        known = {"unet": _UNETS[base.kind], **_TEXTS[base.kind]}
        if component not in known:
            raise InputError(f"{base} has no {component}, which the file adapts; write another --base")
        return known[component]
    try:
        return cast(dict[str, Any], json.loads((base.folder / component / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise InputError(f"{base} has no {component}/config.json, and the file adapts {component}") from None
