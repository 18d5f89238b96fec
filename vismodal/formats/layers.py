"""What every format is read into and written from: tensors by module, in the words of LyCORIS.

    {"unet.mid_block.attentions.0.proj_in": {"lora_down.weight": A, "lora_up.weight": B, "alpha": alpha}}

Modules are named as diffusers has them, below `unet` or `transformer`, `text_encoder` and `text_encoder_2`; of the text
encoders with `text_model.`. The tensors of a layer say what its weight W, out x in [x kh x kw], becomes; s = alpha / r:

    lora   W + s up down [mid]          up: out r [1 1], down: r in [kh kw]; s = 1 without alpha
    dora   m V / |V|                    that W is V, m = dora_scale: out 1 [1 1], |V| by rows
    loha   W + s (w1_a w1_b) * (w2_a w2_b)         a: out r, b: r (in kh kw)
    lokr   W + s w1 (x) w2              each whole or a product _a _b; s = 1 where both are whole
    oft    rescale R^T W                R from blocks X: n b b, by rows, Q = X - X^T, R = (I + Q)(I - Q)^-1
    full   W + diff, bias + diff_b
    norm   w + w_norm, bias + b_norm
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vismodal.errors import InputError

Layer = Mapping[str, Tensor]
Layers = dict[str, dict[str, Tensor]]

DENOISERS = ("unet", "transformer")
COMPONENTS = (*DENOISERS, "text_encoder", "text_encoder_2")

_NEEDS: dict[str, tuple[set[str], ...]] = {
    "lora": ({"lora_down.weight", "lora_up.weight"},),
    "loha": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "lokr": tuple(
        {*first, *second}
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "oft": ({"oft_blocks"},),
    "full": ({"diff"},),
    "norm": ({"w_norm"},),
}
_MAY = {
    "lora": {"alpha", "dora_scale", "lora_mid.weight"},
    "loha": {"alpha", "dora_scale", "hada_t1", "hada_t2"},
    "lokr": {"alpha", "dora_scale", "lokr_t2"},
    "oft": {"alpha", "rescale"},
    "full": {"diff_b"},
    "norm": {"b_norm"},
}
SUFFIXES = frozenset().union(*_MAY.values(), *(need for needs in _NEEDS.values() for need in needs))


def algorithm(module: str, layer: Layer) -> str:
    """ "lora", "loha", "lokr", "oft", "full" or "norm". Raises `InputError` for tensors that are none of them."""
    for name, choices in _NEEDS.items():
        if any(needs <= layer.keys() <= needs | _MAY[name] for needs in choices):
            if name == "oft" and layer["oft_blocks"].dim() != 3:
                raise InputError(f"{module} has oft_blocks of {layer['oft_blocks'].dim()} axes: BOFT is not known here")
            if "alpha" in layer and layer["alpha"].numel() != 1:
                raise InputError(f"{module} has an alpha of {layer['alpha'].numel()} numbers; a layer has one")
            if name == "lora":
                _check_product(module, layer["lora_up.weight"], layer["lora_down.weight"])
            return name
    raise InputError(f"{module} has {some(layer)}, which is no whole layer of {', '.join(_NEEDS)}")


def _check_product(module: str, up: Tensor, down: Tensor) -> None:
    if min(up.dim(), down.dim()) < 2 or up.shape[1] != len(down):
        shapes = ("x".join(map(str, t.shape)) for t in (up, down))
        raise InputError(f"{module} has an up of {' and a down of '.join(shapes)}, which are no product; is it whole?")


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def rank(layer: Layer) -> int:
    """r; 0 where there is none."""
    factors = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((len(layer[name]) for name in factors if name in layer), 0)


def alpha(layer: Layer) -> float:
    """alpha, which is r where a file says none, or 0."""
    given = float(layer["alpha"]) if "alpha" in layer else 0.0
    return given or float(rank(layer))


def scaling(layer: Layer) -> float:
    """s = alpha / r."""
    return alpha(layer) / rank(layer) if rank(layer) else 1.0


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """`factor` times the tensor, in its dtype where that is exact, else in fp32."""
    if factor == 1:
        return tensor
    product = tensor.float() * factor
    rounded = product.to(tensor.dtype)
    return rounded if torch.equal(rounded.float(), product) else product


def rows(layer: Layer) -> int:
    """The rows of the weight that a layer is for. Of LoKr, which does not tell, 0."""
    if "oft_blocks" in layer:
        return layer["oft_blocks"].shape[0] * layer["oft_blocks"].shape[1]
    names = ("lora_up.weight", "hada_w1_a", "diff", "w_norm")
    return next((len(layer[name]) for name in names if name in layer), 0)


def with_alpha(layer: Layer, value: float) -> dict[str, Tensor]:
    """The same layer with another alpha: what its strength then lacks goes into `up` (or w1)."""
    scale_of = ("lora_up.weight", "hada_w1_a", "lokr_w1_a", "lokr_w1")
    name = next(name for name in scale_of if name in layer)
    factor = alpha(layer) / value if rank(layer) else 1.0
    return {**layer, name: scaled(layer[name], factor), "alpha": torch.tensor(float(value))}


def plain(layer: Layer) -> dict[str, Tensor]:
    """The same layer without the core of a Tucker decomposition, which goes into the factor that reads the input."""
    layer = dict(layer)
    if "lora_mid.weight" in layer:
        mid, down = layer.pop("lora_mid.weight").float(), layer["lora_down.weight"].float().flatten(1)
        layer["lora_down.weight"] = torch.einsum("rs...,si->ri...", mid, down)
    for core, a, b in (("hada_t1", "hada_w1_a", "hada_w1_b"), ("hada_t2", "hada_w2_a", "hada_w2_b")):
        if core in layer:
            t, down = layer.pop(core).float(), layer[b].float()
            layer[b] = torch.einsum("rs...,si->ri...", t, down).flatten(1)
            layer[a] = layer[a].T.contiguous()
    if "lokr_t2" in layer:
        t, down = layer.pop("lokr_t2").float(), layer["lokr_w2_b"].float()
        layer["lokr_w2_b"] = torch.einsum("rs...,si->ri...", t, down).flatten(1)
        layer["lokr_w2_a"] = layer["lokr_w2_a"].T.contiguous()
    return layer


def method_of(module: str, layer: Layer) -> str:
    """The algorithm's name for people: "DoRA" beside "LoRA"."""
    name = algorithm(module, layer)
    shown = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "full": "full", "norm": "norm"}[name]
    if "dora_scale" in layer:
        return "DoRA" if name == "lora" else f"{shown} with DoRA's magnitudes"
    return shown
