"""AdaLoRA: a rank budget that goes where it matters (Zhang et al. 2023, arXiv 2303.10512).

    W' = W + s P diag(l) Q        P: out x r, l: r, Q: r x in, s = alpha / r

P and Q are normal with deviation 0.02, l is zero. A term keeps P and Q near orthogonal: `orthogonality` times the mean
of |P^T P - I| and |Q Q^T - I| (Frobenius) over all matrices, as in the official code; the paper has the sum of
their squares. After every update, with the gradient g of that update,

    I <- |w g|,  M <- beta1 M + (1 - beta1) I,  U <- beta2 U + (1 - beta2) |I - M|,  s(w) = M U
    S_i = s(l_i) + mean over P's column i of s + mean over Q's row i of s

and every `every` updates, and at each of the last, those l_i of all sites together are set to zero whose S_i is not
among the b largest. They may grow again until the last phase, in which M and U stand still. The budget b falls from all
to `target` for each site, with the cube of what is left between the first and the last phase. The paper's
schedule subtracts the last phase in the numerator too, and then does not begin at all of them; the official code's is
taken.
M and U are in the state, so that a resumed run prunes as it would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.initial import drawn, zeros
from vismodal.methods.lowrank import LowRankMethod, Own
from vismodal.methods.spectrum import Spectrum
from vismodal.site import Site

STD = 0.02
AXES = (("P", 1), ("l", 0), ("Q", 0))  # on which of theirs the ranks lie


class Triplets(Own):
    """P, l and Q of one site, with the averages M and U of each."""

    axes: ClassVar[Mapping[str, int]] = {f"{kind}{name}": axis for kind in ("", "M_", "U_") for name, axis in AXES}

    def __init__(self, W: Tensor, rank: int, scaling: float, dropout: float):
        super().__init__(scaling, dropout)
        self.most = rank
        self.P = drawn(_normal, len(W), rank, device=W.device)
        self.l = drawn(zeros, rank, device=W.device)
        self.Q = drawn(_normal, rank, *W.shape[1:], device=W.device)
        for name, p in list(self.named_parameters()):
            self.register_buffer(f"M_{name}", torch.zeros_like(p, requires_grad=False))
            self.register_buffer(f"U_{name}", torch.zeros_like(p, requires_grad=False))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.Q * self.l.view(-1, *[1] * (self.Q.dim() - 1)), self.P

    def hold(self, update: Spectrum) -> None:
        """Singular vectors and values. The averages begin anew, with M U = |l| for the score of each."""
        new = {"P": update.U, "l": update.S / self.scaling, "Q": update.V.view(-1, *self.Q.shape[1:])}
        zeros = {f"{kind}_{name}": torch.zeros_like(t) for kind in "MU" for name, t in new.items()}
        self.become(**new, **zeros | {"M_l": new["l"], "U_l": torch.ones_like(new["l"])})

    def distances(self) -> list[Tensor]:
        """Of P and of Q from orthogonal."""
        Q = self.Q.flatten(1)
        eye = torch.eye(len(Q), device=Q.device, dtype=Q.dtype)
        return [torch.linalg.matrix_norm(gram - eye) for gram in (self.P.t() @ self.P, Q @ Q.t())]

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """M and U after an update; a gradient that overflowed leaves them as they are."""
        for name, p in self.named_parameters():
            M, U = self.get_buffer(f"M_{name}"), self.get_buffer(f"U_{name}")
            if p.grad is None:
                continue
            I = (p * p.grad).abs()
            finite = I.isfinite().all()
            mean = torch.where(finite, M.lerp(I, 1 - beta1), M)
            U.copy_(torch.where(finite, U.lerp((I - mean).abs(), 1 - beta2), U))
            M.copy_(mean)

    def scores(self) -> Tensor:
        """S: r."""
        P, l, Q = (self.get_buffer(f"M_{n}") * self.get_buffer(f"U_{n}") for n in ("P", "l", "Q"))
        return l + P.mean(0) + Q.flatten(1).mean(1)


def _normal(t: Tensor) -> Tensor:
    return nn.init.normal_(t, std=STD)


@dataclass(frozen=True, kw_only=True, repr=False)
class AdaLoRA(LowRankMethod):
    """Adaptive budget allocation, arXiv 2303.10512.

    Args:
        rank: r of every site at the start.
        target: the mean rank of a site at the end.
        alpha: the update is scaled by alpha / r; the default alpha = r scales by 1.
        dropout: probability on the input features of Q while training.
        warmup: share of the updates in which all ranks are trained.
        final: share of the updates, at the end, in which the ranks that are left are trained.
        every: updates from one pruning to the next.
        beta1: of the average M of the sensitivity.
        beta2: of the average U of its deviation.
        orthogonality: weight of the orthogonality term.
    """

    rank: int = 12
    target: int = 8
    alpha: float | None = None
    warmup: float = 0.1
    final: float = 0.5
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    paper: ClassVar[str] = "arXiv 2303.10512"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.target <= self.rank:
            raise InputError(f"AdaLoRA: target must be from 1 to rank={self.rank}, not {self.target}")
        if min(self.warmup, self.final) < 0 or self.warmup + self.final >= 1:
            raise InputError(f"AdaLoRA: warmup={self.warmup} and final={self.final} must leave updates between them")
        if self.every < 1:
            raise InputError(f"AdaLoRA: every must be at least 1, not {self.every}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 < beta < 1:
                raise InputError(f"AdaLoRA: {name} must be between 0 and 1, not {beta}")

    def module(self, site: Site, W: Tensor) -> Triplets:
        alpha = self.rank if self.alpha is None else self.alpha
        return Triplets(W, self.rank, alpha / self.rank, self.dropout)

    def loss(self, modules: Sequence[nn.Module]) -> Tensor:
        distances = [d for module in modules for d in cast(Triplets, module).distances()]
        return self.orthogonality * torch.stack(distances).mean()

    def budget(self, sites: int, step: int, steps: int) -> int:
        """b after update `step` of `steps`, of `sites` sites together."""
        begin, end = int(self.warmup * steps), steps - int(self.final * steps)
        left = 1 - (min(max(step, begin), end) - begin) / (end - begin)
        return int(sites * (self.target + (self.rank - self.target) * left**3))

    def step(self, modules: Sequence[nn.Module], step: int, steps: int) -> None:
        triplets = [cast(Triplets, module) for module in modules]
        begin, end = int(self.warmup * steps), steps - int(self.final * steps)
        if step < end:
            for each in triplets:
                each.observe(self.beta1, self.beta2)
        if step >= end or (step > begin and step % self.every == 0):
            prune(triplets, self.budget(len(triplets), step, steps))


@torch.no_grad()
def prune(triplets: Sequence[Triplets], budget: int) -> None:
    """Leaves the `budget` singular values of the highest score, of all sites together."""
    scores = torch.cat([each.scores() for each in triplets])
    kept = torch.zeros_like(scores).index_fill_(0, scores.topk(min(budget, len(scores))).indices, 1)
    for each, keep in zip(triplets, kept.split([len(t.l) for t in triplets]), strict=True):
        each.l.mul_(keep)
