"""`vismodal convert` and `vismodal inspect`: from the command line and from Python, what they write, say and refuse."""

import json

import pytest
import torch

from vismodal import cli
from vismodal.files import write_tensors
from vismodal.formats import peft
from vismodal.formats.files import read_file, read_tensors

TO_K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def lora(tmp_path):
    """SDXL's, as diffusers writes it: rank 4, alpha 2."""
    tensors = {f"{TO_K}.lora_A.weight": torch.randn(4, 2048), f"{TO_K}.lora_B.weight": torch.randn(640, 4)}
    settings = {"unet.r": 4, "unet.lora_alpha": 2, "unet.rank_pattern": {}, "unet.alpha_pattern": {}}
    header = {peft.METADATA: json.dumps(settings), "modelspec.trigger_phrase": "sks dog"}
    return write_tensors(tmp_path / "lora.safetensors", tensors, header)


def told(capsys, *arguments) -> str:
    assert cli.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    assert cli.main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


def test_convert_and_back(lora, tmp_path, capsys):
    out = tmp_path / "new" / "webui.safetensors"
    said = told(capsys, "convert", lora, "--to", "kohya", "--out", out)
    assert str(out) in said and "sks dog" in said and "Stable Diffusion XL" in said
    tensors, header = read_tensors(out)
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    assert tensors.keys() == {f"{stem}.{s}" for s in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert tensors[f"{stem}.alpha"] == 2 and header["ss_base_model_version"] == "sdxl_base_v1-0"
    back = tmp_path / "back.safetensors"
    told(capsys, "convert", out, "--to=diffusers", "--out", back)
    first, second = read_tensors(lora), read_tensors(back)
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(t, second[0][k]) for k, t in first[0].items())
    assert json.loads(second[1][peft.METADATA])["unet.lora_alpha"] == 2
    python = cli.load_pipeline("convert")
    made = python.main(python.Config(files=(lora,), to="kohya", out=tmp_path / "python.safetensors"))
    assert read_tensors(made)[1] == header
    assert all(torch.equal(t, tensors[k]) for k, t in read_tensors(made)[0].items())


def test_a_file_without_alpha_is_said_to_be_taken_at_strength_one(tmp_path, capsys):
    bare = write_tensors(
        tmp_path / "bare.safetensors",
        {f"{TO_K}.lora_A.weight": torch.ones(4, 2048), f"{TO_K}.lora_B.weight": torch.ones(640, 4)},
    )
    assert cli.main(["convert", str(bare), "--to", "kohya", "--out", str(tmp_path / "x.safetensors")]) == 0
    assert "note: the header says no alpha" in capsys.readouterr().err


def test_tokens_and_bundles(lora, tmp_path, capsys):
    token = write_tensors(tmp_path / "sks.safetensors", {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)})
    both = tmp_path / "both.safetensors"
    said = told(capsys, "convert", lora, token, "--to", "kohya", "--out", both)
    assert "token sks" in said
    assert {"bundle_emb.sks.clip_l", "bundle_emb.sks.clip_g"} <= read_tensors(both)[0].keys()
    again = tmp_path / "again.safetensors"
    assert "--only adapter" in refused(capsys, "convert", both, "--to", "diffusers", "--out", again)
    told(capsys, "convert", both, "--only", "adapter", "--to", "diffusers", "--out", again)
    assert read_tensors(again)[0].keys() == read_tensors(lora)[0].keys()
    told(capsys, "convert", both, "--only", "tokens", "--to", "diffusers", "--out", again, "--force")
    assert read_file(again, token="x").tokens["x"].keys() == {"text_encoder", "text_encoder_2"}
    assert "two of the files are adapters" in refused(
        capsys, "convert", lora, both, "--to", "kohya", "--out", "x.safetensors"
    )
    assert "one name in two files: sks" in refused(
        capsys, "convert", both, token, "--to", "kohya", "--out", "x.safetensors"
    )
    assert "holds no tokens" in refused(
        capsys, "convert", lora, "--only", "tokens", "--to", "kohya", "--out", "x.safetensors"
    )


def test_inspect_prints_tables_and_json(lora, capsys):
    said = told(capsys, "inspect", lora)
    for line in ("format", "diffusers", "LoRA (1)", "xattn.k (1)", "Stable Diffusion XL", "sks dog", "float32 (2)"):
        assert line in said
    found = json.loads(told(capsys, "inspect", "--json", lora, lora))[str(lora)]
    assert (found["rank"], found["alpha"], found["warnings"]) == ("4 (1)", "2 (1)", [])
    assert found["parameters"] == f"{4 * 2048 + 640 * 4:,}"


def test_what_they_refuse(lora, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    assert "write --to diffusers, kohya, lycoris, vismodal" in refused(capsys, "convert", lora, "--out", out)
    assert "--out FILE.safetensors" in refused(capsys, "convert", lora, "--to", "kohya")
    assert "no file; write" in refused(capsys, "convert", "--to", "kohya", "--out", out)
    assert "is there already" in refused(capsys, "convert", lora, "--to", "kohya", "--out", lora)
    assert "no file" in refused(capsys, "convert", tmp_path / "none.safetensors", "--to", "kohya", "--out", out)
    assert "no base model nowhere" in refused(
        capsys, "convert", lora, "--to", "kohya", "--out", out, "--base", "nowhere"
    )
    assert "no file" in refused(capsys, "inspect", tmp_path / "none.safetensors")
    assert "no file; write one" in refused(capsys, "inspect")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    assert "no whole safetensors file" in refused(capsys, "inspect", tmp_path / "broken.safetensors")
    assert not out.exists()
