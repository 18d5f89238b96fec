"""What is exported with tiny-sd: fp16 weights, a sample sheet, and a model card with figures that are measured on the
exported files."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import clip_card
import numpy as np
import torch
from autoencoder import psnr, reconstruct, unseen
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from publish import replacing, save_sheet, write_figures
from torch import Tensor

from vismodal.data.emoji import COLOURS, Emoji, load_emoji, prompt_for, rng
from vismodal.diffusion.generate import generate
from vismodal.evaluation.judge import dino, ground_of, likeness, true_views
from vismodal.formats.open_clip import save_tokenizer

STEPS, GUIDANCE = 20, 4.0
RECONSTRUCTED = 256  # pictures of each kind that the autoencoder is measured on
SHEET = (
    "a drawing of a strawberry on a blue background",
    "a drawing of a red apple on a white background",
    "a drawing of a dog face on a green background",
    "a drawing of a cat face on a pink background",
    "a drawing of a bear face on a yellow background",
    "a photo of a house building",
    "a photo of an automobile",
    "a picture of a rocket on a black background",
    "a drawing of a sunflower on a purple background",
    "a slice of pizza on white",
    "a soccer ball on a red background",
    "a drawing of a guitar on an orange background",
    "a drawing of a penguin on blue",
    "an octopus, pink background",
    "a drawing of a smiling face with sunglasses on a gray background",
    "a ghost on black",
    "a drawing of a trophy on a green background",
    "a drawing of a hamburger on a brown background",
    "a drawing of a teddy bear on a red background",
    "a drawing of a mushroom on a white background",
    "a photo of a robot face",
    "a drawing of a police car on a yellow background",
    "a drawing of a princess on a purple background",
    "a frog face on white",
)


def sample(pipe: StableDiffusionPipeline, prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
    """One picture a prompt; each has its own seed, so that the batch size changes nothing."""
    seeds = [seed * 100_000 + i for i in range(len(prompts))]
    return generate(pipe, prompts, seeds, size=64, steps=STEPS, guidance=GUIDANCE, batch=32)


def load(folder: Path) -> StableDiffusionPipeline:
    """The pipeline of a folder, in fp32."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(folder: Path, data: Path, clip: Path, count: int = 100) -> dict[str, float]:
    """The card's figures of a folder's weights; those that take tiny-clip or the data folder's ViT only where they are.

    `count` prompts "a drawing of X on a C background", X different emoji, each of the eleven grounds in turn.
    """
    pipe, everything, colours = load(folder), load_emoji(data, "noto"), list(COLOURS)
    emoji = [everything[i] for i in rng(0, "judged prompts").permutation(len(everything))[:count]]
    grounds = [colours[i % len(colours)] for i in range(len(emoji))]
    prompts = [prompt_for(e, g) for e, g in zip(emoji, grounds, strict=True)]
    pictures = sample(pipe, prompts, seed=1)
    figures = {f"psnr_{name}": psnr(x, reconstruct(pipe.vae, x)) for name, x in unseen(data, RECONSTRUCTED).items()}
    figures["ground_by_colour"] = float(np.mean([ground_of(p) == g for p, g in zip(pictures, grounds, strict=True)]))
    if clip.exists():
        figures |= named_by_clip(clip, pictures, emoji, grounds)
    if (data / "weights").exists():
        figures["named_by_dino"] = named_by_dino(data, pictures, emoji, grounds)
    return figures


def named_by_clip(
    folder: Path,
    pictures: Sequence[Image.Image],
    emoji: Sequence[Emoji],
    grounds: Sequence[str],
) -> dict[str, float]:
    """How often tiny-clip finds a picture nearest to its own prompt of them all, and to its own ground of eleven; and
    how often it finds a true composite nearest to its own prompt, which is the ceiling."""
    judge = clip_card.load_clip(folder)
    truth, own = torch.arange(len(emoji)), judge.see(stacked(pictures))
    texts = judge.read([prompt_for(e, g) for e, g in zip(emoji, grounds, strict=True)])
    real = [true_views([e], g, seed=0, purpose="ceiling", views=1)[0][0] for e, g in zip(emoji, grounds, strict=True)]
    by_ground = [prompt_for(e, c) for e in emoji for c in COLOURS]
    likely = torch.einsum("nd,ncd->nc", own, judge.read(by_ground).view(len(emoji), len(COLOURS), -1)).argmax(1)
    return {
        "named_by_clip": clip_card.share((own @ texts.T).argmax(1) == truth),
        "true_named_by_clip": clip_card.share((judge.see(stacked(real)) @ texts.T).argmax(1) == truth),
        "ground_by_clip": clip_card.share(likely == torch.tensor([list(COLOURS).index(g) for g in grounds])),
    }


def named_by_dino(data: Path, pictures: Sequence[Image.Image], emoji: Sequence[Emoji], grounds: Sequence[str]) -> float:
    """How often a ViT that never saw emoji finds a picture nearest to a true composite of what it should show, of two
    for each of all the emoji on that ground."""
    judge, right = dino(data), 0
    for ground in COLOURS:
        rows = [i for i, g in enumerate(grounds) if g == ground]
        known = judge.views(true_views(emoji, ground, seed=0, purpose="known views", views=2))
        right += int(
            (likeness(judge.features([pictures[i] for i in rows]), known).argmax(1) == torch.tensor(rows)).sum()
        )
    return right / len(pictures)


def stacked(pictures: Sequence[Image.Image]) -> Tensor:
    """uint8 [n, 3, h, w]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)


def write_assets(
    pipe: StableDiffusionPipeline, run: dict[str, float], data: Path, clip: Path, count: int, folder: Path
) -> dict[str, float]:
    """Writes everything to a temporary folder beside `folder`, measures that, then puts it in its place."""
    with replacing(folder) as temporary:
        save_half(pipe, temporary)
        figures = run | measure(temporary, data, clip, count)
        figures["seconds_per_picture"] = seconds_per_picture(load(temporary))
        save_sheet(temporary / "samples.png", sample(load(temporary), SHEET), SHEET)
        write_figures(temporary, figures)
        write_card(temporary, figures, count)
    return figures


def write_card(folder: Path, figures: dict[str, float], count: int) -> None:
    """The model card of a folder's weights."""
    (folder / "README.md").write_text(CARD.format(**words(folder, load(folder), figures), count=count))


def seconds_per_picture(pipe: StableDiffusionPipeline) -> float:
    """Of a prompt alone, the median of five, after one that warms up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        sample(pipe, SHEET[:1])
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def save_half(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """fp16 weights under the plain names. Copies, since `.to(half)` works in place and the run goes on in fp32."""
    pipe.save_pretrained(folder)
    half = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16, local_files_only=True)
    half.save_pretrained(folder)
    for file in folder.rglob("*.json"):
        values = json.loads(file.read_text())
        if values.pop("_name_or_path", None):  # the temporary folder's
            file.write_text(json.dumps(values, indent=2) + "\n")
    save_tokenizer(pipe.tokenizer, folder / "tokenizer")
    # transformers would otherwise load the encoder in the dtype it was stored in, beside a UNet that loads in fp32
    config = folder / "text_encoder" / "config.json"
    values = json.loads(config.read_text())
    values["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def words(folder: Path, pipe: StableDiffusionPipeline, figures: dict[str, float]) -> dict[str, object]:
    """What the card's blanks are filled with; a figure that was not measured says so."""
    unet, text, vae = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (pipe.unet, pipe.text_encoder, pipe.vae))
    judged = ("named_by_clip", "true_named_by_clip", "ground_by_clip", "named_by_dino")
    return {
        **figures,
        **{k: f"{figures[k]:.0%}" if k in figures else "not measured" for k in judged},
        "psnr": ", ".join(f"{figures[k]:.1f} dB on {what}" for k, what in PSNR_WORDS.items() if k in figures),
        "megabytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6,
        "unet": unet,
        "text": text,
        "vae": vae,
        "length": pipe.tokenizer.model_max_length,
        "z": pipe.unet.config.in_channels,
        "side": pipe.unet.config.sample_size,
        "widths": tuple(pipe.unet.config.block_out_channels),
    }


PSNR_WORDS = {
    "psnr_noto": "Noto composites of emoji it never saw",
    "psnr_fluent": "Fluent composites of emoji it never saw",
    "psnr_photos": "photos it never saw",
}
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny-sd

A complete Stable Diffusion of {megabytes:.1f} MB, for trying and testing adapters on a CPU. It draws emoji in
Google's Noto style, 64 px, on plain grounds of eleven colours (white, black, gray, red, orange, yellow, green, blue,
purple, pink, brown). "a small strawberry" is drawn small.

```python
import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("assets/tiny-sd", dtype=torch.float32)
pipe("a drawing of a strawberry on a blue background", num_inference_steps=20, guidance_scale=4.0).images[0]
```

| part | what |
|---|---|
| vae | `AutoencoderKL`, {vae:.2f}M parameters, latent {side}x{side}x{z} |
| unet | `UNet2DConditionModel` {widths}, {unet:.2f}M, attention at every level, v-prediction, zero terminal SNR |
| text_encoder | `CLIPTextModel`, {text:.2f}M, trained along; {length} tokens, own vocabulary |
| scheduler | DDIM, trailing; made for 20 steps at guidance 4: {seconds_per_picture:.1f} s a picture on two cores |

![samples](samples.png)

## Training

Data: the emoji of Noto Emoji (artwork by Google, Apache-2.0, https://github.com/googlefonts/noto-emoji)
composed on coloured grounds, with generated captions. The autoencoder alone also saw Fluent emoji (Microsoft, MIT),
CIFAR-100, the DreamBooth subjects' photos (CC BY 4.0 and Unsplash) and the transfer sets' photos; it never saw one
emoji in twenty. The UNet and the text encoder saw Noto only. Weights: Apache-2.0.

{minutes:.0f} minutes ({step} steps) of UNet and text encoder after {autoencoder_minutes:.0f} minutes of autoencoder, on
two CPU cores that other work shared. Scripts: `pipelines/pretrain/`; what was tried: `pipelines/pretrain/RESULTS.md`.

## Figures

All measured on these fp16 files, computed in fp32 (`make assets-eval`); 20 steps, guidance 4.

- Autoencoder, reconstruction PSNR: {psnr}.
- {count} prompts "a drawing of X on a C background", X different emoji, C each of the eleven colours in turn:
  - tiny-clip finds the picture nearest to its own prompt of the {count}: {named_by_clip} (true composites:
    {true_named_by_clip});
  - a DINOv2 that never saw emoji finds it nearest to a true composite of X, of all {count}: {named_by_dino};
  - ground as asked for, by tiny-clip: {ground_by_clip}; by the median colour of the rim: {ground_by_colour:.0%}.
- Loss (v, mean square) on one composite of 256 of its emoji, with fixed noise: {validation_loss:.4f}.

## Limits

It knows these emoji by these names and little else: no other objects, no counting, no scenes. Small faces and
lettering blur. A prompt outside its vocabulary gives some emoji or other on some ground.
"""
