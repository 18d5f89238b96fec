"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353, equation 5).

    W' = m (W + s B A) / |W + s B A|        m: out, the norm is that of each row (of all axes but the first)

m = |W| at the start. The norm is a constant to the gradient (section 4.3). With V = W + s B A and c = m / |V|, a
called layer's output is c (y + s B A x - b) + b, where only the norm needs the weight: this is used where DoRA is alone
on it, elsewhere W' is formed. Dropout acts on the input features of A; the official code also drops them from W x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, Part
from vismodal.methods.lora import LoRA
from vismodal.methods.lowrank import LowRank
from vismodal.methods.rows import has_output_rows, over_output, over_rows
from vismodal.quantised import values
from vismodal.site import Site


class Decomposed(LowRank):
    """A, B and the magnitude m."""

    reads_weight: ClassVar[bool] = True
    own: ClassVar[bool] = False  # m changes W as well, so no product is all that it is

    def __init__(self, W: Tensor, rank: int, scaling: float, dropout: float):
        super().__init__(W, rank, scaling, dropout)
        self.m = nn.Parameter(_norm(values(W).to(torch.promote_types(W.dtype, torch.float32))).to(self.A.dtype))

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        V, b = super().forward(W, b)
        assert V is not None
        return over_rows(V, self.m.to(V.dtype) / _norm(V)) * V, b

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return super().can_update(layer) and cast(Tensor, layer.weight).is_floating_point()

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        """With u = y + s B A x: u + (c - 1)(u - b)."""
        u = super().update(layer, parts, x, y)
        with torch.autocast(y.device.type, enabled=False):
            change = over_output(layer, parts, [_change(layer, part) for part in parts], u)
        b = cast(Tensor | None, layer.bias)
        return torch.addcmul(u, u if b is None else u - b.to(u.dtype).view(-1, *change.shape[1:]), change)


def _change(layer: nn.Module, part: Part) -> Tensor:
    """c - 1 over the rows of a part."""
    module = cast(Decomposed, part.module)
    with torch.no_grad():
        W = values(cast(Tensor, layer.weight))
        A, B = (factor.to(torch.promote_types(W.dtype, torch.float32)) for factor in module.factors())
        W = (W if part.range is None else W[slice(*part.range)]).flatten(1).to(A.dtype)
        norm = _norm(torch.addmm(W, B, A.flatten(1), alpha=module.scaling))
    return module.m.to(norm.dtype) / norm - 1


def _norm(V: Tensor) -> Tensor:
    """Of each row; a row of zeros stays one."""
    norm = torch.linalg.vector_norm(V.detach().flatten(1), dim=1)
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


@dataclass(frozen=True, kw_only=True, repr=False)
class DoRA(LoRA):
    """Magnitude and direction apart, arXiv 2402.09353. Its fields are those of `LoRA`."""

    survey: ClassVar[str] = "reparameterised: LoRA derivatives"
    paper: ClassVar[str] = "arXiv 2402.09353"
    pair: ClassVar[type[LowRank]] = Decomposed

    @classmethod
    def fits(cls, site: Site) -> bool:
        return super().fits(site) and has_output_rows(site)

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(f"DoRA scales output features, which the rows of {site.key} ({site.kind}) are not")
        return super().build(sites)
