"""Methods of vismodal for the layers that files of other tools hold: the inverse of `own.py`.

alpha is one number for a method here: what layers differ by goes into B. LoHa, LoKr and OFT make a method a size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.formats.layers import Layer, Layers, algorithm, alpha, method_of, plain, rank, with_alpha
from vismodal.formats.own import module_of
from vismodal.methods import OFT, DoRA, LoHa, LoKr, LoRA, Method, Tune
from vismodal.methods.lokr import factorise
from vismodal.site import Site


def methods_for(layers: Layers, sites: Sequence[Site]) -> list[tuple[Method, dict[str, dict[str, Tensor]]]]:
    """Methods with the tensors of their modules, by the keys of their sites.

    Args:
        layers: by module.
        sites: those of the base models, whose weights `full` and `norm` need, by paths below `unet`, `text_encoder`.

    Raises `InputError` naming a layer that the base does not have, in that size, or that no method here can be.
    """
    by_module = {module_of(s.path): s for s in reversed(sites) if s.slot == "weight" and (s.range is None or s.whole)}
    groups: dict[tuple[Any, ...], dict[str, tuple[Site, dict[str, Tensor]]]] = {}
    for module, layer in layers.items():
        if module not in by_module:
            raise InputError(f"the base model has no {module} that can be adapted; give the one that the file is for")
        site = by_module[module]
        group, ready = _READ[algorithm(module, layer)](module, plain(layer), site)
        groups.setdefault(group, {})[module] = (site, ready)
    found = []
    for (make, *options), members in groups.items():
        chosen = [site for site, _ in members.values()]
        where, kinds = _where(chosen, sites), tuple(dict.fromkeys(s.kind for s in chosen))
        method, tensors = make(members, {"sites": kinds, "where": where}, *options)
        found.append((method, tensors))
    return found


def _where(chosen: Sequence[Site], sites: Sequence[Site]) -> str | tuple[str, ...]:
    """A glob for exactly the chosen sites, or all their paths."""
    kinds, mine = {s.kind for s in chosen}, {s.path for s in chosen}
    for glob in ("*", *(f"{c}.*" for c in sorted({p.partition(".")[0] for p in mine}))):
        if mine == {s.path for s in sites if s.kind in kinds and (glob == "*" or s.path.startswith(glob[:-1]))}:
            return glob
    return tuple(sorted(mine))


Members = Mapping[str, tuple[Site, dict[str, Tensor]]]
Made = tuple[Method, dict[str, dict[str, Tensor]]]


def _fit(module: str, given: Sequence[int], have: Sequence[int]) -> None:
    if tuple(given) != tuple(have):
        shapes = ["x".join(map(str, s)) for s in (have, given)]
        raise InputError(
            f"{module} is {shapes[0]} in the base model and {shapes[1]} in the file; give the one it is for"
        )


def _undecorated(module: str, layer: Layer) -> None:
    if "dora_scale" in layer:
        raise InputError(
            f"{module} is {method_of(module, layer)}, which is no method of vismodal; convert it --to kohya"
        )


def _read_lora(module: str, layer: Layer, site: Site) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    A, B = layer["lora_down.weight"], layer["lora_up.weight"]
    _fit(module, (len(B), *A.shape[1:]), site.tensor.shape)
    if "dora_scale" not in layer:
        return (_make_lora, LoRA), dict(layer)
    if len(layer["dora_scale"]) != len(B):
        raise InputError(
            f"{module} has DoRA's magnitudes for columns, and here they are for rows; convert it --to kohya"
        )
    return (_make_lora, DoRA), dict(layer)


def _make_lora(members: Members, place: dict[str, Any], method: Callable[..., Method]) -> Made:
    """One alpha and, for sites with another rank than most, `ranks`."""
    common = Counter(alpha(layer) for _, layer in members.values()).most_common(1)[0][0]
    r = Counter(rank(layer) for _, layer in members.values()).most_common(1)[0][0]
    ranks = {site.key: rank(layer) for site, layer in members.values() if rank(layer) != r}
    tensors: dict[str, dict[str, Tensor]] = {}
    for site, layer in members.values():
        even = with_alpha(layer, common)
        tensors[site.key] = {"A": even["lora_down.weight"], "B": even["lora_up.weight"].flatten(1)}
        if "dora_scale" in layer:
            tensors[site.key]["m"] = layer["dora_scale"].flatten()
    options = {"alpha": common} if common != r or ranks else {}
    return method(rank=r, ranks=ranks, **options, **place), tensors


def _read_loha(module: str, layer: Layer, site: Site) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    _undecorated(module, layer)
    columns = layer["hada_w1_b"].shape[1]
    _fit(module, (len(layer["hada_w1_a"]), columns), site.tensor.flatten(1).shape)
    return (_make_loha, rank(layer)), dict(layer)


def _make_loha(members: Members, place: dict[str, Any], r: int) -> Made:
    tensors = {}
    for site, layer in members.values():
        even = with_alpha(layer, r)
        tensors[site.key] = {f"w{i}{x}": even[f"hada_w{i}_{x}"] for i in (1, 2) for x in "ab"}
    return LoHa(rank=r, **place), tensors


def _read_lokr(module: str, layer: Layer, site: Site) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """Options of a `LoKr` whose module has these factors; those that it holds whole are multiplied out."""
    _undecorated(module, layer)
    r, kernel = rank(layer) or 1, site.tensor.shape[2:]
    even = dict(layer) if "lokr_w1" in layer and "lokr_w2" in layer else with_alpha(layer, r)
    w1 = even.get("lokr_w1", None)
    w1 = even["lokr_w1_a"].float() @ even["lokr_w1_b"].float() if w1 is None else w1
    w2 = even.get("lokr_w2", None)
    b, d = (
        (len(w2), w2.shape[1])
        if w2 is not None
        else (len(even["lokr_w2_a"]), even["lokr_w2_b"][0].numel() // kernel.numel())
    )
    (a, c), rows, columns = w1.shape, *site.tensor.shape[:2]
    _fit(module, (a * b, c * d, *kernel), site.tensor.shape)
    choices = (None, a, b, c, d)
    factor = next((f for f in choices if (factorise(rows, f), factorise(columns, f)) == ((a, b), (c, d))), -1)
    if factor == -1:
        raise InputError(f"{module} is {a}x{c} (x) {b}x{d}, which no factor of LoKr here gives; convert it --to kohya")
    ready = {"w1": w1}
    low = w2 is None and r < max(b, d) / 2
    if low:
        ready |= {"w2a": even["lokr_w2_a"], "w2b": even["lokr_w2_b"].reshape(r, d, *kernel)}
    elif w2 is None:
        ready["w2"] = (even["lokr_w2_a"].float() @ even["lokr_w2_b"].float()).view(b, d, *kernel)
    else:
        ready["w2"] = w2.reshape(b, d, *kernel)
    return (_make_lokr, r if low else 1, factor, not low), ready


def _make_lokr(members: Members, place: dict[str, Any], r: int, factor: int | None, full: bool) -> Made:
    return LoKr(rank=r, factor=factor, full=full, **place), {site.key: layer for site, layer in members.values()}


def _read_oft(module: str, layer: Layer, site: Site) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    X = layer["oft_blocks"].float()
    n, b, _ = X.shape
    _fit(module, (n * b, *site.tensor.shape[1:]), site.tensor.shape)
    Q = X.mT - X  # our sign
    bound = float(layer["alpha"]) * n * b if "alpha" in layer else 0.0
    norm = torch.linalg.vector_norm(Q) + 1e-8
    Q = Q * bound / norm if 0 < bound < norm else Q
    i, j = torch.triu_indices(b, b, 1)
    ready = {"Q": Q[:, i, j][None]}
    if "rescale" in layer:
        ready["g"] = layer["rescale"].flatten()
    return (_make_oft, b, "rescale" in layer), ready


def _make_oft(members: Members, place: dict[str, Any], block: int, rescale: bool) -> Made:
    tensors = {site.key: layer for site, layer in members.values()}
    return OFT(block_size=block, side="out", rescale=rescale, **place), tensors


def _read_values(module: str, layer: Layer, site: Site) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    W, b = site.tensor, site.bias
    weight = layer.get("diff", layer.get("w_norm"))
    bias = layer.get("diff_b", layer.get("b_norm"))
    assert weight is not None
    _fit(module, weight.shape, site.tensor.shape)
    if W.is_meta:
        raise InputError(
            f"{module} is a difference, and vismodal holds the values themselves; give the base as a folder"
        )
    if bias is not None and b is None:
        raise InputError(f"{module} has a bias in the file and none in the base model; give the one it is for")
    ready = {"value": W.detach().float() + weight.float()}
    biased = b is not None and (bias is not None or site.kind == "norm")  # a norm's kind means its bias too
    if biased and b is not None:
        ready["bias"] = b.detach().float() + (0 if bias is None else bias.float())
    return (_make_tune, biased, site.kind == "norm"), ready


def _make_tune(members: Members, place: dict[str, Any], biased: bool, norms: bool) -> Made:
    tensors = {site.key: {"value": layer["value"]} for site, layer in members.values()}
    if biased and not norms:  # the kind "bias" is that of others too
        paths = tuple(sorted(site.path for site, _ in members.values()))
        place = {"sites": (*place["sites"], "bias"), "where": paths}
    if biased:
        tensors |= {f"{site.key.partition(':')[0]}.bias": {"value": layer["bias"]} for site, layer in members.values()}
    return Tune(**place), tensors


_READ = {
    "lora": _read_lora,
    "loha": _read_loha,
    "lokr": _read_lokr,
    "oft": _read_oft,
    "full": _read_values,
    "norm": _read_values,
}
