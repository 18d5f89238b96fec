"""Merged models are saved by their own libraries and loaded by them, without vismodal, with the adapted output."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import BY_NAME, Case, close, lora, shake, tune

import vismodal as vm


def merged(case: Case) -> tuple[nn.Module, torch.Tensor]:
    model = case.model()
    adapter = vm.adapt(model, [lora(model), tune(model)])
    shake(adapter)
    y = case.run(model)
    adapter.merge()
    return model, y


def test_timm(tmp_path: Path) -> None:
    case = BY_NAME["timm-vit_tiny_patch16_224"]
    model, y = merged(case)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    options = {"img_size": 32, "num_classes": 4, "depth": 2, "embed_dim": 24, "num_heads": 3}
    plain = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "model.safetensors"), **options)
    assert close(case.run(plain.eval()), y)


def test_diffusers(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    case = BY_NAME["diffusers-SDXL"]
    model, y = merged(case)
    model.save_pretrained(tmp_path)
    assert not [k for k in load_file(tmp_path / "diffusion_pytorch_model.safetensors") if "vismodal" in k]
    assert close(case.run(UNet2DConditionModel.from_pretrained(tmp_path).eval()), y)


def test_transformers(tmp_path: Path) -> None:
    from transformers import CLIPModel

    case = BY_NAME["transformers-CLIP"]
    model, y = merged(case)
    model.save_pretrained(tmp_path)
    assert close(case.run(CLIPModel.from_pretrained(tmp_path).eval()), y)


def test_a_live_model_saves_its_base(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    case = BY_NAME["diffusers-SD1.5"]
    model = case.model()
    y0 = case.run(model)
    shake(vm.adapt(model, lora(model)))
    model.save_pretrained(tmp_path)
    assert close(case.run(UNet2DConditionModel.from_pretrained(tmp_path).eval()), y0, 1e-6)
