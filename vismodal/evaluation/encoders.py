"""The encoders that judge pictures and texts: the embedded models, or any of timm and open_clip by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vismodal.classification.vision import EMBEDDED, Source, load_vision
from vismodal.clip import Images, encode_texts
from vismodal.pretrained import Pretrained, load_clip

_BATCH = 32


@dataclass(frozen=True)
class Encoder:
    """Pictures as features.

    Args:
        name: for reports.
        encode: prepared pictures b 3 h w -> b d.
        preprocess: a PIL picture -> 3 h w, as the model's own library does it for evaluation.
        device: where `encode` takes its pictures; features come back to the CPU.
    """

    name: str
    encode: Callable[[Tensor], Tensor]
    preprocess: Callable[[Image.Image], Tensor]
    device: torch.device | str = "cpu"

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d) of RGB pictures of any size."""
        parts = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
        found = [self.encode(torch.stack([self.preprocess(image) for image in part]).to(self.device)) for part in parts]
        return F.normalize(torch.cat(found).float(), dim=-1).cpu()


@dataclass(frozen=True)
class TextEncoder:
    """Texts in the same space as a CLIP's pictures."""

    clip: Pretrained

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d); each text is encoded once."""
        once = list(dict.fromkeys(texts))
        made = F.normalize(encode_texts(self.clip.model, self.clip.tokenize(once)).float(), dim=-1)
        return made[[once.index(text) for text in texts]].cpu()


def vision_encoder(source: Source | None = None, device: torch.device | str = "cpu") -> Encoder:
    """A model of timm without its head; the embedded tiny-vit unless another one is named.

    Raises `InputError` where there is none, or it cannot be had.
    """
    source = source or Source(EMBEDDED)
    vision = load_vision(source, 0)
    return Encoder(source.model, vision.model.to(device).eval(), vision.preprocess, device)


def clip_encoders(name: str | None = None, device: torch.device | str = "cpu") -> tuple[Encoder, TextEncoder]:
    """Both towers of a CLIP as `load_clip` finds it: ARCH/TAG of open_clip, say; the embedded tiny-clip without a name.

    Raises `InputError` where there is none, or it cannot be had.
    """
    clip = load_clip(name)
    clip.model.to(device)
    return Encoder(name or "tiny-clip", Images(clip.model), clip.preprocess, device), TextEncoder(clip)
