"""A training step of DreamBooth with LoRA beside the loop of diffusers' script, on an SD1.5-shaped pipeline.

    OMP_WAIT_POLICY=passive python benchmarks/dreambooth_step.py                # minutes; writes the table
    OMP_WAIT_POLICY=passive python benchmarks/dreambooth_step.py --quick true   # seconds; only prints it

SD1.5's UNet, autoencoder and text encoder with all widths divided by `--shrink`, random weights, LoRA r=8 on every
attention projection of the UNet, AdamW, fp32, one photo a step. Ours is `fit` with what `vismodal dreambooth` gives it,
logging included. The peer is what examples/dreambooth/train_dreambooth_lora.py of diffusers does in a step: it encodes
the photo, and the prompt unless --pre_compute_text_embeddings, adds noise, predicts by peft's LoRA, clips and updates.
Both take turns in this one process, step by step. Below 1, ours takes less.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from measure import Row, Time, compare, exact, facts, kept_bytes, report, seconds, write
from peft import LoraConfig
from PIL import Image
from torch.nn import functional as F

import vismodal as vm
from vismodal.callbacks import Callback
from vismodal.data.photos import pixels
from vismodal.diffusion.denoise import Prompts, Weights, denoising
from vismodal.diffusion.pictures import Pictures
from vismodal.diffusion.presets import sites_of
from vismodal.paths import asset
from vismodal.train import Micro, Plan, fit

RANK, PROMPT, SCALE = 8, "a photo of sks dog", 0.18215
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
FILE = Path(__file__).parent / "results" / "dreambooth_step"


@dataclass(frozen=True)
class Config:
    """Settings of the run.

    Args:
        quick: a tiny pipeline and two steps; its figures mean nothing.
        shrink: what SD1.5's widths are divided by.
        size: side of the photo in pixels.
        rounds: steps that count; the first one does not.
        threads: of torch.
    """

    quick: bool = False
    shrink: int = 2
    size: int = 256
    rounds: int = 12
    threads: int = 2


def pipeline(shrink: int) -> Any:
    """SD1.5's shapes, narrower; tokenizer of the embedded model."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(asset("tiny-sd") / "tokenizer")
    width = 768 // shrink
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=tokenizer.model_max_length,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        block_out_channels=tuple(n // shrink for n in (320, 640, 1280, 1280)), cross_attention_dim=width,
        attention_head_dim=8, norm_num_groups=32 // shrink,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=tuple(n // shrink for n in (128, 256, 512, 512)), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=32 // shrink, scaling_factor=SCALE,
    )  # fmt: skip
    noise = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    pipe = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, noise, None, None, requires_safety_checker=False
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False).eval()
    return pipe


class Script:
    """The loop of diffusers' script on a copy of the UNet."""

    def __init__(self, pipe: Any, photo: Image.Image, size: int, text_ahead: bool) -> None:
        self.pipe, self.unet = pipe, copy.deepcopy(pipe.unet)
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.pixels, self.ahead = pixels(photo, size)[None], self.text() if text_ahead else None

    def text(self) -> torch.Tensor:
        said = self.pipe.tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            return self.pipe.text_encoder(said.input_ids)[0]

    def loss(self) -> torch.Tensor:
        with torch.no_grad():
            x = self.pipe.vae.encode(self.pixels).latent_dist.sample() * SCALE
        noise, noises = torch.randn_like(x), self.pipe.scheduler
        level = torch.randint(0, noises.config.num_train_timesteps, (len(x),))
        text = self.text() if self.ahead is None else self.ahead
        predicted = self.unet(noises.add_noise(x, noise, level), level, text, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise.float())

    def step(self) -> None:
        self.unet.train()
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Turns(Callback):
    """Times our steps, and lets a peer make one after each of them."""

    def __init__(self, peer: Callable[[], object]) -> None:
        self.peer, self.ours, self.theirs = peer, list[Time](), list[Time]()

    def begin(self, step: int, total: int) -> None:
        self._ours = _clock()

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        now = _clock()
        taken = Time(now.wall - self._ours.wall, now.cpu - self._ours.cpu)
        peer = seconds(self.peer)
        if step > 1:
            self.ours.append(taken)
            self.theirs.append(peer)
        gc.collect()
        self._ours = _clock()


def _clock() -> Time:
    return Time(time.perf_counter(), time.process_time())


def rows(c: Config, pipe: Any) -> Iterator[Row]:
    photo = Image.effect_noise((c.size, c.size), 80).convert("RGB")
    for cache in (True, False):
        adapter = vm.adapt(pipe.unet, vm.LoRA(rank=RANK, sites=sites_of(pipe.unet, ("attention",))))
        pipe.unet.train()
        pictures = Pictures(pipe, "instance", [photo], [PROMPT], size=c.size, cache=cache)
        loss = denoising(pipe, [pictures], Prompts(pipe, cache), 1, Weights())
        peer = Script(pipe, photo, c.size, text_ahead=cache)
        assert adapter.num_parameters == sum(p.numel() for p in peer.parameters)
        said = "text and latents cached; the peer has its text ahead" if cache else "nothing cached on either side"
        turns = Turns(peer.step)
        with tempfile.TemporaryDirectory() as folder:
            optimizer = torch.optim.AdamW(adapter.groups(1e-4))
            log = Path(folder) / "metrics.jsonl"
            fit(loss, adapter, optimizer, plan=Plan(c.rounds + 1), log=log, callbacks=[turns])
        yield compare("training step", said, "s", turns.ours, turns.theirs, f"{adapter.num_parameters:,} parameters")
        if cache:
            ours, theirs = (
                kept_bytes(pipe.unet, lambda loss=loss: loss(Micro(0, 0, 0))),
                kept_bytes(peer.unet, peer.loss),
            )
            yield exact("kept for backward", "UNet and loss", "bytes", ours, theirs)
        adapter.detach()
        pipe.unet.eval()


def main(c: Config) -> list[Row]:
    """Measure, print the table, and write it where the run is a full one."""
    torch.set_num_threads(c.threads)
    torch.manual_seed(0)
    if c.quick:
        c = Config(True, shrink=16, size=32, rounds=2, threads=c.threads)
    about = {"vismodal": vm.__version__, **facts(("torch", "diffusers", "peft", "transformers"))}
    pipe = pipeline(c.shrink)
    found = list(rows(c, pipe))
    millions = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    note = "\n\n".join((__doc__ or "").strip().split("\n\n")[2:]) + f" UNet of {millions:.0f}M, photos of {c.size} px."
    text = report("DreamBooth step", found, about, note, "diffusers' script")
    print(text)
    if not c.quick:
        write(text, found, about, FILE)
    return found


if __name__ == "__main__":
    main(auto_cli(Config, as_positional=False))
