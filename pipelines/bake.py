"""Write adapters into the weights of their base model, as a folder that its own library loads.

    vismodal bake dog.safetensors --model OWNER/STABLE-DIFFUSION --out dog_model
    vismodal bake dog.safetensors style.safetensors --strengths 0.8 0.5 --model sd_folder --precision fp16 --out mixed
    vismodal bake runs/classify-1/adapter.safetensors --out pets_model      # knows its base model itself
    vismodal bake style.safetensors --strengths 0.7 --out weaker.safetensors      # an adapter at another strength

From Python: `vismodal.tools.bake.bake` and `vismodal.tools.strength.scale`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vismodal.diffusion.processes import sample_as_trained
from vismodal.errors import InputError
from vismodal.tools.bake import bake, check_merges
from vismodal.tools.files import check_out, read_all
from vismodal.tools.saved import Saved, write_saved
from vismodal.tools.sources import check_free, open_base
from vismodal.tools.strength import scale


@dataclass(frozen=True)
class Config:
    """Write adapters into the weights of their base model: a folder for programs that know nothing of adapters.

    Args:
        adapters: files of vismodal, diffusers, kohya or LyCORIS, made on that model. They are added in this order.
        out: folder to write; or, for one adapter, a .safetensors file: the adapter itself, at another strength.
        model: base model: a folder of diffusers, transformers, timm or open_clip, or a name. An adapter of vismodal
            classify knows its own.
        strengths: of each adapter; 1 is as it was trained, 0 the base.
        precision: of the weights that are written: fp32, fp16 or bf16.
    """

    adapters: tuple[Path, ...] = ()
    out: Path | None = None
    model: str | None = None
    strengths: tuple[float, ...] = ()
    precision: str = "fp32"

    POSITIONAL: ClassVar[str] = "adapters"


def main(config: Config) -> Path:
    """Writes the model, and says how to load it."""
    if not config.adapters:
        raise InputError("no adapter; write its file, such as dog.safetensors")
    adapters = read_all(config.adapters, config.out, config.model, folder=True)
    assert config.out is not None
    strengths = config.strengths or (1.0,) * len(adapters)
    if len(strengths) != len(adapters):
        raise InputError(f"{len(adapters)} adapters and {len(strengths)} strengths; give one for each of them")
    if config.out.suffix == ".safetensors":
        return _rescale(config, adapters, strengths[0])
    for saved in adapters:
        check_merges(saved)
    check_free(config.out)
    whole = open_base(config.model, adapters, config.precision)
    bake(whole.models, adapters, strengths)
    if whole.pipe is not None:
        sample_as_trained(whole.pipe, [saved.header for saved, s in zip(adapters, strengths, strict=True) if s])
    whole.write(config.out)
    print(f"{config.out}: {', '.join(f'{a.name} at {s:g}' for a, s in zip(adapters, strengths, strict=True))}")
    return config.out


def _rescale(config: Config, adapters: list[Saved], strength: float) -> Path:
    assert config.out is not None
    if len(adapters) > 1:
        raise InputError("several adapters as one file are merged: vismodal merge; bake writes a folder")
    if config.precision != Config().precision:
        raise InputError("precision is that of a model's folder; an adapter's file keeps its own: leave it out")
    check_out(config.out)
    models = open_base(config.model, adapters).models if config.model else None
    path = write_saved(scale(adapters[0], strength, models), config.out)
    print(f"{path}: {adapters[0].name} at {strength:g}")
    return path


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["bake", *sys.argv[1:]]))
