"""VPT: visual prompt tuning (Jia et al. 2022, arXiv 2203.12119, equations 4 to 6).

    shallow, on the span over all blocks:   [c; P; E] -> blocks -> [c; .; E]
    deep, on every block i:                 [c; P_i; E] -> block i -> [c; .; E]        P: p x d

c are the class and register tokens, E the patches; prompts have no position. They are taken out where the span ends, so
that what follows sees the tokens it knows. Around each block this is the paper's rule of replacing them: what became of
P_i-1 is read by nothing.
In Swin the prompts of a block join every window after the block's first norm; neither the bias of relative positions
nor the mask of shifted windows acts on them. The official code pools its last prompts along with the patches; here, as
everywhere, only patches are pooled.
P is uniform in +-sqrt(6 / (3 patch_size^2 + d)). In CLIP towers the first deep prompts join after the norm that stands
before the blocks, the shallow ones before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method
from vismodal.methods.tokens import Prompts, WindowPrompts, has_windows, refuse, why_no_prompts
from vismodal.site import Site


@dataclass(frozen=True, kw_only=True, repr=False)
class VPT(Method):
    """Visual prompt tuning, arXiv 2203.12119: deep on sites=("block",), shallow on sites=("tokens",).

    Args:
        tokens: p, the number of prompts, of each block where they are deep.
        dropout: probability on the prompts while training.
        patch_size: side of the model's patches, which the range of the initial values depends on.
    """

    sites: tuple[str, ...] = ("block",)
    tokens: int = 10
    dropout: float = 0.0
    patch_size: int = 16

    survey: ClassVar[str] = "additive: soft prompts"
    paper: ClassVar[str] = "arXiv 2203.12119"
    mergeable: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 0 or self.patch_size < 1 or not 0 <= self.dropout < 1:
            raise InputError(f"{self!r}: tokens must be at least 0, patch_size at least 1, dropout in [0, 1)")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return not why_no_prompts(site)

    def build(self, sites: Sequence[Site]) -> Built:
        refuse("VPT", sites, why_no_prompts)
        return Built(tuple(self._module(site) for site in sites))

    def _module(self, site: Site) -> Prompts:
        kind = WindowPrompts if has_windows(site) else Prompts
        return kind(site, self.tokens, math.sqrt(6 / (3 * self.patch_size**2 + site.width)), self.dropout)
