"""RepAdapter: a linear adapter before attention and MLP that folds into them (Luo et al. 2023, arXiv 2302.08106).

    R(z) = z + s (B Drop(A z + a) + u)        z: ... x c, what the norm gives; A: r x c, a: r, B: c x r, u: c
    W R(z) + b = W' z + b'                    W' = W (I + s B A),  b' = b + s W (B a + u)

B is block-diagonal with g groups, each c/g x r/g, and stored as c x r/g. A is Xavier uniform, all else zero. One R
stands before the q, k and v that read the same stream, and before the up and gate of an MLP: the first of these sites
holds it, the others use it. Being a map of weights, it is live, merged and exported by the same two formulas.

Dropout acts on A z + a. It draws one mask for each layer called: for a fused qkv that is the official code's, separate
q, k and v get one each; where W' has to be formed (a shadowed weight) one mask of r values serves a whole forward.
In Swin it acts after windows are padded, in the official code before. The official ConvNeXt has an adapter before the
depthwise convolution too, which does not fold; here it stands before the MLP alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, Part, WeightModule, share
from vismodal.methods.initial import check_sizes, drawn, linear, zeros
from vismodal.quantised import values
from vismodal.site import Site

# whose layers read the stream that a norm gives
KINDS = ("attn.q", "attn.k", "attn.v", "attn.qkv", "xattn.q", "mlp.up", "mlp.gate", "mlp.in")


class Fold(WeightModule):
    """One weight that reads R(z). It holds the tensors of R, or uses those of another, its `shared`."""

    reads_weight: ClassVar[bool] = True

    def __init__(self, method: RepAdapter, W: Tensor, first: Fold | None):
        super().__init__()
        if first is not None:
            share(self, first)
            return
        c, r, g = W.shape[1], method.rank, method.groups
        self.scaling, self.dropout, self.groups = method.scaling, method.dropout, g
        self.A = drawn(nn.init.xavier_uniform_, r, c, device=W.device)
        self.B = drawn(zeros, c, r // g, device=W.device)
        self.a = drawn(zeros, r, device=W.device) if method.bias else None
        self.u = drawn(zeros, c, device=W.device) if method.bias else None

    @property
    def source(self) -> Fold:
        return cast(Fold, self.__dict__.get("shared", self))

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is not None
        R = self.source
        U, v = R.through(W)
        if R.training and R.dropout:
            U = U * F.dropout(U.new_ones(U.shape[1]), R.dropout)
        if v is not None and b is not None and R.a is not None:
            b = b + U @ R.a.to(W.dtype) + v
        return torch.addmm(W, U, R.A.to(W.dtype)), b

    def through(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        """s W B: out x r, and s W u: out, or None without biases."""
        B = torch.block_diag(*(self.scaling * self.B).to(W.dtype).chunk(self.groups))
        return W @ B, W @ (self.scaling * self.u).to(W.dtype) if self.u is not None else None

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        plain = type(layer).forward is nn.Linear.forward
        return plain and layer.weight.is_floating_point()  # type: ignore[operator]

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[Part], x: Tensor, y: Tensor) -> Tensor:
        """y + (s W B) Drop(A x + a) + s W u: W meets the r columns of B, never the tokens a second time."""
        R = cast(Fold, parts[0].module).source  # sites on one weight share one R
        h = linear(x, R.A, R.a) if R.a is not None else F.linear(x, R.A.to(x.dtype))
        h = F.dropout(h, R.dropout, R.training)
        U, v = R.through(values(cast(Tensor, layer.weight)))
        ranges = [part.range for part in parts if part.range is not None]
        if sum(stop - start for start, stop in ranges) not in (0, len(U)):  # not all of the rows
            kept = U.new_zeros(len(U))
            for start, stop in ranges:
                kept[start:stop] = 1
            U, v = U * kept[:, None], None if v is None else v * kept
        return y + F.linear(h, U, v)


@dataclass(frozen=True, kw_only=True, repr=False)
class RepAdapter(Method):
    """Reparameterisable adapters before attention and MLP, arXiv 2302.08106.

    Args:
        rank: r, the inner dimension.
        groups: g, the number of blocks of B; they divide the rank and the channels.
        scaling: s; the paper searches it in 0.1, 0.5, 1, 5, 10 for each task.
        dropout: probability on the inner features while training.
        bias: whether R has its biases a and u, which fold only into layers with a bias.
    """

    sites: tuple[str, ...] = ("attn.*", "mlp.*")
    rank: int = 8
    groups: int = 2
    scaling: float = 1.0
    dropout: float = 0.1
    bias: bool = True

    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "arXiv 2302.08106"
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("RepAdapter", self.rank, self.dropout)
        if self.groups < 1 or self.rank % self.groups:
            raise InputError(f"RepAdapter: rank {self.rank} does not divide into {self.groups} groups")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.kind in KINDS and site.slot == "weight" and site.axis == 0 and _is_matrix(site.tensor)

    def build(self, sites: Sequence[Site]) -> Built:
        first: dict[tuple[str, ...], Fold] = {}
        modules = []
        for site in sites:
            self._check(site)
            fold = Fold(self, site.tensor, first.get(_stream(site)))
            first.setdefault(_stream(site), fold)
            modules.append(fold)
        return Built(tuple(modules))

    def _check(self, site: Site) -> None:
        if not self.fits(site):
            raise InputError(
                f"RepAdapter stands where a norm is read ({', '.join(KINDS)}), on floating-point matrices; "
                f"{site.key} ({site.kind}) is none of these"
            )
        if self.bias and not has_bias(site):
            raise InputError(
                f"RepAdapter: {site.key} has no bias, into which those of the adapter could fold; write "
                "RepAdapter(bias=False)"
            )
        if site.tensor.shape[1] % self.groups:
            raise InputError(
                f"RepAdapter: the {site.tensor.shape[1]} channels of {site.key} do not divide into {self.groups} groups"
            )


def _is_matrix(W: Tensor) -> bool:
    return W.dim() == 2 and W.is_floating_point()


def has_bias(site: Site) -> bool:
    """Whether all rows of the site have a bias that is a parameter (BEiT's k has a buffer of zeros)."""
    whole = site.places[0].get("bias")
    if whole is None:
        return False
    first, last = site.range or (0, len(whole))
    start = 0
    for module, name, part in site.places[0].split("bias", whole):
        stop = start + len(part)
        if start < last and first < stop and module._parameters.get(name) is None:
            return False
        start = stop
    return True


def _stream(site: Site) -> tuple[str, ...]:
    """Equal for sites that read the same stream: ranges of one parameter, or layers side by side in one module."""
    if site.range is not None or site.whole:
        return (site.target,)
    return site.path.rpartition(".")[0], site.kind.partition(".")[0]
