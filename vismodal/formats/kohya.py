"""kohya's names, which web UIs, ComfyUI and LyCORIS read: `lora_unet_mid_block_attentions_0_proj_in.lora_up.weight`.

The part of a key before its first dot is a prefix and the module's path with underscores: `lora_unet_`, `lora_te_`
(SD1 and 2), `lora_te1_` and `lora_te2_` (SDXL, SD3, and of Flux the first). SDXL's UNet has the names of its original
form, which counts its blocks through, and so have the transformers of SD3 and Flux (`mmdit.py`); text encoders have
`text_model_` once. `lycoris_` is what LyCORIS's own wrapper writes for one module, here the UNet with diffusers' names,
`lora_transformer_` what OneTrainer does. Behind the dot stand the words of `layers.py`. Embeddings of tokens may stand
in the same file as `bundle_emb.TOKEN.KEY`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.formats import mmdit, names, tokens
from vismodal.formats.layers import (
    DENOISERS,
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
    "lycoris_": "unet",  # or a transformer
    "lora_transformer_": "transformer",
}
T5 = "lora_te3_"
_BOTH = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_ALONE = {"text_encoder": "lora_te_"}
_TEXT = {"sdxl": _BOTH, "sd3": _BOTH, "flux": {"text_encoder": "lora_te1_"}}
_ARCHITECTURES = {
    "sd1": ("stable-diffusion-v1", "sd_v1"),
    "sd2": ("stable-diffusion-v2-768-v", "sd_v2"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "sd3": ("stable-diffusion-3", "sd3"),
    "flux": ("flux-1-dev", "flux1"),
}


def knows(key: str) -> bool:
    """Whether a key is one of this format."""
    return key.startswith((*PREFIXES, T5, tokens.BUNDLE))


def base_kind(keys: Iterable[str]) -> str | None:
    """ "sdxl", "sd3" or "flux" where the keys are of one of them: of the original model, or of two text encoders."""
    stems = [key.partition(".")[0] for key in keys]
    denoiser = [stem.removeprefix("lora_unet_") for stem in stems if stem.startswith("lora_unet_")]
    if found := next(filter(None, map(mmdit.kind_of, denoiser)), None):
        return found
    blocks = ("input_blocks_", "middle_block_", "output_blocks_")
    if any(stem.startswith("lora_transformer_") for stem in stems):
        return None
    xl = ("lora_te1_", "lora_te2_", *(f"lora_unet_{b}" for b in blocks))
    return "sdxl" if any(stem.startswith(xl) for stem in stems) else None


def read(tensors: Mapping[str, Tensor], n: int = 2) -> tuple[Layers, Tokens]:
    """Layers and tokens of a file.

    Args:
        tensors: by the file's keys.
        n: residual blocks a level of the UNet, by which the original's names are counted: `layers_per_block`.

    Raises `InputError` naming keys that are not known here, and layers that cannot be said by diffusers' modules.
    """
    bundled = {key: t for key, t in tensors.items() if key.startswith(tokens.BUNDLE)}
    stems: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key not in bundled:
            stem, _, suffix = key.partition(".")
            stems.setdefault(stem, {})[suffix] = tensor
    kind = base_kind(stems)
    blocks = ("lycoris_transformer_blocks_", "lycoris_single_transformer_blocks_")
    wrapped = DENOISERS[any(stem.startswith(blocks) for stem in stems)]
    layers: Layers = {}
    unknown: list[str] = []
    for stem, layer in stems.items():
        wrong = [f"{stem}.{suffix}" for suffix in layer if suffix not in SUFFIXES]
        named = None if wrong else _named(stem, layer, n, kind, wrapped)
        if named is None:
            unknown += wrong or [f"{stem}.{suffix}" for suffix in layer]
        layers |= named or {}
    if unknown:
        t5 = f"; {T5} is T5, which has no sites here" if any(key.startswith(T5) for key in unknown) else ""
        raise InputError(f"keys that are not known here: {some(unknown)}{t5}")
    for module, layer in layers.items():
        algorithm(module, layer)
    return layers, tokens.unbundle(bundled)


def _named(stem: str, layer: dict[str, Tensor], n: int, kind: str | None, wrapped: str) -> Layers | None:
    """A layer by the modules that it is for; None where its name is of none that are known here. `wrapped` is the model
    that `lycoris_` stands for."""
    prefix = next((p for p in PREFIXES if stem.startswith(p)), "")
    name = stem.removeprefix(prefix)
    try:
        if prefix != "lora_unet_" or kind not in mmdit.KINDS:
            component = wrapped if prefix == "lycoris_" else PREFIXES.get(prefix)
            return {_module(component, name, n): layer} if component else None
        paths = mmdit.paths_of(name, kind)
    except InputError:
        return None
    return {f"transformer.{path}": part for path, part in mmdit.apart(stem, paths, layer).items()}


def _module(component: str, name: str, n: int) -> str:
    path = names.dotted(name)
    if component in DENOISERS:
        return f"{component}.{names.from_original(path, n) if names.is_original(path) else path}"
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
        kind: the base model: "sd1", "sd2", "sdxl", "sd3" or "flux".
        n: as for `read`.

    Raises `InputError` for a model that such a base does not have, and for what its names cannot say.
    """
    _check(layers, kind)
    written: dict[str, Tensor] = {}
    original = even(_original(layers, kind))
    for module, layer in original.items():
        component, _, path = module.partition(".")
        if component == "unet":
            stem = f"lora_unet_{names.flat(names.to_original(path, n) if kind == 'sdxl' else path)}"
        elif component == "transformer":
            stem = f"lora_unet_{names.flat(path)}"
        else:
            stem = f"{_TEXT.get(kind, _ALONE)[component]}{names.flat(text_path(path))}"
        written |= {f"{stem}.{suffix}": tensor for suffix, tensor in layer.items()}
    return {**written, **tokens.bundle(embeddings)}, _header(original, kind)


def _check(layers: Layers, kind: str) -> None:
    """Raises `InputError` for a model that such a base does not have."""
    there = {"transformer" if kind in mmdit.KINDS else "unet", *_TEXT.get(kind, _ALONE)}
    for module in layers:
        component = module.partition(".")[0]
        if component not in there:
            raise InputError(
                f"{module} is of {component}, and kohya's files for {kind} hold {', '.join(sorted(there))}; write "
                "another --base"
            )


def _original(layers: Layers, kind: str) -> Layers:
    """The layers of a transformer as those of its original form."""
    if kind not in mmdit.KINDS:
        return layers
    mine = {m.partition(".")[2]: layer for m, layer in layers.items() if m.startswith("transformer.")}
    others = {m: layer for m, layer in layers.items() if not m.startswith("transformer.")}
    return {**{f"transformer.{m}": layer for m, layer in mmdit.to_original(mine, kind).items()}, **others}


def write_lycoris(layers: Layers) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same for LyCORIS's wrapper around a UNet or transformer. Raises `InputError` for layers of text encoders."""
    written: dict[str, Tensor] = {}
    for module, layer in even(layers).items():
        component, _, path = module.partition(".")
        if component not in DENOISERS:
            raise InputError(
                f"LyCORIS's own files hold one module, here the denoiser, and {module} is another's; write --to kohya"
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
    own = {"sd3": "networks.lora_sd3", "flux": "networks.lora_flux"}.get(kind, "networks.lora")
    header |= {"ss_network_module": own if plain else "lycoris.kohya"}
    ranked = [layer for layer in layers.values() if rank(layer)]
    if ranked:
        header["ss_network_dim"] = str(Counter(map(rank, ranked)).most_common(1)[0][0])
        header["ss_network_alpha"] = str(Counter(map(alpha, ranked)).most_common(1)[0][0])
    if not plain and len(methods) == 1:
        algorithms = {"LoHa": "loha", "LoKr": "lokr", "OFT": "diag-oft", "full": "full", "DoRA": "lora"}
        algo = {"algo": algorithms.get(next(iter(methods)), "lora"), "dora_wd": str(methods == {"DoRA"})}
        header["ss_network_args"] = json.dumps(algo)
    return header
