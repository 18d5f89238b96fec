"""LoRA against its formula written out by hand, and against peft where peft is right."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import close, fixed, shake

import vismodal as vm


class Net(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


TABLE = {Net: (vm.Weight("w", "layer.weight"),)}
CONVS: dict[str, Callable[[], nn.Module]] = {
    "1x1": lambda: nn.Conv2d(6, 4, 1),
    "3x3": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "stride": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "dilation": lambda: nn.Conv2d(6, 4, 3, dilation=2, padding=2),
    "same": lambda: nn.Conv2d(6, 4, (3, 5), padding="same"),
    "reflect": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", stride=2),
    "groups": lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "depthwise-wide": lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "conv1d": lambda: nn.Conv1d(6, 4, 3, padding=1, stride=2),
    "conv3d": lambda: nn.Conv3d(6, 4, 3, padding=1),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolution_equals_the_closed_formula(name: str) -> None:
    torch.manual_seed(0)
    conv = CONVS[name]()
    net = Net(conv)
    adapter = vm.adapt(net, vm.LoRA(sites=("w",), rank=3, alpha=6), sites=TABLE)
    shake(adapter, 0.3)
    (module,) = adapter.modules.values()
    x = fixed(2, 6, *[9] * (conv.weight.dim() - 2))
    want = copy.deepcopy(conv)
    with torch.no_grad():  # W' = W + (alpha / r) B A
        want.weight += 2 * torch.einsum("or,r...->o...", module.B, module.A)
    want._forward_hooks.clear()
    assert close(net(x), want(x), 1e-6)


def test_linear_and_embedding_equal_the_closed_formula() -> None:
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(7, 5), fixed(3, 4, 7)), (nn.Embedding(9, 5), torch.tensor([[1, 2], [8, 0]]))):
        net = Net(layer)
        adapter = vm.adapt(net, vm.LoRA(sites=("w",), rank=2, alpha=3, rank_stabilised=True), sites=TABLE)
        shake(adapter, 0.3)
        (module,) = adapter.modules.values()
        W = layer.weight + 3 / 2**0.5 * module.B @ module.A
        want = F.embedding(x, W) if isinstance(layer, nn.Embedding) else F.linear(x, W, layer.bias)
        assert close(net(x), want, 1e-6)


def test_standardised_convolution_adapts_the_weight_that_it_reads() -> None:
    from timm.layers import StdConv2d

    torch.manual_seed(0)
    conv = StdConv2d(6, 4, 3, padding=0)
    net = Net(conv)
    adapter = vm.adapt(net, vm.LoRA(sites=("w",), rank=2), sites=TABLE)
    shake(adapter, 0.3)
    (module,) = adapter.modules.values()
    x = fixed(2, 6, 9, 9)
    W = conv.weight + torch.einsum("or,r...->o...", module.B, module.A)
    W = (W - W.mean((1, 2, 3), keepdim=True)) / (W.var((1, 2, 3), keepdim=True, unbiased=False) + conv.eps).sqrt()
    assert close(net(x), F.conv2d(x, W, conv.bias), 1e-5)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(7, 5), lambda: nn.Conv2d(7, 5, 3, stride=2, padding=1)])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_against_peft_on_plain_layers(layer: Callable[[], nn.Module], rank_stabilised: bool) -> None:
    torch.manual_seed(0)
    net = Net(layer())
    x = fixed(2, 7, 9, 9) if isinstance(net.layer, nn.Conv2d) else fixed(2, 7)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], use_rslora=rank_stabilised)
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    method = vm.LoRA(sites=("w",), rank=4, alpha=6, rank_stabilised=rank_stabilised)
    adapter = vm.adapt(net, method, sites=TABLE)
    shake(adapter, 0.3)
    (mine,) = adapter.modules.values()
    factors = theirs.base_model.model.layer
    with torch.no_grad():
        factors.lora_A["default"].weight.copy_(mine.A)
        factors.lora_B["default"].weight.copy_(mine.B.view_as(factors.lora_B["default"].weight))
    assert mine.A.shape == factors.lora_A["default"].weight.shape
    ours, peers = net(x), theirs(x)
    assert close(ours, peers, 1e-6)
    ours.square().sum().backward()
    peers.square().sum().backward()
    assert close(mine.A.grad, factors.lora_A["default"].weight.grad, 1e-5)
    assert close(mine.B.grad, factors.lora_B["default"].weight.grad.view_as(mine.B), 1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by peft
def test_against_peft_on_attention_of_plain_linears() -> None:
    from transformers import ViTConfig, ViTModel
    from zoo import VISION

    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**VISION), add_pooling_layer=False).eval()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    adapter = vm.adapt(model, vm.LoRA(rank=4, alpha=8))
    shake(adapter, 0.2)
    factors = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, module in adapter.modules.items():
            path = f"base_model.model.{key.partition('/')[2]}"
            factors[f"{path}.lora_A.default.weight"].copy_(module.A)
            factors[f"{path}.lora_B.default.weight"].copy_(module.B)
    x = fixed(2, 3, 32, 32)
    assert close(model(x).last_hidden_state, theirs(x).last_hidden_state, 1e-5)


def test_vit_base_has_the_papers_count() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert vm.adapt(model, vm.LoRA(rank=8)).num_parameters == 294_912
    assert vm.adapt(model, vm.LoRA(rank=8, sites=("attn.qkv",)), name="whole").num_parameters == 294_912
    assert vm.adapt(model, vm.Tune(sites=("bias",)), name="bitfit").num_parameters == 102_912
    assert vm.adapt(model, vm.Tune(sites=("norm",)), name="norm").num_parameters == 38_400
    assert vm.adapt(model, vm.Tune(sites=("head",)), name="probe").num_parameters == 769 * 1000


def test_initial_values_are_the_official_ones() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=768, num_heads=12)
    adapter = vm.adapt(model, vm.LoRA(rank=8))
    for module in adapter.modules.values():
        assert not module.B.any()
        assert 0.98 / 768**0.5 < module.A.abs().max() <= 1 / 768**0.5  # Kaiming uniform with a = sqrt(5)


def test_merge_error_in_fp64_and_untouched_rows() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).double().eval()
    before = model.blocks[0].attn.qkv.weight.clone()
    adapter = vm.adapt(model, vm.LoRA(rank=4))
    shake(adapter, 0.3)
    x = fixed(2, 3, 32, 32).double()
    live = model(x)
    adapter.merge()
    assert close(model(x), live, 1e-12)
    change = model.blocks[0].attn.qkv.weight - before
    assert not change[192:384].any()  # the k rows
    assert change[:192].any()
    assert change[384:].any()


def test_k_output_is_exactly_that_of_the_base() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    qkv = model.blocks[0].attn.qkv
    x = fixed(2, 5, 192)
    y0 = qkv(x)
    shake(vm.adapt(model, vm.LoRA(rank=4)), 0.3)
    change = qkv(x) - y0
    assert not change[..., 192:384].any()
    assert change[..., :192].all()


def test_ranks_by_site() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    method = vm.LoRA(sites=("attn.q", "mlp.*"), rank=2, ranks={"mlp.*": 5, "blocks.1.*": 3})
    adapter = vm.adapt(model, method)
    ranks = {key: m.A.shape[0] for key, m in adapter.modules.items()}
    assert ranks["lora/blocks.0.attn.qkv:q"] == 2
    assert ranks["lora/blocks.1.attn.qkv:q"] == 3
    assert ranks["lora/blocks.1.mlp.fc1"] == 5
    with pytest.raises(vm.InputError, match=r"ranks names 'conv'"):
        vm.adapt(model, vm.LoRA(ranks={"conv": 3}), name="b")


def test_parts_of_unequal_scaling_on_one_weight() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    qkv = model.blocks[0].attn.qkv
    shake(adapter := vm.adapt(model, vm.LoRA(rank=2, alpha=3, ranks={"attn.v": 5})), 0.3)
    q, v = adapter.modules.values()
    x = fixed(2, 5, 192)
    W = qkv.weight + torch.cat([3 / 2 * q.B @ q.A, torch.zeros(192, 192), 3 / 5 * v.B @ v.A])
    assert close(qkv(x), F.linear(x, W, qkv.bias), 1e-6)
    assert close(qkv(x[0, 0]), F.linear(x[0, 0], W, qkv.bias), 1e-6)  # a single vector


def test_columns_are_a_range_too() -> None:
    torch.manual_seed(0)
    net = Net(nn.Linear(6, 4))
    table = {
        Net: (vm.Weight("left", "layer.weight", (0, 2), axis=1), vm.Weight("right", "layer.weight", (1, 2), axis=1))
    }
    adapter = vm.adapt(net, vm.LoRA(sites=("left", "right"), rank=2), sites=table)
    shake(adapter, 0.3)
    left, right = adapter.modules.values()
    W = net.layer.weight + torch.cat([left.B @ left.A, right.B @ right.A], 1)
    x = fixed(3, 6)
    want = F.linear(x, W, net.layer.bias)
    assert close(net(x), want, 1e-6)
    adapter.merge()
    assert close(net(x), want, 1e-6)
