"""What is exported with tiny-sd: fp16 weights, a sample sheet, and a model card with the figures measured at export."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image, ImageDraw
from tokenizer import save as save_tokenizer

from vismodal.data.emoji import COLOURS, Emoji, rng, with_article

STEPS, GUIDANCE = 20, 4.0
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


def sample(pipe: StableDiffusionPipeline, prompts: Sequence[str], seed: int = 0, batch: int = 32) -> list[np.ndarray]:
    """One uint8 picture a prompt; each has its own seed, so that the batch size changes nothing."""
    pictures: list[np.ndarray] = []
    for first in range(0, len(prompts), batch):
        part = list(prompts[first : first + batch])
        out = pipe(
            part,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=64,
            width=64,
            generator=[torch.Generator().manual_seed(seed * 100_000 + first + i) for i in range(len(part))],
            output_type="np",
        )
        pictures += [(p * 255).round().astype(np.uint8) for p in out.images]
    return pictures


def background_of(picture: np.ndarray) -> str:
    """The named colour nearest to the median of the outermost two pixels."""
    edges = (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])
    colour = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    return min(COLOURS, key=lambda name: float(np.square(np.array(COLOURS[name]) - colour).sum()))


def background_accuracy(pipe: StableDiffusionPipeline, emoji: Sequence[Emoji], count: int = 110) -> float:
    """The share of `count` prompts, each colour equally often, whose picture has the ground that was asked for."""
    colours = list(COLOURS)
    chosen = [emoji[i].names[0] for i in rng(0, "background prompts").permutation(len(emoji))[:count]]
    wanted = [colours[i % len(colours)] for i in range(len(chosen))]
    prompts = [f"a drawing of {with_article(n)} on a {c} background" for n, c in zip(chosen, wanted, strict=True)]
    got = [background_of(picture) for picture in sample(pipe, prompts, seed=1)]
    return sum(a == b for a, b in zip(got, wanted, strict=True)) / len(wanted)


def save_sheet(file: Path, pictures: Sequence[np.ndarray], prompts: Sequence[str], columns: int = 6) -> None:
    """The pictures at twice their size, each over its prompt."""
    side, text = 128, 36
    sheet = Image.new("RGB", (columns * (side + 8), -(-len(pictures) // columns) * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = i % columns * (side + 8), i // columns * (side + text)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x + 4, y + 2))
        lines = [""]
        for word in prompt.split():
            if len(lines[-1]) + len(word) > 21:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        draw.multiline_text((x + 4, y + side + 3), "\n".join(lines[:3]), fill="black", font_size=9, spacing=1)
    sheet.save(file)


def write_assets(
    pipe: StableDiffusionPipeline, emoji: Sequence[Emoji], figures: dict[str, float], vae_log: Path, folder: Path
) -> dict[str, float]:
    """Measures `pipe`, writes everything to a temporary folder beside `folder`, then puts it in its place."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_half(pipe, temporary)
    measured = {"background_accuracy": background_accuracy(pipe, emoji)}
    save_sheet(temporary / "samples.png", sample(pipe, SHEET), SHEET)
    size = sum(f.stat().st_size for f in temporary.rglob("*.safetensors")) / 1e6
    rows = [json.loads(line) for line in vae_log.read_text().splitlines()] if vae_log.exists() else []
    psnr: dict[str, float] = next((row for row in reversed(rows) if "psnr_noto" in row), {})
    shown = {**psnr, **figures, **measured, "megabytes": size, "emoji": len(emoji)}
    (temporary / "README.md").write_text(card(shown, pipe))
    replace_folder(temporary, folder)
    return measured


def save_half(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """fp16 weights under the plain names. Copies, since `.to(half)` works in place and the run goes on in fp32."""
    pipe.save_pretrained(folder)
    half = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16, local_files_only=True)
    half.save_pretrained(folder)
    for file in folder.rglob("*.json"):
        values = json.loads(file.read_text())
        if values.pop("_name_or_path", None):  # the temporary folder's
            file.write_text(json.dumps(values, indent=2) + "\n")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes them for their owner alone
    save_tokenizer(pipe.tokenizer, folder / "tokenizer")
    # transformers would otherwise load the encoder in the dtype it was stored in, beside a UNet that loads in fp32
    config = folder / "text_encoder" / "config.json"
    values = json.loads(config.read_text())
    values["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Renames; a reader sees the old folder or the new one, but for an instant."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def card(f: dict[str, float], pipe: StableDiffusionPipeline) -> str:
    """The model card; every figure in it was measured by the export that wrote it, or is the autoencoder's last."""
    unet, text, vae = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (pipe.unet, pipe.text_encoder, pipe.vae))
    c = pipe.unet.config
    psnr = ", ".join(f"{f[k]:.1f} dB on {what}" for k, what in PSNR_WORDS.items() if k in f) or "not measured"
    shape = {"z": c.in_channels, "side": c.sample_size, "widths": tuple(c.block_out_channels)}
    vae_minutes, length = f.get("seconds", 0) / 60, pipe.tokenizer.model_max_length
    return CARD.format(unet=unet, text=text, vae=vae, psnr=psnr, vae_minutes=vae_minutes, length=length, **shape, **f)


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
purple, pink, brown).

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
| scheduler | DDIM, trailing steps; 20 steps at guidance 4 are meant |

![samples](samples.png)

## Training

Data: the {emoji} emoji of Noto Emoji (artwork by Google, Apache-2.0, https://github.com/googlefonts/noto-emoji)
composed on coloured grounds, with generated captions. The autoencoder alone also saw Fluent emoji (Microsoft, MIT),
CIFAR-100, the DreamBooth subjects' photos (CC BY 4.0 and Unsplash) and the transfer sets' photos; it never saw one
emoji in twenty. The UNet and the text encoder saw Noto only. Weights: Apache-2.0.

{minutes:.0f} minutes ({step} steps) of UNet and text encoder after {vae_minutes:.0f} minutes of autoencoder, on two CPU
cores that other work shared. Scripts: `pipelines/pretrain/`; what was tried: `pipelines/pretrain/RESULTS.md`.

## Figures

- Autoencoder, reconstruction PSNR: {psnr}.
- Ground as asked for: {background_accuracy:.0%} of 110 pictures (ten a colour; the nearest of the eleven colours to
  the median of the rim; 20 steps, guidance 4).
- Validation loss (v, mean square; known emoji in unseen places on unseen grounds): {validation_loss:.4f}.

## Limits

It knows these emoji by these names and little else: no other objects, no counting, no scenes. Small faces and
lettering blur. A prompt outside its vocabulary gives some emoji or other on some ground.
"""
