"""Trains the small BPE vocabulary that tiny-sd and tiny-clip share: a folder that `CLIPTokenizer.from_pretrained`
loads.

    python pipelines/pretrain/tokenizer.py --data ../shared/data --out runs/pretrain/tokenizer

CLIP's own layout (Radford et al. 2021, https://arxiv.org/abs/2103.00020): 256 bytes, the same 256 with `</w>`, the
merges, `<|startoftext|>`, `<|endoftext|>`. Both byte alphabets are complete whether or not the corpus holds them, so
any text encodes ("sks" too) and nothing becomes the unknown token, which in CLIP is the end of text and would cut the
prompt.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from vismodal.data.emoji import COLOURS, PLACE_FORMS, SUBJECT_FORMS, load_emoji
from vismodal.formats.open_clip import save_tokenizer

# Words of DreamBooth's prompt list and classes: not in any caption here, but in what people will type.
PROMPT_WORDS = (
    "a an the of on in at with and photo picture image drawing painting sketch style dog cat puppy kitten"
    " backpack teapot toy robot stuffed animal wolf sneaker shoe car monster duck jungle snow beach street"
    " cobblestone fabric wooden floor city background mountain house wheat field tree autumn leaves eiffel tower"
    " water ocean rug box scarf hat santa rainbow police outfit chef firefighter glasses yellow shirt purple"
    " wizard cube red wet shiny small big two close up centered"
)


@dataclass(frozen=True)
class Config:
    """Settings; `size` counts bytes and specials, `length` is the prompt's longest, in tokens with its two specials."""

    data: Path
    out: Path = Path("runs/pretrain/tokenizer")
    size: int = 4096
    length: int = 32


def corpus(data: Path) -> list[str]:
    """Names and keywords of the emoji, colours, forms, CIFAR-100's classes where they are, and prompt words."""
    lines = [name for e in load_emoji(data, "noto") for name in (*e.names, e.category)]
    # Repeated, because merges are made in order of frequency and these words are in most captions.
    lines += [*COLOURS, *PROMPT_WORDS.split()] * 20
    lines += [form.format(a="a", name="", s="", c="") for form in SUBJECT_FORMS + PLACE_FORMS] * 20
    classes = data / "cifar100_train.npz"
    if classes.exists():
        lines += [str(name).replace("_", " ") for name in np.load(classes)["classes"]] * 3
    return lines


def learn_merges(lines: Iterable[str], count: int) -> list[Any]:
    """The `count` most useful merges, or fewer where all words are whole before."""
    tokenizer = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=512 + count,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
    )
    tokenizer.train_from_iterator(lines, trainer)
    return [(a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]][:count]


def build(lines: Iterable[str], size: int, length: int) -> CLIPTokenizer:
    """The tokenizer with at most `size` entries."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(lines, size - 2 * len(letters) - 2)
    entries = [
        *letters,
        *(f"{b}</w>" for b in letters),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def ids_of(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids int64 [n, length], padded as diffusers' pipeline and open_clip pad them."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def main(c: Config) -> CLIPTokenizer:
    """Trains and saves."""
    tokenizer = build(corpus(c.data), c.size, c.length)
    save_tokenizer(tokenizer, c.out)
    return tokenizer


if __name__ == "__main__":
    config = auto_cli(Config, as_positional=False)
    trained = main(config)
    for text in ("a drawing of a strawberry on a blue background", "a photo of sks dog", "Größe 12€ 日本 🍓"):
        ids = trained(text).input_ids
        print(
            len(trained),
            len(ids),
            trained.convert_ids_to_tokens(ids),
            "->",
            trained.decode(ids, skip_special_tokens=True),
        )
