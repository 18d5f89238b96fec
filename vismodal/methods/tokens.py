"""What methods that join tokens, keys or values ask of a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from vismodal.errors import InputError
from vismodal.site import Site


def refuse(method: str, sites: Sequence[Site], why_not: Callable[[Site], str]) -> None:
    """Raises `InputError` for a site that cannot take tokens, with the reason and the `where` that leaves it out."""
    able = dict.fromkeys(s.path.partition(".")[0] for s in sites if not why_not(s))
    hint = f"; where='{next(iter(able))}.*' takes those that can" if able else ""
    for site in sites:
        if why := why_not(site):
            raise InputError(f"{method} cannot join tokens to {site.key} ({site.kind}): {why}{hint}")


def key_width(site: Site) -> int:
    """Channels of the keys of a span inside attention: rows of the projection, or a third of those of all three."""
    whole, attention = site.modules.get("qkv"), site.modules["enter"]
    if isinstance(attention, nn.MultiheadAttention):
        return attention.embed_dim
    if isinstance(whole, nn.Linear):
        return whole.out_features // 3
    projection = site.modules.get("k")
    return projection.out_features if isinstance(projection, nn.Linear) else site.width
