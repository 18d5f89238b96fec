"""Quantised weights of a base: adapters read their values where they must, and never write them.

    quantise(model)         # linear layers to int8, before vm.adapt; torchao's own `quantize_` can leave some out

A layer's own class multiplies by such a weight, and what methods do to its output needs no more. torchao 0.18 keeps a
float copy of each int8 weight from the forward to the backward: training saves memory with gradient checkpointing,
which makes them block by block, or where the backbone has no graph (ladders, side networks), not without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vismodal.errors import InputError


def is_quantised(t: Tensor) -> bool:
    """Whether a parameter is no plain floating-point tensor: packed in integers, or of a class of its own (torchao)."""
    return type(t.data) is not Tensor or not t.is_floating_point()


def values(t: Tensor) -> Tensor:
    """What a weight stands for, as a plain tensor. Raises `InputError` where a quantised one does not tell."""
    if not is_quantised(t):
        return t
    if type(t.data) is not Tensor:
        try:
            with torch.no_grad():
                return t.dequantize()
        except (NotImplementedError, RuntimeError):
            pass
    raise InputError(
        f"the values of a weight that is a {type(t.data).__name__} of {t.dtype} cannot be read; take a method that "
        "needs none, such as LoRA"
    )


def quantise(model: nn.Module) -> None:
    """The weights of all linear layers in int8, in place, one scale for each row; they can be trained no more.

    Raises `InputError` where torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise InputError(
            'a base in int8 needs the package torchao, which is not installed; write pip install "vismodal[quantised]"'
        ) from error
    quantize_(model, Int8WeightOnlyConfig())
