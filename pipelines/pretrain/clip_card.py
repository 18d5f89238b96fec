"""What is exported with tiny-clip: fp16 weights in open_clip's own layout, a sample sheet, and a model card with
figures that are measured on the exported files."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from cifar import MEAN, STD, Labelled, load_cifar, normalise
from PIL import Image
from publish import replacing, save_sheet, write_figures
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from vismodal.data.emoji import (
    COLOURS,
    SIZE,
    Emoji,
    Layout,
    compose,
    draw_layout,
    load_emoji,
    plain_caption,
    prompt_for,
    rng,
    with_article,
)
from vismodal.formats.open_clip import save_tokenizer

TEMPLATES = ("a photo of {a}", "a small photo of {a}", "a blurry photo of {a}", "{name}")


def enlarge(pictures: Tensor) -> Tensor:
    """uint8 [n, 3, s, s] to uint8 [n, 3, 64, 64]."""
    x = F.interpolate(pictures.float(), (SIZE, SIZE), mode="bicubic", antialias=True)
    return x.clamp(0, 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Clip:
    """A CLIP model and its tokenizer, asked for unit features."""

    model: open_clip.CLIP
    ids_of: Callable[[list[str]], Tensor]

    @torch.no_grad()
    def see(self, pictures: Tensor) -> Tensor:
        """[n, d] of uint8 pictures [n, 3, 64, 64]."""
        parts = [self.model.encode_image(normalise(part), normalize=True) for part in pictures.split(100)]
        return torch.cat(parts)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """[n, d] of texts."""
        parts = [list(texts[i : i + 200]) for i in range(0, len(texts), 200)]
        return torch.cat([self.model.encode_text(self.ids_of(part), normalize=True) for part in parts])


def load_clip(folder: Path) -> Clip:
    """tiny-clip as open_clip loads it."""
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return Clip(model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}"))


def composites(styles: Sequence[Sequence[Emoji]], count: int) -> tuple[Tensor, list[Emoji], list[Layout]]:
    """`count` different emoji, each in one of the styles, in places and on grounds that training does not draw."""
    r = rng(0, "unseen composites")
    chosen = r.permutation(len(styles[0]))[:count]
    emoji = [styles[int(r.integers(len(styles)))][i] for i in chosen]
    layouts = [draw_layout(r, int(i)) for i in chosen]
    pictures = np.stack([compose(e, layout) for e, layout in zip(emoji, layouts, strict=True)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), emoji, layouts


def measure(clip: Clip, styles: Sequence[Sequence[Emoji]], photos: Labelled, count: int) -> dict[str, float]:
    """Retrieval both ways among `count` composites, grounds named right, zero-shot accuracy on photos."""
    pictures, emoji, layouts = composites(styles, count)
    seen = clip.see(pictures)
    likeness = clip.read([plain_caption(e, place) for e, place in zip(emoji, layouts, strict=True)]) @ seen.T
    truth = torch.arange(len(emoji))
    plain = [i for i, place in enumerate(layouts) if place.colour == place.second]
    grounds = [prompt_for(emoji[i], colour) for i in plain for colour in COLOURS]
    by_ground = torch.einsum("ncd,nd->nc", clip.read(grounds).view(len(plain), len(COLOURS), -1), seen[plain])
    wanted = torch.tensor([list(COLOURS).index(layouts[i].colour) for i in plain])
    return {
        "caption_to_picture": share(likeness.argmax(1) == truth),
        "picture_to_caption": share(likeness.argmax(0) == truth),
        "ground": share(by_ground.argmax(1) == wanted),
        "zero_shot": share(zero_shot(clip, photos).argmax(1) == photos.labels),
    }


def share(right: Tensor) -> float:
    """Of a boolean tensor, how much is true."""
    return right.float().mean().item()


def zero_shot(clip: Clip, photos: Labelled) -> Tensor:
    """Cosines [n, classes] with the mean over templates of unit text features, made a unit again."""
    texts = [form.format(a=with_article(n), name=n) for n in photos.classes for form in TEMPLATES]
    heads = F.normalize(clip.read(texts).view(len(photos.classes), len(TEMPLATES), -1).mean(1), dim=1)
    return clip.see(enlarge(photos.pictures)) @ heads.T


def write_assets(
    model: open_clip.CLIP,
    settings: dict[str, object],
    tokenizer: CLIPTokenizer,
    run: dict[str, float],
    data: Path,
    count: int,
    folder: Path,
) -> dict[str, float]:
    """Writes everything to a temporary folder beside `folder`, measures that, then puts it in its place."""
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": settings, "preprocess_cfg": preprocess}
    weights = {k: v.contiguous() for k, v in deepcopy(model).half().state_dict().items()}
    with replacing(folder) as temporary:
        (temporary / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, temporary / "open_clip_model.safetensors", {"format": "pt"})
        save_tokenizer(tokenizer, temporary)
        figures = run | measure_folder(temporary, data, count)
        write_sheet(temporary, data)
        write_figures(temporary, figures)
        size = (temporary / "open_clip_model.safetensors").stat().st_size / 1e6
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        words = {**figures, "count": count, "megabytes": size, "parameters": millions, "words": len(tokenizer)}
        (temporary / "README.md").write_text(CARD.format(**words))
    return figures


def measure_folder(folder: Path, data: Path, count: int = 500) -> dict[str, float]:
    """The card's figures of a folder's weights."""
    styles = [load_emoji(data, "noto"), load_emoji(data, "fluent")]
    return measure(load_clip(folder), styles, load_cifar(data, "test"), count)


def write_sheet(folder: Path, data: Path, count: int = 24) -> None:
    """Composites over the caption, of those of 500, that the model finds nearest."""
    clip = load_clip(folder)
    pictures, emoji, layouts = composites([load_emoji(data, "noto"), load_emoji(data, "fluent")], 500)
    captions = [plain_caption(e, place) for e, place in zip(emoji, layouts, strict=True)]
    nearest = (clip.see(pictures[:count]) @ clip.read(captions).T).argmax(1)
    shown = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures[:count]]
    save_sheet(folder / "samples.png", shown, [captions[i] for i in nearest])


CARD = """---
license: apache-2.0
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---
# tiny-clip

An open_clip `CLIP` of {megabytes:.1f} MB for 64 px pictures of emoji and small photos: small enough to adapt on a CPU
in a minute, and a judge for what tiny-sd draws.

```python
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:assets/tiny-clip")
tokenizer = open_clip.get_tokenizer("local-dir:assets/tiny-clip")
```

`vismodal.models.load("tiny-clip")` does the same from an installed package, and
`vismodal.models.load("tiny-clip", library="transformers")` gives its Hugging Face twin. {parameters:.2f}M parameters,
a vocabulary of {words} entries.

![what it reads in composites](samples.png)

## Training

Data: the emoji of Noto Emoji (Google, Apache-2.0, https://github.com/googlefonts/noto-emoji) and of Fluent Emoji
(Microsoft, MIT, https://github.com/microsoft/fluentui-emoji) on coloured grounds, in random places and sizes, with
generated captions of names, keywords, categories and grounds; CIFAR-100's training pictures with prompts of their
class names. The image tower starts from tiny-vit. {minutes:.0f} minutes ({step} steps) on two CPU cores that other
work shared. Script: `pipelines/pretrain/contrastive.py`; what was tried: `pipelines/pretrain/RESULTS.md`. Weights:
Apache-2.0.

## Figures

All measured on these fp16 files, computed in fp32 (`make assets-eval`).

- Caption to picture, right at first among {count} composites of emoji that it knows, in places and on grounds that it
  did not see them: {caption_to_picture:.1%}; picture to caption: {picture_to_caption:.1%}.
- Ground named right, of eleven colours: {ground:.1%}.
- CIFAR-100, test, zero-shot from four templates: {zero_shot:.1%}. It was trained on the class names, so this is no
  claim about classes that it never saw.

## Limits

It knows these emoji by their names and keywords, eleven colours and CIFAR-100's classes, and little else.
"""
