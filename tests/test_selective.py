"""Presets of Tune, and masks of single entries against their criteria written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, close, fixed, shake

import vismodal as vm

VIT = BY_NAME["timm-vit_tiny_patch16_224"]
UNET = BY_NAME["diffusers-SD1.5"]
IMAGES, LABELS = fixed(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1])


# -- presets of Tune ---------------------------------------------------------------------------------------------------


def test_counts_on_vit_base() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert vm.adapt(model, vm.BitFit(), name="bias").num_parameters == 102_912
    assert vm.adapt(model, vm.NormTuning(), name="norm").num_parameters == 38_400
    assert vm.adapt(model, vm.LinearProbe(), name="probe").num_parameters == 769 * 1000
    per_row = vm.adapt(model, vm.SparseMask(criterion="magnitude", per="row", density=1e-6), name="row")
    assert per_row.num_parameters == 12 * (3 * 768 + 768 + 3072 + 768)  # one entry for each neuron
    whole = vm.adapt(model, vm.SparseMask(criterion="magnitude"), name="model")
    assert abs(whole.num_parameters - 0.005 * 12 * 12 * 768 * 768) < 72  # by site, as long as none are chosen


@pytest.mark.parametrize(
    ("preset", "kinds"),
    [(vm.BitFit(), ("bias",)), (vm.NormTuning(), ("norm",)), (vm.LinearProbe(), ("head",))],
    ids=["BitFit", "NormTuning", "LinearProbe"],
)
def test_presets_are_tune_on_their_kinds(preset: vm.Tune, kinds: tuple[str, ...]) -> None:
    model = VIT.model()
    mine = vm.adapt(model, preset, name="mine").modules
    theirs = vm.adapt(model, vm.Tune(sites=kinds), name="theirs").modules
    assert [k.partition("/")[2] for k in mine] == [k.partition("/")[2] for k in theirs]


def test_bitfit_trains_biases_alone_and_those_of_keys_get_none() -> None:
    model = VIT.model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = vm.adapt(model, vm.BitFit())
    F.cross_entropy(model(IMAGES), LABELS).backward()
    for key, module in adapter.modules.items():
        if key.endswith("qkv.bias"):
            q, k, _ = module.value.grad.split(24)
            assert k.abs().max() < 1e-5 * q.abs().max()  # softmax does not see what all keys share
    shake(adapter)
    adapter.merge()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.endswith(".bias") and not k.startswith("head.")}


def test_cross_attention_trains_keys_and_values_of_the_text_alone() -> None:
    model = UNET.model()
    adapter = vm.adapt(model, vm.CrossAttention())
    names = {key.partition("/")[2] for key in adapter.modules}
    blocks = [n for n, m in model.named_modules() if n.endswith("attn2")]
    assert names == {f"{block}.to_{x}" for block in blocks for x in "kv"}
    UNET.run(model).square().mean().backward()
    assert adapter.unused() == []


def test_presets_refuse_other_kinds() -> None:
    model = VIT.model()
    for preset, says in (
        (vm.BitFit(sites=("norm",)), r"BitFit tunes bias, and blocks\.0\.norm1 is norm; use Tune for any choice"),
        (vm.NormTuning(sites=("attn.q",)), r"NormTuning tunes norm, and .*:q is attn\.q"),
        (vm.CrossAttention(), r"no site of kind 'xattn\.k'"),
    ):
        with pytest.raises(vm.InputError, match=says):
            vm.adapt(model, preset)


# -- masks -------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


TABLE = {Net: (vm.Weight("up", "up.weight"), vm.Weight("down", "down.weight"))}
BATCHES = [(fixed(4, 5) + i, torch.tensor([0, 1, 2, 0])) for i in range(3)]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def chosen(adapter: vm.Adapter) -> list[list[int]]:
    return [m.index.tolist() for m in adapter.modules.values()]


def gradients() -> list[list[Tensor]]:
    """Of both weights, for each batch."""
    model = net()
    weights = [model.up.weight, model.down.weight]
    return [list(torch.autograd.grad(F.cross_entropy(model(x), y), weights)) for x, y in BATCHES]


def fisher() -> list[Tensor]:
    return [sum((g[i] ** 2 for g in gradients()), torch.zeros(())) for i in (0, 1)]


def gradient() -> list[Tensor]:
    return [sum((g[i] for g in gradients()), torch.zeros(())).abs() for i in (0, 1)]


def magnitude() -> list[Tensor]:
    model = net()
    return [-model.up.weight.detach().abs(), -model.down.weight.detach().abs()]


def best(scores: list[Tensor], per: str, density: float) -> list[list[int]]:
    """The places of the highest scores, by sorting."""
    if per == "model":
        pairs = sorted(
            ((float(v), i, j) for i, s in enumerate(scores) for j, v in enumerate(s.flatten())), reverse=True
        )
        kept = pairs[: round(density * len(pairs))]
        return [sorted(j for _, i, j in kept if i == which) for which in (0, 1)]
    found = []
    for s in scores:
        rows = s if per == "row" else s.reshape(1, -1)
        count = max(1, round(density * rows.shape[1]))
        order = [sorted(range(len(r)), key=lambda j, r=r: float(r[j]), reverse=True)[:count] for r in rows]
        found.append(sorted(i * rows.shape[1] + j for i, row in enumerate(order) for j in row))
    return found


@pytest.mark.parametrize("per", ["model", "site", "row"])
@pytest.mark.parametrize("score", [fisher, gradient, magnitude])
def test_a_mask_takes_the_entries_of_the_highest_score(score: Callable[[], list[Tensor]], per: str) -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    name = score.__name__
    method = vm.SparseMask(sites=("up", "down"), density=0.2, criterion=name, per=per)  # type: ignore[arg-type]
    adapter = vm.adapt(model, method, sites=TABLE)
    with adapter.calibrating():
        for x, y in BATCHES if name != "magnitude" else ():
            F.cross_entropy(model(x), y).backward()
    assert chosen(adapter) == best(score(), per, 0.2)
    assert adapter.num_parameters == sum(map(len, chosen(adapter)))
    assert not any(m.value.any() or m.value.grad is not None for m in adapter.modules.values())
    x, y = BATCHES[0]
    assert torch.equal(model(x), net()(x))
    shake(adapter, 0.3)
    twin = net()
    with torch.no_grad():
        for layer, module in zip((twin.up, twin.down), adapter.modules.values(), strict=True):
            for j, v in zip(module.index.tolist(), module.value, strict=True):
                layer.weight[j // layer.in_features, j % layer.in_features] += v
    assert close(model(x), twin(x), 1e-6)
    F.cross_entropy(model(x), y).backward()
    dense = torch.autograd.grad(F.cross_entropy(twin(x), y), [twin.up.weight, twin.down.weight])
    for g, module in zip(dense, adapter.modules.values(), strict=True):
        assert close(module.value.grad, g.flatten()[module.index.long()], 1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for n, p in model.named_parameters() if n in before)


def calibrated(model: nn.Module, method: vm.SparseMask | None = None, name: str = "default") -> vm.Adapter:
    adapter = vm.adapt(model, method or vm.SparseMask(density=0.01), name=name)
    with adapter.calibrating():
        for i in range(3):
            F.cross_entropy(model(IMAGES[2 * i : 2 * i + 2]), LABELS[2 * i : 2 * i + 2]).backward()
    return adapter


def test_a_mask_over_the_model_is_saved_as_indices_and_values(tmp_path: Path) -> None:
    model = VIT.model()
    adapter = calibrated(model)
    counts = {k: len(m.value) for k, m in adapter.modules.items()}
    total = sum(m.shape.numel() for m in adapter.modules.values())
    assert sum(counts.values()) == round(0.01 * total)
    assert len(set(counts.values())) > 3  # each weight has its own number
    shake(adapter, 0.3)
    y = VIT.run(model)
    path = vm.save(adapter, tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {k.rpartition(".")[2]: t.dtype for k, t in tensors.items()} == {"index": torch.int32, "value": torch.float32}
    loaded = vm.load(VIT.model(), path, name="b", trainable=True)
    assert {k: len(m.value) for k, m in loaded.modules.items()} == counts
    (fresh,) = loaded.models.values()
    assert close(VIT.run(fresh), y, 1e-6)
    VIT.run(fresh).square().mean().backward()
    assert loaded.unused() == []
    frozen = vm.load(VIT.model(), path)
    assert not any(p.requires_grad for p in frozen.parameters())
    adapter.detach()
    again = vm.adapt(model, vm.SparseMask(density=0.01))
    again.load_state_dict(tensors)
    again.merge()
    assert close(VIT.run(model), y, 1e-5)
    again.load_state_dict({k: torch.zeros_like(t) if k.endswith("value") else t for k, t in tensors.items()})
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], VIT.model().blocks[0].attn.qkv.weight)


def test_a_weight_that_gets_no_entry_is_not_dead() -> None:
    model = net()
    with torch.no_grad():
        model.down.weight.mul_(100)
    method = vm.SparseMask(sites=("up", "down"), density=0.1, criterion="magnitude")
    adapter = vm.adapt(model, method, sites=TABLE)
    assert [len(m.value) for m in adapter.modules.values()] == [6, 0]
    model(fixed(2, 5)).sum().backward()
    assert adapter.unused() == []


def test_loading_into_a_mask_of_the_same_sizes_keeps_the_parameters_that_an_optimiser_holds() -> None:
    method = vm.SparseMask(density=0.02, per="row")
    first, model = calibrated(VIT.model(), method), VIT.model()
    shake(first, 0.2)
    adapter = vm.adapt(model, method)
    parameters = list(adapter.parameters())
    adapter.load_state_dict(first.state_dict())
    assert all(a is b for a, b in zip(parameters, adapter.parameters(), strict=True))
    assert close(VIT.run(model), VIT.run(next(iter(first.models.values()))), 1e-6)


def test_masks_beside_other_methods_and_over_biases() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, [vm.SparseMask(sites=("bias", "attn.q"), per="site", density=0.1), vm.LinearProbe()])
    with adapter.calibrating():
        F.cross_entropy(model(IMAGES), LABELS).backward()
    assert len(adapter.modules["sparsemask/blocks.0.mlp.fc1.bias"].index) == 10
    assert model.head.weight.grad is None
    F.cross_entropy(model(IMAGES), LABELS).backward()
    assert adapter.unused() == []


def test_a_mask_says_what_is_missing() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.SparseMask())
    with pytest.raises(
        RuntimeError, match=r"no entries are chosen yet; run batches in `with adapter\.calibrating\(\):`"
    ):
        model(IMAGES)
    says = r"no gradient reached blocks\.0.* while calibrating; run a backward"
    with pytest.raises(vm.InputError, match=says), adapter.calibrating():
        model(IMAGES)
    with pytest.raises(ZeroDivisionError), adapter.calibrating():
        raise ZeroDivisionError
    assert all(m.probe is None and m.score is None and not m.chosen for m in adapter.modules.values())
    for make, says in (
        (lambda: vm.SparseMask(density=0), r"density must be above 0 and at most 1, not 0"),
        (lambda: vm.SparseMask(criterion="random"), "criterion is one of fisher, gradient, magnitude, not 'random'"),  # type: ignore[arg-type]
        (lambda: vm.SparseMask(per="block"), "per is one of model, site, row, not 'block'"),  # type: ignore[arg-type]
        (lambda: vm.adapt(VIT.model(), vm.SparseMask(sites=("mlp",))), r"SparseMask needs floating-point parameters"),
    ):
        with pytest.raises(vm.InputError, match=says):
            make()


def test_calibration_is_exact_under_checkpointing_and_leaves_copies_alone() -> None:
    masks = []
    for on in (False, True):
        model = VIT.model().train()
        model.set_grad_checkpointing(on)
        masks.append(chosen(calibrated(model)))
        copy.deepcopy(model)
    assert masks[0] == masks[1]
