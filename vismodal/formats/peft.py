"""LoRA as diffusers and peft write it: `pytorch_lora_weights.safetensors`, read by plain `pipe.load_lora_weights`.

Tensors: `COMPONENT.MODULE.lora_A.weight` (r, in[, kh, kw]) and `.lora_B.weight` (out, r[, 1, 1]), where a component is
`unet`, `text_encoder` or `text_encoder_2`. How strong a layer acts, alpha / r, stands only in the header's
`lora_adapter_metadata`, for each component: without it diffusers silently takes 1, and with it for one component alone
loading fails. Text encoders' keys carry `text_model.` exactly once, also where the model's own names (transformers 5)
no longer do; diffusers takes it off.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vismodal.errors import InputError

FILE = "pytorch_lora_weights.safetensors"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "transformer")
# Our sites "...proj:up" and "...proj:gate" are the halves of the rows of diffusers' one GEGLU matrix.
_HALVES = {"up": 0, "gate": 1}


@dataclass(frozen=True)
class _Layer:
    """What is added to one layer's weight: alpha / r * B A."""

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.A)


def to_peft(tensors: Mapping[str, Tensor], scaling: Mapping[str, float]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Our LoRA tensors as those of a diffusers file, and the file's header.

    Args:
        tensors: an adapter's `state_dict`: "SLOT/COMPONENT.MODULE.A" and ".B", for the halves of a GEGLU "MODULE:up.A".
        scaling: the factor alpha / r (or alpha / sqrt(r)) of each "SLOT/COMPONENT.MODULE".

    Raises `InputError` naming what the format cannot hold: other methods than LoRA, embeddings, other components.
    """
    parts: dict[str, dict[str, _Layer]] = {}
    for site, (A, B) in _pairs(tensors).items():
        module, _, part = site.partition("/")[2].partition(":")
        parts.setdefault(module, {})[part] = _Layer(A, B, scaling[site] * len(A))
    layers = {module: _whole(module, found) for module, found in parts.items()}
    named: dict[str, Tensor] = {}
    for module, layer in layers.items():
        component, _, path = module.partition(".")
        if component not in COMPONENTS:
            raise InputError(f"diffusers' LoRA files know {', '.join(COMPONENTS)}; the adapter has {component!r}")
        stem = f"{component}.{'text_model.' if component.startswith('text') else ''}{_bare(path)}"
        named[f"{stem}.lora_A.weight"] = layer.A
        named[f"{stem}.lora_B.weight"] = layer.B.reshape(*layer.B.shape, *[1] * (layer.A.ndim - 2))
    return {name: tensor.contiguous() for name, tensor in named.items()}, _header(layers)


def scaling_of(modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """The second argument of `to_peft`, of an adapter's `modules`."""
    return {site: float(getattr(module, "scaling", 1.0)) for site, module in modules.items()}


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    sites = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    for site in sites:
        names = {key.rpartition(".")[2] for key in tensors if key.rpartition(".")[0] == site}
        if names != {"A", "B"} or not site.startswith("lora"):
            raise InputError(f"diffusers' LoRA files hold plain LoRA only; {site} has {', '.join(sorted(names))}")
        if site.endswith(("token_embedding", "position_embedding")):
            raise InputError(f"diffusers' LoRA files hold no embeddings; leave out {site} (embed.tokens)")
    return {site: (tensors[f"{site}.A"], tensors[f"{site}.B"]) for site in sites}


def _whole(module: str, parts: Mapping[str, _Layer]) -> _Layer:
    """The parts of one layer as one: A stacked, and each B in its rows and columns, zero elsewhere."""
    if parts.keys() == {""}:
        return parts[""]
    if not parts.keys() <= _HALVES.keys():
        raise InputError(f"{module} is adapted in parts ({', '.join(parts)}); diffusers has only {', '.join(_HALVES)}")
    rows = next(iter(parts.values())).B.shape[0]
    strengths = {layer.alpha / layer.rank for layer in parts.values()}
    common = strengths.pop() if len(strengths) == 1 else 1.0  # one layer has one alpha: unequal ones go into B
    rank = sum(layer.rank for layer in parts.values())
    B = torch.zeros(2 * rows, rank)
    column = 0
    for part, layer in parts.items():
        start = _HALVES[part] * rows
        B[start : start + rows, column : column + layer.rank] = layer.B * (layer.alpha / layer.rank / common)
        column += layer.rank
    return _Layer(torch.cat([layer.A for layer in parts.values()]), B, common * rank)


def _bare(path: str) -> str:
    return path.removeprefix("text_model.")


def _header(layers: Mapping[str, _Layer]) -> dict[str, str]:
    """peft's LoraConfig of each component: the most common rank and alpha, and patterns for the rest."""
    settings: dict[str, Any] = {}
    for component in dict.fromkeys(module.partition(".")[0] for module in layers):
        # peft matches names from their end, so names without `text_model.` fit the models with and without it
        mine = {_bare(m.partition(".")[2]): layer for m, layer in layers.items() if m.startswith(f"{component}.")}
        rank = Counter(layer.rank for layer in mine.values()).most_common(1)[0][0]
        alpha = Counter(layer.alpha for layer in mine.values()).most_common(1)[0][0]
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {m: layer.rank for m, layer in mine.items() if layer.rank != rank},
            "alpha_pattern": {m: layer.alpha for m, layer in mine.items() if layer.alpha != alpha},
            "target_modules": sorted(mine),
            "bias": "none",
        }
        settings |= {f"{component}.{name}": value for name, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
