"""Merge adapter files into one LoRA.

    vismodal merge dog.safetensors style.safetensors --weights 0.7 0.3 --out both.safetensors
    vismodal merge a.safetensors b.safetensors --method ties --rank 16 --out both.safetensors
    vismodal merge a.safetensors b.safetensors --weights 0.5 0.5 --energy 0.99 --out halfway.safetensors
    vismodal merge oft.safetensors lora.safetensors --model tiny-vit --rank 8 --out both.safetensors

What the methods are, as formulas: `vismodal/tools/combine.py`. From Python: `vismodal.tools.merge.merge`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vismodal.errors import InputError
from vismodal.pruning import Keep
from vismodal.tools.combine import Recipe
from vismodal.tools.files import deliver, read_all
from vismodal.tools.merge import Made, merge
from vismodal.tools.sources import open_base


@dataclass(frozen=True)
class Config:
    """Merge adapters of one base model into one LoRA, which acts as all of them at once.

    Args:
        adapters: files of vismodal, diffusers, kohya or LyCORIS, made on the same base.
        out: file to write.
        weights: a factor for each adapter; 1 for each unless given. 0.5 0.5 is halfway between two.
        method: linear is the weighted sum, exact unless fewer ranks are asked for; concatenated and svd are the same by
            the names of its two ways; ties keeps each one's largest entries, and those that agree in sign; dare drops
            entries at random and scales up the rest; dare_ties does both.
        rank: ranks to keep at each site; without it a sum keeps all, and the others the most that an adapter has.
        energy: instead of rank, as many as hold this share of the squared singular values.
        error: instead of rank, as many as leave this relative error at most.
        density: share of the entries that ties keeps (0.2) or dare (0.5).
        seed: of what dare keeps.
        model: base model, needed for methods other than LoRA, PiSSA, AdaLoRA and DyLoRA, for adapters of different
            choices of sites, and for files of others that do not tell it: a folder or a name.
    """

    adapters: tuple[Path, ...] = ()
    out: Path | None = None
    weights: tuple[float, ...] = ()
    method: str = "linear"
    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    density: float | None = None
    seed: int = 0
    model: str | None = None

    POSITIONAL: ClassVar[str] = "adapters"


def main(config: Config) -> Made:
    """Writes the merged adapter, and prints its ranks and what truncation loses."""
    if len(config.adapters) < 2:
        raise InputError("two adapters or more are needed; write their files, such as a.safetensors b.safetensors")
    adapters = read_all(config.adapters, config.out, config.model)
    recipe, keep = Recipe(config.method, config.density, config.seed), Keep(config.rank, config.energy, config.error)
    models = open_base(config.model, adapters).models if config.model else None
    made = merge(adapters, config.weights or None, recipe, keep, models)
    return deliver(made, config.out)


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["merge", *sys.argv[1:]]))
