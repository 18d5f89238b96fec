"""IA3 and SSF against their formulas written out by hand, and biases that a layer lacks or holds elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, close, fixed, shake

import vismodal as vm
from vismodal.methods.base import Built, WeightModule
from vismodal.site import Site

BEIT, EVA, SWIN = (
    BY_NAME[f"timm-{name}"] for name in ("beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256")
)
SPLIT = pytest.mark.parametrize("case", [BEIT, EVA, SWIN], ids=lambda c: c.name)


class Net(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


TABLE = {Net: (vm.Weight("w", "layer.weight"),)}


def vit() -> nn.Module:
    return BY_NAME["timm-vit_tiny_patch16_224"].model()


def modules(adapter: vm.Adapter) -> dict[str, nn.Module]:
    """By site alone."""
    return {key.partition("/")[2]: module for key, module in adapter.modules.items()}


# -- counts --------------------------------------------------------------------------------------------------------


def test_counts_on_vit_base() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert vm.adapt(model, vm.IA3(), name="ia3").num_parameters == 55_296
    assert vm.adapt(model, vm.SSF(), name="ssf").num_parameters == 205_824


# -- IA3 -----------------------------------------------------------------------------------------------------------


def test_ia3_equals_the_formula_on_a_block() -> None:
    model = vit()
    block = model.blocks[0]
    adapter = vm.adapt(model, vm.IA3())
    shake(adapter, 0.3)
    l = {key.partition(":")[2] or "ff": m.l for key, m in modules(adapter).items() if key.startswith("blocks.0.")}
    x = fixed(2, 5, 24)
    n = F.layer_norm(x, (24,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
    q, k, v = F.linear(n, block.attn.qkv.weight, block.attn.qkv.bias).split(24, -1)
    q, k, v = (t.view(2, 5, 3, 8).transpose(1, 2) for t in (q, l["k"] * k, l["v"] * v))
    y = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    mid = x + F.linear(y.transpose(1, 2).reshape(2, 5, 24), block.attn.proj.weight, block.attn.proj.bias)
    n = F.layer_norm(mid, (24,), block.norm2.weight, block.norm2.bias, block.norm2.eps)
    h = l["ff"] * F.gelu(F.linear(n, block.mlp.fc1.weight, block.mlp.fc1.bias))
    want = mid + F.linear(h, block.mlp.fc2.weight, block.mlp.fc2.bias)
    assert close(block(x), want, 1e-6)


def test_ia3_merges_into_rows_biases_and_columns() -> None:
    model = vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = vm.adapt(model, vm.IA3())
    shake(adapter, 0.3)
    l = modules(adapter)
    adapter.merge()
    after = model.state_dict()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    names = ("attn.qkv.weight", "attn.qkv.bias", "mlp.fc2.weight")
    assert changed == {f"blocks.{i}.{name}" for i in (0, 1) for name in names}
    for slot in ("weight", "bias"):
        q, k, v = after[f"blocks.1.attn.qkv.{slot}"].split(24)
        q0, k0, v0 = before[f"blocks.1.attn.qkv.{slot}"].split(24)
        as_rows = (24, 1) if slot == "weight" else (24,)
        assert torch.equal(q, q0)
        assert close(k, l["blocks.1.attn.qkv:k"].l.view(as_rows) * k0, 1e-7)
        assert close(v, l["blocks.1.attn.qkv:v"].l.view(as_rows) * v0, 1e-7)
    columns = before["blocks.1.mlp.fc2.weight"] * l["blocks.1.mlp.fc2"].l
    assert close(after["blocks.1.mlp.fc2.weight"], columns, 1e-7)


def test_ia3_begins_as_the_base_to_the_bit() -> None:
    model = vit().requires_grad_(False)
    x = fixed(2, 3, 32, 32)
    y0 = model(x)
    vm.adapt(model, vm.IA3())
    assert torch.equal(model(x), y0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by peft
def test_ia3_against_peft() -> None:
    model = BY_NAME["transformers-ViT"].model()
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    adapter = vm.adapt(model, vm.IA3())
    shake(adapter, 0.3)
    with torch.no_grad():
        for key, module in modules(adapter).items():
            vector = theirs.get_submodule(f"base_model.model.{key}").ia3_l["default"]
            vector.copy_(module.l.view_as(vector))
    x = fixed(2, 3, 32, 32)
    assert close(model(x).logits, theirs(x).logits, 1e-6)


def test_ia3_scales_what_inputs_names() -> None:
    torch.manual_seed(0)
    table = {Net: (vm.Weight("out", "layer.weight"),)}
    x = fixed(3, 6)
    for inputs in ((), "out"):
        net = Net(nn.Linear(6, 4))
        adapter = vm.adapt(net, vm.IA3(sites=("out",), inputs=inputs), sites=table)  # type: ignore[arg-type]
        shake(adapter, 0.3)
        (module,) = adapter.modules.values()
        W, b = net.layer.weight, net.layer.bias
        want = F.linear(x * module.l, W, b) if inputs else F.linear(x, W, b) * module.l
        assert close(net(x), want, 1e-6)
    convolution = Net(nn.Conv2d(6, 4, 3))
    adapter = vm.adapt(convolution, vm.IA3(sites=("out",), inputs=("out",)), sites=table)
    shake(adapter, 0.3)
    (module,) = adapter.modules.values()
    x = fixed(2, 6, 5, 5)
    want = F.conv2d(x * module.l[:, None, None], convolution.layer.weight, convolution.layer.bias)
    assert close(convolution(x), want, 1e-6)
    cases: list[tuple[nn.Module, vm.IA3, str]] = [
        (nn.Linear(6, 4), vm.IA3(sites=("out",), inputs=("up",)), "inputs names 'up', which is the kind of no chosen"),
        (nn.Conv2d(6, 4, 3, groups=2), vm.IA3(sites=("out",), inputs=("out",)), "a convolution in groups"),
        (nn.Embedding(6, 4), vm.IA3(sites=("out",)), "rows of layer .out. are not"),
        (nn.LayerNorm(6), vm.IA3(sites=("out",)), "rows of layer .out. are not"),
    ]
    for layer, method, says in cases:
        with pytest.raises(vm.InputError, match=says):
            vm.adapt(Net(layer), method, sites=table)


# -- SSF -----------------------------------------------------------------------------------------------------------


def scaled(model: nn.Module, adapter: vm.Adapter) -> nn.Module:
    """A copy of the base in which the output of every operation is scaled and shifted, as the paper draws it."""
    vm.use(model)
    twin = copy.deepcopy(model)
    vm.use(model, adapter.name)
    vm.attached(twin)[adapter.name].detach()
    vectors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for key, m in modules(adapter).items():  # the parts of a fused qkv come in order
        vectors.setdefault(key.partition(":")[0], []).append((m.scale, m.shift))
    for path, parts in vectors.items():
        scale, shift = (torch.cat(each) for each in zip(*parts, strict=True))
        images = isinstance(twin.get_submodule(path), nn.Conv2d)

        def act(_: nn.Module, __: object, y: Tensor, scale: Tensor = scale, shift: Tensor = shift, n: int = 2 * images):
            as_y = (-1, *[1] * n)
            return y * scale.view(as_y) + shift.view(as_y)

        twin.get_submodule(path).register_forward_hook(act)
    return twin


def test_ssf_equals_the_formula_on_a_whole_vit() -> None:
    model = vit()
    adapter = vm.adapt(model, vm.SSF())
    shake(adapter, 0.2)
    paths = {key.partition(":")[0] for key in modules(adapter)}
    block = {
        f"blocks.{i}.{op}" for i in (0, 1) for op in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    }
    assert paths == block | {"patch_embed.proj", "norm"}
    x = fixed(2, 3, 32, 32)
    want = scaled(model, adapter)(x)
    assert close(model(x), want, 2e-6)
    adapter.merge()
    assert close(model(x), want, 2e-6)


def test_ssf_begins_near_the_base() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=768, num_heads=12)
    adapter = vm.adapt(model, vm.SSF())
    scales = torch.cat([m.scale for m in adapter.modules.values()])
    shifts = torch.cat([m.shift for m in adapter.modules.values()])
    assert abs(scales.mean() - 1) < 1e-3
    assert abs(shifts.mean()) < 1e-3
    assert abs(scales.std() / 0.02 - 1) < 0.02
    assert abs(shifts.std() / 0.02 - 1) < 0.02


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(6, 4), (2, 3, 6), -1),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), (2, 6, 5), 1),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5), 1),
    "conv2d without batch": (lambda: nn.Conv2d(6, 4, 3), (6, 5, 5), 0),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 3, 6), -1),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 5, 5), 1),
    "batch norm": (lambda: nn.BatchNorm2d(6), (2, 6, 5, 5), 1),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(6), (4, 6), 1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_ssf_on_every_layer(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    make, shape, axis = LAYERS[name]
    net = Net(make()).eval()
    if not bias:
        net.layer.bias = None
    x = fixed(*shape)
    y0 = net(x)
    adapter = vm.adapt(net, vm.SSF(sites=("w",)), sites=TABLE)
    shake(adapter, 0.3)
    (module,) = adapter.modules.values()
    channels = [-1 if i == axis % y0.dim() else 1 for i in range(y0.dim())]
    want = y0 * module.scale.view(channels) + module.shift.view(channels)
    assert close(net(x), want, 1e-6)
    before = net.layer.weight.clone()
    if bias:
        adapter.merge()
        assert close(net(x), want, 1e-6)
        return
    with pytest.raises(RuntimeError, match="cannot merge, the layer has no bias; keep it live"):
        adapter.merge()
    assert not adapter.merged
    assert torch.equal(net.layer.weight, before)
    assert close(net(x), want, 1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_ssf_where_the_weight_is_shadowed(bias: bool) -> None:
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(8, 2, batch_first=True, bias=bias)
    table = {nn.MultiheadAttention: (vm.Weight("attn.qkv", "in_proj_weight"),)}
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(attn).to(dtype)
        adapter = vm.adapt(model, vm.SSF(sites=("attn.qkv",)), sites=table)
        shake(adapter, 0.3)
        (module,) = adapter.modules.values()
        x = fixed(2, 3, 8).to(dtype)
        want = copy.deepcopy(attn)
        with torch.no_grad():
            want.in_proj_weight *= module.scale[:, None]
            shift = module.shift if not bias else want.in_proj_bias * module.scale + module.shift
            want.in_proj_bias = nn.Parameter(shift.clone())
        seen: list[torch.dtype] = []
        model.register_forward_pre_hook(lambda m, _, seen=seen: seen.append(m.in_proj_bias.dtype))
        got = model(x, x, x, need_weights=False)[0]
        assert seen == [dtype]
        assert close(got.float(), want(x.float(), x.float(), x.float())[0], 1e-6 if dtype == torch.float32 else 0.03)


def test_ssf_refuses_what_has_no_bias_or_no_features_in_rows() -> None:
    for layer in (nn.RMSNorm(4), nn.Embedding(4, 4), nn.ConvTranspose2d(4, 4, 2), nn.LayerNorm((3, 4))):
        with pytest.raises(
            vm.InputError, match=r"SSF scales and shifts features: layer .w. has none in its rows, or its"
        ):
            vm.adapt(Net(layer), vm.SSF(sites=("w",)), sites=TABLE)


def test_a_scale_near_one_is_not_lost_in_16_bits() -> None:
    for method, bound in ((vm.IA3(sites=("w",)), 2e-4), (vm.SSF(sites=("w",)), 2e-4)):
        net = Net(nn.Linear(64, 64)).bfloat16()
        x = fixed(64, 64).bfloat16()
        y0 = net(x).float()
        adapter = vm.adapt(net, method, sites=TABLE)
        with torch.no_grad():
            for name, p in adapter.named_parameters():
                p.fill_(0 if name.endswith("shift") else 1.003)  # the next numbers in bf16 are 1 and 1.0078
        assert abs((net(x).float() * y0).mean() / (y0 * y0).mean() - 1.003) < bound


# -- kinds that hold weights and biases -----------------------------------------------------------------------------


def test_a_kind_that_names_its_bias_too_gives_weights_alone_to_a_method_of_weights() -> None:
    model = vit()
    adapter = vm.adapt(model, vm.SSF(sites=("norm",)), name="ssf")
    assert set(modules(adapter)) == {"norm", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2))}
    assert list(modules(vm.adapt(model, vm.LoRA(sites=("head",), rank=2), name="lora"))) == ["head"]
    both = vm.adapt(model, vm.Tune(sites=("norm",)), name="tune")
    assert len(both.modules) == 10


# -- biases in pieces -------------------------------------------------------------------------------------------------


def attention(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if getattr(m, "q_bias", None) is not None)


@SPLIT
def test_ia3_scales_a_bias_that_is_held_apart(case: object) -> None:
    model = case.model()  # type: ignore[attr-defined]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = vm.adapt(model, vm.IA3(sites=("attn.k", "attn.v")))
    shake(adapter, 0.3)
    twin = case.model()  # type: ignore[attr-defined]
    with torch.no_grad():
        for key, module in modules(adapter).items():
            path, _, kind = key.rpartition(".qkv:")
            attn = twin.get_submodule(path)
            start = {"k": 1, "v": 2}[kind] * len(module.l)
            attn.qkv.weight[start : start + len(module.l)] *= module.l[:, None]
            if kind == "v":
                attn.v_bias *= module.l
    want = case.run(twin)  # type: ignore[attr-defined]
    assert close(case.run(model), want, 1e-5)  # type: ignore[attr-defined]
    adapter.merge()
    assert close(case.run(model), want, 1e-5)  # type: ignore[attr-defined]
    assert close(attention(model).v_bias, attention(twin).v_bias, 1e-6)
    adapter.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@SPLIT
def test_ssf_shifts_keys_live_where_their_bias_is_fixed_at_zero_and_cannot_fold(case: object) -> None:
    model = case.model()  # type: ignore[attr-defined]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = vm.adapt(model, vm.SSF(sites=("attn.k",)))
    shake(adapter, 0.3)
    twin = case.model()  # type: ignore[attr-defined]
    with torch.no_grad():
        for key, module in modules(adapter).items():
            attn = twin.get_submodule(key.rpartition(".qkv:")[0])
            attn.qkv.weight[len(module.scale) : 2 * len(module.scale)] *= module.scale[:, None]
            attn.k_bias.copy_(module.shift)  # a buffer that no file holds
    assert close(case.run(model), case.run(twin), 1e-5)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the layer has no bias"):
        adapter.merge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not attention(model).k_bias.any()


def test_two_methods_on_a_bias_held_apart_act_in_order(tmp_path: Path) -> None:
    model = EVA.model()
    bias = vm.adapt(model, vm.BitFit(), name="bias")
    scale = vm.adapt(model, vm.IA3(sites=("attn.v",)), name="scale")
    assert {k.rpartition(".")[2] for k in bias.modules if ".attn." in k} >= {"q_bias", "v_bias"}
    shake(bias, 0.3)
    shake(scale, 0.3)
    for order in (("bias", "scale"), ("scale", "bias")):
        vm.use(model, *order)
        live = EVA.run(model)
        bias.merge()
        scale.merge()
        assert close(EVA.run(model), live)
        attn = attention(model)
        path = next(name for name, m in model.named_modules() if m is attn)
        tuned, l = modules(bias)[f"{path}.v_bias"].value, modules(scale)[f"{path}.qkv:v"].l
        want = tuned * l if order[0] == "bias" else tuned
        assert close(attn.v_bias, want, 1e-7)
        bias.unmerge()
        scale.unmerge()
    vm.save(bias, tmp_path / "b.safetensors")
    fresh = EVA.model()
    vm.load(fresh, tmp_path / "b.safetensors")
    vm.use(model, "bias")
    assert close(EVA.run(fresh), EVA.run(model), 1e-6)


class Shift(WeightModule):
    """b' = b + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(4))

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return W, self.one if b is None else b + self.one


class Shifted(vm.LoRA):
    @classmethod
    def fits(cls, site: Site) -> bool:
        return True

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(Shift() for _ in sites))


def test_a_bias_that_no_layer_would_read_is_an_error() -> None:
    net = Net(nn.RMSNorm(4))
    vm.adapt(net, Shifted(sites=("w",)), sites=TABLE)
    with pytest.raises(RuntimeError, match="RMSNorm takes no bias"):
        net(fixed(2, 4))
    assert "bias" not in net.layer.__dict__


# -- additive after scaling, and the other way round (rule 10 of the design) -----------------------------------------


@pytest.mark.parametrize("scaling", [vm.IA3(sites=("w",)), vm.SSF(sites=("w",))], ids=["IA3", "SSF"])
@pytest.mark.parametrize("order", [("add", "scale"), ("scale", "add")], ids=" then ".join)
def test_the_order_of_adding_and_scaling_is_the_order_given(scaling: vm.IA3 | vm.SSF, order: tuple[str, str]) -> None:
    torch.manual_seed(0)
    net = Net(nn.Linear(6, 4))
    W, b = net.layer.weight.detach().clone(), net.layer.bias.detach().clone()
    add = vm.adapt(net, vm.LoRA(sites=("w",), rank=2), name="add", sites=TABLE)
    scale = vm.adapt(net, scaling, name="scale", sites=TABLE)
    shake(add, 0.3)
    shake(scale, 0.3)
    (pair,), (rows,) = add.modules.values(), scale.modules.values()
    l = rows.l if isinstance(scaling, vm.IA3) else rows.scale
    shift = 0 if isinstance(scaling, vm.IA3) else rows.shift
    change = pair.B @ pair.A
    want_W = l[:, None] * (W + change) if order[0] == "add" else l[:, None] * W + change
    x = fixed(3, 6)
    want = F.linear(x, want_W, l * b + shift)
    vm.use(net, *order)
    assert close(net(x), want, 1e-6)
    for name in order:
        vm.attached(net)[name].merge()
    assert close(net(x), want, 1e-6)
    assert close(net.layer.weight, want_W, 1e-6)
    other = l[:, None] * W + change if order[0] == "add" else l[:, None] * (W + change)
    assert not close(net.layer.weight, other, 1e-3)
