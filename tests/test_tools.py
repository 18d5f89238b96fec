"""Tools on adapters: every result against the formula on dense matrices, written out here, and against the model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_diffusion import tiny_pipeline
from torch import Tensor, nn
from zoo import BY_NAME, close, shake

import vismodal as vm
from vismodal import cli
from vismodal.checkpoint import restore
from vismodal.diffusion.exports import export
from vismodal.methods import Method
from vismodal.methods.spectrum import decompose
from vismodal.pruning import Keep
from vismodal.tools.bake import bake
from vismodal.tools.combine import Recipe, Update, combine, combine_dense, disjoint_mean, drop, trim
from vismodal.tools.extract import extract
from vismodal.tools.live import changes_on
from vismodal.tools.merge import merge
from vismodal.tools.resize import by_place, resize
from vismodal.tools.saved import Saved, changes, read_saved, saved_of, write_saved
from vismodal.tools.strength import interpolate, scale

VIT = BY_NAME["timm-vit_tiny_patch16_224"]
Methods = Method | list[Method]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(model: nn.Module, method: Methods, seed: int = 0, name: str = "a", size: float = 0.1) -> Saved:
    """A file of an adapter that was moved away from its start; the model is as before."""
    adapter = vm.adapt(model, method, name=name, seed=seed)
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(size * drawn(*p.shape, seed=100 * seed + i).float())
    saved = saved_of(adapter)
    adapter.detach()
    return saved


def deltas(model: nn.Module, saved: Saved, strength: float = 1.0) -> dict[str, Tensor]:
    """Merged minus base of every parameter: by the port's own merging, which no tool uses."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = restore(model, saved.header, saved.tensors, saved.name, "seen")
    adapter.scale = strength
    adapter.merge()
    found = {n: (p.detach() - before[n]).double() for n, p in model.named_parameters() if n in before}
    adapter.detach()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor], bound: float = 1e-5) -> bool:
    largest = max(t.abs().max() for t in b.values())
    return a.keys() == b.keys() and all((a[n] - b[n]).abs().max() <= bound * largest for n in b)


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    a, b = torch.tensor([[4.0, -1, 0.1, 3]]), torch.tensor([[-2.0, -3, 0.2, 0]])
    # the larger half of each; signs of the sums +, -, 0, +; means of those that agree
    assert trim(a, 0.5).tolist() == [[4, 0, 0, 3]]
    assert trim(b, 0.5).tolist() == [[-2, -3, 0, 0]]
    got = combine_dense([a, b], [1, 1], Recipe("ties", density=0.5), "k")
    assert got.tolist() == [[4, -3, 0, 3]]
    # weights come before the election: 3 times b outvotes a
    assert combine_dense([a, b], [1, 3], Recipe("ties", density=0.5), "k").tolist() == [[-6, -9, 0, 3]]
    assert disjoint_mean([torch.tensor([1.0, 2]), torch.tensor([3.0, -2]), torch.tensor([-1.0, 0])]).tolist() == [2, 0]


def test_an_adapter_of_a_weight_is_the_same_as_one_of_that_strength() -> None:
    a, b = drawn(6, 5), drawn(6, 5, seed=1)
    recipe = Recipe("ties", density=0.6)
    assert close(combine_dense([a, b], [0.3, -2], recipe, ""), combine_dense([0.3 * a, -2 * b], [1, 1], recipe, ""))


def test_dare_drops_at_random_by_its_seed_and_keeps_the_mean() -> None:
    D = torch.ones(300, 300)
    kept = drop(D, 0.25, (0, "dare", "k", 0))
    assert set(kept.unique().tolist()) == {0, 4}
    assert kept.mean() == pytest.approx(1, abs=0.02)
    a, b = drawn(30, 20), drawn(30, 20, seed=1)
    masks = [drop(torch.ones(30, 20), 0.5, (7, "dare", "k", i)) for i in range(2)]
    assert not torch.equal(*masks)
    got = combine_dense([a, b], [0.7, 0.3], Recipe("dare", seed=7), "k")
    assert torch.equal(got, 0.7 * a * masks[0] + 0.3 * b * masks[1])
    assert not torch.equal(got, combine_dense([a, b], [0.7, 0.3], Recipe("dare", seed=8), "k"))
    both = combine_dense([a, b], [1, 1], Recipe("dare_ties", seed=7), "k")
    assert torch.equal(both, disjoint_mean([a * masks[0], b * masks[1]]))


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (6, 3, 2, 2)])
def test_decompose_is_the_svd(shape: tuple[int, ...]) -> None:
    D = drawn(*shape)
    flat = D.flatten(1)
    U, S, V = decompose(D)
    assert close(S, torch.linalg.svdvals(flat), 1e-12)
    assert close(U * S @ V, flat, 1e-12)
    low = drawn(9, 2) @ drawn(2, 14) * 1e-3  # of low rank: what is left is rounding
    assert decompose(low).S[2:].max() < 1e-12
    assert decompose(torch.zeros(3, 4)).S.tolist() == [0, 0, 0]


def test_a_sum_of_products_never_becomes_a_matrix() -> None:
    a, b = (Update(drawn(r, 5, 3, 3, seed=r), drawn(7, r, seed=9 + r)) for r in (2, 3))
    whole = combine([a, b], [0.7, -0.3], Recipe(), "k")
    assert isinstance(whole, Update)
    assert len(whole.A) == 5
    assert close(whole.dense(), 0.7 * a.dense() - 0.3 * b.dense(), 1e-12)
    assert whole.norm() == pytest.approx(float(whole.dense().norm()))


@pytest.mark.parametrize("kind", ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "linear"])
def test_as_peft_where_peft_is_right(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    from peft.utils import merge_utils

    base = nn.Sequential(nn.Linear(12, 10, bias=False))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    model = peft.get_peft_model(base, config, "one")
    model.add_adapter("two", config)
    layer = model.base_model.model[0]
    updates = []
    for i, name in enumerate(("one", "two")):
        A, B = drawn(3, 12, seed=i).float(), drawn(10, 3, seed=5 + i).float()
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A, B
        updates.append(Update(A, 2 * B))
    masks = [drop(torch.ones(10, 12), 0.5, (0, "dare", "k", i)) for i in range(2)]
    left = list(masks)  # what peft is to draw
    monkeypatch.setattr(merge_utils, "random_pruning", lambda t, d, rescale: t * left.pop(0).float())
    density = {} if kind in ("svd", "linear") else {"density": 0.5}
    rank = {} if kind == "linear" else {"svd_rank": 4}
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type=kind, **density, **rank)
    theirs = layer.get_delta_weight("both").double()
    ours = {"svd": "svd", "ties_svd": "ties", "dare_linear_svd": "dare", "dare_ties_svd": "dare_ties"}.get(
        kind, "linear"
    )
    whole = combine_dense([u.dense() for u in updates], [0.5, 0.5], Recipe(ours, **density), "k")
    if kind == "linear":  # (A_a + A_b)(B_a + B_b): peft's is no sum of the updates
        assert (theirs - whole).norm() > 0.3 * whole.norm()
        return
    U, S, V = torch.linalg.svd(whole)
    assert close(theirs, U[:, :4] * S[:4] @ V[:4], 1e-5)


# -- merging -----------------------------------------------------------------------------------------------------------

PRODUCTS: dict[str, Methods] = {
    "LoRA": vm.LoRA(rank=3, alpha=5.0, sites=("attn.*", "mlp.*")),
    "rank-stabilised": vm.LoRA(rank=3, alpha=5.0, rank_stabilised=True),
    "ranks": vm.LoRA(rank=2, ranks={"attn.q": 3}),
    "PiSSA": vm.PiSSA(rank=2, alpha=3.0),
    "AdaLoRA": vm.AdaLoRA(rank=4, target=2, alpha=3.0),
    "DyLoRA": vm.DyLoRA(rank=3, alpha=2.0),
    "layers": vm.LoRA(rank=2, layers=slice(-1, None), sites=("attn.out",)),
}
OTHERS: dict[str, Methods] = {
    "DoRA": vm.DoRA(rank=2),
    "OFT": vm.OFT(block_size=8),
    "LoHa": vm.LoHa(rank=2, alpha=3.0),
    "LoKr": vm.LoKr(rank=2),
    "FacT": vm.FacT(rank=2),
    "IA3": vm.IA3(),
    "SSF": vm.SSF(),
    "RepAdapter": vm.RepAdapter(),
    "SparseMask": vm.SparseMask(criterion="magnitude", density=0.1),
    "several": [vm.DoRA(rank=2), vm.LoRA(rank=2, sites=("attn.q",)), vm.Tune(sites=("head", "norm"))],
    "whole": [vm.LoRA(sites=("attn.qkv",), rank=2), vm.LoRA(rank=1)],
    "BitFit": vm.BitFit(),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_file_alone_tells_what_its_products_do(name: str, tmp_path: Path) -> None:
    model = VIT.model()
    a = trained(model, PRODUCTS[name])
    a = read_saved(write_saved(a, tmp_path / "a.safetensors"))
    made = merge([a], [-0.5])
    assert same(deltas(model, made.saved), {n: -0.5 * d for n, d in deltas(model, a).items()})
    assert {type(m) for m in made.saved.methods.values()} == {vm.LoRA}
    assert made.report.errors and not any(made.report.errors.values())


@pytest.mark.parametrize("name", OTHERS)
def test_the_base_tells_what_every_method_does(name: str) -> None:
    model = VIT.model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    a = trained(model, OTHERS[name])
    made = merge([a], [1.0], keep=Keep(rank=24), models={"": model})
    assert same(deltas(model, made.saved), deltas(model, a))
    assert {type(m) for m in made.saved.methods.values()} <= {vm.LoRA, vm.Tune}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_two_adapters_add_up_and_truncation_is_the_best() -> None:
    model = VIT.model()
    a = trained(model, [vm.LoRA(rank=3, sites=("attn.*",)), vm.Tune()], 1)
    b = trained(model, [vm.LoRA(rank=2, sites=("attn.q", "mlp.up"), alpha=4.0), vm.Tune()], 2)
    want = {n: 0.7 * d + 0.3 * e for (n, d), e in zip(deltas(model, a).items(), deltas(model, b).values(), strict=True)}
    made = merge([a, b], [0.7, 0.3])
    assert same(deltas(model, made.saved), want)
    assert made.report.ranks["blocks.0.attn.qkv:q"] == 5
    assert made.notes[0].startswith("a does not change 2 of 12 sites, such as blocks.0.mlp.fc1")
    cut = merge([a, b], [0.7, 0.3], Recipe("svd"), Keep(rank=2))
    got = deltas(model, cut.saved)
    D = want["blocks.0.attn.proj.weight"]
    U, S, V = torch.linalg.svd(D)
    assert close(got["blocks.0.attn.proj.weight"], U[:, :2] * S[:2] @ V[:2])
    lost = math.sqrt(float(S[2:].square().sum() / S.square().sum()))
    assert cut.report.errors["blocks.0.attn.proj"] == pytest.approx(lost, rel=1e-3)
    assert same(deltas(model, merge([a, b], [0.7, 0.3], models={"": model}).saved), want)


def test_ties_and_dare_on_files_follow_the_formula() -> None:
    model = VIT.model()
    a, b = (trained(model, vm.LoRA(rank=2), i) for i in (1, 2))
    for method in ("ties", "dare", "dare_ties"):
        recipe = Recipe(method, density=0.4)
        made = merge([a, b], [0.6, 0.8], recipe, Keep(rank=24))
        key = "blocks.1.attn.qkv:v"
        D = [changes(s)[key].dense() for s in (a, b)]  # type: ignore[union-attr]
        want = combine_dense(D, [0.6, 0.8], recipe, key)
        assert close(deltas(model, made.saved)["blocks.1.attn.qkv.weight"][48:], want)
        assert set(merge([a, b], None, recipe).report.ranks.values()) == {2}


def test_interpolation_goes_from_one_to_the_other() -> None:
    model = VIT.model()
    a, b = (trained(model, [vm.LoRA(rank=2), vm.Tune()], i) for i in (1, 2))
    A, B = deltas(model, a), deltas(model, b)
    for share in (0.0, 0.25, 1.0):
        want = {n: (1 - share) * A[n] + share * B[n] for n in A}
        assert same(deltas(model, interpolate(a, b, share).saved), want)


SCALABLE: dict[str, Methods] = {
    **{k: m for k, m in PRODUCTS.items() if k in ("LoRA", "PiSSA", "AdaLoRA", "DyLoRA")},
    **{k: m for k, m in OTHERS.items() if k in ("LoHa", "LoKr", "FacT", "IA3", "SSF", "RepAdapter", "SparseMask")},
    "VeRA": vm.VeRA(rank=8),
    "tucker": vm.FacT(rank=2, tucker=True),
    "both": vm.LoKr(rank=1, decompose_both=True),
}


@pytest.mark.parametrize("name", SCALABLE)
def test_a_scaled_file_is_the_adapter_at_that_scale(name: str) -> None:
    model = VIT.model()
    a = trained(model, SCALABLE[name])
    assert same(deltas(model, scale(a, 0.7)), deltas(model, a, 0.7))
    assert same(deltas(model, scale(a, 0.0)), {n: torch.zeros_like(d) for n, d in deltas(model, a).items()})


def test_a_scaled_copy_needs_the_base_and_a_rotation_cannot_be_scaled() -> None:
    model = VIT.model()
    a = trained(model, [vm.LoRA(rank=2), vm.Tune(sites=("norm", "head"))])
    assert same(deltas(model, scale(a, 0.3, {"": model})), deltas(model, a, 0.3))
    with pytest.raises(vm.InputError, match=r"trained copies, whose change cannot be told .* \(--model\)"):
        scale(a, 0.3)
    for method in (vm.OFT(block_size=8), vm.DoRA()):
        with pytest.raises(vm.InputError, match=r"bake it at a strength, or merge it"):
            scale(trained(model, method), 0.5)


def test_what_does_not_go_together_says_so() -> None:
    model, other = VIT.model(), BY_NAME["timm-vit_small_patch14_reg4_dinov2"].model()
    a, tuned, dora = (trained(model, m) for m in (vm.LoRA(), [vm.LoRA(), vm.Tune()], vm.DoRA()))
    foreign = trained(other, vm.LoRA())
    span = Saved("span", {**a.header, "methods": '{"vpt":{"method":"VPT"}}'}, {})
    late = trained(model, vm.LoRA(layers=slice(-1, None)))
    ranked = trained(model, vm.LoRA(ranks={"attn.q": 2}, alpha=4.0))
    whole = trained(model, vm.LoRA(sites=("attn.qkv",)))
    for adapters, weights, recipe, says in (
        ([a, foreign], None, None, "was made on .*: parameters of other names or shapes"),
        ([a, span], None, None, "VPT, which is no update of weights"),
        ([a, dora], None, None, r"what DoRA does to a weight cannot be told from its file alone.*--model"),
        ([a, ranked], None, None, "has ranks by site, and its scale there cannot be told"),
        ([a, late], None, None, "chooses .* by other modules or layers than others"),
        ([a, whole], None, None, "adapted as a whole and in parts"),
        ([tuned, tuned], [0.5, 0.6], None, "weights that add up to 1"),
        ([tuned, tuned], [0.5, 0.5], Recipe("ties"), r"trained copy .*--model"),
        ([a, a], [1.0], None, "2 adapters and 1 weights"),
        ([a, a], [1.0, math.nan], None, "finite"),
    ):
        with pytest.raises(vm.InputError, match=says):
            merge(adapters, weights, recipe)
    assert same(deltas(model, merge([a, late, whole, ranked], models={"": model}).saved),
                {n: sum(deltas(model, s)[n] for s in (a, late, whole, ranked)) for n in deltas(model, a)})  # fmt: skip
    for wrong, says in (({"method": "tie"}, "no method 'tie'.*ties"), ({"density": 0.5}, "keeps every entry"),
                        ({"method": "ties", "density": 0.0}, "above 0")):  # fmt: skip
        with pytest.raises(vm.InputError, match=says):
            Recipe(**wrong)  # type: ignore[arg-type]
    with pytest.raises(vm.InputError, match="one of them"):
        Keep(rank=2, energy=0.5)
    with pytest.raises(vm.InputError, match="all ranks; write svd"):
        merge([a, a], None, Recipe("concatenated"), Keep(rank=2))


def test_several_towers_merge_by_their_names() -> None:
    one, two = VIT.model(), VIT.model()
    a = saved_on({"x": one}, vm.LoRA(rank=2), 1)
    b = saved_on({"x": one, "y": two}, vm.LoRA(rank=1), 2)
    made = merge([a, b])
    assert set(made.saved.bases) == {"x", "y"}
    assert made.report.ranks["x.blocks.0.attn.qkv:q"] == 3
    assert made.report.ranks["y.blocks.0.attn.qkv:q"] == 1
    adapter = restore({"x": one, "y": two}, made.saved.header, made.saved.tensors, "both")
    adapter.detach()
    c = saved_on({"x": one}, vm.LoRA(rank=1, sites=("mlp.up",)), 3)
    with pytest.raises(vm.InputError, match="other kinds of site on other models"):
        merge([b, c])
    assert "x.blocks.0.mlp.fc1" in merge([b, c], models={"x": one, "y": two}).report.ranks
    with pytest.raises(vm.InputError, match=r"adapts x .* one model \(vit_tiny"):
        merge([a, trained(one, vm.LoRA())])


def saved_on(models: dict[str, nn.Module], method: Methods, seed: int) -> Saved:
    adapter = vm.adapt(models, method, name="a", seed=seed)
    shake(adapter)
    saved = saved_of(adapter)
    adapter.detach()
    return saved


# -- fewer ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LoRA", "rank-stabilised", "PiSSA", "AdaLoRA", "DyLoRA"])
def test_resize_is_prune_on_the_file(name: str) -> None:
    model = VIT.model()
    a = trained(model, [PRODUCTS[name], vm.Tune()])  # type: ignore[list-item]
    made = resize(a, Keep(rank=1))
    adapter = restore(model, a.header, a.tensors, "a")
    report = adapter.prune(rank=1)
    want = saved_of(adapter)
    adapter.detach()
    assert same(deltas(model, made.saved), deltas(model, want))
    assert made.saved.methods == a.methods
    assert made.report.errors == pytest.approx(dict(report.errors))
    assert made.notes == ("unchanged, as it has no ranks: Tune (tune)",)
    assert "blocks.*.attn.qkv:q" in str(by_place(made.report))


def test_resize_by_error_keeps_the_fewest_ranks_that_reach_it() -> None:
    model = VIT.model()
    a = trained(model, vm.LoRA(rank=6, sites=("attn.*",)))
    made = resize(a, Keep(error=0.4, ranks={"blocks.0.attn.proj": 5}))
    for key, rank in made.report.ranks.items():
        S = torch.linalg.svdvals(changes(a)[key.partition("/")[2]].dense())  # type: ignore[union-attr]
        errors = [float(S[k:].norm() / S.norm()) for k in range(7)]
        best = next(k for k in range(1, 7) if errors[k] <= 0.4)
        assert rank == (5 if key.endswith("blocks.0.attn.proj") else best)
        assert made.report.errors[key] == pytest.approx(errors[rank], abs=1e-6)
    with pytest.raises(vm.InputError, match=r"matches no site, such as blocks\.0"):
        resize(a, Keep(ranks={"mlp.*": 2}))
    with pytest.raises(vm.InputError, match="say how many ranks"):
        resize(a, Keep())
    with pytest.raises(vm.InputError, match="a has OFT, whose updates are no products"):
        resize(trained(model, vm.OFT(block_size=8)), Keep(rank=1))


# -- out of two models and into one ------------------------------------------------------------------------------------


def moved(model: nn.Module, glob: str = "") -> nn.Module:
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for i, (name, p) in enumerate(tuned.named_parameters()):
            if glob in name:
                p.add_(0.02 * drawn(*p.shape, seed=i).float())
    return tuned


@pytest.mark.parametrize("name", ["timm-vit_tiny_patch16_224", "timm-beit_base_patch16_224", "open_clip-CLIP"])
def test_extract_at_full_rank_leaves_out_what_has_no_site_and_nothing_else(name: str) -> None:
    model = BY_NAME[name].model()
    tuned = moved(model)
    made = extract(model, tuned, Keep(rank=1000))
    got, want = deltas(model, made.saved), dict(tuned.named_parameters())
    off = {n for n, p in model.named_parameters() if not close(p + got[n].float(), want[n])}
    assert off
    assert all(not got[n].any() for n in off)  # whole tensors, and the note names them
    assert made.notes[-1].startswith("left out, 0.")
    assert all(n in made.notes[-1] for n in sorted(off)[:1]) or len(off) > 6


def test_extract_at_low_rank_is_the_best_approximation() -> None:
    model = VIT.model()
    tuned = moved(model, "blocks")
    made = extract(model, tuned, Keep(rank=3), kinds=("mlp.*",), copies=False)
    got = deltas(model, made.saved)
    for n in ("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc2.weight"):
        D = (tuned.get_parameter(n) - model.get_parameter(n)).double()
        U, S, V = torch.linalg.svd(D)
        assert close(got[n], U[:, :3] * S[:3] @ V[:3], 1e-4)
    assert list(made.saved.methods) == ["lora"]
    assert "blocks.0.attn.qkv.weight" in made.notes[-1]
    with pytest.raises(vm.InputError, match="are equal"):
        extract(model, copy.deepcopy(model), Keep(rank=1))
    with pytest.raises(vm.InputError, match=r"cls_token is \(1, 1, 24\) in the base and not in"):
        extract(model, BY_NAME["timm-swin_tiny_patch4_window7_224"].model(), Keep(rank=1))
    with pytest.raises(vm.InputError, match=r"on no site of xattn.*: blocks\.0"):
        extract(model, tuned, Keep(rank=1), kinds=("xattn.*",), copies=False)


def test_baking_equals_live_use_and_leaves_no_trace() -> None:
    model = VIT.model()
    plain = copy.deepcopy(model)
    a, b = trained(model, [vm.DoRA(rank=2), vm.Tune()], 1), trained(model, vm.LoRA(rank=2), 2)
    live = [restore(model, s.header, s.tensors, s.name, n) for s, n in ((a, "a"), (b, "b"))]
    live[1].scale = 0.5
    y = VIT.run(model)
    bake({"": plain}, [a, b], [1.0, 0.5])
    assert close(VIT.run(plain), y)
    assert plain._modules.keys() == VIT.model()._modules.keys()
    before = copy.deepcopy(plain.state_dict())
    span = trained(model_of := VIT.model(), vm.AdaptFormer(rank=2))
    foreign = trained(BY_NAME["timm-vit_small_patch14_reg4_dinov2"].model(), vm.LoRA())
    for wrong, says in ((span, "AdaptFormer, which acts in the forward pass.*vm.load"), (foreign, "does not fit")):
        with pytest.raises(vm.InputError, match=says):
            bake({"": plain}, [a, wrong])
    assert all(torch.equal(t, before[n]) for n, t in plain.state_dict().items())
    with pytest.raises(vm.InputError, match="AdaptFormer, which is no update of weights"):
        changes_on({"": model_of}, span)


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_merges_and_resizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = VIT.model()
    files = [write_saved(trained(model, vm.LoRA(rank=2), i), tmp_path / f"{i}.safetensors") for i in (1, 2)]
    out = tmp_path / "out.safetensors"
    asked = [
        "merge",
        *map(str, files),
        "--weights",
        "0.7",
        "-0.3",
        "--method",
        "ties",
        "--rank",
        "3",
        "--out",
        str(out),
    ]
    assert cli.main(asked) == 0
    assert "relative error" in capsys.readouterr().out
    made = merge([read_saved(f) for f in files], [0.7, -0.3], Recipe("ties"), Keep(rank=3))
    assert all(torch.equal(t, made.saved.tensors[k]) for k, t in read_saved(out).tensors.items())
    small = tmp_path / "small.safetensors"
    assert cli.main(["resize", str(out), "--energy", "0.5", "--ranks", "*.1.*=1", "--out", str(small)]) == 0
    assert small.stat().st_size < out.stat().st_size
    weak = tmp_path / "weak.safetensors"
    assert cli.main(["bake", str(out), "--strengths", "0.5", "--out", str(weak)]) == 0
    assert same(deltas(model, read_saved(weak)), deltas(model, read_saved(out), 0.5))
    capsys.readouterr()
    for wrong, says in (
        (["merge", str(out), "--out", str(small)], "two adapters or more"),
        (["merge", *map(str, files)], "--out FILE.safetensors"),
        (["merge", *map(str, files), "--out", str(files[0])], "stays as it is"),
        (["merge", *map(str, files), "--weights", "1", "--out", str(out)], "2 adapters and 1 weights"),
        (["resize", str(out), "--out", str(small)], "say how many ranks"),
        (["resize", str(out), "--ranks", "x", "--out", str(small)], "gives no site a rank"),
        (["bake", str(out), "--out", str(tmp_path / "model")], "write --model with the folder or name of vit_tiny"),
        (["bake", str(out), "--precision", "fp16", "--out", str(weak)], "that of a model's folder"),
        (["extract", "--base", "tiny-vit", "--out", str(out)], "--tuned MODEL"),
    ):
        assert cli.main(wrong) == 2
        assert says in capsys.readouterr().err


def test_a_timm_model_is_baked_extracted_and_loaded_by_timm(tmp_path: Path) -> None:
    import timm

    base = vm.models.load("tiny-vit")
    a = trained(base, [vm.LoRA(rank=2), vm.Tune(sites=("norm",))], size=0.03)
    file, folder, again = write_saved(a, tmp_path / "a.safetensors"), tmp_path / "baked", tmp_path / "b.safetensors"
    assert cli.main(["bake", str(file), "--model", "tiny-vit", "--out", str(folder)]) == 0
    baked = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = drawn(2, 3, 32, 32).float()
    bake({"": base}, [a])
    assert torch.equal(baked(x), base(x))
    assert '"apple"' in (folder / "config.json").read_text()
    asked = ["--base", "tiny-vit", "--tuned", str(folder / "model.safetensors"), "--rank", "2", "--out", str(again)]
    assert cli.main(["extract", *asked]) == 0
    bare = vm.models.load("tiny-vit")
    vm.load(bare, again)
    assert close(bare(x), base(x), 1e-4)
    assert cli.main(["bake", str(file), "--model", "tiny-vit", "--out", str(folder)]) == 2


def test_folders_of_transformers_and_open_clip_are_baked(tmp_path: Path) -> None:
    import open_clip
    from transformers import ViTForImageClassification

    theirs = BY_NAME["transformers-ViT"].model()
    theirs.save_pretrained(tmp_path / "vit")
    ours = vm.models.load("tiny-clip").model
    x, y = drawn(2, 3, 32, 32).float(), drawn(2, 3, 64, 64).float()
    for model, source in ((theirs, str(tmp_path / "vit")), (ours, "tiny-clip")):
        name = Path(source).name
        a = trained(model, vm.LoRA(rank=2))
        file, folder = write_saved(a, tmp_path / f"{name}.safetensors"), tmp_path / f"baked-{name}"
        assert cli.main(["bake", str(file), "--model", source, "--out", str(folder)]) == 0
        bake({"": model}, [a])
    again = ViTForImageClassification.from_pretrained(tmp_path / "baked-vit").eval()
    assert torch.equal(again(x).logits, theirs(x).logits)
    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'baked-tiny-clip'}")
    assert torch.equal(clip.eval().encode_image(y), ours.encode_image(y))


def test_a_pipeline_is_baked_into_a_folder_that_diffusers_loads(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = tiny_pipeline(tmp_path / "base")
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = vm.adapt(models, vm.LoRA(rank=2, sites=("attn.q", "attn.v")), name="a", seed=0)
    shake(adapter, 0.3)
    file = vm.save(adapter, tmp_path / "a.safetensors")
    adapter.merge()

    def draw(p: StableDiffusionPipeline) -> Tensor:
        given = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", "num_inference_steps": 2}
        return p("a dog", height=16, width=16, **given).images

    images = draw(pipe)
    assert cli.main(["bake", str(file), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "baked")]) == 0
    baked = StableDiffusionPipeline.from_pretrained(tmp_path / "baked")
    baked.set_progress_bar_config(disable=True)
    assert torch.equal(draw(baked), images)
    out = tmp_path / "x.safetensors"
    asked = ["--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "baked"), "--rank", "2", "--out", str(out)]
    assert cli.main(["extract", *asked, "--parts", "unet", "text_encoder"]) == 0
    adapter.detach()
    vm.load(models, out)
    assert close(draw(pipe), images, 1e-3)


def test_what_was_trained_to_end_in_noise_alone_is_baked_with_its_sampler(tmp_path: Path) -> None:
    """From files of ours and of diffusers; with any other sampler the folder would draw other pictures."""
    pipe = tiny_pipeline(tmp_path / "base", "v_prediction")
    adapter = vm.adapt({"unet": pipe.unet}, vm.LoRA(rank=1, sites=("attn.q",)))
    told = {"zero_snr": "true", "subject": "sks"}
    plain, ours = (vm.save(adapter, tmp_path / name, h) for name, h in (("0.safetensors", {}), ("1.safetensors", told)))
    (theirs,) = export(pipe, adapter, tmp_path / "theirs", told).files
    for i, (file, zero) in enumerate(((plain, False), (ours, True), (theirs, True))):
        out = tmp_path / f"baked-{i}"
        assert cli.main(["bake", str(file), "--model", str(tmp_path / "base"), "--out", str(out)]) == 0
        sampler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
        assert (sampler["rescale_betas_zero_snr"], sampler["timestep_spacing"] == "trailing") == (zero, zero)
