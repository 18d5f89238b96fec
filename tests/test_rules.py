"""The rules that keep the core exact, each with the case that was seen to bite."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import timm
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from zoo import BY_NAME, CASES, close, fixed, lora, shake

import vismodal as vm
from vismodal.methods.base import Built, WeightModule
from vismodal.site import COMMON, Site

VIT = BY_NAME["timm-vit_tiny_patch16_224"]
MHA = BY_NAME["open_clip-CLIP"]


class Net(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


TABLE = {Net: (vm.Weight("w", "layer.weight"), vm.Weight("w.bias", "layer.bias"))}


# -- 1: precision -------------------------------------------------------------------------------------------------


def test_a_shadowed_bf16_weight_is_computed_in_fp32_and_rounded_once() -> None:
    model = MHA.model().bfloat16()
    adapter = vm.adapt(model, vm.LoRA(sites=("attn.qkv",), rank=3))
    shake(adapter)
    attn = model.visual.transformer.resblocks[0].attn
    seen: list[Tensor] = []
    attn.out_proj.register_forward_pre_hook(lambda *_: None)
    attn.register_forward_pre_hook(lambda m, args: seen.append(m.in_proj_weight.detach().clone()))
    MHA.run(model)
    module = adapter.modules["lora/visual.transformer.resblocks.0.attn.in_proj_weight"]
    want = (attn._parameters["in_proj_weight"].float() + module.B @ module.A).bfloat16()
    assert torch.equal(seen[0], want)


# -- 2: merging, tied and parametrised parameters ----------------------------------------------------------------


def test_merging_several_in_any_order_always_starts_from_the_pristine_rows() -> None:
    model = VIT.model().bfloat16()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole = vm.adapt(model, vm.LoRA(sites=("attn.qkv",)), name="whole")
    part = vm.adapt(model, vm.LoRA(sites=("attn.q", "mlp.up")), name="part")
    tune = vm.adapt(model, vm.Tune(sites=("bias",)), name="tune")
    for adapter in (whole, part, tune):
        shake(adapter)
    for adapter in (whole, part, tune):
        adapter.merge()
    together = {k: v.clone() for k, v in model.state_dict().items()}
    whole.unmerge()
    part.scale = 0.5
    tune.enabled = False
    whole.merge()
    part.scale = 1
    tune.enabled = True
    assert all(torch.equal(v, together[k]) for k, v in model.state_dict().items())
    for adapter in (whole, tune, part):
        adapter.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_detach_keep_bakes_one_adapter_and_leaves_the_other_removable() -> None:
    model, twin = VIT.model(), VIT.model()
    a = vm.adapt(model, vm.LoRA(sites=("attn.q",)), name="a", seed=1)
    b = vm.adapt(model, vm.LoRA(sites=("attn.qkv",)), name="b", seed=2)
    shake(a)
    shake(b)
    alone = vm.adapt(twin, vm.LoRA(sites=("attn.qkv",)), name="b", seed=2)
    shake(alone)
    alone.merge()
    a.merge()
    b.merge()
    b.detach(keep=True)
    assert a.merged
    a.detach()
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_parameter_in_two_places_is_one_target() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.out = nn.Linear(5, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.embed(x).tanh())

    torch.manual_seed(0)
    model = Tied()
    table = {Tied: (vm.Weight("embed.tokens", "embed.weight"), vm.Weight("out", "out.weight"))}
    adapter = vm.adapt(model, vm.LoRA(sites=("embed.tokens",), rank=2), sites=table)
    shake(adapter, 0.3)
    x = torch.arange(7)
    (module,) = adapter.modules.values()
    W = model.embed.weight + module.B @ module.A
    assert close(model(x), W[x].tanh() @ W.T, 1e-6)
    live = model(x)
    adapter.merge()
    assert close(model(x), live, 1e-6)
    assert model.out.weight is model.embed.weight


def test_a_parametrised_parameter_raises() -> None:
    net = Net(parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(vm.InputError, match=r"layer\.weight is computed from other parameters"):
        vm.adapt(net, vm.LoRA(sites=("w",)), sites=TABLE)


class Gain(WeightModule):
    """W' = 2 W, b' = b + 1: a bias also where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(4))

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return None if W is None else 2 * W, self.one if b is None else b + self.one


class Gained(vm.LoRA):
    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(Gain() for _ in sites))


def test_a_merge_that_cannot_be_whole_writes_nothing() -> None:
    net = Net(nn.Linear(4, 4, bias=False))
    before = net.layer.weight.clone()
    adapter = vm.adapt(net, Gained(sites=("w",)), sites=TABLE)
    x = fixed(2, 4)
    assert close(net(x), F.linear(x, 2 * before, torch.ones(4)), 1e-6)
    with pytest.raises(RuntimeError, match="the layer has no bias"):
        adapter.merge()
    assert not adapter.merged
    assert torch.equal(net.layer.weight, before)
    adapter.detach()
    assert torch.equal(net.layer.weight, before)


def test_loading_a_base_under_a_merged_adapter_is_refused() -> None:
    model = VIT.model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = vm.adapt(model, vm.LoRA())
    shake(adapter)
    adapter.merge()
    with pytest.raises(RuntimeError, match="hold the merged default: unmerge"):
        model.load_state_dict(state)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with pytest.raises(RuntimeError, match="unmerge"):
        copied.blocks[0].load_state_dict(model.blocks[0].state_dict())
    adapter.unmerge()
    model.load_state_dict(state)


def test_keeping_an_adapter_that_is_off_is_refused() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA())
    adapter.enabled = False
    with pytest.raises(vm.InputError, match=r"is off, so keep=True would bake nothing"):
        adapter.detach(keep=True)
    assert vm.attached(model)


def test_a_file_saved_beside_a_baked_adapter_still_loads(tmp_path: Path) -> None:
    model = VIT.model()
    baked, kept = (vm.adapt(model, vm.LoRA(), name=name) for name in ("baked", "kept"))
    shake(baked)
    baked.detach(keep=True)
    path = vm.save(kept, tmp_path / "kept.safetensors", {"base": "anything"})  # our own entries win
    kept.detach()
    vm.load(model, path)


# -- 3: checkpointing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [VIT, MHA], ids=["update", "shadow"])
def test_changing_adapters_before_a_recomputing_backward_raises(case: object) -> None:
    model = VIT.model() if case is VIT else MHA.model()
    case.checkpoint(model.train())  # type: ignore[attr-defined]
    adapter = vm.adapt(model, lora(model))
    loss = case.run(model).square().mean()  # type: ignore[attr-defined]
    adapter.scale = 0.5
    with pytest.raises(RuntimeError, match="adapters changed between forward and backward"):
        loss.backward()


def test_a_look_at_the_base_between_forward_and_backward_is_fine() -> None:
    model = VIT.model().train()
    VIT.checkpoint(model)  # type: ignore[misc]
    adapter = vm.adapt(model, vm.LoRA())
    shake(adapter)
    y = VIT.run(model)
    with adapter.disabled(), torch.no_grad():
        y0 = VIT.run(model)
    (y - y0).square().mean().backward()
    got = [p.grad.clone() for p in adapter.parameters()]
    model.set_grad_checkpointing(False)
    for p in adapter.parameters():
        p.grad = None
    (VIT.run(model) - y0).square().mean().backward()
    assert all(close(g, p.grad, 1e-5) for g, p in zip(got, adapter.parameters(), strict=True))


def test_reentrant_checkpointing_too() -> None:
    torch.manual_seed(0)
    net = Net(nn.Linear(4, 4))
    adapter = vm.adapt(net, vm.LoRA(sites=("w",), rank=2), sites=TABLE)
    x = fixed(3, 4).requires_grad_()
    checkpoint(net, x, use_reentrant=True).sum().backward()
    assert adapter.unused() == []


def test_a_state_seen_without_gradients_is_no_way_back() -> None:
    model = VIT.model().train()
    VIT.checkpoint(model)  # type: ignore[misc]
    adapter = vm.adapt(model, vm.LoRA())
    shake(adapter)
    adapter.scale = 0.5
    with torch.no_grad():
        VIT.run(model)
    adapter.scale = 1
    loss = VIT.run(model).mean()
    adapter.scale = 0.5
    with pytest.raises(RuntimeError, match="adapters changed"):
        loss.backward()


# -- 4: several models --------------------------------------------------------------------------------------------


def test_one_adapter_on_two_models_is_one_file(tmp_path: Path) -> None:
    unet, text = BY_NAME["diffusers-SD1.5"], BY_NAME["transformers-CLIPText"]
    models = {"unet": unet.model(), "text_encoder": text.model()}
    adapter = vm.adapt(models, vm.LoRA(sites=("attn.*", "xattn.*")), name="dog", seed=0)
    shake(adapter)
    assert {k.partition("/")[2].partition(".")[0] for k in adapter.modules} == {"unet", "text_encoder"}
    y = [unet.run(models["unet"]), text.run(models["text_encoder"])]
    vm.save(adapter, tmp_path / "dog.safetensors")
    fresh = {"unet": unet.model(), "text_encoder": text.model()}
    loaded = vm.load(fresh, tmp_path / "dog.safetensors")
    assert loaded.name == "dog"
    assert torch.equal(unet.run(fresh["unet"]), y[0])
    assert torch.equal(text.run(fresh["text_encoder"]), y[1])
    vm.use(fresh)
    assert not torch.equal(unet.run(fresh["unet"]), y[0])
    with pytest.raises(vm.InputError, match="'unet', 'text_encoder'"):
        vm.load(unet.model(), tmp_path / "dog.safetensors")


# -- 5: shadows ---------------------------------------------------------------------------------------------------


def test_a_second_thread_in_a_shadowed_model_raises() -> None:
    model = MHA.model().requires_grad_(False)
    shake(vm.adapt(model, vm.LoRA()))
    inside, go = threading.Event(), threading.Event()
    block = model.visual.transformer.resblocks[0]

    def wait(*_: object) -> None:
        inside.set()
        go.wait(10)

    handle = block.attn.register_forward_pre_hook(wait)
    outputs: list[Tensor] = []
    first = threading.Thread(target=lambda: outputs.append(MHA.run(model)))
    first.start()
    inside.wait(10)
    handle.remove()
    with pytest.raises(RuntimeError, match="two threads run this model"):
        MHA.run(model)
    go.set()
    first.join()
    assert torch.equal(outputs[0], MHA.run(model))  # the refused thread took nothing from the first


def test_a_shadow_left_by_an_interrupt_is_dropped() -> None:
    model = MHA.model()
    adapter = vm.adapt(model, vm.LoRA())
    shake(adapter)
    y = MHA.run(model)
    attn = model.visual.transformer.resblocks[0].attn

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = attn.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        MHA.run(model)
    handle.remove()
    assert torch.equal(MHA.run(model), y)


def test_an_exception_inside_leaves_no_shadow() -> None:
    model = MHA.model()
    adapter = vm.adapt(model, vm.LoRA())
    attn = model.visual.transformer.resblocks[0].attn
    with pytest.raises(AssertionError):
        attn(*[torch.zeros(1, 2, 7)] * 3)
    assert "in_proj_weight" not in attn.__dict__
    adapter.detach()


def test_a_shadow_left_by_an_interrupt_does_not_outlive_a_change() -> None:
    changes: list[Callable[[nn.Module, vm.Adapter], object]] = [
        lambda m, a: setattr(a, "enabled", False),
        lambda m, a: a.merge(),
        lambda m, a: a.detach(),
        lambda m, a: vm.use(m),
    ]
    for change in changes:
        model = MHA.model()
        adapter = vm.adapt(model, vm.LoRA())
        shake(adapter)
        attn = model.visual.transformer.resblocks[0].attn

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        handle = attn.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            MHA.run(model)
        handle.remove()
        assert "in_proj_weight" in attn.__dict__  # else this test could not fail
        change(model, adapter)
        assert "in_proj_weight" not in attn.__dict__


def test_two_ports_on_one_owner_keep_each_others_shadows() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.out = nn.Linear(5, 7)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.embed(x).tanh())

    torch.manual_seed(0)
    model = Tied()
    table = {Tied: (vm.Weight("embed.tokens", "embed.weight"), vm.Weight("out.bias", "out.bias"))}
    adapter = vm.adapt(model, vm.Tune(sites=("embed.tokens", "out.bias")), sites=table)
    shake(adapter, 0.3)
    live = model(torch.arange(7))
    adapter.merge()
    assert close(model(torch.arange(7)), live, 1e-6)


def test_a_shared_weight_acts_at_each_of_its_readers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(8, 2, batch_first=True)
            self.b = nn.MultiheadAttention(8, 2, batch_first=True)
            self.b.out_proj.weight = self.a.out_proj.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(*[self.a(x, x, x)[0]] * 3)[0]

    torch.manual_seed(0)
    model = Two().eval()
    table = {Two: (vm.Span("block"),)}
    adapter = vm.adapt(model, vm.LoRA(sites=("attn.out",), rank=2), sites=table)
    shake(adapter, 0.3)
    x = fixed(2, 3, 8)
    live = model(x)
    adapter.merge()
    assert close(model(x), live, 1e-6)


# -- 6: dead sites ------------------------------------------------------------------------------------------------


def test_surgery_after_the_fact_is_found() -> None:
    case = BY_NAME["diffusers-SD1.5"]
    model = case.model()
    adapter = vm.adapt(model, vm.LoRA(sites=("attn.q", "conv")))
    case.run(model).sum().backward()
    assert adapter.unused() == []
    model.fuse_qkv_projections()
    for p in adapter.parameters():
        p.grad = None
    case.run(model).sum().backward()
    assert adapter.unused() == [k for k in adapter.modules if "to_q" in k]


def test_zero_gradient_of_A_at_the_first_step_is_not_death() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA())
    VIT.run(model).sum().backward()
    assert not any(m.A.grad.any() for m in adapter.modules.values())
    assert adapter.unused() == []


def test_a_detached_adapter_has_no_dead_sites_to_name() -> None:
    adapter = vm.adapt(Net(nn.Linear(4, 4)), vm.LoRA(sites=("w",), rank=2), name="gone", sites=TABLE)
    adapter.detach()
    with pytest.raises(RuntimeError, match="'gone' is detached"):
        adapter.unused()


# -- 7: frozen ----------------------------------------------------------------------------------------------------


def test_batch_norm_statistics_are_base_values() -> None:
    case = BY_NAME["timm-resnet18"]
    model = case.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = vm.adapt(model, vm.Tune(sites=("norm",)))
    model.train()
    case.run(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    adapter.detach()
    model.train()
    case.run(model)
    assert not torch.equal(model.state_dict()["bn1.running_mean"], before["bn1.running_mean"])


def test_who_requires_gradients(tmp_path: Path) -> None:
    model = VIT.model()
    model.patch_embed.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    a = vm.adapt(model, vm.LoRA(), name="a")
    b = vm.adapt(model, vm.LoRA(), name="b")
    vm.save(b, tmp_path / "b.safetensors")
    c = vm.load(model, tmp_path / "b.safetensors", name="c")
    d = vm.load(model, tmp_path / "b.safetensors", name="d", trainable=True)

    def wants(adapter: vm.Adapter) -> bool:
        return all(p.requires_grad for p in adapter.parameters())

    assert (wants(a), wants(b), wants(c), wants(d)) == (True, True, False, True)
    vm.use(model, "b", "c")  # DDP wants no parameter that takes no part
    assert (wants(a), wants(b), wants(c), wants(d)) == (False, True, False, False)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in before)
    for adapter in (a, b, c, d):
        adapter.detach()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


# -- 8: transformers' own hooks -----------------------------------------------------------------------------------


def test_recorded_hidden_states_are_the_adapted_ones() -> None:
    case = BY_NAME["transformers-ViT"]
    model = case.model()
    adapter = vm.adapt(model, vm.LoRA(sites=("attn.*", "mlp.*")))
    shake(adapter)
    x = fixed(2, 3, 32, 32)
    live = model(x, output_hidden_states=True).hidden_states
    adapter.merge()
    assert all(close(a, b) for a, b in zip(live, model(x, output_hidden_states=True).hidden_states, strict=True))


# -- 9: wrappers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda m: torch.compile(m), "_orig_mod"),
        (lambda m: nn.DataParallel(m), r"\.module"),
        (lambda m: cpu_offload(m), "before any offloading"),
    ],
    ids=["compile", "DataParallel", "offload"],
)
def test_wrapped_models_raise_with_what_to_do(wrap: Callable[[nn.Module], nn.Module], says: str) -> None:
    with pytest.raises(vm.InputError, match=says):
        vm.adapt(wrap(VIT.model()), vm.LoRA())


def test_an_adapter_left_on_another_device_is_caught_when_called() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA())
    for module in adapter.modules.values():
        module.to("meta")
    with pytest.raises(RuntimeError, match="another device"):
        VIT.run(model)


@pytest.mark.parametrize("part_first", [True, False])
def test_a_part_and_its_whole_cannot_both_be_adapted(part_first: bool) -> None:
    model = MHA.model()
    first, second = (model.visual, model) if part_first else (model, model.visual)
    adapter = vm.adapt(first, vm.LoRA(), name="first")
    with pytest.raises(vm.InputError, match="is adapted"):
        vm.adapt(second, vm.LoRA(), name="second")
    assert all(p.requires_grad for p in adapter.parameters())


def test_models_that_share_parameters_are_refused() -> None:
    model = VIT.model()
    with pytest.raises(vm.InputError, match="share parameters"):
        vm.adapt({"a": model, "b": model}, vm.LoRA())


@pytest.mark.parametrize("call", [vm.use, vm.attached])
def test_using_or_listing_through_a_wrapper_raises(call: Callable[[nn.Module], object]) -> None:
    model = VIT.model()
    vm.adapt(model, vm.LoRA(), name="a")
    with pytest.raises(vm.InputError, match=r"\.module"):
        call(nn.DataParallel(model))


def test_use_is_all_or_nothing() -> None:
    models = {"u": VIT.model(), "t": BY_NAME["transformers-CLIPText"].model()}
    vm.adapt(models, vm.LoRA(), name="both")
    vm.adapt(models["u"], vm.LoRA(), name="one")
    with pytest.raises(vm.InputError, match="'two'"):
        vm.use(models, "one", "two")
    with pytest.raises(vm.InputError, match="named twice"):
        vm.use(models, "one", "one")
    assert models["u"]._modules["_vismodal"].active == ("both", "one")
    vm.use(models, "one")
    assert models["t"]._modules["_vismodal"].active == ()


def test_an_adapter_found_on_one_of_its_models_can_be_saved_for_it(tmp_path: Path) -> None:
    models = {"u": VIT.model(), "t": BY_NAME["transformers-CLIPText"].model()}
    vm.adapt(models, vm.LoRA(), name="both")
    path = vm.save(vm.attached(models["u"])["both"], tmp_path / "u.safetensors")
    vm.load({"u": VIT.model()}, path)


def test_a_computed_weight_is_named_not_skipped() -> None:
    model = VIT.model()
    prune.random_unstructured(model.blocks[0].attn.qkv, "weight", 0.5)
    assert "computed from other parameters" in str(vm.sites(model))
    with pytest.raises(vm.InputError, match=r"blocks\.0\.attn\.qkv\.weight is computed"):
        vm.adapt(model, vm.LoRA())


def test_a_quantised_weight_is_refused() -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(vm.InputError, match="floating-point matrix"):
        vm.adapt(Net(Packed()), vm.LoRA(sites=("w",)), sites=TABLE)
    net = Net(Packed())
    with pytest.raises(vm.InputError, match="quantised"):
        vm.adapt(net, Gained(sites=("w.bias",)), sites=TABLE)
    assert "_vismodal" not in net._modules


def test_two_ranges_of_one_kind_are_two_sites() -> None:
    table = {Net: (vm.Weight("expert", "layer.weight", (0, 2)), vm.Weight("expert", "layer.weight", (1, 2)))}
    adapter = vm.adapt(Net(nn.Linear(4, 4)), vm.LoRA(sites=("expert",), rank=1), sites=table)
    assert len(adapter.modules) == 2


# -- 10, 12, 13: errors that name the fix -------------------------------------------------------------------------


def test_errors_say_what_was_given_what_there_is_and_what_to_write() -> None:
    model = VIT.model()
    cases: list[tuple[object, str]] = [
        (vm.LoRA(sites=("attn.qq",)), "no site of kind 'attn.qq'.*offers attn, attn.k.*did you mean 'attn.q'"),
        (vm.LoRA(where="blokcs.*"), "where='blokcs.*' matches none.*blocks.0.attn.qkv"),
        (vm.LoRA(layers=slice(7, 9)), r"layers=slice\(7, 9, None\) leave nothing of 'attn\.q'.*'model': 2"),
        (vm.LoRA(sites=("attn.q", "mlp.up"), where="*.attn.*"), r"leave nothing of 'mlp\.up'"),
        (vm.LoRA, "is no method"),
        (vm.LoRA(sites=("attn.q", "attn.qkv")), "blocks.0.attn.qkv.*overlap"),
        (vm.LoRA(sites=("norm",)), "needs a floating-point matrix, which .*norm"),
        ([], "no method given"),
        (vm.LoRA(sites=("*",), where="nowhere"), "matches none"),
    ]
    for method, says in cases:
        with pytest.raises(vm.InputError, match=says):
            vm.adapt(model, method)  # type: ignore[arg-type]
        assert "_vismodal" not in model._modules
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(vm.InputError, match="reset_classifier"):
        vm.adapt(timm.create_model("test_vit", num_classes=0), vm.Tune())
    with pytest.raises(vm.InputError, match=r"Net is of no known family.*sites=\{"):
        vm.adapt(Net(nn.Linear(3, 3)), vm.LoRA())
    vm.adapt(model, vm.LoRA(), name="a")
    with pytest.raises(vm.InputError, match="has an adapter 'a' already"):
        vm.adapt(model, vm.LoRA(), name="a")
    with pytest.raises(vm.InputError, match="no adapter 'b' on this model, which has a"):
        vm.use(model, "b")


def test_where_and_layers_choose_modules() -> None:
    model = MHA.model()
    last = vm.adapt(model, vm.LoRA(layers=slice(-1, None)), name="last")
    assert {k.split("resblocks.")[1][0] for k in last.modules} == {"1"}
    assert len(last.modules) == 4  # q and v of the last block of both towers
    image = vm.adapt(model, vm.LoRA(where="visual.*"), name="image")
    assert all(k.startswith("lora/visual.") for k in image.modules)
    globs = vm.adapt(model, vm.LoRA(sites=("attn.*",)), name="globs")
    assert not any(k.endswith("in_proj_weight") for k in globs.modules)  # a glob never takes the whole beside the parts


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model = VIT.model()
    adapter = vm.adapt(model, [vm.LoRA(rank=2), vm.Tune(sites=("head",))])
    path = vm.save(adapter, tmp_path / "a.safetensors", {"prompt": "a photo"})
    deeper = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, depth=3, embed_dim=24, num_heads=3)
    other_head = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=7, depth=2, embed_dim=24, num_heads=3
    )
    with pytest.raises(vm.InputError, match=r"made on vit_tiny_patch16_224.*other parameter names or shapes"):
        vm.load(deeper, path)
    with (
        pytest.warns(UserWarning, match="same shapes, other values"),
        pytest.raises(vm.InputError, match=r"tune/head.*7"),
    ):
        vm.load(other_head, path)
    for unchanged in (deeper, other_head):
        assert "_vismodal" not in unchanged._modules
    plain = tmp_path / "plain.safetensors"
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, plain)
    with pytest.raises(vm.InputError, match=r"was not written by vismodal\.save"):
        vm.load(model, plain)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(vm.InputError, match="no whole safetensors file"):
        vm.load(model, path)
    with pytest.raises(vm.InputError, match="no adapter file"):
        vm.load(model, tmp_path / "missing.safetensors")


def test_the_base_is_the_same_in_another_precision_or_with_another_head(tmp_path: Path) -> None:
    model = VIT.model()
    path = vm.save(vm.adapt(model, vm.LoRA(rank=2)), tmp_path / "a.safetensors")
    half = VIT.model().bfloat16()
    half.reset_classifier(9)
    vm.load(half, path)  # no warning, which would be an error here


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = vm.adapt(VIT.model(), vm.LoRA(rank=2))
    path = vm.save(adapter, tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vismodal.files.os.replace", full)
    shake(adapter)
    with pytest.raises(vm.InputError, match=r"cannot write .*a.safetensors: No space left"):
        vm.save(adapter, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("mha", [False, True], ids=["update", "shadow"])
def test_inductor_compiles_both_ports(mha: bool) -> None:
    torch.manual_seed(0)
    net: nn.Module = nn.MultiheadAttention(8, 2, batch_first=True) if mha else Net(nn.Linear(8, 8))
    x = fixed(2, 3, 8)

    def run(model: nn.Module) -> Tensor:
        return model(x, x, x, need_weights=False)[0] if mha else model(x)

    table = {**TABLE, nn.MultiheadAttention: COMMON[nn.MultiheadAttention]}
    adapter = vm.adapt(net, vm.LoRA(sites=("attn.*",) if mha else ("w",), rank=2), sites=table)
    shake(adapter, 0.3)
    y = run(net)
    torch._dynamo.reset()
    assert close(torch.compile(run, fullgraph=True)(net), y, 1e-5)


# -- the rest -----------------------------------------------------------------------------------------------------


def test_seed_draws_the_same_start_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    starts = [vm.adapt(VIT.model(), vm.LoRA(), seed=3).state_dict() for _ in range(2)]
    torch.manual_seed(5)
    vm.adapt(VIT.model.__get__(VIT)(), vm.LoRA(), seed=4)
    assert all(torch.equal(v, starts[1][k]) for k, v in starts[0].items())
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(2, 2))
    vm.adapt(model, vm.LoRA(sites=("w",), rank=1), seed=4, sites={nn.Linear: (vm.Weight("w", "weight"),)})
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), want)


def test_a_sequential_root_runs_with_its_bank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    adapter = vm.adapt(model, vm.LoRA(sites=("w",), rank=1), sites={nn.Linear: (vm.Weight("w", "weight"),)})
    x = fixed(2, 3)
    model(x).sum().backward()
    shake(adapter)
    y = model(x)
    adapter.merge()
    assert close(model(x), y, 1e-6)


def test_parameters_move_with_the_model_and_stay_out_of_its_state() -> None:
    model = VIT.model()
    keys = list(model.state_dict())
    adapter = vm.adapt(model, vm.LoRA(), name="a")
    assert list(model.state_dict()) == keys
    names = [n for n, _ in model.named_parameters() if "_vismodal" in n]
    assert len(names) == len(list(adapter.parameters()))
    assert all(model.get_parameter(n) is p for n, p in model.named_parameters())
    model.double()
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}
    model.train()
    assert all(m.training for m in adapter.modules.values())


def test_tables_print() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, [vm.LoRA(rank=2), vm.Tune()], name="pets")
    text = str(adapter)
    assert "adapter 'pets' on vit_tiny_patch16_224: " in text
    assert f"{adapter.num_parameters:,} parameters" in text
    assert "blocks.1.attn.qkv:v" in text
    assert "LoRA, Tune" in str(vm.sites(model))
    assert "294,912" in str(vm.methods())
    assert "UNet2DConditionModel" in str(vm.families())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case_has_the_core_kinds(case: object) -> None:
    kinds = {s.kind for s in vm.sites(case.model())}  # type: ignore[attr-defined]
    conv = any(name in case.name for name in ("resn", "convnext"))  # type: ignore[attr-defined]
    norm = set() if case.name.endswith("PixArt") else {"norm"}  # type: ignore[attr-defined]  # its norms have no parameters
    assert norm | {"bias"} | ({"conv"} if conv else {"attn.q", "attn.k", "attn.v", "attn.out", "mlp.down"}) <= kinds
