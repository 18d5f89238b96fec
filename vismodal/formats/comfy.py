"""Keys of ComfyUI's files, `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`: kohya's with dots.

Modules are the original model's: of Flux, SD3 or a UNet. Flux's own publisher leaves `diffusion_model.` out.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vismodal.errors import InputError
from vismodal.formats.kohya import base_kind
from vismodal.formats.layers import SUFFIXES, some
from vismodal.formats.names import flat

PREFIX = "diffusion_model."
_BARE = ("double_blocks.", "single_blocks.", "joint_blocks.")
_ENDS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"} | {end: end for end in SUFFIXES}


def knows(key: str) -> bool:
    """Whether a key is one of this format."""
    return key.startswith((PREFIX, *_BARE))


def as_kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same by kohya's keys. Raises `InputError` naming keys that are not known here."""
    named: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        end = next((end for end in _ENDS if key.endswith(f".{end}")), None)
        if end is None or not knows(key):
            unknown.append(key)
            continue
        path = key.removeprefix(PREFIX).removesuffix(f".{end}")
        named[f"lora_unet_{flat(path)}.{_ENDS[end]}"] = tensor
    if unknown:
        raise InputError(f"keys that are not known here: {some(unknown)}")
    if base_kind(named) is None:
        raise InputError(f"{some(tensors, 1)} is of another model than Flux, SD3 or Stable Diffusion's UNets")
    return named
