"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    W' = W + s B A        A: r x in, B: out x r, s = alpha / r, or alpha / sqrt(r) when rank-stabilised
                          (Kalajdzievski 2023, arXiv 2312.03732)

Convolutions have A: r x in/g x kh x kw with the layer's own stride, dilation and padding, then B as a 1x1 convolution
with the layer's groups. Embeddings have B: n x r, A: r x d, read as rows of B times A.
A is Kaiming uniform with a = sqrt(5) as in the official code (the paper says Gaussian), B is zero.
Dropout acts on the input features of A. Where W' has to be formed (a shadowed weight) it masks whole columns of A,
one mask per forward. Token embeddings have no input features, so dropout does not act there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, Part, WeightModule
from vismodal.site import Site

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
# a subclass with a forward of its own may read W otherwise (timm's weight-standardised convolutions): it is shadowed
PLAIN = {nn.Linear.forward, nn.Embedding.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


class LowRank(WeightModule):
    """The pair of factors on one site."""

    def __init__(self, W: Tensor, rank: int, scaling: float, dropout: float):
        super().__init__()
        self.scaling = scaling
        self.dropout = dropout
        device = "meta" if W.is_meta else "cpu"  # the same draw for every device
        A = torch.empty(rank, *W.shape[1:], device=device, dtype=torch.float32)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)).to(W.device))
        self.B = nn.Parameter(torch.zeros(W.shape[0], rank, device=W.device, dtype=torch.float32))

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is not None
        A: Tensor = self.A
        if self.training and self.dropout:
            A = A * F.dropout(A.new_ones(A.shape[1]), self.dropout).view(-1, *[1] * (A.dim() - 2))
        A, B = A.flatten(1).to(W.dtype), self.B.to(W.dtype)
        return torch.addmm(W.flatten(1), B, A, alpha=self.scaling).view(W.shape), b

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return type(layer).forward in PLAIN and getattr(layer, "max_norm", None) is None

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        """One product down and one up for all parts together: their A stacked, their B side by side."""
        A, B, scaling = stack(parts, *_sizes(layer))
        first = cast(LowRank, parts[0].module)
        dropout = first.dropout if first.training else 0.0
        if isinstance(layer, nn.Embedding):
            return y + scaling * (F.embedding(x, B) @ A).to(y.dtype)
        x = F.dropout(x, dropout) if dropout else x
        A, B = A.to(x.dtype), B.to(x.dtype)
        if isinstance(layer, nn.Linear):
            h = F.linear(x, A)  # ... r; added to y in the same pass that multiplies by B
            y2, h2 = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])
            return torch.addmm(y2, h2, B.t(), alpha=scaling).view(y.shape)
        assert isinstance(layer, Conv)
        h = layer._conv_forward(x, A.repeat(layer.groups, *[1] * (A.dim() - 1)), None)
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[A.dim()]
        return y + conv(h, (scaling * B).view(*B.shape, *[1] * (A.dim() - 2)), groups=layer.groups)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns of the layer's weight, from its attributes: a quantised weight may be packed."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    assert isinstance(layer, Conv)
    return layer.out_channels, layer.in_channels // layer.groups


def stack(parts: Sequence[Part], rows: int, columns: int) -> tuple[Tensor, Tensor, float]:
    """A: sum(r) x columns, B: rows x sum(r): each part's factors in its range, zero elsewhere; and their scaling."""
    modules = [cast(LowRank, part.module) for part in parts]
    scalings = {m.scaling for m in modules}
    common = scalings.pop() if len(scalings) == 1 else 1.0  # unequal ones go into B
    As: list[Tensor] = []
    Bs: list[Tensor] = []
    for module, (_, range_, axis) in zip(modules, parts, strict=True):
        A: Tensor = module.A
        B = module.B if module.scaling == common else module.scaling * module.B
        if range_ is not None and axis == 0:
            B = F.pad(B, (0, 0, range_[0], rows - range_[1]))
        elif range_ is not None:
            A = F.pad(A, (0, 0) * (A.dim() - 2) + (range_[0], columns - range_[1]))
        As.append(A)
        Bs.append(B)
    return (As[0], Bs[0], common) if len(parts) == 1 else (torch.cat(As), torch.cat(Bs, 1), common)


@dataclass(frozen=True, kw_only=True, repr=False)
class LoRA(Method):
    """Low-rank adaptation, arXiv 2106.09685.

    Args:
        rank: r, the inner dimension of the update.
        alpha: the update is scaled by alpha / r; the default alpha = r scales by 1.
        dropout: probability on the input features of A while training.
        rank_stabilised: scale by alpha / sqrt(r), arXiv 2312.03732.
        ranks: ranks of single sites, by glob on their kind or key, first match: {"mlp.*": 16, "blocks.0.*": 4}.
    """

    sites: tuple[str, ...] = ("attn.q", "attn.v")
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilised: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)

    survey: ClassVar[str] = "reparameterised: low rank"
    paper: ClassVar[str] = "arXiv 2106.09685"
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.rank, *self.ranks.values()):
            if rank < 1:
                raise InputError(f"LoRA: rank must be at least 1, not {rank}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA: dropout must be in [0, 1), not {self.dropout}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.slot == "weight" and site.tensor.dim() >= 2 and site.tensor.is_floating_point()

    def build(self, sites: Sequence[Site]) -> Built:
        for glob in self.ranks:
            if not any(_matches(glob, s) for s in sites):
                raise InputError(f"LoRA: ranks names {glob!r}, which matches no chosen site, such as {sites[0].key}")
        return Built(tuple(self._module(site) for site in sites))

    def _module(self, site: Site) -> LowRank:
        if not self.fits(site):
            raise InputError(f"LoRA needs a floating-point matrix, which {site.key} ({site.kind}) is not")
        rank = next((r for glob, r in self.ranks.items() if _matches(glob, site)), self.rank)
        alpha = rank if self.alpha is None else self.alpha
        scaling = alpha / (math.sqrt(rank) if self.rank_stabilised else rank)
        return LowRank(site.tensor, rank, scaling, self.dropout)


def _matches(glob: str, site: Site) -> bool:
    return fnmatchcase(site.kind, glob) or fnmatchcase(site.key, glob)
