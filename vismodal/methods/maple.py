"""MaPLe: multi-modal prompt learning (Khattak et al. 2022, arXiv 2210.03117, equations 6 to 10).

    texts      [s; P_0; rest of the words, class name; e], P_j overwrites these places before block j     P: J n d_t
    pictures   [c; Q_0; E], Q_j overwrites what became of Q_j-1,  Q_j = W_j P_j + w_j     W: J d_v d_t, w: J d_v

for j < J. P_0 begins with the embeddings of the first n tokens of "a photo of a", of which the rest stays; the other
P_j as N(0, 0.02), W and w as nn.Linear. The official code copies one draw of W to all deeper blocks; here each is drawn
for itself. It joins Q behind the patches and before the first norm; there is no order among tokens without positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, share
from vismodal.methods.deepprompts import (
    DeepTexts,
    ImagePrompts,
    check_depth,
    context,
    why_no_images,
    why_no_text,
)
from vismodal.methods.initial import drawn
from vismodal.site import Site


class Coupled(ImagePrompts):
    """W and w."""

    shared: DeepTexts

    def __init__(self, site: Site, n: int, depth: int, width: int):
        super().__init__(site, n, depth)
        uniform = partial(nn.init.uniform_, a=-1 / math.sqrt(width), b=1 / math.sqrt(width))  # both as in nn.Linear
        self.W = drawn(uniform, depth, site.width, width, device=site.device)
        self.w = drawn(uniform, depth, site.width, device=site.device)

    def prompts(self, j: int) -> Tensor:
        return F.linear(self.shared.P[j], self.W[j], self.w[j])


@dataclass(frozen=True, kw_only=True, repr=False)
class MaPLe(Method):
    """Multi-modal prompt learning, arXiv 2210.03117, on a CLIPClassifier.

    Args:
        tokens: n, of each block and tower.
        depth: J, the number of blocks of each tower with prompts of their own.
        words: what the texts begin with, of which the prompts take the first n tokens; "" draws these at random.
    """

    sites: tuple[str, ...] = ("text.features", "tokens")
    tokens: int = 2
    depth: int = 9
    words: str = "a photo of a"

    survey: ClassVar[str] = "additive: soft prompts"
    paper: ClassVar[str] = "arXiv 2210.03117"
    mergeable: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise InputError(f"MaPLe: tokens must be at least 1, not {self.tokens}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return not why_no_text(site) or not why_no_images(site)

    def build(self, sites: Sequence[Site]) -> Built:
        texts = [s for s in sites if not why_no_text(s)]
        images = [s for s in sites if s not in texts]
        for site in images:
            if why := why_no_images(site):
                raise InputError(f"MaPLe cannot attach to {site.key} ({site.kind}): {why}")
        if len(texts) != 1 or len(images) != 1:
            raise InputError(f"MaPLe couples the two towers of a CLIPClassifier, sites={MaPLe.sites}")
        for site in sites:
            check_depth("MaPLe", self.depth, site)
        P = DeepTexts(texts[0], context(texts[0], self.words, self.tokens), self.depth)
        Q = Coupled(images[0], self.tokens, self.depth, texts[0].width)
        share(Q, P)
        return Built(tuple(P if site is texts[0] else Q for site in sites))
