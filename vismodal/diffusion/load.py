"""Load a pipeline for training, from a folder or the Hub: only safetensors, every missing part named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vismodal.diffusion.kinds import Kind, Pipe, kind_named, kind_of
from vismodal.diffusion.processes import process_of, zero_terminal_snr
from vismodal.errors import InputError
from vismodal.quantised import quantise

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(model: str | Path, precision: str = "no", device: torch.device | str = "cpu") -> Pipe:
    """A pipeline from a folder or the Hub, without its safety checker. Only safetensors are read.

    Denoiser and text encoders have the precision ("no", "bf16", "fp16"); the autoencoder stays in fp32, since in half
    precision it blurs or overflows.

    Raises `InputError` naming the missing part, or why the model cannot be read or trained.
    """
    import diffusers

    folder = Path(model).expanduser()
    if folder.is_file():
        raise InputError(
            f"the model {model} is one file, and what is read here is a folder; write one with diffusers, by "
            f'StableDiffusionPipeline.from_single_file("{folder.name}").save_pretrained("FOLDER") (or '
            "StableDiffusionXLPipeline), and then --model FOLDER"
        )
    if not folder.is_dir() and (str(model).startswith((".", "/", "~")) or str(model).count("/") != 1):
        raise InputError(
            f"there is no model folder {model}; write a folder in diffusers' layout, or a Hub id OWNER/NAME"
        )
    source = str(folder) if folder.is_dir() else str(model)
    index = _index(folder) if folder.is_dir() else None
    try:
        with _quiet():
            listed = index or diffusers.DiffusionPipeline.load_config(source)
            name = str(listed.get("_class_name"))
            kind = kind_named(name, str(model))
            if index is not None:
                _check_folder(folder, index, kind)
            dtype: dict[str, torch.dtype] = dict.fromkeys((kind.denoiser, *kind.encoders), PRECISIONS[precision])
            dtype["default"] = torch.float32
            without = [name for name in kind.optional if not listed.get(name, [None])[0]]
            nothing = dict.fromkeys((*without, *map(tokenizer_of, without)))
            read = getattr(diffusers, name).from_pretrained
            pipe: Pipe = read(source, use_safetensors=True, dtype=dtype, **kind.loading, **nothing).to(device)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        todo = "" if folder.is_dir() else " Check the id, that the Hub can be reached, and that you may read the model"
        raise InputError(f"the model {model} cannot be loaded: {why}{todo}") from error
    _check_parts(pipe, model)
    if pipe.vae.device.type != "cpu":  # one picture at a time: in fp32 four large ones fill a card
        pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prepare(pipe: Pipe, zero_snr: bool, int8: bool) -> None:
    """What is changed of a model before it is adapted: its noise (`zero_terminal_snr`), and linear layers in int8."""
    if zero_snr:
        zero_terminal_snr(pipe)
    if int8:
        quantise(kind_of(pipe).model(pipe))


def _index(folder: Path) -> dict[str, Any]:
    """What model_index.json says."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(f"{folder} lacks model_index.json; a model folder is what diffusers' save_pretrained writes")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{index} is no JSON: {error}") from error
    return dict(listed)


def _check_folder(folder: Path, listed: dict[str, Any], kind: Kind) -> None:
    """Raises `InputError` for the first part that is not there."""
    encoders = [name for name in kind.encoders if name not in kind.optional or listed.get(name, [None])[0]]
    weights = [kind.denoiser, "vae", *encoders]
    for part in (*weights, *map(tokenizer_of, encoders), "scheduler"):
        if not listed.get(part, [None])[0]:
            raise InputError(f"the model {folder} has no {part}: model_index.json does not name one")
        if not (folder / part).is_dir() or not any((folder / part).iterdir()):
            raise InputError(f"the model {folder} is missing its part {part!r}: there is no folder {folder / part}")
    for part in weights:
        if not (folder / part / "config.json").is_file():
            raise InputError(f"the model {folder} is missing its part {part!r}: {folder / part} has no config.json")
        if not any((folder / part).glob("*.safetensors")):
            pickled = next((folder / part).glob("*.bin"), None)
            hint = f"; {pickled.name} is a pickle, which is never read: convert it to safetensors" if pickled else ""
            raise InputError(f"the model {folder} is missing its part {part!r}: no weights (*.safetensors){hint}")


def tokenizer_of(encoder: str) -> str:
    """ "tokenizer_2" of "text_encoder_2"."""
    return encoder.replace("text_encoder", "tokenizer")


def _check_parts(pipe: Pipe, model: str | Path) -> None:
    wanted, given = kind_of(pipe).channels(pipe), pipe.vae.config.latent_channels
    if wanted != given:
        raise InputError(
            f"{model} takes {wanted} channels, of {given} latent ones: inpainting models cannot be trained here"
        )
    process_of(pipe)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loading bars of diffusers and transformers; downloads keep theirs."""
    import diffusers.utils.logging as ours
    import transformers.utils.logging as theirs

    before = [module.is_progress_bar_enabled() for module in (ours, theirs)]
    for module in (ours, theirs):
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, enabled in zip((ours, theirs), before, strict=True):
            if enabled:
                module.enable_progress_bar()
