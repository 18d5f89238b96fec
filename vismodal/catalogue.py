"""What there is: the methods and the families as tables, for people and for the README."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vismodal.families import installed
from vismodal.methods import METHODS, Method
from vismodal.site import Weight
from vismodal.table import markdown, table


@dataclass(frozen=True)
class Listing:
    """Rows that print as a table; `markdown()` is the same for a README."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return table(self.head, self.rows)

    def markdown(self) -> str:
        return markdown(self.head, self.rows)


def methods() -> Listing:
    """Every method: its class in the survey arXiv 2403.14608, paper, default sites, and its size on timm's ViT-B/16."""
    rows = [
        [m.__name__, m.survey, m.paper, ", ".join(m().sites), "yes" if m.mergeable else "no", f"{_count(m):,}"]
        for m in METHODS
    ]
    return Listing(
        ["method", "class in the survey", "paper", "default sites", "merges", "parameters on ViT-B/16"], rows
    )


def _count(method: type[Method]) -> int:
    """Parameters with the defaults, on a model without storage."""
    import timm
    import torch

    from vismodal.attach import adapt

    with torch.device("meta"):
        return adapt(timm.create_model("vit_base_patch16_224"), method()).num_parameters


def families() -> Listing:
    """Every family whose library is installed: its models, and the kinds of site that they offer."""
    rows = []
    for family in installed():
        weights = [e for entries in family.TABLE.values() for e in entries if isinstance(e, Weight)]
        kinds = dict.fromkeys([*(w.kind for w in weights), "norm", "bias"])
        rows.append([family.NAME, family.MODELS, ", ".join(sorted(kinds))])
    return Listing(["family", "models", "kinds of site"], rows)
