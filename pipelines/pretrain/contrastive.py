"""Trains tiny-clip: an open_clip `CLIP` of 64 px on emoji of both styles, and on CIFAR-100 with its class names.

    python pipelines/pretrain/contrastive.py --data ../shared/data --assets assets/tiny-clip

Contrastive pre-training (Radford et al. 2021, https://arxiv.org/abs/2103.00020). An emoji comes twice in a batch, in
either style, each time in a place and on a ground of its own: telling the two apart takes the ground, telling them
from the others the drawing. Captions that fit several pictures (the ground unnamed, two photos of one class) count as
right for each, in equal parts. The image tower starts from tiny-vit (`--vit`), its 4 px patches stretched to 8. Run
again with the same `--out` to resume; `--export_only true` writes the newest checkpoint to `--assets` and ends.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import clip_card
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from cifar import hold_out, jitter, load_cifar, normalise
from jsonargparse import auto_cli
from loop import Schedule, Workers
from muon import Muon, split
from timm.models import VisionTransformer
from tokenizer import ids_of
from torch import Tensor, nn
from trainer import Trainer
from transfer import load_vit
from transformers import CLIPTokenizer

from vismodal.data.emoji import (
    SIZE,
    background_of,
    caption,
    compose,
    draw_layout,
    load_emoji,
    rng,
    with_article,
)

OUTER = ("conv1", "_embedding", "text_projection", "visual.proj", "logit_scale")
PHOTO_FORMS = ("a photo of {a}", "a photo of {a}", "a small photo of {a}", "a blurry photo of {a}", "{name}")


@dataclass(frozen=True)
class Config:
    """Settings of the run. A step takes `emoji` emoji, twice each, and `photos` of CIFAR-100; `vit` is the folder of
    the ViT that the image tower starts from, none for a random start."""

    data: Path
    out: Path = Path("runs/pretrain/tiny-clip")
    tokenizer: Path = Path("runs/pretrain/tokenizer")
    vit: Path | None = Path("assets/tiny-vit")
    assets: Path = Path("assets/tiny-clip")
    seed: int = 0
    steps: int = 20000
    minutes: float = 45
    emoji: int = 96
    photos: int = 64
    lr: float = 1e-3
    warmup: int = 100
    width: int = 192
    depth: int = 6
    text_width: int = 160
    text_depth: int = 3
    text_heads: int = 5
    joint: int = 160
    held_out: int = 1000
    evaluate: int = 500
    most: int | None = None
    export_only: bool = False
    workers: int = 2


def model_config(c: Config, tokenizer: CLIPTokenizer) -> dict[str, object]:
    """open_clip's `model_cfg`."""
    return {
        "embed_dim": c.joint,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": SIZE,
            "patch_size": SIZE // 8,
            "width": c.width,
            "layers": c.depth,
            "head_width": c.width // 3,
        },
        "text_cfg": {
            "context_length": tokenizer.model_max_length,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "tiny-clip",  # any name: open_clip then reads the tokenizer beside the config
            "tokenizer_kwargs": {"clean": "whitespace"},
            "width": c.text_width,
            "heads": c.text_heads,
            "layers": c.text_depth,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    }


@torch.no_grad()
def start_from(vit: VisionTransformer, tower: nn.Module) -> None:
    """Copies a timm ViT that has a norm before its blocks into open_clip's image tower of twice its resolution."""
    renamed = {
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "blocks": "transformer.resblocks",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "qkv.": "in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "norm.": "ln_post.",
    }
    target = tower.state_dict()
    for key, value in vit.state_dict().items():
        if key.startswith("head."):
            continue
        for old, new in renamed.items():
            key = key.replace(old, new)
        if key == "conv1.weight":
            # a stretched filter sees on a stretched picture what it saw on the small one
            value = F.interpolate(value, scale_factor=2, mode="nearest") / 4
        target[key].copy_(value.reshape(target[key].shape))


class Pairs:
    """Batches of (pictures, token ids, which caption fits which picture) keyed by step and worker."""

    def __init__(self, c: Config, tokenizer: CLIPTokenizer) -> None:
        self.c, self.tokenizer = c, tokenizer
        self.styles = [load_emoji(c.data, "noto"), load_emoji(c.data, "fluent")]
        photos = load_cifar(c.data, "train", c.most)
        self.photos, self.validation = (photos.subset(rows) for rows in hold_out(len(photos), c.held_out, c.seed))

    def batch(self, step: int, worker: int) -> tuple[Tensor, Tensor, Tensor]:
        """float [n, 3, 64, 64], int64 [n, length] and float [n, n], row i the share of each picture in caption i."""
        c = self.c
        r = rng(c.seed, "pairs", step, worker)
        pictures, texts, signs = self._emoji(r, c.emoji // c.workers)
        photos, names, kinds = self._photos(r, c.photos // c.workers)
        x = normalise(torch.cat([torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), photos]))
        n = len(texts)
        fits = torch.zeros(n + len(names), n + len(names))
        for i, (emoji, ground) in enumerate(signs):
            text_ground = ground if ground in texts[i] else None  # an unnamed ground fits any
            for j, (other, other_ground) in enumerate(signs):
                fits[i, j] = emoji == other and text_ground in (None, other_ground)
        fits[n:, n:] = kinds[:, None] == kinds[None]
        return x, ids_of(self.tokenizer, [*texts, *names]), fits

    def _emoji(self, r: np.random.Generator, count: int) -> tuple[list[np.ndarray], list[str], list[tuple[int, str]]]:
        chosen = r.permutation(len(self.styles[0]))[:count]
        pictures, texts, signs = [], [], []
        for style in self.styles:
            for i in chosen:
                layout = draw_layout(r, int(i))
                pictures.append(compose(style[i], layout))
                texts.append(caption(r, style[i], layout))
                signs.append((int(i), background_of(layout)))
        return pictures, texts, signs

    def _photos(self, r: np.random.Generator, count: int) -> tuple[Tensor, list[str], Tensor]:
        rows = torch.from_numpy(r.integers(len(self.photos), size=count))
        kinds = self.photos.labels[rows]
        names = [self.photos.classes[k] for k in kinds]
        forms = [PHOTO_FORMS[i] for i in r.integers(len(PHOTO_FORMS), size=count)]
        texts = [form.format(a=with_article(n), name=n) for form, n in zip(forms, names, strict=True)]
        moved = jitter(self.photos.pictures[rows], r, 3)
        return clip_card.enlarge(moved), texts, kinds


def contrast(model: open_clip.CLIP, x: Tensor, ids: Tensor, fits: Tensor) -> Tensor:
    """Cross-entropy of captions over pictures and of pictures over captions, each against its share of the fits."""
    with torch.autocast("cpu", torch.bfloat16):
        image, text, scale = model(x, ids)
    logits = scale * text.float() @ image.float().T
    by_text = F.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
    by_image = F.cross_entropy(logits.T, fits.T / fits.T.sum(1, keepdim=True))
    return (by_text + by_image) / 2


class ClipTrainer(Trainer[open_clip.CLIP]):
    """The run of tiny-clip."""

    def __init__(self, c: Config) -> None:
        torch.manual_seed(c.seed)
        self.c, self.tokenizer = c, CLIPTokenizer.from_pretrained(c.tokenizer)
        self.pairs = Pairs(c, self.tokenizer)
        model = open_clip.CLIP(**model_config(c, self.tokenizer))
        if c.vit is not None:
            start_from(load_vit(c.vit), model.visual)
        workers = Workers(model, c.workers)
        optimizer = Muon(*split(model, OUTER), lr=c.lr, pool=workers.pool)
        super().__init__("tiny-clip", c.out, model, workers, optimizer, Schedule(c.lr, c.steps, c.minutes, c.warmup))

    def losses(self, step: int) -> list[Callable[[], Tensor]]:
        """Each worker contrasts a batch of its own."""

        def loss(worker: int) -> Tensor:
            return contrast(self.model, *self.pairs.batch(step, worker))

        return [partial(loss, worker) for worker in range(self.c.workers)]

    def step(self, step: int) -> float:
        """One step; the logit scale stays within CLIP's bound."""
        loss = super().step(step)
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))
        return loss

    def measure(self) -> dict[str, float]:
        """On composites and photos that training does not see."""
        clip = clip_card.Clip(self.average.copy, partial(ids_of, self.tokenizer))
        return clip_card.measure(clip, self.pairs.styles, self.pairs.validation, self.c.evaluate)

    def write_assets(self) -> dict[str, float]:
        """Measured as they are loaded from there."""
        c, settings = self.c, model_config(self.c, self.tokenizer)
        return clip_card.write_assets(
            self.average.copy, settings, self.tokenizer, self.figures, c.data, c.evaluate, c.assets
        )


def main(c: Config) -> dict[str, float]:
    """Trains, or only exports."""
    trainer = ClipTrainer(c)
    return trainer.export() if c.export_only else trainer.train()


if __name__ == "__main__":
    print(json.dumps(main(auto_cli(Config, as_positional=False)), indent=1))
