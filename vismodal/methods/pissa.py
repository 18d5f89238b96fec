"""PiSSA: LoRA that begins at the principal part of the weight (Meng et al. 2024, arXiv 2404.02948, section 3).

    W = U S V^T             s B0 A0 = U_r S_r V_r^T        the r largest singular triples
    W' = (W - s B0 A0) + s B A,  A = A0 and B = B0 at the start, the square root of S_r in each of them

The official code writes the residual W - s B0 A0 into the base. Here the base stays as it is, and A0, B0 are kept
beside A, B (in the file too, which is twice as large). What is added to W is computed as a product of rank 2r,

    B A - B0 A0 = (B - B0) A + B0 (A - A0)                 [A; A - A0], [B - B0, B0]

which is zero to the bit at the start, and whose small differences keep their precision in 16 bits. Dropout acts on
this change alone. A convolution's weight is taken as out x (in/g kh kw).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.methods.lora import LoRA
from vismodal.methods.lowrank import LowRank
from vismodal.methods.spectrum import Spectrum
from vismodal.quantised import values
from vismodal.site import Site


class Principal(LowRank):
    """A, B and where they began; that is nothing once they were pruned, when B A is the whole change."""

    axes: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1, "A0": 0, "B0": 1}

    def __init__(self, W: Tensor, rank: int, scaling: float, dropout: float):
        super().__init__(W, rank, scaling, dropout)
        self.most = 2 * rank
        if not W.is_meta:
            U, S, Vh = torch.linalg.svd(values(W).detach().to(self.A.dtype).flatten(1), full_matrices=False)
            root = (S[:rank] / scaling).sqrt()
            with torch.no_grad():
                self.A.copy_((root[:, None] * Vh[:rank]).view_as(self.A))
                self.B.copy_(U[:, :rank] * root)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        A0, B0 = self.get_buffer("A0"), self.get_buffer("B0")
        if not len(A0):
            return self.A, self.B
        return torch.cat([self.A, self.A - A0]), torch.cat([self.B - B0, B0], 1)

    def hold(self, update: Spectrum) -> None:
        super().hold(update)
        self.become(A0=self.get_buffer("A0")[:0], B0=self.get_buffer("B0")[:, :0])


@dataclass(frozen=True, kw_only=True, repr=False)
class PiSSA(LoRA):
    """LoRA on the principal singular triples, arXiv 2404.02948. Its fields are those of `LoRA`."""

    survey: ClassVar[str] = "reparameterised: LoRA derivatives"
    paper: ClassVar[str] = "arXiv 2404.02948"
    pair: ClassVar[type[LowRank]] = Principal

    def module(self, site: Site, W: Tensor) -> LowRank:
        rank, have = self.rank_of(site), min(W.flatten(1).shape)
        if rank > have:
            raise InputError(f"PiSSA: rank {rank} is too large for {site.key}, which has {have} singular triples")
        return super().module(site, W)
