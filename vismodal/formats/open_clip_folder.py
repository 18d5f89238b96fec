"""An open_clip model as a folder that open_clip itself loads, with its weights as they are now.

    model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")
    tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")

The same layout as on the Hub: `open_clip_config.json`, `open_clip_model.safetensors` and the tokenizer's files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vismodal.files import write_file, write_tensors
from vismodal.formats.clip_keys import model_cfg_of
from vismodal.formats.open_clip import check_adapters, preprocess_cfg_of

_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


def save_folder(model: nn.Module, tokenizer: Any, out: Path, config: Mapping[str, Any] | None = None) -> Path:
    """Writes the folder.

    Args:
        model: as `open_clip.create_model` gives it; adapters on it must be merged.
        tokenizer: open_clip's tokenizer of this model.
        out: the folder; files of the same names in it are replaced.
        config: the model's own `open_clip_config.json`, where it is known; else it is read off the model's modules.

    Raises `InputError` for adapters that are not merged, and without a config for towers that are not open_clip's own.
    """
    check_adapters(model)
    model_cfg = dict(config["model_cfg"]) if config else _described(model, tokenizer)
    preprocess = {key: value for key, value in preprocess_cfg_of(model).items() if key in _PREPROCESS}
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None and hasattr(inner, "save_pretrained"):
        with tempfile.TemporaryDirectory() as temporary:
            inner.save_pretrained(temporary)
            for file in sorted(Path(temporary).iterdir()):
                write_file(out / file.name, file.read_bytes())
    write_file(
        out / "open_clip_config.json",
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}, indent=2, default=list),
    )
    write_tensors(out / "open_clip_model.safetensors", model.state_dict(), {"format": "pt"})
    return out


def _described(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    from open_clip.tokenizer import HFTokenizer, get_clean_fn

    cfg = model_cfg_of(model)
    if isinstance(tokenizer, HFTokenizer):
        clean = next(
            name for name in ("whitespace", "lower", "canonicalize") if tokenizer.clean_fn is get_clean_fn(name)
        )
        # any name: without one open_clip takes a vocabulary of its own instead of the files beside
        cfg["text_cfg"] |= {"hf_tokenizer_name": "beside", "tokenizer_kwargs": {"clean": clean}}
    return cfg
