"""Retrieval between pictures and texts: recall at k, both ways, with any number of captions for a picture.

    text to picture    a caption counts where its own picture is among the k pictures most like it
    picture to text    a picture counts where any of its own captions is among the k captions most like it

as it is usual on Flickr30k and COCO (Karpathy and Fei-Fei 2015, arXiv 1412.2306). What is as alike as the right answer
counts as more alike: features that do not tell pictures apart find nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vismodal.errors import InputError

KS = (1, 5, 10)
_ROWS = 1024  # that are compared with all others together


def recall(images: Tensor, texts: Tensor, image_of: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """{"text to image R@1": share, ..., "image to text R@1": ...}.

    Args:
        images: normalised features, n D.
        texts: normalised features, m D.
        image_of: the picture of each text, m; every picture has one text or more.
        ks: how many answers are looked at; more than there are finds all.
    """
    without = len(images) - len(image_of.unique())
    if without:
        raise InputError(f"{without} of {len(images)} pictures have no caption; retrieval needs one for each")
    of_text, of_image = ranks(images, texts, image_of)
    share = {f"text to image R@{k}": (of_text < k).float().mean().item() for k in ks}
    return share | {f"image to text R@{k}": (of_image < k).float().mean().item() for k in ks}


def ranks(images: Tensor, texts: Tensor, image_of: Tensor) -> tuple[Tensor, Tensor]:
    """How many wrong pictures are at least as like each text as its own, m; and how many wrong texts are at least as
    like each picture as the best of its own, n."""
    of_text, of_image = [], []
    for start in range(0, len(texts), _ROWS):
        own = image_of[start : start + _ROWS]
        similar = texts[start : start + _ROWS] @ images.T  # rows n
        right = similar.gather(1, own[:, None])
        of_text.append((similar >= right).sum(1) - 1)
    for start in range(0, len(images), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(images)), device=images.device)
        similar = images[rows] @ texts.T  # rows m
        mine = image_of[None] == rows[:, None]
        best = similar.masked_fill(~mine, -torch.inf).max(1, keepdim=True).values
        of_image.append(((similar >= best) & ~mine).sum(1))
    return torch.cat(of_text), torch.cat(of_image)
