"""DyLoRA: one training for every rank (Valipour et al. 2022, arXiv 2210.07558, section 3).

    W' = W + (alpha / b) B[:, :b] A[:b]        A: r x in, B: out x r

While training, b is drawn anew for each update, from 1 to r and the same for all sites; with `frozen` only row b of A
and column b of B are trained in it (the paper's algorithm 1), otherwise all up to b. In eval mode and when merged,
b = r, or what `DyLoRA.at` sets. The draw depends on `seed` and the number of the update alone. The official code scales
A and B by sqrt(r / b) each, on top of alpha / r, which is the same.
Of a site that `adapter.prune` left with fewer ranks b is at most their number.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, share
from vismodal.methods.lowrank import LowRank, LowRankMethod
from vismodal.methods.spectrum import Spectrum
from vismodal.site import Site


class Ranks(nn.Module):
    """b of all sites, while training and otherwise."""

    def __init__(self, rank: int, drawn: int, device: torch.device):
        super().__init__()
        self.register_buffer("drawn", torch.tensor(drawn, device=device))
        self.register_buffer("used", torch.tensor(rank, device=device))


class Nested(LowRank):
    """A and B, of which the first b rows and columns act."""

    def __init__(self, W: Tensor, rank: int, alpha: float, frozen: bool, dropout: float):
        super().__init__(W, rank, 1.0, dropout)
        self.alpha, self.frozen = alpha, frozen

    def factors(self) -> tuple[Tensor, Tensor]:
        ranks = cast(Ranks, self.shared)
        b = cast(Tensor, ranks.drawn if self.training else ranks.used).clamp(max=self.A.shape[0])
        order = torch.arange(self.A.shape[0], device=b.device)
        A, B = super().factors()
        if self.training and self.frozen:
            trained = order == b - 1
            A = torch.where(_over(trained, A), A, A.detach())
            B = torch.where(trained, B, B.detach())
        return A * _over((order < b) * (self.alpha / b), A), B

    def hold(self, update: Spectrum) -> None:
        """By the same formula, where b is at most the number of its ranks."""
        b = min(int(cast(Tensor, cast(Ranks, self.shared).used)), len(update.S))
        A, B = update.factors(self.alpha / b)
        self.become(A=A.view(-1, *self.A.shape[1:]), B=B)


def _over(v: Tensor, A: Tensor) -> Tensor:
    return v.view(-1, *[1] * (A.dim() - 1))


@dataclass(frozen=True, kw_only=True, repr=False)
class DyLoRA(LowRankMethod):
    """Dynamic search-free low rank, arXiv 2210.07558.

    Args:
        rank: r, the largest rank.
        alpha: the update is scaled by alpha / b; the default is alpha = r.
        dropout: probability on the input features of A while training.
        frozen: train only the last of the b ranks in each update.
        seed: of the ranks that are drawn.
    """

    alpha: float | None = None
    frozen: bool = False
    seed: int = 0

    paper: ClassVar[str] = "arXiv 2210.07558"

    def build(self, sites: Sequence[Site]) -> Built:
        built = super().build(sites)
        shared = Ranks(self.rank, self.drawn(0), sites[0].tensor.device)
        for module in built.modules:
            share(module, shared)
        return Built(built.modules, shared)

    def module(self, site: Site, W: Tensor) -> Nested:
        return Nested(W, self.rank, self.rank if self.alpha is None else self.alpha, self.frozen, self.dropout)

    def drawn(self, step: int) -> int:
        """b for the update after `step` of them."""
        return random.Random(f"{self.seed} {step}").randint(1, self.rank)

    def step(self, modules: Sequence[nn.Module], step: int, steps: int) -> None:
        cast(Tensor, cast(Ranks, modules[0].shared).drawn).fill_(self.drawn(step))

    @staticmethod
    def at(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """An adapter's state that acts at another rank: `a.load_state_dict(DyLoRA.at(a.state_dict(), 4))`."""
        largest: dict[str, int] = {}
        for key, tensor in state.items():
            if key.endswith(".B"):  # pruned sites may have fewer ranks than others
                slot = key.partition("/")[0]
                largest[slot] = max(largest.get(slot, 1), tensor.shape[1])
        slots = [k for k in state if k.endswith("/shared.used")]
        if not slots:
            raise InputError("the adapter has no DyLoRA, whose rank could be chosen")
        for slot in slots:
            if not 1 <= rank <= largest[slot.partition("/")[0]]:
                raise InputError(f"DyLoRA: rank must be from 1 to {largest[slot.partition('/')[0]]}, not {rank}")
        return {**state, **{slot: torch.full_like(state[slot], rank) for slot in slots}}
