"""What there is: the methods and the families as tables, for people and for the README."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from vismodal.errors import InputError
from vismodal.families import installed
from vismodal.methods import METHODS, Method
from vismodal.site import Span, Weight
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
    """Every method: its class in the survey arXiv 2403.14608, paper, the families that offer its default sites, whether
    it merges, and its size on timm's ViT-B/16 with the defaults."""
    head = ["method", "class in the survey", "paper", "default sites", "families", "merges", "parameters on ViT-B/16"]
    kinds = {family.NAME: kinds_of(family) for family in installed()}
    return Listing(head, [_row(m, kinds) for m in METHODS])


def _row(method: type[Method], kinds: dict[str, set[str]]) -> list[str]:
    sites = method().sites
    families = [name for name, offered in kinds.items() if all(fnmatch.filter(offered, site) for site in sites)]
    merges = "yes" if method.mergeable else "no"
    return [
        method.__name__, method.survey, method.paper, ", ".join(sites), ", ".join(families), merges, _count(method)
    ]  # fmt: skip


def _count(method: type[Method]) -> str:
    """Parameters with the defaults, on a model without storage; a dash where it needs more than a plain ViT."""
    import timm
    import torch

    from vismodal.attach import adapt

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
        try:
            return f"{adapt(model, method()).num_parameters:,}"
        except InputError:
            return "-"


def kinds_of(family: ModuleType) -> set[str]:
    """The kinds of site, of weights and of spans, that a family's table declares."""
    entries = [e for row in family.TABLE.values() for e in row if isinstance(e, Weight | Span)]
    return {e.kind for e in entries} | {"norm", "bias"}


def families() -> Listing:
    """Every family whose library is installed: its models, and the kinds of site that they offer."""
    rows = []
    for family in installed():
        rows.append([family.NAME, family.MODELS, ", ".join(sorted(kinds_of(family)))])
    return Listing(["family", "models", "kinds of site"], rows)
