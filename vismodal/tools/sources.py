"""Whole models from where they lie, by the parts that adapter files name, and their folders with other weights.

    whole = open_model("stable-diffusion-v1-5", prefixes=("unet",))
    whole.models["unet"]                                     adapt it, merge into it
    whole.write(Path("out"))                                 plain from_pretrained("out") loads it

A source is a folder of diffusers (model_index.json), transformers, timm (config.json) or open_clip
(open_clip_config.json), an embedded model, a name of timm, ARCH/TAG of open_clip, or an id on the Hub.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vismodal.classification.classifier import HEADER, classifier_of
from vismodal.errors import InputError
from vismodal.models import LIBRARIES
from vismodal.paths import asset
from vismodal.tools.live import Models
from vismodal.tools.saved import Saved

WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.ckpt",
    "*.msgpack",
    "*.h5",
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Whole:
    """A model as adapter files see it: parts by prefix, {"": model} where there is one. `save` fills a folder; `pipe`
    is what it is in diffusers."""

    models: Models
    save: Callable[[Path], object]
    pipe: Any = None

    def write(self, out: Path) -> Path:
        """A new folder, whole or not at all. Raises `InputError` where there is something of that name."""
        check_free(out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{out.name}-", suffix=".part", dir=out.parent) as temporary:
                made = Path(temporary) / "made"
                made.mkdir()
                self.save(made)
                if out.is_dir():
                    out.rmdir()
                os.replace(made, out)
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror or error}; choose another folder") from error
        return out


def check_free(out: Path) -> None:
    """Raises `InputError` where a folder would be written over."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} is there already; choose another folder, or delete it first")


def open_base(source: str | None, adapters: Sequence[Saved], precision: str = "fp32") -> Whole:
    """The base that adapters were made on. Of `vismodal classify` a file knows its own; others need a `source`."""
    entry = next((a for a in adapters if HEADER in a.metadata), None)
    if entry is not None:
        return _classifier(entry, source, precision)
    if source is None:
        names = ", ".join(dict.fromkeys(base.name for a in adapters for base in a.bases.values()))
        raise InputError(f"the base model is missing; write --model with the folder or name of {names}")
    return open_model(source, list(dict.fromkeys(prefix for a in adapters for prefix in a.bases)), precision)


def _classifier(saved: Saved, source: str | None, precision: str) -> Whole:
    from vismodal.classification.vision import load_vision

    file = classifier_of(saved.metadata[HEADER])
    vision = load_vision(replace(file.source, model=source or file.source.model), len(file.classes))
    model: Any = vision.model.to(DTYPES[precision])

    def save(out: Path) -> None:
        if hasattr(model, "save_pretrained"):
            model.config.id2label = dict(enumerate(file.classes))
            model.config.label2id = {name: i for i, name in enumerate(file.classes)}
            model.save_pretrained(out)
            from transformers import AutoImageProcessor

            AutoImageProcessor.from_pretrained(source or file.source.model).save_pretrained(out)
            return
        import timm

        names = {"label_names": list(file.classes)}
        timm.models.save_for_hf(model, str(out), names, safe_serialization=True, data_config=dict(file.preprocessing))

    return Whole({"": model}, save)


def open_model(source: str, prefixes: Collection[str], precision: str = "fp32") -> Whole:
    """The parts that `prefixes` name, in eval mode.

    Raises `InputError` for what is no model, cannot be read, or has no such parts.
    """
    if precision not in DTYPES:
        raise InputError(f"no precision {precision!r}; write one of {', '.join(DTYPES)}")
    folder = asset(source) if source in LIBRARIES else Path(source).expanduser()
    try:
        whole = _open(source, folder, prefixes)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f'{source} needs {error.name}, which is not installed; write pip install "vismodal[all]"'
        ) from error
    except Exception as error:  # the Hub and the libraries raise nearly anything
        raise InputError(f"the model {source!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if missing := set(prefixes) - whole.models.keys():
        there = ", ".join(sorted(whole.models)) if any(whole.models) else "one model without parts"
        what = ", ".join(map(repr, sorted(missing))) if any(missing) else "one model"
        raise InputError(f"the adapter is for {what}, and {source} has {there}; give the model that it was made on")
    for model in whole.models.values():
        model.to(DTYPES[precision]).eval()
    return whole


def _open(source: str, folder: Path, prefixes: Collection[str]) -> Whole:
    if (folder / "model_index.json").is_file() or (any(prefixes) and not folder.exists()):
        return _pipeline(str(folder) if folder.is_dir() else source)
    if (folder / "open_clip_config.json").is_file():
        return _clip(str(folder))
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _timm(f"local-dir:{folder}") if "architecture" in config else _transformers(folder, config)
    if folder.exists():
        raise InputError(f"{folder} holds no model: no model_index.json, config.json or open_clip_config.json")
    return _named(source)


def _named(source: str) -> Whole:
    import timm

    if source.startswith("timm/") or (":" not in source and "/" not in source and timm.is_model(source)):
        return _timm(f"hf-hub:{source}" if "/" in source else source)
    if "/" not in source:
        raise InputError(
            f"there is no model {source!r}: no such folder, and timm knows no such name; write the folder of a model, "
            f"{', '.join(LIBRARIES)}, a name of timm, ARCH/TAG of open_clip, or OWNER/NAME on the Hub"
        )
    from vismodal.pretrained import load_clip

    if source.startswith("hf-hub:") or source.partition("/")[0] in _architectures():
        return _clip(source)
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    return _open(str(folder), folder, ()) if (folder / "config.json").is_file() else _of_clip(load_clip(source))


def _architectures() -> Collection[str]:
    try:
        import open_clip
    except ModuleNotFoundError:
        return ()
    return cast(Collection[str], open_clip.list_models())


def _pipeline(source: str) -> Whole:
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(source, use_safetensors=True)
    models = {n: part for n, part in pipe.components.items() if isinstance(part, nn.Module)}
    return Whole(models, pipe.save_pretrained, pipe)


def _timm(name: str) -> Whole:
    import timm

    model: Any = timm.create_model(name, pretrained=True)

    def save(out: Path) -> None:
        own = {}
        if name.startswith("local-dir:"):
            said = json.loads((Path(name[10:]) / "config.json").read_text(encoding="utf-8"))
            own = {key: said[key] for key in ("label_names", "label_descriptions") if key in said}
        timm.models.save_for_hf(model, str(out), model_config=own, safe_serialization=True)

    return Whole({"": model}, save)


def _clip(source: str) -> Whole:
    from vismodal.pretrained import load_clip

    return _of_clip(load_clip(source))


def _of_clip(source: Any) -> Whole:
    from vismodal.formats.open_clip_folder import save_folder

    if source.library == "transformers":
        parts = (source.processor, source.model)
        return Whole({"": source.model}, lambda out: [part.save_pretrained(out) for part in parts])
    return Whole({"": source.model}, lambda out: save_folder(source.model, source.tokenizer, out, source.config))


def _transformers(folder: Path, config: Mapping[str, Any]) -> Whole:
    import transformers

    name = next(iter(config.get("architectures") or ()), "")
    cls: Any = getattr(transformers, name, None) or transformers.AutoModel
    model = cls.from_pretrained(folder)

    def save(out: Path) -> None:
        shutil.copytree(folder, out, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
        model.save_pretrained(out)

    return Whole({"": model}, save)


def load_weights(model: nn.Module, file: Path) -> None:
    """Puts a checkpoint of the same architecture into a model. Raises `InputError` for another one, and for pickles."""
    if file.suffix != ".safetensors":
        raise InputError(f"{file} is no safetensors file; pickles are never read: convert it first")
    try:
        missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise InputError(f"{file} does not fit the model: {error}") from error
    if missing or unexpected:
        wrong = [f"it lacks {k}" for k in missing[:2]] + [f"it has {k}" for k in unexpected[:2]]
        raise InputError(f"{file} is a checkpoint of another architecture: {', '.join(wrong)}")
