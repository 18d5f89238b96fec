"""LoRA as diffusers and peft write it: `pytorch_lora_weights.safetensors`, read by plain `pipe.load_lora_weights`.

Tensors: `COMPONENT.MODULE.lora_A.weight` (r, in[, kh, kw]) and `.lora_B.weight` (out, r[, 1, 1]), where a component is
`unet`, `text_encoder` or `text_encoder_2`; DoRA's magnitudes are `.lora_magnitude_vector`, (out,) or (1, out, 1, 1), of
a text encoder with `.weight`, without which transformers 5 leaves them at their initial values. How strong a layer
acts, alpha / r, stands only in the header's `lora_adapter_metadata`, for each component: without it diffusers silently
takes 1, and with it for one component alone loading fails. Text encoders' keys carry `text_model.` exactly once, also
where the model's own names (transformers 5) no longer do; diffusers takes it off.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.formats.kohya import text_path
from vismodal.formats.layers import COMPONENTS, Layer, Layers, algorithm, alpha, method_of, plain, rank, some

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
WRAPPED = "base_model.model."  # before the paths in files of peft itself

# -- writing ---------------------------------------------------------------------------------------------------------


def write(layers: Layers) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file, by layers of LoRA, or in one model all of DoRA.

    Raises `InputError` naming what diffusers would refuse, drop or change.
    """
    _check(layers)
    named: dict[str, Tensor] = {}
    flat = {module: plain(layer) for module, layer in layers.items()}
    for module, layer in flat.items():
        component, _, path = module.partition(".")
        stem = f"{component}.{text_path(path) if component.startswith('text') else path}"
        A, B = layer["lora_down.weight"], layer["lora_up.weight"]
        named[f"{stem}.lora_A.weight"] = A
        named[f"{stem}.lora_B.weight"] = B.reshape(*B.shape[:2], *[1] * (A.ndim - 2))
        if "dora_scale" in layer:
            m = layer["dora_scale"].flatten()
            name = f"lora_magnitude_vector{'.weight' if component.startswith('text') else ''}"
            named[f"{stem}.{name}"] = m if A.ndim == 2 else m.view(1, -1, *[1] * (A.ndim - 2))
    return {name: tensor.contiguous() for name, tensor in named.items()}, _header(flat)


def _check(layers: Layers) -> None:
    kohya = "write --to kohya, for web UIs and ComfyUI"
    for module, layer in layers.items():
        component = module.partition(".")[0]
        if component not in COMPONENTS:
            raise InputError(f"diffusers' LoRA files know {', '.join(COMPONENTS)}; the adapter has {component!r}")
        if algorithm(module, layer) != "lora":
            raise InputError(
                f"diffusers' LoRA files hold plain LoRA only; {module} is {method_of(module, layer)}; {kohya}"
            )
    for component in COMPONENTS:
        mine = {m: layer for m, layer in layers.items() if m.startswith(f"{component}.")}
        without = [m for m, layer in mine.items() if "dora_scale" not in layer]
        if without and len(without) < len(mine):
            raise InputError(
                f"diffusers has DoRA on all layers of a model or on none; {some(without, 1)} are LoRA; {kohya}"
            )


def _header(layers: Mapping[str, Layer]) -> dict[str, str]:
    """peft's LoraConfig of each component: the most common rank and alpha, and patterns for the rest."""
    settings: dict[str, Any] = {}
    for component in dict.fromkeys(module.partition(".")[0] for module in layers):
        # peft matches names from their end, so names without `text_model.` fit the models with and without it
        mine = {_bare(m.partition(".")[2]): layer for m, layer in layers.items() if m.startswith(f"{component}.")}
        r = Counter(map(rank, mine.values())).most_common(1)[0][0]
        a = Counter(map(alpha, mine.values())).most_common(1)[0][0]
        config = {
            "r": r,
            "lora_alpha": a,
            "rank_pattern": {m: rank(layer) for m, layer in mine.items() if rank(layer) != r},
            "alpha_pattern": {m: alpha(layer) for m, layer in mine.items() if alpha(layer) != a},
            "target_modules": sorted(mine),
            "bias": "none",
        }
        if any("dora_scale" in layer for layer in mine.values()):
            config["use_dora"] = True
        settings |= {f"{component}.{name}": value for name, value in config.items()}
    return {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)}


def _bare(path: str) -> str:
    return path.removeprefix("text_model.")


# -- reading -----------------------------------------------------------------------------------------------------------

_ENDS = {
    r"\.lora_A\.weight": "lora_down.weight",
    r"\.lora_B\.weight": "lora_up.weight",
    r"\.lora(?:_linear_layer)?\.down\.weight": "lora_down.weight",
    r"\.lora(?:_linear_layer)?\.up\.weight": "lora_up.weight",
    r"_lora\.down\.weight": "lora_down.weight",
    r"_lora\.up\.weight": "lora_up.weight",
    r"\.lora_magnitude_vector(?:\.weight)?": "dora_scale",
    r"\.alpha": "alpha",
}
_END = re.compile("|".join(f"(?P<e{i}>{end})$" for i, end in enumerate(_ENDS)))
# beginnings of paths by which a file of one model alone is known: of `save_lora_adapter`, or of peft itself
_ALONE = {
    "down_blocks.": "unet",
    "mid_block.": "unet",
    "up_blocks.": "unet",
    "conv_": "unet",
    "time_embedding.": "unet",
    "add_embedding.": "unet",
    "transformer_blocks.": "transformer",
    "single_transformer_blocks.": "transformer",
    "time_text_embed.": "transformer",
    "context_embedder.": "transformer",
    "x_embedder.": "transformer",
    "norm_out.": "transformer",
    "proj_out.": "transformer",
    "text_model.": "text_encoder",
    "encoder.layers.": "text_encoder",
}


def knows(key: str) -> bool:
    """Whether a key is one of this format."""
    return _END.search(key) is not None and _stem(key) is not None


def _stem(key: str) -> str | None:
    """Component and path, however the file begins its keys."""
    key = key.removeprefix(WRAPPED)
    if key.startswith(tuple(f"{c}." for c in COMPONENTS)):
        return key
    return next((f"{component}.{key}" for head, component in _ALONE.items() if key.startswith(head)), None)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Layers:
    """Layers of a file, with their alphas by its header; without one r, as diffusers takes it.

    Raises `InputError` naming keys and settings that are not known here.
    """
    layers: Layers = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        stem, end = _stem(key), _END.search(key)
        if stem is None or end is None:
            unknown.append(key)
            continue
        offset = len(key) - len(stem)
        component, _, path = stem[: end.start() - offset].partition(".")
        path = _processor(path, component) if "_lora." in end[0] else path
        module = f"{component}.{text_path(path) if component.startswith('text') else path}"
        layers.setdefault(module, {})[_ENDS[list(_ENDS)[int(str(end.lastgroup)[1:])]]] = tensor
    if unknown:
        raise InputError(f"keys that are not known here: {some(unknown)}")
    if METADATA not in header and any(key.startswith(WRAPPED) for key in tensors):
        raise InputError("peft's own files have their alpha in adapter_config.json, which must lie beside this one")
    settings = _settings(header, layers)
    for module, layer in layers.items():
        algorithm(module, layer)
        if "dora_scale" in layer:
            layer["dora_scale"] = layer["dora_scale"].reshape(-1, *[1] * (layer["lora_down.weight"].dim() - 1))
        if settings and "alpha" not in layer:
            try:
                layer["alpha"] = torch.tensor(_alpha(module, layer, settings))
            except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
                raise InputError(f"{METADATA} in the header does not tell the alpha of {module}: {error!r}") from error
    return layers


def _processor(path: str, component: str) -> str:
    """`attn1.processor.to_out` of old files, whose keys go on with `_lora`, as the module's path."""
    path = path.replace(".processor.", ".")
    if component == "unet":
        return f"{path}.0" if path.endswith("to_out") else path
    return re.sub(r"to_(q|k|v|out)$", r"\1_proj", path)


def _settings(header: Mapping[str, str], layers: Layers) -> dict[str, dict[str, Any]]:
    """peft's LoraConfig by component, of which those for all the components are there, or none."""
    if METADATA not in header:
        return {}
    try:
        flat: dict[str, Any] = json.loads(header[METADATA])
    except ValueError as error:
        raise InputError(f"{METADATA} in the header is no JSON: {error}") from error
    if not isinstance(flat, dict):
        raise InputError(f"{METADATA} in the header is no mapping of settings")
    components = sorted({module.partition(".")[0] for module in layers})
    found: dict[str, dict[str, Any]] = {}
    for component in components:
        mine = {k.removeprefix(f"{component}."): v for k, v in flat.items() if k.startswith(f"{component}.")}
        if not mine and len(components) == 1 and "r" in flat:  # of `save_lora_adapter`
            mine = flat
        if not mine:
            raise InputError(f"{METADATA} in the header says nothing of {component}, which the file adapts")
        found[component] = mine
    for component, mine in found.items():
        start = mine.get("init_lora_weights", True)
        if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq")):
            raise InputError(
                f"{component}: init_lora_weights {start!r} changes the base model too, which no file tells"
            )
    return found


def _alpha(module: str, layer: Layer, settings: Mapping[str, dict[str, Any]]) -> float:
    component, _, path = module.partition(".")
    mine = settings[component]
    patterns: dict[str, float] = mine.get("alpha_pattern") or {}
    names = (path, _bare(path))
    found = next((a for p, a in patterns.items() if any(re.match(rf"(.*\.)?({p})$", n) for n in names)), None)
    value = float(mine["lora_alpha"] if found is None else found)
    return value * rank(layer) ** 0.5 if mine.get("use_rslora") else value
