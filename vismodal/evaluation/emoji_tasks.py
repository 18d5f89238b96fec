"""The two tasks of `vismodal bench emoji`: a style and a subject, with pictures to learn from and questions.

Both are asked for by a rare word, as in DreamBooth: "a drawing of a strawberry in sks style on a blue background",
"a drawing of sks penguin on a blue background". What is drawn *without* the word must not change. Where the word gets
vectors of its own (textual inversion), they begin as a word that the model knows: "drawing", and the subject's name.

Nothing that is asked was learnt from: the style is asked of emoji whose Fluent drawing no part of tiny-sd has seen, not
even its autoencoder, and the subject on grounds that none of its pictures has.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from vismodal.data.emoji import Emoji, background_of, compose, draw_layout, load_emoji, plain_caption, prompt_for, rng
from vismodal.errors import InputError

GROUNDS = ("white", "blue", "orange")  # on which all questions are asked
# Ground and clockwise tilt in degrees of the subject's pictures, of which size and place are drawn. No mirror images:
# which way it looks is part of what it is.
POSES = (("black", 0), ("gray", 12), ("red", -12), ("yellow", 0), ("green", 20), ("purple", -20))


@dataclass(frozen=True)
class Question:
    """A prompt, and what its picture ought to show: candidate number `emoji` on that ground."""

    prompt: str
    emoji: int
    ground: str


@dataclass(frozen=True)
class Captioned:
    """Pictures and a caption for each."""

    images: Sequence[Image.Image]
    captions: Sequence[str]


@dataclass(frozen=True)
class Task:
    """What is learnt, the questions that measure it, and for a prior what is usual and has to stay.

    `begin` is what a new word for it begins as.
    """

    name: str
    learnt: Captioned
    questions: Sequence[Question]
    begin: str
    usual: Captioned | None = None


@dataclass(frozen=True)
class Emojis:
    """The emoji in both styles, in the same order.

    Args:
        noto, fluent: the candidates: those that are asked for by `questions`, the subject last.
        other_noto, other_fluent: those that may be learnt from.
    """

    noto: Sequence[Emoji]
    fluent: Sequence[Emoji]
    other_noto: Sequence[Emoji]
    other_fluent: Sequence[Emoji]


def read(data: Path, subject: str, candidates: int, seed: int) -> Emojis:
    """Draws `candidates` held-out emoji, and finds the subject. Raises `InputError` where there are too few."""
    noto = {e.stem: e for e in load_emoji(data, "noto")}
    both = [(noto[e.stem], e) for e in load_emoji(data, "fluent") if e.stem in noto]
    names = [n.names[0] for n, _ in both]
    if subject not in names:
        near = difflib.get_close_matches(subject, names, n=3) or names[:3]
        raise InputError(f"no emoji is called {subject!r}; write one such as {', '.join(map(repr, near))}")
    kept = names.index(subject)
    held = [i for i, (n, _) in enumerate(both) if n.held_out and i != kept]
    if len(held) < candidates:
        raise InputError(f"only {len(held)} emoji of {data} are held out; write --held_out {len(held)} or less")
    chosen = [*(held[i] for i in rng(seed, "candidates").permutation(len(held))[:candidates]), kept]
    others = [i for i, (n, _) in enumerate(both) if not n.held_out and i != kept]
    noto_of, fluent_of = ([pair[style] for pair in both] for style in (0, 1))
    return Emojis(*([of[i] for i in part] for part in (chosen, others) for of in (noto_of, fluent_of)))


def style(emojis: Emojis, word: str, count: int, views: int, seed: int) -> Task:
    """Learns from `views` composites of each of `count` emoji, on any ground; asked of every candidate but the subject.

    Raises `InputError` if there are fewer emoji.
    """

    def worded(caption: str) -> str:
        """In these words tiny-sd goes on drawing what it drew; "a sks drawing of" spoils it (LOG.md)."""
        return f" in {word} style on a ".join(caption.rsplit(" on a ", 1))

    learnt = composites(emojis.other_fluent, "learnt", count, views, seed)
    asked = [replace(q, prompt=worded(q.prompt)) for q in plain(emojis, len(emojis.noto) - 1)]
    return Task("style", replace(learnt, captions=[worded(c) for c in learnt.captions]), asked, begin="drawing")


def composites(emoji: Sequence[Emoji], purpose: str, count: int, views: int, seed: int) -> Captioned:
    """`views` composites of each of `count` of the emoji, anywhere on any ground, with plain captions.

    Raises `InputError` if there are fewer emoji.
    """
    if len(emoji) < count:
        raise InputError(f"there are only {len(emoji)} emoji to learn from; write --emoji with that or less")
    images, captions = [], []
    for i in rng(seed, purpose).permutation(len(emoji))[:count]:
        for view in range(views):
            layout = draw_layout(rng(seed, f"{purpose} place", view, int(i)), 0, two_tone=0)
            images.append(Image.fromarray(compose(emoji[i], layout)))
            captions.append(plain_caption(emoji[i], layout))
    return Captioned(images, captions)


def subject(emojis: Emojis, word: str, pictures: int, count: int, views: int, seed: int) -> Task:
    """Learns from the Fluent emoji in `POSES`; asked `pictures` times on each of `GROUNDS`.

    Usual are `views` composites of each of `count` Noto emoji; raises `InputError` if there are fewer.
    """
    emoji = emojis.fluent[-1]
    layouts = [draw_layout(rng(seed, "pose", i), 0, two_tone=0) for i in range(len(POSES))]
    layouts = [replace(at, colour=g, second=g) for at, (g, _) in zip(layouts, POSES, strict=True)]
    tilted = [replace(emoji, rgba=turned(emoji.rgba, angle)) for _, angle in POSES]
    images = [Image.fromarray(compose(e, at)) for e, at in zip(tilted, layouts, strict=True)]
    name = f"a drawing of {word} {emoji.names[0]} on a {{}} background"
    asked = [Question(name.format(g), len(emojis.noto) - 1, g) for g in GROUNDS for _ in range(pictures)]
    learnt = Captioned(images, [name.format(background_of(at)) for at in layouts])
    usual = composites(emojis.other_noto, "usual", count, views, seed)
    return Task("subject", learnt, asked, begin=emoji.names[0], usual=usual)


def plain(emojis: Emojis, count: int) -> list[Question]:
    """The first `count` candidates without the word, which the base was trained on."""
    return [
        Question(prompt_for(e, ground), i, ground)
        for i, e in enumerate(emojis.noto[:count])
        for ground in [GROUNDS[i % len(GROUNDS)]]
    ]


def turned(rgba: np.ndarray, angle: float) -> np.ndarray:
    """Premultiplied RGBA [h, w, 4], turned clockwise about its middle; the canvas grows and is shrunk again."""
    picture = Image.fromarray(rgba, "RGBa")
    turned = picture.rotate(-angle, Image.Resampling.BICUBIC, expand=True)
    return np.asarray(turned.resize(picture.size, Image.Resampling.BICUBIC))
