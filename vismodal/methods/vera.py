"""VeRA: vectors on shared random matrices (Kopiczko et al. 2023, arXiv 2310.11454, section 3.1).

    W' = W + diag(b) B diag(d) A        A: r x in, B: out x r, d: r, b: out

A and B are drawn once from `seed`, Kaiming uniform, and stay as they are: all sites use the leading columns of one A,
as wide as the widest needs, and the leading rows of one B. They are not in the file, whose header has the seed.
d = 0.1 and b = 0 at the start; both are trained. Draws, sizes and slices are those of peft.
A convolution's weight is taken as out x (in/g kh kw).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vismodal.methods.base import Built, share
from vismodal.methods.lowrank import LowRankMethod, Product
from vismodal.site import Site


class Random(nn.Module):
    """A and B for all sites."""

    def __init__(self, rank: int, rows: int, columns: int, seed: int, device: torch.device):
        super().__init__()
        generator = None if device.type == "meta" else torch.Generator().manual_seed(seed)
        for name, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            empty = torch.empty(shape, device="meta" if generator is None else "cpu", dtype=torch.float32)
            drawn = nn.init.kaiming_uniform_(empty, generator=generator).to(device)
            self.register_buffer(name, drawn, persistent=False)


class Vectors(Product):
    """d and b of one site."""

    def __init__(self, W: Tensor, rank: int, d: float, dropout: float):
        super().__init__(1.0, dropout)
        self.shape = W.shape
        self.d = nn.Parameter(torch.full((rank,), d, device=W.device, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(len(W), device=W.device, dtype=torch.float32))

    def factors(self) -> tuple[Tensor, Tensor]:
        shared = cast(Random, self.shared)
        A = cast(Tensor, shared.A)[:, : self.shape[1:].numel()]
        B = cast(Tensor, shared.B)[: self.shape[0]]
        return (self.d[:, None] * A).view(-1, *self.shape[1:]), self.b[:, None] * B


@dataclass(frozen=True, kw_only=True, repr=False)
class VeRA(LowRankMethod):
    """Vectors on shared random matrices, arXiv 2310.11454.

    Args:
        rank: r, the inner dimension of the shared matrices.
        dropout: probability on the input features of A while training.
        d: initial value of the vector d.
        seed: of the shared matrices; another seed than the file's is another adapter.
    """

    rank: int = 256
    d: float = 0.1
    seed: int = 0

    survey: ClassVar[str] = "reparameterised: low rank"
    paper: ClassVar[str] = "arXiv 2310.11454"

    def build(self, sites: Sequence[Site]) -> Built:
        built = super().build(sites)
        shapes = [site.tensor.flatten(1).shape for site in sites]
        rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
        shared = Random(self.rank, rows, columns, self.seed, sites[0].tensor.device)
        for module in built.modules:
            share(module, shared)
        return Built(built.modules, shared)

    def module(self, site: Site, W: Tensor) -> Vectors:
        return Vectors(W, self.rank, self.d, self.dropout)
