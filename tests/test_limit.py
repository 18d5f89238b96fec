"""`adapter.limit`: AdapterDrop (Rücklé et al. 2021). What is left out is the base, exactly; what acts is as it was."""

from __future__ import annotations

import copy
import pickle
import random
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import BY_NAME, METHODS, close, shake

import vismodal as vm

VIT = BY_NAME["timm-vit_tiny_patch16_224"]
HF = BY_NAME["transformers-ViT"]
UNET = BY_NAME["diffusers-SD1.5"]
LAST = slice(1, None)  # of two blocks
ON_VIT = [name for name, trial in METHODS.items() if any(fnmatchcase(VIT.name, glob) for glob in trial.claims)]


def first_block(model: nn.Module) -> Tensor:
    """What comes out of the first block."""
    seen: list[Tensor] = []
    handle = model.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        VIT.run(model)
    handle.remove()
    return seen[0]


def over_blocks(adapter: vm.Adapter) -> bool:
    kinds = {kind for part in adapter._parts for kind in part.sites.values()}
    return bool(kinds & {"features", "tokens", "model"})


@pytest.mark.parametrize("name", ON_VIT)
def test_every_method_in_the_last_block_alone(name: str) -> None:
    model = VIT.model().requires_grad_(False)
    x0, y0 = first_block(model), VIT.run(model)
    adapter = vm.adapt(model, METHODS[name].make(model))
    shake(adapter)
    y = VIT.run(model)
    if over_blocks(adapter):
        with pytest.raises(vm.InputError, match="acts as a whole, so no layers of it can be left out"):
            adapter.limit(layers=LAST)
        assert torch.equal(VIT.run(model), y)
        adapter.limit(where="")  # on the model itself: all that there is
        assert torch.equal(VIT.run(model), y)
        return
    inside = [s.index for s in vm.sites(model) if any(k.endswith(f"/{s.key}") for k in adapter.modules)]
    if set(inside) == {None}:
        with pytest.raises(vm.InputError, match=r"layers 1: leaves nothing of an adapter on no blocks"):
            adapter.limit(layers=LAST)
        return
    before = first_block(model)
    adapter.limit(layers=LAST)
    embeds = any(k.endswith(("patch_embed.proj", "patch_embed.proj.bias")) for k in adapter.modules)
    assert torch.equal(first_block(model), x0) or embeds
    assert not torch.equal(before, first_block(model))
    assert not close(VIT.run(model), y0, 1e-5)
    assert not close(VIT.run(model), y, 1e-5)
    VIT.run(model).square().mean().backward()
    assert adapter.unused() == []
    adapter.limit()
    assert torch.equal(VIT.run(model), y)


def test_it_is_the_adapter_that_was_attached_to_these_layers_only() -> None:
    """`layers` of the method says so once and for all."""
    model, other = VIT.model(), VIT.model()
    adapter = vm.adapt(model, vm.LoRA(sites=("attn.*", "mlp.*")))
    fewer = vm.adapt(other, vm.LoRA(sites=("attn.*", "mlp.*"), layers=LAST))
    shake(adapter)
    fewer.load_state_dict({k: t for k, t in adapter.state_dict().items() if "/blocks.1." in k})
    adapter.limit(layers=LAST)
    assert torch.equal(VIT.run(model), VIT.run(other))
    adapter.limit(layers=slice(-1, None))
    assert torch.equal(VIT.run(model), VIT.run(other))
    adapter.limit(where=("blocks.1.attn.*", "blocks.1.mlp.*"))
    assert torch.equal(VIT.run(model), VIT.run(other))
    adapter.limit(layers=LAST, where="*.attn.*")
    fewer.limit(where="*.attn.*")
    assert torch.equal(VIT.run(model), VIT.run(other))
    fewer.limit(where="*.mlp.*")
    assert not torch.equal(VIT.run(model), VIT.run(other))


def test_what_is_in_no_block_goes_on() -> None:
    model, other = VIT.model(), VIT.model()
    adapter = vm.adapt(model, [vm.LoRA(), vm.Tune()])
    head = vm.adapt(other, [vm.LoRA(layers=LAST), vm.Tune()])
    shake(adapter)
    head.load_state_dict({k: adapter.state_dict()[k] for k in head.state_dict()})
    adapter.limit(layers=LAST)
    assert torch.equal(VIT.run(model), VIT.run(other))
    adapter.limit(where="blocks.1.*")  # where= means all
    vm.use(other)
    vm.adapt(other, vm.LoRA(layers=LAST), name="lora").load_state_dict(
        {k: adapter.state_dict()[k] for k in head.state_dict() if k.startswith("lora/")}
    )
    assert torch.equal(VIT.run(model), VIT.run(other))


def test_spans_over_all_blocks_go_as_a_whole() -> None:
    model, other = (VIT.model().requires_grad_(False) for _ in range(2))
    adapter = vm.adapt(model, [vm.LoRA(), vm.VPT(sites=("tokens",), tokens=2), vm.DTL()])
    shake(adapter)
    vm.adapt(other, vm.LoRA()).load_state_dict({k: t for k, t in adapter.state_dict().items() if k.startswith("lora/")})
    y = VIT.run(model)
    with pytest.raises(vm.InputError, match=r"vpt/.*acts as a whole.*where="):
        adapter.limit(layers=LAST)
    assert torch.equal(VIT.run(model), y)
    adapter.limit(where="blocks.*")
    assert torch.equal(VIT.run(model), VIT.run(other))
    adapter.limit()
    assert torch.equal(VIT.run(model), y)


@pytest.mark.parametrize("name", ["LoRA", "FacT", "SSF", "RepAdapter"])
def test_merging_takes_what_acts(name: str) -> None:
    model = VIT.model().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = vm.adapt(model, METHODS[name].make(model))
    shake(adapter)
    full = VIT.run(model)
    adapter.limit(where="blocks.1.*")
    live = VIT.run(model)
    adapter.merge()
    assert close(VIT.run(model), live)

    def changed() -> set[str]:
        now = model.state_dict()
        return {k.partition(".attn")[0].partition(".mlp")[0][:8] for k in now if not torch.equal(now[k], before[k])}

    assert changed() == {"blocks.1"}
    adapter.limit(where="blocks.0.*")
    assert changed() == {"blocks.0"}
    adapter.limit()
    assert {"blocks.0", "blocks.1"} <= changed()
    assert close(VIT.run(model), full)
    adapter.limit(where="blocks.1.*")
    adapter.unmerge()
    assert changed() == set()
    assert torch.equal(VIT.run(model), live)
    adapter.detach(keep=True)
    assert changed() == {"blocks.1"}
    assert close(VIT.run(model.requires_grad_(False)), live)


def test_robust_training_drops_a_random_number_of_lower_blocks() -> None:
    """The paper's section 3.1: another number before each update. Blocks below have no graph at all."""
    model = VIT.model()
    adapter = vm.adapt(model, vm.AdaptFormer(rank=4, dropout=0.0))
    shake(adapter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1, momentum=0.9)
    rng, losses, numbers = random.Random(0), [], set()
    for _ in range(8):
        n = rng.randrange(2)
        numbers.add(n)
        adapter.limit(layers=slice(n, None))
        graph: list[bool] = []
        handle = model.blocks[1].register_forward_pre_hook(
            lambda m, args, graph=graph: graph.append(args[0].requires_grad)
        )
        optimizer.zero_grad()
        before = {k: t.clone() for k, t in adapter.state_dict().items()}
        loss = VIT.run(model).square().mean()
        loss.backward()
        optimizer.step()
        handle.remove()
        losses.append(float(loss.detach()))
        assert graph == [n == 0]
        moved = {k.partition("/")[2][:8] for k, t in adapter.state_dict().items() if not torch.equal(t, before[k])}
        assert moved == {f"blocks.{i}" for i in range(n, 2)}
        assert adapter.unused() == []
    assert numbers == {0, 1}
    assert losses[-1] < losses[0]
    for n in range(2):
        adapter.limit(layers=slice(n, None))
        assert not torch.equal(VIT.run(model), VIT.run(VIT.model().requires_grad_(False)))


@pytest.mark.parametrize("method", [vm.LoRA(), vm.AdaptFormer(rank=4, dropout=0.0)], ids=["weights", "spans"])
def test_checkpointing_is_equal_and_a_change_before_backward_is_caught(method: vm.LoRA) -> None:
    gradients = []
    for on in (False, True):
        model = VIT.model().train()
        model.set_grad_checkpointing(on)
        adapter = vm.adapt(model, method, seed=0)
        shake(adapter)
        adapter.limit(layers=LAST)
        VIT.run(model).square().mean().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or close(b, a)
    assert any(g is None for g in gradients[0])
    assert any(g is not None for g in gradients[0])
    for before, after in ((LAST, slice(0, 1)), (slice(0, 1), None), (None, slice(0, 1)), (None, LAST)):
        adapter.limit(layers=before)
        loss = VIT.run(model).square().mean()
        adapter.limit(layers=after)
        with pytest.raises(RuntimeError, match="adapters changed between forward and backward"):
            loss.backward()
        VIT.run(model).square().mean().backward()
    adapter.limit(layers=LAST)
    loss = VIT.run(model).square().mean()
    adapter.limit()  # the first block had no graph, and nothing of it runs again
    for p in adapter.parameters():
        p.grad = None
    loss.backward()
    for g, p in zip(gradients[0], adapter.parameters(), strict=True):
        assert (g is None) == (p.grad is None)
        assert g is None or close(p.grad, g)


def test_it_is_shown_copied_and_in_no_file(tmp_path: Path) -> None:
    model = VIT.model()
    adapter = vm.adapt(model, vm.LoRA(), name="a")
    shake(adapter)
    full = VIT.run(model)
    assert "limited" not in str(adapter)
    adapter.limit(layers=LAST)
    assert "live at scale 1, limited to layers 1:: 2 of 4 sites act" in str(adapter).splitlines()[0]
    limited = VIT.run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(VIT.run(other), limited)
        vm.attached(other)["a"].limit()
        assert torch.equal(VIT.run(other), full)
    assert torch.equal(VIT.run(model), limited)
    path = vm.save(adapter, tmp_path / "a.safetensors")
    fresh = VIT.model()
    vm.load(fresh, path)
    assert torch.equal(VIT.run(fresh), full)
    adapter.limit(layers=slice(0, -1), where="blocks.*")
    assert "limited to layers 0:-1, blocks.*: 2 of 4 sites act" in str(adapter)


def test_scale_switching_and_other_adapters_beside_it() -> None:
    model = VIT.model().requires_grad_(False)
    y0 = VIT.run(model)
    a, b = (vm.adapt(model, vm.LoRA(), name=name, seed=i) for i, name in enumerate("ab"))
    shake(a)
    shake(b)
    vm.use(model, "b")
    only_b = VIT.run(model)
    vm.use(model, "a")
    a.limit(layers=LAST)
    only_a = VIT.run(model)
    vm.use(model, "a", "b")
    both = VIT.run(model)
    a.limit(layers=slice(0, 1))
    a.limit(layers=LAST)
    assert torch.equal(VIT.run(model), both)
    a.scale = 0.5
    a.enabled = False
    assert torch.equal(VIT.run(model), only_b)
    a.enabled, a.scale = True, 1
    vm.use(model, "a")
    assert torch.equal(VIT.run(model), only_a)
    b.merge()
    b.detach()
    assert torch.equal(VIT.run(model), only_a)
    with a.disabled():
        assert torch.equal(VIT.run(model), y0)
    a.detach()
    assert torch.equal(VIT.run(model.requires_grad_(False)), y0)


def test_errors_change_nothing() -> None:
    model = VIT.model()
    adapter = vm.adapt(model, [vm.LoRA(), vm.Tune()])
    shake(adapter)
    adapter.limit(layers=LAST)
    y = VIT.run(model)
    for given, says in (
        (
            {"layers": slice(2, None)},
            r"layers 2: leaves nothing of an adapter on 2 blocks; to switch it off set enabled",
        ),
        ({"layers": slice(0, 0)}, "layers 0:0 leaves nothing"),
        ({"layers": LAST, "where": "blocks.0.*"}, r"layers 1:, blocks\.0\.\* leaves nothing"),
        (
            {"where": "blokcs.*"},
            r"where='blokcs\.\*' matches no module that the adapter is on: blocks\.0\.attn\.qkv, .*head",
        ),
        ({"where": ()}, "leaves nothing"),
        ({"layers": 1}, r"a slice such as slice\(5, None\), not 1"),
    ):
        with pytest.raises(vm.InputError, match=says):
            adapter.limit(**given)
        assert torch.equal(VIT.run(model), y)
        assert "limited to layers 1:" in str(adapter)


def test_by_path_in_a_unet_and_in_one_of_two_models() -> None:
    unet, clip = UNET.model().requires_grad_(False), BY_NAME["transformers-CLIPText"].model().requires_grad_(False)
    run = BY_NAME["transformers-CLIPText"].run
    y0, t0 = UNET.run(unet), run(clip)
    adapter = vm.adapt({"unet": unet, "text_encoder": clip}, vm.LoRA(sites=("attn.*", "xattn.*")))
    sites = [k for k in adapter.modules if "attn" in k]
    shake(adapter)
    adapter.limit(where="unet.mid_block.*")
    assert torch.equal(run(clip), t0)
    assert not torch.equal(UNET.run(unet), y0)
    UNET.run(unet).mean().backward()
    assert adapter.unused() == []
    assert {k.partition("/")[2][:14] for k, m in adapter.modules.items() if m.A.grad is not None} == {"unet.mid_block"}
    adapter.limit(where="text_encoder.*")
    assert torch.equal(UNET.run(unet), y0)
    assert not torch.equal(run(clip), t0)
    assert sites


def test_each_tower_has_layers_of_its_own_and_kept_text_features_follow() -> None:
    case = BY_NAME["classifier-flat"]
    model = case.model().requires_grad_(False)
    adapter = vm.adapt(model, vm.LoRA(sites=("attn.*",)))
    shake(adapter)
    adapter.trainable = False
    with torch.no_grad():
        full = case.run(model)
        adapter.limit(layers=LAST)
        both = case.run(model)
        adapter.limit(where="model.visual.*")
        pictures = case.run(model)
        adapter.limit()
        assert torch.equal(case.run(model), full)
        adapter.limit(layers=LAST)
        assert torch.equal(case.run(model), both)
    assert not torch.equal(full, both)
    assert not torch.equal(full, pictures)
    fresh = case.model().requires_grad_(False)
    again = vm.adapt(fresh, vm.LoRA(sites=("attn.*",), where="*visual*"))
    again.load_state_dict({k: adapter.state_dict()[k] for k in again.state_dict()})
    assert close(case.run(fresh), pictures, 2e-6)


def test_shared_tensors_go_on_where_they_act() -> None:
    """RepAdapter's one map for q, k and v lies in the module of q, which is left out here."""
    model, other = HF.model(), HF.model()
    kinds = ("attn.q", "attn.k", "attn.v")
    adapter = vm.adapt(model, vm.RepAdapter(sites=kinds, rank=4))
    shake(adapter)
    alone = vm.adapt(other, vm.RepAdapter(sites=("attn.k",), rank=4))
    state = adapter.state_dict()
    alone.load_state_dict({k: state[k.replace("k_proj", "q_proj")] for k in alone.state_dict()})
    (path,) = {k.partition("/")[2].rpartition(".A")[0] for k in alone.state_dict() if k.endswith(".A") and ".0." in k}
    adapter.limit(where="*." + path.rpartition(".")[2])
    assert torch.equal(HF.run(model), HF.run(other))


def test_a_compiled_model_follows() -> None:
    model = VIT.model().requires_grad_(False)
    adapter = vm.adapt(model, vm.LoRA())
    shake(adapter)
    torch._dynamo.reset()
    compiled = torch.compile(VIT.run, backend="eager", fullgraph=True)
    assert close(compiled(model), VIT.run(model), 2e-6)
    adapter.limit(layers=LAST)
    assert close(compiled(model), VIT.run(model), 2e-6)
