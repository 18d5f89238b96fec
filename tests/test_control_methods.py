"""T2I-Adapter and IP-Adapter against their formulas and against diffusers, and how a condition reaches them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny_diffusion import tiny_unet
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import close, fixed, shake

import vismodal as vm

WIDTH, TOKENS = 10, 3
E, EDGES = fixed(2, WIDTH), fixed(2, 1, 16, 16).abs()


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def unet() -> nn.Module:
    return tiny_unet(cross_attention_dim=24).eval().requires_grad_(False)


def run(model: nn.Module, rows: int = 2, start: int = 0, **more: object) -> Tensor:
    """The rows from `start` of one endless batch."""
    x, words = fixed(8, 4, 8, 8)[start : start + rows], fixed(8, 3, 24)[start : start + rows]
    times = torch.tensor([1, 500, 20, 900, 333, 7, 80, 650])[start : start + rows]
    y: Tensor = model(x, times, words, **more).sample
    return y


def ip(model: nn.Module, name: str = "ip") -> vm.Adapter:
    adapter = vm.adapt(model, vm.IPAdapter(width=WIDTH, tokens=TOKENS), name)
    shake(adapter, 0.3)
    return adapter


def t2i(model: nn.Module, name: str = "t2i", blocks: int = 2) -> vm.Adapter:
    adapter = vm.adapt(model, vm.T2IAdapter(factor=2, blocks=blocks), name)
    shake(adapter, 0.1)
    return adapter


# -- IP-Adapter --------------------------------------------------------------------------------------------------------


def test_ip_adapter_equals_the_formula_with_the_queries_of_other_adapters() -> None:
    model = unet()
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    attention = copy.deepcopy(block.attn2)
    lora = vm.adapt(model, vm.LoRA(rank=2, sites=("xattn.q",)), "lora")
    shake(lora, 0.3)
    adapter = ip(model)
    vm.use(model, "lora", "ip")
    adapter.condition, adapter.scale = E, 0.6
    seen: list[Tensor] = []
    handle = block.attn2.register_forward_hook(lambda m, a, k, y: seen.extend((a[0], y)), with_kwargs=True)
    run(model)
    handle.remove()

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = heads(q) @ heads(k).transpose(-1, -2) / (q.shape[-1] / attention.heads) ** 0.5
        return (scores.softmax(-1) @ heads(v)).transpose(1, 2).flatten(2)

    (x, y), words = seen, fixed(8, 3, 24)[:2]
    own, shared = adapter.modules["ipadapter/" + block_key(block, model)], adapter._parts[0].shared["ipadapter/shared"]
    delta = lora.modules["lora/" + block_key(block, model).replace(":xattn.beside", ".attn2.to_q")]
    c = F.layer_norm((E @ shared.linear.weight.T + shared.linear.bias).view(2, TOKENS, 24), (24,))
    c = c * shared.norm.weight + shared.norm.bias
    q = x @ (attention.to_q.weight + delta.B @ delta.A).T
    z = attend(q, words @ attention.to_k.weight.T, words @ attention.to_v.weight.T)
    z = z + 0.6 * attend(q, c @ own.k.T, c @ own.v.T)
    assert close(y, attention.to_out[0](z))


def block_key(block: nn.Module, model: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is block) + ":xattn.beside"


def test_ip_adapter_begins_with_the_keys_and_values_of_the_text() -> None:
    model = unet()
    adapter = vm.adapt(model, vm.IPAdapter(width=WIDTH))
    for key, module in adapter.modules.items():
        attention = model.get_submodule(key.removeprefix("ipadapter/").partition(":")[0]).attn2
        assert torch.equal(module.k, attention.to_k.weight) and torch.equal(module.v, attention.to_v.weight)
    assert adapter.num_parameters == 24 * 4 * (WIDTH + 1) + 2 * 24 + 2 * 24 * (16 + 32 + 16 + 16)


@pytest.mark.parametrize("guided", [False, True])
def test_ip_adapter_equals_the_processors_of_diffusers(guided: bool) -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    model, theirs = unet(), unet()
    theirs.load_state_dict(model.state_dict())
    adapter = ip(model)
    adapter.condition, adapter.scale = E, 0.6
    projection = ImageProjection(WIDTH, 24, TOKENS)
    shared = adapter._parts[0].shared["ipadapter/shared"]
    projection.image_embeds.load_state_dict(shared.linear.state_dict())
    projection.norm.load_state_dict(shared.norm.state_dict())
    theirs.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    theirs.config.encoder_hid_dim_type = "ip_image_proj"
    processors = dict(theirs.attn_processors)
    for name in [n for n in processors if n.endswith("attn2.processor")]:
        own = adapter.modules[f"ipadapter/{name.removesuffix('.attn2.processor')}:xattn.beside"]
        processors[name] = IPAdapterAttnProcessor2_0(len(own.k), 24, (TOKENS,), scale=0.6)
        processors[name].to_k_ip[0].weight.data.copy_(own.k)
        processors[name].to_v_ip[0].weight.data.copy_(own.v)
    theirs.set_attn_processor(processors)
    e = torch.cat((torch.zeros_like(E), E)) if guided else E  # as the pipeline prepares its embeddings for guidance
    want = run(theirs, len(e), added_cond_kwargs={"image_embeds": [e[:, None]]})
    assert close(run(model, len(e)), want)
    with adapter.disabled():
        assert not close(run(model, len(e)), want, 1e-3)


# -- T2I-Adapter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
def test_t2i_adapter_equals_that_of_diffusers(guided: bool) -> None:
    from diffusers import T2IAdapter

    model = unet()
    y0 = run(model)
    theirs = T2IAdapter(in_channels=1, channels=[16, 32], num_res_blocks=2, downscale_factor=2)
    adapter = t2i(model)
    (module,) = adapter.modules.values()
    mine = list(module.pyramid.parameters())
    assert [p.shape for p in mine] == [p.shape for p in theirs.parameters()]
    for p, q in zip(theirs.parameters(), mine, strict=True):
        p.data.copy_(q)
    adapter.condition, adapter.scale = EDGES, 0.7
    rows = 4 if guided else 2
    y = run(model, rows)
    with adapter.disabled(), torch.no_grad():
        features = [0.7 * f.repeat(rows // 2, 1, 1, 1) for f in theirs(EDGES)]
        want = run(model, rows, down_intrablock_additional_residuals=features)
        assert close(y, want)
        assert not close(y, run(model, rows), 1e-3)
        assert torch.equal(run(model), y0)


def test_the_pyramid_equals_the_formula_also_at_odd_sizes() -> None:
    model = unet()
    (module,) = t2i(model, blocks=1).modules.values()
    x = fixed(1, 1, 10, 14)
    w = {name: p.detach() for name, p in module.pyramid.named_parameters()}

    def block(z: Tensor, name: str) -> Tensor:
        h = F.relu(F.conv2d(z, w[f"{name}.conv1.weight"], w[f"{name}.conv1.bias"], padding=1))
        return z + F.conv2d(h, w[f"{name}.conv2.weight"], w[f"{name}.conv2.bias"])

    squares = x.view(1, 1, 5, 2, 7, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 4, 5, 7)
    first = block(F.conv2d(squares, w["conv.weight"], w["conv.bias"], padding=1), "levels.0.1")
    halved = torch.stack([first[..., i : i + 2, j : j + 2].mean((-1, -2)) for i in (0, 2, 4) for j in (0, 2, 4, 6)], -1)
    second = block(F.conv2d(halved.view(1, 16, 3, 4), w["levels.1.0.weight"], w["levels.1.0.bias"]), "levels.1.1")
    for mine, want in zip(module.pyramid(x), (first, second), strict=True):
        assert close(mine, want)


# -- how a condition reaches a method ----------------------------------------------------------------------------------


def test_each_row_has_its_own_condition_and_each_adapter_too() -> None:
    model = unet()
    a, b = ip(model), t2i(model)
    vm.use(model, "ip", "t2i")
    given = E.clone()
    a.condition, b.condition = given, EDGES
    given.zero_()  # a copy is kept
    y = run(model)
    for i in range(2):
        with a.given(E[i : i + 1]), b.given(EDGES[i : i + 1]):
            assert close(run(model, 1, i), y[i : i + 1])
    with a.given(E.flip(0)):
        assert not close(run(model), y, 1e-3)
    assert torch.equal(run(model), y) and torch.equal(a.condition, E)
    with pytest.raises(vm.InputError, match="batch has 3 rows, the condition 2: give one for each row"):
        run(model, 3)


def test_without_a_condition_it_is_the_base_and_says_so() -> None:
    model = unet()
    y0 = run(model)
    adapter = ip(model)
    assert "without its condition" in str(adapter)
    with pytest.warns(UserWarning, match="'ip' has been given no condition, so the model is the base"):
        assert torch.equal(run(model), y0)
    assert set(adapter.unused()) == set(adapter.modules)
    with adapter.given(E):
        assert "given 2 rows" in str(adapter)
        assert not close(run(model), y0, 1e-3)
        assert adapter.unused() == []
    with adapter.disabled():  # where it does not act, there is nothing to tell
        assert torch.equal(run(model), y0)


def test_a_condition_that_changes_before_the_backward_of_checkpoints_is_refused() -> None:
    model = unet().train()
    model.enable_gradient_checkpointing()
    adapter = ip(model)
    for later in (None, E):
        with adapter.given(E):
            loss = run(model).square().mean()
        adapter.condition = later  # equal values are another condition all the same
        with pytest.raises(RuntimeError, match=r"adapters changed .* in the forward ip \(condition \d\) at scale 1"):
            loss.backward()
    adapter.condition = E.flip(0)
    run(model).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_what_a_map_adds_is_fixed_at_the_forward(scale: float) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = unet().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        adapter = t2i(model)
        adapter.scale = scale
        with adapter.given(EDGES):
            loss = run(model).square().mean()
        adapter.condition = EDGES.flip(0)
        loss.backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(close(b, a) and a.any() for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("guided", [False, True])
def test_routed_rows_have_their_own_conditions(guided: bool) -> None:
    model = unet()
    a, b = ip(model), t2i(model)
    e, edges = fixed(4, WIDTH), fixed(4, 1, 16, 16)
    a.condition, b.condition = e, edges
    rows = ["t2i", None, ("t2i", "ip"), "ip"]
    count = 8 if guided else 4
    with torch.no_grad(), vm.route(model, rows):
        y = run(model, count)
    for i in range(count):
        row = i % 4
        names = rows[row]
        vm.use(model, *((names,) if isinstance(names, str) else names or ()))
        away = guided and i < 4  # guidance leads away from no picture, and from the edges as they are
        with a.given(e[row : row + 1] * (not away)), b.given(edges[row : row + 1]):
            assert close(run(model, 1, i), y[i : i + 1])


WRONG = [
    (vm.IPAdapter(width=WIDTH), fixed(2, 9), r"takes features of pictures, rows x 10, not 2x9"),
    (vm.IPAdapter(width=WIDTH), torch.zeros(2, 10, dtype=torch.long), r"rows x 10, not 2x10 of torch.int64"),
    (vm.T2IAdapter(), fixed(2, 3, 64, 64), r"takes maps, rows x 1 x height x width, not 2x3x64x64"),
    (vm.LoRA(sites=("attn.q",)), E, r"LoRA in 'default' take 0 conditions, not one: only T2IAdapter and IPAdapter do"),
    ([vm.T2IAdapter(), vm.IPAdapter()], E, r"T2IAdapter and IPAdapter in 'default' take 2 .*names of their own"),
]


@pytest.mark.parametrize(("method", "given", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_condition_is_an_error(method: object, given: Tensor, message: str) -> None:
    adapter = vm.adapt(unet(), method)  # type: ignore[arg-type]
    with pytest.raises(vm.InputError, match=message):
        adapter.condition = given


def test_a_map_of_another_size_is_an_error() -> None:
    model = unet()
    adapter = t2i(model)
    with adapter.given(fixed(2, 1, 16, 24)), pytest.raises(vm.InputError, match="16 x 24 pixels, the picture 16 x 16"):
        run(model)
    with pytest.raises(vm.InputError, match=r"T2IAdapter steers a UNet .*'encoder'.*is 'attn'"):
        vm.adapt(unet(), vm.T2IAdapter(sites=("attn",)))
