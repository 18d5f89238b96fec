"""VPT and prefix tuning against their formulas written out by hand, and what the core does to let tokens join."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, TEXT, VISION, close, fixed, shake

import vismodal as vm
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.site import Room, Site


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = {"img_size": 32, "num_classes": 4, "depth": 2, "embed_dim": 24, "num_heads": 3} | options
    return shaken(timm.create_model(name, **made).eval())


def shaken(model: nn.Module) -> nn.Module:
    """Nothing so small (layer scale, biases) that a mistake in it would not be seen."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def swin(**options: Any) -> nn.Module:
    """Two stages of two blocks, of which the second has shifted windows and a mask."""
    torch.manual_seed(0)
    made = {"img_size": 112, "depths": (2, 2), "embed_dim": 12, "num_heads": (2, 4), "num_classes": 4} | options
    model = shaken(timm.create_model("swin_tiny_patch4_window7_224", **made).eval())
    assert model.layers[0].blocks[1].attn_mask.any()
    return model


def joined(x: Tensor, P: Tensor, place: int) -> Tensor:
    return torch.cat([x[:, :place], P.expand(len(x), -1, -1), x[:, place:]], 1)


def left(x: Tensor, p: int, place: int) -> Tensor:
    return torch.cat([x[:, :place], x[:, place + p :]], 1)


# -- VPT -------------------------------------------------------------------------------------------------------------


def test_counts_of_vpt_on_vit_base() -> None:
    for classes, tokens, tuned in ((6, 100, 926_214), (397, 5, 351_373)):
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224", num_classes=classes)
        deep = vm.adapt(model, vm.VPT(tokens=tokens), name="deep")
        shallow = vm.adapt(model, vm.VPT(sites=("tokens",), tokens=tokens), name="shallow")
        assert (deep.num_parameters, shallow.num_parameters) == (9216 * tokens, 768 * tokens)
        both = vm.adapt(model, [vm.VPT(tokens=tokens), vm.Tune(sites=("head",))], name="both")
        assert both.num_parameters == tuned
    with torch.device("meta"):
        model = timm.create_model("swin_base_patch4_window7_224")
    assert vm.adapt(model, vm.VPT(tokens=3)).num_parameters == 3 * (2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024)


def test_count_of_vpt_on_the_image_tower_of_clip() -> None:
    from open_clip.model import CLIP

    vision = {"image_size": 224, "patch_size": 16, "layers": 12, "width": 768}
    with torch.device("meta"):
        model = CLIP(512, vision, {"layers": 1, "width": 512})
    assert vm.adapt(model, vm.VPT(tokens=8, where="visual.*")).num_parameters == 73_728


def test_initial_values_of_vpt_are_the_official_ones() -> None:
    torch.manual_seed(0)
    adapter = vm.adapt(vit(embed_dim=768, num_heads=12, depth=1), vm.VPT(tokens=50))
    (P,) = adapter.parameters()
    assert math.isclose(math.sqrt(6 / (3 * 16**2 + 768)), 0.0625)
    assert 0.062 < P.abs().max() <= 0.0625
    assert abs(P.std() - 0.0625 / 3**0.5) < 1e-3


@pytest.mark.parametrize(("kind", "lengths"), [("block", [200, 200, 200]), ("tokens", [200, 200, 200])])
def test_sequence_is_longer_by_p_at_every_block_and_nowhere_else(kind: str, lengths: list[int]) -> None:
    model = vit(img_size=224, depth=3)
    vm.adapt(model, vm.VPT(sites=(kind,), tokens=3))
    seen: list[int] = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(fixed(1, 3, 224, 224))
    assert seen == [*lengths, 197]


NAMES = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_vpt_equals_the_official_rule(name: str, deep: bool) -> None:
    model = vit(name, img_size=28 if "14" in name else 32, depth=3)
    images, prefix = fixed(2, 3, *model.patch_embed.img_size), model.num_prefix_tokens
    adapter = vm.adapt(model, vm.VPT(sites=("block" if deep else "tokens",), tokens=3))
    shake(adapter, 0.5)
    prompts: list[Tensor] = list(adapter.parameters())
    seen: list[Tensor] = []
    hook = model.blocks[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = model(images)
    hook.remove()
    assert torch.equal(seen[0][1, prefix : prefix + 3], prompts[0])
    with adapter.disabled():
        x = joined(model._pos_embed(model.patch_embed(images)), prompts[0], prefix)
        for i, block in enumerate(model.blocks):
            if deep and i > 0:  # KMnP/vpt: tokens 1..p are replaced
                x = torch.cat([x[:, :prefix], prompts[i].expand(2, -1, -1), x[:, prefix + 3 :]], 1)
            x = block(x)
        assert close(y, model.forward_head(model.norm(left(x, 3, prefix))), 1e-6)
        assert not close(y, model(images), 1e-2)


def test_what_became_of_the_prompts_of_a_block_is_read_by_nothing() -> None:
    model = vit(depth=3)
    vm.adapt(model, vm.VPT(tokens=3))
    images = fixed(2, 3, 32, 32)
    y = model(images)
    noise = fixed(8, 24)
    for places, same in (((1, 2, 3), True), ((3, 4), False)):  # three prompts; one of them and a patch
        change = torch.zeros(8, 24).index_add(0, torch.tensor(places), noise[list(places)])
        handles = [b.mlp.register_forward_hook(lambda _, __, out, c=change: out + c) for b in model.blocks]
        assert torch.equal(model(images), y) == same
        for handle in handles:
            handle.remove()


def test_no_prompts_are_the_base() -> None:
    for model in (vit(), swin()):
        images = fixed(2, 3, *model.patch_embed.img_size)
        y0 = model.requires_grad_(False)(images)
        vm.adapt(model, vm.VPT(tokens=0))
        assert torch.equal(model(images), y0)


def test_dropout_acts_on_prompts_while_training() -> None:
    model = vit()
    vm.adapt(model, vm.VPT(tokens=200, dropout=0.5))
    seen: list[Tensor] = []
    model.blocks[1].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 1:201]))
    for train in (False, True):
        model.train(train)(fixed(2, 3, 32, 32))
    assert seen[0].all()
    assert 0.45 < float((seen[1] == 0).float().mean()) < 0.55
    assert not torch.equal(seen[1][0], seen[1][1])


def test_vpt_on_the_image_towers_of_both_clips() -> None:
    """Shallow prompts go through the norm before the blocks, deep ones come after it."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    torch.manual_seed(0)
    hf, ours = CLIPModel(config).eval().vision_model, BY_NAME["open_clip-CLIP"].model().visual
    images = fixed(2, 3, 32, 32)
    for kind in ("tokens", "block"):
        a = vm.adapt(hf, vm.VPT(sites=(kind,), tokens=3))
        shake(a, 0.5)
        y, P = hf(images).pooler_output, list(a.parameters())
        with a.disabled():
            x = hf.embeddings(images)
            x = hf.pre_layrnorm(joined(x, P[0], 1)) if kind == "tokens" else joined(hf.pre_layrnorm(x), P[0], 1)
            for i, layer in enumerate(hf.encoder.layers):
                x = torch.cat([x[:, :1], P[i].expand(2, -1, -1), x[:, 4:]], 1) if kind == "block" else x
                x = layer(x, None)
            assert close(y, hf.post_layernorm(x[:, 0]), 1e-6)
        a.detach()
        b = vm.adapt(ours, vm.VPT(sites=(kind,), tokens=3))
        shake(b, 0.5)
        y, P = ours(images), list(b.parameters())
        with b.disabled():
            x = ours.conv1(images).flatten(2).transpose(1, 2)
            x = torch.cat([ours.class_embedding.expand(2, 1, -1), x], 1) + ours.positional_embedding
            x = ours.ln_pre(joined(x, P[0], 1)) if kind == "tokens" else joined(ours.ln_pre(x), P[0], 1)
            for i, block in enumerate(ours.transformer.resblocks):
                x = torch.cat([x[:, :1], P[i].expand(2, -1, -1), x[:, 4:]], 1) if kind == "block" else x
                x = block(x)
            assert close(y, ours.ln_post(x[:, 0]) @ ours.proj, 1e-6)
        b.detach()


# -- Swin ------------------------------------------------------------------------------------------------------------


def prompted_block(block: Any, x: Tensor, prompts: Sequence[Tensor], k: Tensor | None = None, v: Tensor | None = None):
    """The official block on b h w c: prompts in front of every window, bias and mask padded with zeros."""
    b, h, w, c = x.shape
    side, shift, attn = block.window_size[0], block.shift_size[0], block.attn
    n, H = side * side, attn.num_heads
    z = block.norm1(x).roll((-shift, -shift), (1, 2))
    z = z.view(b, h // side, side, w // side, side, c).transpose(2, 3).reshape(-1, n, c)
    P = torch.cat([block.norm1(P) for P in prompts])
    z = torch.cat([P.expand(len(z), -1, -1), z], 1)
    q, keys, values = attn.qkv(z).chunk(3, -1)
    if k is not None:
        keys, values = (torch.cat([t.expand(len(z), -1, -1), u], 1) for t, u in ((k, keys), (v, values)))
    q, keys, values = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, keys, values))
    scores = (q / math.sqrt(c // H)) @ keys.transpose(-1, -2)  # windows heads p+n (k+)p+n
    bias = attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
    scores[:, :, len(P) :, -n:] += bias
    if block.attn_mask is not None:
        scores[:, :, len(P) :, -n:] += block.attn_mask.repeat(b, 1, 1)[:, None]
    out = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    out = attn.proj(out)[:, len(P) :].view(b, h // side, w // side, side, side, c).transpose(2, 3).reshape(b, h, w, c)
    x = x + out.roll((shift, shift), (1, 2))
    return x + block.mlp(block.norm2(x))


def swin_by_hand(model: Any, images: Tensor, prompts: Sequence[Sequence[Tensor]], keys: Sequence[Any] = ()) -> Tensor:
    x, i = model.patch_embed(images), 0
    for stage in model.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            x = prompted_block(block, x, prompts[i], *(keys[i] if keys else ()))
            i += 1
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("fused", [False, True])
def test_vpt_on_swin_equals_the_official_block(fused: bool) -> None:
    model, images = swin(), fixed(2, 3, 112, 112)
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.fused_attn = fused
    adapter = vm.adapt(model, vm.VPT(tokens=3))
    shake(adapter, 0.5)
    y = model(images)
    with adapter.disabled():
        assert close(y, swin_by_hand(model, images, [[P] for P in adapter.parameters()]), 1e-6)
        assert not close(y, model(images), 1e-2)


def test_prompts_of_swin_are_normed_as_the_stream_is() -> None:
    """The norm may itself be tuned, and other spans may begin at it."""
    model, images = swin(), fixed(2, 3, 112, 112)
    tune = vm.adapt(model, vm.Tune(sites=("norm",)), name="tune")
    beside = vm.adapt(model, vm.AdaptFormer(sites=("attn",), rank=2), name="beside")  # zero at the start
    adapter = vm.adapt(model, vm.VPT(tokens=3), name="vpt")
    shake(adapter, 0.5)
    shake(tune, 0.5)
    y = model(images)
    y.square().sum().backward()
    assert beside.unused() == adapter.unused() == tune.unused() == []
    tune.merge()
    assert close(model(images), y, 1e-5)
    with adapter.disabled():
        assert close(y, swin_by_hand(model, images, [[P] for P in adapter.parameters()]), 1e-5)


def test_prompts_and_prefixes_of_several_adapters_in_windows() -> None:
    model, images = swin(), fixed(2, 3, 112, 112)
    a, b = (vm.adapt(model, vm.VPT(tokens=n), name=f"vpt{n}") for n in (2, 3))
    c, d = (vm.adapt(model, vm.Prefix(tokens=n), name=f"prefix{n}") for n in (1, 4))
    for adapter in (a, b, c, d):
        shake(adapter, 0.5)
    y = model(images)
    prompts = list(zip(a.parameters(), b.parameters(), strict=True))
    keys = [torch.cat([P, Q], 1) for P, Q in zip(c.parameters(), d.parameters(), strict=True)]
    vm.use(model)
    assert close(y, swin_by_hand(model, images, prompts, keys), 1e-6)


def test_swin_is_exact_under_checkpointing_and_compiles_whole() -> None:
    gradients, images = [], fixed(2, 3, 112, 112)
    for on in (False, True):
        model = swin(drop_path_rate=0.0).train()
        model.set_grad_checkpointing(on)
        adapter = vm.adapt(model, [vm.VPT(tokens=2), vm.Prefix(tokens=2)], seed=0)
        shake(adapter)
        model(images).square().mean().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(close(b, a, 1e-5) for a, b in zip(*gradients, strict=True))
    model.set_grad_checkpointing(False)
    y = model(images)
    torch._dynamo.reset()
    assert close(torch.compile(model, backend="eager", fullgraph=True)(images), y, 1e-6)


def test_nothing_stands_in_after_an_exception() -> None:
    model = swin()
    adapter = vm.adapt(model, [vm.VPT(tokens=2), vm.Prefix(tokens=2)])
    attn = model.layers[0].blocks[1].attn
    before = dict(attn.__dict__)
    handle = attn.proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(fixed(1, 3, 112, 112))
    handle.remove()
    assert attn.__dict__.keys() == before.keys()
    assert attn._get_rel_pos_bias.__func__ is type(attn)._get_rel_pos_bias
    y = model(fixed(1, 3, 112, 112))
    adapter.detach()
    vm.adapt(model, [vm.VPT(tokens=2), vm.Prefix(tokens=2)], seed=1).detach()
    assert y.shape == model(fixed(1, 3, 112, 112)).shape


# -- prefix tuning ---------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def front(P: Tensor, x: Tensor) -> Tensor:
    return torch.cat([P.expand(len(x), -1, -1), x], 1)  # the formula's order: K' = [P_k; K]


def test_counts_of_prefix_tuning_on_vit_base() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert vm.adapt(model, vm.Prefix(tokens=10)).num_parameters == 18_432 * 10
    deep = vm.adapt(model, vm.Prefix(tokens=10, hidden=512), name="perceptron").num_parameters
    assert deep == 10 * 768 + (768 + 1) * 512 + 12 * (512 + 1) * 2 * 768


def test_prefix_in_timm() -> None:
    model = vit("vit_tiny_patch16_224", qk_norm=True)
    a, b = (vm.adapt(model, vm.Prefix(tokens=n), name=f"p{n}") for n in (2, 3))
    shake(a, 0.5)
    shake(b, 0.5)
    attn, x = model.blocks[1].attn, fixed(2, 5, 24)
    y = attn(x)
    P = torch.cat([list(m.parameters())[1] for m in (a, b)], 1)
    vm.use(model)
    q, k, v = attn.qkv(x).chunk(3, -1)
    k, v = front(P[0], k), front(P[1], v)
    q, k = (norm(t.unflatten(-1, (3, 8))).flatten(2) for norm, t in ((attn.q_norm, q), (attn.k_norm, k)))
    assert close(y, attn.proj(attend(q, k, v, 3)), 1e-6)
    assert not close(y, attn(x), 1e-2)


def test_prefix_in_transformers() -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    for implementation in ("eager", "sdpa"):
        config = ViTConfig(**VISION, attn_implementation=implementation)
        model = ViTModel(config, add_pooling_layer=False).eval()
        adapter = vm.adapt(model, vm.Prefix(tokens=3))
        shake(adapter, 0.5)
        attn, x, P = model.layers[1].attention, fixed(2, 5, 24), list(adapter.parameters())[1]
        y = attn(x)[0]
        with adapter.disabled():
            want = attend(attn.q_proj(x), front(P[0], attn.k_proj(x)), front(P[1], attn.v_proj(x)), 2)
            assert close(y, attn.o_proj(want), 1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_prefix_in_multi_head_attention(train: bool) -> None:
    model = BY_NAME["open_clip-CLIP"].model().visual.train(train)
    a, b = (vm.adapt(model, vm.Prefix(tokens=n), name=f"p{n}") for n in (2, 3))
    shake(a, 0.5)
    shake(b, 0.5)
    attn, x = model.transformer.resblocks[1].attn, fixed(2, 5, 24)
    y = attn(x, x, x, need_weights=False)[0]
    assert attn.bias_k is attn.bias_v is None
    P = torch.cat([list(m.parameters())[1] for m in (a, b)], 1)
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    assert close(y, attn.out_proj(attend(q, front(P[0], k), front(P[1], v), 2)), 1e-6)
    torch._dynamo.reset()
    images = fixed(2, 3, 32, 32)
    assert close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images), 1e-6)


@pytest.mark.parametrize("kind", ["keys", "xattn.keys"])
def test_prefix_in_a_unet(kind: str) -> None:
    model = BY_NAME["diffusers-SD1.5"].model()
    adapter = vm.adapt(model, vm.Prefix(sites=(kind,), tokens=3))
    shake(adapter, 0.5)
    (name, P), *_ = ((n, p) for n, p in adapter.named_parameters() if "up_blocks" in n)
    block = model.get_submodule(name.partition("/")[2].partition(":")[0])
    attn, heads = (block.attn1, block.attn1.heads) if kind == "keys" else (block.attn2, block.attn2.heads)
    x, text = fixed(2, 6, attn.to_q.in_features), fixed(2, 3, attn.to_k.in_features)
    context = x if kind == "keys" else text
    y = attn(x, encoder_hidden_states=None if kind == "keys" else text)
    with adapter.disabled():
        want = attend(attn.to_q(x), front(P[0], attn.to_k(context)), front(P[1], attn.to_v(context)), heads)
        assert close(y, attn.to_out[0](want), 1e-6)


def test_prefixes_out_of_a_perceptron() -> None:
    model = vit()
    adapter = vm.adapt(model, vm.Prefix(tokens=3, hidden=5))
    shake(adapter, 0.5)
    trunk, module = adapter._parts[0].shared["prefix/shared"], adapter.modules["prefix/blocks.1.attn:keys"]
    attn, x = model.blocks[1].attn, fixed(2, 5, 24)
    P = F.linear(torch.tanh(F.linear(trunk.E, trunk.W1, trunk.b1)), module.W2, module.b2)  # p 2d
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).chunk(3, -1)
    assert close(attn(x), attn.proj(attend(q, front(P[:, :24], k), front(P[:, 24:], v), 3)), 1e-6)
    model(fixed(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


# -- what cannot take tokens -----------------------------------------------------------------------------------------

REFUSED = [
    ("timm-beit_base_patch16_224", vm.VPT(), r"relative position bias is made for a fixed number"),
    ("timm-eva02_tiny_patch14_224", vm.VPT(sites=("tokens",)), r"rotary positions are given to every token"),
    ("timm-swinv2_tiny_window8_256", vm.VPT(), r"tokens are rows and columns that are cut into windows"),
    ("timm-convnext_tiny", vm.VPT(), r"no stream of tokens"),
    ("open_clip-CLIP", vm.VPT(), r"made for a fixed number of tokens; where='visual\.\*' takes those that can"),
    ("transformers-CLIP", vm.VPT(), r"text_model.*made for a fixed number.*where='vision_model\.\*'"),
    ("transformers-CLIPText", vm.VPT(), r"made for a fixed number of tokens$"),
    ("timm-vit_tiny_patch16_224", vm.VPT(sites=("mlp",)), r"prompts go to the blocks, sites=\('block',\)"),
    ("timm-vit_tiny_patch16_224", vm.VPT(sites=("attn.q",)), r"prompts go to the blocks"),
    ("transformers-CLIP", vm.Prefix(), r"made for a fixed number.*where='vision_model\.\*'"),
    ("timm-vit_tiny_patch16_224", vm.Prefix(sites=("mlp",)), r"keys and values go to attention, sites=\('keys',\)"),
    ("timm-beit_base_patch16_224", vm.Prefix(), r"relative position bias is made for a fixed number"),
    ("timm-eva02_tiny_patch14_224", vm.Prefix(), r"rotary positions are given to every token"),
    ("timm-swinv2_tiny_window8_256", vm.Prefix(), r"tokens are rows and columns that are cut into windows"),
    ("open_clip-own-attention", vm.Prefix(where="visual.*"), r"computes its keys and values within"),
    ("timm-eva02_tiny_patch14_224", vm.UniPELT(), r"rotary positions are given to every token"),
]


@pytest.mark.parametrize(("name", "method", "reason"), REFUSED, ids=[f"{n}-{m!r}" for n, m, _ in REFUSED])
def test_refused_with_the_reason(name: str, method: Method, reason: str) -> None:
    model = BY_NAME[name].model()
    with pytest.raises(vm.InputError, match=reason):
        vm.adapt(model, method)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_options_out_of_range() -> None:
    for make in (lambda: vm.VPT(tokens=-1), lambda: vm.VPT(dropout=1.0), lambda: vm.Prefix(tokens=0)):
        with pytest.raises(vm.InputError, match=r"at least"):
            make()


# -- the core: values that stand in, and modules run aside -----------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))
        self.gain = 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.gain * x * self.weight
        return y if mask is None else mask @ y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(3), Scaled()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner(self.norm(x), mask=mask)


class Standing(SpanModule):
    """Triples the weight, by way of the one that stands there already, and joins a normed token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.tensor([[1.0, 2.0, 4.0]]))

    def values(self, module: nn.Module, context: dict[str, Any]) -> dict[str, Any]:
        return {"weight": 3 * module.weight, "further": 1}

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return torch.cat([x, context["aside"]("norm", self.token).expand(len(x), 1, 3)], 1)

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y[:, :-1]


@dataclass(frozen=True, kw_only=True)
class Stand(Method):
    sites: tuple[str, ...] = ("inner",)
    survey: ClassVar[str] = "none"
    paper: ClassVar[str] = "none"
    mergeable: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(Standing() for _ in sites))


def test_values_stand_in_while_a_module_runs_and_its_masks_grow() -> None:
    room = Room(lambda module, more: {"gain": module.gain + more}, masks=("mask",))
    span = vm.Span("inner", "inner", "inner", {"norm": "norm"}, room={"enter": room})
    net, x, mask = Net(), fixed(2, 4, 3), fixed(4, 4)
    for name in "ab":
        vm.adapt(net, Stand(), name, sites={Net: (span,)})
    before = dict(net.inner.__dict__)
    y = net(x, mask)
    # two modules join two tokens: the gain 1 grows by 2, the weight 2 becomes 3 * 3 * 2, the mask lets none of them in
    assert close(y, 3.0 * 18 * (mask @ net.norm(x)), 1e-6)
    assert net.inner.__dict__ == before
    assert net.inner.weight.tolist() == [2, 2, 2]
    vm.use(net)
    assert close(net(x, mask), 2 * (mask @ net.norm(x)), 1e-6)
