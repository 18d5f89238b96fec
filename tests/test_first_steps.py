"""What somebody does in the first half hour: compile, save, unfreeze, print, and mistype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import vismodal as vm
from vismodal.data.pictures import cropped


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
