"""Prompts of their own for the first J blocks of a tower: in texts they overwrite tokens, in pictures they are joined.

    texts      [s; P_0; class name; e], P_0 after the token embedding, P_j overwrites the same places before block j
    pictures   [c; P_0; E], P_j overwrites what became of P_j-1 before block j; after the last block they are taken out

P_j: n d of that tower, j < J; in later blocks P_J-1 goes on as it came out of block J-1. s and e are the tokens that
begin and end a text, c the class and register tokens, E the patches.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vismodal.clip import Texts
from vismodal.errors import InputError
from vismodal.methods.base import SpanModule
from vismodal.methods.initial import drawn
from vismodal.methods.tokens import drop, join, overwrite
from vismodal.site import Site


class Context(NamedTuple):
    """Where the prompts of all classes have room for n tokens of context, and what stands there in words."""

    ids: Tensor  # C L
    start: int
    n: int
    words: Tensor | None  # n d, the embeddings of the words


def context(site: Site, words: str, n: int | None) -> Context:
    """Prompts "{words} {class}." with the first n tokens of the words as context, all of them where n is None; without
    words "{class}." with n tokens that stand for any, 16 where n is None.

    Raises `InputError` where the words have fewer tokens than n or run into the names, or a prompt does not fit.
    """
    texts = cast(Texts, site.modules.get("text", site.modules["enter"]))
    empty, one = texts.tokenize(["", words or texts.classes[0]]).tolist()
    start = next(i for i, (a, b) in enumerate(zip(empty, one, strict=True)) if a != b)
    if not words:
        n = 16 if n is None else n
        ids = _with_room(texts, texts.tokenize([f"{name}." for name in texts.classes]), start, n, empty)
        return Context(ids.to(texts.ids.device), start, n, None)
    there = one.index(empty[start], start) - start
    n = there if n is None else n
    if n > there:
        raise InputError(f"{words!r} has {there} tokens, fewer than the {n} asked for; give more words, or words=''")
    ids = texts.tokenize([f"{words} {name}." for name in texts.classes])
    if ids[:, start : start + n].tolist() != [one[start : start + n]] * len(ids):
        raise InputError(f"the tokenizer runs {words!r} and the names of the classes together; take other words")
    embedding = cast(nn.Embedding, site.modules["tokens"])
    return Context(ids.to(texts.ids.device), start, n, embedding.weight.detach()[one[start : start + n]].float())


def _with_room(texts: Texts, ids: Tensor, start: int, n: int, empty: list[int]) -> Tensor:
    """n tokens, of whatever word, before the names."""
    end, padding = empty[start], empty[-1]
    new = torch.cat((ids[:, :start], ids[:1, start : start + 1].expand(len(ids), n), ids[:, start:]), 1)
    kept, lost = new.split((ids.shape[1], n), 1)
    for name, fits in zip(texts.classes, (lost == padding).all(1) & (kept == end).any(1), strict=True):
        if not fits:
            raise InputError(f"{name!r} and {n} tokens of context are more than the model's {ids.shape[1]}; take fewer")
    return kept


def start_of(context: Context, site: Site) -> nn.Parameter:
    """n d: the embeddings of the words, or N(0, 0.02)."""
    if context.words is not None:
        return nn.Parameter(context.words.clone())
    return drawn(partial(nn.init.normal_, std=0.02), context.n, site.width, device=site.device)


def check_depth(name: str, depth: int | None, site: Site) -> int:
    """The number of blocks with prompts of their own, all of them where it is None."""
    if depth is not None and not 1 <= depth <= site.depth:
        raise InputError(f"{name}: depth={depth}, but {site.key} goes over {site.depth} blocks; say at most that many")
    return site.depth if depth is None else depth


class TextPrompts(SpanModule):
    """On the span from token ids to features of the classes, whose prompts it has of its own."""

    def __init__(self, context: Context, depth: int = 1):
        super().__init__()
        self.depth = depth
        self.start, self.n = context.start, context.n
        self.register_buffer("ids", context.ids, persistent=False)

    def prompts(self, j: int) -> Tensor:
        """P_j: n d, or one for each row, ... n d."""
        raise NotImplementedError

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return cast(Tensor, self.ids)

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        j = 0 if name == "tokens" else 1 + int(name.rpartition(".")[2])
        return overwrite(y, self.prompts(j), self.start) if j < self.depth else y


class DeepTexts(TextPrompts):
    """P: J n d, of which the first begins with the embeddings of the words, the others with N(0, 0.02)."""

    def __init__(self, site: Site, each: Context, depth: int):
        super().__init__(each, depth)
        rest = drawn(partial(nn.init.normal_, std=0.02), depth - 1, each.n, site.width, device=site.device)
        self.P = nn.Parameter(torch.cat((start_of(each, site).detach()[None], rest.detach())))

    def prompts(self, j: int) -> Tensor:
        return self.P[j]


class ImagePrompts(SpanModule):
    """On the span over all blocks of the image tower."""

    def __init__(self, site: Site, n: int, depth: int):
        super().__init__()
        self.n, self.depth = n, depth
        self.place = site.layout.prefix if site.layout else 0

    def prompts(self, j: int) -> Tensor:
        """P_j: n d."""
        raise NotImplementedError

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        context["behind"] = x.shape[1] - self.place  # whatever others join before P_0 later
        return join(x, self.prompts(0), self.place)

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        j = 1 + int(name.rpartition(".")[2])
        return overwrite(y, self.prompts(j), self._start(y, context)) if j < self.depth else y

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return drop(y, self.n, self._start(y, context))

    def _start(self, y: Tensor, context: dict[str, Any]) -> int:
        return y.shape[1] - int(context["behind"]) - self.n


class DeepImages(ImagePrompts):
    """Q: J n d, N(0, 0.02)."""

    def __init__(self, site: Site, n: int, depth: int):
        super().__init__(site, n, depth)
        self.Q = drawn(partial(nn.init.normal_, std=0.02), depth, n, site.width, device=site.device)

    def prompts(self, j: int) -> Tensor:
        return self.Q[j]


def why_no_text(site: Site) -> str:
    """Why there are no places for text prompts; "" where there are."""
    if site.span is None or site.kind != "text.features":
        return "text prompts go to a CLIPClassifier, sites=('text.features',)"
    return ""


def why_no_images(site: Site) -> str:
    """Why prompts cannot be joined to the tokens of pictures; "" where they can."""
    if site.span is None or site.kind != "tokens" or site.tower == "text":
        return "prompts of pictures go over all blocks of the image tower, sites=('tokens',)"
    if not any(name.startswith("block.") for name in site.modules) or not site.width:
        return "it does not say where its blocks are, or how wide"
    return site.fixed
