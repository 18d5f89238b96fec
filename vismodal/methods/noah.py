"""NOAH: neural prompt search, a supernet over prompts, LoRA and adapters (Zhang et al. 2022, arXiv 2206.04673).

    block i     [c; P_i[:p_i]; E] -> block                              P: p x d
    attention   W + B_i[:, :r_i] A_i[:r_i] for queries, keys, values    A: r x d, B: 3d x r
    MLP         y + U_i[:, :w_i] quickgelu(D_i[:w_i] y + d_i[:w_i]) + u_i      D: w x d, U: d x w

A subnet is the sizes p_i, r_i and w_i of every block: choices for the first so many blocks, zero for the others. All
subnets share one set of tensors, of which they use the first rows and columns. In train mode every update has its
subnet, drawn from `seed` and the update's number alone; in eval mode the largest acts, or the one that was chosen.
`vismodal.evolve` searches the best within a budget of parameters, and `NOAH(subnet=...)` trains that one anew.

A and D begin as in the official code (Kaiming, Xavier), B and U are zero. There all are drawn again when the model is
built, B too, against the paper's intent. Prompts stand at the sequence's end there, which attention does not see, and
their last ones go on through blocks that have none, which here they do not. LoRA's A is shared by queries, keys and
values where those are one layer, "attn.qkv"; elsewhere use sites=("block", "attn.q", "attn.k", "attn.v", "mlp").
LoRA and adapters begin at the base, prompts do not. Of the three only LoRA could merge, so NOAH stays live.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule, WeightModule
from vismodal.methods.base import Part as WeightPart
from vismodal.methods.bottleneck import Bottleneck, on_branch
from vismodal.methods.initial import linear, zeros
from vismodal.methods.layers import is_matrix
from vismodal.methods.lowrank import LowRank
from vismodal.methods.subnets import Part, Sizes, Space
from vismodal.methods.tokens import Prompts, WindowPrompts, has_windows, refuse, why_no_prompts
from vismodal.site import Site


class Elastic(nn.Module):
    """Uses the first `size` rows of its tensors; `gene` is the place of its size in a subnet."""

    drawn: Tensor
    chosen: Tensor

    def stretch(self, part: int, gene: int, size: int, each: int, once: int, device: torch.device | None) -> None:
        """`each` parameters for a size of one, and `once` some for any size but none."""
        self.part, self.gene, self.largest = part, gene, size
        self.each, self.once = each, once
        self.sizes = {"drawn": size, "chosen": size}
        for name in self.sizes:  # what files and checkpoints hold of them
            self.register_buffer(name, torch.tensor(size, device=device))

    @property
    def size(self) -> int:
        return self.sizes["drawn" if self.training else "chosen"]

    @property
    def idle(self) -> bool:
        return self.size == 0

    def set(self, name: str, size: int) -> None:
        if not 0 <= size <= self.largest:
            raise InputError(f"a subnet cannot have size {size} where the supernet has {self.largest}")
        self.sizes[name] = size
        getattr(self, name).fill_(size)

    def count(self, size: int) -> int:
        """Parameters at a size."""
        return self.each * size + self.once * bool(size)


class NoSpan(Elastic, SpanModule):
    """What a subnet has where its size is zero."""


class NoWeight(Elastic, WeightModule):
    """The same on a weight."""

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return W, b

    @classmethod
    def can_update(cls, layer: nn.Module) -> bool:
        return True

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[WeightPart], x: Tensor, y: Tensor) -> Tensor:
        return y


class ElasticPrompts(Elastic, Prompts):
    def prompts(self) -> Tensor:
        return self.P[: self.size]


class ElasticWindowPrompts(Elastic, WindowPrompts):
    def prompts(self) -> Tensor:
        return self.P[: self.size]


class ElasticLoRA(Elastic, LowRank):
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A[: self.size], self.B[:, : self.size]

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return super().forward(W, b) if self.size else (W, b)

    @classmethod
    def update(cls, layer: nn.Module, parts: Sequence[WeightPart], x: Tensor, y: Tensor) -> Tensor:
        acting = [part for part in parts if not cast(Elastic, part.module).idle]
        return super().update(layer, acting, x, y) if acting else y


class ElasticAdapter(Elastic, Bottleneck):
    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        if not self.size:
            return y
        h = linear(y, self.down[: self.size], self.down_bias[: self.size])
        return y + linear(h * torch.sigmoid(1.702 * h), self.up[:, : self.size], self.up_bias)


@dataclass(frozen=True, kw_only=True, repr=False)
class NOAH(Method):
    """Neural prompt search, arXiv 2206.04673.

    Args:
        tokens: the numbers of prompts of a block to choose from; () for no prompts.
        ranks: of LoRA.
        widths: of the adapters.
        depths: shares of the blocks, from the first on, that have any of a kind.
        seed: of the subnets that are drawn while training.
        subnet: sizes of one subnet, which stays: the prompts of all blocks, then the ranks, then the widths.
    """

    sites: tuple[str, ...] = ("block", "attn.qkv", "mlp")
    tokens: Sizes = (5, 10, 50, 100)
    ranks: Sizes = (5, 10, 50, 100)
    widths: Sizes = (5, 10, 50, 100)
    depths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    seed: int = 0
    subnet: Sizes = ()

    survey: ClassVar[str] = "hybrid"
    paper: ClassVar[str] = "arXiv 2206.04673"
    mergeable: ClassVar[bool] = False
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("block", "attn.q", "attn.k", "attn.v", "mlp"),)
    interpolates: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for choices in (self.tokens, self.ranks, self.widths):
            if not choices or min(choices) < 1:
                raise InputError(f"{self!r}: tokens, ranks and widths must each be one size or more, of at least 1")
        if not self.depths or not all(0 < share <= 1 for share in self.depths):
            raise InputError(f"{self!r}: depths must be shares of the blocks, above 0 and at most 1")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return not _why_not(site)

    def build(self, sites: Sequence[Site]) -> Built:
        refuse("NOAH", sites, _why_not)
        genes = _genes(sites)
        if self.subnet and len(self.subnet) != len(genes):
            raise InputError(f"NOAH: subnet has {len(self.subnet)} sizes, but the blocks here take {len(genes)}")
        places = {gene: i for i, gene in enumerate(genes)}
        modules = tuple(self._module(site, places[_gene(site)]) for site in sites)
        self.step(modules, 0, 0)
        return Built(modules)

    def _module(self, site: Site, gene: int) -> Elastic:
        part = _part(site)
        size = self.subnet[gene] if self.subnet else max((self.tokens, self.ranks, self.widths)[part])
        W = site.tensor if site.span is None else None
        module: Elastic
        if not size:
            module = NoSpan() if W is None else NoWeight()
        elif W is not None:
            module = ElasticLoRA(W, size, 1.0, 0.0)
        elif site.kind == "mlp":
            module = ElasticAdapter(site, size, torch.sigmoid, nn.init.xavier_uniform_, zeros)
        else:
            bound = math.sqrt(6 / (site.width * (size + 1)))  # Xavier's, over 1 x p x d
            module = (ElasticWindowPrompts if has_windows(site) else ElasticPrompts)(site, size, bound)
        each = site.width * (2 if part == 2 else 1) + (part == 2) if W is None else W.shape[0] + W[0].numel()
        once = site.width if part == 2 else 0
        module.stretch(part, gene, size, each, once, site.device if W is None else W.device)
        return module

    def space(self, modules: Sequence[nn.Module]) -> Space:
        """The subnets of the modules that `build` made."""
        blocks = [len({m.gene for m in _elastic(modules) if m.part == part}) for part in range(3)]
        choices = zip(blocks, (self.tokens, self.ranks, self.widths), strict=True)
        return Space(tuple(Part(n, sizes, self._depths(n)) for n, sizes in choices if n))

    def _depths(self, blocks: int) -> Sizes:
        return tuple(sorted({max(1, round(share * blocks)) for share in self.depths}))

    @staticmethod
    def choose(modules: Sequence[nn.Module], subnet: Sizes) -> None:
        """Lets a subnet act in eval mode."""
        for m in _elastic(modules):
            m.set("chosen", subnet[m.gene])

    @staticmethod
    def chosen(modules: Sequence[nn.Module], training: bool = False) -> Sizes:
        """The subnet that acts in eval mode, or while training."""
        sizes = {m.gene: m.sizes["drawn" if training else "chosen"] for m in _elastic(modules)}
        return tuple(sizes[gene] for gene in sorted(sizes))

    @staticmethod
    def count(modules: Sequence[nn.Module], subnet: Sizes) -> int:
        """Parameters of a subnet."""
        return sum(m.count(subnet[m.gene]) for m in _elastic(modules))

    def step(self, modules: Sequence[nn.Module], step: int, steps: int) -> None:
        if self.subnet:
            return
        subnet = self.space(modules).draw(Random(f"{self.seed} noah {step}"))
        for m in _elastic(modules):
            m.set("drawn", subnet[m.gene])

    def resize(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        for name in {"drawn", "chosen"} & tensors.keys():
            cast(Elastic, module).set(name, int(tensors[name]))


def _elastic(modules: Sequence[nn.Module]) -> Sequence[Elastic]:
    return cast(Sequence[Elastic], modules)


def _part(site: Site) -> int:
    return 1 if site.span is None else 0 if site.kind == "block" else 2


def _gene(site: Site) -> tuple[int, str, int]:
    """Sites of one kind in one block have one size."""
    return _part(site), site.tower, -1 if site.index is None else site.index


def _genes(sites: Sequence[Site]) -> list[tuple[int, str, int]]:
    """In the order of a subnet: by part, then as the blocks come."""
    return sorted(dict.fromkeys(map(_gene, sites)), key=lambda gene: gene[0])


def _why_not(site: Site) -> str:
    if site.span is None:
        return "" if site.kind.startswith("attn.") and is_matrix(site) else "LoRA goes to attention here"
    if site.kind == "mlp":
        return "" if on_branch(site) else "it has no stream of tokens of a known width"
    return why_no_prompts(site) if site.kind == "block" else "NOAH goes to sites=('block', 'attn.qkv', 'mlp')"
