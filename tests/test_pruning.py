"""`adapter.prune`: every update becomes its best approximation of a lower rank, and everything else follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_diffusion import tiny_pipeline
from torch import Tensor, nn
from zoo import BY_NAME, LORA_KINDS, close, fixed, offered, shake

import vismodal as vm
from vismodal.formats import peft
from vismodal.formats.files import layers_of
from vismodal.methods import Method
from vismodal.methods.lowrank import LowRank
from vismodal.methods.spectrum import spectrum

VIT = BY_NAME["timm-vit_tiny_patch16_224"]
UNET = BY_NAME["diffusers-SD1.5"]


def changes(model: nn.Module, adapter: vm.Adapter) -> dict[str, Tensor]:
    """W' - W of each site by merging, in fp64: nothing that pruning itself uses."""
    sites = {f"{slot}/{s.key}": s for slot in adapter.methods for s in vm.sites(model) if s.slot == "weight"}
    sites = {key: sites[key] for key in adapter.modules if key in sites}
    before = {key: site.tensor.detach().double().clone() for key, site in sites.items()}
    adapter.merge()
    found = {key: (site.tensor.detach().double() - before[key]).flatten(1) for key, site in sites.items()}
    adapter.unmerge()
    return found


def best(D: Tensor, rank: int) -> Tensor:
    U, S, V = torch.linalg.svd(D, full_matrices=False)
    return U[:, :rank] @ S[:rank].diag() @ V[:rank]


PRUNABLE: dict[str, Callable[[nn.Module], Method]] = {
    "LoRA": lambda m: vm.LoRA(sites=offered(m, LORA_KINDS), rank=5, alpha=3.0),
    "rank-stabilised": lambda m: vm.LoRA(sites=offered(m, LORA_KINDS), rank=5, alpha=3.0, rank_stabilised=True),
    "ranks": lambda m: vm.LoRA(sites=offered(m, LORA_KINDS), rank=5, alpha=3.0, ranks={"attn.q": 3, "mlp.*": 2}),
    "PiSSA": lambda m: vm.PiSSA(sites=offered(m, LORA_KINDS), rank=3, alpha=2.0),
    "AdaLoRA": lambda m: vm.AdaLoRA(sites=offered(m, LORA_KINDS), rank=5, target=2, alpha=3.0),
    "DyLoRA": lambda m: vm.DyLoRA(sites=offered(m, LORA_KINDS), rank=5, alpha=3.0),
}


@pytest.mark.parametrize("name", PRUNABLE)
@pytest.mark.parametrize("case", [VIT, UNET], ids=lambda c: c.name)
def test_what_is_left_is_the_best_approximation_in_every_use(case: object, name: str, tmp_path: Path) -> None:
    model = case.model().double().requires_grad_(False)  # type: ignore[attr-defined]
    run = case.run  # type: ignore[attr-defined]
    adapter = vm.adapt(model, PRUNABLE[name](model), name="a", seed=0)
    shake(adapter, 0.3)
    whole, y = changes(model, adapter), run(model)
    report = adapter.prune(rank=2)
    for key, D in changes(model, adapter).items():
        assert (D - best(whole[key], 2)).norm() <= 1e-6 * whole[key].norm(), key
        error = float((D - whole[key]).norm() / whole[key].norm())
        assert report.errors[key] == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert report.ranks[key] == 2
    pruned = run(model)
    assert not close(pruned, y, 1e-4)
    adapter.merge()
    assert close(run(model), pruned, 1e-6)
    adapter.unmerge()
    assert str(report).splitlines()[-1].split()[0] == "all"
    path = vm.save(adapter, tmp_path / "a.safetensors")
    adapter.detach()
    again = vm.load(model, path, name="b", trainable=True)
    assert close(run(model), pruned, 1e-6)
    run(model).square().mean().backward()
    assert again.unused() == []


def test_factors_are_of_equal_size_and_fewer() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA(sites=("attn.*", "mlp.*"), rank=6, alpha=2.0))
    shake(adapter, 0.3)
    before = {k: m.scaling for k, m in adapter.modules.items()}
    count, objects = adapter.num_parameters, [id(p) for p in adapter.parameters()]
    adapter.prune(rank=2)
    assert adapter.num_parameters * 3 == count
    assert [id(p) for p in adapter.parameters()] == objects
    for key, m in adapter.modules.items():
        assert m.scaling == before[key]
        assert m.A.is_contiguous() and m.B.is_contiguous()
        assert close(m.A @ m.A.t(), m.B.t() @ m.B)
        gram = m.A @ m.A.t()
        assert close(gram.diag().diag(), gram)  # and orthogonal


def test_energy_keeps_the_fewest_ranks_that_hold_it() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA(rank=4))
    strengths = {}
    with torch.no_grad():
        for i, (key, m) in enumerate(adapter.modules.items()):
            s = torch.tensor([4.0, 2.0, 1.0, 0.5]) if i % 2 else torch.tensor([1.0, 1.0, 1.0, 1.0])
            m.B.copy_(torch.linalg.qr(torch.randn(24, 4)).Q * s)
            m.A.copy_(torch.linalg.qr(torch.randn(24, 4)).Q.t())
            strengths[key] = s
    report = adapter.prune(energy=0.9)
    for key, s in strengths.items():
        share = s.square().cumsum(0) / s.square().sum()
        k = next(i for i in range(4) if share[i] >= 0.9) + 1
        assert report.ranks[key] == len(adapter.modules[key].A) == k
        assert report.errors[key] == pytest.approx(float((1 - share[k - 1]).sqrt()), abs=1e-6)
    assert set(report.ranks.values()) == {2, 4}
    assert set(vm.adapt(model, vm.LoRA(rank=3), name="zero").prune(energy=0.5).ranks.values()) == {1}


def test_energy_of_one_loses_nothing() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA(rank=5))
    shake(adapter, 0.3)
    with torch.no_grad():
        for m in adapter.modules.values():
            m.B[:, 3:] = m.B[:, :2]  # rank 3 in truth
    y = VIT.run(model)
    assert set(adapter.prune(energy=1 - 1e-9).ranks.values()) == {3}
    assert close(VIT.run(model), y)


def test_a_site_without_so_many_ranks_stays_to_the_bit_and_an_empty_one_can_be_trained() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA(rank=4, ranks={"blocks.0.*": 2}))
    shake(adapter, 0.3)
    before = {k: t.clone() for k, t in adapter.state_dict().items()}
    y0 = VIT.run(model)
    report = adapter.prune(rank=4)
    assert all(torch.equal(t, before[k]) for k, t in adapter.state_dict().items())
    assert set(report.errors.values()) == {0.0}
    report = adapter.prune(rank=3)
    assert sorted(set(report.ranks.values())) == [2, 3]
    assert {k for k, t in adapter.state_dict().items() if t.shape == before[k].shape and torch.equal(t, before[k])} == {
        k for k in before if "/blocks.0." in k
    }
    assert not torch.equal(VIT.run(model), y0)
    for empty in (vm.LoRA(), vm.AdaLoRA(rank=8), vm.DyLoRA(), vm.PiSSA()):
        fresh = VIT.model().requires_grad_(False)
        y0 = VIT.run(fresh)
        adapter = vm.adapt(fresh, empty)
        report = adapter.prune(rank=3)
        assert set(report.ranks.values()) == {3}
        assert set(report.errors.values()) == {0.0}
        assert close(VIT.run(fresh), y0, 2e-6)
        VIT.run(fresh).square().mean().backward()
        assert adapter.unused() == []


def test_dylora_at_a_rank_then_pruned_to_it_loses_nothing() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.DyLoRA(rank=6, alpha=3.0))
    shake(adapter, 0.3)
    adapter.load_state_dict(vm.DyLoRA.at(adapter.state_dict(), 4))
    y = VIT.run(model)
    model.train()  # whose draws do not count
    report = adapter.prune(rank=4)
    assert close(VIT.run(model.eval()), y)
    assert max(report.errors.values()) < 1e-6
    assert {m.B.shape[1] for m in adapter.modules.values()} == {4}
    # from there on the formula holds with b at most 4: alpha / b B[:, :b] A[:b]
    module = next(iter(adapter.modules.values()))
    W = torch.zeros(24, 24)
    assert close(module(W, None)[0], 3.0 / 4 * module.B @ module.A)
    adapter.load_state_dict(vm.DyLoRA.at(adapter.state_dict(), 2))
    assert close(module(W, None)[0], 3.0 / 2 * module.B[:, :2] @ module.A[:2])
    with pytest.raises(vm.InputError, match="from 1 to 4, not 5"):
        vm.DyLoRA.at(adapter.state_dict(), 5)


def test_adalora_goes_on_with_what_was_kept() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.AdaLoRA(rank=6, target=3, every=1))
    shake(adapter, 0.3)
    adapter.prune(rank=4)
    modules = list(adapter.modules.values())
    for m in modules:
        assert close(m.P.t() @ m.P, torch.eye(4))
        assert close(m.scores(), m.l)
    optimizer = torch.optim.AdamW(adapter.groups(1e-3))
    for step in range(1, 5):
        optimizer.zero_grad()
        (VIT.run(model).square().mean() + adapter.penalty()).backward()
        optimizer.step()
        adapter.advance(step, 4)
    assert sum(int((m.l != 0).sum()) for m in modules) == 3 * len(modules)
    adapter.prune(rank=1)
    adapter.advance(4, 4)  # the budget is above what there is
    assert all(m.l.all() for m in modules)


def test_a_list_of_methods_and_lora_fa() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, [vm.LoRA(rank=4, freeze_down=True), vm.Tune(), vm.LoHa(sites=("mlp.up",), rank=2)])
    shake(adapter)
    others = {k: t.clone() for k, t in adapter.state_dict().items() if not k.startswith("lora/")}
    report = adapter.prune(rank=2)
    assert report.ranks.keys() == {k for k in adapter.modules if k.startswith("lora/")}
    assert all(torch.equal(t, others[k]) for k, t in adapter.state_dict().items() if k in others)
    assert {n[-1] for n, p in adapter.named_parameters() if n.startswith("lora/") and not p.requires_grad} == {"A"}


def test_where_pruning_makes_no_sense() -> None:
    for method in (vm.DoRA(), vm.VeRA(rank=4), vm.LoHa(rank=2), vm.FacT(rank=4), vm.Tune(), vm.AdaptFormer(rank=4)):
        model = VIT.model()
        adapter = vm.adapt(model, method)
        state = {k: t.clone() for k, t in adapter.state_dict().items()}
        with pytest.raises(vm.InputError, match=rf"^{type(method).__name__} cannot be pruned: .* as LoRA's is"):
            adapter.prune(rank=2)
        assert all(torch.equal(t, state[k]) for k, t in adapter.state_dict().items())
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA(), name="a")
    for given, says in (
        ({}, "say either the ranks"),
        ({"rank": 2, "energy": 0.5}, "say either the ranks"),
        ({"rank": 0}, "at least 1, not 0"),
        ({"energy": 0.0}, "above 0 and at most 1, not 0"),
        ({"energy": 1.5}, "at most 1, not 1.5"),
    ):
        with pytest.raises(vm.InputError, match=says):
            adapter.prune(**given)
    adapter.merge()
    with pytest.raises(vm.InputError, match=r"'a' is merged: unmerge\(\) first"):
        adapter.prune(rank=2)
    adapter.unmerge()
    with torch.no_grad():
        list(adapter.modules.values())[-1].A[0, 0] = float("nan")
    state = {k: t.clone() for k, t in adapter.state_dict().items()}
    with pytest.raises(vm.InputError, match="not finite"):
        adapter.prune(rank=2)
    assert all(t.shape == state[k].shape for k, t in adapter.state_dict().items())


def test_states_of_other_ranks(tmp_path: Path) -> None:
    """A pruned state goes into the whole adapter and back; any other shape is an error that changes nothing."""
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA(rank=4), name="a")
    shake(adapter, 0.3)
    whole, y = {k: t.clone() for k, t in adapter.state_dict().items()}, VIT.run(model)
    adapter.prune(rank=2)
    pruned, y2 = {k: t.clone() for k, t in adapter.state_dict().items()}, VIT.run(model)
    adapter.load_state_dict(whole)
    assert torch.equal(VIT.run(model), y)
    last = list(pruned)[-1]
    for wrong in (
        {**pruned, last: pruned[last][:, :1]},  # B has fewer ranks than A
        {**pruned, last: pruned[last][:5]},
        {k: torch.cat([t, t], int(k.endswith("B"))) for k, t in whole.items()},  # more than it began with
        {k: t[:0] if k.endswith("A") else t[:, :0] for k, t in whole.items()},
    ):
        with pytest.raises(vm.InputError, match=r"is \(.*the adapter has"):
            adapter.load_state_dict(wrong)
        assert torch.equal(VIT.run(model), y)
        assert all(torch.equal(t, whole[k]) for k, t in adapter.state_dict().items())
    adapter.load_state_dict(pruned)
    assert torch.equal(VIT.run(model), y2)
    noah = vm.adapt(VIT.model(), vm.NOAH(tokens=(1, 2), ranks=(1, 2), widths=(2, 4)))
    before = {k: t.clone() for k, t in noah.state_dict().items()}
    wrong = {k: torch.ones_like(t) if k.endswith("chosen") else t.clone() for k, t in before.items()}
    key = next(k for k in wrong if k.endswith(".A"))
    wrong[key] = wrong[key][:1]
    with pytest.raises(vm.InputError, match="the adapter has"):
        noah.load_state_dict(wrong)
    assert all(torch.equal(t, before[k]) for k, t in noah.state_dict().items())
    assert {m.sizes["chosen"] for m in noah.modules.values()} == {2, 4}
    path = vm.save(adapter, tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        assert {tuple(file.get_slice(k).get_shape()) for k in file.keys()} == {(2, 24), (24, 2)}  # noqa: SIM118
    assert vm.load(VIT.model(), path).methods == {"lora": vm.LoRA(rank=4)}


def test_pissa_leaves_out_where_it_began(tmp_path: Path) -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.PiSSA(rank=3), name="a")
    shake(adapter, 0.3)
    report = adapter.prune(rank=4)  # of the six that B A - B0 A0 has
    assert set(report.ranks.values()) == {4}
    assert "6" in str(report).splitlines()[3].split()
    y = VIT.run(model)
    for m in adapter.modules.values():
        assert m.A0.numel() == m.B0.numel() == 0
        assert m.A.shape[0] == 4
    path = vm.save(adapter, tmp_path / "a.safetensors")
    fresh = VIT.model()
    vm.load(fresh, path)
    assert close(VIT.run(fresh), y, 2e-6)
    adapter.prune(rank=1)
    assert {m.A.shape[0] for m in adapter.modules.values()} == {1}


def test_an_optimiser_of_before_says_so_and_a_new_one_trains() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA(rank=4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)

    def step(optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = VIT.run(model).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    for _ in range(3):
        step(optimizer)
    adapter.prune(rank=2)
    assert all(p.grad is None for p in adapter.parameters())
    with pytest.raises(RuntimeError, match="size"):
        step(optimizer)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = [step(optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_the_other_adapter_and_the_base_do_not_notice() -> None:
    model = VIT.model().requires_grad_(False)
    y0 = VIT.run(model)
    a, b = (vm.adapt(model, vm.LoRA(rank=4), name=name, seed=i) for i, name in enumerate("ab"))
    shake(a)
    shake(b)
    vm.use(model, "b")
    y = VIT.run(model)
    a.prune(rank=1)
    assert torch.equal(VIT.run(model), y)
    vm.use(model)
    assert torch.equal(VIT.run(model), y0)


@pytest.mark.parametrize("shapes", [((3, 7), (5, 3)), ((9, 7), (5, 9)), ((3, 2, 3, 3), (5, 3))])
def test_the_decomposition_against_that_of_the_product(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    A, B = fixed(*shapes[0]), fixed(*reversed(shapes[1])).t()
    found, D = spectrum(A, B, 0.7), 0.7 * B.double() @ A.double().flatten(1)
    assert close(found.U @ found.S.diag() @ found.V, D, 1e-12)
    S = torch.linalg.svdvals(D)
    assert close(found.S, S[: len(found.S)], 1e-12)
    assert len(found.S) == min(shapes[0][0], 5, A[0].numel())
    small = found.first(2).factors(0.7)
    assert close(0.7 * small[1] @ small[0], best(D, 2), 1e-12)


def test_convolutions_in_groups_and_embeddings() -> None:
    for layer, x in (
        (nn.Conv2d(6, 8, 3, groups=2, padding=1), fixed(2, 6, 5, 5)),
        (nn.Embedding(9, 6), torch.arange(9)),
    ):
        model = nn.Sequential(layer)
        adapter = vm.adapt(model, vm.LoRA(sites=("w",), rank=4), sites={nn.Sequential: (vm.Weight("w", "0.weight"),)})
        shake(adapter, 0.3)
        (module,) = adapter.modules.values()
        assert isinstance(module, LowRank)
        D = (module.B @ module.A.flatten(1)).double()
        adapter.prune(rank=2)
        assert close((module.B @ module.A.flatten(1)).double(), best(D, 2))
        live = model(x)
        adapter.merge()
        assert close(model(x), live)


def test_diffusers_draws_the_same_with_ranks_of_each_layer_its_own(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    tiny_pipeline(tmp_path / "model")

    def picture(pipe: StableDiffusionPipeline) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
        return torch.tensor(pipe("a dog", generator=torch.Generator().manual_seed(0), **options).images[0])

    pipe, plain = (
        StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None) for _ in range(2)
    )  # fmt: skip
    sites = ("attn.*", "xattn.*", "mlp.*", "conv")
    adapter = vm.adapt({"unet": pipe.unet}, vm.LoRA(sites=sites, rank=6, alpha=3.0), seed=0)
    shake(adapter, 0.3)
    whole = picture(pipe)
    report = adapter.prune(energy=0.8)
    assert len(set(report.ranks.values())) > 1
    live = picture(pipe)
    assert (live - whole).abs().max() > 1e-3
    tensors, header = peft.write(layers_of(adapter))
    assert '"unet.rank_pattern": {}' not in header["lora_adapter_metadata"]
    assert '"unet.alpha_pattern": {}' not in header["lora_adapter_metadata"]
    from vismodal.files import write_tensors

    path = write_tensors(tmp_path / peft.FILE, tensors, header)
    plain.load_lora_weights(str(path.parent), weight_name=path.name)
    assert (picture(plain) - live).abs().max() <= 2e-5
