"""Rotations of the rows or the columns of a weight, block by block: what OFT and BOFT have in common.

    R = (I + Q) (I - Q)^-1        Q = -Q^T: b x b, from its entries above the diagonal; Cayley's transform

Only R - I = 2 (I - Q)^-1 Q is ever formed: it is exactly zero at Q = 0 and loses no digits near it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Part, WeightModule
from vismodal.methods.initial import drawn, zeros
from vismodal.methods.layers import add_rows, channel_axis, is_plain, is_quantised_linear, matrix, multiply
from vismodal.site import Site

Side = Literal["in", "out"]


def skew(entries: Tensor, b: int) -> Tensor:
    """entries: ... b(b-1)/2 above the diagonal, row by row -> Q: ... b b."""
    i, j = torch.triu_indices(b, b, 1, device=entries.device)
    Q = entries.new_zeros(*entries.shape[:-1], b, b)
    Q[..., i, j] = entries
    return Q - Q.mT


def turn(Q: Tensor, terms: int = 0) -> Tensor:
    """R - I for Q: ... b b. With `terms` the inverse is the sum of Q^0 ... Q^(terms - 2), so R has powers below `terms`
    and is a rotation only nearly."""
    I = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)
    if not terms:
        return torch.linalg.solve(I - Q, 2 * Q)
    total = power = Q
    for _ in range(terms - 2):
        last, power = power, power @ Q
        total = total + last + power  # 2 (Q + ... ) + the last power once
    return total


def rotate(x: Tensor, turns: Tensor, back: bool = False) -> Tensor:
    """x: ... n -> R x along its last axis, R = R_m ... R_1; turns: m k b b are R_i - I of the k = n / b blocks. `back`
    is R^T x.

    R_1 acts on neighbours. The blocks of R_i are halves of length b / 2 that lie 2^(i-1) apart, a butterfly.
    """
    k, b = turns.shape[1:3]
    for i in reversed(range(len(turns))) if back else range(len(turns)):
        blocks = turns[i].mT if back else turns[i]
        z = x.unflatten(-1, (-1, 2, 2**i, b // 2)).transpose(-3, -2).flatten(-4) if i else x
        z = z.unflatten(-1, (k, b))
        z = (z + torch.einsum("...kc,kbc->...kb", z, blocks)).flatten(-2)
        x = z.unflatten(-1, (-1, 2**i, 2, b // 2)).transpose(-3, -2).flatten(-4) if i else z
    return x


class Rotation(WeightModule):
    """W' = diag(g) W R^T on the columns of W (side "in"), diag(g) R W on its rows ("out"); g are ones where it is not
    trained. Convolutions count as matrices out x (in/g kh kw)."""

    def __init__(self, W: Tensor, side: Side, block: int, stages: int, terms: int, rescale: bool):
        super().__init__()
        self.side, self.block, self.terms = side, block, terms
        size = W.shape[0] if side == "out" else W[0].numel()
        self.Q = drawn(zeros, stages, size // block, block * (block - 1) // 2, device=W.device)
        self.g = drawn(nn.init.ones_, W.shape[0], device=W.device) if rescale else None

    def turns(self, dtype: torch.dtype) -> Tensor:
        with torch.autocast(self.Q.device.type, enabled=False):
            wide = torch.promote_types(dtype, torch.float32)
            return turn(skew(self.Q.to(wide), self.block), self.terms).to(dtype)

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is not None
        M, turns = W.flatten(1), self.turns(W.dtype)
        M = rotate(M, turns) if self.side == "in" else rotate(M.t(), turns).t()
        M = M if self.g is None else self.g.to(M.dtype)[:, None] * M
        return M.reshape(W.shape), b


class OutputRotation(Rotation):
    """On rows: y' = y + (diag(g) R - I) (y - b), which costs no product with W."""

    reads_weight: ClassVar[bool] = True  # its bias

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        grouped = getattr(layer, "groups", 1) > 1  # a block may go over several groups, which read different inputs
        return is_plain(layer) and not isinstance(layer, nn.Embedding) and not grouped

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        axis = channel_axis(layer, y)
        z = y.movedim(axis, -1)
        bias = cast(Tensor | None, layer.bias)
        z = z if bias is None else z - bias.to(z.dtype)
        for part in parts:
            module = cast(OutputRotation, part.module)
            old = z if part.range is None else z[..., part.range[0] : part.range[1]]
            new = rotate(old, module.turns(y.dtype))
            new = new if module.g is None else new * module.g.to(y.dtype)
            y = add_rows(layer, part, y, (new - old).movedim(-1, axis))
        return y


class InputRotation(Rotation):
    """On columns; of a quantised W, of which no W' is formed, y' = y + diag(g) W (R^T x - x) + (g - 1) (y - b), a
    second product."""

    reads_weight: ClassVar[bool] = True

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return is_quantised_linear(layer)

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        bias = cast(Tensor | None, layer.bias)
        y0 = y if bias is None else y - bias.to(y.dtype)
        for part in parts:
            module = cast(InputRotation, part.module)
            change = multiply(layer, part, rotate(x, module.turns(x.dtype), back=True) - x)
            if module.g is not None:
                old = y0 if part.range is None else y0[..., slice(*part.range)]
                change = change + (module.g - 1).to(y.dtype) * (old + change)
            y = add_rows(layer, part, y, change)
        return y


def rotation(method: str, site: Site, side: Side, block: int, stages: int, terms: int, rescale: bool) -> Rotation:
    """The module for a site, with the largest blocks that fit, up to `block`. Raises `InputError` where none does."""
    W = matrix(method, site)
    size = W.shape[0] if side == "out" else W[0].numel()
    fits = [b for b in range(2, block + 1) if size % (b << stages - 1) == 0 and (stages == 1 or b % 2 == 0)]
    if not fits:
        what = "rows" if side == "out" else "columns"
        of = f"{stages} stages of blocks" if stages > 1 else "blocks"
        other = "in" if side == "out" else "out"
        raise InputError(
            f"{method}: the {size} {what} of {site.key} ({site.kind}) do not divide into {of} of 2 to {block}; "
            f"write another block_size or side={other!r}, or leave this site out"
        )
    cls = Rotation if site.axis else OutputRotation if side == "out" else InputRotation
    return cls(W, side, fits[-1], stages, terms, rescale)
