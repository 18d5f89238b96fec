"""Adapter files of other tools. diffusers: plain `pipe.load_lora_weights` gives the live adapter's images."""

import json

import numpy as np
import pytest
import torch
from tiny_diffusion import tiny_pipeline

import vismodal as vm
from vismodal.diffusion.exports import write_lora
from vismodal.errors import InputError
from vismodal.formats import own, peft
from vismodal.formats.files import layers_of, read_tensors

DIFFUSERS = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny pipeline."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(folder)
    return folder


def load(folder):
    pipe = DIFFUSERS.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe) -> np.ndarray:
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return pipe("a photo of sks dog", generator=torch.Generator().manual_seed(0), **options).images[0]


def randomise(adapter, size=0.3) -> None:
    """LoRA starts with B = 0; random factors make every layer count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def export(adapter, folder):
    path = write_lora(adapter, folder / peft.FILE)
    return path, read_tensors(path)[1]


UNET = {"where": "unet.*"}
TEXT = {"where": "text_encoder.*"}
CASES = {
    "attention": [vm.LoRA(sites=("attn.*", "xattn.*"), rank=4, **UNET)],
    "alpha below rank": [vm.LoRA(sites=("attn.*", "xattn.*"), rank=4, alpha=1, **UNET)],
    "rank-stabilised": [vm.LoRA(sites=("attn.q",), rank=3, alpha=5, rank_stabilised=True, **UNET)],
    "text encoder too": [
        vm.LoRA(sites=("attn.*",), rank=4, alpha=2, **UNET),
        vm.LoRA(sites=("attn.*", "mlp.*"), rank=2, alpha=6, **TEXT),
    ],
    "text encoder alone": [vm.LoRA(sites=("attn.q",), rank=2, alpha=1, **TEXT)],
    "ranks that differ": [vm.LoRA(sites=("attn.*", "mlp.down"), rank=4, alpha=4, ranks={"mlp.down": 2}, **UNET)],
    "both halves of GEGLU": [vm.LoRA(sites=("mlp.*",), rank=3, alpha=2, **UNET)],
    "one half of GEGLU": [vm.LoRA(sites=("mlp.gate",), rank=3, alpha=2, **UNET)],
    "halves that differ": [vm.LoRA(sites=("mlp.up", "mlp.gate"), rank=3, alpha=6, ranks={"mlp.up": 2}, **UNET)],
    "convolutions": [vm.LoRA(sites=("conv", "time", "proj.*"), rank=2, alpha=1, **UNET)],
}


@pytest.mark.parametrize("case", CASES)
def test_diffusers_draws_the_same_image(model, tmp_path, case):
    pipe = load(model)
    methods = CASES[case]
    text = any(method.where == TEXT["where"] for method in methods)
    models = {"unet": pipe.unet} if not text else {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = vm.adapt(models, methods, seed=0)
    before = picture(pipe)
    randomise(adapter)
    live = picture(pipe)
    assert np.abs(live - before).max() > 0.01, "the adapter does nothing: the test would prove nothing"
    path, header = export(adapter, tmp_path)
    assert header["format"] == "pt"

    plain = load(model)
    plain.load_lora_weights(str(path.parent), weight_name=path.name)
    np.testing.assert_allclose(picture(plain), live, atol=2e-5)
    loaded = sum(p.numel() for m in (plain.unet, plain.text_encoder) for n, p in m.named_parameters() if "lora" in n)
    if "GEGLU" not in case and "halves" not in case:  # a half is padded with zeros to the whole
        assert loaded == adapter.num_parameters


def test_header_covers_every_component_and_keys_have_text_model_once(model):
    pipe = load(model)
    adapter = vm.adapt({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, vm.LoRA(sites=("attn.q",), alpha=16))
    tensors, header = peft.write(layers_of(adapter))
    settings = json.loads(header["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["text_encoder.r"] == 8
    assert settings["unet.lora_alpha"] == settings["text_encoder.lora_alpha"] == 16
    text = [key for key in tensors if key.startswith("text_encoder.")]
    assert text and all(key.startswith("text_encoder.text_model.encoder.") for key in text)
    # a model of before transformers 5, or with a projection, has the prefix in its own names: still once
    old = {key.replace("text_encoder.", "text_encoder.text_model."): m for key, m in adapter.modules.items()}
    assert peft.write(own.layers_of(old, {}))[0].keys() == tensors.keys()
    assert peft.write(own.layers_of(old, {}))[1] == header


def test_what_the_format_cannot_hold_is_an_error(model, tmp_path):
    pipe = load(model)
    tuned = vm.adapt(pipe.unet, vm.Tune(sites=("bias",)), name="tuned")
    with pytest.raises(InputError, match="hold no bias without its weight"):
        write_lora(tuned, tmp_path / "no.safetensors")
    tokens = vm.adapt({"text_encoder": pipe.text_encoder}, vm.LoRA(sites=("embed.tokens",)), name="tokens")
    with pytest.raises(InputError, match=r"hold no changed embeddings; leave out .*token_embedding"):
        write_lora(tokens, tmp_path / "no.safetensors")
    alien = vm.adapt({"prior": pipe.unet}, vm.LoRA(sites=("attn.q",)), name="alien")
    with pytest.raises(InputError, match=r"know unet, transformer, text_encoder.*the adapter has 'prior'"):
        write_lora(alien, tmp_path / "no.safetensors")
    assert not list(tmp_path.iterdir())
