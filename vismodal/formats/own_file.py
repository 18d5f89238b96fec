"""Layers as a file of vismodal and back, which takes the models that they are for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vismodal.adapter import Adapter
from vismodal.attach import adapt, slots
from vismodal.checkpoint import FORMAT, described, header_of
from vismodal.discover import discover
from vismodal.errors import InputError
from vismodal.families import table
from vismodal.fingerprint import BANK, fingerprint
from vismodal.formats import methods, own
from vismodal.formats.bases import Base, models
from vismodal.formats.layers import COMPONENTS, DENOISERS, Layers, some
from vismodal.formats.tokens import Tokens

ABSOLUTE = (".value",)  # the ends of tensors that are values, where the files of others hold differences


def read_own(tensors: Mapping[str, Tensor], header: Mapping[str, str], base: Base | None) -> tuple[Layers, Tokens]:
    """The layers and tokens of a file of vismodal, which for tokens alone needs no base.

    Raises `InputError` for what no file of another tool says, and for another base.
    """
    if header["vismodal"] != FORMAT:
        raise InputError(f"it has format {header['vismodal']}, this version reads {FORMAT}; update vismodal")
    by_slot, bases = described(header)
    found_tokens, tensors = own.tokens_of(by_slot, tensors)
    attached = [method for slot, method in by_slot.items() if any(key.startswith(f"{slot}/") for key in tensors)]
    if not attached:
        return {}, found_tokens
    prefixes = list(bases)
    if base is None:
        raise InputError("a file of vismodal needs its base model; write --base sd1, sd2, sdxl or its folder")
    components = [base.denoiser] if prefixes == [""] else prefixes
    if unknown := [p for p in components if p not in COMPONENTS]:
        raise InputError(f"it adapts {some(map(repr, unknown))}; the formats of others know {', '.join(COMPONENTS)}")
    found = models(base, components, weights=any(key.endswith(ABSOLUTE) for key in tensors))
    adapter = adapt({"": found[base.denoiser]} if prefixes == [""] else found, attached, "convert", seed=0)
    fill(adapter, tensors)
    return layers_of(adapter), found_tokens


def fill(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Tensors of a file for the adapter's, which may have no storage. Raises `InputError` if they do not fit."""
    mine = adapter.state_dict()
    if wrong := sorted(mine.keys() ^ tensors.keys()):
        raise InputError(f"it does not fit the base model, which differs at {some(wrong)}; write another --base")
    adapter._resize(tensors)
    if wrong := [k for k, t in adapter.state_dict().items() if t.shape != tensors[k].shape]:
        raise InputError(f"it has other sizes than the base model at {some(wrong)}; write another --base")
    for key, module in adapter._all_modules().items():
        module.load_state_dict({n: tensors[f"{key}.{n}"] for n in module.state_dict()}, assign=True)


def layers_of(adapter: Adapter) -> Layers:
    """The layers of a live adapter on `{"unet": ..., "text_encoder": ...}`, or on a denoiser alone.

    Raises `InputError` naming what no file of another tool can say.
    """
    if adapter.merged:
        raise InputError("a merged adapter has changed the base's values; write adapter.unmerge() first")
    whole = {prefix or _denoiser(model): model for prefix, model in adapter.models.items()}
    alone = next(iter(whole)) if list(adapter.models) == [""] else ""
    modules = {_below(alone, key): m for key, m in adapter.modules.items()} if alone else adapter.modules
    held = {
        f"{prefix}.{name}": p.detach()
        for prefix, model in whole.items()
        for name, p in model.named_parameters()
        if not name.startswith(f"{BANK}.")
    }
    return own.layers_of(modules, held)


def _denoiser(model: nn.Module) -> str:
    return DENOISERS["Transformer" in type(model).__name__]


def _below(prefix: str, key: str) -> str:
    slot, _, site = key.partition("/")
    return f"{slot}/{prefix}.{site}"


def dead(layers: Layers, models: Mapping[str, nn.Module]) -> list[str]:
    """Layers on modules whose output nothing reads, and which are therefore no sites: the text's queries in the last
    block of SD3, where the text is only read."""
    found = []
    for module in layers:
        component, _, path = module.partition(".")
        block, _, last = path.partition(".attn.")
        if last == "add_q_proj" and component in models:
            at = dict(models[component].named_modules()).get(block)
            found += [module] if getattr(at, "context_pre_only", False) else []
    return found


def write_own(
    layers: Layers, words: Tokens, models: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file of vismodal for these models, which may have no storage. `dead` layers are left out.

    Raises `InputError` for layers that the models do not have, or that no method here can be.
    """
    adapted = [*(module.partition(".")[0] for module in layers), *(e for rows in words.values() for e in rows)]
    used = list(dict.fromkeys(adapted))
    if lacking := [c for c in used if c not in models]:
        raise InputError(f"it adapts {some(map(repr, lacking))}; the model has {', '.join(models)}")
    mine = {prefix: model for prefix, model in models.items() if prefix in used}
    sites = [s for prefix, model in mine.items() for s in discover(model, table(model), prefix)]
    left_out = dead(layers, mine)
    chosen = methods.methods_for({m: layer for m, layer in layers.items() if m not in left_out}, sites)
    chosen = [*chosen, *own.words_for(words, sites)]
    by_slot = slots([method for method, _ in chosen])
    tensors: dict[str, Tensor] = {}
    for slot, (_, by_site) in zip(by_slot, chosen, strict=True):
        tensors |= {f"{slot}/{site}.{n}": t.float() for site, named in by_site.items() for n, t in named.items()}
    return tensors, header_of(by_slot, {prefix: fingerprint(model) for prefix, model in mine.items()})
