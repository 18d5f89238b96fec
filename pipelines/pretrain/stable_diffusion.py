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
from collections.abc import Callable
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
from latents import Latents
from loop import Schedule, Workers
from muon import Muon, split
from tokenizer import ids_of
from torch import Tensor, nn
from trainer import Trainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vismodal.data.emoji import rng

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
    """How long the run had lasted that wrote this log; 0 without one."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return max((float(row.get("seconds", 0)) for row in rows), default=0.0)


class DiffusionTrainer(Trainer[Model]):
    """The run of tiny-sd's UNet and text encoder."""

    def __init__(self, c: Config) -> None:
        torch.manual_seed(c.seed)
        self.c = c
        self.vae = AutoencoderKL.from_pretrained(c.autoencoder).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(c.tokenizer)
        self.data = Latents(self.vae, c.data, c.out, c.views, c.seed, c.workers)
        self.alphas = scheduler().alphas_cumprod
        model = Model(c, self.data.latents.shape[2], self.data.latents.shape[3], self.tokenizer)
        workers = Workers(model, c.workers)
        optimizer = Muon(*split(model, OUTER), lr=c.lr, pool=workers.pool)
        schedule = Schedule(c.lr, c.steps, c.minutes, c.warmup)
        super().__init__("tiny-sd", c.out, model, workers, optimizer, schedule, export_every=c.export_every)

    def losses(self, step: int) -> list[Callable[[], Tensor]]:
        """Every n-th row for a worker, so that each has rows of all noise levels."""
        c, n = self.c, self.c.workers
        z, texts = self.data.batch(step, c.batch, c.first_name, c.drop)
        ids = ids_of(self.tokenizer, texts)
        parts = [(z[i::n], ids[i::n], rng(c.seed, "noise", step, i)) for i in range(n)]
        return [partial(v_loss, self.model, x, words, self.alphas, r, c.lean) for x, words, r in parts]

    def measure(self) -> dict[str, float]:
        """The loss on one composite of some of the emoji, with fixed noise: how well it knows what it was taught."""
        z, texts = self.data.fixed(self.c.evaluate)
        ids, r = ids_of(self.tokenizer, texts), rng(0, "validation noise")
        with torch.no_grad():
            parts = zip(z.split(64), ids.split(64), strict=True)
            losses = [v_loss(self.average.copy, x, words, self.alphas, r) * len(x) for x, words in parts]
        return {"validation": float(sum(losses)) / len(z)}

    def write_assets(self) -> dict[str, float]:
        """Measured as they are loaded from there."""
        c, pipe = self.c, pipeline(self.average.copy, self.vae, self.tokenizer)
        minutes = last_seconds(c.autoencoder.parent / "metrics.jsonl") / 60
        run = self.figures | {"autoencoder_minutes": minutes, "validation_loss": self.measure()["validation"]}
        return sd_card.write_assets(pipe, run, c.data, c.clip, c.judged, c.assets)


def main(c: Config) -> dict[str, float]:
    """Trains, or only exports."""
    trainer = DiffusionTrainer(c)
    return trainer.export() if c.export_only else trainer.train()


if __name__ == "__main__":
    print(json.dumps(main(auto_cli(Config, as_positional=False)), indent=1))
