"""A CLIP of open_clip, exported: plain transformers loads it, and computes the same, or the export says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tiny_diffusion import tiny_tokenizer
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

import vismodal as vm
from vismodal.formats.clip_keys import Ids, model_cfg_of, to_transformers
from vismodal.formats.open_clip import export, preprocessor, twin

VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16}
TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 190, "width": 32, "heads": 4, "layers": 3}
TEXTS = ["a dog", "A red ball, on the beach!", "x", "so many letters that the text is cut before its end"]
EOS = {"pool_type": "eos", "eos_id": 189}
TANH = {"act_kwargs": {"approximate": "tanh"}}
IDS = Ids(188, 189, 189, 189)


def config(vision: dict | None = None, text: dict | None = None, **rest: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "vision_cfg": {**VISION, **(vision or {})}, "text_cfg": {**TEXT, **(text or {})}, **rest}


CONFIGS = {
    "gelu": config(text=EOS),
    "quick_gelu": config(
        {"image_size": 48, "patch_size": 16, "width": 64, "layers": 3, "head_width": 32},
        {"width": 48, "heads": 2, "layers": 1, "context_length": 20},
        embed_dim=40,
        quick_gelu=True,
    ),
    "tanh, eps, ratio": config(
        # 198 hidden: 49 * (198 / 49) is one less in floating point
        {"width": 49, "head_width": 7, "mlp_ratio": 4.05, "norm_kwargs": {"eps": 1e-3}, **TANH},
        {**EOS, "mlp_ratio": 2.7, "norm_kwargs": {"eps": 1e-2}, **TANH},
    ),
    "own attention": config({"block_type": "custom"}, {**EOS, "block_type": "custom"}, nonscalar_logit_scale=True),
    "equal either way": config({"final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}, EOS),
}


def clip(cfg: dict[str, Any], kind: type[nn.Module] = CLIP, **preprocess: Any) -> Any:
    """A random CLIP with no zeros or ones that would hide a tensor in the wrong place."""
    torch.manual_seed(0)
    model = kind(**deepcopy(cfg)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * p.abs().mean().clamp(min=0.3) * torch.randn_like(p))
    size = cfg["vision_cfg"]["image_size"]
    set_model_preprocess_cfg(model, {"size": size, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), **preprocess})
    return model


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    tiny_tokenizer(folder / "raw").save_pretrained(folder)
    return folder


def tokenizer_of(model: Any, folder: Path, **options: Any) -> HFTokenizer:
    return HFTokenizer(str(folder), context_length=model.context_length, **options)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def deviation(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max() / mine.abs().max())


@torch.no_grad()
def deviations(model: Any, tokenizer: HFTokenizer, theirs: CLIPModel, processor: CLIPProcessor) -> dict[str, float]:
    """From pictures and texts on: of the features before they are normed, and of the logits."""
    size = model.visual.image_size[0]
    images = [picture(size + 3, size + 8), picture(2 * size, size)]
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    mine = torch.stack([transform(image) for image in images]), tokenizer(TEXTS)
    inputs = processor(text=TEXTS, images=images, return_tensors="pt", padding=True, truncation=True)
    return {
        "image": deviation(model.encode_image(mine[0]), theirs.get_image_features(inputs.pixel_values).pooler_output),
        "text": deviation(
            model.encode_text(mine[1]),
            theirs.get_text_features(inputs.input_ids, inputs.attention_mask).pooler_output,
        ),
        "logits": deviation(model.get_logits(*mine)[0], theirs(**inputs).logits_per_image),
    }


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("name", CONFIGS)
def test_plain_transformers_computes_the_same(name: str, kind: type[nn.Module], words: Path, tmp_path: Path) -> None:
    model = clip(CONFIGS[name], kind)
    tokenizer = tokenizer_of(model, words)
    export(model, tokenizer, tmp_path)
    theirs, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not theirs.training and theirs.dtype == torch.float32
    found = deviations(model, tokenizer, theirs, CLIPProcessor.from_pretrained(tmp_path, backend="pil"))
    assert max(found.values()) < 1e-5, found
    found = deviations(model, tokenizer, *twin(model, tokenizer))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_tells_its_config(name: str) -> None:
    """The config of the file and the one read from the modules say the same to transformers."""
    model = clip(CONFIGS[name])
    tensors, mine = to_transformers(model.state_dict(), CONFIGS[name], IDS)
    again, read = to_transformers(model.state_dict(), model_cfg_of(model), IDS)
    assert mine == read
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_what_a_wrong_place_would_do(words: Path) -> None:
    """The bound of 1e-5 tells a model whose queries and keys, or whose activation, are another's."""
    model = clip(CONFIGS["gelu"])
    tokenizer = tokenizer_of(model, words)
    right = twin(model, tokenizer)
    for tower, broken in (("image", right.model.vision_model), ("text", right.model.text_model)):
        attention, mlp = broken.encoder.layers[0].self_attn, broken.encoder.layers[0].mlp
        attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj
        assert deviations(model, tokenizer, *right)[tower] > 1e-3
        attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj
        mlp.activation_fn, before = nn.GELU(approximate="tanh"), mlp.activation_fn
        assert deviations(model, tokenizer, *right)[tower] > 1e-5
        mlp.activation_fn = before
    assert max(deviations(model, tokenizer, *right).values()) < 1e-5


def test_half_precision_is_written_in_full(words: Path, tmp_path: Path) -> None:
    model = clip(CONFIGS["gelu"]).half()
    export(model, words, tmp_path)
    theirs = CLIPModel.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32
    assert torch.equal(theirs.visual_projection.weight, model.visual.proj.T.float())


# -- what transformers' CLIP cannot be -------------------------------------------------------------------------------

# what open_clip's config has, and the words of the error
REFUSED = [
    (config({"pool_type": "avg"}), "pool_type 'tok' only; this vision_cfg has 'avg'"),
    (config({"attentional_pool": True, "attn_pooler_heads": 2}), "attentional_pool False only"),
    (config({"no_ln_pre": True}), "no_ln_pre False only"),
    (config({"patch_dropout": 0.5}), "patch_dropout 0.0 only.* torch.nn.Identity"),
    (config({"ls_init_value": 0.1}), "ls_init_value None only; this vision_cfg has"),
    (config(text={"ls_init_value": 0.1}), "ls_init_value None only; this text_cfg has"),
    (config(init_logit_bias=-10.0), "init_logit_bias None only; this model_cfg has -"),
    (config({"image_size": (32, 64)}), "squares only; here image_size is .32, 64"),
    (config({"patch_size": (8, 16)}), "squares only; here patch_size is .8, 16"),
    (config(text={"pool_type": "last"}), "off its end only; this text_cfg has pool_type 'last'"),
    (config(text={"no_causal_mask": True}), "no_causal_mask False only"),
    (config(text={"proj_bias": True}), "proj_bias False only"),
    (config(text={"proj_type": "none", "width": 24}), "proj_type 'linear' only; this text_cfg has 'none'"),
    (config(text={"pool_type": "eos"}), "reads a text off id 2, but the tokenizer ends it with 189"),
]


@pytest.mark.parametrize(("cfg", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_it_cannot_be_is_named(cfg: dict[str, Any], why: str, words: Path, tmp_path: Path) -> None:
    with pytest.raises(vm.InputError, match=why):
        to_transformers({}, cfg, IDS)  # as its file has it
    with pytest.raises(vm.InputError, match=why):
        export(clip(cfg), words, tmp_path / "out")  # as it lives
    assert not (tmp_path / "out").exists()


def resnet() -> nn.Module:
    return clip(config({"layers": [1, 1, 1, 1], "width": 32, "head_width": 32}))


def timm_tower() -> nn.Module:
    cfg = config({"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "image_size": 32})
    with pytest.raises(vm.InputError, match="timm_model_name None only"):
        to_transformers({}, cfg, IDS)
    return clip(cfg)


def unlike_layers() -> nn.Module:
    model = clip(config())
    model.visual.transformer.resblocks[1].mlp.gelu = nn.GELU(approximate="tanh")
    return model


def another_activation() -> nn.Module:
    model = clip(config())
    for block in model.transformer.resblocks:
        block.mlp.gelu = nn.ReLU()
    return model


def pruned() -> nn.Module:
    model = clip(config())
    model.visual.proj = None
    return model


def appended_class() -> nn.Module:
    return clip(config(text={"embed_cls": True, **EOS}), CustomTextCLIP)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (resnet, "no ModifiedResNet"),
        (timm_tower, "no TimmModel"),
        (unlike_layers, "layers of one shape"),
        (another_activation, "this tower has ReLU"),
        (pruned, "missing visual.proj"),
        (appended_class, "embed_cls False only"),
        (lambda: clip(config({"qk_norm": True})), "no place for visual.*attn.ln_k.*and 4 more"),
        (lambda: nn.Linear(2, 2), "a Linear is no CLIP"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_other_models_are_named(build: Callable[[], nn.Module], why: str, words: Path, tmp_path: Path) -> None:
    with pytest.raises(vm.InputError, match=why):
        export(build(), words, tmp_path / "out")


# -- adapters --------------------------------------------------------------------------------------------------------


def test_a_merged_adapter_is_exported_and_a_live_one_refused(words: Path, tmp_path: Path) -> None:
    model = clip(CONFIGS["gelu"])
    tokenizer = tokenizer_of(model, words)
    base = twin(model, tokenizer).model.state_dict()
    sites = ("attn.q", "attn.v", "attn.out", "mlp.up")
    adapter = vm.adapt(model, vm.LoRA(rank=2, sites=sites), name="pets", seed=0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.3)
    with pytest.raises(vm.InputError, match=r"vm.attached\(model\)\['pets'\].merge\(\)"):
        export(model, tokenizer, tmp_path)
    adapter.merge()
    with adapter.disabled(), pytest.raises(vm.InputError, match="switched on"):
        export(model, tokenizer, tmp_path)
    export(model, tokenizer, tmp_path)
    theirs = CLIPModel.from_pretrained(tmp_path)
    found = deviations(model, tokenizer, theirs, CLIPProcessor.from_pretrained(tmp_path, backend="pil"))
    assert max(found.values()) < 1e-5, found
    changed = [name for name, tensor in theirs.state_dict().items() if not torch.equal(tensor, base[name])]
    assert len(changed) == len(adapter.modules)
    adapter.detach()
    assert all(torch.equal(t, base[n]) for n, t in twin(model, tokenizer).model.state_dict().items())


def test_adapters_on_a_part_and_on_a_whole(words: Path) -> None:
    model = clip(CONFIGS["gelu"])
    adapter = vm.adapt(model.visual, vm.LoRA(rank=2, sites=("attn.q",)))
    with pytest.raises(vm.InputError, match=r"vm.attached\(model.visual\)"):
        twin(model, words)
    adapter.detach()
    vm.adapt(nn.ModuleDict({"clip": model}), vm.LoRA(rank=2, sites=("attn.q",)))
    with pytest.raises(vm.InputError, match="larger model"):
        twin(model, words)


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels(resize_mode: str, interpolation: str, words: Path, tmp_path: Path) -> None:
    model = clip(CONFIGS["gelu"], resize_mode=resize_mode, interpolation=interpolation)
    export(model, words, tmp_path)
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    exact = CLIPProcessor.from_pretrained(tmp_path, backend="pil").image_processor
    default = CLIPProcessor.from_pretrained(tmp_path).image_processor
    for side in ((32, 32), (48, 48), (40, 32), (33, 32), (70, 53), (20, 25)):
        mine = transform(picture(*side))
        assert (mine - exact(picture(*side), return_tensors="pt").pixel_values[0]).abs().max() < 1e-6
        std = torch.tensor(model.visual.preprocess_cfg["std"])[:, None, None]
        levels = (mine - default(picture(*side), return_tensors="pt").pixel_values[0]).abs() * std * 255
        assert levels.max() < 2.1  # the default backend rounds elsewhere


def test_a_crop_of_three_is_cut_one_pixel_off(words: Path) -> None:
    """What the docstring warns of: if it fails, the libraries agree now, and the warning can go."""
    model = clip(CONFIGS["gelu"])
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    theirs = twin(model, words).processor.image_processor
    image = picture(35, 32)
    assert torch.allclose(
        transform(image)[:, :, :-1], theirs(image, return_tensors="pt").pixel_values[0][:, :, 1:], atol=1e-6
    )


def test_pictures_that_it_cannot_make(words: Path) -> None:
    with pytest.raises(vm.InputError, match="resize_mode 'longest'"):
        preprocessor({"size": 32, "mean": (0,), "std": (1,), "resize_mode": "longest"})
    with pytest.raises(vm.InputError, match=r"squares only; here the picture's size is .32, 48."):
        preprocessor({"size": (32, 48), "mean": (0,), "std": (1,)})
    with pytest.raises(vm.InputError, match="set_model_preprocess_cfg"):
        twin(CLIP(**deepcopy(CONFIGS["gelu"])), words)


# -- texts -----------------------------------------------------------------------------------------------------------

PLAIN = [
    *TEXTS,
    "",
    "  A  Dog\n'S  ",
    "Größe 12€ ÀÉÎ İ ΟΔΟΣ",
    "日本 dog",
    "it's 25 o'clock; (yes) [no] a_b-c",
    "<|endoftext|> x",
]


def ids_of(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


@pytest.mark.parametrize("clean", ["whitespace", "lower"])
def test_ids(clean: str, words: Path, tmp_path: Path) -> None:
    model = clip(CONFIGS["gelu"])
    tokenizer = tokenizer_of(model, words, clean=clean)
    export(model, tokenizer, tmp_path)
    for theirs in (CLIPTokenizer.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path).tokenizer):
        assert isinstance(theirs, CLIPTokenizer) and theirs.model_max_length == 16
        assert torch.equal(tokenizer(PLAIN), ids_of(theirs, PLAIN, 16))
        assert tokenizer(["a"])[0].tolist() == [188, 158, *[189] * 14]
        for repaired in ("a “b” c", "a &amp; b"):  # what the docstring warns of
            assert not torch.equal(tokenizer([repaired]), ids_of(theirs, [repaired], 16))
    assert tokenizer.tokenizer.model_max_length == 48  # the given one is left as it was


def test_the_files_of_older_readers_give_the_same_ids(words: Path, tmp_path: Path) -> None:
    export(clip(CONFIGS["gelu"]), words, tmp_path)
    old = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert torch.equal(ids_of(old, PLAIN, 16), ids_of(CLIPTokenizer.from_pretrained(tmp_path), PLAIN, 16))


def test_open_clips_own_tokenizer(tmp_path: Path) -> None:
    """OpenAI's 49,408 tokens, which open_clip pads with 0 and transformers with the end: the text's end is the same."""
    model = clip(config(text={"vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}))
    mine = SimpleTokenizer(context_length=16)
    export(model, mine, tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    texts = [text for text in PLAIN if "endoftext" not in text]
    end = 49407
    for a, b in zip(mine(texts).tolist(), ids_of(theirs, texts, 16).tolist(), strict=True):
        assert a[: a.index(end) + 1] == b[: b.index(end) + 1]
    found = deviations(model, mine, CLIPModel.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path))
    assert found["text"] < 1e-5


def test_tokenizers_that_do_not_fit(words: Path, tmp_path: Path) -> None:
    model = clip(CONFIGS["gelu"])
    for options, why in (
        ({"clean": "canonicalize"}, "clean='canonicalize'"),
        ({"strip_sep_token": True}, "strip_sep_token"),
        ({"tokenizer_mode": "clips"}, "tokenizer_mode"),
    ):
        with pytest.raises(vm.InputError, match=why):
            export(model, tokenizer_of(model, words, **options), tmp_path / "out")
    for tokenizer, why in (
        (SimpleTokenizer(reduction_mask="simple"), "reduction_fn"),
        (SimpleTokenizer(additional_special_tokens=["<more>"]), "<more>"),
        (SimpleTokenizer(), "off id 189, but the tokenizer ends it with 49407"),
        (object(), "this model's is a object"),
        (tmp_path, "no tokenizer in"),
    ):
        with pytest.raises(vm.InputError, match=why):
            export(model, tokenizer, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_ids_that_transformers_reads_otherwise() -> None:
    model = clip(CONFIGS["quick_gelu"])
    with pytest.raises(vm.InputError, match="off id 189, but the tokenizer ends it with 5"):
        to_transformers(model.state_dict(), CONFIGS["quick_gelu"], Ids(4, 5, 5, 189))
    with pytest.raises(vm.InputError, match="if the end of text is 2"):
        to_transformers(model.state_dict(), config(text={"pool_type": "eos", "eos_id": 2}), Ids(1, 2, 2, 189))
    with pytest.raises(vm.InputError, match="gives ids up to 190; the model knows 190 tokens"):
        to_transformers(model.state_dict(), CONFIGS["gelu"], Ids(188, 189, 189, 190))


def test_a_folder_of_open_clip_is_its_own_tokenizer(words: Path, tmp_path: Path) -> None:
    """Its config says how texts are cleaned, which a bare tokenizer folder cannot."""
    for path in words.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    kwargs = {"hf_tokenizer_name": "words", "tokenizer_kwargs": {"clean": "canonicalize"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config(text={**EOS, **kwargs})}))
    model = clip(CONFIGS["gelu"])
    with pytest.raises(vm.InputError, match="clean='canonicalize'"):
        export(model, tmp_path, tmp_path / "out")
    assert isinstance(open_clip.get_tokenizer(f"local-dir:{tmp_path}"), HFTokenizer)
