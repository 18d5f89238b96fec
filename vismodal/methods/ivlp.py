"""IVLP: independent vision-language prompting, deep prompts on both towers of CLIP (Rasheed et al. 2022,
arXiv 2212.03640; the baseline of MaPLe, arXiv 2210.03117, section 4.1).

    texts      [s; P_0; class name; e], P_j overwrites these places before block j     P: J n d_t
    pictures   [c; Q_0; E],             Q_j overwrites what became of Q_j-1            Q: J n d_v

for j < J; the towers share nothing. P_0 begins with the embeddings of words, the others as N(0, 0.02). The official
code joins Q behind the patches and before the first norm; there is no order among tokens without positions.
sites=("tokens",) with image_tokens=8 and depth=None is visual prompt tuning of CLIP as in that paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method
from vismodal.methods.deepprompts import (
    DeepImages,
    DeepTexts,
    check_depth,
    context,
    why_no_images,
    why_no_text,
)
from vismodal.site import Site


@dataclass(frozen=True, kw_only=True, repr=False)
class IVLP(Method):
    """Independent vision-language prompting, arXiv 2212.03640, on a CLIPClassifier.

    Args:
        text_tokens: n in texts.
        image_tokens: n in pictures.
        depth: J, the number of blocks of each tower with prompts of their own; all of them by default.
        words: what the first n tokens of the texts say at the start; "" draws them at random.
    """

    sites: tuple[str, ...] = ("text.features", "tokens")
    text_tokens: int = 2
    image_tokens: int = 2
    depth: int | None = None
    words: str = "a photo of a"

    survey: ClassVar[str] = "additive: soft prompts"
    paper: ClassVar[str] = "arXiv 2212.03640"
    mergeable: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_tokens < 1 or self.image_tokens < 1:
            raise InputError(f"{self!r}: tokens must be at least 1; sites= leaves a tower out")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return not why_no_text(site) or not why_no_images(site)

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(self.module(site) for site in sites))

    def module(self, site: Site) -> nn.Module:
        name = type(self).__name__
        if not why_no_text(site):
            return DeepTexts(site, context(site, self.words, self.text_tokens), check_depth(name, self.depth, site))
        if why := why_no_images(site):
            raise InputError(f"{name} cannot attach to {site.key} ({site.kind}): {why}")
        return DeepImages(site, self.image_tokens, check_depth(name, self.depth, site))
