"""Files of diffusers, kohya and LyCORIS: the same picture in every format, and as the packages themselves read them."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny_diffusion import tiny_pipeline
from tiny_sdxl import tiny_sdxl
from torch import nn

import vismodal as vm
from vismodal.errors import InputError
from vismodal.formats import names
from vismodal.formats.bases import base_of, models
from vismodal.formats.files import read_file, read_tensors, write_file

pytest.importorskip("diffusers")
XL = "sdxl"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tiny pipelines, SD1's and SDXL's, with the folders that they are saved in."""
    folders = {"sd1": tmp_path_factory.mktemp("sd1"), XL: tmp_path_factory.mktemp("sdxl")}
    pipes = {"sd1": tiny_pipeline(folders["sd1"]), XL: tiny_sdxl(folders[XL])}
    for pipe in pipes.values():
        for part in parts(pipe).values():
            part.eval()
    return {kind: (folders[kind], pipe) for kind, pipe in pipes.items()}


def load(made, kind):
    return copy.deepcopy(made[kind][1])


def picture(pipe) -> np.ndarray:
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return pipe("a photo of sks dog", generator=torch.Generator().manual_seed(0), **options).images[0]


def shake(adapter, size=0.25) -> None:
    """Every tensor away from its start: LoRA begins at zero, magnitudes and values lie around the base's."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))


def parts(pipe) -> dict[str, nn.Module]:
    return {
        c: getattr(pipe, c) for c in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, c, None) is not None
    }


UNET, TEXT = "unet.*", ("text_encoder.*", "text_encoder_2.*")
ATTENTION = ("attn.*", "xattn.*")
OTHERS = ("conv", "time", "proj.*")
CASES = {
    "alpha not rank": [vm.LoRA(sites=ATTENTION, rank=4, alpha=1, where=UNET)],
    "rank-stabilised": [vm.LoRA(sites=ATTENTION, rank=3, alpha=2, rank_stabilised=True, where=UNET)],
    "per-module alpha": [
        vm.LoRA(sites=("attn.*",), rank=4, alpha=1, where=UNET),
        vm.LoRA(sites=("xattn.*", "mlp.down"), rank=3, alpha=5, where=UNET),
    ],
    "per-module rank": [vm.LoRA(sites=(*ATTENTION, "mlp.in"), rank=4, alpha=2, ranks={"mlp.in": 2}, where=UNET)],
    "halves": [vm.LoRA(sites=("mlp.up", "mlp.gate"), rank=3, alpha=6, ranks={"mlp.up": 2}, where=UNET)],
    "convolutions": [vm.LoRA(sites=OTHERS, rank=2, alpha=1, where=UNET)],
    "text encoders": [
        vm.LoRA(sites=("attn.*",), rank=4, alpha=2, where=UNET),
        vm.LoRA(sites=("attn.*", "mlp.*"), rank=2, alpha=6, where=TEXT),
    ],
    "DoRA": [vm.DoRA(sites=(*ATTENTION, "mlp.up", "mlp.gate", *OTHERS), rank=2, alpha=3, where=UNET)],
    "DoRA of texts": [vm.DoRA(sites=("attn.*", "mlp.*"), rank=2, alpha=3, where=TEXT)],
    "PiSSA": [vm.PiSSA(sites=("attn.*",), rank=2, alpha=3, where=UNET)],
}
LYCORIS = {
    "LoHa": [vm.LoHa(sites=(*ATTENTION, "mlp.gate", *OTHERS), rank=2, alpha=1, where=UNET)],
    "LoHa of texts": [vm.LoHa(sites=("attn.*",), rank=2, alpha=1, where=TEXT)],
    "LoKr": [vm.LoKr(sites=(*ATTENTION, "mlp.in", *OTHERS), rank=1, alpha=2, where=UNET)],
    "LoKr of two factors": [vm.LoKr(sites=ATTENTION, rank=1, alpha=2, factor=8, decompose_both=True, where=UNET)],
    "LoKr, full": [vm.LoKr(sites=ATTENTION, full=True, where=UNET)],
    "OFT": [vm.OFT(sites=(*ATTENTION, "mlp.up", "mlp.gate", *OTHERS), block_size=2, side="out", where=UNET)],
    "OFT, rescaled": [vm.OFT(sites=ATTENTION, block_size=4, side="out", rescale=True, where=UNET)],
    "full": [vm.Tune(sites=(*ATTENTION, "mlp.gate", "conv", "time"), where=UNET)],
    "norms": [vm.Tune(sites=("norm",), where=UNET)],
}
ALL = {**CASES, **LYCORIS}
# what depends on the names of modules, which SDXL has others of
NAMED = ("per-module alpha", "convolutions", "text encoders", "DoRA", "DoRA of texts", "LoHa", "full", "norms")


def adapted(pipe, methods):
    """The pipeline with a shaken adapter on the parts that the methods name, and its picture."""
    globs = [g for m in methods for g in ((m.where,) if isinstance(m.where, str) else m.where)]
    chosen = {c: m for c, m in parts(pipe).items() if f"{c}.*" in globs}
    fitting = [
        type(m)(**{**m.options(), "where": tuple(f"{c}.*" for c in chosen if f"{c}.*" in m.where)}) for m in methods
    ]
    before = picture(pipe)
    adapter = vm.adapt(chosen, fitting, seed=0)
    shake(adapter)
    live = picture(pipe)
    assert np.abs(live - before).max() > 0.01, "the adapter does nothing: the test would prove nothing"
    return adapter, live


def through_ours(made, kind, file, tmp_path):
    """The picture of a fresh pipeline with a file converted to ours."""
    base = base_of(made[kind][0])
    ours = write_file(read_file(file, base), "vismodal", tmp_path / "back.safetensors", base)
    pipe = load(made, kind)
    prefixes = json.loads(read_tensors(ours)[1]["base"])
    vm.load({c: getattr(pipe, c) for c in prefixes}, ours)
    return picture(pipe)


@pytest.mark.parametrize(("kind", "case"), [*(("sd1", case) for case in ALL), *((XL, case) for case in NAMED)])
def test_every_format_gives_the_same_picture(made, tmp_path, kind, case):
    """From a file of ours to each format and back, and through diffusers' own loader where that reads the method."""
    base = base_of(made[kind][0])
    adapter, live = adapted(load(made, kind), ALL[case])
    saved = vm.save(adapter, tmp_path / "saved.safetensors")
    contents = read_file(saved, base)
    for to in ("diffusers", "kohya", "lycoris"):
        out = tmp_path / f"{to}.safetensors"
        text = any(m.startswith("text") for m in contents.layers)
        if (to == "diffusers" and case in LYCORIS) or (to == "lycoris" and text):
            with pytest.raises(
                InputError, match=r"hold plain LoRA only.*--to kohya|one module, here the denoiser.*--to kohya"
            ):
                write_file(contents, to, out, base)
            assert not out.exists()
            continue
        write_file(contents, to, out, base)
        assert read_file(out, base).layers.keys() == contents.layers.keys()
        np.testing.assert_allclose(through_ours(made, kind, out, tmp_path), live, atol=1e-4)
        if to == "diffusers" or (to == "kohya" and case in CASES and "DoRA" not in case):
            plain_pipe = load(made, kind)
            plain_pipe.load_lora_weights(str(tmp_path), weight_name=out.name)
            np.testing.assert_allclose(picture(plain_pipe), live, atol=2e-5)


# of the published checkpoints
SIZES = {
    "sd1": {"unet": 859_520_964, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "text_encoder": 340_387_840},
    XL: {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


@pytest.mark.parametrize("kind", SIZES)
def test_every_module_of_the_real_models_has_a_name_of_its_own(kind):
    """kohya's names come back as the modules that they were made of, and kinds are those of the models' sites."""
    found = models(base_of(kind), SIZES[kind])
    for component, model in found.items():
        assert sum(p.numel() for p in model.parameters()) == SIZES[kind][component]
        paths = [path for path, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
        assert [names.dotted(names.flat(path)) for path in paths] == paths
        if kind == XL and component == "unet":
            originals = [names.to_original(path, 2) for path in paths]
            assert len(set(originals)) == len(paths)
            assert [names.from_original(names.dotted(names.flat(o)), 2) for o in originals] == paths
        sites = [s for s in vm.sites(model) if s.slot == "weight" and s.range is None and s.kind != "embed.tokens"]
        assert {names.kind_of(s.path) for s in sites} == {s.kind for s in sites}
        assert all(names.kind_of(s.path) == s.kind for s in sites)
