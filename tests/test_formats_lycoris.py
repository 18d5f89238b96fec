"""Files for LyCORIS as the package lycoris_lora itself reads them, and files of its own as we read them."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_diffusion import tiny_pipeline
from torch import Tensor, nn

import vismodal as vm
from vismodal.attach import adapt
from vismodal.errors import InputError
from vismodal.files import write_tensors
from vismodal.formats.bases import base_of
from vismodal.formats.files import contents_of, read_file, read_tensors, write_file

pytest.importorskip("diffusers")
pytest.importorskip("lycoris", reason="there is no lycoris_lora to compare with: pip install -e '.[dev]'")
ATTENTION, OTHERS = ("attn.*", "xattn.*"), ("conv", "time", "proj.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def unet(folder) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder / "unet").eval()


@torch.no_grad()
def run(unet: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 3, 16, generator=g)
    return unet(x, torch.tensor([1, 500]), text).sample


def shake(tensors, size=0.2) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tensors:
            p.add_(size * torch.randn(p.shape, generator=g))


METHODS = {
    "LoRA": vm.LoRA(sites=(*ATTENTION, "mlp.in", *OTHERS), rank=2, alpha=3),
    "DoRA": vm.DoRA(sites=(*ATTENTION, "mlp.in", *OTHERS), rank=2, alpha=3),
    "LoHa": vm.LoHa(sites=(*ATTENTION, "mlp.up", "mlp.gate", *OTHERS), rank=2, alpha=3),
    "LoKr": vm.LoKr(sites=(*ATTENTION, "mlp.in", "time"), rank=1, alpha=3),
    "LoKr of two products": vm.LoKr(sites=("attn.q",), rank=1, alpha=3, decompose_both=True),
    "LoKr, full": vm.LoKr(sites=(*ATTENTION, "conv"), full=True),
    "OFT": vm.OFT(sites=(*ATTENTION, "mlp.up", "mlp.gate", *OTHERS), block_size=2, side="out"),
    "OFT, rescaled": vm.OFT(sites=(*ATTENTION, "conv"), block_size=4, side="out", rescale=True, where="*_blocks.*"),
    "full": vm.Tune(sites=(*ATTENTION, "mlp.gate", "conv", "time")),
    "norm": vm.Tune(sites=("norm",)),
}


@pytest.mark.parametrize("name", METHODS)
def test_lycoris_reads_what_we_write(folder, unet, tmp_path, name, monkeypatch):
    """By its wrapper's names and by kohya's: the same output of the UNet."""
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
    from lycoris.wrapper import create_lycoris_from_weights

    # 4.1.3 names time_embedding both by its class and by itself, and stops at the second
    monkeypatch.setattr(LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])

    ours, before = copy.deepcopy(unet), run(unet)
    adapter = adapt(ours, METHODS[name], seed=0)
    shake(adapter.parameters())
    live = run(ours)
    assert (live - before).abs().max() > 0.01, "the adapter does nothing: the test would prove nothing"
    contents, base = contents_of(adapter), base_of(folder)
    bound = 1e-4 * live.abs().max()
    for to in ("lycoris", "kohya"):
        file = str(write_file(contents, to, tmp_path / f"{to}.safetensors", base))
        theirs = copy.deepcopy(unet)
        with torch.no_grad():
            if to == "lycoris":
                network, _ = create_lycoris_from_weights(1.0, file, theirs)
                modules = network.loras
            else:
                network, _ = create_network_from_weights(1.0, file, None, None, theirs)
                modules = network.unet_loras
        assert len(modules) == len(contents.layers)
        for module in modules:
            module.apply_to()
        assert (run(theirs) - live).abs().max() < bound


ALGORITHMS = {
    "LoCon": {"algo": "lora"},
    "LoCon, Tucker": {"algo": "lora", "use_tucker": True},
    "LoHa": {"algo": "loha"},
    "LoHa, Tucker": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr"},
    "LoKr, Tucker": {"algo": "lokr", "use_tucker": True, "factor": 2},
    "LoKr, factor 4": {"algo": "lokr", "factor": 4, "linear_dim": 1},
    "DoRA": {"algo": "lora", "dora_wd": True},
    "OFT": {"algo": "diag-oft"},
    "OFT, bounded and rescaled": {"algo": "diag-oft", "constraint": 0.01, "rescaled": True},
    "full": {"algo": "full"},
    "norms too": {"algo": "lora", "train_norm": True},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_we_read_what_lycoris_writes(folder, unet, tmp_path, name):
    from lycoris.wrapper import create_lycoris

    options = {"linear_dim": 2, "linear_alpha": 3.0, **ALGORITHMS[name]}
    theirs = copy.deepcopy(unet)
    network = create_lycoris(theirs, 1.0, **options)
    network.apply_to()
    shake(network.parameters())
    live = run(theirs)
    assert (live - run(unet)).abs().max() > 0.01
    state = {k: t.detach().clone() for k, t in network.state_dict().items()}
    base = base_of(folder)
    contents = read_file(write_tensors(tmp_path / "theirs.safetensors", state), base)
    ours = copy.deepcopy(unet)
    vm.load({"unet": ours}, write_file(contents, "vismodal", tmp_path / "ours.safetensors", base))
    assert (run(ours) - live).abs().max() < 1e-4 * live.abs().max()


def test_blocks_that_lycoris_cannot_read_are_an_error(folder, unet, tmp_path):
    ours = copy.deepcopy(unet)
    adapter = adapt(ours, vm.OFT(sites=("attn.q",), block_size=8, side="out"), seed=0)
    with pytest.raises(InputError, match="2 blocks of 8; a block_size of 4 or below can be written"):
        write_file(contents_of(adapter), "kohya", tmp_path / "x.safetensors", base_of(folder))


def test_the_header_names_the_algorithm(unet, tmp_path):
    ours = copy.deepcopy(unet)
    adapter = adapt(ours, vm.LoHa(sites=("attn.q",), rank=2, alpha=1), seed=0)
    file = write_file(contents_of(adapter), "kohya", tmp_path / "x.safetensors", base_of("sd1"))
    header = read_tensors(file)[1]
    assert header["ss_network_module"] == "lycoris.kohya" and '"algo": "loha"' in header["ss_network_args"]
    assert {key.partition(".")[2] for key in load_file(file)} == {
        *(f"hada_w{i}_{x}" for i in (1, 2) for x in "ab"),
        "alpha",
    }
