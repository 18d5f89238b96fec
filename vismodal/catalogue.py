"""What there is: the methods and the families as tables, for people and for the README."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from torch import nn

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
    it merges, and its size with the defaults on timm's ViT-B/16, or on a classifier over CLIP's ViT-B/16."""
    head = ["method", "class in the survey", "paper", "default sites", "families", "merges", "parameters on ViT-B/16"]
    kinds = {family.NAME: kinds_of(family) for family in installed()}
    return Listing(head, [_row(m, kinds) for m in METHODS])


def _row(method: type[Method], kinds: dict[str, set[str]]) -> list[str]:
    sites = method().sites
    families = _offering(kinds, sites) or _offering(_with_held(kinds), sites)
    merges = "yes" if method.mergeable else "no"
    return [
        method.__name__, method.survey, method.paper, ", ".join(sites), ", ".join(families), merges, _count(method)
    ]  # fmt: skip


def _offering(kinds: dict[str, set[str]], sites: Sequence[str]) -> list[str]:
    return [name for name, offered in kinds.items() if all(fnmatch.filter(offered, site) for site in sites)]


def _with_held(kinds: dict[str, set[str]]) -> dict[str, set[str]]:
    """The kinds of families whose models hold those of other libraries, along with theirs."""
    holds = {family.NAME: family.HOLDS for family in installed() if hasattr(family, "HOLDS")}
    return {name: kinds[name].union(*(kinds.get(other, ()) for other in held)) for name, held in holds.items()}


def _count(method: type[Method]) -> str:
    """Parameters with the defaults, on a model without storage; a dash where it takes neither a ViT nor a CLIP."""
    from vismodal.attach import adapt

    for build in (_vit, _classifier):
        try:
            return f"{adapt(build(), method()).num_parameters:,}"
        except (InputError, ImportError):
            continue
    return "-"


def _vit() -> nn.Module:
    import timm

    with torch.device("meta"):
        return cast(nn.Module, timm.create_model("vit_base_patch16_224"))


def _classifier() -> nn.Module:
    import open_clip

    from vismodal.clip import CLIPClassifier

    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
    return CLIPClassifier(model, open_clip.tokenizer.SimpleTokenizer(), ["cat", "dog"])


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
