"""How a personalised generator is measured (Ruiz et al. 2023, arXiv 2208.12242, sections 4.1 and 4.4).

With unit features f of pictures (of a self-supervised ViT, "DINO", or of CLIP's image tower) and t of prompts:

    subject similarity   mean over all pairs  f_generated . f_real            DINO and CLIP-I; higher is better
    prompt fidelity      mean over pictures   f . t of its own prompt         CLIP-T; higher is better
    PRES                 mean over all pairs  f_class . f_real                lower is better
    DIV                  1 - mean over pairs i < j of  f_class,i . f_class,j  higher is better
    drift                mean over pictures   1 - f_adapted . f_base          lower is better

Class pictures are what the adapted model draws for "a photo of a dog": it should not draw the subject there (PRES), nor
the same dog every time (DIV). Drift compares pictures of the same seed for prompts without the subject's word. The
paper takes LPIPS for DIV; here it is the ViT's features, so figures of DIV are not the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


def similarity(a: Tensor, b: Tensor) -> float:
    """Mean cosine over all pairs of a (n, d) and b (m, d)."""
    return (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T).mean().item()


def among(features: Tensor) -> float | None:
    """Mean cosine over the pairs i < j of (n, d); None where there is no pair."""
    n = len(features)
    if n < 2:
        return None
    unit = F.normalize(features, dim=-1)
    return ((unit @ unit.T).triu(1).sum() / (n * (n - 1) / 2)).item()


def diversity(features: Tensor) -> float | None:
    """1 - the mean cosine among (n, d): 0 where all are alike; None for less than two."""
    mean = among(features)
    return None if mean is None else 1 - mean


def own(images: Tensor, others: Tensor) -> float:
    """Mean cosine of each row with the same row of the other, both (n, d): pictures and their prompts."""
    return F.cosine_similarity(images, others).mean().item()


def drift(adapted: Tensor, base: Tensor) -> float:
    """1 - the mean cosine of pictures of the same prompt and seed, (n, d) each; 0 where nothing has changed."""
    return 1 - own(adapted, base)


@dataclass(frozen=True)
class Seen:
    """What encoders see in the pictures of one model.

    Args:
        dino, clip: features of the pictures of the prompts, (n, d) each.
        asked: CLIP's features of each picture's prompt, (n, d); None where prompts are not known.
        kind: ViT features of pictures of the class, (m, d); None where there are none.
        plain: ViT features of pictures of prompts without the subject's word, (k, d); None where there are none.
    """

    dino: Tensor
    clip: Tensor
    asked: Tensor | None = None
    kind: Tensor | None = None
    plain: Tensor | None = None


Scores = dict[str, float | None]
SCORES: Mapping[str, str] = {
    "dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "pres": "PRES", "div": "DIV", "drift": "drift",
}  # fmt: skip


def scores(seen: Seen, real: Seen, base: Seen | None = None) -> Scores:
    """All figures of a model's pictures against the real ones, and against the base model's; None where one lacks."""
    return {
        "dino": similarity(seen.dino, real.dino),
        "clip_i": similarity(seen.clip, real.clip),
        "clip_t": None if seen.asked is None else own(seen.clip, seen.asked),
        "pres": None if seen.kind is None else similarity(seen.kind, real.dino),
        "div": None if seen.kind is None else diversity(seen.kind),
        "drift": None if seen.plain is None or base is None or base.plain is None else drift(seen.plain, base.plain),
    }


def real_scores(real: Seen) -> Scores:
    """The real pictures among themselves: what a perfect generator would have."""
    return {"dino": among(real.dino), "clip_i": among(real.clip)} | dict.fromkeys(("clip_t", "pres", "div", "drift"))


def by_prompt(seen: Seen, real: Seen, prompts: Sequence[str]) -> list[dict[str, str | float | None]]:
    """DINO, CLIP-I and CLIP-T of the pictures of each prompt; `prompts` names that of every picture."""
    found: list[dict[str, str | float | None]] = []
    for prompt in dict.fromkeys(prompts):
        at = [i for i, other in enumerate(prompts) if other == prompt]
        part = Seen(seen.dino[at], seen.clip[at], None if seen.asked is None else seen.asked[at])
        found.append({"prompt": prompt, **{k: v for k, v in scores(part, real).items() if k[:4] in ("dino", "clip")}})
    return found
