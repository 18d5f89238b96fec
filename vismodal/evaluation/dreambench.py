"""DreamBench's prompts (Ruiz et al. 2023, arXiv 2208.12242, section 4.1): 25 for things, 25 for living subjects.

From `prompts_and_classes.txt` of the paper's data set, github.com/google/dreambooth. In each, the first gap is for the
subject's rare word and the second one for its class.
"""

from __future__ import annotations

from typing import Literal

from vismodal.errors import InputError

Subject = Literal["object", "live"]

_BOTH = (
    "a {} {} in the jungle",
    "a {} {} in the snow",
    "a {} {} on the beach",
    "a {} {} on a cobblestone street",
    "a {} {} on top of pink fabric",
    "a {} {} on top of a wooden floor",
    "a {} {} with a city in the background",
    "a {} {} with a mountain in the background",
    "a {} {} with a blue house in the background",
    "a {} {} on top of a purple rug in a forest",
)
_LOOKS = ("a red {} {}", "a purple {} {}", "a shiny {} {}", "a wet {} {}", "a cube shaped {} {}")

TEMPLATES: dict[Subject, tuple[str, ...]] = {
    "object": (
        *_BOTH,
        "a {} {} with a wheat field in the background",
        "a {} {} with a tree and autumn leaves in the background",
        "a {} {} with the Eiffel Tower in the background",
        "a {} {} floating on top of water",
        "a {} {} floating in an ocean of milk",
        "a {} {} on top of green grass with sunflowers around it",
        "a {} {} on top of a mirror",
        "a {} {} on top of the sidewalk in a crowded street",
        "a {} {} on top of a dirt road",
        "a {} {} on top of a white rug",
        *_LOOKS,
    ),
    "live": (
        *_BOTH,
        "a {} {} wearing a red hat",
        "a {} {} wearing a santa hat",
        "a {} {} wearing a rainbow scarf",
        "a {} {} wearing a black top hat and a monocle",
        "a {} {} in a chef outfit",
        "a {} {} in a firefighter outfit",
        "a {} {} in a police outfit",
        "a {} {} wearing pink glasses",
        "a {} {} wearing a yellow shirt",
        "a {} {} in a purple wizard outfit",
        *_LOOKS,
    ),
}


def prompts_of(kind: Subject, word: str, noun: str) -> list[str]:
    """The 25 prompts of a subject: `prompts_of("live", "sks", "dog")`. Raises `InputError` where a word is empty."""
    if not word.strip() or not noun.strip():
        raise InputError(f"the prompts need the subject's word and its class, not {word!r} and {noun!r}")
    return [template.format(word, noun) for template in TEMPLATES[kind]]
