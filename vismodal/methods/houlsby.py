"""Serial adapters after attention and MLP (Houlsby et al. 2019, arXiv 1902.00751, section 2.1).

    y <- y + U GELU(D y + d) + u        y: ... x c, the output of a branch; D: r x c, U: c x r

It acts on the branch's output before that is added to the stream (after layer scale and drop-path, as the official one
after dropout). D and U are normal with standard deviation 0.001, cut at two of them, d and u zero: the output at the
start differs from the base's by about 1e-4 (measured on ViT-B/16 with r = 64). The paper reports 0.01 (section 3.6),
the official code has 0.001, which is followed; its GELU is the tanh approximation, here it is exact. The paper trains
the layer norms too: `[Houlsby(), Tune(sites=("norm",))]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method
from vismodal.methods.bottleneck import Serial, check_branches, on_branch
from vismodal.methods.initial import check_sizes, truncated
from vismodal.site import Site


@dataclass(frozen=True, kw_only=True, repr=False)
class Houlsby(Method):
    """Serial adapters on both branches of a block, arXiv 1902.00751.

    Args:
        rank: r, the inner dimension.
        std: standard deviation of the initial values; not zero, or nothing would ever be learnt.
    """

    sites: tuple[str, ...] = ("attn", "mlp")
    rank: int = 64
    std: float = 1e-3

    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "arXiv 1902.00751"
    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("Houlsby", self.rank)
        if not self.std > 0:
            raise InputError(
                f"Houlsby: std must be above 0, not {self.std}: with both factors zero neither has gradients"
            )

    @classmethod
    def fits(cls, site: Site) -> bool:
        return on_branch(site)

    def build(self, sites: Sequence[Site]) -> Built:
        check_branches("Houlsby", sites)
        init = truncated(self.std)
        return Built(tuple(Serial(site, self.rank, F.gelu, init, init) for site in sites))
