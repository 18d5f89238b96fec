"""SSF: scaling and shifting features (Lian et al. 2022, arXiv 2210.08823, section 3).

    y' = scale y + shift  <=>  W' = diag(scale) W,  b' = scale b + shift        scale, shift: out

On every operation of a ViT: the patch projection, the norms, q, k, v and the attention's output, both matrices of the
MLP (the first before its activation). scale is normal around 1, shift around 0, with deviation 0.02: the output at the
start is not the base's. A layer without a bias takes the shift live, but cannot be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, Part, WeightModule
from vismodal.methods.initial import drawn
from vismodal.methods.rows import has_output_rows, is_scalable, over_output, over_rows
from vismodal.site import Site

STD = 0.02


class Affine(WeightModule):
    """scale and shift of one site."""

    def __init__(self, W: Tensor):
        super().__init__()
        self.scale = drawn(partial(nn.init.normal_, mean=1.0, std=STD), len(W), device=W.device)
        self.shift = drawn(partial(nn.init.normal_, std=STD), len(W), device=W.device)

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is not None
        shift = self.shift.to(W.dtype)
        return W * over_rows(W, self.scale), shift if b is None else b * self.scale.to(b.dtype) + shift

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return is_scalable(layer)

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        modules = [cast(Affine, part.module) for part in parts]
        # (y + shift) + (scale - 1) y, in which 16 bits lose nothing of a scale near 1
        shifted = y + over_output(layer, parts, [m.shift for m in modules], y)
        return torch.addcmul(shifted, y, over_output(layer, parts, [m.scale - 1 for m in modules], y))


@dataclass(frozen=True, kw_only=True, repr=False)
class SSF(Method):
    """Scale and shift of the features of every operation, arXiv 2210.08823."""

    sites: tuple[str, ...] = ("embed", "norm", "attn.*", "mlp.*")

    survey: ClassVar[str] = "additive: others"
    paper: ClassVar[str] = "arXiv 2210.08823"
    mergeable: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("conv", "norm", "attn.*", "xattn.*", "mlp.*"),  # a UNet
        ("norm", "attn.*", "mlp.*"),  # texts, whose embeddings are rows
        ("embed", "conv", "norm"),
    )
    starts_at_base: ClassVar[bool] = False

    @classmethod
    def fits(cls, site: Site) -> bool:
        return has_output_rows(site) and (bool(site.places[0].pieces) or site.places[0].bias in site.layer._parameters)

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(
                    f"SSF scales and shifts features: {site.key} ({site.kind}) has none in its rows, or its layer "
                    f"({type(site.layer).__name__}) takes no bias; leave it out"
                )
        return Built(tuple(Affine(site.tensor) for site in sites))
