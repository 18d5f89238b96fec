"""Trains the autoencoder of tiny-sd: a diffusers `AutoencoderKL`, 64 px to an 8x8 latent.

    python pipelines/pretrain/autoencoder.py --data ../shared/data --out runs/pretrain/autoencoder

Loss: L1 + 2 MSE + half an L1 of the horizontal and vertical differences (edges are most of what an emoji is) + a
little KL (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.1, without their perceptual and
adversarial terms: no pretrained network is needed here). A quarter of the pictures are photos and as many Fluent
emoji, since adapters are trained through this autoencoder on both. Run again with the same `--out` to resume. What
was tried: RESULTS.md.
"""

import json
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jsonargparse import auto_cli
from loop import Schedule, Workers, load_state
from muon import Muon, split
from photos import Photos
from PIL import Image
from publish import replacing
from torch import Tensor
from trainer import Trainer

from vismodal.data.emoji import SIZE, Emoji, compose, draw_layout, load_emoji, rng, to_tensor


@dataclass(frozen=True)
class Config:
    """Settings of the run; `widths` from 64 px down, one per halving; `start` is a checkpoint to begin from."""

    data: Path
    out: Path = Path("runs/pretrain/autoencoder")
    seed: int = 0
    steps: int = 12000
    minutes: float = 40
    batch: int = 24
    lr: float = 1e-3
    warmup: int = 100
    widths: tuple[int, ...] = (16, 32, 64, 128)
    layers: int = 1
    groups: int = 8
    latent_channels: int = 32
    kl: float = 3e-4
    photos: float = 0.25
    fluent: float = 0.2
    most_photos: int = 6000
    evaluate: int = 256
    workers: int = 2
    start: Path | None = None
    muon: bool = True


def build(c: Config) -> AutoencoderKL:
    """The model; no attention in the middle: 64 positions see each other through the convolutions already."""
    n = len(c.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=c.widths,
        layers_per_block=c.layers,
        latent_channels=c.latent_channels,
        norm_num_groups=c.groups,
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def optimizer_of(c: Config, model: AutoencoderKL, pool: Executor) -> torch.optim.Optimizer:
    """Muon, or AdamW to compare."""
    if c.muon:
        return Muon(*split(model, ("conv_in", "conv_out", "quant_conv")), lr=c.lr, pool=pool)
    return torch.optim.AdamW(model.parameters(), lr=c.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)


class Pictures:
    """Batches keyed by step: Noto and Fluent composites without the held-out emoji, and photos."""

    def __init__(self, c: Config) -> None:
        self.c = c
        self.noto, self.fluent = (
            [e for e in load_emoji(c.data, style) if not e.held_out] for style in ("noto", "fluent")
        )
        self.photos = Photos(c.data, c.most_photos)

    def parts(self, step: int) -> list[tuple[Tensor, np.random.Generator]]:
        """One float [b / workers, 3, 64, 64] for each worker, and its generator of latent noise."""
        x = to_tensor([self._one(rng(self.c.seed, "autoencoder", step, i)) for i in range(self.c.batch)])
        return [(part, rng(self.c.seed, "latent noise", step, i)) for i, part in enumerate(x.chunk(self.c.workers))]

    def _one(self, r: np.random.Generator) -> np.ndarray:
        kind = r.random()
        if kind < self.c.photos and self.photos:
            return self.photos.draw(r)
        pool = self.fluent if kind > 1 - self.c.fluent else self.noto
        i = int(r.integers(len(pool)))
        return compose(pool[i], draw_layout(r, i, two_tone=0.3))


def loss_of(x: Tensor, y: Tensor, mean: Tensor, logvar: Tensor, kl_weight: float) -> Tensor:
    """The training loss; all terms are means per element."""
    error = y - x
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + kl_weight * kl


def unseen(data: Path, count: int) -> dict[str, Tensor]:
    """Evaluation pictures: composites of held-out emoji in both styles, and validation photos of the transfer sets."""
    sets = {style: held_out_composites(load_emoji(data, style), count) for style in ("noto", "fluent")}
    files = sorted(data.glob("transfer/*/val/*/*.jpg"))
    if files:
        chosen = rng(0, "evaluation photos").permutation(len(files))[:count]
        sets["photos"] = to_tensor(
            [np.asarray(Image.open(files[i]).convert("RGB").resize((SIZE, SIZE))) for i in chosen]
        )
    return sets


def held_out_composites(emoji: list[Emoji], count: int) -> Tensor:
    """`count` composites of emoji that no autoencoder run trains on, the same at every call."""
    pool = [e for e in emoji if e.held_out] or emoji
    generators = [rng(0, "autoencoder evaluation", 0, i) for i in range(count)]
    return to_tensor([compose(pool[i % len(pool)], draw_layout(r, i % len(pool))) for i, r in enumerate(generators)])


@torch.no_grad()
def reconstruct(model: AutoencoderKL, x: Tensor, batch: int = 32) -> Tensor:
    """Through the latent's mean and back, clipped to [-1, 1]."""
    return torch.cat([model.decode(model.encode(part).latent_dist.mode()).sample for part in x.split(batch)]).clamp(
        -1, 1
    )


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over the pictures of each one's PSNR, in dB; x and y in [-1, 1]."""
    mse = ((x - y) / 2).square().mean((1, 2, 3)).clamp_min(1e-10)
    return float((-10 * torch.log10(mse)).mean())


@torch.no_grad()
def set_scaling(model: AutoencoderKL, x: Tensor) -> tuple[float, float]:
    """Sets `scaling_factor` to 1/std of the latents of x and `shift_factor` to None; returns their mean and std.

    Only scaling: `StableDiffusionPipeline` of diffusers 0.42 ignores `shift_factor` when it decodes.
    """
    z = torch.cat([model.encode(part).latent_dist.mode() for part in x.split(32)])
    model.register_to_config(scaling_factor=1 / float(z.std()))
    return float(z.mean()), float(z.std())


def save_sheet(file: Path, sets: dict[str, Tensor], model: AutoencoderKL, columns: int = 16) -> None:
    """Rows of originals, each above its reconstructions."""
    rows: list[Tensor] = []
    for x in sets.values():
        part = x[:columns]
        rows += [part, reconstruct(model, part)]
    strips = [torch.cat(list(row), dim=2) for row in rows if len(row) == len(rows[0])]
    picture = torch.cat(strips, dim=1).permute(1, 2, 0).add(1).mul(127.5).round().to(torch.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.numpy()).save(file)


class AutoencoderTrainer(Trainer[AutoencoderKL]):
    """The run of the autoencoder."""

    def __init__(self, c: Config) -> None:
        torch.manual_seed(c.seed)
        self.c, self.pictures, self.sets = c, Pictures(c), unseen(c.data, c.evaluate)
        model = build(c)
        workers = Workers(model, c.workers)
        optimizer = optimizer_of(c, model, workers.pool)
        schedule = Schedule(c.lr, c.steps, c.minutes, c.warmup)
        super().__init__("autoencoder", c.out, model, workers, optimizer, schedule, decay=0.998)
        if c.start and not self.state.exists():
            load_state(c.start, self.average, optimizer, Schedule(c.lr, c.steps, c.minutes, c.warmup))

    def losses(self, step: int) -> list[Callable[[], Tensor]]:
        """Consecutive parts of the batch."""
        return [partial(batch_loss, self.model, x, r, self.c.kl) for x, r in self.pictures.parts(step)]

    def measure(self) -> dict[str, float]:
        """PSNR of every set."""
        model = self.average.copy
        return {f"psnr_{name}": psnr(x, reconstruct(model, x)) for name, x in self.sets.items()}

    def write_assets(self) -> dict[str, float]:
        """A sheet and the model, with the latents' statistics (of Noto) in its config."""
        model, figures = self.average.copy, self.measure()
        figures["latent_mean"], figures["latent_std"] = set_scaling(model, self.sets["noto"])
        save_sheet(self.c.out / "sheet.png", self.sets, model)
        with replacing(self.c.out / "model") as folder:
            model.save_pretrained(folder)
        return figures


def batch_loss(model: AutoencoderKL, x: Tensor, r: np.random.Generator, kl: float) -> Tensor:
    """The loss of one worker's pictures, in bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        latent = model.encode(x).latent_dist
        noise = torch.from_numpy(r.standard_normal(latent.mean.shape, np.float32))
        y = model.decode(latent.mean + latent.std * noise).sample
    return loss_of(x, y.float(), latent.mean.float(), latent.logvar.float(), kl)


def main(c: Config) -> dict[str, float]:
    """Trains, and returns the figures of what it exports."""
    return AutoencoderTrainer(c).train()


if __name__ == "__main__":
    print(json.dumps(main(auto_cli(Config, as_positional=False)), indent=1))
