"""Prompts around a subject's word: is it there, what remains without it, and which prompt goes with which photo."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vismodal.errors import InputError

if TYPE_CHECKING:
    from vismodal.data.photos import Photo


def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands in the text by itself, in whatever case: "sks" does in "SKS-dog", not in "tasks"."""
    return _pattern(word).search(text) is not None


def without_word(text: str, word: str) -> str:
    """The text without that word: "a photo of sks dog" without "sks" is "a photo of dog"."""
    return " ".join(_pattern(word).sub(" ", text).split())


def check_subject(prompt: str, word: str) -> None:
    """Raises `InputError` unless the subject's word stands in the prompt."""
    if not word.strip() or not has_word(prompt, word):
        raise InputError(
            f"the prompt {prompt!r} lacks the subject's word {word!r}; put it in, as in "
            f'"a photo of {word} dog", or say with --subject which of its words stands for your subject'
        )


def check_class(prompt: str, word: str) -> None:
    """Raises `InputError` unless the prompt says something, and that without the subject's word."""
    if not prompt.strip() or has_word(prompt, word):
        raise InputError(
            f"the class prompt {prompt!r} must say what the subject is one of, without {word!r}; "
            'write e.g. --class_prompt "a photo of a dog"'
        )


def prompts_for(photos: Iterable[Photo], prompt: str, word: str) -> list[str]:
    """Each photo's prompt: its caption, with the prompt before it where it lacks the word; or the prompt."""
    captions = [photo.caption for photo in photos]
    return [prompt if c is None else c if has_word(c, word) else f"{prompt}, {c}" for c in captions]
