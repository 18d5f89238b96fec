"""How pictures of emoji are scored against the true ones, by a judge that never saw the model that drew them.

For a picture that ought to show emoji e on ground c, and the candidates' true composites on c in several places:

    likeness   cosine of the picture and the nearest composite of e in the Fluent style
    named      whether no other candidate's Fluent composite is nearer
    lean       that cosine less the one with e's nearest Noto composite: from the base's style (below 0) to the new one
    style      whether it leans to Fluent: the same as a share, easier to read and noisier
    ground     whether the rim has the colour c

and for a picture whose prompt lacks the word, beside the base's picture of the same prompt and seed:

    drift      1 - cosine of the two pictures
    kept       whether no other candidate's Noto composite is nearer than e's, as with the base when it draws well
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vismodal.data.emoji import Emoji, rng
from vismodal.diffusion.encode import encode_images
from vismodal.diffusion.kinds import Pipe
from vismodal.evaluation.emoji_tasks import GROUNDS, Emojis, Question, Task
from vismodal.evaluation.judge import Judge, ground_of, likeness, placed, true_views


class Truth:
    """What the judge sees in the true composites of all candidates, in both styles, on every ground."""

    def __init__(self, judge: Judge, emojis: Emojis, views: int, seed: int) -> None:
        self.judge = judge
        styles = {"noto": emojis.noto, "fluent": emojis.fluent}
        keys = [(style, ground) for style in styles for ground in GROUNDS]
        self.views: dict[tuple[str, str], Tensor] = {}  # n v d each
        for style, ground in tqdm(keys, desc="judging true pictures", unit="ground"):
            there = true_views(styles[style], ground, seed=seed, purpose="true view", views=views)
            self.views[style, ground] = judge.views(there)

    def likeness(self, features: Tensor, questions: Sequence[Question], style: str) -> Tensor:
        """(p, n): pictures' features (p, d) to every candidate in that style, each on its question's ground."""
        rows = [likeness(f[None], self.views[style, q.ground]) for f, q in zip(features, questions, strict=True)]
        return torch.cat(rows)


def asked_scores(truth: Truth, questions: Sequence[Question], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Means over the pictures of likeness, lean, style, named and ground."""
    features, own = truth.judge.features(pictures), torch.tensor([q.emoji for q in questions])
    fluent, noto = (truth.likeness(features, questions, style) for style in ("fluent", "noto"))
    to_fluent, to_noto = (x.gather(1, own[:, None])[:, 0] for x in (fluent, noto))
    grounds = [ground_of(picture) == q.ground for picture, q in zip(pictures, questions, strict=True)]
    return {
        "likeness": to_fluent.mean().item(),
        "lean": (to_fluent - to_noto).mean().item(),
        "style": _share(to_fluent > to_noto),
        "named": _share(fluent.argmax(1) == own),
        "ground": _share(torch.tensor(grounds)),
    }


def plain_scores(
    truth: Truth, questions: Sequence[Question], pictures: Sequence[Image.Image], base: Sequence[Image.Image]
) -> dict[str, float]:
    """Means over the pictures of drift and kept."""
    features, own = truth.judge.features(pictures), torch.tensor([q.emoji for q in questions])
    same = F.cosine_similarity(features, truth.judge.features(base))
    named = truth.likeness(features, questions, "noto").argmax(1) == own
    return {"drift": max(0.0, (1 - same).mean().item()), "kept": _share(named)}


def answers(task: Task, emoji: Sequence[Emoji], seed: int) -> list[Image.Image]:
    """True pictures, in that style, of what a task asks for, in places of their own: the ceiling, or the base's."""
    key = f"{task.name} answer"
    return [placed(emoji[q.emoji], q.ground, rng(seed, key, 0, i)) for i, q in enumerate(task.questions)]


def through(pipe: Pipe, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures encoded and decoded: no adapter of the UNet can draw better ones."""
    result: list[Image.Image] = []
    for picture in pictures:
        mean, _ = encode_images(pipe, pipe.image_processor.preprocess(picture))
        with torch.no_grad():
            result += pipe.image_processor.postprocess(pipe.vae.decode(mean).sample, output_type="pil")
    return result


def _share(yes: Tensor) -> float:
    return yes.float().mean().item()
