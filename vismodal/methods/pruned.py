"""A small transformer block, which may begin as a structured pruning of a large one by the size of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.blocks import along
from vismodal.methods.initial import drawn, zeros
from vismodal.quantised import values
from vismodal.site import Site

MATRICES = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.down")
normal = partial(nn.init.normal_, std=0.02)
ones = nn.init.ones_


class Norm(nn.Module):
    """A layer norm in the dtype of its input."""

    def __init__(self, width: int, device: torch.device | None):
        super().__init__()
        self.weight, self.bias = drawn(ones, width, device=device), drawn(zeros, width, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), 1e-6)


class Linear(nn.Module):
    """A linear map in the dtype of its input."""

    def __init__(self, width: int, out: int, device: torch.device | None):
        super().__init__()
        self.weight, self.bias = drawn(normal, out, width, device=device), drawn(zeros, out, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return along(x, self.weight, self.bias)


class Block(nn.Module):
    """x <- x + attention(norm(x)); x <- x + mlp(norm(x))        x: b n c; gelu, or silu where the MLP has a gate."""

    def __init__(self, width: int, hidden: int, gated: bool, heads: int, causal: bool, device: torch.device | None):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = Norm(width, device), Norm(width, device)
        self.q, self.k, self.v, self.out = (Linear(width, width, device) for _ in range(4))
        self.up, self.down = Linear(width, hidden, device), Linear(hidden, width, device)
        self.gate = Linear(width, hidden, device) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        q, k, v = (f(n).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # b heads n c/heads
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        n = self.norm2(x)
        h = F.gelu(self.up(n)) if self.gate is None else F.silu(self.gate(n)) * self.up(n)
        return x + self.down(h)


Big = Mapping[str, Site]  # the sites of one block of the base, by kind


def blocks_of(site: Site) -> Sequence[Big]:
    """The weights and spans of each block within a site over blocks. Raises `InputError` where a matrix is missing."""
    blocks: list[dict[str, Site]] = [{} for _ in range(site.depth)]
    for s in site.within:
        if s.index is not None and s.kind in (*MATRICES, "mlp.gate", "attn", "mlp") and not s.blocked:
            blocks[s.index][s.kind] = s
    for big in blocks:
        if lacking := [kind for kind in MATRICES if kind not in big]:
            raise InputError(f"the blocks of {site.key} lack {', '.join(lacking)}, by which a side block is sized")
    return blocks


def channels_of(blocks: Sequence[Big], width: int) -> Tensor:
    """The `width` channels of the stream that the blocks write most to, by the sum of |w| over their rows."""
    score = sum(_matrix(big[kind]).abs().sum(1) for big in blocks for kind in ("attn.out", "mlp.down"))
    assert isinstance(score, Tensor)
    return _largest(score, width)


@torch.no_grad()
def prune(big: Big, small: Block, channels: Tensor) -> None:
    """Copy into `small` what it keeps of a block: these channels of the stream; of each head, and of the MLP's hidden
    units, those whose rows are largest on them."""
    q, k, v, up = (_matrix(big[kind])[:, channels] for kind in ("attn.q", "attn.k", "attn.v", "mlp.up"))
    gate = _matrix(big["mlp.gate"])[:, channels] if small.gate is not None else None
    size = q.abs().sum(1) + k.abs().sum(1) + v.abs().sum(1)
    inner = _of_each(size, small.heads, len(channels) // small.heads, big["attn.q"])
    hidden = _largest(up.abs().sum(1) + (0 if gate is None else gate.abs().sum(1)), small.up.weight.shape[0])
    for linear, kind, W in ((small.q, "attn.q", q), (small.k, "attn.k", k), (small.v, "attn.v", v)):
        _copy(linear, W[inner], big[kind].bias, inner)
    _copy(small.out, _matrix(big["attn.out"])[channels][:, inner], big["attn.out"].bias, channels)
    _copy(small.up, up[hidden], big["mlp.up"].bias, hidden)
    if small.gate is not None and gate is not None:
        _copy(small.gate, gate[hidden], big["mlp.gate"].bias, hidden)
    _copy(small.down, _matrix(big["mlp.down"])[channels][:, hidden], big["mlp.down"].bias, channels)
    for norm, kind in ((small.norm1, "attn"), (small.norm2, "mlp")):
        base = big[kind].modules.get("normed") if kind in big else None
        for name, p in norm.named_parameters():
            if isinstance(value := getattr(base, name, None), Tensor):
                p.copy_(value[channels])


def _matrix(site: Site) -> Tensor:
    W = site.weight
    if W is None or not W.is_floating_point() or W.dim() != 2:
        raise InputError(f"{site.key} is no floating-point matrix, so it cannot be pruned")
    return values(W).detach().float()


def _largest(score: Tensor, n: int) -> Tensor:
    return score.topk(n).indices.sort().values


def _of_each(score: Tensor, heads: int, n: int, site: Site) -> Tensor:
    """The n largest of each head, where the side's heads share the rows of the base's evenly."""
    if len(score) % heads or len(score) // heads < n:
        raise InputError(f"{site.key} has {len(score)} rows, of which {heads} heads cannot keep {n} each")
    rows = len(score) // heads
    kept = score.view(heads, rows).topk(n, 1).indices.sort(1).values
    return (kept + rows * torch.arange(heads, device=score.device)[:, None]).flatten()


def _copy(linear: Linear, W: Tensor, b: Tensor | None, rows: Tensor) -> None:
    linear.weight.copy_(W)
    if b is not None:
        linear.bias.copy_(b.detach()[rows])
