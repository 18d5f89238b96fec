"""LoRA's derivatives against their formulas written out by hand, and against peft where peft is right."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, close, fixed, shake

import vismodal as vm
from vismodal.methods import Method, Part

VIT = BY_NAME["timm-vit_tiny_patch16_224"]
MHA = BY_NAME["open_clip-CLIP"]


class Net(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


TABLE = {Net: (vm.Weight("w", "layer.weight"),)}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(7, 5),
    "linear without bias": lambda: nn.Linear(7, 5, bias=False),
    "conv": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "conv in groups": lambda: nn.Conv2d(6, 4, 3, groups=2),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def net_and_input(name: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net = Net(LAYERS[name]())
    return net, fixed(2, 6, 9, 9) if "conv" in name else fixed(2, 3, 7)


def with_weight(net: Net, x: Tensor, W: Tensor) -> Tensor:
    """The layer's output for another weight."""
    layer = net.layer
    if isinstance(layer, nn.Linear):
        return F.linear(x, W, layer.bias)
    assert isinstance(layer, nn.Conv2d)
    return F.conv2d(x, W, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def only(adapter: vm.Adapter) -> nn.Module:
    (module,) = adapter.modules.values()
    return module


def product(A: Tensor, B: Tensor) -> Tensor:
    return torch.einsum("or,r...->o...", B, A)


def test_counts_on_vit_base() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")

    def count(method: Method) -> int:
        adapter = vm.adapt(model, method)
        trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        adapter.detach()
        return trained

    assert count(vm.LoRA()) == 294_912
    assert count(vm.LoRA(freeze_down=True)) == 147_456
    assert count(vm.DoRA()) == 294_912 + 24 * 768
    assert count(vm.PiSSA()) == 294_912
    assert count(vm.DyLoRA()) == 294_912
    assert count(vm.VeRA()) == 24 * (256 + 768)
    assert count(vm.AdaLoRA()) == 24 * (12 * 2 * 768 + 12)


def test_errors_name_the_method_and_the_fix() -> None:
    model = VIT.model()
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: vm.DoRA(rank=0), "DoRA: rank must be at least 1, not 0"),
        (lambda: vm.PiSSA(dropout=1.0), r"PiSSA: dropout must be in \[0, 1\), not 1\.0"),
        (lambda: vm.LoRA(alpha=0), "LoRA: alpha must be above 0, not 0"),
        (lambda: vm.LoRA(lr_ratio=-1), "LoRA: lr_ratio must be above 0, not -1"),
        (lambda: vm.AdaLoRA(rank=4), "AdaLoRA: target must be from 1 to rank=4, not 8"),
        (lambda: vm.AdaLoRA(warmup=0.5), r"AdaLoRA: warmup=0\.5 and final=0\.5 must leave updates between them"),
        (lambda: vm.AdaLoRA(beta1=1.0), r"AdaLoRA: beta1 must be between 0 and 1, not 1\.0"),
        (lambda: vm.AdaLoRA(every=0), "AdaLoRA: every must be at least 1, not 0"),
        (lambda: vm.adapt(model, vm.PiSSA(rank=25)), "PiSSA: rank 25 is too large for .*:q, which has 24"),
        (lambda: vm.adapt(model, vm.DoRA(sites=("norm",))), "DoRA scales output features"),
        (lambda: vm.adapt(model, vm.DoRA(ranks={"conv": 3})), "DoRA: ranks names 'conv'"),
        (
            lambda: vm.adapt(MHA.model(), vm.DoRA(sites=("projection",))),
            "which the rows of .*proj .projection. are not",
        ),
        (lambda: vm.adapt(MHA.model(), vm.DoRA(sites=("embed.tokens",))), "DoRA scales output features"),
        (lambda: vm.adapt(model, vm.VeRA(sites=("norm",))), "VeRA needs a floating-point matrix"),
    ]
    for make, says in cases:
        with pytest.raises(vm.InputError, match=says):
            make()


# -- DoRA --------------------------------------------------------------------------------------------------------------


def decomposed(W: Tensor, m: nn.Module, s: float) -> Tensor:
    """m (W + s B A) / |W + s B A|, the norm without gradient: arXiv 2402.09353, equation 5 and section 4.3."""
    V = W + s * product(m.A, m.B)
    norm = V.detach().pow(2).sum(dim=tuple(range(1, V.dim())), keepdim=True).sqrt()
    return m.m.view(norm.shape) * V / norm


@every_layer
@pytest.mark.parametrize("alone", [True, False], ids=["update", "shadow"])
def test_dora_equals_the_formula_and_its_gradient(name: str, alone: bool) -> None:
    net, x = net_and_input(name)
    adapter = vm.adapt(net, vm.DoRA(sites=("w",), rank=3, alpha=6), name="dora", sites=TABLE)
    module = only(adapter)
    assert close(module.m.detach(), net.layer.weight.flatten(1).norm(dim=1), 1e-6)
    if not alone:  # another adapter on the weight, off, has W' formed
        vm.adapt(net, vm.LoRA(sites=("w",), rank=1), name="other", sites=TABLE)
        vm.use(net, "dora")
    shake(adapter, 0.3)
    want = with_weight(net, x, decomposed(net.layer.weight, module, 2))
    assert close(net(x), want, 1e-6)
    parameters = [module.A, module.B, module.m]
    theirs = torch.autograd.grad(want.square().sum(), parameters)
    ours = torch.autograd.grad(net(x).square().sum(), parameters)
    assert all(close(a, b, 1e-5) for a, b in zip(ours, theirs, strict=True))
    adapter.scale = 0.25
    base = with_weight(net, x, net.layer.weight)
    assert close(net(x), base + 0.25 * (want - base), 1e-6)


@every_layer
def test_dora_begins_as_the_base_to_the_bit(name: str) -> None:
    net, x = net_and_input(name)
    y0 = net.requires_grad_(False)(x)
    vm.adapt(net, vm.DoRA(sites=("w",)), sites=TABLE)
    assert torch.equal(net(x), y0)
    model = MHA.model().requires_grad_(False)  # formed
    with torch.no_grad():
        y0 = MHA.run(model)
        vm.adapt(model, vm.DoRA(sites=("attn.*", "mlp.*")))
        assert torch.equal(MHA.run(model), y0)


def test_dora_on_parts_of_one_weight_and_after_another_adapter() -> None:
    model = VIT.model()
    qkv = model.blocks[0].attn.qkv
    x = fixed(2, 5, 24)
    first = vm.adapt(model, vm.LoRA(rank=2, sites=("attn.qkv",), where="blocks.0.*"), name="first")
    dora = vm.adapt(model, vm.DoRA(rank=2, where="blocks.0.*"), name="dora")
    shake(first, 0.2)
    shake(dora, 0.2)
    q, v = dora.modules.values()
    whole = product(only(first).A, only(first).B)

    def formula(W: Tensor) -> Tensor:
        return torch.cat([decomposed(W[:24], q, 1), W[24:48], decomposed(W[48:], v, 1)])

    for order, W in (
        (("first", "dora"), formula(qkv.weight + whole)),
        (("dora", "first"), formula(qkv.weight) + whole),
        (("dora",), formula(qkv.weight)),
    ):
        vm.use(model, *order)
        assert close(qkv(x), F.linear(x, W, qkv.bias), 1e-6)
    first.detach()
    assert close(qkv(x), F.linear(x, formula(qkv.weight), qkv.bias), 1e-6)  # on the output again


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    net, x = net_and_input("linear")
    with torch.no_grad():
        net.layer.weight[2] = 0
    adapter = vm.adapt(net, vm.DoRA(sites=("w",), rank=2), sites=TABLE)
    net(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    assert torch.equal(net(x)[..., 2], net.layer.bias[2].expand(2, 3))


@pytest.mark.parametrize("name", [n for n in LAYERS if "groups" not in n])  # peft cuts the rank into groups there
def test_dora_against_peft(name: str) -> None:
    net, x = net_and_input(name)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    adapter = vm.adapt(net, vm.DoRA(sites=("w",), rank=3, alpha=6), sites=TABLE)
    shake(adapter, 0.3)
    mine, factors = only(adapter), theirs.base_model.model.layer
    magnitude = factors.lora_magnitude_vector["default"].weight
    A, B = factors.lora_A["default"].weight, factors.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(mine.A)
        B.copy_(mine.B.view_as(B))
        magnitude.copy_(mine.m.view_as(magnitude))
    ours, peers = net(x), theirs(x)
    assert close(ours, peers, 1e-6)
    ours.square().sum().backward()
    peers.square().sum().backward()
    for a, b in ((mine.A, A), (mine.B, B), (mine.m, magnitude)):
        assert close(a.grad, b.grad.view_as(a), 1e-5)


@every_layer
def test_dora_against_lycoris(name: str) -> None:
    """Equal but for the gradient of the direction: its norm is no constant there (section 4.3 of the paper)."""
    pytest.importorskip("lycoris", reason="there is no lycoris_lora to compare with: pip install -e '.[dev]'")
    from lycoris.modules import LoConModule

    net, x = net_and_input(name)
    theirs = LoConModule("x", copy.deepcopy(net.layer), 1.0, 3, alpha=6, weight_decompose=True)
    adapter = vm.adapt(net, vm.DoRA(sites=("w",), rank=3, alpha=6), sites=TABLE)
    mine = only(adapter)
    pairs = ((mine.A, theirs.lora_down.weight), (mine.B, theirs.lora_up.weight), (mine.m, theirs.dora_scale))
    assert close(mine.m, theirs.dora_scale.flatten(), 1e-6)
    shake(adapter, 0.3)
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a.view_as(b))
    ours, peers = net(x), theirs(x)
    assert close(ours, peers, 2e-6)
    ours.square().sum().backward()
    peers.square().sum().backward()
    A, B, m = (close(a.grad, b.grad.view_as(a), 1e-5) for a, b in pairs)
    assert m
    assert not A
    assert not B


# -- PiSSA -------------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_pissa_holds_the_principal_part_and_the_residual_stays(name: str, alpha: float | None) -> None:
    net, x = net_and_input(name)
    W = net.layer.weight.detach().clone()
    y0 = net.requires_grad_(False)(x)
    adapter = vm.adapt(net, vm.PiSSA(sites=("w",), rank=2, alpha=alpha), sites=TABLE)
    assert torch.equal(net(x), y0)
    module = only(adapter)
    s = 1 if alpha is None else 3
    U, S, Vh = torch.linalg.svd(W.flatten(1), full_matrices=False)
    principal = (U[:, :2] * S[:2] @ Vh[:2]).view_as(W)
    assert close(s * product(module.A, module.B).detach(), principal, 1e-5)
    assert close(module.A.flatten(1).norm(dim=1), module.B.norm(dim=0), 1e-5)  # the root of S in both
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(net.layer.weight, W)  # the base holds W, not the residual
    want = with_weight(net, x, W - principal + s * product(module.A, module.B))
    assert not close(want, y0, 1e-2)
    assert close(net(x), want, 1e-5)
    adapter.merge()
    assert close(net(x), want, 1e-5)


def test_pissa_against_peft() -> None:
    net, x = net_and_input("linear")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    adapter = vm.adapt(net, vm.PiSSA(sites=("w",), rank=3, alpha=6), sites=TABLE)
    mine, layer = only(adapter), theirs.base_model.model.layer
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert close((mine.B @ mine.A).detach(), (B @ A).detach(), 1e-5)
    shake(adapter, 0.1)
    with torch.no_grad():
        A.copy_(mine.A)
        B.copy_(mine.B)
    ours, peers = net(x), theirs(x)
    assert close(ours, peers, 1e-5)
    ours.square().sum().backward()
    peers.square().sum().backward()
    assert close(mine.A.grad, A.grad, 1e-5)
    assert close(mine.B.grad, B.grad, 1e-5)


def test_small_steps_of_pissa_show_in_16_bits() -> None:
    torch.manual_seed(0)
    net = Net(nn.Linear(64, 64, bias=False)).bfloat16()
    adapter = vm.adapt(net, vm.PiSSA(sites=("w",), rank=8), sites=TABLE)
    module = only(adapter)
    x = fixed(256, 64).bfloat16()
    with torch.no_grad():
        module.B.mul_(1.001)  # less than the spacing of bf16, relative to B
        got = type(module).update(net.layer, [Part(module, None, 0)], x, torch.zeros_like(x))
        want = x.double() @ (0.001 * (module.B0 @ module.A0).double()).t()
    assert (got.double() - want).norm() < 0.02 * want.norm()


def test_a_file_of_pissa_holds_where_it_began(tmp_path: Path) -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.PiSSA(rank=2))
    shake(adapter, 0.2)
    y = VIT.run(model)
    path = vm.save(adapter, tmp_path / "a.safetensors")
    adapter.detach()
    with torch.no_grad():  # another base of the same shapes has other singular triples
        model.blocks[0].attn.qkv.weight.mul_(1 + 1e-4)
    vm.load(model, path)
    assert close(VIT.run(model), y, 1e-2)
    with safe_open(path, "pt") as file:
        assert {key.rpartition(".")[2] for key in file.keys()} == {"A", "B", "A0", "B0"}  # noqa: SIM118


# -- LoRA+ and LoRA-FA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [vm.LoRA, vm.DoRA, vm.PiSSA])
def test_lora_plus_gives_B_a_learning_rate_of_its_own(method: type[vm.LoRA]) -> None:
    adapter = vm.adapt(VIT.model(), method(rank=2, lr_ratio=16))
    names = {id(p): name.rpartition(".")[2] for name, p in adapter.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in adapter.groups(1e-3) for p in group["params"]}
    assert rates["A"] == 1e-3
    assert rates["B"] == 16e-3
    assert rates.get("m", 1e-3) == 1e-3
    assert {group["lr"] for group in vm.adapt(VIT.model(), method(rank=2)).groups(1e-3)} == {1e-3}


def test_lora_fa_trains_B_alone_and_stores_A_x_instead_of_x() -> None:
    net, _ = net_and_input("linear")
    x = fixed(50, 7)
    kept: dict[bool, set[int]] = {}
    for frozen in (False, True):
        adapter = vm.adapt(net, vm.LoRA(sites=("w",), rank=2, freeze_down=frozen), sites=TABLE)
        shake(adapter, 0.3)
        module = only(adapter)
        assert module.A.requires_grad != frozen
        seen: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t) or t, lambda t: t):
            y = net(x)
        kept[frozen] = {t.numel() for t in seen}
        y.square().sum().backward()
        assert (module.A.grad is None) == frozen
        assert close(module.B.grad, 2 * y.detach().t() @ (x @ module.A.detach().t()), 1e-5)
        adapter.trainable = False
        adapter.trainable = True
        assert module.A.requires_grad != frozen
        adapter.detach()
    assert x.numel() in kept[False]
    assert x.numel() not in kept[True]
    assert 50 * 2 in kept[True]


# -- VeRA --------------------------------------------------------------------------------------------------------------


def test_vera_equals_the_formula_with_one_pair_of_matrices(tmp_path: Path) -> None:
    model = VIT.model()
    method = vm.VeRA(sites=("attn.q", "attn.v", "mlp.up", "mlp.down"), rank=5, seed=3)
    adapter = vm.adapt(model, method)
    shake(adapter, 0.3)
    generator = torch.Generator().manual_seed(3)
    A = (torch.rand(5, 96, generator=generator) * 2 - 1) * (6 / 96) ** 0.5  # Kaiming uniform
    B = (torch.rand(96, 5, generator=generator) * 2 - 1) * (6 / 5) ** 0.5
    block = model.blocks[0]
    for name, layer in (("mlp.fc1", block.mlp.fc1), ("mlp.fc2", block.mlp.fc2)):
        m = adapter.modules[f"vera/blocks.0.{name}"]
        rows, columns = layer.weight.shape
        W = layer.weight + torch.diag(m.b) @ B[:rows] @ torch.diag(m.d) @ A[:, :columns]
        x = fixed(2, 5, columns)
        assert close(layer(x), F.linear(x, W, layer.bias), 1e-6)
    q, v = (adapter.modules[f"vera/blocks.0.attn.qkv:{part}"] for part in "qv")
    change = [m.b[:, None] * (B[:24] @ (m.d[:, None] * A[:, :24])) for m in (q, v)]
    W = block.attn.qkv.weight + torch.cat([change[0], torch.zeros(24, 24), change[1]])
    x = fixed(2, 5, 24)
    assert close(block.attn.qkv(x), F.linear(x, W, block.attn.qkv.bias), 1e-6)
    y = VIT.run(model)
    path = vm.save(adapter, tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        assert {key.rpartition(".")[2] for key in file.keys()} == {"d", "b"}  # noqa: SIM118
    torch.manual_seed(77)
    assert torch.equal(VIT.run(copy.deepcopy(model)), y)
    adapter.detach()
    vm.load(model, path)
    assert close(VIT.run(model), y, 1e-6)


def test_vera_begins_with_d_and_b_as_given_and_trains_only_them() -> None:
    adapter = vm.adapt(VIT.model(), vm.VeRA(rank=4, d=0.5))
    for module in adapter.modules.values():
        assert torch.equal(module.d, torch.full((4,), 0.5))
        assert not module.b.any()
    assert {name.rpartition(".")[2] for name, _ in adapter.named_parameters()} == {"d", "b"}
    assert len({id(m.shared) for m in adapter.modules.values()}) == 1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by peft
def test_vera_against_peft_with_the_same_seed() -> None:
    model = BY_NAME["transformers-ViT"].model()
    config = peft.VeraConfig(r=6, target_modules=["q_proj", "fc1", "fc2"], projection_prng_key=11, vera_dropout=0.0)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    adapter = vm.adapt(model, vm.VeRA(sites=("attn.q", "mlp.*"), rank=6, seed=11))
    shake(adapter, 0.3)
    with torch.no_grad():
        for key, module in adapter.modules.items():
            layer = theirs.get_submodule(f"base_model.model.{key.partition('/')[2]}")
            layer.vera_lambda_d["default"].copy_(module.d)
            layer.vera_lambda_b["default"].copy_(module.b)
    x = fixed(2, 3, 32, 32)
    assert close(model(x).logits, theirs(x).logits, 1e-5)


# -- AdaLoRA -----------------------------------------------------------------------------------------------------------


@every_layer
def test_adalora_equals_the_formula(name: str) -> None:
    net, x = net_and_input(name)
    adapter = vm.adapt(net, vm.AdaLoRA(sites=("w",), rank=4, target=2, alpha=6), sites=TABLE)
    m = only(adapter)
    assert not m.l.any()
    shake(adapter, 0.3)
    want = with_weight(net, x, net.layer.weight + 1.5 * torch.einsum("or,r,r...->o...", m.P, m.l, m.Q))
    assert close(net(x), want, 1e-6)


def test_adalora_keeps_P_and_Q_near_orthogonal() -> None:
    adapter = vm.adapt(VIT.model(), vm.AdaLoRA(rank=3, target=2, orthogonality=0.1))
    shake(adapter, 0.3)
    terms = []
    for m in adapter.modules.values():
        terms += [(m.P.T @ m.P - torch.eye(3)).pow(2).sum().sqrt(), (m.Q @ m.Q.T - torch.eye(3)).pow(2).sum().sqrt()]
    penalty = adapter.penalty()
    assert close(penalty, 0.1 * sum(terms) / len(terms), 1e-6)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        adapter.penalty().backward()
        optimizer.step()
    assert adapter.penalty() < 0.01


def test_the_initial_values_of_adalora_are_the_official_ones() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=768, num_heads=12)
    for module in vm.adapt(model, vm.AdaLoRA()).modules.values():
        assert abs(module.P.std() / 0.02 - 1) < 0.03
        assert abs(module.Q.std() / 0.02 - 1) < 0.03


class Allocator:
    """The paper's rank allocation once more, entry by entry and without our buffers; the official schedule."""

    def __init__(self, adapter: vm.Adapter, method: vm.AdaLoRA, steps: int):
        self.values = [copy.deepcopy(dict(m.named_parameters())) for m in adapter.modules.values()]
        self.I = [{n: torch.zeros_like(p) for n, p in v.items()} for v in self.values]
        self.U = copy.deepcopy(self.I)
        self.method, self.steps = method, steps

    def update(self, gradients: list[dict[str, Tensor]], values: list[dict[str, Tensor]], step: int) -> list[Tensor]:
        """The singular values after update `step`, of those that the optimiser gave."""
        method, count = self.method, len(values)
        begin, end = int(method.warmup * self.steps), self.steps - int(method.final * self.steps)
        if step < end:
            for i in range(count):
                for name in values[i]:
                    sensitivity = (values[i][name] * gradients[i][name]).abs()
                    self.I[i][name] = method.beta1 * self.I[i][name] + (1 - method.beta1) * sensitivity
                    away = (sensitivity - self.I[i][name]).abs()
                    self.U[i][name] = method.beta2 * self.U[i][name] + (1 - method.beta2) * away
        singular = [v["l"].clone() for v in values]
        if step <= begin or (step < end and step % method.every):
            return singular
        left = 1 - (step - begin) / (self.steps - int(method.final * self.steps) - begin)
        start, target = count * method.rank, count * method.target
        budget = target if step >= end else int(target + (start - target) * left**3)
        scores = {}
        for i in range(count):
            s = {n: self.I[i][n] * self.U[i][n] for n in values[i]}
            for j in range(method.rank):
                scores[i, j] = float(s["l"][j] + s["P"][:, j].mean() + s["Q"][j].mean())
        for i, j in sorted(scores, key=lambda key: scores[key])[: start - budget]:
            singular[i][j] = 0
        return singular


def test_adalora_prunes_as_the_paper_does_and_resumes_exactly() -> None:
    method = vm.AdaLoRA(rank=4, target=2, sites=("attn.*", "mlp.*"), every=3, warmup=0.2, final=0.3)
    steps, half = 30, 13
    images = fixed(4, 3, 32, 32)
    labels = torch.tensor([0, 1, 2, 3])

    def start() -> tuple[nn.Module, vm.Adapter, torch.optim.Optimizer]:
        model = VIT.model()
        adapter = vm.adapt(model, method, seed=0)
        return model, adapter, torch.optim.AdamW(adapter.parameters(), lr=0.05)

    model, adapter, optimizer = start()
    allocator = Allocator(adapter, method, steps)
    saved: dict[str, dict] = {}
    budgets = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (F.cross_entropy(model(images), labels) + adapter.penalty()).backward()
        optimizer.step()
        named = [dict(m.named_parameters()) for m in adapter.modules.values()]
        gradients = [{n: p.grad.clone() for n, p in ps.items()} for ps in named]
        values = [{n: p.detach().clone() for n, p in ps.items()} for ps in named]
        want = allocator.update(gradients, values, step)
        adapter.advance(step, steps)
        got = [m.l for m in adapter.modules.values()]
        assert all(torch.equal(a == 0, b == 0) for a, b in zip(got, want, strict=True)), step
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), step
        for m, I, U in zip(adapter.modules.values(), allocator.I, allocator.U, strict=True):
            for name in "PlQ":
                assert close(m.get_buffer(f"M_{name}"), I[name], 1e-6)
                assert close(m.get_buffer(f"U_{name}"), U[name], 1e-6)
        budgets.append(sum(int((l != 0).sum()) for l in got))
        if step == half:
            saved = {"adapter": {k: v.clone() for k, v in adapter.state_dict().items()}}
            saved["optimizer"] = copy.deepcopy(optimizer.state_dict())
    sites = len(adapter.modules)
    assert budgets[5] == sites * 4
    assert budgets[20:] == [sites * 2] * 10
    assert len({int((m.l != 0).sum()) for m in adapter.modules.values()}) > 1  # the ranks went where they matter
    after = adapter.state_dict()

    model, adapter, optimizer = start()
    adapter.load_state_dict(saved["adapter"])
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(half + 1, steps + 1):
        optimizer.zero_grad()
        (F.cross_entropy(model(images), labels) + adapter.penalty()).backward()
        optimizer.step()
        adapter.advance(step, steps)
    assert all(torch.equal(v, after[k]) for k, v in adapter.state_dict().items())


def test_the_budget_of_adalora_falls_with_a_cube_from_all_to_the_target() -> None:
    method = vm.AdaLoRA(rank=12, target=8, warmup=0.1, final=0.5)
    budgets = [method.budget(24, step, 1000) for step in range(1001)]
    assert budgets[:101] == [288] * 101
    assert budgets[300] == int(192 + 96 * 0.5**3)
    assert budgets[500:] == [192] * 501
    assert sorted(budgets, reverse=True) == budgets
    assert vm.AdaLoRA().budget(1, 1, 1) == 8


def test_an_overflow_leaves_the_averages_of_adalora_as_they_were() -> None:
    adapter = vm.adapt(VIT.model(), vm.AdaLoRA(rank=3, target=2))
    shake(adapter, 0.3)
    for p in adapter.parameters():
        p.grad = torch.ones_like(p)
    adapter.advance(1, 100)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    assert all(v.any() for k, v in before.items() if ".U_" in k)
    for p in adapter.parameters():
        p.grad = torch.full_like(p, float("inf"))
    adapter.advance(2, 100)
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())


# -- DyLoRA ------------------------------------------------------------------------------------------------------------


def train_step(model: nn.Module, adapter: vm.Adapter, step: int) -> None:
    for p in adapter.parameters():
        p.grad = None
    VIT.run(model).square().mean().backward()
    with torch.no_grad():
        for p in adapter.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    adapter.advance(step, 100)


@every_layer
def test_dylora_equals_the_formula_at_every_rank(name: str) -> None:
    net, x = net_and_input(name)
    method = vm.DyLoRA(sites=("w",), rank=4, alpha=6)
    adapter = vm.adapt(net, method, sites=TABLE)
    shake(adapter, 0.3)
    m = only(adapter)

    W = net.layer.weight.clone()

    def formula(b: int) -> Tensor:
        return with_weight(net, x, W + 6 / b * product(m.A[:b], m.B[:, :b]))

    assert close(net.eval()(x), formula(4), 1e-6)
    seen = set()
    for step in range(20):
        b = method.drawn(step)
        seen.add(b)
        adapter.advance(step, 20)
        assert close(net.train()(x), formula(b), 1e-6)
    assert seen == {1, 2, 3, 4}
    for b in (1, 3):
        adapter.load_state_dict(vm.DyLoRA.at(adapter.state_dict(), b))
        assert close(net.eval()(x), formula(b), 1e-6)
        lora = vm.adapt(copy.deepcopy(net), vm.LoRA(sites=("w",), rank=b, alpha=6), name="lora", sites=TABLE)
        (twin,) = lora.models.values()
        vm.use(twin, "lora")
        lora.load_state_dict({"lora/layer.A": m.A[:b].detach(), "lora/layer.B": m.B[:, :b].detach()})
        assert close(twin(x), formula(b), 1e-6)
        adapter.merge()
        assert close(net.train()(x), formula(b), 1e-6)  # merged at that rank, also in train mode
        adapter.load_state_dict(vm.DyLoRA.at(adapter.state_dict(), 2))
        assert close(net(x), formula(2), 1e-6)  # and merged anew at another
        adapter.unmerge()


def test_the_ranks_of_dylora_are_uniform_and_depend_on_seed_and_step_alone() -> None:
    method = vm.DyLoRA(rank=8, seed=5)
    counts = Counter(method.drawn(step) for step in range(8000))
    assert set(counts) == set(range(1, 9))
    assert all(abs(n / 1000 - 1) < 0.12 for n in counts.values())
    random.seed(0)
    assert [method.drawn(step) for step in range(8)] == [vm.DyLoRA(rank=8, seed=5).drawn(step) for step in range(8)]
    assert [vm.DyLoRA(rank=8, seed=6).drawn(s) for s in range(30)] != [method.drawn(s) for s in range(30)]


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora_trains_the_ranks_that_were_drawn(frozen: bool) -> None:
    model = VIT.model().train()
    method = vm.DyLoRA(rank=4, frozen=frozen)
    adapter = vm.adapt(model, method)
    shake(adapter, 0.3)
    for step in range(6):
        b = method.drawn(step)
        train_step(model, adapter, step + 1)
        for m in adapter.modules.values():
            rows = {i for i in range(4) if m.A.grad[i].any()}
            columns = {i for i in range(4) if m.B.grad[:, i].any()}
            assert rows == columns == ({b - 1} if frozen else set(range(b)))


def test_dylora_resumes_exactly_and_is_the_same_for_all_sites() -> None:
    def start() -> tuple[nn.Module, vm.Adapter]:
        model = VIT.model().train()
        return model, vm.adapt(model, vm.DyLoRA(rank=5), seed=0)

    model, adapter = start()
    for step in range(1, 9):
        train_step(model, adapter, step)
        if step == 4:
            middle = {k: v.clone() for k, v in adapter.state_dict().items()}
    after = adapter.state_dict()
    assert [k for k in after if "shared" in k] == ["dylora/shared.drawn", "dylora/shared.used"]
    model, adapter = start()
    adapter.load_state_dict(middle)
    for step in range(5, 9):
        train_step(model, adapter, step)
    assert all(torch.equal(v, after[k]) for k, v in adapter.state_dict().items())


def test_a_rank_that_dylora_does_not_have() -> None:
    state = vm.adapt(VIT.model(), vm.DyLoRA(rank=4)).state_dict()
    with pytest.raises(vm.InputError, match="DyLoRA: rank must be from 1 to 4, not 5"):
        vm.DyLoRA.at(state, 5)
    with pytest.raises(vm.InputError, match="the adapter has no DyLoRA"):
        vm.DyLoRA.at(vm.adapt(VIT.model(), vm.LoRA()).state_dict(), 2)
