"""A base whose linear layers are int8: every method acts on it as on the values it stands for, or says no at once.

int8 weight-only by torchao: a layer computes (x Q^T) s, Q integers and s one scale for each row. The reference is a
float model that holds Q s. The two differ in where fp32 rounds, some 1e-7 of each layer's output: bounds are 1e-5.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, METHODS, Case, adapt, close, condition, fixed, shake

import vismodal as vm
from vismodal.methods import METHODS as ALL
from vismodal.methods import Built, WeightModule
from vismodal.quantised import is_quantised, values
from vismodal.site import Site

VIT = BY_NAME["timm-vit_tiny_patch16_224"]
CLIP = BY_NAME["classifier-clip"]
UNET = BY_NAME["diffusers-SD1.5"]
TEXT = BY_NAME["transformers-CLIPText"]
MODELS = (VIT, CLIP, UNET, TEXT)


def quantise(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def int8(case: Case) -> nn.Module:
    return quantise(case.model())


def dequantised(model: nn.Module) -> nn.Module:
    """The same values as plain floats."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and is_quantised(p):
                module._parameters[name] = nn.Parameter(values(p))
    return model


def parts(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that the parameters are made of."""
    found = {}
    for name, t in model.state_dict().items():
        each = {n: getattr(t, n) for n in ("qdata", "scale")} if is_quantised(t) else {"": t}
        found |= {f"{name}.{n}": part.clone() for n, part in each.items()}
    return found


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = parts(model)
    return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in before)


def is_bare(model: nn.Module) -> bool:
    hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    return "_vismodal" not in model._modules and not any(hooks)


@cache
def case_of(name: str) -> Case:
    """A model with quantised layers that the method claims."""
    claims = METHODS[name].claims
    return next(c for c in MODELS if any(fnmatchcase(c.name, glob) for glob in claims))


def test_torchao_quantises_these_models_and_no_more_than_linear_layers() -> None:
    for case in MODELS:
        model = int8(case)
        owners = {type(m) for m in model.modules() for p in m._parameters.values() if p is not None and is_quantised(p)}
        assert owners and all(issubclass(owner, nn.Linear) for owner in owners)
        assert close(case.run(model), case.run(dequantised(model)))
        assert not close(case.run(model), case.run(case.model()), 1e-4)


@pytest.mark.parametrize("name", [n for n in METHODS if not type(METHODS[n].make(case_of(n).model())).quantised])
def test_the_others_say_no_at_once_and_change_nothing(name: str) -> None:
    case = case_of(name)
    model = int8(case)
    before, y0 = parts(model), case.run(model)
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    method = METHODS[name].make(model)
    says = rf"{name.lower()}/.*none is formed of a quantised one; LoRA, .*DoRA, .*or keep"
    with pytest.raises(vm.InputError, match=says):
        vm.adapt(model, method)
    assert is_bare(model)
    assert same(model, before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert torch.equal(case.run(model), y0)


@pytest.mark.parametrize("name", [n for n in METHODS if type(METHODS[n].make(case_of(n).model())).quantised])
def test_a_method_acts_on_int8_as_on_what_it_stands_for(name: str, tmp_path: Path) -> None:
    case = case_of(name)
    model = int8(case).requires_grad_(False)
    before, y0, classes = parts(model), case.run(model), [type(m) for m in model.modules()]
    twin = dequantised(model)
    adapters = [adapt(m, name, name="a", seed=0) for m in (model, twin)]
    assert all(torch.equal(a, b) for a, b in zip(*(a.state_dict().values() for a in adapters), strict=True))
    for adapter in adapters:
        shake(adapter)
    outputs = [case.run(m) for m in (model, twin)]
    assert not close(outputs[0], y0, 1e-4)
    assert close(outputs[0], outputs[1])
    for y in outputs:
        y.square().mean().backward()
    adapter, other = adapters
    assert adapter.unused() == []
    largest = max(p.grad.abs().max() for p in other.parameters() if p.grad is not None)
    for (key, p), (_, q) in zip(adapter.named_parameters(), other.named_parameters(), strict=True):
        if not p.requires_grad or q.grad is None:
            assert p.grad is None
            continue
        assert p.grad.any() or any(fnmatchcase(key, glob) for glob in METHODS[name].idle), key
        assert (p.grad - q.grad).abs().max() <= 1e-4 * q.grad.abs().max() + 1e-6 * largest, key
    assert all(p.grad is None for n, p in model.named_parameters() if "_vismodal" not in n)
    torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.1).step()
    vm.save(adapter, tmp_path / "a.safetensors")
    y = case.run(model)
    assert not torch.equal(y, outputs[0])
    again = int8(case)
    condition(vm.load(again, tmp_path / "a.safetensors", name="b"), name)
    assert close(case.run(again), y, 2e-6)
    adapter.detach()
    assert is_bare(model)
    assert same(model, before)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(case.run(model.requires_grad_(False)), y0)


def test_what_methods_declare_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vismodal.catalogue._count", lambda *_: "-")  # which takes long
    table = vm.methods()
    column = {row[0]: row[list(table.head).index("quantised")] for row in table.rows}
    train_entries = {"Tune", "CrossAttention", "LinearProbe", "SparseMask"}
    assert {name for name, value in column.items() if value == "no"} == train_entries
    assert {name for name, value in column.items() if value == "yes"} == {m.__name__ for m in ALL} - train_entries
    shown = {line.split()[1]: line for line in str(vm.sites(int8(VIT))).splitlines()[2:]}
    assert "DoRA" in shown["blocks.0.mlp.fc1"]
    assert "SparseMask" not in shown["blocks.0.mlp.fc1"]
    assert "SparseMask" in shown["blocks.0.mlp.fc1.bias"]
    assert "Tune" in shown["norm"]


class Net(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


TABLE = {
    Net: (
        vm.Weight("whole", "layer.weight"),
        vm.Weight("q", "layer.weight", (0, 3)),
        vm.Weight("v", "layer.weight", (2, 3)),
    )
}


def net(rows: int = 24, columns: int = 16) -> tuple[Net, Tensor]:
    """A quantised layer, and its values in fp64."""
    torch.manual_seed(0)
    model = quantise(Net(nn.Linear(columns, rows)))
    return model, values(model.layer.weight).double()


FORMULAS = {  # W' of one module, and b' where that changes too
    "LoRA": lambda m, W, b: (W + 1.5 * m.B @ m.A, b),
    "DoRA": lambda m, W, b: (m.m[:, None] * (V := W + 1.5 * m.B @ m.A) / V.norm(dim=1, keepdim=True), b),
    "PiSSA": lambda m, W, b: (W + 1.5 * (m.B @ m.A - m.B0 @ m.A0), b),
    "IA3": lambda m, W, b: (W * m.l, b),
    "OFT": lambda m, W, b: (m.g[:, None] * W @ cayley(m.Q, 4).T, b),
    "LoHa": lambda m, W, b: (W + 1.5 * (m.w1a @ m.w1b) * (m.w2a @ m.w2b), b),
}
MAKE = {
    "LoRA": vm.LoRA(sites=("whole",), rank=2, alpha=3.0),
    "DoRA": vm.DoRA(sites=("whole",), rank=2, alpha=3.0),
    "PiSSA": vm.PiSSA(sites=("whole",), rank=2, alpha=3.0),
    "IA3": vm.IA3(sites=("whole",), inputs=("whole",)),
    "OFT": vm.OFT(sites=("whole",), block_size=4, rescale=True),
    "LoHa": vm.LoHa(sites=("whole",), rank=2, alpha=3.0),
}


def cayley(entries: Tensor, b: int) -> Tensor:
    blocks = []
    for row in entries[0]:
        Q = torch.zeros(b, b, dtype=row.dtype)
        Q[*torch.triu_indices(b, b, 1)] = row
        Q = Q - Q.T
        blocks.append((torch.eye(b) + Q) @ torch.linalg.inv(torch.eye(b) - Q))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("name", FORMULAS)
def test_by_hand(name: str) -> None:
    model, W = net()
    adapter = vm.adapt(model, MAKE[name], sites=TABLE)
    shake(adapter, 0.3)
    (module,) = adapter.modules.values()
    x = fixed(3, 5, 16)
    y = model(x)
    W2, b2 = FORMULAS[name](copy.deepcopy(module).double(), W, model.layer.bias.double())
    assert close(y.double(), F.linear(x.double(), W2, b2), 2e-6)


@pytest.mark.parametrize("rescale", [False, True])
def test_rotated_inputs_of_ranges_of_rows(rescale: bool) -> None:
    """Each range reads the input turned its own way."""
    for method in (
        vm.OFT(sites=("q", "v"), block_size=4, rescale=rescale),
        vm.BOFT(sites=("q", "v"), block_size=4, factors=3, rescale=rescale),
        vm.IA3(sites=("q", "v"), inputs=("q", "v")),
    ):
        model, _ = net()
        twin = dequantised(model)
        x = fixed(2, 16)
        pair = [vm.adapt(m, method, sites=TABLE, seed=0) for m in (model, twin)]
        for adapter in pair:
            shake(adapter, 0.3)
        assert close(model(x), twin(x), 2e-6)
        assert not close(model(x), F.linear(x, values(model.layer.weight), model.layer.bias), 1e-2)


def test_merging_is_refused_where_the_weight_would_change_and_exact_where_only_the_bias_does() -> None:
    model = int8(VIT).requires_grad_(False)
    before, y0 = parts(model), VIT.run(model)
    lora = vm.adapt(model, vm.LoRA(), name="lora")
    shake(lora)
    y = VIT.run(model)
    with pytest.raises(RuntimeError, match=r"lora/blocks\.0\.attn\.qkv.*cannot merge .*quantised weight; keep it live"):
        lora.merge()
    assert not lora.merged
    assert torch.equal(VIT.run(model), y)
    assert same(model, before)
    lora.detach()
    bias = vm.adapt(model, vm.BitFit(), name="bias")
    shake(bias)
    y = VIT.run(model)
    bias.merge()
    assert close(VIT.run(model), y)
    assert not same(model, before)
    bias.unmerge()
    assert same(model, before)
    bias.detach()
    assert torch.equal(VIT.run(model.requires_grad_(False)), y0)


class Shift(WeightModule):
    """b' = b + 1 in all rows."""

    bias_only = True

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(24))

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert W is None
        assert b is not None
        return W, b + self.one


class Shifted(vm.LoRA):
    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(Shift() for _ in sites))


def test_who_leaves_the_weight_alone_sees_nothing_of_a_quantised_one() -> None:
    model, W = net()
    adapter = vm.adapt(model, Shifted(sites=("whole",)), sites=TABLE)
    x = fixed(3, 16)
    want = F.linear(x.double(), W, model.layer.bias.double() + 1)
    assert close(model(x).double(), want, 2e-6)
    adapter.merge()
    assert close(model(x).double(), want, 2e-6)


def test_a_side_network_begins_as_a_float_copy() -> None:
    model = int8(VIT)
    adapter = vm.adapt(model, vm.SideTuning(side="copy"))
    assert not any(is_quantised(t) for t in adapter.state_dict().values())
    before = {k: t.clone() for k, t in adapter.state_dict().items()}
    VIT.run(model).square().mean().backward()
    assert adapter.unused() == []
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    moved = [k for k, t in adapter.state_dict().items() if not torch.equal(t, before[k])]
    assert any("fc1.weight" in k for k in moved)


def test_two_that_do_not_go_together_on_a_weight() -> None:
    model = int8(VIT)
    lora = vm.adapt(model, vm.LoRA(sites=("attn.q", "mlp.down")), name="lora")
    shake(lora)
    y = VIT.run(model)
    for other in (
        vm.DoRA(sites=("attn.v",)),
        vm.BitFit(where="*.attn.qkv"),
        vm.IA3(sites=("mlp.down",)),
        vm.OFT(sites=("attn.v",)),
    ):
        with pytest.raises(vm.InputError, match="do not go together on it, leave one of them out"):
            vm.adapt(model, other, name="other")
        assert list(vm.attached(model)) == ["lora"]
        assert torch.equal(VIT.run(model), y)
    second = vm.adapt(model, [vm.SSF(sites=("attn.qkv", "norm")), vm.BitFit(where="*.mlp.fc1")], name="other")
    assert not close(VIT.run(model), y, 1e-4)
    second.detach()
    assert torch.equal(VIT.run(model), y)


class Reads(Net):
    """As timm's BEiT, whose call torchao itself does not take yet (weight by keyword)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


def test_a_weight_that_is_read_past_its_layer() -> None:
    model = quantise(Reads(nn.Linear(16, 24)))
    table = {Reads: (vm.Weight("w", "layer.weight", reader=""), vm.Weight("w.bias", "layer.bias", reader=""))}
    with pytest.raises(vm.InputError, match=r"Reads reads this one itself, past its layer, or keep this layer out"):
        vm.adapt(model, vm.LoRA(sites=("w",)), sites=table)
    assert is_bare(model)
    x = fixed(3, 16)
    adapter = vm.adapt(model, vm.Tune(sites=("w.bias",)), sites=table)
    shake(adapter)
    (module,) = adapter.modules.values()
    assert close(model(x), F.linear(x, values(model.layer.weight), module.value), 2e-6)
    model(x).mean().backward()
    assert adapter.unused() == []


def test_a_weight_in_two_places_of_which_one_reads_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.called(x), self.read.weight)

    model = quantise(Tied())
    model.read.weight = model.called.weight
    table = {Tied: (vm.Weight("w", "called.weight"), vm.Weight("v", "read.weight", reader=""))}
    with pytest.raises(vm.InputError, match="Tied reads this one itself"):
        vm.adapt(model, vm.LoRA(sites=("w",)), sites=table)
    assert is_bare(model)


def test_quantising_after_attaching() -> None:
    """Updates do not mind; what forms a weight says so."""
    model = VIT.model().requires_grad_(False)
    lora = vm.adapt(model, vm.LoRA(), name="lora")
    shake(lora)
    twin = int8(VIT)
    vm.adapt(twin, vm.LoRA(), name="lora").load_state_dict(lora.state_dict())
    assert torch.equal(VIT.run(quantise(model)), VIT.run(twin))
    model = VIT.model()
    vm.adapt(model, vm.SparseMask(criterion="magnitude"))
    quantise(model)
    with pytest.raises(RuntimeError, match="quantised after the adapter was attached"):
        VIT.run(model)


def test_a_file_goes_to_the_quantised_base_and_to_the_float_one(tmp_path: Path) -> None:
    """Both are one checkpoint. Another one warns, by what is not quantised."""
    model = int8(VIT)
    adapter = vm.adapt(model, vm.LoRA())
    shake(adapter)
    y = VIT.run(model)
    path = vm.save(adapter, tmp_path / "a.safetensors")
    base = VIT.model()
    vm.load(base, path)
    assert close(VIT.run(base), y, 0.05)  # as far apart as the bases
    assert not close(VIT.run(base), y, 1e-4)
    vm.attached(base)["a"].detach()
    path = vm.save(vm.adapt(base, vm.LoRA()), tmp_path / "b.safetensors")
    vm.load(int8(VIT), path)
    other = VIT.model()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    with pytest.warns(UserWarning, match="made on another checkpoint"):
        vm.load(quantise(other), path)


def test_in_bf16_with_checkpointing_and_compiled_whole() -> None:
    model = quantise(VIT.model().bfloat16()).train()
    twin = dequantised(model)
    gradients = []
    for m, on in ((model, False), (model, True), (twin, False)):
        m.set_grad_checkpointing(on)
        adapter = vm.adapt(m, vm.LoRA(sites=("attn.*", "mlp.*")), seed=0)
        shake(adapter)
        y = VIT.run(m)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        gradients.append([p.grad for p in adapter.parameters()])
        adapter.detach()
    plain, checkpointed, reference = gradients
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert all(close(a, b, 0.1) for a, b in zip(plain, reference, strict=True))
    model = int8(VIT)
    shake(vm.adapt(model, vm.LoRA(), name="a"))
    y = VIT.run(model)
    torch._dynamo.reset()
    compiled = torch.compile(VIT.run, backend="eager", fullgraph=True)
    assert close(compiled(model), y, 2e-6)


def test_lora_on_a_unet_with_convolutions_in_float() -> None:
    model = int8(UNET).requires_grad_(False)
    y0, before = UNET.run(model), parts(model)
    twin = dequantised(model)
    kinds = ("attn.*", "xattn.*", "mlp.*", "conv", "time", "proj.*")
    pair = [vm.adapt(m, vm.LoRA(sites=kinds, rank=4), seed=0) for m in (model, twin)]
    for adapter in pair:
        shake(adapter)
    y = UNET.run(model)
    assert close(y, UNET.run(twin))
    y.square().mean().backward()
    assert pair[0].unused() == []
    pair[0].detach()
    assert torch.equal(UNET.run(model.requires_grad_(False)), y0)
    assert same(model, before)


def test_values_that_nobody_can_read() -> None:
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert is_quantised(packed.weight)
    with pytest.raises(vm.InputError, match=r"a Tensor of torch\.uint8 cannot be read; take .* LoRA"):
        values(packed.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert values(packed.bias) is packed.bias
