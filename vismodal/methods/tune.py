"""Tune: a trainable copy of chosen parameters; the frozen originals stay in place.

BitFit (arXiv 2106.10199), norm tuning and linear probing are this one method, on "bias", "norm" and "head".

    W' = V  (or b' = V),  V = W at the start
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, WeightModule
from vismodal.quantised import values
from vismodal.site import Site


class Copy(WeightModule):
    """The value that stands in for a weight's or a bias's range, in fp32 unless the original is wider."""

    replaces = True

    def __init__(self, tensor: Tensor, slot: str):
        super().__init__()
        self.slot = slot
        self.bias_only = slot == "bias"
        wide = torch.promote_types(tensor.dtype, torch.float32)
        self.value = nn.Parameter(values(tensor).detach().to(wide, copy=True))

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (self.value, b) if self.slot == "weight" else (W, self.value)


@dataclass(frozen=True, kw_only=True, repr=False)
class Tune(Method):
    """Trainable copies of parameters: heads, norms, biases, or any weight."""

    sites: tuple[str, ...] = ("head",)

    survey: ClassVar[str] = "selective: structured"
    paper: ClassVar[str] = "arXiv 2106.10199"
    mergeable: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("norm", "bias"), ("bias",))
    quantised: ClassVar[bool] = False

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.span is None and site.tensor.is_floating_point()

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(f"Tune needs floating-point parameters; {site.key} ({site.kind}) is none")
        return Built(tuple(Copy(site.tensor, site.slot) for site in sites))
