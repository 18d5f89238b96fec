"""Optimisers by name: what their packages are given, how their state is kept, and what is said where they are missing.

Stand-ins take down what the packages are called with, and keep state in ways of their own; prodigyopt runs for real."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_ema import tiny
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.optimizers import OptimizerName, optimizer_for
from vismodal.resume import Checkpoints
from vismodal.train import Plan, fit


class StandIn(torch.optim.SGD):
    """Signed momentum in eight bits, kept in a dict within the state, as bitsandbytes keeps its own for FSDP."""

    def __init__(self, params: Any, **given: Any) -> None:
        self.given, self.table = given, torch.linspace(-1, 1, 256)  # which all parameters share
        super().__init__(params, lr=given.get("lr", 0.1))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    empty = {"q": torch.zeros_like(p, dtype=torch.uint8), "n": 0, "table": self.table}
                    held = self.state[p].setdefault("quant", empty)
                    held["q"] = held["q"] + (p.grad > 0).to(torch.uint8)
                    held["n"] += 1
                    p.sub_(group["lr"] * 0.01 * (held["q"] - held["n"] / 2))


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    eight, prodigy = ModuleType("bitsandbytes"), ModuleType("prodigyopt")
    eight.optim = SimpleNamespace(AdamW8bit=StandIn)  # type: ignore[attr-defined]
    prodigy.Prodigy = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", eight)
    monkeypatch.setitem(sys.modules, "prodigyopt", prodigy)


def test_what_each_is_given(packages: None) -> None:
    _, adapter = tiny()
    groups = adapter.groups(1e-3, 0.02)
    plain = optimizer_for("adamw", groups)
    assert type(plain) is torch.optim.AdamW
    eight, prodigy = optimizer_for("adamw8bit", groups), optimizer_for("prodigy", groups)
    assert isinstance(eight, StandIn) and eight.given == {}
    assert isinstance(prodigy, StandIn)
    assert prodigy.given == {"lr": 1e-3, "use_bias_correction": True, "safeguard_warmup": True}
    for made in (plain, eight, prodigy):
        told = [(g["lr"], g["weight_decay"], len(g["params"])) for g in made.param_groups]
        assert told == [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] and len(told) > 1
    with pytest.raises(InputError, match=r"one step size for all, but is given the learning rates \[0.1, 1.0\]"):
        optimizer_for("prodigy", [{"params": groups[0]["params"], "lr": 1.0}, {"params": [], "lr": 0.1}])


@pytest.mark.parametrize(("name", "package", "extra"), [
    ("adamw8bit", "bitsandbytes", "8bit"), ("prodigy", "prodigyopt", "prodigy"),
])  # fmt: skip
def test_a_missing_package_is_told_with_what_to_write(
    name: OptimizerName, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there, where it is
    with pytest.raises(InputError, match=rf'needs the package {package}.*pip install "vismodal\[{extra}\]"'):
        optimizer_for(name, tiny()[1].groups(1.0))


def test_state_in_eight_bits_and_in_dicts_is_kept_exactly(packages: None, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def learn(steps: range, save: bool = False) -> dict[str, torch.Tensor]:
        model, adapter = tiny()
        optimizer = optimizer_for("adamw8bit", adapter.groups(0.1))
        Checkpoints(tmp_path).restore(adapter, optimizer)
        for step in steps:
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
            optimizer.step()
            if save:
                Checkpoints(tmp_path).save(step + 1, adapter, optimizer)
        return {name: t.clone() for name, t in adapter.state_dict().items()}

    whole = learn(range(4))
    learn(range(2), save=True)
    again = learn(range(2, 4))
    assert all(torch.equal(t, again[name]) for name, t in whole.items())


def test_prodigy_itself_resumes_exactly_and_leaves_alone_what_learns_no_more(tmp_path: Path) -> None:
    """Against prodigyopt by hand; of a group whose rate is zero its own step would go on moving the parameters."""
    prodigyopt = pytest.importorskip("prodigyopt")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def groups(adapter: Any) -> list[dict[str, Any]]:
        return [group | ({} if i else {"last": 2}) for i, group in enumerate(adapter.groups(1.0, 0.01))]

    def learn(steps: int, folder: Path) -> list[Any]:
        model, adapter = tiny()
        optimizer = optimizer_for("prodigy", groups(adapter))

        def loss(micro: Any) -> dict[str, torch.Tensor]:
            return {"loss": F.cross_entropy(model(x), torch.tensor([0, 1]))}

        fit(loss, adapter, optimizer, plan=Plan(steps, clip=0), checkpoints=Checkpoints(folder, every=1, keep=9))
        return [p for group in optimizer.param_groups for p in group["params"]]

    model, adapter = tiny()
    given = groups(adapter)
    by_hand = prodigyopt.Prodigy(
        [dict(group) for group in given], lr=1.0, use_bias_correction=True, safeguard_warmup=True
    )
    for step in range(5):
        by_hand.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        for p in given[0]["params"] if step >= 2 else ():
            p.grad = None
        by_hand.step()
    whole = learn(5, tmp_path / "whole")
    learn(3, tmp_path / "cut")
    expected = [p for group in given for p in group["params"]]
    for ours, again, theirs in zip(whole, learn(5, tmp_path / "cut"), expected, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(again, theirs)
    second, last = (load_file(tmp_path / f"whole/step-{n:07d}.safetensors") for n in (2, 5))
    moved = {name for name, t in last.items() if name.startswith("adapter.") and not torch.equal(t, second[name])}
    frozen = sum(p.numel() for p in given[0]["params"])
    assert moved and sum(last[name].numel() for name in moved) == sum(p.numel() for p in expected) - frozen
