"""The embedded models: offline, whole, in fp32, and equal to their files; each in the classes of its own library.

The same is asked of random ones in the very same layout, which may be spoiled to see that it is noticed.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusion import tiny_tokenizer
from torch import Tensor, nn

import vismodal as vm
from vismodal import paths

ASSETS = Path(__file__).parents[1] / "assets"
TEXTS = ["a red apple", "A photo of a DOG,  on the beach!", "x" * 90, ""]


def write_tiny_vit(folder: Path) -> None:
    """timm's own layout, with fp16 weights."""
    import timm

    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "pre_norm": True}
    pictures = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}
    names = [f"class {i}" for i in range(7)]
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "label_names": names,
        "model_args": {**args, "num_classes": 7},
        "pretrained_cfg": {**pictures, "fixed_input_size": True, "crop_pct": 1.0, "num_classes": 7}
        | {"first_conv": "patch_embed.proj", "classifier": "head", "custom_load": False},
    }
    write(folder, "config.json", config, timm.create_model("vit_tiny_patch16_224", **config["model_args"]), "model")


def write_tiny_clip(folder: Path) -> None:
    """open_clip's own layout, with fp16 weights and a tokenizer's files."""
    from open_clip.model import CLIP

    tokenizer = tiny_tokenizer(folder / "raw")
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder)
    shutil.rmtree(folder / "raw")
    end = tokenizer.eos_token_id
    config = {
        "embed_dim": 24,
        "quick_gelu": False,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 48, "layers": 1, "head_width": 16},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "tiny-clip",
            "tokenizer_kwargs": {"clean": "whitespace"},
        }
        | {"width": 32, "heads": 4, "layers": 1, "pool_type": "eos", "eos_id": end, "pad_id": end},
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    whole = {"model_cfg": config, "preprocess_cfg": preprocess}
    write(folder, "open_clip_config.json", whole, CLIP(**config), "open_clip_model")


def write(folder: Path, name: str, config: dict[str, Any], model: nn.Module, weights: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config))
    save_file({n: t.half().contiguous() for n, t in model.state_dict().items()}, folder / f"{weights}.safetensors")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("assets")
    write_tiny_vit(root / "tiny-vit")
    write_tiny_clip(root / "tiny-clip")
    (root / "tiny-sd").symlink_to(ASSETS / "tiny-sd")
    return root


@pytest.fixture(params=["embedded", "stand-in"])
def root(request: pytest.FixtureRequest, stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of embedded models, or of their stand-ins; the network is cut off, and must not be asked for."""
    asked = []

    def refuse(*args: object, **kwargs: object) -> None:
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = ASSETS if request.param == "embedded" else stand_ins
    monkeypatch.setattr(paths, "_assets", lambda: folder)
    yield folder
    assert asked == []  # libraries may catch the error


def check_values(model: nn.Module, file: Path) -> None:
    """Every tensor of the model is that of the file, in fp32; the file has no other."""
    mine, saved = model.state_dict(), load_file(file)
    assert mine.keys() == saved.keys()
    assert {t.dtype for t in mine.values()} == {torch.float32}
    for name, tensor in mine.items():
        assert torch.equal(tensor, saved[name].float()), name


def test_tiny_vit(root: Path) -> None:
    from timm.data import resolve_model_data_config
    from timm.models.vision_transformer import VisionTransformer

    folder = root / "tiny-vit"
    model = vm.models.load("tiny-vit")
    assert isinstance(model, VisionTransformer) and not model.training
    check_values(model, folder / "model.safetensors")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    config = json.loads((folder / "config.json").read_text())
    data = resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32)
    assert [list(data[key]) for key in ("mean", "std")] == [config["pretrained_cfg"][key] for key in ("mean", "std")]
    assert list(model.pretrained_cfg["label_names"]) == config["label_names"]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, len(config["label_names"]))


def test_tiny_clip(root: Path) -> None:
    from open_clip import CLIP
    from open_clip.tokenizer import HFTokenizer
    from PIL import Image

    folder = root / "tiny-clip"
    loaded = vm.models.load("tiny-clip")
    model, preprocess, tokenizer = loaded
    assert loaded.model is model and isinstance(model, CLIP) and isinstance(tokenizer, HFTokenizer)
    assert not model.training
    check_values(model, folder / "open_clip_model.safetensors")
    config = json.loads((folder / "open_clip_config.json").read_text())
    text = config["model_cfg"]["text_cfg"]
    assert (text["pool_type"], text["eos_id"]) == ("eos", tokenizer.tokenizer.eos_token_id)
    assert text["pad_id"] == tokenizer.tokenizer.pad_token_id
    assert text["vocab_size"] == len(tokenizer.tokenizer)
    assert preprocess.transforms[-1].mean == config["preprocess_cfg"]["mean"]
    ids = tokenizer(TEXTS)
    assert ids.shape == (4, text["context_length"]) and int(ids.max()) == text["eos_id"] == text["vocab_size"] - 1
    image = preprocess(Image.new("RGB", (80, 70)))
    assert model.encode_image(image[None]).shape == (1, config["model_cfg"]["embed_dim"])
    # the first end of text is where a text is read: what follows changes nothing, what stands before does
    row = ids[:1].clone()
    end = int((row[0] == text["eos_id"]).int().argmax())
    other = row.clone()
    other[0, end + 1 :] = 5
    assert torch.equal(model.encode_text(row), model.encode_text(other))
    other[0, end - 1] = 5
    assert not torch.allclose(model.encode_text(row), model.encode_text(other))


def test_tiny_clip_in_transformers(root: Path, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    from vismodal.formats.open_clip import export

    folder = root / "tiny-clip"
    model, preprocess, tokenizer = vm.models.load("tiny-clip")
    twin = vm.models.load("tiny-clip", library="transformers")
    assert isinstance(twin.model, CLIPModel) and isinstance(twin.processor, CLIPProcessor) and not twin.model.training
    export(model, folder, tmp_path)
    plain = CLIPModel.from_pretrained(tmp_path)
    assert all(torch.equal(t, twin.model.state_dict()[n]) for n, t in plain.state_dict().items())
    images = [Image.effect_noise((90, 70), 90).convert("RGB"), Image.linear_gradient("L").convert("RGB")]
    mine = torch.stack([preprocess(image) for image in images])
    inputs = twin.processor(text=TEXTS, images=images, return_tensors="pt", padding="max_length", truncation=True)
    assert torch.equal(tokenizer(TEXTS), inputs.input_ids)
    with torch.no_grad():
        for wanted, given in (
            (mine, inputs.pixel_values),
            (model.encode_image(mine), twin.model.get_image_features(inputs.pixel_values).pooler_output),
            (model.encode_text(tokenizer(TEXTS)), twin.model.get_text_features(inputs.input_ids).pooler_output),
            (model.get_logits(mine, tokenizer(TEXTS))[0], twin.model(**inputs).logits_per_image),
        ):
            assert close(wanted, given)


def close(mine: Tensor, theirs: Tensor) -> bool:
    return bool((mine - theirs).abs().max() < 1e-5 * mine.abs().max())


def test_tiny_sd(root: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = root / "tiny-sd"
    pipe = vm.models.load("tiny-sd")
    assert isinstance(pipe, StableDiffusionPipeline)
    check_values(pipe.unet, folder / "unet/diffusion_pytorch_model.safetensors")
    check_values(pipe.vae, folder / "vae/diffusion_pytorch_model.safetensors")
    saved = load_file(folder / "text_encoder/model.safetensors")
    for name, tensor in pipe.text_encoder.state_dict().items():  # transformers 5 leaves "text_model." out
        assert torch.equal(tensor, saved.get(name, saved.get(f"text_model.{name}")).float()), name
    assert not any(m.training for m in (pipe.unet, pipe.vae, pipe.text_encoder))
    assert not pipe.progress_bar(total=1).disable  # as it is in diffusers


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-clip"])
def test_an_incomplete_file_is_no_model(name: str, stand_ins: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Both libraries load strictly: a tensor that is missing does not stay random."""
    monkeypatch.setattr(paths, "_assets", lambda: tmp_path)
    shutil.copytree(stand_ins / name, tmp_path / name)
    (file,) = (tmp_path / name).glob("*model.safetensors")
    tensors = load_file(file)
    tensors.pop(next(n for n in tensors if n.endswith(("mlp.fc1.bias", "mlp.c_fc.bias"))))
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        vm.models.load(name)  # type: ignore[call-overload]


def test_names_and_libraries() -> None:
    with pytest.raises(vm.InputError, match="no embedded model 'tiny'; write one of tiny-vit, tiny-clip, tiny-sd"):
        vm.models.load("tiny")  # type: ignore[call-overload]
    with pytest.raises(vm.InputError, match="tiny-vit does not come in 'transformers'; write one of timm"):
        vm.models.load("tiny-vit", library="transformers")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("tiny-clip", "open_clip", "vismodal[clip]"), ("tiny-sd", "diffusers", "vismodal[diffusion]")],
)
def test_a_missing_package_is_named(name: str, package: str, extra: str, stand_ins: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(paths, "_assets", lambda: stand_ins)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(vm.InputError) as error:
        vm.models.load(name)  # type: ignore[call-overload]
    assert (
        str(error.value) == f'{name} needs the package {package}, which is not installed; write pip install "{extra}"'
    )


def test_a_missing_folder_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(paths, "_assets", lambda: tmp_path)
    with pytest.raises(vm.InputError, match="no embedded 'tiny-vit'"):
        vm.models.load("tiny-vit")
