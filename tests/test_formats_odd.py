"""Files as people have them: of ComfyUI, parts that share a factor, broken headers, words that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from their_files import by_diffusers, by_formula, diffusers, draw, kohya, lora
from tiny_diffusion import tiny_kind, tiny_pipeline
from torch import Tensor, nn

import vismodal as vm
from vismodal import cli
from vismodal.diffusion.adapters import Shelf, Use, read_adapters
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.requests import Manner, Request, parse_prompt
from vismodal.diffusion.requests import draw as drawn
from vismodal.errors import InputError
from vismodal.files import write_tensors
from vismodal.formats import peft
from vismodal.formats.bases import base_of
from vismodal.formats.files import read_file, read_tensors, write_file
from vismodal.formats.summary import inspect

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline(folder / "sd1")
    for kind in ("sd3", "flux"):
        tiny_kind(kind, folder / kind)
    return {kind: folder / kind for kind in ("sd1", "sd3", "flux")}


FUSED = {"double_blocks.0.img_attn.qkv": 3, "single_blocks.0.linear1": 7}  # rows of Flux's matrices, by width


def fused() -> dict[str, Tensor]:
    """LoRA on q, k and v as one, as trained: one A, and B of no zeros."""
    return {
        f"{name}.{end}": tensor
        for i, (name, rows) in enumerate(FUSED.items())
        for end, tensor in lora(nn.Linear(24, 24 * rows), seed=i).items()
    }


def from_command(*line: object) -> int:
    return cli.main([str(word) for word in line])


def test_one_factor_of_q_k_and_v_goes_into_every_format_and_back(made: dict[str, Path], tmp_path: Path) -> None:
    theirs = {f"lora_unet_{key.partition('.lora')[0].partition('.alpha')[0]}": key for key in fused()}
    flat = {f"{stem.replace('.', '_')}{key.removeprefix(stem.removeprefix('lora_unet_'))}": fused()[key]
            for stem, all_keys in {s: [k for k in fused() if f"lora_unet_{k}".startswith(s)] for s in theirs}.items()
            for key in all_keys}  # fmt: skip
    file = write_tensors(tmp_path / "kohya.safetensors", flat)
    layers = read_file(file).layers
    for to in ("diffusers", "lycoris", "vismodal", "kohya"):
        out = write_file(read_file(file), to, tmp_path / f"{to}-again.safetensors", base_of(made["flux"]))
        back = write_file(
            read_file(out, base_of(made["flux"])), "kohya", tmp_path / "back.safetensors", base_of("flux")
        )
        again, header = read_tensors(back)
        assert again.keys() == flat.keys() and header["ss_network_dim"] == "2", "no rank is written thrice"
        for key in flat:
            torch.testing.assert_close(again[key], flat[key], rtol=1e-6, atol=0)
    want = by_formula(made["flux"], layers)
    np.testing.assert_allclose(by_diffusers(made["flux"], tmp_path / "diffusers-again.safetensors"), want, atol=1e-4)


@pytest.mark.parametrize("head", ["diffusion_model.", ""])
def test_files_of_comfyui_are_kohyas_with_dots(head: str, tmp_path: Path) -> None:
    named = {"lora_down": "lora_A", "lora_up": "lora_B"}
    stems = {key: key.partition(".lora")[0].partition(".alpha")[0] for key in fused()}
    flat = {f"lora_unet_{stems[k].replace('.', '_')}{k.removeprefix(stems[k])}": t for k, t in fused().items()}
    dotted = {f"{head}{k}".replace("lora_down", named["lora_down"]).replace("lora_up", named["lora_up"]): t
              for k, t in fused().items()}  # fmt: skip
    ours = read_file(write_tensors(tmp_path / "comfy.safetensors", dotted))
    theirs = read_file(write_tensors(tmp_path / "kohya.safetensors", flat))
    assert ours.format == "comfyui" and ours.kind == "flux" and ours.layers.keys() == theirs.layers.keys()
    for module, layer in theirs.layers.items():
        assert all(torch.equal(t, ours.layers[module][name]) for name, t in layer.items())
    other = write_tensors(
        tmp_path / "wan.safetensors", {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": draw(1, 2)}
    )
    with pytest.raises(InputError, match=r"wan.*diffusion_model.* is of another model than Flux"):
        read_file(other)


def test_comfyuis_names_of_a_unet_do_not_say_which(tmp_path: Path) -> None:
    stem = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    layer = lora(nn.Linear(768, 320))
    contents = read_file(write_tensors(tmp_path / "a.safetensors", {f"{stem}.{n}": t for n, t in layer.items()}))
    assert list(contents.layers) == ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert dict(inspect(tmp_path / "a.safetensors").facts)["base"] == "Stable Diffusion 1"


def test_what_nothing_reads_is_told_by_convert_and_the_tools(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = load_pipeline(made["sd3"]).transformer.transformer_blocks
    layers = {f"transformer.transformer_blocks.{i}.attn.add_q_proj": lora(b.attn.add_q_proj)
              for i, b in enumerate(blocks)}  # fmt: skip
    file = write_tensors(tmp_path / "their.safetensors", *diffusers(layers))
    with pytest.warns(UserWarning, match=r"nothing in the model reads .*blocks\.1\.attn\.add_q_proj, left out"):
        write_file(read_file(file), "vismodal", tmp_path / "ours.safetensors", base_of(made["sd3"]))
    with pytest.warns(UserWarning, match=r"nothing in the model reads .*blocks\.1\.attn\.add_q_proj, left out"):
        from_command("resize", file, "--rank", "1", "--base", made["sd3"], "--out", tmp_path / "small.safetensors")


def test_broken_files_are_told_and_not_written(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = {path: lora(nn.Linear(32, 32))}
    theirs, said = diffusers(layer)
    settings = {k: v for k, v in json.loads(said[peft.METADATA]).items() if not k.endswith("alpha_pattern")}
    flat = kohya(layer)
    own = {"vismodal": "1", "base": "{}"}
    pattern = {"unet.alpha_pattern": {"(": 1}}
    wrong: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
        "no mapping of settings": (theirs, {peft.METADATA: "[]"}),
        "does not tell the alpha": (theirs, {peft.METADATA: json.dumps(settings | {"unet.lora_alpha": "x"})}),
        "does not tell the alpha of": (theirs, {peft.METADATA: json.dumps(settings | pattern)}),
        "vismodal is broken": (theirs, own | {"methods": "[]"}),
        "vismodal is broken: ": (theirs, {"vismodal": "1"}),
        "is broken": (theirs, own | {"methods": "{}", "base": '{"": 3}'}),
        "an alpha of 2 numbers": ({k: torch.ones(2) if "alpha" in k else t for k, t in flat.items()}, {}),
        "which are no product": ({k: t[:1].clone() if "lora_down" in k else t for k, t in flat.items()}, {}),
    }  # fmt: skip
    for i, (why, (tensors, header)) in enumerate(wrong.items()):
        file = write_tensors(tmp_path / f"{i}.safetensors", tensors, header)
        out = tmp_path / "out.safetensors"
        for line in (("convert", file, "--to", "kohya", "--base", made["sd1"], "--out", out), ("inspect", file)):
            assert from_command(*line) == 2
            assert why in capsys.readouterr().err, line
        assert not out.exists()


def test_words_that_do_not_fit_are_named(made: dict[str, Path], tmp_path: Path) -> None:
    pipe = load_pipeline(made["sd1"])

    def shelved(name: str, **rows: Tensor) -> None:
        file = write_tensors(tmp_path / f"{name}.safetensors", {k.replace("_of_", "."): t for k, t in rows.items()})
        Shelf(pipe, read_adapters([str(file)])).row([Use(name)])

    with pytest.raises(InputError, match=r"'my dog' has spaces.*NAME=FILE"):
        shelved("my dog", emb_params=draw(2, 16))
    with pytest.raises(InputError, match="'rr' has 24 channels, and the model's text_encoder 16"):
        shelved("two", bundle_emb_of_qq_of_emb_params=draw(1, 16), bundle_emb_of_rr_of_emb_params=draw(1, 24))
    torch.save({"string_to_param": {"*": draw(1, 16)}}, tmp_path / "word.pt")
    with pytest.raises(InputError, match=r"word.pt is a pickle.*write vismodal convert"):
        read_adapters([str(tmp_path / "word.pt")])


def test_token_chooses_and_names(tmp_path: Path) -> None:
    file = write_tensors(tmp_path / "two.safetensors", {"<a>": draw(16), "<b>": draw(2, 16)})
    one = write_tensors(tmp_path / "one.safetensors", {"<a>": draw(16)})
    out = tmp_path / "out.safetensors"
    assert from_command("convert", file, "--to", "kohya", "--token", "<b>", "--out", out) == 0
    assert torch.equal(read_tensors(out)[0]["emb_params"], draw(2, 16))
    assert list(read_file(one, token="<z>").tokens) == ["<z>"]
    with pytest.raises(InputError, match="no token 'c'; write --token with one of <a>, <b>"):
        read_file(file, token="c")


def test_words_in_the_negative_prompt_are_those_of_the_row(made: dict[str, Path], tmp_path: Path) -> None:
    pipe, rows = load_pipeline(made["sd1"]), 3 * draw(1, 16)
    shelf = Shelf(pipe, read_adapters([str(write_tensors(tmp_path / "qqz.safetensors", {"emb_params": rows}))]))
    requests = [Request("a dog", 1), Request("a dog", 1, (Use("qqz"),))]
    ours = [np.asarray(image) for image in drawn(pipe, shelf, requests, Manner(16, 2, 6.0, "qqz"))]
    plain = load_pipeline(made["sd1"])
    plain.load_textual_inversion({"qqz": rows})
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 6.0}
    theirs = plain("a dog", negative_prompt="qqz", generator=torch.Generator().manual_seed(1), **options).images[0]
    assert np.abs(ours[1].astype(int) - np.asarray(theirs)).max() <= 1
    assert np.abs(ours[1].astype(int) - ours[0]).max() > 1


# -- vismodal generate -------------------------------------------------------------------------------------------------


def test_tags_of_other_spelling_are_errors_and_none_is_no_name(tmp_path: Path) -> None:
    for text in ("a dog <LORA:x:0.5>", "a dog <lyco:x>", "a dog < lora:x>", "a dog <hypernet:x:1>"):
        with pytest.raises(InputError, match=r"the tag in .* is not whole; write <lora:NAME>"):
            parse_prompt(text, [])
    file = write_tensors(tmp_path / "none.safetensors", {"emb_params": draw(1, 16)})
    with pytest.raises(InputError, match=r"called none.*write NAME="):
        read_adapters([str(file)])


def test_like_knows_one_file_twice_and_folders_of_diffusers(made: dict[str, Path], tmp_path: Path) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    write_tensors(tmp_path / "run" / peft.FILE, *diffusers({path: lora(nn.Linear(32, 32))}))
    line = ["generate", "a dog", "--adapters", f"a={tmp_path / 'run'}", f"b={tmp_path / 'run'}", "--seeds", "1"]
    line += ["--strengths", "0.3", "0.7", "--model", made["sd1"], "--steps", "1", "--output", tmp_path / "one"]
    assert from_command(*line) == 0
    like = tmp_path / "one" / "0000.png"
    assert from_command("generate", "--like", like, "--output", tmp_path / "two") == 0
    assert (tmp_path / "two" / "0000.png").read_bytes() == like.read_bytes()


def test_a_picture_at_home_steers_and_only_one_may(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = load_pipeline(made["sd1"])
    adapter = vm.adapt(pipe.unet, vm.T2IAdapter(factor=pipe.vae_scale_factor), name="edges", seed=0)
    file = vm.save(adapter, tmp_path / "edges.safetensors", {"control": "edges"})
    for name in ("ü 1.png", "2.png"):
        Image.effect_noise((20, 20), 60).convert("RGB").save(tmp_path / name)
    line = ["generate", "a dog", "--adapters", file, "--model", made["sd1"], "--steps", "1", "--seeds", "1"]
    assert from_command(*line, "--conditions", "~/ü 1.png", "--output", tmp_path / "one") == 0
    like = tmp_path / "one" / "0000.png"
    assert from_command("generate", "--like", like, "--output", tmp_path / "two") == 0
    assert (tmp_path / "two" / "0000.png").read_bytes() == like.read_bytes()
    capsys.readouterr()
    assert from_command(*line, "--conditions", "~/ü 1.png", tmp_path / "2.png", "--output", tmp_path / "three") == 2
    assert "edges is steered by" in capsys.readouterr().err and not (tmp_path / "three").exists()
