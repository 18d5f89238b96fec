"""Picking sites: those that a method asks for, by kind, by the paths of modules and by layers.

A kind that a method names and the model lacks is an error here, never a silent no-op later.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from vismodal.errors import InputError
from vismodal.site import Site


def select(
    sites: Sequence[Site],
    kinds: Sequence[str],
    where: str | Sequence[str] = "*",
    layers: slice | None = None,
    fits: Callable[[Site], bool] = lambda site: True,
) -> list[Site]:
    """The sites of the given kinds whose module path matches a glob of `where`, in `layers`.

    A kind may be a glob, which takes what `fits`. Raises `InputError` for a kind, glob or slice that matches nothing or
    leaves nothing of a kind, and for two sites that overlap.
    """
    globs = [where] if isinstance(where, str) else list(where)
    by_kind = {kind: _of_kind(kind, sites, fits) for kind in kinds}
    every = [s for found in by_kind.values() for s in found]
    for glob in globs:
        if not any(fnmatchcase(s.path, glob) for s in every):
            paths = ", ".join(dict.fromkeys(s.path for s in every[:4]))
            raise InputError(f"where={glob!r} matches none of the modules with {', '.join(kinds)}, such as {paths}")
    chosen: dict[tuple[str, str], Site] = {}
    for kind, found in by_kind.items():
        kept = [s for s in found if any(fnmatchcase(s.path, g) for g in globs) and _in_layers(s, layers)]
        if not kept:
            blocks = {s.tower or "model": s.depth for s in every}
            raise InputError(
                f"where={where!r} and layers={layers} leave nothing of {kind!r} ({found[0].key} is in "
                f"{'block ' + str(found[0].index) if found[0].index is not None else 'no block'}; blocks: {blocks}); "
                "give it a method of its own"
            )
        chosen.update({(s.target, s.key): s for s in kept})  # norm.bias is a norm and a bias: one site
    picked = [s for s in sites if s is chosen.get((s.target, s.key))]
    _check(picked)
    return picked


def check_left(taken: Sequence[tuple[str, Site, bool]]) -> None:
    """Raises `InputError` where a method replaces all that one before it in the list changes: nothing is left of that.

    `taken` has each method's slot and site, and whether it replaces the site's tensor.
    """
    last: dict[tuple[str, str], list[tuple[str, Site]]] = {}
    for slot, site, replaces in reversed(taken):
        behind = last.setdefault((site.target, site.slot), [])
        if other := next((other for other, outer in behind if _covers(outer, site)), None):
            first = "" if replaces else f", or put {other} first in the list"
            raise InputError(
                f"{other} replaces all of {site.key}, so that nothing is left of {slot}'s change to it; keep one of "
                f"them away from it by where= or sites={first}"
            )
        if replaces:
            behind.append((slot, site))


def _of_kind(kind: str, sites: Sequence[Site], fits: Callable[[Site], bool]) -> list[Site]:
    exact = [s for s in sites if s.kind == kind]
    # norms and heads name their bias too, which a method on weights has no module of its own for
    weights = {s.target for s in exact if s.slot == "weight" and not s.blocked and fits(s)}
    exact = [s for s in exact if s.slot != "bias" or s.target not in weights or fits(s)]
    matches = exact or [s for s in sites if not s.whole and fnmatchcase(s.kind, kind) and (s.blocked or fits(s))]
    if not matches:
        raise InputError(_no_kind(kind, sites, fits))
    return matches


def _in_layers(site: Site, layers: slice | None) -> bool:
    return layers is None or (site.index is not None and site.index in range(site.depth)[layers])


def _no_kind(kind: str, sites: Sequence[Site], fits: Callable[[Site], bool]) -> str:
    if kind == "head":
        return (
            "no head is known in this model; make one, e.g. with timm's model.reset_classifier(num_classes), or say "
            "where it is with sites={Model: (vm.Weight('head', 'fc.weight'),)}"
        )
    offered = sorted({s.kind for s in sites})
    fitting = [s for s in sites if not s.blocked and fits(s)]
    named = sorted({s.kind for s in fitting if s.kind != "bias" and kind in s.path.split(".")})
    close = difflib.get_close_matches(kind, sorted({s.kind for s in fitting}), 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if named:  # kinds are the same for all models, names of modules are not
        hint = f"; modules named {kind!r} are its {', '.join(named)}"
    return f"no site of kind {kind!r} in this model, which offers {', '.join(offered) or 'none'}{hint}"


def _check(sites: Sequence[Site]) -> None:
    taken: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        if site.blocked:
            raise InputError(site.blocked)
        for other in taken.setdefault((site.target, site.slot), []):
            if site.span is None and _overlap(site, other):
                raise InputError(f"{site.key} ({site.kind}) and {other.key} ({other.kind}) overlap; name one of them")
        taken[(site.target, site.slot)].append(site)


def _overlap(a: Site, b: Site) -> bool:
    if a.range is None or b.range is None or a.axis != b.axis:
        return True
    return a.range[0] < b.range[1] and b.range[0] < a.range[1]


def _covers(outer: Site, inner: Site) -> bool:
    if outer.range is None or inner.range is None or outer.axis != inner.axis:
        return outer.range is None
    return outer.range[0] <= inner.range[0] and inner.range[1] <= outer.range[1]
