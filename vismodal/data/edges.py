"""Edges of pictures, by Sobel's filter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def edges(images: Tensor) -> Tensor:
    """Edges (b, 1, h, w) in [0, 1] of pictures (b, 3, h, w) in [-1, 1].

    The length of Sobel's gradient, of the channel where it is longest: 1 at a step from black to white along an axis
    (longer diagonal ones are cut), in proportion for less contrast. Neither thinned nor thresholded, unlike Canny's.
    """
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    filters = torch.stack((across, across.T))[:, None].to(images) / 4  # 2 1 3 3
    b, c, h, w = images.shape
    x = F.pad((images + 1) / 2, (1, 1, 1, 1), mode="replicate").view(b * c, 1, h + 2, w + 2)
    lengths = F.conv2d(x, filters).square().sum(1).sqrt()
    return lengths.view(b, c, h, w).amax(1, keepdim=True).clamp(max=1)
