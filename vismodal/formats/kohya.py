"""kohya's names, which web UIs, ComfyUI and LyCORIS read: `lora_unet_mid_block_attentions_0_proj_in.lora_up.weight`.

The part of a key before its first dot is a prefix and the module's path with underscores: `lora_unet_`, `lora_te_`
(SD1 and 2), `lora_te1_` and `lora_te2_` (SDXL). SDXL's UNet has the names of its original form, which counts its blocks
through; text encoders have `text_model_` once. `lycoris_` is what LyCORIS's own wrapper writes for one module, here the
UNet with diffusers' names. Behind the dot stand the words of `layers.py`. Embeddings of tokens may stand in the same
file as `bundle_emb.TOKEN.KEY`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.formats import names, tokens
from vismodal.formats.layers import (
    SUFFIXES,
    Layers,
    algorithm,
    alpha,
    method_of,
    rank,
    some,
    with_alpha,
)
from vismodal.formats.tokens import Tokens

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lycoris_": "unet",
}
_TEXT = {False: {"text_encoder": "lora_te_"}, True: {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}}
_ARCHITECTURES = {
    "sd1": ("stable-diffusion-v1", "sd_v1"),
    "sd2": ("stable-diffusion-v2-768-v", "sd_v2"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}


def knows(key: str) -> bool:
    """Whether a key is one of this format."""
    return key.startswith((*PREFIXES, tokens.BUNDLE))


def is_xl(keys: Iterable[str]) -> bool:
    """Whether the keys are SDXL's: of two text encoders, or of the original UNet."""
    blocks = ("input_blocks_", "middle_block_", "output_blocks_")
    return any(key.startswith(("lora_te1_", "lora_te2_", *(f"lora_unet_{b}" for b in blocks))) for key in keys)


def read(tensors: Mapping[str, Tensor], n: int = 2) -> tuple[Layers, Tokens]:
    """Layers and tokens of a file.

    Args:
        tensors: by the file's keys.
        n: residual blocks a level of the UNet, by which the original's names are counted: `layers_per_block`.

    Raises `InputError` naming keys that are not known here.
    """
    layers: Layers = {}
    unknown: list[str] = []
    bundled = {key: t for key, t in tensors.items() if key.startswith(tokens.BUNDLE)}
    for key, tensor in tensors.items():
        stem, _, suffix = key.partition(".")
        prefix = next((p for p in PREFIXES if stem.startswith(p)), None)
        if key in bundled:
            continue
        if prefix is None or suffix not in SUFFIXES:
            unknown.append(key)
            continue
        try:
            module = _module(PREFIXES[prefix], stem.removeprefix(prefix), n)
        except InputError:
            unknown.append(key)
            continue
        layers.setdefault(module, {})[suffix] = tensor
    if unknown:
        raise InputError(f"keys that are not known here: {some(unknown)}")
    for module, layer in layers.items():
        algorithm(module, layer)
    return layers, tokens.unbundle(bundled)


def _module(component: str, name: str, n: int) -> str:
    path = names.dotted(name)
    if component == "unet":
        return f"unet.{names.from_original(path, n) if names.is_original(path) else path}"
    return f"{component}.{text_path(path)}"


def text_path(path: str) -> str:
    """A path in a text encoder with `text_model.` once, as transformers' own names have it or not."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def write(layers: Layers, embeddings: Tokens, kind: str, n: int = 2) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file.

    Where the alphas of LoRA layers differ, all get the most common one, and `up` makes up for it: diffusers reads the
    layers of attention with the most common alpha, whatever they say.

    Args:
        layers: by module.
        embeddings: of tokens, bundled into the file.
        kind: the base model: "sd1", "sd2" or "sdxl".
        n: as for `read`.

    Raises `InputError` for a text encoder that such a base does not have.
    """
    written: dict[str, Tensor] = {}
    for module, layer in even(layers).items():
        component, _, path = module.partition(".")
        if component == "unet":
            stem = f"lora_unet_{names.flat(names.to_original(path, n) if kind == 'sdxl' else path)}"
        elif component in _TEXT[kind == "sdxl"]:
            stem = f"{_TEXT[kind == 'sdxl'][component]}{names.flat(text_path(path))}"
        else:
            raise InputError(f"{module} is of SDXL's second text encoder, and the base is {kind}; write --base sdxl")
        written |= {f"{stem}.{suffix}": tensor for suffix, tensor in layer.items()}
    return {**written, **tokens.bundle(embeddings)}, _header(layers, kind)


def write_lycoris(layers: Layers) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same for LyCORIS's wrapper around a UNet. Raises `InputError` for layers of text encoders."""
    written: dict[str, Tensor] = {}
    for module, layer in even(layers).items():
        component, _, path = module.partition(".")
        if component != "unet":
            raise InputError(
                f"LyCORIS's own files hold one module, here the UNet, and {module} is another's; write --to kohya"
            )
        written |= {f"lycoris_{names.flat(path)}.{suffix}": tensor for suffix, tensor in layer.items()}
    return written, {"format": "pt"}


def even(layers: Layers) -> Layers:
    """Every layer with its alpha, and where those of LoRA differ, with the most common one.

    Raises `InputError` for rotations in blocks that are too large for those who read them.
    """
    lora = {m: layer for m, layer in layers.items() if algorithm(m, layer) == "lora"}
    others = {m: layer for m, layer in layers.items() if m not in lora}
    common = Counter(alpha(layer) for layer in lora.values()).most_common(1)
    result = {m: with_alpha(layer, common[0][0]) for m, layer in lora.items()}
    for m, layer in others.items():
        if algorithm(m, layer) in ("loha", "lokr"):  # LyCORIS takes none that is missing
            layer = {**layer, "alpha": torch.tensor(alpha(layer) or 1.0)}
        elif algorithm(m, layer) == "oft":
            n, b, _ = layer["oft_blocks"].shape
            if b > n:
                raise InputError(
                    f"LyCORIS and web UIs read rotations by blocks of at most as many rows as there are blocks; "
                    f"{m} has {n} blocks of {b}; a block_size of {int((n * b) ** 0.5)} or below can be written"
                )
            layer = {**layer, "alpha": layer.get("alpha", torch.tensor(0.0))}
        result[m] = layer
    return {m: result[m] for m in layers}


def _header(layers: Layers, kind: str) -> dict[str, str]:
    methods = {method_of(m, layer) for m, layer in layers.items()}
    architecture, version = _ARCHITECTURES[kind]
    header = {"format": "pt", "ss_base_model_version": version, "modelspec.architecture": f"{architecture}/lora"}
    if not layers:
        return header
    plain = methods == {"LoRA"}
    header |= {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}
    ranked = [layer for layer in layers.values() if rank(layer)]
    if ranked:
        header["ss_network_dim"] = str(Counter(map(rank, ranked)).most_common(1)[0][0])
        header["ss_network_alpha"] = str(Counter(map(alpha, ranked)).most_common(1)[0][0])
    if not plain and len(methods) == 1:
        algorithms = {"LoHa": "loha", "LoKr": "lokr", "OFT": "diag-oft", "full": "full", "DoRA": "lora"}
        algo = {"algo": algorithms.get(next(iter(methods)), "lora"), "dora_wd": str(methods == {"DoRA"})}
        header["ss_network_args"] = json.dumps(algo)
    return header
