"""(IA)^3: inhibiting and amplifying inner activations (Liu et al. 2022, arXiv 2205.05638, section 3.3).

    softmax(Q (l_k K)^T) (l_v V),   W2 (l_ff act(W1 x))        l_k, l_v: d, l_ff: d_ff, ones at the start

As weights: the rows of W and b of k and v times l, the columns of the MLP's second matrix times l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, Part, WeightModule
from vismodal.methods.layers import add_rows, is_quantised_linear, multiply
from vismodal.methods.rows import has_output_rows, is_scalable, over_output, over_rows
from vismodal.site import Site


class Outputs(WeightModule):
    """W' = diag(l) W, b' = l b."""

    def __init__(self, W: Tensor):
        super().__init__()
        self.l = nn.Parameter(torch.ones(len(W), device=W.device, dtype=torch.float32))

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is not None
        return W * over_rows(W, self.l), b if b is None else b * self.l.to(b.dtype)

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return is_scalable(layer)

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        # y + (l - 1) y, in which 16 bits lose nothing of an l near 1
        return torch.addcmul(y, y, over_output(layer, parts, [cast(Outputs, p.module).l - 1 for p in parts], y))


class Inputs(WeightModule):
    """W' = W diag(l); on a quantised W, of which no W' is formed, y' = y + W (l - 1) x, a second product."""

    reads_weight: ClassVar[bool] = True

    def __init__(self, W: Tensor):
        super().__init__()
        self.l = nn.Parameter(torch.ones(W.shape[1], device=W.device, dtype=torch.float32))

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is not None
        return W * self.l.to(W.dtype).view(-1, *[1] * (W.dim() - 2)), b

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return is_quantised_linear(layer)

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        for part in parts:
            z = (cast(Inputs, part.module).l - 1).to(x.dtype) * x
            y = add_rows(layer, part, y, multiply(layer, part, z))
        return y


@dataclass(frozen=True, kw_only=True, repr=False)
class IA3(Method):
    """Learned scales on keys, values and the MLP's inner activations, arXiv 2205.05638.

    Args:
        inputs: kinds of site, by glob, whose input features are scaled; those of the others are their output features.
    """

    sites: tuple[str, ...] = ("attn.k", "attn.v", "mlp.down")
    inputs: tuple[str, ...] = ("mlp.down",)

    survey: ClassVar[str] = "additive: others"
    paper: ClassVar[str] = "arXiv 2205.05638"
    mergeable: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("conv",),)

    @classmethod
    def fits(cls, site: Site) -> bool:
        return has_output_rows(site) and site.tensor.dim() > 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.inputs, str):  # one kind may come without the tuple
            object.__setattr__(self, "inputs", (self.inputs,))

    def build(self, sites: Sequence[Site]) -> Built:
        for glob in set(self.inputs) - {"mlp.down"}:
            if not any(fnmatchcase(site.kind, glob) for site in sites):
                raise InputError(
                    f"IA3: inputs names {glob!r}, which is the kind of no chosen site: {', '.join(self.sites)}"
                )
        return Built(tuple(self._module(site) for site in sites))

    def _module(self, site: Site) -> WeightModule:
        if not self.fits(site):
            raise InputError(f"IA3 scales features, which rows of {site.key} ({site.kind}) are not; leave it out")
        if not any(fnmatchcase(site.kind, glob) for glob in self.inputs):
            return Outputs(site.tensor)
        if getattr(site.layer, "groups", 1) != 1:
            raise InputError(f"IA3 cannot scale the inputs of {site.key} ({site.kind}), a convolution in groups")
        return Inputs(site.tensor)
