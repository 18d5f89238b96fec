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
from vismodal.formats.layers import DENOISERS, Layers
from vismodal.paths import asset

Kind = Literal["sd1", "sd2", "sdxl", "sd3", "flux"]
NAMES: dict[Kind, str] = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux.1",
}
EMBEDDED = "tiny-sd"

# what the published UNets and text encoders have beside the defaults of their classes; SD3 and Flux have several sizes
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
    """A base model: its kind, the residual blocks in a level of a UNet, and its folder where there is one."""

    kind: Kind
    n: int = 2
    folder: Path | None = None

    @property
    def denoiser(self) -> str:
        """ "unet" or "transformer"."""
        return DENOISERS[self.kind in ("sd3", "flux")]

    def __str__(self) -> str:
        return str(self.folder or NAMES[self.kind])


def base_of(name: str | Path) -> Base:
    """The base by its kind, "sd1", "sd2", "sdxl", "sd3" or "flux", by a folder in diffusers' layout, or "tiny-sd".

    Raises `InputError` for anything else, and for a denoiser of another build.
    """
    if name in NAMES:
        return Base(cast(Kind, name))
    folder = asset(EMBEDDED) if name == EMBEDDED else Path(name).expanduser()
    for denoiser in DENOISERS:
        try:
            config = json.loads((folder / denoiser / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        kind, n = _kind(config, denoiser), config.get("layers_per_block", 2)
        if kind is None or not isinstance(n, int):
            raise InputError(f"{folder}/{denoiser} is none that has files of others: {', '.join(NAMES.values())}")
        return Base(kind, n, folder)
    known = ", ".join((*NAMES, EMBEDDED))
    raise InputError(
        f"no base model {name}; write {known}, or a folder with unet/config.json or transformer/config.json"
    )


def base_on(models: Mapping[str, nn.Module]) -> Base | None:
    """The base that live models are of, by the config of their denoiser; None for another, or none."""
    denoiser = next((d for d in DENOISERS if d in models), "")
    config = dict(getattr(models.get(denoiser), "config", {}))
    kind, n = _kind(config, denoiser), config.get("layers_per_block", 2)
    return Base(kind, n) if kind and isinstance(n, int) else None


def _kind(config: Mapping[str, Any], denoiser: str) -> Kind | None:
    name = config.get("_class_name", "UNet2DConditionModel" if denoiser == "unet" else None)
    if name != "UNet2DConditionModel":
        found: dict[object, Kind] = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
        return found.get(name)
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("cross_attention_dim") == 1024 else "sd1"


def detect(layers: Layers, header: Mapping[str, str], told: Kind | None = None) -> Kind | None:
    """The kind of base that a file is for, by its header, its keys (`told`), its modules or the width of what they
    read; None where that is unclear."""
    said = f"{header.get('ss_base_model_version', '')} {header.get('modelspec.architecture', '')}".lower()
    for kind, words in _SAID.items():
        if any(word in said for word in words):
            return kind
    if told:
        return told
    for module, layer in layers.items():
        down = layer.get("lora_down.weight", layer.get("hada_w1_b", layer.get("diff")))
        width = down.shape[1] if down is not None and down.dim() == 2 else 0
        if module.startswith("transformer."):
            if "single_transformer_blocks" in module:
                return "flux"
            if module.endswith((".attn.to_q", ".attn.to_k", ".attn.to_v")):
                return {3072: "flux", 1536: "sd3", 2432: "sd3"}.get(width)  # type: ignore[return-value]
        elif module.startswith(("text_encoder_2.", "unet.add_embedding")) or ".transformer_blocks.1." in module:
            return None if any(m.startswith("transformer.") for m in layers) else "sdxl"
        elif width and module.endswith(("attn2.to_k", "attn2.to_v")):
            return {768: "sd1", 1024: "sd2", 2048: "sdxl"}.get(width)  # type: ignore[return-value]
    return None


_SAID: dict[Kind, tuple[str, ...]] = {
    "sdxl": ("sdxl", "xl-v1"),
    "sd3": ("sd3", "stable-diffusion-3"),
    "flux": ("flux",),
    "sd1": ("sd_v1", "diffusion-v1"),
    "sd2": ("sd_v2", "diffusion-v2"),
}


def models(base: Base, components: Iterable[str], weights: bool = False) -> dict[str, nn.Module]:
    """Components of the base by name, without storage unless `weights` are asked for, which only a folder has.

    Raises `InputError` for a component that it does not have.
    """
    if weights and base.folder is None:
        raise InputError(f"this needs the weights of {base}; write --base FOLDER, a model folder of diffusers")
    return {component: _load(base, component) if weights else _build(base, component) for component in components}


def _class(component: str, config: Mapping[str, Any]) -> Any:
    if component in DENOISERS:
        import diffusers

        return getattr(diffusers, config.get("_class_name", "UNet2DConditionModel"))
    import transformers

    usual = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}[component]
    return getattr(transformers, (config.get("architectures") or [usual])[0])


def _load(base: Base, component: str) -> nn.Module:
    assert base.folder is not None
    made = _class(component, _options(base, component))
    try:
        return cast(nn.Module, made.from_pretrained(base.folder / component, use_safetensors=True))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{base.folder / component} cannot be loaded: {why}") from error


def _build(base: Base, component: str) -> nn.Module:
    options = _options(base, component)
    made = _class(component, options)
    with torch.device("meta"):
        if component in DENOISERS:
            return cast(nn.Module, made.from_config(options) if base.folder else made(**options))
        return cast(nn.Module, made(made.config_class(**options)))


def _options(base: Base, component: str) -> dict[str, Any]:
    if base.folder is None:
        if base.kind not in _UNETS:
            raise InputError(f"{base} comes in several sizes; write --base FOLDER, a model folder of diffusers")
        known = {"unet": _UNETS[base.kind], **_TEXTS[base.kind]}
        if component not in known:
            raise InputError(f"{base} has no {component}, which the file adapts; write another --base")
        return known[component]
    try:
        return cast(dict[str, Any], json.loads((base.folder / component / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise InputError(f"{base} has no {component}/config.json, and the file adapts {component}") from None
