"""The singular value decomposition of an update that is a product, without forming it, and its factors again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vismodal.errors import InputError


class Spectrum(NamedTuple):
    """U diag(S) V, in fp64 on CPU. U: out x r, S: r, the largest first, V: r x in."""

    U: Tensor
    S: Tensor
    V: Tensor

    def first(self, rank: int) -> Spectrum:
        """The best approximation of a rank in the Frobenius norm (Eckart and Young 1936)."""
        return Spectrum(self.U[:, :rank], self.S[:rank], self.V[:rank])

    def factors(self, strength: float) -> tuple[Tensor, Tensor]:
        """A and B of equal size, with strength B A this product. Ranks of no size have a zero in B alone: they can
        still be trained."""
        kept = self.S.gt(torch.finfo(torch.float32).eps * self.S.max())
        root = (self.S / strength).sqrt()
        return torch.where(kept, root, 1)[:, None] * self.V, self.U * torch.where(kept, root, 0)


@torch.no_grad()
def spectrum(A: Tensor, B: Tensor, strength: float) -> Spectrum:
    """Of strength B A. A: r x in, or more axes that count as one, B: out x r.

    Raises `InputError` where values are not finite.
    """
    A, B = (t.detach().to("cpu", torch.float64) for t in (A.flatten(1), B))
    if not (A.isfinite().all() and B.isfinite().all()):
        raise InputError("values of the adapter are not finite, so there is no best approximation; train it again")
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.t())
    U, S, V = torch.linalg.svd(R_out @ R_in.t())
    n = len(S)
    return Spectrum(Q_out @ U[:, :n], strength * S, V[:n] @ Q_in.t())
