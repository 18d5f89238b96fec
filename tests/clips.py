"""Small CLIPs of both libraries, in fp64, and the embedded one, as classifiers; and what their towers do, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, fixed, word_ids

import vismodal as vm
from vismodal.paths import asset

NAMES = (
    "open_clip-CLIP",
    "open_clip-CustomTextCLIP",
    "open_clip-timm-tower",
    "transformers-CLIP",
    "transformers-SigLIP",
)
CLASSES = ("cat", "dog", "ship")
EXACT = 1e-12
WORDS = "a photo of a"


def clip(name: str = "open_clip-CLIP") -> nn.Module:
    return BY_NAME[name].model().double().requires_grad_(False)


def classifier(
    name: str = "open_clip-CLIP", templates: Any = f"{WORDS} {{}}.", classes: Sequence[str] = CLASSES
) -> Any:
    return vm.CLIPClassifier(clip(name), word_ids, classes, templates)


def images(n: int = 2, size: int = 32) -> Tensor:
    return fixed(n, 3, size, size).double()


def images_of(name: str) -> Tensor:
    return images(size=224 if "timm" in name else 32)


def tiny_clip() -> tuple[nn.Module, Any]:
    """The embedded CLIP, trained on emoji and CIFAR-100, and its tokenizer."""
    try:
        path = f"local-dir:{asset('tiny-clip')}"
    except vm.InputError:
        pytest.skip("this checkout has no assets/tiny-clip")
    import open_clip

    model, _ = open_clip.create_model_from_pretrained(path)
    return model.eval().requires_grad_(False), open_clip.get_tokenizer(path)


def encode_texts(model: Any, ids: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """Normalised features of open_clip's flat CLIP; before block j the places from 1 hold prompts j."""
    x = model.token_embedding(ids)
    for j, block in enumerate(model.transformer.resblocks):
        if j < len(prompts):
            n = prompts[j].shape[-2]
            x = torch.cat([x[:, :1], prompts[j].double().expand(len(ids), -1, -1), x[:, 1 + n :]], 1)
        x = x + model.positional_embedding if j == 0 else x
        x = block(x, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ model.text_projection
    return F.normalize(x, dim=-1)


def encode_images(model: Any, x: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """Normalised features of open_clip's own ViT, with prompts behind the patches, as the official code has them."""
    v = model.visual
    x = v.conv1(x).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
    for j, block in enumerate(v.transformer.resblocks):
        if j < len(prompts):
            n = len(prompts[j])
            kept = x if j == 0 else x[:, :-n]
            x = torch.cat([kept, prompts[j].double().expand(len(x), -1, -1)], 1)
        x = v.ln_pre(x) if j == 0 else x
        x = block(x)
    return F.normalize(v.ln_post(x[:, 0]) @ v.proj, dim=-1)


def vit_base() -> Any:
    """A classifier over ViT-B/16 without storage."""
    import open_clip

    with torch.device("meta"):
        vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
        text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
        model = open_clip.model.CLIP(512, vision, text)
    return vm.CLIPClassifier(model, open_clip.get_tokenizer("ViT-B-16"), ["cat", "sea horse", "ship"])
