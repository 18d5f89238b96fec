"""What of a pipeline is adapted: presets of sites that mean the same on a UNet and on a transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

import vismodal as vm
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.errors import InputError
from vismodal.methods import Method

PRESETS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attn.*", "xattn.*"),
    "+ff": ("attn.*", "xattn.*", "mlp.*"),
    "+conv": ("attn.*", "xattn.*", "mlp.*", "conv"),
    "all": ("*",),
}
_NO_MATRICES = ("norm", "bias", "head")


def sites_of(model: nn.Module, sites: Sequence[str], method: type[Method] = vm.LoRA) -> tuple[str, ...]:
    """Kinds of sites for a method on this model, where `sites` are kinds, globs and presets.

    Presets: attention; +ff, the feed-forward layers besides; +conv, the convolutions besides; all, every matrix there
    is. They leave out what the model lacks, as cross-attention in an MMDiT; kinds and globs of one's own stay as they
    are. Raises `InputError` for +conv where there are no convolutions, and for presets where the method fits nothing.
    """
    offered = vm.sites(model)
    kinds = {s.kind for s in offered if not s.whole and not s.blocked and method.fits(s)}.difference(_NO_MATRICES)
    chosen: dict[str, None] = {}
    for given in sites:
        if given == "+conv" and "conv" not in kinds:
            raise InputError(f"a {type(model).__name__} has no convolutions for the preset +conv; write +ff or all")
        globs = PRESETS.get(given)
        meant = [given] if globs is None else [k for k in sorted(kinds) if any(fnmatchcase(k, g) for g in globs)]
        chosen |= dict.fromkeys(meant)
    if not chosen:
        raise InputError(f"{method.__name__} fits no {', '.join(sites)} of a {type(model).__name__}; name its sites")
    return tuple(chosen)


def adapted(pipe: Pipe, text: bool) -> dict[str, nn.Module]:
    """The models that are adapted, by name: the denoiser and, with `text`, the text encoders that can be.

    Raises `InputError` where no text encoder can.
    """
    denoiser = kind_of(pipe).denoiser
    return {denoiser: getattr(pipe, denoiser), **(encoders_of(pipe) if text else {})}


def encoders_of(pipe: Pipe) -> dict[str, nn.Module]:
    """The text encoders that can be trained, by name. Raises `InputError` where none can."""
    kind = kind_of(pipe)
    if not kind.trainable:
        raise InputError(
            f"the text encoder of a {type(pipe).__name__} is a {type(pipe.text_encoder).__name__}, which cannot be "
            "trained here; write --train_text_encoder false, and no --tokens"
        )
    return {name: getattr(pipe, name) for name in kind.trainable}


def checkpoint_gradients(models: Mapping[str, Any]) -> None:
    """Trades time for memory: activations of the blocks are computed again in the backward pass."""
    for model in models.values():
        switch = getattr(model, "enable_gradient_checkpointing", None)  # of diffusers; the other of transformers
        (switch or model.activation_checkpointing_enable)()
