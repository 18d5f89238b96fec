"""CoOp: context optimization (Zhou et al. 2021, arXiv 2109.01134, section 3.2).

    t_c = g([s; v_1 .. v_M; class name "."; e])        v: M d, one context for all classes, or C M d, one for each

The prompts hold M tokens where the context is to stand, and v overwrites their embeddings, before positions are added:
the causal mask and the place of the end token are those of a text of that length. v is N(0, 0.02), or the embeddings of
given words, of which M then is the number. As the official code's default has it, the name stands at the end.
The class names are not in an adapter's file: one context for all classes can be loaded for other classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method
from vismodal.methods.deepprompts import Context, TextPrompts, context, start_of, why_no_text
from vismodal.site import Site


class Contexts(TextPrompts):
    """v, of the same start for every class."""

    def __init__(self, site: Site, context: Context, classes: int):
        super().__init__(context)
        self.v = start_of(context, site)
        if classes:
            self.v = nn.Parameter(self.v.detach().repeat(classes, 1, 1))

    def prompts(self, j: int) -> Tensor:
        return self.v


@dataclass(frozen=True, kw_only=True, repr=False)
class CoOp(Method):
    """Context optimization, arXiv 2109.01134, on a CLIPClassifier.

    Args:
        tokens: M; by default the number of tokens of the words, 16 without words.
        words: what the context says at the start, such as "a photo of a"; "" draws it at random.
        per_class: a context for each class.
    """

    sites: tuple[str, ...] = ("text.features",)
    tokens: int | None = None
    words: str = ""
    per_class: bool = False

    survey: ClassVar[str] = "additive: soft prompts"
    paper: ClassVar[str] = "arXiv 2109.01134"
    mergeable: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"CoOp: tokens must be at least 1, not {self.tokens}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return not why_no_text(site)

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(self._module(site) for site in sites))

    def _module(self, site: Site) -> Contexts:
        if why := why_no_text(site):
            raise InputError(f"CoOp cannot attach to {site.key} ({site.kind}): {why}")
        each = context(site, self.words, self.tokens)
        return Contexts(site, each, len(each.ids) if self.per_class else 0)
