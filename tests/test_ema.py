"""Averages of an adapter's parameters: the formula by hand, exact resume, and values that come back to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

import vismodal as vm
from vismodal.callbacks import Callback
from vismodal.draw import shuffled
from vismodal.ema import Ema, wearing
from vismodal.errors import InputError
from vismodal.resume import Checkpoints, adapter_of
from vismodal.train import Micro, Plan, fit

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tiny() -> tuple[VisionTransformer, vm.Adapter]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    return model.train(), vm.adapt(model, [vm.LoRA(rank=2, freeze_down=True), vm.Tune(sites=("head",))], seed=0)


def learn(steps: int, folder: Path | None = None, decay: float = 0.6, seen: list[dict[str, Tensor]] | None = None):
    """`fit` with an average; `seen` gets the parameters after each update."""
    model, adapter = tiny()
    ema = Ema(adapter, decay)

    def loss(micro: Micro) -> dict[str, Tensor]:
        if seen is not None:
            seen.append({name: p.detach().clone() for name, p in adapter.named_parameters()})
        rows = [shuffled(micro.seed, "x", 6, place) for place in micro.positions(2)]
        return {"loss": F.cross_entropy(model(X[rows]), torch.tensor(rows) % 3)}

    optimizer = torch.optim.AdamW(adapter.groups(3e-2))
    checkpoints = Checkpoints(folder) if folder else None
    fit(loss, adapter, optimizer, plan=Plan(steps), checkpoints=checkpoints, ema=ema)
    if seen is not None:
        seen.append({name: p.detach().clone() for name, p in adapter.named_parameters()})
    return model, adapter, ema


def test_a_stop_while_the_averages_are_worn_saves_the_adapters_own_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes in the middle of putting them on, and again of taking them off."""
    model, adapter = tiny()
    ema = Ema(adapter, 0.6)
    load, own = adapter.load_state_dict, {}

    def halfway(state: dict[str, Tensor]) -> None:
        half = dict(list(state.items())[: len(state) // 2])
        load(adapter.state_dict() | half)
        if len(calls) < 2:
            calls.append(half)
            raise KeyboardInterrupt
        load(state)

    def sample(step: int) -> None:
        raise AssertionError("not reached")

    class Stop(Callback):
        def after(self, step: int, metrics: object) -> None:
            own.update({name: tensor.clone() for name, tensor in adapter.state_dict().items()})
            monkeypatch.setattr(vm.Adapter, "load_state_dict", lambda _, state: halfway(state))
            wearing(ema, sample)(step)

    def loss(micro: Micro) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(model(X[:2]), torch.tensor([0, 1]))}

    calls: list[dict[str, Tensor]] = []
    optimizer, checkpoints = torch.optim.AdamW(adapter.groups(3e-2)), Checkpoints(tmp_path)
    outcome = fit(loss, adapter, optimizer, plan=Plan(3), checkpoints=checkpoints, ema=ema, callbacks=[Stop()])
    assert outcome.stopped and outcome.step == 1 and len(calls) == 2
    saved = load_file(checkpoints.path(1))
    assert all(torch.equal(tensor, saved[f"adapter.{name}"]) for name, tensor in own.items())
    assert any(not torch.equal(tensor, saved[f"ema.{name}"]) for name, tensor in own.items() if f"ema.{name}" in saved)


def test_the_average_by_hand() -> None:
    """d is (1 + n) / (10 + n), which is 2/11 after the first update, until it would pass 0.6 at n = 13."""
    seen: list[dict[str, Tensor]] = []
    _, _, ema = learn(14, seen=seen)
    for name, given in ema.averages.items():
        average = seen[0][name].double()
        for n, after in enumerate(seen[1:], start=1):
            d = min(0.6, (1 + n) / (10 + n))
            average = d * average + (1 - d) * after[name].double()
        torch.testing.assert_close(given.double(), average, rtol=0, atol=2e-7)
        if name.endswith(".A"):  # frozen: an average of one value is that value
            assert torch.equal(given, seen[0][name])
        else:
            assert not torch.equal(given, seen[-1][name])


def test_a_resume_is_exact_and_the_checkpoint_holds_both(tmp_path: Path) -> None:
    _, adapter, ema = learn(5, tmp_path / "whole")
    learn(2, tmp_path / "cut")
    _, again, after = learn(5, tmp_path / "cut")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in adapter.state_dict().items())
    assert all(torch.equal(t, after.averages[name]) for name, t in ema.averages.items())
    drawn = adapter_of(tmp_path / "whole" / "step-0000005.safetensors")  # as `vismodal generate` reads it
    assert drawn is not None and drawn.keys() == adapter.state_dict().keys()
    with ema.worn():
        assert all(torch.equal(t, drawn[name]) for name, t in adapter.state_dict().items())
    with pytest.raises(InputError, match="holds no averages: it was made without ema"):
        _, other = tiny()
        optimizer = torch.optim.AdamW(other.groups(3e-2))
        plain = Checkpoints(tmp_path / "plain")
        plain.save(1, other, optimizer)
        plain.restore(other, optimizer, Ema(other, 0.9))


def test_worn_and_taken_off_to_the_bit(tmp_path: Path) -> None:
    model, adapter, ema = learn(4)
    model.eval()
    with torch.no_grad():
        own = model(X)
        with ema.worn():
            smooth = model(X)
            vm.save(adapter, tmp_path / "a.safetensors")
        assert torch.equal(model(X), own) and not torch.equal(smooth, own)
        assert torch.equal(wearing(None, model)(X), own) and torch.equal(wearing(ema, model)(X), smooth)
        fresh, _ = tiny()
        vm.use(fresh)
        vm.load(fresh, tmp_path / "a.safetensors", "found")
        assert torch.equal(fresh.eval()(X), smooth)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_a_decay_that_makes_no_sense(decay: float) -> None:
    with pytest.raises(InputError, match="ema must be more than 0 and less than 1, not"):
        Ema(tiny()[1], decay)
