"""Emoji composites with captions: what the embedded models were trained on, and what `vismodal bench emoji` measures.

A composite is one RGBA emoji at a random size and place on a background of a named colour (sometimes two), 64 px. Its
captions name the emoji and, mostly, the background. Every draw comes from a generator keyed (seed, purpose, step,
index), so a resumed run sees the batches that it would have seen, and the evaluation composites never change.

The data folder holds `emoji/{noto,fluent}/*.{png,webp}`, the same emoji under the same stem in two drawing styles, each
with a `metadata.jsonl` of `file_name`, `text`, `keywords` and `category`.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vismodal.errors import InputError

SIZE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "gray": (140, 140, 140),
    "red": (214, 48, 48),
    "orange": (245, 140, 40),
    "yellow": (250, 215, 70),
    "green": (60, 165, 80),
    "blue": (45, 105, 220),
    "purple": (135, 70, 190),
    "pink": (250, 150, 190),
    "brown": (125, 80, 50),
}
# Plain forms come up as often as they do in a DreamBooth prompt list, so that "a photo of a strawberry" works.
SUBJECT_FORMS = (
    "a drawing of {a}",
    "a drawing of {a}",
    "a picture of {a}",
    "a photo of {a}",
    "an image of {a}",
    "{a}",
    "{name}",
)
PLACE_FORMS = ("{s} on a {c} background", "{s} on a {c} background", "{s} on {c}", "{s}, {c} background")
# Which emoji only the evaluation sees: a hash of the file's stem, so that adding pictures moves no other.
HELD_OUT_MODULUS = 20


@dataclass(frozen=True)
class Emoji:
    """One emoji: premultiplied RGBA uint8 [h, w, 4] and the words that name it, best first."""

    stem: str
    rgba: np.ndarray
    names: tuple[str, ...]
    category: str

    @property
    def held_out(self) -> bool:
        """Whether the *autoencoder* never trains on it."""
        return zlib.crc32(self.stem.encode()) % HELD_OUT_MODULUS == 0


@dataclass(frozen=True)
class Layout:
    """How one composite is put together; `second` is the lower half's colour or the same as `colour`."""

    emoji: int
    colour: str
    second: str
    size: int
    left: int
    top: int


def rng(seed: int, purpose: str, step: int = 0, index: int = 0) -> np.random.Generator:
    """A generator keyed by what it is for, never by what was drawn before."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), step, index])


def load_emoji(data: Path, style: str) -> list[Emoji]:
    """All emoji of one style, sorted by file name."""
    folder = data / "emoji" / style
    listing = folder / "metadata.jsonl"
    if not listing.exists():
        raise InputError(f"{listing} is missing: `data` must be the folder that holds emoji/{style}")
    rows = sorted((json.loads(line) for line in listing.read_text().splitlines()), key=lambda row: row["file_name"])
    return [_read_emoji(folder, row) for row in rows]


def _read_emoji(folder: Path, row: dict[str, object]) -> Emoji:
    with Image.open(folder / str(row["file_name"])) as picture:
        # "RGBa" is premultiplied: resizing straight RGBA would pull the colour of invisible pixels into the edges.
        rgba = np.asarray(picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBa"))
    words = [str(row["text"]), *(str(k) for k in row["keywords"])]  # type: ignore[attr-defined]
    names = tuple(dict.fromkeys(w.replace("_", " ").replace("-", " ").lower().strip() for w in words))
    return Emoji(Path(str(row["file_name"])).stem, rgba, names, str(row["category"]).lower())


def draw_layout(r: np.random.Generator, emoji: int, two_tone: float = 0.1, fixed: bool = False) -> Layout:
    """Size, place and background of a composite; `fixed` centres the emoji at its usual size."""
    colours = list(COLOURS)
    colour = colours[r.integers(len(colours))]
    second = colours[r.integers(len(colours))] if r.random() < two_tone else colour
    size = 56 if fixed else int(r.integers(44, 61))
    left, top = (int(v) for v in ([4, 4] if fixed else r.integers(0, SIZE - size + 1, 2)))
    return Layout(emoji, colour, second, size, left, top)


def compose(emoji: Emoji, layout: Layout) -> np.ndarray:
    """The composite as uint8 [64, 64, 3]."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[: SIZE // 2] = COLOURS[layout.colour]
    canvas[SIZE // 2 :] = COLOURS[layout.second]
    small = Image.fromarray(emoji.rgba, "RGBa").resize((layout.size,) * 2, Image.Resampling.BICUBIC)
    front = np.asarray(small, np.float32)
    rows, cols = slice(layout.top, layout.top + layout.size), slice(layout.left, layout.left + layout.size)
    canvas[rows, cols] = canvas[rows, cols] * (1 - front[..., 3:] / 255) + front[..., :3]
    return canvas.clip(0, 255).round().astype(np.uint8)


def with_article(name: str) -> str:
    """`a strawberry`, `an apple`; names that end in s (`scissors`) stay bare."""
    if name.endswith("s") and not name.endswith("ss"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def background_of(layout: Layout) -> str:
    """The words for a layout's background: `blue`, or `blue and white`."""
    return layout.colour if layout.colour == layout.second else f"{layout.colour} and {layout.second}"


def caption(r: np.random.Generator, emoji: Emoji, layout: Layout, first_name: float = 0.7, attribute: str = "") -> str:
    """One of the many captions of a composite; a tenth name the category too, a fifth leave the background out.

    `first_name` is how often the emoji has its own name rather than any of its names and keywords; `attribute` is a
    word before it, such as "small".
    """
    name = emoji.names[0] if r.random() < first_name else emoji.names[r.integers(len(emoji.names))]
    name = f"{attribute} {name}".strip()
    text = SUBJECT_FORMS[r.integers(len(SUBJECT_FORMS))].format(a=with_article(name), name=name)
    if r.random() < 0.1:
        text = f"{text}, {emoji.category}"
    if r.random() < 0.8:
        text = PLACE_FORMS[r.integers(len(PLACE_FORMS))].format(s=text, c=background_of(layout))
    return text


def prompt_for(emoji: Emoji, ground: str) -> str:
    """The plainest words for an emoji on a ground: `a drawing of a strawberry on a blue background`."""
    return f"a drawing of {with_article(emoji.names[0])} on a {ground} background"


def plain_caption(emoji: Emoji, layout: Layout) -> str:
    """The one caption that evaluation uses."""
    return prompt_for(emoji, background_of(layout))


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 [b][64, 64, 3] to float [b, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
