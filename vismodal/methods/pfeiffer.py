"""Serial adapters after the MLP alone (Pfeiffer et al. 2020, AdapterFusion, arXiv 2005.00247).

    x <- x + y + U GELU(D y + d) + u        y = MLP(LN(x)): ... x c, D: r x c, U: c x r

In BERT, whose norms stand after the sum, the adapter reads what follows the norm; in vision transformers, whose norms
stand before, it is taken on the MLP's output as in the code of VPT (arXiv 2203.12119). That code starts both factors at
zero, where neither gets a gradient; here D is Kaiming uniform with a = sqrt(5) and U zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from vismodal.methods.base import Built, Method
from vismodal.methods.bottleneck import Serial, check_branches, on_branch
from vismodal.methods.initial import check_sizes, kaiming, zeros
from vismodal.site import Site


@dataclass(frozen=True, kw_only=True, repr=False)
class Pfeiffer(Method):
    """Serial adapters on the MLP of each block, arXiv 2005.00247.

    Args:
        rank: r, the inner dimension.
    """

    sites: tuple[str, ...] = ("mlp",)
    rank: int = 64

    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "arXiv 2005.00247"
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("Pfeiffer", self.rank)

    @classmethod
    def fits(cls, site: Site) -> bool:
        return on_branch(site)

    def build(self, sites: Sequence[Site]) -> Built:
        check_branches("Pfeiffer", sites)
        return Built(tuple(Serial(site, self.rank, F.gelu, kaiming, zeros) for site in sites))
