"""FacT: factor tuning (Jie and Deng 2023, arXiv 2212.03145, section 3).

    dW = s V S U        U: r x d, V: d x r, shared by the whole network;  S: r x r for each d x d piece of a weight

Tensor train (TT): every S is free. Tucker (TK): S is a slice of C x_3 P, with C: r x r x r shared and P: r x pieces.
As in the official code (JieShibo/PETL-ViT), U and S begin like a plain nn.Linear, C and P Xavier uniform, V is zero.

Pieces: d is the shorter side of a weight, and the longer one is cut into pieces of d: fc1 has four below each other,
fc2 four side by side. A last piece that is not whole is cut off (SwiGLU, keys of another width); a convolution has such
pieces for each place of its kernel. The paper has one width only. Where there are several (stages of Swin, towers of
CLIP, a UNet's levels), weights of one tower and one d share U, V and C.

Official code and formula differ in TK: the four slices of fc1 (and fc2) are (C x_3 P)[:, :, :4] read as r x 4r, so that
columns of S interleave them. The code is followed, since the published figures are its; q, k, v and out have
S = (C x_3 P)[:, :, i]^T.
Dropout acts on S U x. Where W' has to be formed it masks whole rows of S, one mask per forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, Part, WeightModule, share
from vismodal.methods.initial import check_sizes, drawn, kaiming, zeros
from vismodal.methods.layers import down, is_matrix, is_plain, matrix, stack, up
from vismodal.site import Site


class Shared(nn.Module):
    """What the weights of one width and tower use together."""

    def __init__(self, width: int, rank: int, tucker: bool, device: torch.device):
        super().__init__()
        self.U = drawn(kaiming, rank, width, device=device)
        self.V = drawn(zeros, width, rank, device=device)
        self.C = drawn(nn.init.xavier_uniform_, rank, rank, rank, device=device) if tucker else None


class Pieces(WeightModule):
    """The cores of one weight; `shared` is the `Shared` of its width. Row pieces times column pieces of r x r."""

    shared: Shared

    def __init__(self, W: Tensor, rank: int, scaling: float, dropout: float, P: nn.Parameter | None):
        super().__init__()
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        self.shape = W.shape
        self.grid = grid(W)
        m, n = self.grid
        self.P = P
        self.S = drawn(kaiming, m * rank, n * rank, device=W.device) if P is None else None

    def core(self, dtype: torch.dtype) -> Tensor:
        """S: m r x n r."""
        if self.S is not None:
            return self.S.to(dtype)
        (m, n), r = self.grid, self.rank
        slices = cast(Tensor, self.shared.C).to(dtype) @ cast(Tensor, self.P).to(dtype)  # r r mn
        if n == 1:
            return slices.reshape(r, m * r).t()
        return slices.view(r, r, m, n).permute(2, 0, 1, 3).reshape(m * r, n * r)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """A: m r x in kh kw and B: out x m r with dW = s B A."""
        rows, columns, *kernel = self.shape
        S = self.core(dtype).unflatten(1, (math.prod(kernel), -1, self.rank))  # mr places pieces r
        A = (S @ self.shared.U.to(dtype)).flatten(2)[..., :columns]  # mr places in
        B = torch.block_diag(*[self.shared.V.to(dtype)] * self.grid[0])[:rows]
        return A.mT.reshape(-1, columns, *kernel), B, self.scaling

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is not None
        A, B, scaling = self.factors(W.dtype)
        A = A.flatten(1)
        if self.training and self.dropout:
            A = A * F.dropout(A.new_ones(len(A), 1), self.dropout)
        return torch.addmm(W.flatten(1), B, A, alpha=scaling).view(W.shape), b

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return is_plain(layer)

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        modules = [cast(Pieces, part.module) for part in parts]
        A, B, scaling = stack(layer, parts, [m.factors(torch.float32) for m in modules])
        h = F.dropout(down(layer, x, A), modules[0].dropout, modules[0].training)
        return up(layer, y, h, B, scaling)


def grid(W: Tensor) -> tuple[int, int]:
    """Pieces below each other, and side by side for all places of a kernel."""
    rows, columns, *kernel = W.shape
    d = min(rows, columns)
    return math.ceil(rows / d), math.prod(kernel) * math.ceil(columns / d)


@dataclass(frozen=True, kw_only=True, repr=False)
class FacT(Method):
    """Factor tuning, arXiv 2212.03145.

    Args:
        rank: r, the size of the cores.
        tucker: FacT-TK (Tucker), with cores that share one tensor; the default is FacT-TT (tensor train).
        scaling: s, the factor on the update; the paper searches .01, .1, 1, 10, 100 for each task.
        dropout: probability on the r features of each piece while training; the official code has .1.
    """

    sites: tuple[str, ...] = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.down")
    rank: int = 16
    tucker: bool = False
    scaling: float = 1.0
    dropout: float = 0.0

    survey: ClassVar[str] = "reparameterised: low rank"
    paper: ClassVar[str] = "arXiv 2212.03145"
    mergeable: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("conv",),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("FacT", self.rank, self.dropout)

    @classmethod
    def fits(cls, site: Site) -> bool:
        return is_matrix(site) and min(site.tensor.shape[:2]) > 1 and not isinstance(site.layer, nn.Embedding)

    def build(self, sites: Sequence[Site]) -> Built:
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(f"{site.tower}_{self._width(site)}".strip("_"), []).append(site)
        shared = nn.ModuleDict()
        built: dict[Site, Pieces] = {}
        for name, members in groups.items():
            device = members[0].tensor.device
            shared[name] = common = Shared(self._width(members[0]), self.rank, self.tucker, device)
            counts = [math.prod(grid(site.tensor)) for site in members]
            P = drawn(nn.init.xavier_uniform_, self.rank, sum(counts), device=device) if self.tucker else None
            for i, site in enumerate(members):
                mine = None if P is None else nn.Parameter(P.detach().split(counts, 1)[i].clone())
                built[site] = Pieces(site.tensor, self.rank, self.scaling, self.dropout, mine)
                share(built[site], common)
        return Built(tuple(built[site] for site in sites), shared)

    def _width(self, site: Site) -> int:
        """d. Raises `InputError` where a weight has no pieces, or is too narrow for the rank."""
        W = matrix("FacT", site)
        d = min(W.shape[:2])
        if not self.fits(site) or d < self.rank:
            raise InputError(
                f"FacT: {site.key} ({site.kind}) is {'x'.join(map(str, W.shape))}; its pieces must be at least as wide "
                f"as the rank {self.rank}, and token embeddings have none: lower the rank, or leave this site out"
            )
        return d
