"""Adapters against their formulas written out by hand, in fp64, and the facts of the papers that concern them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, close, fixed, shake

import vismodal as vm
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.site import Site

EXACT = 1e-12


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "num_classes": 4, "depth": 2, "embed_dim": 24, "num_heads": 3, **options}
    return timm.create_model("vit_tiny_patch16_224", **options).double().eval()


def tokens(*shape: int) -> Tensor:
    return fixed(*shape).double()


def adapted(model: nn.Module, method: Method | list[Method]) -> tuple[vm.Adapter, list[Any]]:
    adapter = vm.adapt(model, method)
    shake(adapter, 0.3)
    return adapter, list(adapter.modules.values())


def bottleneck(m: Any, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return act(x @ m.down.T.double() + m.down_bias) @ m.up.T.double() + m.up_bias


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


# -- formulas -----------------------------------------------------------------------------------------------------


def test_adaptformer_reads_the_stream_before_the_norm() -> None:
    model = vit()
    adapter, modules = adapted(model, vm.AdaptFormer(rank=3))
    block, x = model.blocks[0], tokens(2, 5, 24)
    y = block(x)
    with adapter.disabled():
        mid = x + block.attn(block.norm1(x))
        want = mid + block.mlp(block.norm2(mid)) + 0.1 * bottleneck(modules[0], mid, F.relu)
        assert not close(block(x), want, 1e-3)
    assert close(y, want, EXACT)


def test_parallel_adapters_on_both_branches() -> None:
    model = vit()
    adapter, (attn, mlp, *_) = adapted(model, vm.AdaptFormer(sites=("attn", "mlp"), rank=3, scaling=2.0))
    block, x = model.blocks[0], tokens(2, 5, 24)
    y = block(x)
    with adapter.disabled():
        mid = x + block.attn(block.norm1(x)) + 2 * bottleneck(attn, x, F.relu)
        want = mid + block.mlp(block.norm2(mid)) + 2 * bottleneck(mlp, mid, F.relu)
    assert close(y, want, EXACT)


@pytest.mark.parametrize("name", ["swinv2", "eva"])
def test_adaptformer_reads_the_stream_of_blocks_whose_norm_comes_last(name: str) -> None:
    torch.manual_seed(0)
    if name == "eva":
        options = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 3}
        model = timm.models.eva.Eva(**options, use_post_norm=True).double().eval()  # type: ignore[arg-type]
        block, x = model.blocks[0], tokens(2, 5, 24)
    else:
        model = BY_NAME["timm-swinv2_tiny_window8_256"].model().double()
        block, x = model.layers[0].blocks[0], tokens(2, 16, 16, 12)
    adapter, (attn, mlp, *_) = adapted(model, vm.AdaptFormer(sites=("attn", "mlp"), rank=3))
    y = block(x)
    with adapter.disabled():
        branch = block._attn if name == "swinv2" else block.attn
        mid = x + block.norm1(branch(x)) + 0.1 * bottleneck(attn, x, F.relu)
        want = mid + block.norm2(block.mlp(mid)) + 0.1 * bottleneck(mlp, mid, F.relu)
    assert close(y, want, EXACT)
    assert not [s for s in vm.sites(model) if vm.Convpass.fits(s)], "no norm before the branch"


def test_parallel_adapters_on_the_three_branches_of_a_unet_block() -> None:
    model = BY_NAME["diffusers-SD1.5"].model().double()
    adapter, _ = adapted(model, vm.AdaptFormer(sites=("attn", "xattn", "mlp"), rank=3))
    path = "down_blocks.0.attentions.0.transformer_blocks.0"
    block, x, text = model.get_submodule(path), tokens(2, 9, 16), tokens(2, 3, 24)
    f = [lambda z, m=adapter.modules[f"adaptformer/{path}:{k}"]: 0.1 * bottleneck(m, z, F.relu) for k in KINDS]
    y = block(x, encoder_hidden_states=text)
    with adapter.disabled():
        x = x + block.attn1(block.norm1(x)) + f[0](x)
        x = x + block.attn2(block.norm2(x), text) + f[1](x)
        x = x + block.ff(block.norm3(x)) + f[2](x)
    assert close(y, x, EXACT)


KINDS = ("attn", "xattn", "mlp")


def test_houlsby_acts_on_what_both_branches_give() -> None:
    model = vit()
    adapter, (attn, mlp, *_) = adapted(model, vm.Houlsby(rank=3))
    block, x = model.blocks[0], tokens(2, 5, 24)
    y = block(x)
    with adapter.disabled():
        branch = block.attn(block.norm1(x))
        mid = x + branch + bottleneck(attn, branch, F.gelu)
        branch = block.mlp(block.norm2(mid))
        want = mid + branch + bottleneck(mlp, branch, F.gelu)
    assert close(y, want, EXACT)


def test_pfeiffer_acts_on_what_the_mlp_gives() -> None:
    model = vit()
    adapter, modules = adapted(model, vm.Pfeiffer(rank=3))
    block, x = model.blocks[1], tokens(2, 5, 24)
    y = block(x)
    with adapter.disabled():
        mid = x + block.attn(block.norm1(x))
        branch = block.mlp(block.norm2(mid))
        want = mid + branch + bottleneck(modules[1], branch, F.gelu)
    assert close(y, want, EXACT)


def test_adapterplus_acts_on_the_whole_block() -> None:
    model = vit()
    adapter, modules = adapted(model, vm.AdapterPlus(rank=3))
    block, x = model.blocks[1], tokens(2, 5, 24)
    y = block(x)
    with adapter.disabled():
        z = block(x)
        want = z + modules[1].gamma * bottleneck(modules[1], z, F.gelu)
    assert close(y, want, EXACT)


@pytest.mark.parametrize("name", ["timm-resnet18", "timm-convnext_tiny"])
def test_adapterplus_is_a_pair_of_convolutions_in_a_convolutional_network(name: str) -> None:
    model = BY_NAME[name].model().double()
    adapter, _ = adapted(model, vm.AdapterPlus(rank=3))
    key, m = next(iter(adapter.modules.items()))
    block = model.get_submodule(key.partition("/")[2].partition(":")[0])
    x = tokens(2, len(m.gamma), 6, 6)
    y = block(x)
    with adapter.disabled():
        z = block(x)
        h = F.gelu(F.conv2d(z, m.down[..., None, None].double(), m.down_bias.double()))
        h = F.conv2d(h, m.up[..., None, None].double(), m.up_bias.double())
        want = z + m.gamma.view(1, -1, 1, 1) * h
    assert close(y, want, EXACT)


def bypass(m: Any, n: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """CP(n), every token before the grid as a picture of one by one."""
    conv = nn.Conv2d(len(m.conv), len(m.conv), 3, padding=1).double()
    conv.load_state_dict({"weight": m.conv, "bias": m.conv_bias})
    h = quick_gelu(n @ m.down.T.double() + m.down_bias)
    single = [conv(h[:, i, :, None, None])[..., 0, 0] for i in range(prefix)]
    picture = conv(h[:, prefix:].transpose(1, 2).reshape(len(n), -1, *grid)).flatten(2).transpose(1, 2)
    h = torch.cat([*(s[:, None] for s in single), picture], 1)
    return quick_gelu(h) @ m.up.T.double() + m.up_bias


@pytest.mark.parametrize("registers", [0, 3])
def test_convpass_convolves_the_grid_and_every_other_token_alone(registers: int) -> None:
    model = vit(img_size=(32, 48), reg_tokens=registers)
    adapter, (attn, mlp, *_) = adapted(model, vm.Convpass(rank=3, scaling=0.5))
    block, x, prefix = model.blocks[0], tokens(2, 7 + registers, 24), 1 + registers
    y = block(x)
    with adapter.disabled():
        n = block.norm1(x)
        mid = x + block.attn(n) + 0.5 * bypass(attn, n, prefix, (2, 3))
        n = block.norm2(mid)
        want = mid + block.mlp(n) + 0.5 * bypass(mlp, n, prefix, (2, 3))
    assert close(y, want, EXACT)


def test_convpass_on_the_rows_and_columns_of_swin() -> None:
    model = BY_NAME["timm-swin_tiny_patch4_window7_224"].model().double()
    adapter, (attn, mlp, *_) = adapted(model, vm.Convpass(rank=3))
    block, x = model.layers[0].blocks[0], tokens(2, 14, 14, 12)
    y = block(x)
    with adapter.disabled():
        n = block.norm1(x)
        mid = x + block._attn(n) + bypass(attn, n.flatten(1, 2), 0, (14, 14)).unflatten(1, (14, 14))
        n = block.norm2(mid)
        want = mid + block.mlp(n) + bypass(mlp, n.flatten(1, 2), 0, (14, 14)).unflatten(1, (14, 14))
    assert close(y, want, EXACT)


class Joined(SpanModule):
    """Two tokens after the class token, for the length of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(2, 24))

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return torch.cat([x[:, :1], self.prompt.double().expand(len(x), -1, -1), x[:, 1:]], 1)

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return torch.cat([y[:, :1], y[:, 3:]], 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class Join(Method):
    sites: tuple[str, ...] = ("block",)
    interpolates: ClassVar[bool] = False

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(Joined() for _ in sites))


def test_convpass_finds_the_grid_behind_the_prompts_of_others() -> None:
    model = vit()
    adapter = vm.adapt(model, [Join(), vm.Convpass(rank=3, sites=("attn",))])
    shake(adapter, 0.3)
    join, convpass = adapter.modules["join/blocks.0:block"], adapter.modules["convpass/blocks.0:attn"]
    block, x = model.blocks[0], tokens(2, 5, 24)
    y = block(x)
    with adapter.disabled():
        z = join.enter(x, {})
        n = block.norm1(z)
        mid = z + block.attn(n) + bypass(convpass, n, 3, (2, 2))
        want = join.exit(mid + block.mlp(block.norm2(mid)), {})
    assert close(y, want, EXACT)


# -- RepAdapter ---------------------------------------------------------------------------------------------------


def rep(m: Any, z: Tensor, scaling: float = 1.0) -> Tensor:
    """R(z) with B as a grouped convolution of width one, as the official code has it."""
    h = z @ m.A.T.double() + (0 if m.a is None else m.a)
    B = F.conv1d(h.flatten(0, -2).T[None], m.B[..., None].double(), None if m.u is None else m.u.double(), groups=2)
    return z + scaling * B[0].T.view(z.shape)


def test_repadapter_before_a_fused_qkv_and_before_the_mlp() -> None:
    model = vit()
    adapter, modules = adapted(model, vm.RepAdapter(rank=4, scaling=0.5))
    q, k, v, up = modules[:4]
    assert q.source is k.source is v.source is q and up.source is up
    block, x = model.blocks[0], tokens(2, 5, 24)
    y = block(x)
    with adapter.disabled():
        mid = x + block.attn(rep(q, block.norm1(x), 0.5))
        want = mid + block.mlp(rep(up, block.norm2(mid), 0.5))
    assert close(y, want, EXACT)
    adapter.merge()
    assert close(block(x), want, EXACT)


def test_repadapter_on_the_whole_of_a_fused_qkv() -> None:
    model = vit()
    adapter, modules = adapted(model, vm.RepAdapter(sites=("attn.qkv",), rank=4))
    attn, z = model.blocks[0].attn, tokens(2, 5, 24)
    y = attn(z)
    with adapter.disabled():
        want = attn(rep(modules[0], z))
    assert close(y, want, EXACT)
    adapter.merge()
    assert close(attn(z), want, EXACT)


def test_repadapter_on_some_rows_leaves_the_others_exactly() -> None:
    model = vit()
    adapter, (q, *_) = adapted(model, vm.RepAdapter(sites=("attn.q", "attn.v"), rank=4))
    qkv, z = model.blocks[0].attn.qkv, tokens(2, 5, 24)
    y = qkv(z)
    with adapter.disabled():
        y0, want = qkv(z), qkv(rep(q, z))
    assert torch.equal(y[..., 24:48], y0[..., 24:48])
    assert close(y[..., :24], want[..., :24], EXACT)
    assert close(y[..., 48:], want[..., 48:], EXACT)


def test_repadapter_shares_one_module_among_separate_q_k_and_v() -> None:
    model = BY_NAME["transformers-ViT"].model().double()
    adapter, modules = adapted(model, vm.RepAdapter(rank=4))
    block = model.vit.layers[0]
    q, k, v, up = modules[:4]
    assert q.source is k.source is v.source is q
    assert [n for n, _ in adapter.named_parameters() if ".0." in n and "attention" in n] == [
        f"repadapter/vit.layers.0.attention.q_proj.{name}" for name in ("A", "B", "a", "u")
    ]
    x = tokens(2, 5, 24)
    y = block(x)
    with adapter.disabled():
        mid = x + block.attention(rep(q, block.layernorm_before(x)))[0]
        want = mid + block.mlp(rep(up, block.layernorm_after(mid)))
    assert close(y, want, EXACT)
    adapter.merge()
    assert close(block(x), want, EXACT)


def test_repadapter_shares_one_module_between_up_and_gate() -> None:
    model = BY_NAME["diffusers-SD1.5"].model().double()
    path = "down_blocks.0.attentions.0.transformer_blocks.0"
    ff, z = model.get_submodule(f"{path}.ff"), tokens(2, 9, 16)
    adapter, (up, gate) = adapted(model, vm.RepAdapter(sites=("mlp.*",), where=f"{path}.*", rank=4))
    assert gate.source is up
    y = ff(z)
    with adapter.disabled():
        want = ff(rep(up, z))
    assert close(y, want, EXACT)
    adapter.merge()
    assert close(ff(z), want, EXACT)


def test_repadapter_shares_nothing_between_two_attentions_side_by_side() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.MultiheadAttention(8, 2)
            self.second = nn.MultiheadAttention(8, 2)

    for kind in ("attn.q", "attn.qkv"):
        method = vm.RepAdapter(sites=(kind,))
        adapter = vm.adapt(Decoder(), method, sites={Decoder: (vm.Span("block"),)})
        first, second = adapter.modules.values()
        assert first.source is first
        assert second.source is second


@pytest.mark.parametrize("first", ["LoRA", "RepAdapter"])
def test_repadapter_and_lora_on_one_weight_live_as_merged(first: str) -> None:
    """W' of the one is what the other starts from; the fast path, which reads the layer's own weight, will not do."""
    model = vit()
    rep_, lora = vm.RepAdapter(sites=("attn.q", "attn.v"), rank=4), vm.LoRA(rank=4)
    adapter, _ = adapted(model, [lora, rep_] if first == "LoRA" else [rep_, lora])
    m = {k: v for k, v in adapter.modules.items() if "blocks.0" in k}
    qkv, z = model.blocks[0].attn.qkv, tokens(2, 5, 24)
    y = qkv(z)
    r, a = m["repadapter/blocks.0.attn.qkv:q"], m["lora/blocks.0.attn.qkv:q"]
    W, b = qkv.weight[:24], qkv.bias[:24]
    R, change = rep(r, z), a.B.double() @ a.A.double()
    want = F.linear(R, W + change, b) if first == "LoRA" else F.linear(R, W, b) + F.linear(z, change)
    assert close(y[..., :24], want, EXACT)
    adapter.merge()
    assert close(qkv(z), y, EXACT)


def test_repadapter_at_half_its_scale() -> None:
    model = vit()
    adapter, _ = adapted(model, vm.RepAdapter(rank=4))
    qkv, z = model.blocks[0].attn.qkv, tokens(2, 5, 24)
    full = qkv(z)
    with adapter.disabled():
        y0 = qkv(z)
    adapter.scale = 0.5
    half = qkv(z)
    assert close(half, (full + y0) / 2, EXACT)
    adapter.merge()
    assert close(qkv(z), half, EXACT)


@pytest.mark.parametrize("name", ["diffusers-SD1.5", "timm-beit_base_patch16_224", "timm-eva02_tiny_patch14_224"])
def test_repadapter_says_where_its_biases_have_no_place(name: str) -> None:
    model = BY_NAME[name].model()
    with pytest.raises(vm.InputError, match=r"has no bias.*RepAdapter\(bias=False\)"):
        vm.adapt(model, vm.RepAdapter())
    adapter = vm.adapt(model, vm.RepAdapter(bias=False, rank=4))
    assert all(m.source.a is None and m.source.u is None for m in adapter.modules.values())


def test_repadapter_drops_inner_features_of_a_called_layer() -> None:
    model = vit()
    _, (m, *_) = adapted(model, vm.RepAdapter(sites=("attn.q",), rank=4, dropout=0.5))
    check_mean(m, lambda: model.blocks[0].attn.qkv(tokens(2, 5, 24)))


def test_repadapter_drops_inner_features_of_a_shadowed_weight() -> None:
    model = BY_NAME["open_clip-CLIP"].model()
    _, (m, *_) = adapted(model, vm.RepAdapter(sites=("attn.q",), rank=4, dropout=0.5, where="visual*"))
    attn, x = model.visual.transformer.resblocks[0].attn, fixed(2, 5, 24)
    seen: list[Tensor] = []
    attn.register_forward_pre_hook(lambda layer, _: seen.append(layer.in_proj_weight.detach()))
    check_mean(m, lambda: (attn(x, x, x), seen[-1])[1])


def check_mean(module: nn.Module, run: Callable[[], Tensor]) -> None:
    """Divided by 1 - p where they are kept, the features' mean is what they are without dropout."""
    want = run()
    assert torch.equal(run(), want)
    module.train()
    draws = torch.stack([run() for _ in range(400)])
    assert draws.std(0).max() > 1e-3
    assert close(draws.mean(0), want, 0.1)


def test_repadapter_refuses_what_does_not_divide() -> None:
    with pytest.raises(vm.InputError, match="rank 3 does not divide into 2 groups"):
        vm.RepAdapter(rank=3)
    with pytest.raises(vm.InputError, match=r"24 channels of .* do not divide into 5 groups"):
        vm.adapt(vit(), vm.RepAdapter(rank=5, groups=5))
    with pytest.raises(vm.InputError, match=r"blocks\.0\.attn\.proj \(attn\.out\) is none of these"):
        vm.adapt(vit(), vm.RepAdapter(sites=("attn.out",)))


# -- counts, initial values, errors -------------------------------------------------------------------------------

COUNTS = [
    (vm.AdaptFormer(rank=64), 1_189_632),
    (vm.AdaptFormer(rank=8), 156_768),
    (vm.AdaptFormer(rank=64, layers=slice(0, 1)), 99_136),
    (vm.Houlsby(rank=8), 313_536),
    ([vm.Houlsby(rank=8), vm.Tune(sites=("norm",))], 351_936),
    (vm.Pfeiffer(rank=96), 1_779_840),
    *((vm.AdapterPlus(rank=r), n) for r, n in ((1, 36_876), (2, 55_320), (4, 92_208), (8, 165_984), (16, 313_536))),
    (vm.AdapterPlus(rank=32), 608_640),
    (vm.Convpass(rank=8), 327_552),
    (vm.Convpass(rank=8, sites=("attn",)), 163_776),
    (vm.RepAdapter(rank=8), 239_808),
    (vm.RepAdapter(rank=8, sites=("attn.*",)), 119_904),
    (vm.RepAdapter(rank=8, sites=("attn.qkv",)), 119_904),
    (vm.RepAdapter(rank=8, sites=("mlp.up",), layers=slice(0, 1)), 9_992),
]


@pytest.mark.parametrize(("method", "count"), COUNTS, ids=lambda p: str(p))
def test_vit_base_has_the_papers_count(method: Method | list[Method], count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    adapter = vm.adapt(model, method)
    assert adapter.num_parameters == count
    assert all(p.is_meta for p in adapter.parameters())


def full_width() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", depth=1, num_classes=4).eval()


def tensors(method: Method) -> dict[str, Tensor]:
    adapter = vm.adapt(full_width(), method, seed=0)
    return {n.rpartition(".")[2]: p.detach() for n, p in adapter.named_parameters()}


def is_truncated(t: Tensor, std: float) -> bool:
    """Normal, cut at two standard deviations, which leaves 0.88 of the standard deviation."""
    return bool(t.abs().max() <= 2 * std and 0.86 * std < t.std() < 0.9 * std)


def test_initial_values_are_the_official_ones() -> None:
    t = tensors(vm.AdaptFormer())
    assert 0.98 / 768**0.5 < t["down"].abs().max() <= 1 / 768**0.5  # Kaiming uniform with a = sqrt(5)
    assert not any(t[n].any() for n in ("down_bias", "up", "up_bias"))
    t = tensors(vm.Pfeiffer())
    assert 0.98 / 768**0.5 < t["down"].abs().max() <= 1 / 768**0.5
    assert not any(t[n].any() for n in ("down_bias", "up", "up_bias"))
    t = tensors(vm.Houlsby(sites=("mlp",)))
    assert is_truncated(t["down"], 1e-3)
    assert is_truncated(t["up"], 1e-3)
    assert not any(t[n].any() for n in ("down_bias", "up_bias"))
    t = tensors(vm.AdapterPlus())
    assert is_truncated(t["down"], 0.01)
    assert is_truncated(t["up"], 0.01)
    assert not any(t[n].any() for n in ("down_bias", "up_bias"))
    assert (t["gamma"] == 1).all()
    xavier = math.sqrt(6 / (768 + 8))
    t = tensors(vm.Convpass(sites=("attn",)))
    assert 0.98 * xavier < t["down"].abs().max() <= xavier
    assert torch.equal(t["conv"][:, :, 1, 1], torch.eye(8))
    assert t["conv"].sum() == 8
    assert not any(t[n].any() for n in ("down_bias", "conv_bias", "up", "up_bias"))
    t = tensors(vm.Convpass(sites=("attn",), xavier=True))
    assert 0.9 < t["conv"].abs().max() / math.sqrt(6 / (9 * 16)) <= 1
    t = tensors(vm.RepAdapter(sites=("attn.*",)))
    assert 0.98 * xavier < t["A"].abs().max() <= xavier
    assert not any(t[n].any() for n in ("a", "B", "u"))


EVERY = (vm.AdaptFormer(), vm.Houlsby(), vm.Pfeiffer(), vm.AdapterPlus(), vm.Convpass(), vm.RepAdapter())


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_no_adapter_is_dead_at_the_start_and_none_is_wiped(method: Method) -> None:
    model = vit().float()
    adapter = vm.adapt(model, method, seed=0)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())
    model(fixed(2, 3, 32, 32)).square().mean().backward()
    assert adapter.unused() == []


def test_how_far_from_the_base_the_adapters_with_two_random_factors_start() -> None:
    model = full_width()
    x = fixed(2, 197, 768)
    y0 = model.blocks[0](x)
    for method, least, most in ((vm.Houlsby(), 1e-6, 1e-3), (vm.AdapterPlus(), 1e-3, 0.02)):
        adapter = vm.adapt(model, method, seed=0)
        distance = float(((model.blocks[0](x) - y0).abs().max() / y0.abs().max()).detach())
        assert least < distance < most
        adapter.detach()


def test_adapterplus_drops_what_it_adds_for_whole_samples() -> None:
    model = vit()
    adapter, modules = adapted(model, vm.AdapterPlus(rank=3, drop_path=0.25))
    block, x = model.blocks[0], tokens(1, 5, 24).expand(64, -1, -1)
    full = block(x)[0]
    with adapter.disabled():
        y0 = block(x)[0]
    modules[0].train()
    y = block(x)
    kept = [close(sample, y0 + (full - y0) / 0.75, EXACT) for sample in y]
    dropped = [close(sample, y0, EXACT) for sample in y]
    assert all(a != b for a, b in zip(kept, dropped, strict=True))
    assert 4 < sum(dropped) < 32


@pytest.mark.parametrize("cls", [vm.AdaptFormer, vm.Convpass])
def test_dropout_only_while_training(cls: Callable[..., Method]) -> None:
    model = vit()
    _, modules = adapted(model, cls(sites=("mlp",), rank=4, dropout=0.5))
    check_mean(modules[0], lambda: model.blocks[0](tokens(2, 5, 24)))


REFUSED = [
    ("timm-resnet18", vm.AdaptFormer(sites=("conv",)), r"AdaptFormer goes on branches \(attn, xattn, mlp\); conv1 "),
    ("timm-vit_tiny_patch16_224", vm.Houlsby(sites=("block",)), r"Houlsby goes on branches .*; blocks\.0:block"),
    (
        "timm-vit_tiny_patch16_224",
        vm.AdapterPlus(sites=("attn",)),
        r"AdapterPlus goes after whole blocks; blocks\.0:attn",
    ),
    (
        "diffusers-SD1.5",
        vm.Convpass(),
        "whose stream does not say how its tokens lie in rows and columns; leave it out",
    ),
    ("open_clip-CLIP", vm.Convpass(), r"no fixed grid of patches \(a text, .*leave it out with where="),
    ("timm-swinv2_tiny_window8_256", vm.Convpass(), "whose branch has no norm before it to read from"),
]


@pytest.mark.parametrize(("name", "method", "message"), REFUSED, ids=lambda p: str(p)[:30])
def test_kinds_that_make_no_sense_are_refused_with_the_reason(name: str, method: Method, message: str) -> None:
    model = BY_NAME[name].model()
    if name == "timm-resnet18":
        message = message.replace("conv1", r"\S*conv1")
    with pytest.raises(vm.InputError, match=message):
        vm.adapt(model, method)
    assert "_vismodal" not in model._modules


@pytest.mark.parametrize(
    "make",
    [
        lambda: vm.AdaptFormer(rank=0),
        lambda: vm.AdaptFormer(dropout=1.0),
        lambda: vm.Houlsby(std=0.0),
        lambda: vm.Pfeiffer(rank=0),
        lambda: vm.AdapterPlus(drop_path=1.0),
        lambda: vm.AdapterPlus(std=0.0),
        lambda: vm.Convpass(dropout=-0.1),
        lambda: vm.RepAdapter(groups=0),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make: Callable[[], Method]) -> None:
    with pytest.raises(vm.InputError):
        make()


def test_a_span_without_a_width_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    with pytest.raises(vm.InputError, match=r"needs to know the channels of .*mlp.*Span\(\.\.\., width="):
        vm.adapt(Net(), vm.Pfeiffer(), sites={Net: (vm.Span("mlp", "mlp", "mlp"),)})
    adapter = vm.adapt(Net(), vm.Pfeiffer(), sites={Net: (vm.Span("mlp", "mlp", "mlp", width="mlp"),)})
    assert adapter.num_parameters == 2 * 4 * 64 + 64 + 4


def test_convpass_refuses_a_picture_of_another_size() -> None:
    model = BY_NAME["transformers-ViT"].model()
    vm.adapt(model, vm.Convpass())
    with pytest.raises(RuntimeError, match="Convpass was made for 2 x 2 patches and got 6"):
        model(pixel_values=fixed(1, 3, 32, 48), interpolate_pos_encoding=True)


def test_convpass_leaves_models_of_any_size_alone() -> None:
    model = vit(dynamic_img_size=True)
    with pytest.raises(vm.InputError, match="pictures of any size"):
        vm.adapt(model, vm.Convpass())
