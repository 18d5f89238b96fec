"""Adapter files of other tools, written here key by key, and what they make of a weight or a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vismodal.diffusion.load import load_pipeline

Layer = dict[str, Tensor]


def changed(W: Tensor, layer: dict[str, Tensor]) -> Tensor:
    """What a layer makes of a weight, by the formulas that LyCORIS's and kohya's files follow."""
    t = {name: tensor.double() for name, tensor in layer.items()}
    W = W.detach().double()
    if "diff" in t:
        return W + t["diff"]
    if "w_norm" in t:
        return W + t["w_norm"]
    if "oft_blocks" in t:
        X = t["oft_blocks"]
        blocks = []
        for block in X:
            A = block - block.T
            I = torch.eye(len(block), dtype=A.dtype)
            blocks.append(((I + A) @ torch.linalg.inv(I - A)).T)
        turned = torch.block_diag(*blocks) @ W.flatten(1)
        return (t["rescale"].flatten()[:, None] * turned if "rescale" in t else turned).view(W.shape)
    if "lora_up.weight" in t:
        r = len(t["lora_down.weight"])
        delta = t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)
    elif "hada_w1_a" in t:
        r = len(t["hada_w1_b"])
        delta = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    else:
        r = len(t["lokr_w2_b"]) if "lokr_w2_b" in t else 0
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        w2 = t["lokr_w2"] if "lokr_w2" in t else (t["lokr_w2_a"] @ t["lokr_w2_b"])
        w2 = w2.view(W.shape[0] // len(w1), W.shape[1] // w1.shape[1], *W.shape[2:])
        delta = torch.kron(w1.view(*w1.shape, *[1] * (W.dim() - 2)), w2)
    V = W + (t["alpha"] / r if r else 1.0) * delta.view(W.shape)
    if "dora_scale" not in t:
        return V
    return t["dora_scale"].view(-1, *[1] * (W.dim() - 1)) * V / V.flatten(1).norm(dim=1).view(-1, *[1] * (W.dim() - 1))


def picture(pipe, prompt: str = "a photo of sks dog") -> np.ndarray:
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "guidance_scale": 3.0}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images[0]


def by_diffusers(folder: Path, file: Path) -> np.ndarray:
    pipe = load_pipeline(folder)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return picture(pipe)


def by_formula(folder: Path, layers: dict[str, Layer]) -> np.ndarray:
    """`layers` by "COMPONENT.MODULE" as the pipeline's own models name it."""
    pipe = load_pipeline(folder)
    with torch.no_grad():
        for path, layer in layers.items():
            component, _, module = path.partition(".")
            weight = getattr(pipe, component).get_submodule(module).weight
            weight.copy_(changed(weight, layer))
    return picture(pipe)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(module: nn.Module, r: int = 2, alpha: float = 3.0, seed: int = 0) -> Layer:
    out, inn, *kernel = module.weight.shape
    up = draw(out, r, *[1] * len(kernel), seed=seed + 1)
    return {"lora_down.weight": draw(r, inn, *kernel, seed=seed), "lora_up.weight": up, "alpha": torch.tensor(alpha)}


def diffusers(layers: dict[str, Layer]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """With the alphas in the header, for each component."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for path, layer in layers.items():
        component, _, module = path.partition(".")
        inner = "text_model." if component.startswith("text") else ""
        stem = f"{component}.{inner}{module.removeprefix(inner)}"
        A, B = layer["lora_down.weight"], layer["lora_up.weight"]
        tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        if "dora_scale" in layer:
            m, ending = layer["dora_scale"].flatten(), ".weight" if inner else ""
            tensors[f"{stem}.lora_magnitude_vector{ending}"] = m if A.dim() == 2 else m.view(1, -1, 1, 1)
            settings[f"{component}.use_dora"] = True
        settings |= {f"{component}.r": len(A), f"{component}.lora_alpha": 1.0}
        settings.setdefault(f"{component}.alpha_pattern", {})[module.removeprefix(inner)] = float(layer["alpha"])
        settings.setdefault(f"{component}.target_modules", []).append(module.removeprefix(inner))
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}


def kohya(layers: dict[str, Layer], names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """By `names` of modules, or with those of diffusers, as for SD1."""
    usual = {path: path.replace("text_encoder.", "te.text_model.") for path in layers}
    stems = {path: f"lora_{(names or usual)[path].replace('.', '_')}" for path in layers}
    return {f"{stems[path]}.{suffix}": t for path, layer in layers.items() for suffix, t in layer.items()}


BLOCK = "transformer_blocks.{}.attn{}"
TEXT = "encoder.layers.{}.self_attn.{}"
# modules of the tiny SDXL by the names that kohya's scripts have for them; a dot there is an underscore
XL = {
    f"unet.down_blocks.1.attentions.0.{BLOCK.format(0, 1)}.to_q": f"unet.input_blocks.4.1.{BLOCK.format(0, 1)}.to_q",
    f"unet.mid_block.attentions.0.{BLOCK.format(1, 2)}.to_k": f"unet.middle_block.1.{BLOCK.format(1, 2)}.to_k",
    "unet.up_blocks.0.attentions.2.proj_in": "unet.output_blocks.2.1.proj_in",
    "unet.up_blocks.1.resnets.0.conv1": "unet.output_blocks.3.0.in_layers.2",
    "unet.down_blocks.1.resnets.0.conv_shortcut": "unet.input_blocks.4.0.skip_connection",
    f"text_encoder.{TEXT.format(0, 'out_proj')}": f"te1.text_model.{TEXT.format(0, 'out_proj')}",
    f"text_encoder_2.text_model.{TEXT.format(1, 'out_proj')}": f"te2.text_model.{TEXT.format(1, 'out_proj')}",
}
