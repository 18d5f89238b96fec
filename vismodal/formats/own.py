"""The layers of a live adapter of vismodal, as the files of other tools say them.

A product of two factors is LoRA in a file, whatever method made it (PiSSA, AdaLoRA, VeRA ...). `Tune` is a difference
from the base's values. LyCORIS's OFT turns rows, so only `OFT(side="out")` has words there; its weight is ours at
Q = X^T - X.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.formats.halves import join
from vismodal.formats.kohya import text_path
from vismodal.formats.layers import DENOISERS, Layers, rank
from vismodal.formats.tokens import Tokens
from vismodal.methods import METHODS, Method
from vismodal.methods.dora import Decomposed
from vismodal.methods.loha import Hadamard
from vismodal.methods.lokr import Kronecker
from vismodal.methods.lowrank import Product
from vismodal.methods.noah import Elastic
from vismodal.methods.rotation import Rotation, skew
from vismodal.methods.textualinversion import TextualInversion, Vectors
from vismodal.methods.tune import Copy
from vismodal.site import Site

CANNOT = "the file formats of other tools"


def module_of(path: str) -> str:
    """A module's path in a model as files have it: a text encoder's with `text_model.`."""
    component, _, rest = path.partition(".")
    return path if component in DENOISERS else f"{component}.{text_path(rest)}"


# -- ours to layers ----------------------------------------------------------------------------------------------------


def layers_of(modules: Mapping[str, nn.Module], base: Mapping[str, Tensor]) -> Layers:
    """The layers of a live adapter; new words have none, see `tokens_of`.

    Args:
        modules: an adapter's `modules`, by "SLOT/COMPONENT.MODULE[:PART]".
        base: the base model's tensors by "COMPONENT.MODULE.weight", of which `Tune` needs its own.

    Raises `InputError` naming what no file can say: methods on spans, a bias alone, embeddings, two methods on a layer.
    """
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    biases: dict[str, Tensor] = {}
    slots: dict[str, str] = {}
    with torch.no_grad():
        for key, module in modules.items():
            slot, _, site = key.partition("/")
            path, _, part = site.partition(":")
            if isinstance(module, Vectors):
                continue
            if path.endswith(("token_embedding", "position_embedding")):
                raise InputError(f"{CANNOT} hold no changed embeddings; leave out {key} (embed.tokens)")
            if isinstance(module, Copy) and module.slot == "bias":
                biases[path.removesuffix(".bias")] = _difference(key, module, base.get(path))
                continue
            if slots.setdefault(path, slot) != slot:
                raise InputError(f"{CANNOT} hold one method on a layer; {path} has {slots[path]} and {slot}")
            parts.setdefault(path, {})[part] = _layer(key, module, base.get(f"{path}.weight"))
    layers = {path: join(path, found) for path, found in parts.items()}
    for path, difference in biases.items():
        if "diff" not in layers.get(path, {}) and "w_norm" not in layers.get(path, {}):
            raise InputError(f"{CANNOT} hold no bias without its weight; tune that of {path} too, or leave it out")
        layers[path]["b_norm" if "w_norm" in layers[path] else "diff_b"] = difference
    return {module_of(path): layer for path, layer in layers.items()}


def _difference(key: str, module: Copy, base: Tensor | None) -> Tensor:
    if base is None or base.is_meta:
        raise InputError(f"{key} holds new values, and a file their difference from the base's; write --base FOLDER")
    return module.value.detach() - base.to(module.value).reshape(module.value.shape)


def _layer(key: str, module: nn.Module, W: Tensor | None) -> dict[str, Tensor]:
    if isinstance(module, Product) and not isinstance(module, Elastic):
        return _product(module)
    if isinstance(module, Hadamard):
        given = {f"hada_w{i}_{x}": getattr(module, f"w{i}{x}").detach() for i in (1, 2) for x in "ab"}
        return {**given, "alpha": torch.tensor(module.scaling * len(module.w1b))}
    if isinstance(module, Kronecker):
        return _kronecker(module)
    if isinstance(module, Rotation):
        return _rotation(key, module, 2 if W is None else W.dim())
    if isinstance(module, Copy):
        part = key.partition(":")[2]
        if W is not None and part in ("up", "gate"):
            W = W.chunk(2)[part == "gate"]
        difference = _difference(key, module, W)
        return {"w_norm" if difference.dim() == 1 else "diff": difference}
    raise InputError(
        f"{CANNOT} have no word for {_method(key)}, as {key.partition('/')[2]} has; keep the file as it is"
    )


def _method(key: str) -> str:
    slot = key.partition("/")[0].rpartition("_")
    name = slot[0] if slot[2].isdigit() else key.partition("/")[0]
    return next((m.__name__ for m in METHODS if m.__name__.lower() == name), name)


def _product(module: Product) -> dict[str, Tensor]:
    training, module.training = module.training, False
    try:
        A, B = (factor.detach() for factor in module.factors())
    finally:
        module.training = training
    up = B.reshape(*B.shape, *[1] * (A.dim() - 2))
    layer = {"lora_down.weight": A, "lora_up.weight": up, "alpha": torch.tensor(module.scaling * len(A))}
    if isinstance(module, Decomposed):
        layer["dora_scale"] = module.m.detach().view(-1, *[1] * (A.dim() - 1))
    return layer


def _kronecker(module: Kronecker) -> dict[str, Tensor]:
    names = {"w1": "lokr_w1", "w1a": "lokr_w1_a", "w1b": "lokr_w1_b", "w2": "lokr_w2", "w2a": "lokr_w2_a"}
    layer = {
        theirs: getattr(module, ours).detach() for ours, theirs in names.items() if getattr(module, ours) is not None
    }
    if module.w2b is not None:
        layer["lokr_w2_b"] = module.w2b.detach().flatten(1)
    return {**layer, "alpha": torch.tensor(module.scaling * (rank(layer) or 1))}


def _rotation(key: str, module: Rotation, axes: int) -> dict[str, Tensor]:
    if module.side != "out" or module.terms or len(module.Q) > 1:
        what = (
            "stages of a butterfly" if len(module.Q) > 1 else "a series for its inverse" if module.terms else "columns"
        )
        raise InputError(f'{key}: LyCORIS knows exact rotations of rows, OFT(side="out"); this one has {what}')
    X = torch.triu(-skew(module.Q.detach()[0], module.block), 1)
    layer = {"oft_blocks": X, "alpha": torch.tensor(0.0)}
    return layer if module.g is None else {**layer, "rescale": module.g.detach().view(-1, *[1] * (axes - 1))}


# -- new words ---------------------------------------------------------------------------------------------------------


def tokens_of(methods: Mapping[str, Method], tensors: Mapping[str, Tensor]) -> tuple[Tokens, dict[str, Tensor]]:
    """The new words of an adapter or of its file, and the tensors that are of something else.

    Args:
        methods: by slot.
        tensors: by "SLOT/COMPONENT[.MODULE]:SPAN.NAME"; of an adapter on one model alone that is the `text_encoder`.
    """
    found: Tokens = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        slot, _, site = key.partition("/")
        if slot not in methods:
            raise InputError(f"the header of a file of vismodal names no method {slot!r}, of which there is {key}")
        method = methods[slot]
        if not isinstance(method, TextualInversion):
            rest[key] = tensor
            continue
        path = site.partition(":")[0]
        encoder = path.partition(".")[0] if path.startswith("text_encoder") else "text_encoder"
        for word, rows in method.rows.items():
            found.setdefault(word, {})[encoder] = tensor[rows].detach().clone()
    return found, rest


def words_for(found: Tokens, sites: Sequence[Site]) -> list[tuple[Method, dict[str, dict[str, Tensor]]]]:
    """New words as methods, one for each text encoder, with the tensors of their sites."""
    chosen: list[tuple[Method, dict[str, dict[str, Tensor]]]] = []
    for encoder in dict.fromkeys(encoder for rows in found.values() for encoder in rows):
        mine = {word: rows[encoder] for word, rows in found.items() if encoder in rows}
        here = [s for s in sites if TextualInversion.fits(s) and f"{s.path}.".startswith(f"{encoder}.")]
        for word, rows in mine.items():
            _check_word(word, rows, encoder, {site.width for site in here})
        vectors = tuple(map(len, mine.values()))
        method = TextualInversion(words=tuple(mine), vectors=vectors, where=tuple(site.path for site in here))
        chosen.append((method, {site.key: {"v": torch.cat(list(mine.values()))} for site in here}))
    return chosen


def _check_word(word: str, rows: Tensor, encoder: str, widths: set[int]) -> None:
    if word.split() != [word]:
        raise InputError(
            f"the token {word!r} has spaces, and prompts hold words; write vismodal convert --token NAME, or where the "
            "file alone names it, NAME=FILE"
        )
    if widths and rows.shape[1] not in widths:
        raise InputError(
            f"the token {word!r} has {rows.shape[1]} channels, and the model's {encoder} "
            f"{', '.join(map(str, sorted(widths)))}; give the model that it is for"
        )
