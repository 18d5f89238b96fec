"""Textual inversion: new words as vectors of a text encoder's token embedding (Gal et al. 2022, arXiv 2208.01618).

    v_* = argmin E || eps - eps_theta(z_t, t, c(y)) ||^2        v: n d, n vectors a word; all else is frozen (eq. 2)

The words' ids lie behind the base's table E, which stays as it is. Where ids come in they are set to 0, so that neither
the table nor what looks for the end of the text among them meets one; behind the table, v stands in their places:

    h_i = v_k  where x_i = id_k,  E[x_i]  elsewhere

v begins as the embeddings of given tokens, as the paper has it ("a single-word descriptor"), or as N(0, 0.02). Several
vectors a word are its section 5. With LoRA besides it is pivotal tuning (cf. Roich et al. 2021, arXiv 2106.05744), with
`CrossAttention` Custom Diffusion (arXiv 2212.04488). Whoever tokenizes has to give the ids:
`vismodal.diffusion.words.teach` lets a pipeline's tokenizers do so.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.methods.initial import drawn
from vismodal.site import Site


class Vectors(SpanModule):
    """v: n d, of all words one after the other, and the ids that stand for them, which are in no file."""

    whole = True
    ids: Tensor  # n

    def __init__(self, site: Site, words: dict[str, slice], ids: Sequence[int], starts: Sequence[int]):
        super().__init__()
        table = cast(nn.Embedding, site.modules["exit"]).weight
        n = max(part.stop for part in words.values())
        size, own = len(table), [i for i in ids if i < len(table)]
        if wrong := [i for i in starts if not 0 <= i < size]:
            raise InputError(f"TextualInversion: starts are ids of {site.key}'s {size} tokens, not {wrong[0]}")
        self.words = words
        self.known = bool(ids)  # whether somebody gives the ids, so that a text without them is none that lacks them
        self.register_buffer("ids", torch.tensor(ids or range(size, size + n), device=table.device), persistent=False)
        begin = list(starts) * (n if len(starts) == 1 else 1) or (own if len(own) == n else [])
        if begin:
            self.v = nn.Parameter(table.detach()[begin].float())
        else:
            self.v = drawn(partial(nn.init.normal_, std=0.02), n, site.width, device=table.device)

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        found = x[..., None] == self.ids  # b l n
        if not self.known and not torch.compiler.is_compiling():
            self._tell_of_strangers(found)
        context["row"], context["new"] = found.int().argmax(-1), found.any(-1)
        return x.masked_fill(context["new"], 0)

    def _tell_of_strangers(self, found: Tensor) -> None:
        """Warns, once, of words that no tokenizer knows: the base then reads them as ever, and nothing else tells."""
        self.known = True
        if not found.any():
            warnings.warn(
                f"no text has the ids of the new words {', '.join(self.words)}, so the base reads these as ever: write "
                "vismodal.diffusion.words.teach(pipe, adapter), or see that your tokenizer gives the ids",
                stacklevel=2,
            )

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        row, new = context["row"].view(y.shape[:-1]), context["new"].view(*y.shape[:-1], 1)
        return torch.where(new, F.embedding(row, self.v.to(y.dtype)), y)


@dataclass(frozen=True, kw_only=True, repr=False)
class TextualInversion(Method):
    """New words, arXiv 2208.01618.

    Args:
        words: as they stand in prompts; the adapter's file holds them.
        vectors: how many each word has, or all of them have.
        starts: ids of the base's tokens that the vectors begin as, one for each, or one for all.
        ids: what stands for the vectors in the model's input; without them, the numbers behind the base's table. The
            base's own are let, and are then learnt anew.
        lr_ratio: learning rate of the vectors over that of all else, in `adapter.groups`.
        until: the update after which the vectors stay as they are, if any.
    """

    sites: tuple[str, ...] = ("text.tokens",)
    words: tuple[str, ...] = ("<new>",)
    vectors: tuple[int, ...] = (1,)
    starts: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    lr_ratio: float = 1.0
    until: int | None = None

    survey: ClassVar[str] = "additive: soft prompts"
    paper: ClassVar[str] = "arXiv 2208.01618"
    mergeable: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.words or any(not word or word.split() != [word] for word in self.words):
            raise InputError(f"TextualInversion: words are given without spaces, such as ('<dog>',), not {self.words}")
        if twice := [word for word in self.words if self.words.count(word) > 1]:
            raise InputError(f"TextualInversion: the word {twice[0]!r} is given twice")
        if len(self.vectors) not in (1, len(self.words)) or min(self.vectors) < 1:
            raise InputError(
                f"TextualInversion: vectors are a number above 0 for each of {len(self.words)} words, or one for all; "
                f"not {self.vectors}"
            )
        n = sum(self.vectors) * (len(self.words) if len(self.vectors) == 1 else 1)
        for name, given, allowed in (("starts", self.starts, (0, 1, n)), ("ids", self.ids, (0, n))):
            if len(given) not in allowed:
                raise InputError(f"TextualInversion: {name} has {len(given)} numbers for {n} vectors")
        if not self.lr_ratio > 0:
            raise InputError(f"TextualInversion: lr_ratio must be above 0, not {self.lr_ratio}")

    @property
    def rows(self) -> dict[str, slice]:
        """The rows of v that are each word's."""
        counts = self.vectors * (len(self.words) if len(self.vectors) == 1 else 1)
        ends = list(accumulate(counts))
        return {word: slice(end - n, end) for word, n, end in zip(self.words, counts, ends, strict=True)}

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.kind == "text.tokens" and not _why_not(site)

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if why := _why_not(site):
                raise InputError(f"TextualInversion cannot attach to {site.key} ({site.kind}): {why}")
        return Built(tuple(Vectors(site, self.rows, self.ids, self.starts) for site in sites))

    def rate(self, tensor: str) -> float:
        return self.lr_ratio

    def last(self, tensor: str) -> int | None:
        return self.until


def _why_not(site: Site) -> str:
    if not isinstance(site.modules.get("exit"), nn.Embedding):
        return "it does not end at a table of embeddings; sites=('text.tokens',) does"
    if site.modules["enter"] is site.modules["exit"]:
        return "the end of a text is looked for among the ids before the span begins, and new ones would mislead that"
    return ""
