"""UniPELT and NOAH against their formulas written out by hand, and the search over NOAH's subnets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from test_prompts import attend, vit
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, VISION, close, fixed, shake

import vismodal as vm
from vismodal.methods.subnets import Part, Space
from vismodal.resume import Checkpoints
from vismodal.train import Micro, Plan, fit

# -- UniPELT ---------------------------------------------------------------------------------------------------------


def gate(x: Tensor, gate: Any) -> Tensor:
    """For each row the mean over tokens of a sigmoid."""
    return torch.sigmoid((x * gate.w).sum(-1) + gate.b).mean(1)[:, None, None]


def test_count_of_unipelt_on_vit_base() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    gates, prefix, lora, adapter = 3 * 769, 2 * 10 * 768, 4 * 8 * 768, 2 * 768 * 48 + 48 + 768
    assert vm.adapt(model, vm.UniPELT()).num_parameters == 12 * (gates + prefix + lora + adapter) == 1_401_444


def test_unipelt_equals_the_formula() -> None:
    model = vit()
    adapter = vm.adapt(model, vm.UniPELT(tokens=3, rank=2, width=5, std=0.5))
    shake(adapter, 0.5)
    block, x = model.blocks[1], fixed(2, 5, 24)
    m: Any = adapter.modules["unipelt/blocks.1.attn:keys"]
    y = block.attn(x)
    with adapter.disabled():
        q, k, v = block.attn.qkv(x).chunk(3, -1)
        q = q + gate(x, m.lora_gate) * (x @ m.A[:2].T @ m.B_q.T)
        v = v + gate(x, m.lora_gate) * (x @ m.A[2:].T @ m.B_v.T)
        k, v = (torch.cat([gate(x, m.prefix_gate) * P, t], 1) for P, t in zip(m.P, (k, v), strict=True))
        assert close(y, block.attn.proj(attend(q, k, v, 3)), 1e-6)
        assert not close(y, block.attn(x), 1e-2)
    adapter.detach()
    adapter = vm.adapt(model, vm.UniPELT(sites=("mlp",), width=5))
    shake(adapter, 0.5)
    m = adapter.modules["unipelt/blocks.1:mlp"]
    y = block(x)
    with adapter.disabled():
        mid = x + block.attn(block.norm1(x))
        z = block.mlp(block.norm2(mid))
        want = mid + z + gate(z, m.gate) * (F.relu(z @ m.down.T + m.down_bias) @ m.up.T + m.up_bias)
        assert close(y, want, 1e-6)
        assert not close(y, mid + z, 1e-2)


def test_unipelt_in_transformers_and_the_gates_are_of_each_row() -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**VISION), add_pooling_layer=False).eval()
    adapter = vm.adapt(model, vm.UniPELT(tokens=3, rank=2, width=5, std=0.5))
    shake(adapter, 0.5)
    attn, x = model.layers[1].attention, fixed(3, 5, 24)
    m: Any = adapter.modules["unipelt/layers.1.attention:keys"]
    y = attn(x)[0]
    with adapter.disabled():
        g = gate(x, m.lora_gate)
        q = attn.q_proj(x) + g * (x @ m.A[:2].T @ m.B_q.T)
        v = attn.v_proj(x) + g * (x @ m.A[2:].T @ m.B_v.T)
        k, v = (torch.cat([gate(x, m.prefix_gate) * P, t], 1) for P, t in zip(m.P, (attn.k_proj(x), v), strict=True))
        assert close(y, attn.o_proj(attend(q, k, v, 2)), 1e-6)
    images = fixed(3, 3, 32, 32)
    whole = model(images).last_hidden_state
    assert close(model(images[1:2]).last_hidden_state, whole[1:2], 1e-6)


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([vm.NormTuning(), vm.BitFit()], r"bitfit replaces all of norm\.bias.*nothing.*normtuning's.*sites=$"),
        (
            [vm.LoRA(sites=("attn.q",)), vm.Tune(sites=("attn.qkv",))],
            r"tune replaces .*attn\.q.*put tune first",
        ),
        ([vm.Tune(sites=("attn.qkv",)), vm.LoRA(sites=("attn.q",))], ""),
        ([vm.Tune(sites=("attn.q",)), vm.LoRA(sites=("attn.q",))], ""),
        ([vm.LoRA(sites=("attn.v",)), vm.Tune(sites=("attn.q",))], ""),
        ([vm.LoRA(sites=("attn.qkv",)), vm.Tune(sites=("attn.q",))], ""),  # k and v are left
        ([vm.NormTuning(), vm.BitFit(where=("*.qkv", "*.fc1"))], ""),
    ],
)
def test_a_method_of_which_nothing_would_be_left_is_refused(methods: list[vm.Method], says: str) -> None:
    model = vit()
    names = list(model.state_dict())
    if says:
        with pytest.raises(vm.InputError, match=says):
            vm.adapt(model, methods)
        assert list(model.state_dict()) == names
    else:
        adapter = vm.adapt(model.requires_grad_(False), methods)
        shake(adapter)
        model(fixed(2, 3, 32, 32)).square().mean().backward()
        assert adapter.unused() == [] and all(p.grad is not None for p in adapter.parameters())


def test_any_list_of_methods_acts_on_one_model(tmp_path: Path) -> None:
    """All at once, of every class in the survey: each learns, off is the base to the bit, and one file holds them."""
    methods = [
        vm.BitFit(), vm.LinearProbe(),  # what stands in for a tensor first, what changes it behind
        vm.LoRA(rank=2), vm.DoRA(rank=2, sites=("attn.out",)), vm.PiSSA(rank=2, sites=("mlp.up",)),
        vm.VeRA(rank=4), vm.LoHa(rank=2), vm.LoKr(rank=2), vm.OFT(block_size=4), vm.BOFT(block_size=4),
        vm.AdaLoRA(rank=3, target=2), vm.DyLoRA(rank=2), vm.FacT(rank=2), vm.IA3(), vm.SSF(),
        vm.SparseMask(criterion="magnitude", per="site"), vm.RepAdapter(rank=4),
        vm.AdaptFormer(rank=8), vm.Houlsby(rank=2, std=0.1), vm.Pfeiffer(rank=2), vm.AdapterPlus(rank=2),
        vm.Convpass(rank=2), vm.VPT(tokens=2), vm.VPT(sites=("tokens",), tokens=2), vm.Prefix(tokens=2),
        vm.UniPELT(tokens=2, rank=2, width=3), vm.DTL(start=0),
    ]  # fmt: skip
    model, images = vit(), fixed(2, 3, 32, 32)
    y0 = model.requires_grad_(False)(images)
    adapter = vm.adapt(model, methods)
    shake(adapter)
    y = model(images)
    y.square().mean().backward()
    assert adapter.unused() == []
    flat = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert flat == []
    with adapter.disabled():
        assert torch.equal(model(images), y0)
    for slot, module in {k.partition("/")[0]: m for k, m in adapter.modules.items()}.items():
        before = [p.detach().clone() for p in module.parameters()]
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))
        assert not close(model(images), y, 1e-5), slot
        with torch.no_grad():
            for p, old in zip(module.parameters(), before, strict=True):
                p.copy_(old)
    vm.save(adapter, tmp_path / "a.safetensors")
    adapter.detach()
    assert torch.equal(model.requires_grad_(False)(images), y0)
    vm.load(model, tmp_path / "a.safetensors")
    assert close(model(images), y, 2e-6)


def test_gates_begin_half_open() -> None:
    adapter = vm.adapt(vit(), vm.UniPELT())
    for module in adapter.modules.values():
        for g in (getattr(module, name, None) for name in ("gate", "lora_gate", "prefix_gate")):
            assert g is None or (not g.b.any() and 0.005 < g.w.std() < 0.04)
    assert not any(p.any() for n, p in adapter.named_parameters() if n.endswith((".B_q", ".B_v")))


@pytest.mark.parametrize("name", ["open_clip-CLIP", "diffusers-SD1.5"])
def test_unipelt_needs_queries_to_add_to(name: str) -> None:
    with pytest.raises(vm.InputError, match=r"computes its queries within the attention"):
        vm.adapt(BY_NAME[name].model(), vm.UniPELT(where="visual.*" if "clip" in name else "*"))


# -- NOAH ------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"tokens": (1, 3), "ranks": (2, 4), "widths": (3, 5)}


def supernet(model: nn.Module, **options: Any) -> tuple[vm.Adapter, vm.NOAH, list[Any]]:
    adapter = vm.adapt(model, vm.NOAH(**SMALL | options), seed=0)
    shake(adapter, 0.3)
    return adapter, adapter.methods["noah"], list(adapter.modules.values())  # type: ignore[return-value]


def quickgelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("subnet", [(3, 3, 4, 4, 5, 5), (1, 3, 2, 4, 3, 5), (3, 0, 2, 0, 3, 0)], ids=str)
def test_a_subnet_equals_the_formula(subnet: tuple[int, ...]) -> None:
    model = vit()
    adapter, method, modules = supernet(model)
    method.choose(modules, subnet)
    assert method.chosen(modules) == subnet
    images = fixed(2, 3, 32, 32)
    y = model(images)
    keys = [("prompt", ""), ("lora", ".attn.qkv"), ("mlp", ":mlp")]
    with adapter.disabled():
        x = model._pos_embed(model.patch_embed(images))
        for i, block in enumerate(model.blocks):
            prompt = adapter.modules[f"noah/blocks.{i}:block"]
            lora, mlp = (adapter.modules[f"noah/blocks.{i}{end}"] for _, end in keys[1:])
            p, r, w = subnet[i], subnet[2 + i], subnet[4 + i]
            x = torch.cat([x, prompt.P[:p].expand(2, -1, -1)], 1)  # at the sequence's end, as the official code
            z = block.norm1(x)
            qkv = block.attn.qkv(z) + z @ lora.A[:r].T @ lora.B[:, :r].T
            x = x + block.attn.proj(attend(*qkv.chunk(3, -1), 3))
            z = block.mlp(block.norm2(x))
            if w:
                z = z + quickgelu(z @ mlp.down[:w].T + mlp.down_bias[:w]) @ mlp.up[:, :w].T + mlp.up_bias
            x = (x + z)[:, : x.shape[1] - p]
        assert close(y, model.forward_head(model.norm(x)), 1e-6)


def test_counts_of_noah_on_vit_base() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    whole = vm.adapt(model, vm.NOAH(), name="whole")
    assert whole.num_parameters == 12 * (100 * 768 + 100 * 4 * 768 + 100 * (2 * 768 + 1) + 768)
    modules = list(whole.modules.values())
    # the published subnet for CIFAR-100 in VTAB-1k
    p, r = (10, 5, 10, 1, 5, 1, 10, 1, 10, 5, 1, 10), (10, 1, 5, 5, 1, 10, 1, 1, 1, 10, 1, 1)
    w = (5, 10, 10, 10, 5, 1, 1, 1, 10, 10, 10, 1)
    subnet = p + r + w
    want = 768 * sum(p) + 4 * 768 * sum(r) + (2 * 768 + 1) * sum(w) + 12 * 768
    assert vm.NOAH.count(modules, subnet) == want == 320_330
    assert vm.adapt(model, vm.NOAH(subnet=subnet), name="subnet").num_parameters == want
    # the mean of the 19 published subnets, from the sums of their sizes: every block has some of each kind
    sums = {"tokens": (1306,), "ranks": (1240,), "widths": (1207,)}
    one = list(vm.adapt(model, vm.NOAH(**sums, layers=slice(0, 1)), name="sums").modules.values())  # type: ignore[arg-type]
    total = vm.NOAH.count(one, (1306, 1240, 1207)) + (19 * 12 - 1) * 768  # with a bias of the adapter for each block
    assert total // 19 == 360_134
    none = (*p[:6], *[0] * 6, *r[:6], *[0] * 6, *w[:6], *[0] * 6)
    count = vm.adapt(model, vm.NOAH(subnet=none), name="first").num_parameters
    assert count == vm.NOAH.count(modules, none)


@pytest.mark.parametrize("name", ["timm-vit_tiny_patch16_224", "open_clip-CLIP", "transformers-ViT"])
def test_a_subnet_alone_equals_that_of_the_supernet(name: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    options: dict[str, Any] = {"where": "visual.*"} if "clip" in name else {}
    if name.startswith("transformers"):
        options["sites"] = ("block", "attn.q", "attn.k", "attn.v", "mlp")
    adapter, method, modules = supernet(model, **options)
    subnet = (1, 0, 2, 2, 3, 0)
    method.choose(modules, subnet)
    y, rows = case.run(model), {k: t for k, t in adapter.state_dict().items() if not k.endswith("chosen")}
    adapter.detach()
    alone = vm.adapt(model, vm.NOAH(**SMALL, **options, subnet=subnet), name="alone")
    with torch.no_grad():
        for key, p in alone.named_parameters():
            p.copy_(rows[key][tuple(slice(n) for n in p.shape)])
    assert close(case.run(model), y, 2e-6)
    case.run(model).square().mean().backward()
    assert alone.unused() == []
    before = method.chosen(list(alone.modules.values()))
    alone.advance(1, 5)
    assert method.chosen(list(alone.modules.values())) == before == subnet


def test_initial_values_survive_the_building_of_the_model() -> None:
    model = vit()
    adapter = vm.adapt(model, vm.NOAH(**SMALL))
    model.init_weights()
    for key, p in adapter.named_parameters():
        assert p.any() == (not key.endswith((".B", ".up", "_bias"))), key


def test_subnets_are_drawn_by_the_number_of_the_update_alone(tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        model = vit(depth=4)
        adapter, method, modules = supernet(model)
        seen = [method.chosen(modules, training=True)]
        for step in range(1, 40):
            torch.rand(3)
            adapter.advance(step, 40)
            seen.append(method.chosen(modules, training=True))
        drawn.append(seen)
        assert method.chosen(modules) == (3,) * 4 + (4,) * 4 + (5,) * 4  # in eval mode the largest
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 30
    for part, choices in enumerate(SMALL.values()):
        sizes = [subnet[4 * part : 4 * part + 4] for subnet in drawn[0]]
        assert {s for each in sizes for s in each} == {0, *choices}
        depths = {sum(map(bool, each)) for each in sizes}
        assert depths == {1, 2, 3, 4}
        assert all(not any(each[sum(map(bool, each)) :]) for each in sizes)  # the last blocks have none
    adapter.advance(7, 40)
    method.choose(modules, drawn[0][3])
    vm.save(adapter, tmp_path / "a.safetensors")
    adapter.detach()
    again = list(vm.load(model, tmp_path / "a.safetensors").modules.values())
    assert method.chosen(again, training=True) == drawn[0][7]
    assert method.chosen(again) == drawn[0][3]


def test_what_acts_while_training_is_what_was_drawn() -> None:
    model, images = vit(), fixed(2, 3, 32, 32)
    adapter, method, modules = supernet(model)
    largest = model(images)
    adapter.advance(3, 9)
    y = model.train()(images)
    assert not close(y, largest, 1e-3)
    assert torch.equal(model.eval()(images), largest)
    method.choose(modules, method.chosen(modules, training=True))
    assert torch.equal(model(images), y)


def test_training_resumed_is_training_uninterrupted(tmp_path: Path) -> None:
    images, labels = fixed(4, 3, 32, 32), torch.arange(4)

    def train(steps: int, folder: Path) -> vm.Adapter:
        model = vit(depth=4).train()
        adapter = vm.adapt(model, vm.NOAH(**SMALL), seed=0)

        def loss(micro: Micro) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(model(images), labels)}

        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        fit(loss, adapter, optimizer, plan=Plan(steps), checkpoints=Checkpoints(folder, {}, 1))
        return adapter

    whole = train(6, tmp_path / "whole").state_dict()
    for steps in (2, 3, 6):  # what is left out by the subnet of the first step after a resume is no dead site
        resumed = train(steps, tmp_path / "parts")
    assert all(torch.equal(t, resumed.state_dict()[k]) for k, t in whole.items())


def test_what_is_left_out_is_not_dead_and_compiles() -> None:
    model, images = vit(), fixed(2, 3, 32, 32)
    adapter, method, modules = supernet(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for subnet in ((3, 3, 4, 4, 5, 5), (1, 0, 2, 0, 3, 0)):
        method.choose(modules, subnet)
        adapter.unused()
        model(images).square().mean().backward()
        assert adapter.unused() == []
        torch._dynamo.reset()
        assert close(compiled(images), model(images), 1e-6)
        for p in adapter.parameters():
            p.grad = None


WRONG = [
    ({"tokens": ()}, r"must each be one size or more"),
    ({"ranks": (0, 2)}, r"must each be one size or more, of at least 1"),
    ({"depths": (0.0,)}, r"depths must be shares"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[m for _, m in WRONG])
def test_options_of_noah(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vm.InputError, match=message):
        vm.NOAH(**options)


def test_subnets_that_do_not_fit() -> None:
    with pytest.raises(vm.InputError, match=r"subnet has 3 sizes, but the blocks here take 6"):
        vm.adapt(vit(), vm.NOAH(subnet=(1, 1, 1)))
    _, method, modules = supernet(vit())
    with pytest.raises(vm.InputError, match=r"cannot have size 9 where the supernet has 3"):
        method.choose(modules, (9, 1, 2, 2, 3, 3))
    with pytest.raises(vm.InputError, match=r"NOAH cannot join tokens .*rotary positions"):
        vm.adapt(BY_NAME["timm-eva02_tiny_patch14_224"].model(), vm.NOAH(sites=("block", "mlp")))


# -- the search ------------------------------------------------------------------------------------------------------

SPACE = Space((Part(4, (1, 3, 5), (1, 2, 4)), Part(2, (2,), (2,)), Part(3, (1, 2), (1, 3))))


def legal(subnet: Sequence[int]) -> bool:
    split = SPACE.split(tuple(subnet))
    filled = [(p, sum(map(bool, s)), s) for p, s in zip(SPACE.parts, split, strict=True)]
    return len(subnet) == 9 and all(
        depth in p.depths and set(s[:depth]) <= set(p.sizes) and not any(s[depth:]) for p, depth, s in filled
    )


def test_drawing_mutating_crossing_and_shrinking_stay_in_the_space() -> None:
    random = Random(0)
    drawn = [SPACE.draw(random) for _ in range(300)]
    assert all(map(legal, drawn))
    assert len({SPACE.split(s)[0] for s in drawn}) > 60  # of 3 + 9 + 81
    mutated = [SPACE.mutate(s, random, 0.5, 0.5) for s in drawn]
    assert all(map(legal, mutated))
    assert 0.3 < sum(a != b for a, b in zip(drawn, mutated, strict=True)) / 300 < 0.95
    assert [SPACE.mutate(s, random, 0.0, 1.0) for s in drawn] == drawn
    a, b = drawn[:2]
    children = [SPACE.split(SPACE.cross(a, b, random)) for _ in range(40)]
    for i, parents in enumerate(zip(SPACE.split(a), SPACE.split(b), strict=True)):
        assert {child[i] for child in children} == set(parents)
    subnet: tuple[int, ...] | None = (5, 5, 5, 5, 2, 2, 2, 2, 2)
    while subnet != SPACE.smallest():
        assert subnet is not None
        smaller = SPACE.smaller(subnet, random)
        assert smaller is not None and legal(smaller) and sum(smaller) < sum(subnet)
        subnet = smaller
    assert SPACE.smaller(subnet, random) is None


def test_the_search_finds_the_best_subnet_within_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    model = vit(depth=4)
    adapter, method, modules = supernet(model)
    target = (3, 3, 1, 0, 4, 2, 0, 0, 3, 0, 0, 0)
    budget = method.count(modules, target)

    def score() -> float:
        assert not torch.is_grad_enabled()
        return -math.dist(method.chosen(modules), target)

    options: dict[str, Any] = {"generations": 12, "population": 30, "mutations": 12, "crossings": 12, "rate": 0.4}
    found = vm.evolve(adapter, score, budget, **options)
    assert found.method.subnet == target == method.chosen(modules)
    assert (found.score, found.parameters) == (0, budget)
    assert 250 < len(found.scores) <= 12 * 30  # none is scored twice, and there are not many more
    assert all(method.count(modules, subnet) <= budget for subnet in found.scores)
    assert "searching: 100%" in capsys.readouterr().err
    assert vm.evolve(adapter, score, budget, **options).scores == found.scores
    assert vm.evolve(adapter, score, budget, **options, seed=1).scores != found.scores
    adapter.detach()
    assert vm.adapt(model, found.method).num_parameters == budget
    with pytest.raises(vm.InputError, match=r"has no supernet to search"):
        vm.evolve(vm.adapt(model, vm.LoRA(), name="lora"), score, budget)


def test_children_of_the_best_are_better_than_random_ones() -> None:
    adapter, method, modules = supernet(vit(depth=8))
    best = {}
    for children in (20, 0):
        found = vm.evolve(
            adapter,
            lambda: -math.dist(method.chosen(modules), (3, 1, 3, 1, 0, 0, 0, 0, *[4] * 8, *[3, 5] * 4)),
            10**9,
            generations=10,
            population=40,
            mutations=children,
            crossings=children,
            rate=0.3,
        )
        best[children] = found.score
    assert best[20] > -2 > best[0]


def test_the_search_stops_where_there_is_nothing_to_find() -> None:
    model = vit()
    adapter, method, modules = supernet(model)
    least = method.count(modules, (1, 0, 2, 0, 3, 0))
    with pytest.raises(vm.InputError, match=rf"smallest subnet has {least:,} parameters, above the budget of 10"):
        vm.evolve(adapter, lambda: 0.0, 10)
    found = vm.evolve(adapter, lambda: 0.0, least, generations=2, population=4)
    assert found.method.subnet == (1, 0, 2, 0, 3, 0)
    assert len(found.scores) == 1
    method.choose(modules, (3, 3, 4, 4, 5, 5))
    with pytest.raises(ZeroDivisionError):
        vm.evolve(adapter, lambda: 1 / 0, 10**6)
    assert method.chosen(modules) == (3, 3, 4, 4, 5, 5)
    model.train()
    with pytest.raises(vm.InputError, match=r"train mode, where subnets are drawn; call model\.eval"):
        vm.evolve(adapter, lambda: 0.0, 10**6)
    model.eval()
    with pytest.raises(vm.InputError, match=r"population must be at least 1"):
        vm.evolve(adapter, lambda: 0.0, 10**6, population=0)
