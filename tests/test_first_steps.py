"""What somebody does in the first half hour: compile, save, unfreeze, print, and mistype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import vismodal as vm
from vismodal.data.pictures import cropped
from vismodal.table import Listing


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.query(x).sigmoid() * self.value(x)
        return x + self.attn(x, x, x, need_weights=False)[0]


SITES = {Block: (vm.Weight("gate.q", "query.weight"), vm.Weight("gate.v", "value.weight"))}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval().requires_grad_(False)


def adapt(base: nn.Module, kind: str, name: str = "default") -> vm.Adapter:
    adapter = vm.adapt(base, vm.LoRA(rank=2, sites=(kind,)), name=name, sites=SITES)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.5)
    return adapter


# -- silent, where they go wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
@torch.no_grad()
def test_an_adapter_that_comes_after_compiling_acts(in_place: bool) -> None:
    """torch guards no hooks: code that was compiled before would go on as if there were no adapter."""
    torch._dynamo.reset()
    base, want, x = model(), model(), torch.randn(2, 3, 8)
    if in_place:
        base.compile(backend="eager")
    compiled: Any = base if in_place else torch.compile(base, backend="eager")
    assert_close(compiled(x), want(x))
    for name, kind in (("update", "gate.v"), ("shadow", "attn.q")):
        low_rank = adapt(base, kind, name).modules.values()
        for block, module in zip(want, low_rank, strict=True):
            W = block.value.weight if name == "update" else block.attn.in_proj_weight
            W[:8] += module.scaling * module.B @ module.A
        assert_close(compiled(x), want(x), msg=name)
    vm.use(base)
    assert_close(compiled(x), model()(x))
    for adapter in vm.attached(base).values():
        adapter.detach()
    assert_close(compiled(x), model()(x))


def test_a_seed_leaves_the_generators_of_accelerators_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed seeds them as well, and fork_rng brings back the CPU's: every load would begin CUDA's anew."""
    from PIL import Image

    path = vm.save(adapt(model(), "gate.q"), tmp_path / "a.safetensors")
    base, seeded = model(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    vm.load(base, path, sites=SITES)
    cropped(Image.new("RGB", (8, 8)), 4, "key")
    assert seeded == []
    torch.manual_seed(1)
    assert seeded == [1]  # else this test could not fail


def test_what_is_trained_beside_the_adapter_is_not_lost_silently(tmp_path: Path) -> None:
    base = model()
    adapter = adapt(base, "gate.q")
    vm.save(adapter, tmp_path / "a.safetensors")  # no warning, which would be an error here
    base[1].value.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"^1\.value\.weight of the base can be trained.*vm\.Tune"):
        vm.save(adapter, tmp_path / "a.safetensors")


def test_a_head_that_is_not_in_the_file_is_told_apart(tmp_path: Path) -> None:
    """A model made anew has another random head: LoRA alone, loaded there, would guess."""

    def classifier(head: int) -> nn.Sequential:
        base = model().append(nn.Linear(8, 3))
        nn.init.normal_(base[2].weight, generator=torch.Generator().manual_seed(head))
        return base

    table = {**SITES, nn.Sequential: (vm.Weight("head", "2.weight"), vm.Weight("head", "2.bias"))}
    methods = [vm.LoRA(rank=2, sites=("gate.q",)), vm.Tune(sites=("head",))]
    whole = vm.save(vm.adapt(classifier(0), methods, sites=table), tmp_path / "whole.safetensors")
    base = classifier(0)
    lora = vm.adapt(base, methods[0], sites=table)
    with torch.no_grad():
        base[2].weight.mul_(2)  # trained by hand: it counts as it is when it is saved
    path = vm.save(lora, tmp_path / "lora.safetensors")
    for head, file in ((0, whole), (1, whole)):  # no warning, which would be an error here
        vm.load(classifier(head), file, sites=table)
    vm.load(base, path, "again", sites=table)
    with pytest.warns(UserWarning, match=r"holds no head, and this Sequential has another one.*vm\.Tune"):
        vm.load(classifier(1), path, sites=table)


# -- mistakes, with what to write instead ------------------------------------------------------------------------------

LORA, W = vm.LoRA(rank=2, sites=("gate.*",)), vm.Weight
MISTAKES: list[tuple[Callable[[nn.Module, vm.Adapter], object], str]] = [
    (lambda m, a: vm.LoRA(rank=8.0), "LoRA: rank is of type int, which 8.0 is not"),
    (lambda m, a: vm.VPT(tokens="8"), "VPT: tokens is of type int, which '8' is not"),
    (lambda m, a: vm.LoRA(alpha=True), r"alpha is of type float \| None, which True is not"),
    (lambda m, a: vm.LoRA(sites=3), "sites are names or globs"),
    (lambda m, a: vm.adapt(m, "lora", sites=SITES), r"'lora' is no method; write e\.g\. vm\.adapt\(model, vm\.LoRA"),
    (lambda m, a: vm.adapt(m, LORA, ["b"], sites=SITES), r"\['b'\] cannot name an adapter"),
    (lambda m, a: vm.adapt(m, vm.LoRA(sites="query"), "b", sites=SITES), "modules named 'query' are its gate.q$"),
    (lambda m, a: vm.adapt(m, vm.CoOp(), "b", sites=SITES), r"offers [^?]*; CoOp fits none of them; vm\.methods\(\)"),
    (lambda m, a: vm.adapt(m, vm.Convpass(), "b", sites=SITES), "no site of kind 'attn' .*Convpass fits none of them"),
    (lambda m, a: vm.adapt(m, vm.SSF(), "b", sites=SITES), "no site of kind 'embed' .*SSF fits gate.q, gate.v, attn.q"),
    (lambda m, a: vm.adapt(m, LORA, "b", sites={Block: W("gate.q", "query.weight")}), "is a tuple; write Block: "),
    (lambda m, a: vm.adapt(m, LORA, "b", sites={"Block": ()}), "'Block' is no class"),
    (
        lambda m, a: vm.adapt(m, LORA, "b", sites={Block: (*SITES[Block], W("gate.out", "valeu.weight"))}),
        r"Block has no parameter 'valeu\.weight'; it has query\.weight, query\.bias, value\.weight, attn\.",
    ),
    (lambda m, a: vm.sites(m, {Block: (vm.Span("block", "", "norm9"),)}), "Block has no module 'norm9'; it has query"),
    (lambda m, a: vm.sites("vit"), "a str is no module"),
    (lambda m, a: vm.use(m, ["a"]), r"\['a'\] is no name; write names one by one: vm\.use\(model, 'a', 'b'\)"),
    (lambda m, a: vm.route(m, "a").__enter__(), "no rows are given; write a name for each"),
    (lambda m, a: vm.route(m, [a]).__enter__(), "is neither a name nor None"),
    (lambda m, a: setattr(a, "scale", float("nan")), "scale must be finite, not nan"),
    (lambda m, a: vm.save(m, "a.safetensors"), "a Sequential is no adapter; write vm.save"),
    (lambda m, a: vm.save(a, "."), r"\. is a folder; name the file in it: a\.safetensors"),
    (lambda m, a: vm.save(a, "a.safetensors", {"classes": 3}), "metadata are strings, which 'classes' is not"),
    (lambda m, a: vm.load(m, "."), "no adapter file .; that is a folder"),
    (lambda m, a: vm.load("a.safetensors", m), "a str is no module"),
]


@pytest.mark.parametrize(("mistake", "says"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes(mistake: Callable[[nn.Module, vm.Adapter], object], says: str) -> None:
    base = model()
    adapter = adapt(base, "gate.q", "a")
    with pytest.raises(vm.InputError, match=says):
        mistake(base, adapter)


def test_the_example_for_an_unknown_model_runs() -> None:
    with pytest.raises(vm.InputError, match="Sequential is of no known family") as error:
        vm.adapt(model(), vm.LoRA())
    example = str(error.value).partition("e.g. ")[2]
    made = eval(example, {"vm": vm, "model": model(), "Block": Block})
    assert list(made.modules) == ["lora/0.query", "lora/1.query"]


def test_a_setting_that_no_adapter_has_is_an_error() -> None:
    adapter = adapt(model(), "gate.q")
    with pytest.raises(AttributeError):
        adapter.enable = False  # type: ignore[attr-defined]
    adapter.detach()
    assert repr(adapter) == "Adapter('default', detached)"


def test_a_list_of_sites_is_as_good_as_a_tuple_and_prints_as_a_table() -> None:
    assert vm.LoRA(sites=["attn.q", "attn.v"]) == vm.LoRA()  # type: ignore[arg-type]
    assert repr(vm.sites({"a": model()}, SITES)).splitlines()[2].split()[:3] == ["gate.q", "a.0.query", "8x8"]
    assert repr(Listing(["family"], [["timm"]])).startswith("family")
