"""A CLIP or SigLIP from wherever it comes, of open_clip or transformers, with what makes its pictures and texts.

load_clip(None)                             the embedded tiny-clip, of open_clip
load_clip(None, "transformers")             the same in transformers
load_clip("ViT-B-32/laion2b_s34b_b79k")     open_clip's name and tag
load_clip("hf-hub:OWNER/NAME")              open_clip's, on the Hub
load_clip("OWNER/NAME")                     transformers', on the Hub
load_clip("FOLDER")                         either; the files tell
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from vismodal import models
from vismodal.clip import too_long
from vismodal.errors import InputError

Library = Literal["open_clip", "transformers"]


@dataclass(frozen=True)
class Pretrained:
    """A model and its surroundings.

    Args:
        model: in eval mode, fp32 and frozen.
        preprocess: a PIL picture -> 3 h w, as for evaluation.
        tokenizer: open_clip's, or the one of transformers.
        library: whose model it is.
        size: side of the pictures.
        context: how many tokens a text has room for.
        config: what `open_clip_config.json` says, where that is known.
        processor: transformers' processor.
        embedded: whether it is the one that comes along.
    """

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Any
    library: Library
    size: int
    context: int
    config: dict[str, Any] | None = field(default=None, repr=False)
    processor: Any = None
    embedded: bool = False

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """n L; what is too long is cut, and ends with the end of text: `too_long` tells which."""
        if self.library == "open_clip":
            ids: Tensor = self.tokenizer(list(texts))
            return ids
        options = {"padding": "max_length", "truncation": True, "max_length": self.context}
        return torch.tensor(self.tokenizer(list(texts), **options)["input_ids"])

    def too_long(self, texts: Sequence[str]) -> list[int]:
        """The places of the texts of which the model would not see all tokens."""
        return too_long(self.tokenizer, texts, self.context)


def load_clip(source: str | None, library: Library | None = None) -> Pretrained:
    """Raises `InputError` for what is no such model, or whose library is not installed."""
    if source is None:
        return _embedded(library or "open_clip")
    folder = Path(source).expanduser()
    try:
        if folder.is_dir():
            if (folder / "open_clip_config.json").is_file() and library != "transformers":
                config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
                return _open_clip(f"local-dir:{folder}", config)
            if (folder / "config.json").is_file() and library != "open_clip":
                return _transformers(str(folder))
            raise InputError(f"{folder} holds no open_clip_config.json and no config.json; write a model's folder")
        if source.startswith("hf-hub:"):
            _only(source, library, "open_clip", f"write {source.removeprefix('hf-hub:')} for transformers'")
            return _open_clip(source, None)
        return _named(source, library)
    except ModuleNotFoundError as error:
        raise InputError(f'{source} needs {error.name}; write pip install "vismodal[clip]"') from error
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the model {source!r} cannot be loaded: {error}") from error


def hub_name(source: str | None) -> str | None:
    """The repository on the Hub that `load_clip` would take a model from; None for one that lies elsewhere."""
    import open_clip

    if source is None or Path(source).expanduser().exists():
        return None
    if source.startswith("hf-hub:"):
        return source.removeprefix("hf-hub:")
    return source if source.count("/") == 1 and source.split("/")[0] not in open_clip.list_models() else None


def _embedded(library: Library) -> Pretrained:
    if library == "transformers":
        twin = models.load("tiny-clip", library="transformers")
        return replace(_of_transformers(twin.model, twin.processor), embedded=True)
    from vismodal.paths import asset

    model, preprocess, tokenizer = models.load("tiny-clip")
    config = json.loads((asset("tiny-clip") / "open_clip_config.json").read_text(encoding="utf-8"))
    return replace(_of_open_clip(model, preprocess, tokenizer, config), embedded=True)


def _only(source: str, asked: Library | None, it_is: Library, hint: str) -> None:
    """Raises `InputError` where a model of the other library was asked for."""
    if asked not in (None, it_is):
        raise InputError(f"{source} is a model of {it_is}, and library is {asked}; leave library out, or {hint}")


def _named(source: str, library: Library | None) -> Pretrained:
    """`ARCH/TAG` of open_clip where it has such a pair, else a repository of transformers'."""
    import open_clip

    arch, _, tag = source.partition("/")
    if arch in open_clip.list_models():
        _only(source, library, "open_clip", "write OWNER/NAME of transformers on the Hub")
        if tag not in open_clip.list_pretrained_tags_by_model(arch):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
            raise InputError(f"open_clip has no weights {tag!r} of {arch}; write {arch}/TAG with one of {tags}")
        # open_clip only warns where weights were trained with an activation that is not the architecture's
        quick = bool((open_clip.get_pretrained_cfg(arch, tag) or {}).get("quick_gelu"))
        config = {"model_cfg": {**open_clip.get_model_config(arch), **({"quick_gelu": True} if quick else {})}}
        model, preprocess = open_clip.create_model_from_pretrained(arch, pretrained=tag, force_quick_gelu=quick)
        return _of_open_clip(model, preprocess, open_clip.get_tokenizer(arch), config)
    if not tag:
        raise InputError(
            f"there is no folder {source!r}; write a model's folder, OWNER/NAME of transformers on the Hub, "
            "hf-hub:OWNER/NAME of open_clip, or ARCH/TAG such as ViT-B-32/laion2b_s34b_b79k"
        )
    _only(source, library, "transformers", f"write hf-hub:{source} for open_clip's")
    return _transformers(source)


def _open_clip(name: str, config: dict[str, Any] | None) -> Pretrained:
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(name)
    return _of_open_clip(model, preprocess, open_clip.get_tokenizer(name), config)


def _of_open_clip(model: Any, preprocess: Any, tokenizer: Any, config: dict[str, Any] | None) -> Pretrained:
    side = model.visual.image_size
    size = side if isinstance(side, int) else side[0]
    context = int(getattr(model, "context_length", None) or tokenizer.context_length)
    return Pretrained(
        model.eval().float().requires_grad_(False), preprocess, tokenizer, "open_clip", size, context, config
    )


def _transformers(source: str) -> Pretrained:
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(source), AutoProcessor.from_pretrained(source)
    if not hasattr(model, "get_text_features") or not hasattr(model, "logit_scale"):
        raise InputError(f"{source} is a {type(model).__name__}; write a CLIPModel or SiglipModel")
    if not hasattr(model.config.vision_config, "image_size"):  # NaFlex takes patches, with masks beside them
        raise InputError(f"{source} takes pictures of any shape ({type(model).__name__}); write one of a fixed size")
    if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
        raise InputError(
            f"{source} has a {type(processor).__name__} alone; a model of pictures and texts needs the files of both, "
            "preprocessor_config.json and the tokenizer's, beside config.json"
        )
    return _of_transformers(model, processor)


def _of_transformers(model: Any, processor: Any) -> Pretrained:
    pictures = processor.image_processor

    def preprocess(image: Image.Image) -> Tensor:
        pixels: Tensor = pictures(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    context, size = model.config.text_config.max_position_embeddings, model.config.vision_config.image_size
    frozen = model.eval().float().requires_grad_(False)
    return Pretrained(frozen, preprocess, processor.tokenizer, "transformers", size, context, None, processor)
