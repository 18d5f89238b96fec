"""Folders of little labelled pictures, and a vision transformer of a few thousand parameters that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}


def picture(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (20, 20)) -> Image.Image:
    """A colour with noise."""
    noise = np.random.default_rng(seed).integers(-40, 40, (size[1], size[0], 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def folder(
    root: Path, counts: dict[str, int] | None = None, classes: dict[str, tuple[int, int, int]] = COLOURS
) -> Path:
    """DIR/PART/CLASS/*.png with so many pictures of each class, or DIR/CLASS/*.png for the part ""."""
    for p, (part, count) in enumerate((counts or {"train": 4, "val": 2, "test": 3}).items()):
        for c, (name, colour) in enumerate(classes.items()):
            place = root / part / name
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(colour, 1000 * p + 100 * c + i, (20 + i, 20 + c)).save(place / f"{i}.png")
    return root


def tiny_vit(root: Path, dropout: float = 0.0) -> Path:
    """A folder of timm's: 16 pixels, 2 blocks of 32."""
    from timm.models.vision_transformer import VisionTransformer

    args = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_rate": dropout}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(**args, num_classes=4)
    root.mkdir(parents=True)
    save_file(model.state_dict(), root / "model.safetensors")
    cfg = {"input_size": [3, 16, 16], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    cfg |= {"crop_pct": 0.9, "crop_mode": "center", "num_classes": 4, "first_conv": "patch_embed.proj"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "model_args": args}
    config["pretrained_cfg"] = {**cfg, "classifier": "head"}
    (root / "config.json").write_text(json.dumps(config))
    return root
