"""The singular value decomposition of an update, of a product without forming it, and its factors again."""

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
    A, B = _finite(A.flatten(1)), _finite(B)
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.t())
    U, S, V = torch.linalg.svd(R_out @ R_in.t())
    n = len(S)
    return Spectrum(Q_out @ U[:, :n], strength * S, V[:n] @ Q_in.t())


@torch.no_grad()
def decompose(D: Tensor) -> Spectrum:
    """Of a matrix that is no product: out x in, or more axes that count as one. Raises `InputError` as `spectrum`."""
    D = _finite(D.flatten(1))
    if D.shape[0] > D.shape[1]:
        V, S, U = decompose(D.t())
        return Spectrum(U.t(), S, V.t())
    # by the small Gram matrix, many times as fast; the values themselves are lengths, so that small ones stay right
    _, U = torch.linalg.eigh(D @ D.t())
    P = U.t() @ D
    S, order = torch.linalg.vector_norm(P, dim=1).sort(descending=True)
    unit = torch.eye(*D.shape, dtype=D.dtype)
    V = torch.where(S[:, None] > 0, P[order] / S.clamp(min=torch.finfo(D.dtype).tiny)[:, None], unit)
    return Spectrum(U[:, order], S, V)


def _finite(t: Tensor) -> Tensor:
    t = t.detach().to("cpu", torch.float64)
    if not t.isfinite().all():
        raise InputError("values of the adapter are not finite, so there is no best approximation; train it again")
    return t
