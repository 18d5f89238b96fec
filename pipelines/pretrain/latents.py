"""What tiny-sd learns from: cached latents of composites, and captions that say what is on them."""

from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from loop import single_core_threads
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vismodal.data.emoji import (
    COLOURS,
    SIZE,
    Emoji,
    Layout,
    caption,
    compose,
    draw_layout,
    load_emoji,
    plain_caption,
    rng,
    to_tensor,
)

SMALL = 36  # px of an emoji that is called small; usual is 56


def layout_of(seed: int, emoji: int, view: int) -> Layout:
    """The layout of one cached view: always centred, one on each ground, then small ones and two-coloured ones in turn.

    One size and place, unless the caption says "small": a prompt then has one answer, which is learnt in a fraction of
    the steps (RESULTS.md).
    """
    r, colours = rng(seed, "train", view, emoji), list(COLOURS)
    if view < len(colours):
        colour = colours[(view + emoji) % len(colours)]
        return Layout(emoji, colour, colour, 56, 4, 4)
    if view % 2:
        colour = colours[r.integers(len(colours))]
        return Layout(emoji, colour, colour, SMALL, (SIZE - SMALL) // 2, (SIZE - SMALL) // 2)
    return draw_layout(r, emoji, two_tone=1, fixed=True)


def attribute_of(layout: Layout) -> str:
    """The word that a caption has for the layout's size."""
    return "small" if layout.size == SMALL else ""


class Latents:
    """Batches of (latent, caption) keyed by step, of `views` composites of each Noto emoji, encoded once into `out`."""

    def __init__(self, vae: AutoencoderKL, data: Path, out: Path, views: int, seed: int, workers: int) -> None:
        self.emoji, self.views, self.seed = load_emoji(data, "noto"), views, seed
        file = out / "latents-train.safetensors"
        if not file.exists():
            save_latents(vae, self.emoji, views, seed, workers, file)
        self.latents = load_file(file)["latents"]
        if self.latents.shape[:2] != (len(self.emoji), views):
            raise ValueError(f"the cached latents are {tuple(self.latents.shape)}: delete {file}")

    def batch(self, step: int, batch: int, first_name: float, drop: float) -> tuple[Tensor, list[str]]:
        """float [b, z, h, w] and b captions, some empty; all emoji in turn, in a new order each time round."""
        first, rows, texts = step * batch, [], []
        for place in range(first, first + batch):
            turn, k = divmod(place, len(self.emoji))
            i = int(self._order(turn)[k])
            r = rng(self.seed, "diffusion", turn, i)
            view = int(r.integers(self.views))
            layout = layout_of(self.seed, i, view)
            text = caption(r, self.emoji[i], layout, first_name, attribute_of(layout))
            rows.append(self.latents[i, view])
            texts.append("" if r.random() < drop else text)
        return torch.stack(rows).float(), texts

    def fixed(self, count: int) -> tuple[Tensor, list[str]]:
        """One composite each of `count` emoji, and what it shows in plain words."""
        chosen = rng(0, "validation choice").permutation(len(self.emoji))[:count]
        texts = [plain_caption(self.emoji[i], layout_of(self.seed, int(i), 1)) for i in chosen]
        return self.latents[torch.from_numpy(chosen), 1].float(), texts

    def _order(self, turn: int) -> np.ndarray:
        return rng(self.seed, "order", turn).permutation(len(self.emoji))


def save_latents(vae: AutoencoderKL, emoji: list[Emoji], views: int, seed: int, workers: int, file: Path) -> None:
    """Scaled latent means of `views` composites of each emoji, half precision [emoji, view, z, h, w]."""

    def encode(i: int) -> Tensor:
        x = to_tensor([compose(emoji[i], layout_of(seed, i, view)) for view in range(views)])
        # modes of a thread: `no_grad` and autocast set outside would not reach in here
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x).latent_dist.mode()
        return (z.float() * vae.config["scaling_factor"]).half()

    with single_core_threads(workers) as pool:
        parts = list(tqdm(pool.map(encode, range(len(emoji))), "latents", len(emoji), mininterval=5))
    temporary = file.with_suffix(".tmp")
    save_file({"latents": torch.stack(parts).contiguous()}, temporary)  # convolutions may hand out channels_last
    temporary.replace(file)
