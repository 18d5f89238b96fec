"""A judge of drawn pictures: a frozen image encoder that never saw the model, and what is asked of its features.

    judge = dino(Path("data"))
    views = judge.views([composites_of_apple, composites_of_house])     # 2 v d
    likeness(judge.features(drawn), views).argmax(1)                    # which of the two each picture shows

A picture is as like a thing as the *nearest* of several true views of it: where a model is free to place what it draws,
the distance to one true picture would measure the place too, and an error in pixels would measure little else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.data.emoji import COLOURS, Emoji, compose, draw_layout, rng
from vismodal.data.photos import pixels
from vismodal.errors import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Judge:
    """An image encoder and how its input is prepared; any module that gives one vector a picture can be one.

    Args:
        model: normalised pictures (b, 3, size, size) -> (b, d), in eval mode.
        size: side of its input in pixels.
        mean, std: of each channel, for pictures in [0, 1].
        name: for reports.
    """

    model: nn.Module
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d) of RGB pictures of any size, the square in their middle."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        x = torch.stack([(pixels(image, self.size) / 2 + 0.5 - mean) / std for image in images])
        return F.normalize(torch.cat([self.model(part) for part in x.split(32)]), dim=-1)

    def views(self, images: Sequence[Sequence[Image.Image]]) -> Tensor:
        """(n, v, d): of v pictures of each of n things."""
        return self.features([image for row in images for image in row]).unflatten(0, (len(images), -1))


def dino(data: Path) -> Judge:
    """The DINOv2 ViT-S/14 of the data folder, its position embedding resampled to 98 pixels.

    Raises `InputError` if the folder holds no such file.
    """
    import timm
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    found = sorted((data / "weights").glob("vit_small_patch14_dinov2*.safetensors"))
    if not found:
        raise InputError(f"{data / 'weights'} lacks vit_small_patch14_dinov2*.safetensors; give the data folder")
    model = timm.create_model("vit_small_patch14_dinov2", img_size=98, num_classes=0).eval()
    model.load_state_dict(checkpoint_filter_fn(load_file(found[0]), cast(VisionTransformer, model)))
    return Judge(model, 98, *IMAGENET, name="DINOv2 ViT-S/14 at 98 px")


def likeness(pictures: Tensor, views: Tensor) -> Tensor:
    """(p, n): cosine of each of p pictures (p, d) with the nearest of the v views of each of n things (n, v, d)."""
    return torch.einsum("pd,nvd->pnv", pictures, views).amax(2)


def placed(emoji: Emoji, ground: str, r: np.random.Generator) -> Image.Image:
    """The emoji as it is, in a size and place that `r` draws, on one ground."""
    return Image.fromarray(compose(emoji, replace(draw_layout(r, 0), colour=ground, second=ground)))


def true_views(emoji: Sequence[Emoji], ground: str, *, seed: int, purpose: str, views: int) -> list[list[Image.Image]]:
    """`views` composites of each emoji on one ground; emoji i has the places of every other list's emoji i."""
    return [[placed(e, ground, rng(seed, purpose, view, i)) for view in range(views)] for i, e in enumerate(emoji)]


def ground_of(picture: Image.Image) -> str:
    """The named colour nearest to the median of the outermost two pixels."""
    p = np.asarray(picture)
    edges = np.concatenate([edge.reshape(-1, 3) for edge in (p[:2], p[-2:], p[:, :2], p[:, -2:])])
    colour = np.median(edges, axis=0)
    return min(COLOURS, key=lambda name: float(np.square(np.array(COLOURS[name]) - colour).sum()))
