"""What there is: the methods and the families as tables, for people and for the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import cast

import torch
from torch import nn

from vismodal.discover import discover
from vismodal.errors import InputError
from vismodal.families import installed
from vismodal.families import table as table_of
from vismodal.methods import METHODS, Method
from vismodal.site import Site, Span, Weight
from vismodal.table import Listing


def methods() -> Listing:
    """Every method: its class in the survey arXiv 2403.14608, paper, default sites, the families that it works on (on
    some with other sites), whether it merges, whether it acts on quantised weights, and its size with the defaults on
    timm's ViT-B/16, or on a classifier over CLIP's ViT-B/16."""
    head = ["method", "class in the survey", "paper", "default sites", "families", "merges", "quantised"]
    head.append("parameters on ViT-B/16")
    offered, models = _offered(), _models()
    return Listing(head, [_row(m, offered, models) for m in METHODS])


def _row(method: type[Method], offered: Mapping[str, Sequence[Site]], models: Sequence[nn.Module]) -> list[str]:
    sites, families = method().sites, families_of(method, offered)
    flags = ["yes" if flag else "no" for flag in (method.mergeable, method.quantised)]
    text = [method.__name__, method.survey, method.paper, ", ".join(sites), ", ".join(families)]
    return [*text, *flags, _count(method, models)]


def families_of(method: type[Method], offered: Mapping[str, Sequence[Site]] | None = None) -> list[str]:
    """The names of the families that a method works on, asked of its `takes` on the sites of a small model of each. One
    whose models hold those of other libraries is named where the method needs what it adds to them."""
    offered = _offered() if offered is None else offered
    names = [family.NAME for family in installed() if method.takes(offered[family.NAME])]
    held = {family.NAME: getattr(family, "HOLDS", ()) for family in installed()}
    return [name for name in names if not any(other in names for other in held[name])]


def _offered() -> dict[str, Sequence[Site]]:
    """By family, the sites of its examples, made without storage; none where these need a library that is not there."""
    offered: dict[str, Sequence[Site]] = {}
    for family in installed():
        try:
            with torch.device("meta"):
                models = [build() for build in (family.example, *getattr(family, "MORE", ()))]
        except ImportError:
            models = []
        offered[family.NAME] = [site for model in models for site in discover(model, table_of(model))]
    return offered


def _count(method: type[Method], models: Sequence[nn.Module]) -> str:
    """Parameters with the defaults on the first of the models that takes it; a dash where none does."""
    from vismodal.attach import adapt

    for model in models:
        try:
            adapter = adapt(model, method())
        except InputError:
            continue
        count = adapter.num_parameters
        adapter.detach()
        return f"{count:,}"
    return "-"


def _models() -> list[nn.Module]:
    """timm's ViT-B/16 and a classifier over CLIP's, without storage; those whose library is there."""
    models = []
    for build in (_vit, _classifier):
        with suppress(ImportError):
            models.append(build())
    return models


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
