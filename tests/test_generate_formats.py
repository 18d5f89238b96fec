"""`vismodal generate` and the tools with files of diffusers, kohya and LyCORIS, written here key by key.

The pictures are those of diffusers' own `load_lora_weights` where that is right, and of the weights by the formula
where it is wrong: alphas that differ, DoRA, LoHa, LoKr, OFT, full differences.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from their_files import XL, Layer, by_diffusers, by_formula, changed, diffusers, draw, kohya, lora, picture
from tiny_diffusion import tiny_kind, tiny_pipeline
from tiny_sdxl import tiny_sdxl
from torch import Tensor, nn
from zoo import shake

import vismodal as vm
from vismodal import cli
from vismodal.diffusion.adapters import Shelf, Use, read_adapters
from vismodal.diffusion.load import load_pipeline
from vismodal.errors import InputError
from vismodal.files import write_tensors
from vismodal.formats.bases import base_of
from vismodal.formats.files import contents_of, read_file, read_tensors, write_file
from vismodal.formats.summary import inspect

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline(folder / "sd1")
    tiny_sdxl(folder / "sdxl")
    for kind in ("sd3", "flux"):
        tiny_kind(kind, folder / kind)
    return {kind: folder / kind for kind in ("sd1", "sdxl", "sd3", "flux")}


def with_file(folder: Path, file: Path) -> np.ndarray:
    """The picture as `vismodal generate` draws it, by plain calls of the pipeline."""
    pipe = load_pipeline(folder)
    shelf = Shelf(pipe, read_adapters([f"it={file}"]))
    row = shelf.row([Use("it")])
    with torch.no_grad(), vm.route(shelf.models, [row]):
        return picture(pipe)


def find(folder: Path, *ends: str) -> dict[str, nn.Module]:
    """Modules of the denoiser and the first text encoder by "COMPONENT.MODULE", by how their paths end."""
    pipe = load_pipeline(folder)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    parts = {name: getattr(pipe, name) for name in (denoiser, "text_encoder")}
    found = {f"{n}.{path}": m for n, part in parts.items() for path, m in part.named_modules() if path.endswith(ends)}
    assert found
    return found


ATTENTION = ("to_q", "to_v", "to_out.0", "q_proj", "out_proj")


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux"])
def test_a_file_of_diffusers_draws_what_diffusers_draws(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    layers = {path: lora(m, seed=i) for i, (path, m) in enumerate(find(made[kind], *ATTENTION).items())}
    file = write_tensors(tmp_path / "their.safetensors", *diffusers(layers))
    want = by_diffusers(made[kind], file)
    np.testing.assert_allclose(with_file(made[kind], file), want, atol=1e-4)
    np.testing.assert_allclose(by_formula(made[kind], layers), want, atol=1e-4)
    assert np.abs(want - picture(load_pipeline(made[kind]))).max() > 0.01


def test_a_file_of_kohya_draws_what_diffusers_draws(made: dict[str, Path], tmp_path: Path) -> None:
    modules = find(made["sd1"], *ATTENTION, "conv1", "time_emb_proj", "ff.net.0.proj")
    layers = {path: lora(m, seed=i) for i, (path, m) in enumerate(modules.items())}
    file = write_tensors(tmp_path / "their.safetensors", kohya(layers))
    want = by_diffusers(made["sd1"], file)
    np.testing.assert_allclose(with_file(made["sd1"], file), want, atol=1e-4)
    assert np.abs(want - picture(load_pipeline(made["sd1"]))).max() > 0.01


def test_a_folder_of_peft_is_an_adapter_at_any_strength(made: dict[str, Path], tmp_path: Path) -> None:
    """`adapter_model.safetensors` with its config beside; half of it is the formula with half of alpha."""
    modules = find(made["sd1"], "to_q")
    modules = {path: m for path, m in modules.items() if path.startswith("unet.")}
    layers = {path: lora(m, alpha=3.0, seed=i) for i, (path, m) in enumerate(modules.items())}
    named = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    tensors = {f"base_model.model.{path.removeprefix('unet.')}.{n}": la[t]
               for path, la in layers.items() for n, t in named.items()}  # fmt: skip
    folder = tmp_path / "dog"
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 3, "target_modules": ["to_q"]}))
    pipe = load_pipeline(made["sd1"])
    shelf = Shelf(pipe, read_adapters([str(folder)]))
    row = shelf.row([Use("dog", 0.5)])
    half = {path: {**la, "alpha": torch.tensor(1.5)} for path, la in layers.items()}
    with torch.no_grad(), vm.route(shelf.models, [row]):
        np.testing.assert_allclose(picture(pipe), by_formula(made["sd1"], half), atol=1e-4)


def test_a_file_of_kohya_for_sdxl_draws_what_diffusers_draws(made: dict[str, Path], tmp_path: Path) -> None:
    pipe = load_pipeline(made["sdxl"])
    modules = {p: getattr(pipe, p.partition(".")[0]).get_submodule(p.partition(".")[2]) for p in XL}
    layers = {path: lora(m, seed=i) for i, (path, m) in enumerate(modules.items())}
    file = write_tensors(tmp_path / "their.safetensors", kohya(layers, XL))
    ours = with_file(made["sdxl"], file)
    np.testing.assert_allclose(ours, by_formula(made["sdxl"], layers), atol=1e-4)
    np.testing.assert_allclose(ours, by_diffusers(made["sdxl"], file), atol=1e-4)


# of the tiny Flux and SD3, by the names of their original form: q, k and v are rows of one matrix
ONE = "transformer.transformer_blocks.0"
ALL = "transformer.single_transformer_blocks.0"
FUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "flux": {
        "double_blocks_0_img_attn_qkv": (f"{ONE}.attn.to_q", f"{ONE}.attn.to_k", f"{ONE}.attn.to_v"),
        "double_blocks_0_txt_attn_proj": (f"{ONE}.attn.to_add_out",),
        "single_blocks_0_linear1": (f"{ALL}.attn.to_q", f"{ALL}.attn.to_k", f"{ALL}.attn.to_v", f"{ALL}.proj_mlp"),
    },
    "sd3": {
        "joint_blocks_0_x_block_attn2_qkv": (f"{ONE}.attn2.to_q", f"{ONE}.attn2.to_k", f"{ONE}.attn2.to_v"),
        "joint_blocks_0_context_block_mlp_fc1": (f"{ONE}.ff_context.net.0.proj",),
    },
}


@pytest.mark.parametrize("kind", FUSED)
def test_a_file_of_kohya_for_sd3_and_flux_is_split_by_rows(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    transformer = load_pipeline(made[kind]).transformer
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Layer] = {}
    for i, (stem, paths) in enumerate(FUSED[kind].items()):
        weights = [transformer.get_submodule(path.removeprefix("transformer.")).weight for path in paths]
        whole = nn.Linear(weights[0].shape[1], sum(map(len, weights)))
        layer = lora(whole, alpha=(1.0, 5.0, 2.0)[i], seed=i)
        tensors |= {f"lora_unet_{stem}.{suffix}": t for suffix, t in layer.items()}
        ups = layer["lora_up.weight"].split([len(W) for W in weights])
        layers |= {path: {**layer, "lora_up.weight": up} for path, up in zip(paths, ups, strict=True)}
    file = write_tensors(tmp_path / "their.safetensors", tensors)
    ours = with_file(made[kind], file)
    np.testing.assert_allclose(ours, by_formula(made[kind], layers), atol=1e-4)
    assert np.abs(ours - picture(load_pipeline(made[kind]))).max() > 0.01
    if kind == "flux":  # diffusers knows linear1 of the published size alone
        part = {key: t for key, t in tensors.items() if "linear1" not in key}
        file = write_tensors(tmp_path / "part.safetensors", part)
        np.testing.assert_allclose(with_file(made[kind], file), by_diffusers(made[kind], file), atol=1e-4)


def others(modules: dict[str, nn.Module], method: str) -> dict[str, Layer]:
    """Layers of methods that diffusers does not read, or reads as something else."""
    layers: dict[str, Layer] = {}
    for i, (path, m) in enumerate(modules.items()):
        out, inn, *_ = m.weight.shape
        columns = m.weight[0].numel()
        match method:
            case "per-module alpha":
                layers[path] = lora(m, alpha=(1.0, 2.0, 4.0)[i % 3], seed=i)
            case "DoRA":
                norm = m.weight.detach().flatten(1).norm(dim=1) * (1 + draw(out, seed=i + 9).abs())
                layers[path] = {**lora(m, seed=i), "dora_scale": norm.view(-1, *[1] * (m.weight.dim() - 1))}
            case "LoHa":
                shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, columns), "hada_w2_a": (out, 2),
                          "hada_w2_b": (2, columns)}  # fmt: skip
                layers[path] = {n: 2 * draw(*s, seed=i + j) for j, (n, s) in enumerate(shapes.items())}
                layers[path]["alpha"] = torch.tensor(1.0)
            case "LoKr":
                w2 = draw(out // 2, inn // 2, *m.weight.shape[2:], seed=i + 5)
                layers[path] = {"lokr_w1": 2 * draw(2, 2, seed=i), "lokr_w2": w2, "alpha": torch.tensor(1.0)}
            case "OFT":
                layers[path] = {"oft_blocks": draw(out // 2, 2, 2, seed=i), "alpha": torch.tensor(0.0)}
            case "full":
                layers[path] = {"diff": draw(*m.weight.shape, seed=i)}
    return layers


@pytest.mark.parametrize("method", ["per-module alpha", "DoRA", "LoHa", "LoKr", "OFT", "full"])
def test_what_diffusers_reads_wrongly_is_what_the_file_says(made: dict[str, Path], method: str, tmp_path: Path) -> None:
    modules = find(made["sd1"], "to_q", "to_out.0", "resnets.0.conv1", "q_proj")
    layers = others(modules, method)
    file = write_tensors(tmp_path / "their.safetensors", kohya(layers))
    want = by_formula(made["sd1"], layers)
    np.testing.assert_allclose(with_file(made["sd1"], file), want, atol=1e-4)
    assert np.abs(want - picture(load_pipeline(made["sd1"]))).max() > 0.01
    with warnings.catch_warnings(), contextlib.suppress(ValueError, KeyError, RuntimeError):
        warnings.simplefilter("ignore")  # it only warns where it drops a layer's own alpha
        assert np.abs(by_diffusers(made["sd1"], file) - want).max() > 1e-3, "diffusers reads it now: compare with that"


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_our_own_files_for_sd3_and_flux_go_through_every_format(
    made: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    pipe, base = load_pipeline(made[kind]), base_of(made[kind])
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    methods = [vm.LoRA(sites=("attn.*", "mlp.*", "time"), rank=2, alpha=3, where="transformer.*"),
               vm.LoRA(sites=("attn.*",), rank=3, where="text_encoder.*")]  # fmt: skip
    adapter = vm.adapt(parts, methods, "a", seed=0)
    shake(adapter, 0.3)
    live = picture(pipe)
    contents = read_file(vm.save(adapter, tmp_path / "ours.safetensors"), base)
    assert contents.layers.keys() == contents_of(adapter).layers.keys()
    alone = vm.adapt(load_pipeline(made[kind]).transformer, vm.LoRA(sites=("attn.*",)), "alone")  # without prefixes
    bare = read_file(vm.save(alone, tmp_path / "alone.safetensors"), base).layers
    assert bare.keys() == contents_of(alone).layers.keys() <= contents.layers.keys()
    theirs = write_file(contents, "diffusers", tmp_path / "diffusers.safetensors")
    np.testing.assert_allclose(by_diffusers(made[kind], theirs), live, atol=1e-4)
    flat = write_file(contents, "kohya", tmp_path / "kohya.safetensors", base)
    assert kohya_keys(flat) and dict(inspect(flat).facts)["base"] in ("Stable Diffusion 3", "Flux.1")
    for file in (theirs, flat):
        np.testing.assert_allclose(with_file(made[kind], file), live, atol=1e-4)
        dead = kind == "sd3" and file == flat  # the last block's queries of the text, rows of one matrix with k and v
        with pytest.warns(UserWarning, match="add_q_proj, left out") if dead else contextlib.nullcontext():
            back = write_file(read_file(file), "vismodal", tmp_path / "back.safetensors", base)
        np.testing.assert_allclose(with_file(made[kind], back), live, atol=1e-4)


def kohya_keys(file: Path) -> bool:
    """All of the original form, where q, k and v are one."""
    keys = read_tensors(file)[0]
    return all(key.startswith(("lora_unet_", "lora_te1_text_model_")) for key in keys) and not any(
        "to_q" in key or "transformer_blocks" in key for key in keys
    )


def test_names_of_sdxl_are_counted_by_the_pipelines_own_blocks(tmp_path: Path) -> None:
    """A UNet of one residual block a level, as `layers_per_block` says."""
    tiny_kind("sdxl", tmp_path / "model")
    names = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q":
            "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "unet.up_blocks.1.attentions.1.proj_in": "unet.output_blocks.3.1.proj_in",
    }  # fmt: skip
    unet = load_pipeline(tmp_path / "model").unet
    layers = {p: lora(unet.get_submodule(p.removeprefix("unet.")), seed=i) for i, p in enumerate(names)}
    file = write_tensors(tmp_path / "their.safetensors", kohya(layers, names))
    want = by_formula(tmp_path / "model", layers)
    np.testing.assert_allclose(with_file(tmp_path / "model", file), want, atol=1e-4)


def test_a_bundle_of_kohya_draws_what_diffusers_draws_from_its_two_parts(made: dict[str, Path], tmp_path: Path) -> None:
    """A LoRA and a word of two vectors, which stands in the prompt; and the word alone, named by its file."""
    layers = {path: lora(m, seed=i) for i, (path, m) in enumerate(find(made["sd1"], *ATTENTION).items())}
    rows, theirs = draw(2, 16), load_pipeline(made["sd1"])
    alone = write_tensors(tmp_path / "qqdog.safetensors", {"emb_params": rows})
    bundle = {**kohya(layers), "bundle_emb.qqdog.emb_params": rows}
    theirs.load_textual_inversion({"qqdog": rows})
    for name, file in {"qqdog": alone, "bundle": write_tensors(tmp_path / "bundle.safetensors", bundle)}.items():
        if name == "bundle":
            theirs.load_lora_weights(str(write_tensors(tmp_path / "lora.safetensors", kohya(layers))))
        pipe = load_pipeline(made["sd1"])
        shelf = Shelf(pipe, read_adapters([str(file)]))
        row = shelf.row([Use(name)])
        with torch.no_grad(), vm.route(shelf.models, [row]):
            ours = picture(pipe, shelf.spell("a photo of qqdog", [Use(name)]))
        np.testing.assert_allclose(ours, picture(theirs, "a photo of qqdog"), atol=1e-4)


# -- what cannot be said -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_an_error(made: dict[str, Path], tmp_path: Path) -> None:
    """Before anything is drawn: another base, T5, factors and magnitudes that no method here has."""
    path, module = next(iter(find(made["sd1"], "attn2.to_q").items()))
    layer = lora(module)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    other = {f"{stem}.{n}": t for n, t in lora(nn.Linear(7, 5)).items()}
    loha = {f"{stem}.{n}": t for n, t in others({path: module}, "LoHa")[path].items()}
    wrong = {
        "the base model has no unet.up_blocks.3.proj_in": {"lora_unet_up_blocks_3_proj_in.lora_down.weight": draw(1, 2),
                                                           "lora_unet_up_blocks_3_proj_in.lora_up.weight": draw(2, 1)},
        "is 32x32 in the base model and 5x7 in the file": other,
        "it adapts 'transformer'; the model has unet, text_encoder":
            {f"lora_unet_double_blocks_0_img_attn_proj.{n}": t for n, t in layer.items()},
        "it adapts 'text_encoder_2'":
            {f"lora_te2_text_model_encoder_layers_0_mlp_fc1.{n}": t for n, t in layer.items()},
        "not known here: lora_te3_encoder.* is T5": {f"lora_te3_encoder_block_0.{n}": t for n, t in layer.items()},
        "LoHa with DoRA's magnitudes, which is no method": {**loha, f"{stem}.dora_scale": draw(32, 1)},
    }  # fmt: skip
    for i, (why, tensors) in enumerate(wrong.items()):
        file = write_tensors(tmp_path / f"{i}" / "dog.safetensors", tensors)
        with pytest.raises(InputError, match=f"dog.safetensors: .*{why}"):
            with_file(made["sd1"], file)


def test_the_command_draws_and_draws_again(made: dict[str, Path], tmp_path: Path) -> None:
    """From the command line, with a tag of its own strength; the picture knows the file by its digest."""
    layers = {path: lora(m, seed=i) for i, (path, m) in enumerate(find(made["sd1"], "to_q").items())}
    file = write_tensors(tmp_path / "dog.safetensors", kohya(layers), {"modelspec.trigger_phrase": "sks dog"})
    line = ["generate", "a cat <lora:dog:0.5>", "a cat", "--strengths", "0", "--adapters", str(file), "--seeds", "3"]
    line += ["--model", str(made["sd1"]), "--steps", "2", "--guidance", "3", "--output"]
    assert cli.main([*line, str(tmp_path / "out")]) == 0
    pictures = [np.asarray(Image.open(tmp_path / "out" / f"000{i}.png")).astype(int) for i in (0, 1)]
    assert np.abs(pictures[0] - pictures[1]).max() > 1
    assert (
        cli.main(["generate", "--like", str(tmp_path / "out" / "0000.png"), "--output", str(tmp_path / "again")]) == 0
    )
    again = np.asarray(Image.open(tmp_path / "again" / "0000.png")).astype(int)
    assert np.abs(again - pictures[0]).max() <= 1


# -- tools -------------------------------------------------------------------------------------------------------------


def test_the_tools_read_them_too(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bake, merge, resize and inspect of a file of kohya: the weights are those of the formula."""
    modules = find(made["sd1"], "to_q", "resnets.0.conv1")
    layers = {path: lora(m, alpha=1.0, seed=i) for i, (path, m) in enumerate(modules.items())}
    dora = others(modules, "DoRA")
    one = str(write_tensors(tmp_path / "one.safetensors", kohya(layers), {"ss_steps": "400"}))
    two = str(write_tensors(tmp_path / "two.safetensors", kohya(dora)))
    base, out = str(made["sd1"]), tmp_path / "out.safetensors"

    def weights(folder: str | Path) -> dict[str, Tensor]:
        unet = load_pipeline(folder).unet
        return {path: unet.get_submodule(path.partition(".")[2]).weight.detach().double() for path in modules}

    W = weights(base)
    want = {
        "bake": {path: changed(changed(W[path], layers[path]), dora[path]) for path in W},
        "merge": {p: W[p] + 0.7 * (changed(W[p], layers[p]) - W[p]) + 0.3 * (changed(W[p], dora[p]) - W[p]) for p in W},
    }
    assert cli.main(["bake", one, two, "--model", base, "--out", str(tmp_path / "baked")]) == 0
    merging = ["merge", one, two, "--weights", "0.7", "0.3", "--rank", "40", "--model", base, "--out", str(out)]
    assert cli.main(merging) == 0
    assert cli.main(["bake", str(out), "--model", base, "--out", str(tmp_path / "merged")]) == 0
    for folder, what in (("baked", "bake"), ("merged", "merge")):
        for path, value in weights(tmp_path / folder).items():
            torch.testing.assert_close(value, want[what][path], atol=1e-5, rtol=1e-4)
    small = tmp_path / "small.safetensors"
    assert cli.main(["resize", one, "--rank", "1", "--base", base, "--out", str(small)]) == 0
    assert cli.main(["bake", str(small), "--model", base, "--out", str(tmp_path / "resized")]) == 0
    for path, value in weights(tmp_path / "resized").items():
        U, S, V = torch.linalg.svd((changed(W[path], layers[path]) - W[path]).flatten(1), full_matrices=False)
        best = (S[0] * torch.outer(U[:, 0], V[0])).view_as(value)
        torch.testing.assert_close(value - W[path], best, atol=1e-4, rtol=1e-3)
    assert dict(inspect(one).facts)["format"] == "kohya" and dict(inspect(small).facts)["ss_steps"] == "400"
    capsys.readouterr()
    assert cli.main(["resize", one, "--rank", "1", "--out", str(small)]) == 2
    assert "does not tell what it is for" in capsys.readouterr().err
