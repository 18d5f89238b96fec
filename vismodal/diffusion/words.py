"""New words of adapters in prompts: a pipeline's tokenizers read each as the ids of its vectors.

    teach(pipe, adapter)
    pipe("a photo of sks dog")     # as the adapter has it while that acts, and else as the base reads the word

The base's own tokenizer stays as it is, and is what the pipeline saves. A mark, "sks<|dog|> and sks<|cat|>", says whose
word is meant whatever acts, for a batch whose rows have adapters of their own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken
from torch import nn

from vismodal.adapter import Adapter
from vismodal.bank import bank_of
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.load import tokenizer_of
from vismodal.errors import InputError
from vismodal.fingerprint import BANK
from vismodal.methods.textualinversion import TextualInversion, Vectors

BASE = ""  # the owner in a mark that leaves a word to the base


class Word(NamedTuple):
    """A word of the adapter `owner`, what stands for it in a text, and whether its vectors act just now."""

    text: str
    owner: str
    spelling: str
    acts: Callable[[], bool]


class Reader:
    """What a tokenizer becomes that knows new words; a class of both is made for it."""

    plain: Any  # the base's own tokenizer
    words: list[Word]

    def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
        read = [spelt(t, self.words) for t in text] if isinstance(text, list) else spelt(text, self.words)
        return super().__call__(read, *args, **options)  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **options: Any) -> Any:
        return self.plain.save_pretrained(*args, **options)


def teach(pipe: Pipe, adapter: Adapter) -> None:
    """Lets the pipeline's prompts hold the words of an adapter on its text encoders.

    An adapter that is detached, switched off or not in use leaves its words to the base. Nothing is done for one
    without new words. Raises `InputError` for a word that another adapter on the pipeline has where both act, but only
    once a prompt holds it.
    """
    readers = kind_of(pipe).readers(pipe)
    words = words_of(adapter)
    for name, encoder in readers.items() if words else ():
        reader = _reader(pipe, tokenizer_of(name))
        found = _vectors(encoder, adapter.name)
        if not found:  # T5 beside CLIP: it reads the word as ever, without the mark
            reader.words += [Word(word, adapter.name, word, lambda: False) for word in words]
        for key, module in found.items():
            _give_ids(reader, module, adapter.name, _acting(encoder, adapter.name, key, module))


def words_of(adapter: Adapter) -> tuple[str, ...]:
    """The new words of an adapter."""
    methods = [method for method in adapter.methods.values() if isinstance(method, TextualInversion)]
    return tuple(dict.fromkeys(word for method in methods for word in method.words))


def marked(prompt: str, words: Sequence[str], owner: str) -> str:
    """The prompt with a mark at each of these words that says whose it is."""
    return _found(words).sub(lambda match: f"{match[1]}<|{owner}|>", prompt) if words else prompt


def spelt(text: Any, words: Sequence[Word]) -> Any:
    """A text with what stands for the words in it. Raises `InputError` for a word that several adapters mean."""
    if not isinstance(text, str) or not words:
        return text

    def spelling(match: re.Match[str]) -> str:
        mine = [word for word in words if word.text.lower() == match[1].lower()]
        meant = [w for w in mine if w.acts()] if match[2] is None else [w for w in mine if w.owner == match[2]]
        if len({word.owner for word in meant}) > 1:
            owners = ", ".join(dict.fromkeys(word.owner for word in meant))
            raise InputError(f"the word {match[1]!r} is one of several adapters that act: {owners}; use one of them")
        return meant[-1].spelling if meant else match[1]

    return _found([word.text for word in words]).sub(spelling, text)


def _found(words: Sequence[str]) -> re.Pattern[str]:
    """A word by itself, in whatever case, and its mark."""
    several = "|".join(re.escape(word) for word in sorted(set(words), key=len, reverse=True))
    return re.compile(rf"(?<!\w)({several})(?!\w)(?:<\|([^|]*)\|>)?", re.IGNORECASE)


def _reader(pipe: Pipe, name: str) -> Any:
    """The pipeline's tokenizer of that name, as one that knows new words."""
    given = getattr(pipe, name)
    if isinstance(given, Reader):
        return given
    reader = copy.deepcopy(given)
    own = type(given)
    reader.__class__ = type(own.__name__, (Reader, own), {"__module__": own.__module__})
    reader.plain, reader.words = given, []
    setattr(pipe, name, reader)
    return reader


def _vectors(encoder: nn.Module, adapter: str) -> dict[str, Vectors]:
    """An adapter's modules of new words on an encoder, by key."""
    attached = bank_of(encoder).attached.get(adapter) if BANK in encoder._modules else None
    return {k: m for k, m in attached.modules.items() if isinstance(m, Vectors)} if attached else {}


def _give_ids(reader: Any, module: Vectors, owner: str, acts: Callable[[], bool]) -> None:
    """Ids that nothing else has for the vectors of a module."""
    first = len(reader)
    names = [f"<|{first + i}|>" for i in range(len(module.ids))]
    reader.add_tokens([AddedToken(name, normalized=False) for name in names])
    with torch.no_grad():
        module.ids.copy_(torch.tensor(reader.convert_tokens_to_ids(names)))
    module.known = True
    reader.words += [Word(w, owner, " ".join(names[rows]), acts) for w, rows in module.words.items()]


def _acting(encoder: nn.Module, adapter: str, key: str, module: Vectors) -> Callable[[], bool]:
    def acts() -> bool:
        bank = bank_of(encoder) if BANK in encoder._modules else None
        attached = bank.attached.get(adapter) if bank else None
        if bank is None or attached is None or adapter not in bank.active:
            return False
        if attached.modules.get(key) is not module:  # another adapter, which was given the name of a detached one
            return False
        return bool(attached.enabled and attached.scale and key not in attached.dropped)

    return acts
