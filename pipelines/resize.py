"""Give an adapter file fewer ranks, with the best approximation of each update.

    vismodal resize dog.safetensors --rank 4 --out small.safetensors
    vismodal resize dog.safetensors --energy 0.95 --out small.safetensors
    vismodal resize dog.safetensors --error 0.1 --ranks "unet.mid_block.*=16" --out small.safetensors

From Python: `vismodal.tools.resize.resize`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vismodal.errors import InputError
from vismodal.pruning import Keep
from vismodal.tools.files import deliver, read_all
from vismodal.tools.merge import Made
from vismodal.tools.resize import resize


@dataclass(frozen=True)
class Config:
    """Give a LoRA, PiSSA, AdaLoRA or DyLoRA fewer ranks, without its base model, and print what that loses.

    Args:
        adapter: file of vismodal, diffusers, kohya or LyCORIS; vismodal's is written, which `vismodal convert` reads.
        out: file to write.
        rank: ranks to keep at each site, where it has more.
        energy: instead, as many as hold this share of the squared singular values of a site.
        error: instead, as many as leave this relative error of a site at most; energy is 1 - error^2.
        ranks: ranks of single sites, by glob on their names: "blocks.0.*=4". The first that matches counts.
        base: of a file of others that does not tell it: sd1, sd2, sdxl or a folder of diffusers.
    """

    adapter: tuple[Path, ...] = ()
    out: Path | None = None
    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    ranks: tuple[str, ...] = ()
    base: str | None = None

    POSITIONAL: ClassVar[str] = "adapter"


def main(config: Config) -> Made:
    """Writes the adapter with the ranks that are left, and prints them."""
    if len(config.adapter) != 1:
        raise InputError(f"one adapter is resized at a time, {len(config.adapter)} given; write its file")
    (saved,) = read_all(config.adapter, config.out, config.base)
    keep = Keep(config.rank, config.energy, config.error, dict(map(_rank, config.ranks)))
    return deliver(resize(saved, keep), config.out)


def _rank(text: str) -> tuple[str, int]:
    glob, _, number = text.rpartition("=")
    if not glob or not number.isdecimal():
        raise InputError(f'{text!r} gives no site a rank; write a glob on its name and a number, as "blocks.0.*=4"')
    return glob, int(number)


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["resize", *sys.argv[1:]]))
