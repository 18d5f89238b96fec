"""OFT: orthogonal finetuning (Qiu et al. 2023, arXiv 2306.07280, section 3).

    W' = W R^T    (side "in")        R: in x in, block-diagonal, R = (I + Q) (I - Q)^-1 with Q = -Q^T for each block
    W' = R W      (side "out")       R: out x out

The paper writes W as in x out and rotates what we call columns: side "in", also in the official code and in peft.
LyCORIS ("diag-oft") rotates rows. Convolutions are matrices out x (in/g kh kw), as in peft's merged weights.
`rescale` is the paper's magnitude: W' times one trained factor for each row. The bias stays as it is.
Only the entries of Q above the diagonal are parameters, b(b-1)/2 for each block, as in peft; the official code and
LyCORIS hold b x b matrices X and take Q from X - X^T. Signs: peft's exact R is ours at -Q, its approximate R ours at Q;
LyCORIS's weight is ours at -(X - X^T). At Q = 0 the weight is exactly W.
`scale` between 0 and 1 interpolates W and W' (as LyCORIS does), which is no rotation.
COFT (a bound on Q) and one R for all blocks are not here.
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
class OFT(Method):
    """Orthogonal finetuning, arXiv 2306.07280.

    Args:
        block_size: b, the size of a block; where it does not divide the side, the largest divisor below it.
        side: "in" rotates the columns of W (peft), "out" its rows (LyCORIS).
        rescale: train a factor for each row as well.
        neumann: terms of a series in place of the exact inverse, 0 for the exact one; peft's default is 5.
    """

    sites: tuple[str, ...] = ("attn.q", "attn.v")
    block_size: int = 32
    side: Side = "in"
    rescale: bool = False
    neumann: int = 0

    survey: ClassVar[str] = "reparameterised: LoRA derivatives"
    paper: ClassVar[str] = "arXiv 2306.07280"
    mergeable: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("conv",),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("in", "out"):
            raise InputError(f'OFT: side must be "in" or "out", not {self.side!r}')
        if self.block_size < 2:
            raise InputError(f"OFT: block_size must be at least 2, not {self.block_size}")
        if self.neumann and self.neumann < 2:
            raise InputError(f"OFT: neumann must be 0 or at least 2 terms, not {self.neumann}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return is_matrix(site)

    def build(self, sites: Sequence[Site]) -> Built:
        options = (self.side, self.block_size, 1, self.neumann, self.rescale)
        return Built(tuple(rotation("OFT", site, *options) for site in sites))
