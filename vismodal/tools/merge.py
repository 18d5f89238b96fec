"""Several adapters as one LoRA.

    a, b = read_saved("dog.safetensors"), read_saved("style.safetensors")
    made = merge([a, b], [0.7, 0.3], Recipe("ties"), Keep(rank=16))
    print(made.report)                                     # ranks and what truncation loses, by site
    write_saved(made.saved, "both.safetensors")

Methods whose files hold their products (LoRA, PiSSA, AdaLoRA, DyLoRA) need no base model. With `models`, the base by
the prefixes of the files, every method that is an update of weights can be merged: DoRA, OFT, LoHa, IA3, tuned copies.
A site that an adapter lacks is one that it does not change. Trained copies (norms, biases, heads) stay copies.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from vismodal.attach import slots
from vismodal.checkpoint import header_of
from vismodal.errors import InputError
from vismodal.fingerprint import Fingerprint
from vismodal.methods import LoRA, Method, Tune
from vismodal.pruning import Cut, Keep, Pruned, report
from vismodal.site import Table
from vismodal.tools.combine import Change, Recipe, Update, Value, combine, spectrum_of
from vismodal.tools.live import Models, changes_on, express
from vismodal.tools.saved import Saved, changes, saved_of


class Made(NamedTuple):
    """An adapter, what truncation lost of each site (as `Adapter.prune` tells it), and notes for the reader."""

    saved: Saved
    report: Pruned
    notes: tuple[str, ...] = ()


def merge(
    adapters: Sequence[Saved],
    weights: Sequence[float] | None = None,
    recipe: Recipe | None = None,
    keep: Keep | None = None,
    models: Models | None = None,
    sites: Table | None = None,
) -> Made:
    """One adapter that does what `recipe` makes of several.

    Args:
        adapters: made on the same base.
        weights: a factor for each, 1 unless given.
        recipe: how to combine; the weighted sum unless given.
        keep: how many ranks stay. A sum of products is kept exactly without it; what has no products to add up (TIES,
            DARE, other methods) gets the largest rank that an adapter has there.
        models: the base by prefix, {"": model} where there is one.
        sites: as for `vm.adapt`.

    Raises `InputError` for adapters of different bases or shapes, for methods that are no updates of weights, and where
    the files alone do not tell what is needed.
    """
    weights, recipe, keep = (
        weights if weights is not None else [1.0] * len(adapters),
        recipe or Recipe(),
        keep or Keep(),
    )
    _check(adapters, weights, recipe, keep)
    found = [changes_on(_parts(models, a), a, sites) if models is not None else changes(a) for a in adapters]
    keys = list(dict.fromkeys(key for each in found for key in each))
    keep.check(keys)
    merged: dict[str, Update | Value] = {}
    cuts: list[Cut] = []
    for key in keys:
        there = [(each[key], w) for each, w in zip(found, weights, strict=True) if key in each]
        whole = combine([c for c, _ in there], [w for _, w in there], recipe, key)
        merged[key], cut = shorten(whole, _default(keep, recipe, [c for c, _ in there], key), key)
        cuts += [cut] if cut else []
    if models is None:
        saved = _file(adapters, merged)
    else:
        saved = _expressed({p: models[p] for a in adapters for p in a.bases}, merged, sites, common(adapters))
    return Made(saved, report(cuts), _notes(adapters, found, keys))


def shorten(change: Change, keep: Keep, key: str) -> tuple[Update | Value, Cut | None]:
    """A change as a product of the ranks that stay, and what that loses; a value as it is."""
    if isinstance(change, Value):
        return change, None
    if isinstance(change, Update) and keep.everything:
        return change, Cut(key, "LoRA", len(change.A), len(change.A), 0.0, change.norm() ** 2)
    spectrum = spectrum_of(change)
    rank = keep.of(key, spectrum.S)
    shape = change.A.shape[1:] if isinstance(change, Update) else change.shape[1:]
    A, B = spectrum.first(rank).factors(1.0)
    return Update(A.float().view(-1, *shape), B.float()), Cut.of(key, "LoRA", spectrum.S, rank)


def _default(keep: Keep, recipe: Recipe, changes: Sequence[Change], key: str) -> Keep:
    """What to keep where it was not said."""
    if not keep.everything or any(isinstance(c, Value) for c in changes):
        return keep
    ranks = [len(c.A) for c in changes if isinstance(c, Update)]
    if recipe.method in ("linear", "concatenated") and len(ranks) == len(changes):
        return keep
    if not ranks:
        raise InputError(f"{key}: the changes are no products, so say how many ranks to keep: rank, energy or error")
    return Keep(rank=max(ranks))


# -- what fits together --------------------------------------------------------------------------------------------


def _check(adapters: Sequence[Saved], weights: Sequence[float], recipe: Recipe, keep: Keep) -> None:
    if not adapters:
        raise InputError("no adapters to merge; name their files")
    if len(weights) != len(adapters):
        raise InputError(f"{len(adapters)} adapters and {len(weights)} weights; give a weight for each of them")
    if not all(torch.tensor(weights, dtype=torch.float64).isfinite()):
        raise InputError(f"weights are finite numbers, not {', '.join(map(str, weights))}")
    if recipe.method == "concatenated" and not keep.everything:
        raise InputError("concatenated keeps all ranks; write svd, or linear, for a lower rank")
    first = adapters[0]
    for other in adapters[1:]:
        check_bases(first, other)


def check_bases(a: Saved, b: Saved) -> None:
    """Raises `InputError` where two adapters cannot be of one base; warns where its values differ."""
    if a.bases.keys() != b.bases.keys() and "" in (a.bases.keys() | b.bases.keys()):
        raise InputError(f"{a.name} adapts {_towers(a)}, and {b.name} {_towers(b)}; merge adapters of the same model")
    for prefix in a.bases.keys() & b.bases.keys():
        mine, theirs = a.bases[prefix], b.bases[prefix]
        if mine.shapes != theirs.shapes:
            where = f" ({prefix})" if prefix else ""
            raise InputError(
                f"{a.name} was made on {mine.name}, {b.name} on {theirs.name}{where}: parameters of other names or "
                "shapes; merge adapters of the same model"
            )
        if not mine.same_values(theirs):
            message = (
                f"{a.name} and {b.name} were made on different checkpoints of {mine.name}: same shapes, other values"
            )
            warnings.warn(message, stacklevel=4)


def _towers(saved: Saved) -> str:
    names = [f"{prefix or 'one model'} ({base.name})" for prefix, base in saved.bases.items()]
    return " and ".join(names)


def _parts(models: Models, saved: Saved) -> Models:
    if missing := saved.bases.keys() - models.keys():
        there = ", ".join(map(repr, models)) if any(models) else "one model"
        raise InputError(f"{saved.name} adapts {', '.join(map(repr, sorted(missing)))}; the base given has {there}")
    return {prefix: models[prefix] for prefix in saved.bases}


def _notes(adapters: Sequence[Saved], found: Sequence[Mapping[str, Change]], keys: Sequence[str]) -> tuple[str, ...]:
    """Which adapters lack sites that others have."""
    notes = []
    for adapter, each in zip(adapters, found, strict=True):
        if lacking := [key for key in keys if key not in each]:
            notes.append(
                f"{adapter.name} does not change {len(lacking)} of {len(keys)} sites, such as {lacking[0]}: there it "
                "adds nothing"
            )
    return tuple(notes)


def common(adapters: Sequence[Saved]) -> dict[str, str]:
    """What the headers of all say alike: the classes of a classifier, say."""
    first = adapters[0].metadata
    return {k: v for k, v in first.items() if all(a.metadata.get(k) == v for a in adapters)}


# -- the file of the result ----------------------------------------------------------------------------------------


def _expressed(
    models: Models, merged: Mapping[str, Update | Value], sites: Table | None, more: dict[str, str]
) -> Saved:
    adapter = express(models, merged, sites=sites)
    try:
        return replace(saved_of(adapter, more), name="the result")
    finally:
        adapter.detach()


def _file(adapters: Sequence[Saved], merged: Mapping[str, Update | Value]) -> Saved:
    """Without the base: LoRA and Tune on what the adapters chose, by the same kinds, modules and layers."""
    groups: dict[tuple[object, ...], list[tuple[Saved, Method]]] = {}
    place: dict[str, tuple[object, ...]] = {}
    for adapter in adapters:
        for slot, method in adapter.methods.items():
            group = (Tune if isinstance(method, Tune) else LoRA, method.where, repr(method.layers))
            groups.setdefault(group, []).append((adapter, method))
            for key in adapter.slots[slot].keys() - {"shared"}:
                if place.setdefault(key, group) != group:
                    raise InputError(
                        f"{adapter.name} chooses {key} by other modules or layers than others; {WITH_BASE}"
                    )
    _check_overlap([key for key in place if isinstance(merged[key], Update)])
    bases: dict[str, Fingerprint] = {p: base for a in adapters for p, base in a.bases.items()}
    methods = {group: _method(each, set(bases)) for group, each in groups.items()}
    for chosen, method in methods.items():
        if isinstance(method, LoRA):
            ranks = [len(u.A) for key, u in merged.items() if place[key] == chosen and isinstance(u, Update)]
            methods[chosen] = replace(method, rank=max(ranks))
    by_slot = slots(list(methods.values()))
    names = dict(zip(methods, by_slot, strict=True))
    tensors: dict[str, torch.Tensor] = {}
    for key, change in merged.items():
        stem = f"{names[place[key]]}/{key}"
        named = change._asdict() if isinstance(change, Update) else {"value": change.V}
        tensors |= {f"{stem}.{name}": t.float().contiguous() for name, t in named.items()}
    return Saved("the result", header_of(by_slot, bases, common(adapters)), tensors)


def _method(group: Sequence[tuple[Saved, Method]], prefixes: set[str]) -> Method:
    """The method that chooses what these chose together. Of several models (`prefixes`) it chooses in each of them:
    adapters that have but some must agree about the kinds."""
    first = group[0][1]
    same = len({method.sites for _, method in group}) == 1
    everywhere = all(adapter.bases.keys() == prefixes for adapter, _ in group)
    if not everywhere and not (same and {p for adapter, _ in group for p in adapter.bases} == prefixes):
        names = " and ".join(dict.fromkeys(f"{a.name} ({', '.join(a.bases)})" for a, _ in group))
        raise InputError(f"{names} choose other kinds of site on other models; {WITH_BASE}")
    kinds = tuple(dict.fromkeys(kind for _, method in group for kind in method.sites))
    return (Tune if isinstance(first, Tune) else LoRA)(sites=kinds, where=first.where, layers=first.layers)


WITH_BASE = "which of them a LoRA has to name cannot be told from the files alone: give the base model (--model)"


def _check_overlap(keys: Sequence[str]) -> None:
    """A part and its whole (`attn.qkv`) need methods of their own, which the base tells."""
    taken = Counter(key.partition(":")[0] for key in keys if ":" in key)
    for key in keys:
        if key in taken:
            raise InputError(f"{key} is adapted as a whole and in parts; {WITH_BASE}")
