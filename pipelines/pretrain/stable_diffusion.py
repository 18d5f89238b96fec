"""Trains tiny-sd: text to image of Noto emoji, a `StableDiffusionPipeline` of 64 px that samples on a CPU in a
second.

    python pipelines/pretrain/tokenizer.py --data ../shared/data
    python pipelines/pretrain/autoencoder.py --data ../shared/data
    python pipelines/pretrain/stable_diffusion.py --data ../shared/data --assets assets/tiny-sd

Latent diffusion (Rombach et al. 2022, https://arxiv.org/abs/2112.10752) with v-prediction (Salimans & Ho 2022,
https://arxiv.org/abs/2202.00512) on a schedule rescaled to zero terminal SNR (Lin et al. 2023,
https://arxiv.org/abs/2305.08891): without it no picture can have the flat black or white ground that its prompt asks
for. The text encoder is trained along. Latents of several composites of each emoji are cached first. Fluent emoji are
not in the data: they are for adapters. Run again with the same `--out` to resume; `--export_only true` writes the
newest checkpoint to `--assets` and ends.
"""

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import sd_card
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jsonargparse import auto_cli
from loop import SAVE_EVERY, Average, Log, Schedule, Stop, Workers, load_state, save_state, single_core_threads, ticks
from muon import Muon, split
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
OUTER = ("token_embedding", "position_embedding", "conv_in", "conv_out")  # trained by Adam, not by Muon


@dataclass(frozen=True)
class Config:
    """Settings of the run. `views` composites of each emoji are cached; `drop` captions are empty, for guidance.

    `lean` below 1 trains more often at high noise, where it is decided what is drawn.

    `judged` pictures are drawn for the card and named by the model in `clip`.
    """

    data: Path
    out: Path = Path("runs/pretrain/tiny-sd")
    autoencoder: Path = Path("runs/pretrain/autoencoder/model")
    tokenizer: Path = Path("runs/pretrain/tokenizer")
    assets: Path = Path("assets/tiny-sd")
    clip: Path = Path("assets/tiny-clip")
    seed: int = 0
    steps: int = 20000
    minutes: float = 90
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 200
    widths: tuple[int, ...] = (96, 160)
    layers: int = 1
    heads: int = 4
    text_width: int = 160
    text_layers: int = 3
    views: int = 16
    drop: float = 0.1
    lean: float = 0.5
    first_name: float = 0.85
    evaluate: int = 256
    judged: int = 100
    export_every: float = 1800
    export_only: bool = False
    workers: int = 2


class Model(nn.Module):
    """The two parts that train together."""

    def __init__(self, c: Config, latent: int, side: int, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        n = len(c.widths)
        self.unet = UNet2DConditionModel(
            sample_size=side,
            in_channels=latent,
            out_channels=latent,
            down_block_types=("CrossAttnDownBlock2D",) * n,
            up_block_types=("CrossAttnUpBlock2D",) * n,
            block_out_channels=c.widths,
            layers_per_block=c.layers,
            # the *number* of heads: unet_2d_condition.py, `num_attention_heads or attention_head_dim`
            attention_head_dim=c.heads,
            cross_attention_dim=c.text_width,
            norm_num_groups=16,
        )
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=c.text_width,
                intermediate_size=4 * c.text_width,
                num_hidden_layers=c.text_layers,
                num_attention_heads=c.heads,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    def forward(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        """The velocity."""
        return self.unet(noisy, steps, self.text_encoder(ids).last_hidden_state).sample


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas, rescaled to zero terminal SNR; `trailing`, so that sampling starts at the last step."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def layout_of(c: Config, purpose: str, emoji: int, view: int) -> Layout:
    """The layout of one cached view: always centred, one on each ground, then small ones and two-coloured ones in turn.

    One size and place, unless the caption says "small": a prompt then has one answer, which is learnt in a fraction of
    the steps (RESULTS.md).
    """
    r, colours = rng(c.seed, purpose, view, emoji), list(COLOURS)
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


def cache_latents(c: Config, vae: AutoencoderKL, emoji: list[Emoji], purpose: str, views: int) -> Tensor:
    """Scaled latent means of `views` composites of each emoji, half precision [emoji, view, z, h, w]; kept in `out`."""
    file = c.out / f"latents-{purpose}.safetensors"
    if file.exists():
        return load_file(file)["latents"]

    def encode(i: int) -> Tensor:
        x = to_tensor([compose(emoji[i], layout_of(c, purpose, i, view)) for view in range(views)])
        # modes of a thread: `no_grad` and autocast set outside would not reach in here
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x).latent_dist.mode()
        return (z.float() * vae.config["scaling_factor"]).half()

    with single_core_threads(c.workers) as pool:
        parts = list(tqdm(pool.map(encode, range(len(emoji))), f"latents, {purpose}", len(emoji), mininterval=5))
    latents = torch.stack(parts).contiguous()  # convolutions may hand out channels_last
    temporary = file.with_suffix(".tmp")
    save_file({"latents": latents}, temporary)
    os.replace(temporary, file)
    return latents


class Latents:
    """Batches of (latent, caption) keyed by step."""

    def __init__(self, c: Config, vae: AutoencoderKL) -> None:
        self.c, self.emoji = c, load_emoji(c.data, "noto")
        self.latents = cache_latents(c, vae, self.emoji, "train", c.views)
        if self.latents.shape[:2] != (len(self.emoji), c.views):
            raise ValueError(
                f"the cached latents are {tuple(self.latents.shape)}: delete {c.out}/latents-*.safetensors"
            )

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """float [b, z, h, w] and b captions, some empty; all emoji in turn, in a new order each time round."""
        first, rows, texts = step * self.c.batch, [], []
        for place in range(first, first + self.c.batch):
            turn, k = divmod(place, len(self.emoji))
            i = int(self._order(turn)[k])
            r = rng(self.c.seed, "diffusion", turn, i)
            view = int(r.integers(self.c.views))
            layout = layout_of(self.c, "train", i, view)
            text = caption(r, self.emoji[i], layout, self.c.first_name, attribute_of(layout))
            rows.append(self.latents[i, view])
            texts.append("" if r.random() < self.c.drop else text)
        return torch.stack(rows).float(), texts

    def _order(self, turn: int) -> np.ndarray:
        return rng(self.c.seed, "order", turn).permutation(len(self.emoji))


def ids_of(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids padded as the pipeline pads them."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def v_loss(
    model: nn.Module, z: Tensor, ids: Tensor, alphas: Tensor, r: np.random.Generator, lean: float = 1.0
) -> Tensor:
    """mean |v - v_theta|^2 with v = sqrt(a) eps - sqrt(1 - a) z, at steps T u^lean, the u spread over the batch."""
    b = len(z)
    # one draw in each of b equal parts of u: the loss is less noisy than with b free draws
    u = (np.arange(b) + r.random(b)) / b
    t = torch.from_numpy((u**lean * len(alphas)).astype(np.int64))
    noise = torch.from_numpy(r.standard_normal(z.shape, np.float32))
    a = alphas[t].view(b, 1, 1, 1)
    noisy, target = a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z
    with torch.autocast("cpu", torch.bfloat16):
        v = model(noisy, t, ids)
    return F.mse_loss(v.float(), target)


@torch.no_grad()
def validate(c: Config, model: nn.Module, vae: AutoencoderKL, emoji: list[Emoji], tokenizer: CLIPTokenizer) -> float:
    """The loss on one composite of some of the emoji, with fixed noise: how well it knows what it was taught."""
    z = cache_latents(c, vae, emoji, "train", c.views)[:, 1].float()
    chosen = rng(0, "validation choice").permutation(len(emoji))[: c.evaluate]
    texts = [plain_caption(emoji[i], layout_of(c, "train", int(i), 1)) for i in chosen]
    r, alphas = rng(0, "validation noise"), scheduler().alphas_cumprod
    parts = [chosen[i : i + 64] for i in range(0, len(chosen), 64)]
    losses = [
        v_loss(model, z[part], ids_of(tokenizer, texts[64 * n : 64 * n + 64]), alphas, r).item() * len(part)
        for n, part in enumerate(parts)
    ]
    return sum(losses) / len(chosen)


def pipeline(model: Model, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The parts as users load them."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=scheduler(),  # type: ignore[arg-type]  # its annotation is an enum of names
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def last_seconds(log: Path) -> float:
    """How long the run lasted that wrote this log; 0 without one."""
    lines = log.read_text().splitlines() if log.exists() else ['{"seconds": 0}']
    return float(json.loads(lines[-1])["seconds"])


class Trainer:
    """The run: its parts, one step, and what is written beside them."""

    def __init__(self, c: Config) -> None:
        torch.manual_seed(c.seed)
        self.c, self.log, self.state = c, Log(c.out), c.out / "state.safetensors"
        self.vae = AutoencoderKL.from_pretrained(c.autoencoder).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(c.tokenizer)
        self.data = Latents(c, self.vae)
        z, side = self.data.latents.shape[2], self.data.latents.shape[3]
        self.model = Model(c, z, side, self.tokenizer)
        self.average = Average(self.model, 0.999)
        self.workers = Workers(self.model, c.workers)
        self.optimizer = Muon(*split(self.model, OUTER), lr=c.lr, pool=self.workers.pool)
        self.schedule = Schedule(c.lr, c.steps, c.minutes, c.warmup)
        self.alphas = scheduler().alphas_cumprod
        if self.state.exists():
            load_state(self.state, self.average, self.optimizer, self.schedule)

    def step(self, step: int) -> float:
        """One step; returns the loss."""
        z, texts = self.data.batch(step)
        ids, n = ids_of(self.tokenizer, texts), self.c.workers
        # every n-th row: each worker then has rows of all noise levels
        parts = [(z[i::n], ids[i::n], rng(self.c.seed, "noise", step, i)) for i in range(n)]
        losses = [partial(v_loss, self.model, x, words, self.alphas, r, self.c.lean) for x, words, r in parts]
        loss = self.workers.backward(losses)
        self.optimizer.step()
        self.average.update(step)
        return loss

    def save(self) -> None:
        """Checkpoint and validation loss."""
        save_state(self.state, self.average, self.optimizer, self.schedule)
        loss = validate(self.c, self.average.copy, self.vae, self.data.emoji, self.tokenizer)
        self.log.write(step=self.schedule.step, seconds=self.schedule.seconds, validation=loss)

    def export(self) -> dict[str, float]:
        """Measures the averaged weights and replaces the assets by them."""
        c, pipe = self.c, pipeline(self.average.copy, self.vae, self.tokenizer)
        run = {
            "step": self.schedule.step,
            "minutes": self.schedule.seconds / 60,
            "autoencoder_minutes": last_seconds(c.autoencoder.parent / "metrics.jsonl") / 60,
            "validation_loss": validate(c, self.average.copy, self.vae, self.data.emoji, self.tokenizer),
        }
        figures = sd_card.write_assets(pipe, run, c.data, c.clip, c.judged, c.assets)
        self.log.write(**figures)
        return figures

    def train(self) -> dict[str, float]:
        """Trains to the end of the schedule, or until asked to stop."""
        saved = exported = self.schedule.seconds
        with Stop().listening() as stop:
            for step, bar in ticks(self.schedule, self.optimizer, stop, "tiny-sd"):
                loss = self.step(step)
                if step % 50 == 0:
                    bar.set_postfix(loss=f"{loss:.4f}")
                    self.log.write(step=step, seconds=self.schedule.seconds, loss=loss)
                if self.schedule.seconds - saved > SAVE_EVERY:
                    saved = self.schedule.seconds
                    self.save()
                if self.schedule.seconds - exported > self.c.export_every:
                    exported = self.schedule.seconds
                    self.export()
        self.save()
        return self.export()


def main(c: Config) -> dict[str, float]:
    """Trains, or only exports."""
    trainer = Trainer(c)
    return trainer.export() if c.export_only else trainer.train()


if __name__ == "__main__":
    print(json.dumps(main(auto_cli(Config, as_positional=False)), indent=1))
