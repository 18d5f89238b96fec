"""A CLIP with its changes in the weights, as folders that open_clip and transformers load by themselves."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from vismodal.adapter import Adapter
from vismodal.attach import attached
from vismodal.errors import InputError
from vismodal.files import write_file
from vismodal.formats.open_clip import export
from vismodal.formats.open_clip_folder import save_folder
from vismodal.pretrained import Pretrained

OPEN_CLIP, TRANSFORMERS = "open_clip", "transformers"  # names of the folders


def write_adapted(
    source: Pretrained, adapter: Adapter, out: Path, more: Callable[[nn.Module], object] = lambda model: None
) -> list[str]:
    """As `write`, with an adapter of the model in the weights; `more` changes that copy further. The model itself stays
    as it is. A line that says so, and no folder, where a method does not merge."""
    if lasting := [m for m in adapter.methods.values() if not m.mergeable]:
        name = type(lasting[0]).__name__
        return [f"not exported: {name} does not merge into the weights; use adapter.safetensors"]
    merged: Any = copy.deepcopy(source.model)
    attached(merged)[adapter.name].detach(keep=True)
    more(merged)
    return write(replace(source, model=nn.Module.eval(merged)), out)


def write(source: Pretrained, out: Path) -> list[str]:
    """Writes `out`/open_clip and `out`/transformers; a line for each that says how to load it, or why it is not there.

    A model of transformers is written for transformers; one of open_clip for both, where transformers has its like.
    """
    if source.library == "transformers":
        _save(source, out / TRANSFORMERS)
        return [_theirs(source)]
    lines = []
    try:
        save_folder(source.model, source.tokenizer, out / OPEN_CLIP, source.config)
        lines.append(f'open_clip: open_clip.create_model_from_pretrained("local-dir:PATH/{OPEN_CLIP}")')
    except InputError as error:
        lines.append(f"not written for open_clip: {error}")
    try:
        export(source.model, source.tokenizer, out / TRANSFORMERS)
        lines.append(_theirs(source))
    except InputError as error:
        lines.append(f"not written for transformers: {error}")
    return lines


def _theirs(source: Pretrained) -> str:
    kind = "CLIPModel" if source.library == "open_clip" else type(source.model).__name__
    return f'transformers: {kind}.from_pretrained("PATH/{TRANSFORMERS}")'


def _save(source: Pretrained, folder: Path) -> None:
    """As `save_pretrained` writes it, yet whole or absent file by file."""
    with tempfile.TemporaryDirectory() as temporary:
        for part in (source.processor, cast(Any, source.model)):  # the weights last
            part.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir(), key=lambda f: f.suffix == ".safetensors"):
            write_file(folder / file.name, file.read_bytes())
