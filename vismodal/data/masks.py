"""Masks that lie beside photos: `NAME.mask.png` next to `NAME.jpg`, white where the photo is to be learnt, else black.

Greys count in between. A mask has its photo's size in pixels, as people see the photo (turned as EXIF says).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vismodal.data.decode import Unusable

SUFFIX = ".mask.png"


def is_mask(path: Path) -> bool:
    """Whether a file is a mask by its name, and so no photo."""
    return path.name.lower().endswith(SUFFIX)


def belongs_to(mask: Path, photo: Path) -> bool:
    return mask.name[: -len(SUFFIX)] == photo.stem


def read_mask(picture: Image.Image) -> Image.Image:
    """A grey picture of a mask as it was decoded. Raises `Unusable` for one that is black everywhere."""
    grey = picture.convert("L")
    if not grey.getbbox():
        raise Unusable("a mask that is black everywhere, with which nothing of its photo would be learnt")
    return grey


def mask_values(mask: Image.Image, shape: tuple[int, int], box: tuple[float, float, float, float]) -> Tensor:
    """A box (left, top, right, bottom) of a mask as averages of its areas, h w in [0, 1]; shape: (h, w), of latents."""
    areas = mask.convert("F").resize(shape[::-1], Image.Resampling.BOX, box=box)
    return torch.from_numpy(np.array(areas)) / 255
