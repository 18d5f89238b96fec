"""The invariants of the design, for every method on every family that it claims."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import (
    BY_NAME,
    CASES,
    CLASSIFIERS,
    EVERYWHERE,
    METHODS,
    Case,
    adapt,
    claims,
    close,
    condition,
    left_out,
    pairs,
    shake,
)

import vismodal as vm
from vismodal.methods import METHODS as registry
from vismodal.methods import Method

NO_CHECKPOINTING = {"open_clip-own-attention": "open_clip 3.3 hands its own blocks too many arguments"}
every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
every_other = pytest.mark.parametrize("name", [n for n in METHODS if n not in EVERYWHERE])
every_method = pytest.mark.parametrize(("case", "name"), [pytest.param(c, n, id=f"{n}-{c.name}") for c, n in pairs()])


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def base(case: Case) -> tuple[nn.Module, Tensor]:
    """A model and its frozen output in grad mode, as adapters see it."""
    model = case.model().requires_grad_(False)
    return model, case.run(model)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def starts_at_base(adapter: vm.Adapter) -> bool:
    return all(m.starts_at_base for m in adapter.methods.values())


def mergeable(adapter: vm.Adapter) -> bool:
    return all(m.mergeable for m in adapter.methods.values())


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in before)


@every_method
def test_output_at_init_and_off_and_scales(case: Case, name: str) -> None:
    model, y0 = base(case)
    adapter = adapt(model, name)
    # nn.MultiheadAttention leaves its fused inference path as soon as a weight wants a gradient
    assert close(case.run(model), y0, 2e-6) == starts_at_base(adapter)
    shake(adapter)
    full = case.run(model)
    assert not close(full, y0, 1e-4)
    with adapter.disabled():
        assert torch.equal(case.run(model), y0)
    adapter.scale = 0
    assert torch.equal(case.run(model), y0)
    if all(m.interpolates for m in adapter.methods.values()):
        adapter.scale = 0.5
        half = case.run(model)
        assert not close(half, full, 1e-5)
        assert not close(half, y0, 1e-5)
    adapter.scale = 1
    assert torch.equal(case.run(model), full)


def begins(module: nn.Module) -> bool:
    """Whether one of its matrices that are zero, if any are, has a gradient: they are no two factors of one product."""
    common = module.__dict__["shared"].parameters() if "shared" in module.__dict__ else ()
    matrices = [p for p in (*module.parameters(), *common) if p.requires_grad and p.dim() > 1]
    zero = [p for p in matrices if p.numel() and not p.any()]
    return not zero or any(p.grad is not None and bool(p.grad.any()) for p in zero)


@every_method
def test_every_tensor_gets_gradient_and_no_site_is_dead(case: Case, name: str) -> None:
    model, _ = base(case)
    adapter = adapt(model, name)
    assert set(adapter.unused()) == set(adapter.modules)  # nothing has run yet
    case.run(model).square().mean().backward()
    assert adapter.unused() == []  # at the start neither
    assert [key for key, module in adapter.modules.items() if not begins(module)] == []
    for p in adapter.parameters():
        p.grad = None
    shake(adapter)
    case.run(model).square().mean().backward()
    assert adapter.unused() == []
    flat = [n for n, p in adapter.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert [n for n in flat if not any(fnmatchcase(n, glob) for glob in METHODS[name].idle)] == []


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_leaves_the_base_as_it_was(case: Case, name: str, dtype: torch.dtype) -> None:
    model = case.model().to(dtype).train()
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    adapter = adapt(model, name)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        case.run(model).float().square().mean().backward()
        optimizer.step()
    if mergeable(adapter):
        adapter.merge()
        adapter.unmerge()
    assert same(model, before)
    adapter.detach()
    assert same(model, before)
    assert [type(m) for m in model.modules()] == classes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@every_method
def test_merged_equals_live_and_unmerging_is_exact(case: Case, name: str) -> None:
    model, _ = base(case)
    before = snapshot(model)
    adapter = adapt(model, name)
    shake(adapter)
    live = case.run(model)
    if not mergeable(adapter):
        with pytest.raises(vm.InputError, match="cannot merge"):
            adapter.merge()
        assert torch.equal(case.run(model), live)
        return
    adapter.merge()
    assert close(case.run(model), live)
    assert not same(model, before)
    adapter.scale = 0.25
    adapter.scale = 1
    with adapter.disabled():
        assert same(model, before)
    adapter.unmerge()
    assert same(model, before)
    assert torch.equal(case.run(model), live)
    adapter.detach(keep=True)
    assert close(case.run(model.requires_grad_(False)), live)


@every_method
def test_save_and_load_under_another_name(case: Case, name: str, tmp_path: Path) -> None:
    model, y0 = base(case)
    adapter = adapt(model, name, name="one")
    shake(adapter)
    y = case.run(model)
    vm.save(adapter, tmp_path / "a.safetensors")
    adapter.detach()
    assert torch.equal(case.run(model.requires_grad_(False)), y0)
    other = condition(vm.load(model, tmp_path / "a.safetensors", name="two"), name)
    assert not any(p.requires_grad for p in model.parameters())
    assert close(case.run(model), y, 2e-6)
    assert other.methods == adapter_methods(tmp_path / "a.safetensors")


def adapter_methods(path: Path) -> dict[str, object]:
    import json

    from vismodal.checkpoint import from_json, read

    header, _ = read(path)
    return {slot: from_json(config) for slot, config in json.loads(header["methods"]).items()}


@every_method
def test_copies_are_independent(case: Case, name: str) -> None:
    model, y0 = base(case)
    adapter = adapt(model, name, name="a")
    shake(adapter)
    y = case.run(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert torch.equal(case.run(other), y)
        vm.use(other)
        assert torch.equal(case.run(other), y0)
        if mergeable(adapter):
            vm.attached(other)["a"].merge()
        vm.use(other, "a")
        assert close(case.run(other), y)
        vm.attached(other)["a"].detach()
        assert torch.equal(case.run(other.requires_grad_(False)), y0)
    assert torch.equal(case.run(model), y)


@every_method
def test_gradient_checkpointing_is_equal(case: Case, name: str) -> None:
    gradients = []
    for on in (False, True):
        model = case.model().train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        if on:
            if case.name in NO_CHECKPOINTING:
                pytest.skip(NO_CHECKPOINTING[case.name])
            case.checkpoint(model)  # type: ignore[misc]
        adapter = adapt(model, name, seed=0)
        shake(adapter)
        case.run(model).square().mean().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or close(b, a, 1e-5)


COMPILED = (  # tracing takes long: one of each port and library
    "timm-vit_tiny_patch16_224", "timm-swinv2_tiny_window8_256", "timm-resnet18", "open_clip-CLIP",
    "open_clip-own-attention", "transformers-ViT", "transformers-SigLIP", "diffusers-SD1.5",
    "diffusers-SD3.5", "diffusers-Flux", "diffusers-PixArt",
)  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole_and_switched(name: str) -> None:
    case = BY_NAME[name]
    model, y0 = base(case)
    adapter = vm.adapt(model, [METHODS[n].make(model) for n in ("LoRA", "Tune")], name="a")
    shake(adapter)
    y = case.run(model)
    torch._dynamo.reset()
    compiled = torch.compile(case.run, backend="eager", fullgraph=True)
    assert close(compiled(model), y, 2e-6)
    vm.use(model)
    assert close(compiled(model), y0, 2e-6)


@every_other
def test_every_method_compiles_whole(name: str) -> None:
    case = next(c for c, _ in pairs([name]))
    model, y0 = base(case)
    shake(adapt(model, name, name="a"))
    y = case.run(model)
    torch._dynamo.reset()
    compiled = torch.compile(case.run, backend="eager", fullgraph=True)
    assert close(compiled(model), y, 2e-6)
    vm.use(model)
    assert close(compiled(model), y0, 2e-6)


@every_method
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch of RMSNorm, in Flux by itself too
def test_autocast(case: Case, name: str) -> None:
    model, _ = base(case)
    adapter = adapt(model, name)
    shake(adapter)
    y = case.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = case.run(model)
    low.float().square().mean().backward()
    assert adapter.unused() == []
    assert close(low.float(), y, 0.2)


@every
def test_two_adapters_in_any_order(case: Case) -> None:
    model, y0 = base(case)
    a = adapt(model, "LoRA", name="a")
    shake(a)
    only_a = case.run(model)
    vm.use(model)
    b = adapt(model, "Tune", name="b")
    shake(b)
    only_b = case.run(model)
    vm.use(model, "a", "b")
    both = case.run(model)
    vm.use(model, "a")
    assert close(case.run(model), only_a, 2e-6)
    vm.use(model, "b")
    assert close(case.run(model), only_b, 2e-6)
    vm.use(model, "b", "a")
    a.merge()
    b.merge()
    assert close(case.run(model), both)
    a.detach()
    assert close(case.run(model), only_b)
    b.detach()
    assert torch.equal(case.run(model.requires_grad_(False)), y0)


@every_other
def test_every_method_beside_another(name: str) -> None:
    """Switched and detached in any order, on the first model that it claims."""
    case = next(c for c, _ in pairs([name]))
    model, y0 = base(case)
    a = adapt(model, "LoRA", name="a")
    shake(a)
    only_a = case.run(model)
    vm.use(model)
    b = adapt(model, name, name="b")
    shake(b)
    only_b = case.run(model)
    for order in (("a", "b"), ("b", "a")):
        vm.use(model, *order)
        both = case.run(model)
        assert not close(both, y0, 1e-4)
        a.merge()
        if mergeable(b):
            b.merge()
            assert close(case.run(model), both)
            b.unmerge()
        a.unmerge()
        assert torch.equal(case.run(model), both)
    for use, want in (("a", only_a), ("b", only_b)):
        vm.use(model, use)
        assert close(case.run(model), want, 2e-6)
    a.detach()
    assert close(case.run(model), only_b, 2e-6)
    b.detach()
    assert torch.equal(case.run(model.requires_grad_(False)), y0)


def light(name: str) -> list[Case]:
    """Every model for LoRA, one for each of the others."""
    return CASES if name == "LoRA" else [next(c for c, _ in pairs([name]))]


@pytest.mark.parametrize(("case", "name"), [pytest.param(c, n, id=f"{n}-{c.name}") for n in METHODS for c in light(n)])
def test_reinitialising_the_base_does_not_reach_the_adapter(case: Case, name: str) -> None:
    model, _ = base(case)
    adapter = adapt(model, name)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}

    def wipe(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            nn.init.constant_(p, 0.5)

    state = snapshot(model)
    model.apply(wipe)
    if hasattr(model, "init_weights"):
        model.init_weights()
    model.load_state_dict(state)  # strict, with the adapter in place
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())


# -- claims --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "name"), [pytest.param(c, n, id=f"{n}-{c.name}") for c, n in left_out()])
def test_what_is_claimed_beside_the_matrix(case: Case, name: str) -> None:
    model, y0 = base(case)
    adapter = adapt(model, name, seed=0)
    shake(adapter)
    y = case.run(model)
    assert not close(y, y0, 1e-4)
    y.square().mean().backward()
    assert adapter.unused() == []
    with adapter.disabled():
        assert torch.equal(case.run(model), y0)


def trials() -> dict[type[Method], list[str]]:
    """The lines of the matrix by the class of their method."""
    found: dict[type[Method], list[str]] = {}
    for name, trial in METHODS.items():
        found.setdefault(type(trial.make(pairs([name])[0][0].build())), []).append(name)
    return found


def test_the_catalogue_names_the_families_that_the_matrix_tries() -> None:
    tried = trials()
    table = vm.methods()
    assert [row[0] for row in table.rows] == [m.__name__ for m in registry]
    for method, row in zip(registry, table.rows, strict=True):
        cells = dict(zip(table.head, row, strict=True))
        families = {case.name.partition("-")[0] for case, _ in pairs(tried[method])}
        # what needs nothing of a classifier is tried on what the classifier holds
        families = families - {"classifier"} or {"vismodal"}
        assert set(cells["families"].split(", ")) == families, method.__name__
        assert cells["merges"] == ("yes" if method.mergeable else "no")


@every
def test_a_model_is_claimed_where_a_method_takes_it(case: Case) -> None:
    model = case.build()
    sites = vm.sites(model)
    held = vm.sites(model.model) if case in CLASSIFIERS else ()
    for method, names in trials().items():
        if not (held and names[0] in EVERYWHERE):
            takes = bool(method.takes(sites)) and not method.takes(held)
            assert any(claims(name, case) for name in names) == takes, (method.__name__, method.takes(sites))


ELSEWHERE = [
    ("transformers-ViT", vm.NOAH(), r"no site of kind 'attn\.qkv'.*; NOAH goes here with sites=\('block', 'attn\.q', "),
    ("diffusers-SD1.5", vm.SSF(), r"no site of kind 'embed'.*; SSF goes here with sites=\('conv', 'norm', "),
    ("diffusers-SD1.5", vm.ResTuningBypass(), r"'features'.*; ResTuningBypass goes here with sites=\('decoder',\)$"),
    ("timm-resnet18", vm.LoRA(), r"no site of kind 'attn\.q'.*; LoRA goes here with sites=\('conv',\)$"),
    ("diffusers-SD1.5", vm.LinearProbe(), r"no head is known .*weight'\),\)}$"),
    ("transformers-ViT", vm.NOAH(sites=("attn.qkv",)), r"no site of kind 'attn\.qkv'.*did you mean '.*'\?$"),
]


@pytest.mark.parametrize(("name", "method", "message"), ELSEWHERE, ids=lambda p: str(p)[:30])
def test_an_error_names_the_sites_that_a_method_takes_instead(name: str, method: Method, message: str) -> None:
    with pytest.raises(vm.InputError, match=message):
        vm.adapt(BY_NAME[name].model(), method)
