"""What a run leaves for people: a plot of the loss, sheets of images, a model card."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vismodal.callbacks import read_log
from vismodal.data.photos import pixels
from vismodal.files import write_file

_MARGIN = 12
_LABEL = 26


def write_image(path: Path, image: Image.Image) -> Path:
    """A png, whole or absent."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return write_file(path, buffer.getvalue())


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows of `columns`, edge to edge: each can be cut out again unchanged."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def cut(path: Path, size: int) -> list[Image.Image]:
    """The images of a `grid` of squares, row by row."""
    with Image.open(path) as whole:
        corners = [(x, y) for y in range(0, whole.height, size) for x in range(0, whole.width, size)]
        return [whole.convert("RGB").crop((x, y, x + size, y + size)) for x, y in corners]


def sheet(rows: Sequence[tuple[str, Image.Image]], width: int = 960) -> Image.Image:
    """Labelled pictures one below the other, each scaled to `width` pixels at most; small ones by whole factors."""
    font = ImageFont.load_default(size=16)
    scaled = [(label, _fit(image, width)) for label, image in rows]
    height = sum(image.height + _LABEL + _MARGIN for _, image in scaled) + _MARGIN
    page = Image.new("RGB", (max(image.width for _, image in scaled) + 2 * _MARGIN, height), "white")
    draw, y = ImageDraw.Draw(page), _MARGIN
    for label, image in scaled:
        draw.text((_MARGIN, y), _shorten(label, font, image.width), fill="black", font=font)
        page.paste(image, (_MARGIN, y + _LABEL))
        y += image.height + _LABEL + _MARGIN
    return page


def write_sheet(folder: Path, real: Sequence[Image.Image], before: Path, after: Path, title: str) -> Path:
    """sheet.png: the photos, and the grids of samples before and after."""
    with Image.open(before) as first, Image.open(after) as last:
        rows = [("the photos", grid(real, len(real))), ("before", first), (title, last)]
        return write_image(folder / "sheet.png", sheet(rows))


def _fit(image: Image.Image, width: int) -> Image.Image:
    if image.width > width:
        return image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    factor = max(1, width // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut to what fits. The default font knows Latin letters only; others are drawn as boxes."""
    while text and font.getlength(text) > width:
        text = text.removesuffix("...")[:-1] + "..." if len(text) > 4 else ""
    return text


def loss_plot(log: Path, path: Path) -> Path:
    """The loss of a metrics.jsonl over the steps: each step's, and the running mean that can be read."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    rows = read_log(log)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    means: list[float] = []
    for loss in losses:
        means.append(loss if not means else 0.95 * means[-1] + 0.05 * loss)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9bb8d3", linewidth=0.6, label="each step")
    axes.plot(steps, means, color="#1f4e79", linewidth=1.8, label="running mean (0.95)")
    axes.set(xlabel="step", ylabel="loss", title="training loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return write_file(path, buffer.getvalue())


def square(image: Image.Image, size: int) -> Image.Image:
    """A photo as training sees it: the square in the middle, `size` pixels wide."""
    pixel = (pixels(image, size) + 1) * 127.5  # 3 h w
    return Image.fromarray(pixel.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Using:
    """What a model card says of an adapter.

    Args:
        methods: their names.
        parameters: how many it has.
        parts: of the pipeline that are adapted.
        words: whether it has new words, which the pipeline has to be taught.
        loading: lines by which diffusers alone loads all of it; none where it cannot.
        halves: whether it may act at strengths between 0 and 1.
    """

    methods: Sequence[str]
    parameters: int
    parts: Sequence[str]
    words: bool
    loading: Sequence[str]
    halves: bool


def dreambooth_card(folder: Path, settings: Mapping[str, Any], using: Using) -> Path:
    """README.md of a DreamBooth run's folder: what it is, how to use its files, the sheet, the settings.

    Written as the Hub's model cards are. The licence is left for the user to state.
    """
    from huggingface_hub import ModelCard, ModelCardData

    model, prompt = settings["model"], settings["prompt"]
    hub = model if model and not Path(model).exists() else None
    name = Path(model).name if model else "the tiny Stable Diffusion that comes with vismodal"  # without its place
    data = ModelCardData(
        base_model=hub,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=prompt,
        tags=["text-to-image", *map(str.lower, using.methods), "dreambooth", "vismodal"],
        widget=[{"text": prompt, "output": {"url": "sheet.png"}}],
    )
    lines = [f"| {key} | `{value}` |" for key, value in settings.items() if key not in _PRIVATE and value is not None]
    source = f'"{hub or f"path/to/{name}"}"' if model else 'vismodal.paths.asset("tiny-sd")'
    sampler = _ZERO_SNR if settings["zero_snr"] else ""
    alone = _ALONE.format(source=source, sampler=sampler, loading="\n".join(using.loading), prompt=prompt)
    body = _CARD.format(
        subject=settings["subject"],
        prompt=prompt,
        steps=settings["steps"],
        method=" + ".join(using.methods),
        parameters=using.parameters,
        model=hub or name,
        source=source,
        alone=alone if using.loading else "",
        sampler=sampler,
        parts=", ".join(f'"{part}": pipe.{part}' for part in using.parts),
        imported="\nfrom vismodal.diffusion.words import teach" if using.words else "",
        taught="\nteach(pipe, adapter)  # the new words" if using.words else "",
        scaled="\nadapter.scale = 0.8" if using.halves else "",
        settings="\n".join(["| setting | value |", "| --- | --- |", *lines]),
    )
    return write_file(folder / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")))


_PRIVATE = ("photos", "subjects", "model", "output", "resume", "class_folder", "track")  # places on this machine
_ZERO_SNR = """\
from diffusers import DDIMScheduler

pipe.scheduler = DDIMScheduler.from_config(
    pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
)
"""
_CARD = """\
# {method} for "{subject}"

Trained with [vismodal](https://pypi.org/project/vismodal/)'s DreamBooth on {model}: {steps} steps, {parameters:,}
parameters. Write **{subject}** in a prompt, as in *{prompt}*.

![before and after](sheet.png)

{alone}With vismodal, where it can be scaled, merged, combined and trained further:

```python
import vismodal as vm
from diffusers import DiffusionPipeline{imported}

pipe = DiffusionPipeline.from_pretrained({source})
{sampler}adapter = vm.load({{{parts}}}, "adapter.safetensors"){taught}{scaled}
image = pipe("{prompt}").images[0]
```

![loss](loss.png)

{settings}
"""
_ALONE = """\
With diffusers alone:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({source})
{sampler}{loading}
image = pipe("{prompt}").images[0]
```

"""
