"""The same LoRA in vismodal and in peft, on the models that `speed.py` compares them on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import open_clip
import timm
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import vismodal as vm
from vismodal.methods import Method

RANK = 8


@dataclass(frozen=True, eq=False)
class Case:
    """A model on which both packages put their LoRA.

    Args:
        name: as the table shows it.
        build: makes it, with random weights.
        sites: ours, by the name that the table shows; the last are the same as peft's.
        targets: peft's.
        lean: methods of ours that save memory, compared with peft's LoRA.
        shadowed: whether the sites are read by their owner instead of called; these stand in a table of their own.
    """

    name: str
    build: Callable[[], Any]
    sites: Mapping[str, tuple[str, ...]]
    targets: tuple[str, ...]
    lean: Mapping[str, Method] = field(default_factory=dict)
    shadowed: bool = False

    @property
    def group(self) -> str:
        """The table in which its rows stand."""
        return SHADOWED if self.shadowed else ""

    @property
    def shared(self) -> tuple[str, ...]:
        """The sites that both packages adapt."""
        return list(self.sites.values())[-1]


def sdxl() -> UNet2DConditionModel:
    """The UNet of SDXL base 1.0 on the meta device, from its published config."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


SHADOWED = "Sites that their owner reads itself (`nn.MultiheadAttention`)"


def lean(*sites: str) -> dict[str, Method]:
    return {"LoRA-FA": vm.LoRA(rank=RANK, sites=sites, freeze_down=True), "DTL": vm.DTL(), "DTL+": vm.DTL(kernel=3)}


QKV = {"q, v": ("attn.q", "attn.v"), "whole qkv": ("attn.qkv",)}
VIT_S = Case("ViT-S/16", lambda: timm.create_model("vit_small_patch16_224"), QKV, ("qkv",), lean("attn.qkv"))
VIT_B = Case("ViT-B/16", lambda: timm.create_model("vit_base_patch16_224"), QKV, ("qkv",), lean("attn.qkv"))
CLIP = Case(
    "open_clip ViT-B/32 image tower",
    lambda: open_clip.create_model("ViT-B-32").visual,
    {"qkv, out": ("attn.qkv", "attn.out")},
    ("attn",),
    lean("attn.qkv", "attn.out"),
    shadowed=True,
)
SDXL = Case("SDXL UNet, meta", sdxl, {"attention": ("attn.*", "xattn.*")}, ("to_q", "to_k", "to_v", "to_out.0"))


def ours(*sites: str) -> vm.LoRA:
    return vm.LoRA(rank=RANK, sites=sites)


def theirs(*targets: str) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets))


def count(model: nn.Module) -> int:
    """Parameters of peft's adapters."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


@torch.no_grad()
def fill(adapter: vm.Adapter) -> None:
    """Random B, so that the adapter does something."""
    for name, p in adapter.named_parameters():
        if name.endswith(".B"):
            p.normal_(std=0.02)


@torch.no_grad()
def give(adapter: vm.Adapter, peer: nn.Module) -> None:
    """The adapter's factors to peft's layers, which stand in the same order."""
    layers: list[Any] = [m for m in peer.modules() if len(getattr(m, "lora_A", ()))]
    for mine, layer in zip(map(factors, adapter.modules.values()), layers, strict=True):
        layer.lora_A["default"].weight.copy_(mine[0])
        layer.lora_B["default"].weight.copy_(mine[1])


def factors(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return module.A, module.B


def pair(case: Case, base: nn.Module) -> tuple[nn.Module, vm.Adapter, PeftModel]:
    """Ours with its adapter, and peft's, on copies of one base; same sites, same factors."""
    model, peer = copy.deepcopy(base), get_peft_model(copy.deepcopy(base), theirs(*case.targets))
    adapter = vm.adapt(model, ours(*case.shared))
    fill(adapter)
    give(adapter, peer)
    return model, adapter, peer
