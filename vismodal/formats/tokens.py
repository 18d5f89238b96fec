"""Textual inversion: embeddings of new tokens, n rows each, by the text encoder that they are for.

    {"sks": {"text_encoder": n x d, "text_encoder_2": n x d_2}}

Four layouts: diffusers' `{TOKEN: [d] or [n, d]}`; A1111's `string_to_param["*"]` with a `name`, a pickle that only
`convert` reads, without running code; `emb_params`, named by its file; SDXL's `clip_l` and `clip_g`, named by their
file. In a LoRA's file they stand as `bundle_emb.TOKEN.KEY`, KEY being one of the last two or `string_to_param.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vismodal.errors import InputError
from vismodal.formats.layers import some

Tokens = dict[str, dict[str, Tensor]]

BUNDLE = "bundle_emb."
KEYS = {
    "emb_params": "text_encoder",
    "string_to_param.*": "text_encoder",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
}
WIDEST = 4096  # an embedding of more is none


def is_tokens(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a file of tokens alone."""
    if not tensors:
        return False
    return tensors.keys() <= KEYS.keys() or all(
        t.dim() in (1, 2) and t.shape[-1] <= WIDEST and "." not in key for key, t in tensors.items()
    )


def read(tensors: Mapping[str, Tensor], name: str) -> Tokens:
    """Tokens of a file; `name` is that of the token where the layout holds none."""
    if tensors.keys() <= KEYS.keys():
        return {name: {KEYS[key]: _rows(key, t) for key, t in tensors.items()}}
    return {token: {"text_encoder": _rows(token, t)} for token, t in tensors.items()}


def _rows(key: str, tensor: Tensor) -> Tensor:
    rows = tensor[None] if tensor.dim() == 1 else tensor
    if rows.dim() != 2:
        raise InputError(f"{key} is {tuple(tensor.shape)}; an embedding has one row a vector")
    return rows


def unbundle(tensors: Mapping[str, Tensor]) -> Tokens:
    """Tokens of the keys `bundle_emb.TOKEN.KEY`. Raises `InputError` for another KEY."""
    found: Tokens = {}
    for key, tensor in tensors.items():
        rest = key.removeprefix(BUNDLE)
        kind = next((k for k in KEYS if rest.endswith(f".{k}")), None)
        if kind is None:
            raise InputError(f"key that is not known here: {key}; behind a token's name stands {', '.join(KEYS)}")
        found.setdefault(rest.removesuffix(f".{kind}"), {})[KEYS[kind]] = _rows(key, tensor)
    return found


def bundle(found: Tokens) -> dict[str, Tensor]:
    """The inverse of `unbundle`."""
    return {f"{BUNDLE}{token}.{key}": t for token, rows in found.items() for key, t in _keyed(rows).items()}


def _keyed(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if rows.keys() == {"text_encoder"}:
        return {"emb_params": rows["text_encoder"]}
    return {{"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[encoder]: t for encoder, t in rows.items()}


def write_webui(found: Tokens) -> dict[str, Tensor]:
    """`emb_params`, or `clip_l` and `clip_g`, of one token, whose name its file has to have."""
    if len(found) != 1:
        raise InputError(f"such a file holds one token, and here are {some(found)}; name one with --token")
    return _keyed(next(iter(found.values())))


def write_diffusers(found: Tokens) -> dict[str, Tensor]:
    """`{TOKEN: [n, d]}`, or for one token of SDXL `clip_l` and `clip_g`."""
    if all(rows.keys() == {"text_encoder"} for rows in found.values()):
        return {token: rows["text_encoder"] for token, rows in found.items()}
    return write_webui(found)


def read_pickle(path: Path) -> tuple[Tokens, dict[str, str]]:
    """Tokens and what else stands in A1111's `.pt`, or `{TOKEN: [d]}` in diffusers' `.bin`.

    `weights_only` lets a pickle hold tensors and plain values alone, so that nothing in it can run.
    Raises `InputError` for any other content.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a broken file has no common class
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} is no pickle of tensors and plain values alone, which is all that is read: {why}"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        rows = content["string_to_param"]
        if rows.keys() != {"*"}:
            raise InputError(f"{path} has string_to_param of {some(map(repr, rows))}; known is '*'")
        name = str(content.get("name") or path.stem)
        plain = {k: str(v) for k, v in content.items() if isinstance(v, str | int | float) and k != "name"}
        return {name: {"text_encoder": _rows(name, rows["*"].detach())}}, plain
    if isinstance(content, dict) and content and all(isinstance(t, Tensor) for t in content.values()):
        return read({str(k): t.detach() for k, t in content.items()}, path.stem), {}
    raise InputError(f"{path} has no string_to_param['*'] of a textual inversion, nor embeddings by token")
