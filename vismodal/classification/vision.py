"""Vision models of timm and transformers as classifiers: loaded by name, with their own preprocessing and a new head.

    vision = load_vision(Source("vit_base_patch16_224"), classes=5)
    fresh_head(vision.model, 5, seed=0)
    x = vision.preprocess(image)             # 3 h w of a PIL picture, as the model was trained on
    y = vision.model(x[None])                # 1 C, or an output object of transformers

Preprocessing is one dictionary in timm's terms (`input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`)
for both libraries: it is what an adapter file records, and what `vismodal predict` follows.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.models import LIBRARIES
from vismodal.paths import asset

EMBEDDED = "tiny-vit"
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


@dataclass(frozen=True)
class Source:
    """Where a base model comes from; an adapter file records it.

    Args:
        model: "tiny-vit" (embedded); a name of timm; a folder of timm or transformers; `hf-hub:OWNER/NAME` of timm or
            OWNER/NAME of transformers on the Hub.
        weights: a checkpoint file for a timm model, instead of its pretrained one.
        image_size: side in pixels of the input, where it is not the model's own; position embeddings are resampled.
    """

    model: str = EMBEDDED
    weights: str | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class Vision:
    """A classifier in eval mode and fp32, and how it wants its pictures."""

    model: nn.Module
    config: Mapping[str, Any]

    @cached_property
    def preprocess(self) -> Callable[[Image.Image], Tensor]:
        """A PIL picture -> 3 h w, as for evaluation."""
        from timm.data import create_transform

        return cast("Callable[[Image.Image], Tensor]", create_transform(**self.config, is_training=False))


def load_vision(source: Source, classes: int) -> Vision:
    """The model of `source` with a head for so many classes (draw it by `fresh_head`).

    Raises `InputError` where there is no such model, its library is not installed, or it cannot be a classifier.
    """
    folder = Path(source.model).expanduser()
    try:
        config = _config(source, folder)
        if "architecture" in config or not config:
            return _timm(source, folder, classes)
        return _transformers(source, folder, classes)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f'{source.model} needs {error.name}; write pip install "vismodal[clip]"') from error
    except Exception as error:  # the Hub, timm and transformers raise nearly anything
        raise InputError(f"the model {source.model!r} cannot be loaded: {type(error).__name__}: {error}") from error


def fresh_head(model: nn.Module, classes: int, seed: int) -> None:
    """A new classification head, drawn from `seed` alone."""
    where = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if hasattr(model, "reset_classifier"):
            cast(Any, model).reset_classifier(classes)
        else:
            head = cast(nn.Linear, model.classifier)
            model.classifier = nn.Linear(head.in_features, classes, bias=head.bias is not None)
    model.to(where.device, where.dtype)


def logits_of(output: Any) -> Tensor:
    """b C of what a model gave: timm's are tensors, transformers' objects."""
    return cast(Tensor, output if isinstance(output, Tensor) else output.logits)


def hub_id(model: nn.Module, source: Source) -> str | None:
    """The base model's name on the Hub, where it comes from there."""
    if source.weights or source.model == EMBEDDED or Path(source.model).expanduser().exists():
        return None
    known = getattr(model, "pretrained_cfg", None)
    return cast("str | None", known.get("hf_hub_id")) if isinstance(known, dict) else source.model


def as_json(source: Source) -> dict[str, Any]:
    """What differs from the defaults, and the model's name; places on this machine in full."""
    given = {name: value for name, value in asdict(source).items() if value is not None}
    for name in ("model", "weights"):
        if name in given and given[name] != EMBEDDED and Path(given[name]).expanduser().exists():
            given[name] = str(Path(given[name]).expanduser().resolve())
    return given


# -- the two libraries -----------------------------------------------------------------------------------------------


def _config(source: Source, folder: Path) -> dict[str, Any]:
    """The model's config.json where it has one; timm's has an "architecture"."""
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise InputError(f"{folder} holds no config.json; write the folder of a model of timm or transformers")
        return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
    if source.model.startswith((".", "/", "~")) or source.model.count("/") > 1:  # no name on the Hub, but a place
        raise InputError(f"there is no folder {source.model}; write where the model lies (--model)")
    if "/" in source.model and not source.model.startswith(("hf-hub:", "hf_hub:", "timm/")):
        from huggingface_hub import hf_hub_download

        return cast(dict[str, Any], json.loads(Path(hf_hub_download(source.model, "config.json")).read_text()))
    return {}


def _timm(source: Source, folder: Path, classes: int) -> Vision:
    import timm
    from timm.data import resolve_data_config

    name = source.model
    if name == EMBEDDED:
        name = f"local-dir:{asset(name)}"
    elif folder.is_dir():
        name = f"local-dir:{folder}"
    elif name.startswith("timm/") or ("/" in name and ":" not in name):
        name = f"hf-hub:{name}"
    elif ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, [*LIBRARIES, *timm.list_models()], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names what there is"
        raise InputError(f"timm has no model {name!r}; {hint}")
    options: dict[str, Any] = {"pretrained": True}
    if source.weights:
        file = Path(source.weights).expanduser()
        if not file.is_file():
            raise InputError(f"there is no checkpoint {source.weights}; write where it lies (--weights)")
        options["pretrained_cfg_overlay"] = {"file": str(file)}
    model = _sized(lambda **size: timm.create_model(name, **options, **size), source.image_size)
    model.reset_classifier(classes)
    size = {"input_size": (3, source.image_size, source.image_size)} if source.image_size else {}
    config = resolve_data_config(size, model=model)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    return Vision(model.eval().float(), plain)


def _sized(create: Callable[..., Any], size: int | None) -> Any:
    """The model at an image size; convolutional ones take any, and know no such setting."""
    if size is None:
        return create()
    try:
        return create(img_size=size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create()


def _transformers(source: Source, folder: Path, classes: int) -> Vision:
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.utils import logging

    if source.image_size or source.weights:
        raise InputError("image_size and weights are for models of timm; leave them out")
    name, verbosity = str(folder) if folder.is_dir() else source.model, logging.get_verbosity()
    logging.set_verbosity_error()  # it reports the head, which is new, as missing
    try:
        options = {"num_labels": classes, "ignore_mismatched_sizes": True}
        model = AutoModelForImageClassification.from_pretrained(name, **options)
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(getattr(model, "classifier", None), nn.Linear):
        raise InputError(f"{source.model} is a {type(model).__name__}, which has no linear classifier; write another")
    processor = AutoImageProcessor.from_pretrained(name)
    vision = Vision(model.eval().float(), from_processor(processor))
    _check(processor, vision)
    return vision


def _check(processor: Any, vision: Vision) -> None:
    """Raises `InputError` where the processor does something that its settings do not tell."""
    y, x = torch.meshgrid(torch.arange(240), torch.arange(320), indexing="ij")
    image = Image.fromarray(torch.stack([0.8 * x, y, 255 - 0.5 * (x + y).clamp(max=510)], -1).byte().numpy())
    theirs, mine = processor(images=image, return_tensors="pt")["pixel_values"][0], vision.preprocess(image)
    levels = 255 * min(vision.config["std"])  # of 255: PIL and torchvision round, and cut odd rests on another side
    if theirs.shape != mine.shape or float((theirs - mine).abs().max()) * levels > 5:
        raise InputError(
            f"what {type(processor).__name__} does to a picture is not supported: it is more than resizing, "
            "cutting out the middle and normalising"
        )


def from_processor(processor: Any) -> dict[str, Any]:
    """An image processor of transformers in timm's terms. Raises `InputError` for what it does besides."""
    size, crop = dict(processor.size or {}), dict(processor.crop_size or {}) if hasattr(processor, "crop_size") else {}
    if getattr(processor, "do_rescale", True) and abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise InputError(
            f"the processor scales pixels by {processor.rescale_factor}, not by 1/255, which is not supported"
        )
    zoom = getattr(
        processor, "crop_pct", None
    )  # ConvNeXt's: below 384 pixels it cuts out the middle, above it squashes
    if size.get("shortest_edge") and zoom:
        edge = size["shortest_edge"]
        cut, mode, share = (edge, edge), "center" if edge < 384 else "squash", zoom if edge < 384 else 1.0
    elif size.get("shortest_edge"):
        edge = size["shortest_edge"]
        cut = (crop["height"], crop["width"]) if getattr(processor, "do_center_crop", False) else (edge, edge)
        mode, share = "center", min(cut) / (edge + 0.5)  # timm rounds min(cut) / share down: to `edge`
    elif size.get("height") and size.get("width"):
        cut, mode, share = (size["height"], size["width"]), "squash", 1.0
    else:
        raise InputError(
            f"the processor resizes to {size}, which is not supported; shortest_edge, or height and width are"
        )
    normal = getattr(processor, "do_normalize", True)
    return {
        "input_size": [3, *cut],
        "interpolation": _FILTERS[int(processor.resample)],
        "mean": list(processor.image_mean) if normal else [0.0] * 3,
        "std": list(processor.image_std) if normal else [1.0] * 3,
        "crop_pct": share,
        "crop_mode": mode,
    }
