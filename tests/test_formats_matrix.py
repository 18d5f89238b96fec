"""Files of each tool into each format: equal output, or an error that says what the format cannot hold.

The files are written and read here key by key, and the output is that of the weights by the formula; written files are
drawn with by diffusers' own loader too, where that is right.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from their_files import XL, Layer, by_diffusers, by_formula, changed, diffusers, draw, kohya, lora
from tiny_diffusion import tiny_pipeline
from tiny_sdxl import tiny_sdxl
from torch import Tensor, nn

from vismodal.diffusion.load import load_pipeline
from vismodal.errors import InputError
from vismodal.files import write_tensors
from vismodal.formats.bases import base_of
from vismodal.formats.files import read_file, read_tensors, write_file

pytest.importorskip("diffusers")
FORMATS = ("diffusers", "kohya", "lycoris")
FEATURES = ("alpha not rank", "per-module alpha", "text encoders", "convolutions", "DoRA")
SD1 = {
    path: path.replace("text_encoder.", "te.text_model.")
    for path in (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet.up_blocks.1.attentions.1.proj_in",
        "unet.up_blocks.1.resnets.0.conv1",
        "unet.down_blocks.1.resnets.0.conv_shortcut",
        "text_encoder.encoder.layers.0.self_attn.out_proj",
        "text_encoder.encoder.layers.1.mlp.fc1",
    )
}
NAMES = {"sd1": SD1, "sdxl": XL}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, nn.Module]]]:
    """Folders of tiny pipelines, and their modules by "COMPONENT.MODULE"."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline(folder / "sd1")
    tiny_sdxl(folder / "sdxl")
    found = {}
    for kind, names in NAMES.items():
        pipe = load_pipeline(folder / kind)
        modules = {p: getattr(pipe, p.partition(".")[0]).get_submodule(p.partition(".")[2]) for p in names}
        found[kind] = (folder / kind, modules)
    return found


def layers_with(feature: str, modules: dict[str, nn.Module]) -> dict[str, Layer]:
    text = {path for path in modules if path.startswith("text")}
    wide = {path for path in modules if "resnets" in path or "proj_in" in path}
    chosen = {
        "text encoders": set(modules) - wide,
        "convolutions": wide,
        "DoRA": set(modules),
    }.get(feature, set(modules) - text - wide)
    found: dict[str, Layer] = {}
    for i, path in enumerate(p for p in modules if p in chosen):
        m = modules[path]
        alpha = 3.0 if feature == "alpha not rank" else (1.0, 2.0, 4.0)[i % 3]
        found[path] = lora(m, alpha=alpha, seed=i)
        if feature == "DoRA":
            norm = m.weight.detach().flatten(1).norm(dim=1) * (1 + draw(len(m.weight), seed=i + 9).abs())
            found[path]["dora_scale"] = norm.view(-1, *[1] * (m.weight.dim() - 1))
    return found


def lycoris(layers: dict[str, Layer]) -> dict[str, Tensor]:
    stems = {path: f"lycoris_{path.removeprefix('unet.').replace('.', '_')}" for path in layers}
    return {f"{stems[path]}.{suffix}": t for path, layer in layers.items() for suffix, t in layer.items()}


def written(to: str, layers: dict[str, Layer], kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if to == "diffusers":
        return diffusers(layers)
    return (kohya(layers, NAMES[kind]) if to == "kohya" else lycoris(layers)), {"format": "pt"}


def read(file: Path, of: str, kind: str, paths: list[str]) -> dict[str, Layer]:
    """The layers of a file by its keys, and in diffusers' format by peft's config in its header."""
    tensors, header = read_tensors(file)
    one: Layer = {"lora_down.weight": torch.ones(1, 1), "lora_up.weight": torch.ones(1, 1), "alpha": torch.tensor(1.0)}
    keys = {path: list(written(of, {path: {**one, "dora_scale": torch.ones(1, 1)}}, kind)[0]) for path in paths}
    found: dict[str, Layer] = {}
    names = ("lora_down.weight", "lora_up.weight", *(("dora_scale",) if of == "diffusers" else ("alpha", "dora_scale")))
    for path in paths:
        found[path] = {n: tensors[k] for n, k in zip(names, keys[path], strict=True) if k in tensors}
        if of == "diffusers":
            component, _, module = path.partition(".")
            settings = json.loads(header["lora_adapter_metadata"])
            patterns = settings.get(f"{component}.alpha_pattern", {})
            bare = module.removeprefix("text_model.")
            found[path]["alpha"] = torch.tensor(float(patterns.get(bare, settings[f"{component}.lora_alpha"])))
    assert sum(map(len, found.values())) - (len(found) if of == "diffusers" else 0) == len(tensors)  # and no other
    return found


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("source", FORMATS)
def test_round_trips(made: dict[str, tuple[Path, dict[str, nn.Module]]], kind: str, source: str, feature: str,
                     tmp_path: Path) -> None:  # fmt: skip
    folder, modules = made[kind]
    layers = layers_with(feature, modules)
    if source == "lycoris":  # which is of one model
        layers = {path: layer for path, layer in layers.items() if path.startswith("unet.")}
    base = base_of(folder)
    contents = read_file(write_tensors(tmp_path / "from.safetensors", *written(source, layers, kind)), base)
    assert contents.format == source and len(contents.layers) == len(layers)
    for to in FORMATS:
        out = tmp_path / f"{to}.safetensors"
        if to == "lycoris" and any(path.startswith("text") for path in layers):
            with pytest.raises(InputError, match="hold one module, here the denoiser, and text_encoder"):
                write_file(contents, to, out, base)
            continue
        back = read(write_file(contents, to, out, base), to, kind, list(layers))
        for path, layer in layers.items():
            W = modules[path].weight
            torch.testing.assert_close(changed(W, back[path]), changed(W, layer), atol=1e-5, rtol=1e-5)
        if to == "kohya":
            assert len({float(layer["alpha"]) for layer in back.values()}) == 1  # all that diffusers reads of them
        if source == "kohya" and to != "lycoris" and (to, feature) != ("kohya", "DoRA"):
            np.testing.assert_allclose(by_diffusers(folder, out), by_formula(folder, layers), atol=1e-4)
