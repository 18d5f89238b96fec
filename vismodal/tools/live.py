"""What an adapter does to each weight of its base model, whatever its method; and a LoRA that does a given thing.

    found = changes_on(models, read_saved("oft.safetensors"))      W' - W of each site, b' of each bias
    adapter = express(models, found, "name")                       LoRA on matrices, Tune on the rest

`models` are the base's parts by the prefixes of the file, {"": model} where there is one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vismodal.adapter import Adapter
from vismodal.attach import adapt
from vismodal.bank import bank_of
from vismodal.checkpoint import restore
from vismodal.discover import discover
from vismodal.errors import InputError
from vismodal.families import table as family_table
from vismodal.methods import LoRA, Method, Tune
from vismodal.methods.lowrank import Own, Product
from vismodal.methods.tune import Copy
from vismodal.ports import WeightPort
from vismodal.quantised import is_quantised
from vismodal.selection import select
from vismodal.site import Site, Table
from vismodal.tools.combine import Change, Update, Value, concatenate, dense
from vismodal.tools.saved import Saved, check_is_weights, update_of
from vismodal.weights import Entry, Group, compute, region, rows

NAME = "vismodal-tools"  # of the adapter that stands on a model while a tool looks at it
Models = Mapping[str, nn.Module]


def changes_on(models: Models, saved: Saved, sites: Table | None = None) -> dict[str, Change]:
    """By the key of the site. The models are as they were afterwards.

    Raises `InputError` for a method that is no update of weights, and where the adapter does not fit the models.
    """
    for method in saved.methods.values():
        check_is_weights(saved, method)
    adapter = restore(models, saved.header, saved.tensors, saved.name, NAME, sites=sites)
    try:
        return changes_of(adapter, sites)
    finally:
        adapter.detach()


@torch.no_grad()
def changes_of(adapter: Adapter, sites: Table | None = None) -> dict[str, Change]:
    """Of an adapter on its models, alone and at scale 1. Raises `InputError` where anything is merged into them."""
    found: dict[str, Change] = {}
    for prefix, model in adapter.models.items():
        bank = bank_of(model)
        if merged := [name for name, part in bank.attached.items() if part.merged]:
            raise InputError(
                f"{', '.join(merged)} is merged into the weights that are to be compared; unmerge it first"
            )
        biases = _biases(discover(model, family_table(model, sites), prefix))
        for target, port in bank.ports.items():
            entries = [e for e in port.entries if e.adapter == adapter.name]
            if not entries:
                continue
            if not isinstance(port, WeightPort):
                raise InputError(
                    f"{entries[0].key} of {adapter.name!r} acts in the forward pass, and is no update of weights"
                )
            found |= _at(port, entries, biases.get(target, []))
    return found


def _biases(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """The sites of biases by their target, each bias once."""
    found: dict[str, dict[str, Site]] = {}
    for site in sites:
        if site.span is None and not site.blocked and site.slot == "bias":
            found.setdefault(site.target, {}).setdefault(site.key, site)
    return {target: list(by_key.values()) for target, by_key in found.items()}


def _at(port: WeightPort, entries: Sequence[Entry], biases: Sequence[Site]) -> dict[str, Change]:
    """What the entries on one parameter do to it and to its bias, one after the other."""
    W, b = (port.places[0].get(slot) for slot in ("weight", "bias"))
    if any(t is not None and is_quantised(t) for t in (W, b)):
        raise InputError(
            f"{entries[0].key}: the base is quantised, and its weights cannot be compared; load it in fp32"
        )
    W0, b0 = (None if t is None else t.detach().double() for t in (W, b))
    W1, b1 = W0, b0
    by_site: dict[str, list[Change]] = {}
    for entry in entries:
        site = entry.key.partition("/")[2]
        before, (axis, range_) = W1, region(entry, "weight")
        W1, b1 = compute(W1, b1, [Group((entry,), 1.0)])
        if entry.slot == "weight":
            here = [rows(t, axis, range_).cpu() for t in (W0, before, W1)]
            by_site.setdefault(site, []).append(_change(entry.module, *here))
    found = {site: _sum(each) for site, each in by_site.items()}
    for bias in biases if b1 is not b0 else ():
        V, old = (rows(t, 0, bias.range).cpu() for t in (b1, b0))
        if not torch.equal(V, old):
            found[bias.key] = Value(V, old)
    return found


def _change(module: nn.Module, W: Tensor, before: Tensor, after: Tensor) -> Change:
    """Of one module; what is no matrix, or is a trained copy, stays a value."""
    if type(module).forward is Product.forward:
        return update_of(module)  # type: ignore[arg-type]
    difference = after - before
    return Value(W + difference, W) if W.dim() < 2 or isinstance(module, Copy) else difference


def _sum(changes: Sequence[Change]) -> Change:
    """Of what several modules did to one site, in turn."""
    if len(changes) == 1:
        return changes[0]
    if all(isinstance(c, Update) for c in changes):
        return concatenate([c for c in changes if isinstance(c, Update)], [1.0] * len(changes))
    difference = torch.stack([dense(c) for c in changes]).sum(0)
    W = next((c.W for c in changes if isinstance(c, Value)), None)
    return difference if W is None else Value(W + difference, W)


# -- the other way -------------------------------------------------------------------------------------------------


def express(
    models: Models, wanted: Mapping[str, Update | Value], name: str = NAME, sites: Table | None = None
) -> Adapter:
    """A frozen adapter on the models that does just that, by site: LoRA where it is a product, Tune where a value."""
    found = [s for p, m in models.items() for s in discover(m, family_table(m, sites), p) if s.span is None]
    there = {s.key for s in found}
    if missing := wanted.keys() - there:
        raise InputError(f"the model has no site {min(missing)}, which the adapter changes; is it the same model?")
    ranks = {key: len(change.A) for key, change in wanted.items() if isinstance(change, Update)}
    methods: list[Method] = [LoRA(**o, rank=max(ranks.values())) for o in _selections(LoRA, found, ranks.keys())]
    methods += [Tune(**o) for o in _selections(Tune, found, wanted.keys() - ranks.keys())]
    if not methods:
        raise InputError("nothing is changed, so there is nothing to keep in an adapter")
    adapter = adapt(models, methods, name, sites=sites, seed=0)
    try:
        adapter.load_state_dict(_state(adapter, wanted))
    except BaseException:
        adapter.detach()
        raise
    adapter.trainable = False
    return adapter


def _state(adapter: Adapter, wanted: Mapping[str, Update | Value]) -> dict[str, Tensor]:
    state = adapter.state_dict()
    for key, module in adapter.modules.items():
        change = wanted.get(key.partition("/")[2])
        if isinstance(module, Own):  # where nothing is wanted B is zero, and one rank enough
            A, B = change if isinstance(change, Update) else (module.A[:1], module.B[:, :1])  # type: ignore[index]
            state |= {f"{key}.A": A, f"{key}.B": B}
        elif isinstance(change, Value):
            state[f"{key}.value"] = change.V
    return state


def _selections(method: type[Method], sites: Sequence[Site], keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """The options that make a method choose the sites of these keys: by kind where all of a kind are wanted, the rest
    by kind and module.

    A site that covers others (`attn.qkv`) is chosen apart from them: one method takes no two that overlap.
    """
    for whole in (False, True):
        here = [s for s in sites if s.whole == whole and s.key in keys]
        by_kind = {kind: _keys(method, sites, kind) for kind in dict.fromkeys(s.kind for s in here)}
        kinds = tuple(kind for kind, found in by_kind.items() if found and found <= set(keys))
        if kinds:
            yield {"sites": kinds}
        rest = [s for s in here if not any(s.key in by_kind[kind] for kind in kinds)]
        groups: dict[tuple[str, ...], dict[str, None]] = {}
        for path in dict.fromkeys(s.path for s in rest):
            mine = {s.key: s.kind for s in rest if s.path == path}  # of a norm's bias "bias", which is found later
            groups.setdefault(tuple(dict.fromkeys(mine.values())), {})[path] = None
        yield from ({"sites": kinds, "where": tuple(paths)} for kinds, paths in groups.items())


def _keys(method: type[Method], sites: Sequence[Site], kind: str) -> set[str]:
    """Of the sites that the method takes by a kind; none where it cannot take them all."""
    try:
        return {site.key for site in select(sites, (kind,), fits=method.fits)}
    except InputError:
        return set()
