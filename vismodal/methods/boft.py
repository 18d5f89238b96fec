"""BOFT: butterfly orthogonal finetuning (Liu et al. 2024, arXiv 2311.06243, section 4).

    W' = W R^T  (side "in")  or  R W  (side "out"),    R = R_m ... R_1

Each R_i is block-diagonal up to a permutation, with blocks b x b as in OFT (see `vismodal.methods.rotation`). R_1 has
neighbours in its blocks; those of R_i pair halves of length b / 2 that lie 2^(i-1) halves apart, so m of them mix
b 2^(m-1) entries with (b-1)/2 parameters for each entry and stage. With m = 1 this is OFT.

peft rotates the input side, always trains `rescale` too, and falls back to m = 1 with a warning where its CUDA kernel
is not built; LyCORIS rotates rows, with as many stages as the size allows, and orders the two halves of a block
alternately, which permutes the entries of Q and nothing else. Both hold b x b matrices for each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method
from vismodal.methods.layers import is_matrix
from vismodal.methods.rotation import Side, rotation
from vismodal.site import Site


@dataclass(frozen=True, kw_only=True, repr=False)
class BOFT(Method):
    """Butterfly orthogonal finetuning, arXiv 2311.06243.

    Args:
        block_size: b, the size of a block; where b 2^(m-1) does not divide the side, the largest even b below it.
        factors: m, how many block-diagonal rotations are multiplied.
        side: "in" rotates the columns of W (peft), "out" its rows (LyCORIS).
        rescale: train a factor for each row as well.
    """

    sites: tuple[str, ...] = ("attn.q", "attn.v")
    block_size: int = 8
    factors: int = 2
    side: Side = "in"
    rescale: bool = False

    survey: ClassVar[str] = "reparameterised: LoRA derivatives"
    paper: ClassVar[str] = "arXiv 2311.06243"
    mergeable: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("conv",),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("in", "out"):
            raise InputError(f'BOFT: side must be "in" or "out", not {self.side!r}')
        if self.block_size < 2 or self.factors < 1:
            raise InputError(
                f"BOFT: block_size must be at least 2 and factors at least 1, not {self.block_size} and {self.factors}"
            )

    @classmethod
    def fits(cls, site: Site) -> bool:
        return is_matrix(site)

    def build(self, sites: Sequence[Site]) -> Built:
        options = (self.side, self.block_size, self.factors, 0, self.rescale)
        return Built(tuple(rotation("BOFT", site, *options) for site in sites))
