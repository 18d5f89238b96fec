"""A LoRA from a model that was tuned in full: what it changed, as an adapter on its base.

    made = extract(base, tuned, Keep(rank=16))                    # two models, or {"unet": ..., "text_encoder": ...}
    print(made.report, *made.notes, sep="\\n")
    write_saved(made.saved, "tuned.safetensors")

Of each matrix D = W_tuned - W_base, and B A is its best approximation of the rank that is kept (Eckart and Young 1936).
Norms, biases and heads have no such product: they become trained copies (`Tune`), exactly. What no site covers (class
tokens, position embeddings, running statistics) is left out, and named with what it was worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from vismodal.attach import Models as ModelOrModels
from vismodal.discover import discover
from vismodal.errors import InputError
from vismodal.families import table as family_table
from vismodal.fingerprint import BANK
from vismodal.methods import LoRA, Tune
from vismodal.pruning import Cut, Keep, relative, report
from vismodal.site import Site, Table
from vismodal.tools.combine import Update, Value
from vismodal.tools.live import express
from vismodal.tools.merge import Made, shorten
from vismodal.tools.saved import saved_of


def extract(
    base: ModelOrModels,
    tuned: ModelOrModels,
    keep: Keep,
    kinds: Sequence[str] = ("*",),
    copies: bool = True,
    sites: Table | None = None,
) -> Made:
    """The adapter that takes the base to the tuned model, as near as its ranks allow.

    Args:
        base: a model, or several by the prefixes that the file is to have. It is as it was afterwards.
        tuned: the same architecture, or the same several.
        keep: how many ranks, by number, energy or error.
        kinds: of the matrices to take, by glob; what others changed is left out, and named.
        copies: take norms, biases and heads along as trained copies; else they are left out, and named.
        sites: as for `vm.adapt`.

    Raises `InputError` where the two differ in names or shapes, and where they do not differ at all.
    """
    pairs = _pairs(base, tuned)
    if keep.everything:
        raise InputError("say how many ranks to keep: rank=16, energy=0.95 or error=0.1")
    wanted: dict[str, Update | Value] = {}
    cuts: list[Cut] = []
    for site, W, V in _differing(pairs, sites):
        if _is_low(site) and any(fnmatchcase(site.kind, kind) for kind in kinds):
            wanted[site.key], cut = shorten(V - W, keep, site.key)
            cuts += [cut] if cut else []
        elif copies and not _is_low(site):
            wanted[site.key] = Value(V, W)
    keep.check([key for key, change in wanted.items() if isinstance(change, Update)])
    before = _differences(pairs)
    if not wanted:
        raise InputError(_nothing(before, kinds))
    adapter = express({prefix: model for prefix, (model, _) in pairs.items()}, wanted, sites=sites)
    try:
        adapter.merge()
        left = _left(before, _differences(pairs))
        adapter.unmerge()
        return Made(saved_of(adapter), report(cuts), tuple(_notes(wanted, left, before)))
    finally:
        adapter.detach()


def _pairs(base: ModelOrModels, tuned: ModelOrModels) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The models by prefix, after a look at their names and shapes."""
    mine, theirs = (dict(m) if isinstance(m, Mapping) else {"": m} for m in (base, tuned))
    if mine.keys() != theirs.keys():
        raise InputError(f"the base has {_names(mine)}, the tuned model {_names(theirs)}; give the same parts of both")
    for prefix, model in mine.items():
        if model is theirs[prefix]:
            raise InputError("base and tuned are the same object; load the base anew")
        a, b = ({n: tuple(t.shape) for n, t in _tensors(m)} for m in (model, theirs[prefix]))
        wrong = [f"{n} is {a.get(n, 'not')} in the base and {b.get(n, 'not')} in the tuned one" for n in {**a, **b}
                 if a.get(n) != b.get(n)]  # fmt: skip
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise InputError(
                f"base and tuned model{f' ({prefix})' if prefix else ''} differ: {'; '.join(wrong[:3])}{more}. "
                "Give two of one architecture; for a head of other classes make the base's anew first"
            )
    return {prefix: (model, theirs[prefix]) for prefix, model in mine.items()}


def _names(models: Mapping[str, nn.Module]) -> str:
    return ", ".join(models) if any(models) else "one model"


def _is_low(site: Site) -> bool:
    return site.slot == "weight" and site.kind != "head" and LoRA.fits(site)


def _differing(
    pairs: Mapping[str, tuple[nn.Module, nn.Module]], sites: Table | None
) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """The sites whose values differ, in fp64, without those that cover others."""
    for prefix, models in pairs.items():
        mine, theirs = (_sites(model, prefix, sites) for model in models)
        for key, site in mine.items():
            W, V = (s.tensor.detach().cpu().double() for s in (site, theirs[key]))
            if not torch.equal(W, V):
                yield site, W, V


def _sites(model: nn.Module, prefix: str, sites: Table | None) -> dict[str, Site]:
    found: dict[str, Site] = {}
    for site in discover(model, family_table(model, sites), prefix):
        if site.span is None and not site.whole and not site.blocked and Tune.fits(site):
            found.setdefault(site.key, site)
    return found


# -- what is left out ----------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for name, p in model.named_parameters() if not name.startswith(f"{BANK}."))
    yield from ((name, b) for name, b in model.named_buffers() if b.is_floating_point() and BANK not in name)


def _differences(pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> dict[str, Tensor]:
    """Tuned minus base, of parameters and buffers that differ."""
    found: dict[str, Tensor] = {}
    for prefix, (base, tuned) in pairs.items():
        theirs = dict(_tensors(tuned))
        for name, W in _tensors(base):
            if not torch.equal(W, theirs[name].to(W)):
                D = theirs[name].detach().cpu().double() - W.detach().cpu().double()
                found[f"{prefix}.{name}".strip(".")] = D
    return found


def _left(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """By tensor the share of its squared change in rows of which the adapter changes nothing."""
    left: dict[str, float] = {}
    for name, D in before.items():
        rows, now = D.reshape(len(D) if D.dim() else 1, -1), after.get(name)
        if now is not None:
            same = (rows == now.reshape(rows.shape)).all(1) & rows.any(1)
            share = float(rows[same].square().sum() / rows.square().sum())
            left |= {name: share} if share else {}
    return left


def _notes(
    wanted: Mapping[str, Update | Value], left: Mapping[str, float], before: Mapping[str, Tensor]
) -> Iterator[str]:
    if copies := [key for key, change in wanted.items() if isinstance(change, Value)]:
        yield f"exact copies of {len(copies)} norms, biases and heads, such as {copies[0]}"
    if left:
        lost = sum(share * float(before[name].square().sum()) for name, share in left.items())
        whole = sum(float(D.square().sum()) for D in before.values())
        names = ", ".join(list(left)[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
        yield f"left out, {relative(lost, whole):.2g} of the whole change in norm: {names}"


def _nothing(before: Mapping[str, Tensor], kinds: Sequence[str]) -> str:
    if not before:
        return "base and tuned model are equal, so there is nothing to extract"
    return f"what differs is on no site of {', '.join(kinds)}: {', '.join(list(before)[:6])}"
