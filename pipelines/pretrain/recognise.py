"""Asks a ViT that never saw tiny-sd which emoji its pictures show, and on which ground.

    python pipelines/pretrain/recognise.py --data ../shared/data --assets assets/tiny-sd

One prompt for each of `count` emoji, "a drawing of X on a C background". The judge is the DINOv2-small of the data
folder at 98 px: a picture's class token is compared with those of true composites of all `count` emoji on ground C,
and the nearest by cosine names it; chance is 1 in `count`. True composites in other places are judged as well: that
is the ceiling.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from card import background_of, sample
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from jsonargparse import auto_cli
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vismodal.data.emoji import COLOURS, Emoji, compose, draw_layout, load_emoji, rng, to_tensor, with_article


@dataclass(frozen=True)
class Config:
    """What to judge: `count` prompts, each against `views` true composites of each emoji."""

    data: Path
    assets: Path = Path("assets/tiny-sd")
    seed: int = 2
    count: int = 100
    views: int = 2
    threads: int = 2


def load_judge(data: Path) -> nn.Module:
    """The ViT-S/14, its position embedding resampled to 98 px."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=98, num_classes=0)
    stored = load_file(data / "weights" / "vit_small_patch14_dinov2_saliency.safetensors")
    weights = {k: v.float() for k, v in stored.items()}
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [7, 7], num_prefix_tokens=1)
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def features(judge: nn.Module, pictures: Sequence[np.ndarray]) -> Tensor:
    """Unit class tokens [n, d] of uint8 pictures."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = to_tensor(pictures).add(1).div(2)
    x = F.interpolate(x, (98, 98), mode="bicubic", antialias=True).clamp(0, 1)
    return F.normalize(torch.cat([judge(part) for part in ((x - mean) / std).split(32)]), dim=-1)


def truths(c: Config, emoji: Sequence[Emoji], ground: str, purpose: str, views: int) -> list[np.ndarray]:
    """`views` composites of each emoji in turn, all on one ground."""
    layouts = [[draw_layout(rng(c.seed, purpose, view, i), i) for view in range(views)] for i in range(len(emoji))]
    return [
        compose(emoji[layout.emoji], replace(layout, colour=ground, second=ground)) for row in layouts for layout in row
    ]


def name_all(
    c: Config, judge: nn.Module, emoji: Sequence[Emoji], drawn: dict[str, dict[int, np.ndarray]]
) -> tuple[int, int]:
    """How many of the pictures, by ground and emoji, are named right, and how many true composites in their place."""
    right = ceiling = 0
    for ground, pictures in drawn.items():
        known = features(judge, truths(c, emoji, ground, "known views", c.views))
        fresh = truths(c, emoji, ground, "fresh view", 1)
        for pool, counts_for_us in (([pictures[i] for i in pictures], True), ([fresh[i] for i in pictures], False)):
            named = (features(judge, pool) @ known.T).argmax(1) // c.views
            hits = int((named == torch.tensor(list(pictures))).sum())
            right, ceiling = (right + hits, ceiling) if counts_for_us else (right, ceiling + hits)
    return right, ceiling


def main(c: Config) -> dict[str, float]:
    """Samples, judges, returns shares."""
    torch.set_num_threads(c.threads)
    everything, colours = load_emoji(c.data, "noto"), list(COLOURS)
    emoji = [everything[i] for i in rng(c.seed, "prompts").permutation(len(everything))[: c.count]]
    grounds = [colours[i % len(colours)] for i in range(len(emoji))]
    prompts = [
        f"a drawing of {with_article(e.names[0])} on a {g} background" for e, g in zip(emoji, grounds, strict=True)
    ]
    pipe = StableDiffusionPipeline.from_pretrained(c.assets, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pictures = sample(pipe, prompts, c.seed)
    drawn: dict[str, dict[int, np.ndarray]] = {}
    for i, ground in enumerate(grounds):
        drawn.setdefault(ground, {})[i] = pictures[i]
    right, ceiling = name_all(c, load_judge(c.data), emoji, drawn)
    grounds_right = sum(background_of(p) == g for p, g in zip(pictures, grounds, strict=True))
    n = len(emoji)
    return {
        "emoji_named_right": right / n,
        "true_composites_named_right": ceiling / n,
        "ground_right": grounds_right / n,
    }


if __name__ == "__main__":
    print(json.dumps(main(auto_cli(Config, as_positional=False)), indent=1))
