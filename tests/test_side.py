"""Side networks: each formula by hand, the published sizes, and that the backbone keeps nothing for a backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, close, fixed, shake

import vismodal as vm
from vismodal.methods import Method

DEPTH, WIDTH = 4, 24


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 48, "num_classes": 4, "depth": DEPTH, "embed_dim": WIDTH, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **(sizes | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def attach(model: nn.Module, method: Method, size: float = 0.2) -> Any:
    """The one module of the method, moved away from its initial values."""
    adapter = vm.adapt(model, method, seed=0)
    shake(adapter, size)
    (module,) = adapter.modules.values()
    return module


PICTURES = fixed(2, 3, 48, 48)


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (vm.DTL(), 36_864),
        (vm.DTL(kernel=3), 43_776),
        (vm.ResTuningBypass(), 1_198_848),
        (vm.Ladder(), 2_376_492),
        (vm.SideTuning(side="copy"), 85_798_656 + 1),
    ],
    ids=repr,
)
def test_published_counts_on_vit_base(method: Method, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert vm.adapt(model, method).num_parameters == count


def test_published_counts_on_swin_base() -> None:
    """0.09M and 0.13M: the stages before block 14 are read by none of its maps, and have none."""
    with torch.device("meta"):
        model = timm.create_model("swin_base_patch4_window7_224")
    assert vm.adapt(model, vm.DTL(rank=4, start=14)).num_parameters == 90_112
    assert vm.adapt(model, vm.DTL(rank=4, start=14, kernel=5), name="plus").num_parameters == 128_512


# -- formulas by hand ------------------------------------------------------------------------------------------------


def swish(s: Tensor) -> Tensor:
    return s * torch.sigmoid(100 * s)


@pytest.mark.parametrize("start", [None, 0, 3])
def test_dtl_by_hand(start: int | None) -> None:
    model = vit()
    m = attach(model, vm.DTL(rank=3, start=start))
    base = copy.deepcopy(model)
    vm.use(base)
    x, s = base._pos_embed(base.patch_embed(PICTURES)), torch.zeros(())
    for i, block in enumerate(base.blocks):
        s = s + x @ m.A[i].T @ m.B[i].T
        x = block(x)
        if i >= (DEPTH // 2 if start is None else start):
            x = x + swish(s)
    assert close(model(PICTURES), base.forward_head(base.norm(x)), 1e-5)


def test_dtl_plus_by_hand() -> None:
    """Class and registers as they are, patches of 3 x 3 convolved channel by channel with zeros around."""
    model = vit(reg_tokens=2, global_pool="avg")
    m = attach(model, vm.DTL(kernel=3))
    base = copy.deepcopy(model)
    vm.use(base)
    x, s = base._pos_embed(base.patch_embed(PICTURES)), torch.zeros(())
    for i, block in enumerate(base.blocks):
        s = s + x @ m.A[i].T @ m.B[i].T
        x = block(x)
        if i >= 2:
            h = swish(s)
            padded = F.pad(h[:, 3:].reshape(2, 3, 3, WIDTH), (0, 0, 1, 1, 1, 1))
            moved = [
                padded[:, r : r + 3, c : c + 3] * m.K[:, 0, r, c]  # b 3 3 c
                for r in range(3)
                for c in range(3)
            ]
            x = x + torch.cat([h[:, :3], torch.stack(moved).sum(0).reshape(2, 9, WIDTH)], 1)
    assert close(model(PICTURES), base.forward_head(base.norm(x)), 1e-5)


def test_dtl_of_swin_begins_anew_in_each_stage() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 56, "num_classes": 4, "depths": (2, 2), "embed_dim": 12, "num_heads": (2, 4)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval()
    adapter = vm.adapt(model, vm.DTL(start=1, kernel=3), seed=0)
    shake(adapter, 0.2)
    base = copy.deepcopy(model)
    vm.use(base)
    pictures = fixed(2, 3, 56, 56)
    x, done = base.patch_embed(pictures), 0  # b h w c
    for layer, m in zip(base.layers, adapter.modules.values(), strict=True):
        x, s = layer.downsample(x), torch.zeros(())
        for j, block in enumerate(layer.blocks):
            s = s + x @ m.A[j].T @ m.B[j].T
            x = block(x)
            if done >= 1:
                h = swish(s).permute(0, 3, 1, 2)
                x = x + F.conv2d(h, m.K, padding=1, groups=h.shape[1]).permute(0, 2, 3, 1)
            done += 1
    assert close(model(pictures), base.forward_head(base.norm(x)), 1e-5)


def test_dtl_of_a_unet_goes_from_encoder_to_decoder_at_each_resolution() -> None:
    case = BY_NAME["diffusers-SD1.5"]
    model = case.model().requires_grad_(False)
    adapter = vm.adapt(model, vm.DTL(), seed=0)
    shake(adapter, 0.2)
    base = copy.deepcopy(model)
    vm.use(base)
    assert list(adapter.modules) == ["dtl/:features.stage.0", "dtl/:features.stage.1"]
    for level, m in enumerate(adapter.modules.values()):
        seen: list[Tensor] = []

        def gather(y: Tensor, m: Any = m, seen: list[Tensor] = seen) -> None:
            if len(seen) < len(m.A):
                i = len(seen)
                seen.append(torch.einsum("bchw,rc,or->bohw", y, m.A[i], m.B[i]))

        def down(_: nn.Module, __: Any, y: Tensor, gather: Any = gather) -> None:
            gather(y)

        def up(_: nn.Module, __: Any, y: Tensor, gather: Any = gather, seen: list[Tensor] = seen) -> Tensor:
            y = y + swish(torch.stack(seen).sum(0))
            gather(y)
            return y

        assert len(m.A) == 2  # one block of the encoder, two of the decoder, whose last is read by none
        for resnet in base.down_blocks[level].resnets:
            resnet.register_forward_hook(down)
        for resnet in base.up_blocks[-1 - level].resnets:
            resnet.register_forward_hook(up)
    want = case.run(base)
    assert close(case.run(model), want, 1e-5)


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def side_block(x: Tensor, b: Any) -> Tensor:
    """softmax(q k / sqrt(e)) v of every head, and gelu between two matrices; both on the normed stream."""
    n, mixed = layer_norm(x, b.norm1), []
    for rows in torch.arange(x.shape[-1]).chunk(b.heads):
        q, k, v = (n @ f.weight[rows].T + f.bias[rows] for f in (b.q, b.k, b.v))
        mixed.append((q @ k.transpose(1, 2) / len(rows) ** 0.5).softmax(-1) @ v)
    x = x + torch.cat(mixed, -1) @ b.out.weight.T + b.out.bias
    n = layer_norm(x, b.norm2)
    h = n @ b.up.weight.T + b.up.bias
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    return x + h @ b.down.weight.T + b.down.bias


def test_ladder_by_hand() -> None:
    model = vit()
    m = attach(model, vm.Ladder(reduction=2, head=4))
    base = copy.deepcopy(model)
    vm.use(base)
    x = base._pos_embed(base.patch_embed(PICTURES))
    s = x @ m.down[0].T + m.down_bias[0]
    for i, block in enumerate(base.blocks):
        x, g = block(x), 1 / (1 + torch.exp(-m.gate[i] / 0.1))
        s = side_block(g * s + (1 - g) * (x @ m.down[i + 1].T + m.down_bias[i + 1]), m.blocks[i])
    out = layer_norm(s, m.norm) @ m.up.T + m.up_bias
    assert close(model(PICTURES), base.forward_head(out), 1e-5)  # in place of what the final norm puts out


def test_ladder_starts_with_gates_half_open_and_the_official_spread() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    (m,) = vm.adapt(model, vm.Ladder(reduction=2), seed=0).modules.values()
    assert not m.gate.any()
    assert 0.0098 < m.down[0].std() < 0.0102
    assert 0.0098 < m.up.std() < 0.0102
    assert not m.up_bias.any()


def test_side_blocks_that_keep_everything_are_the_base_blocks() -> None:
    model = vit()
    adapter = vm.adapt(model, vm.Ladder(reduction=1, head=8))
    (m,) = adapter.modules.values()
    x = fixed(2, 10, WIDTH)
    for block, side in zip(model.blocks, m.blocks, strict=True):
        with adapter.disabled():
            assert close(side(x), block(x), 1e-5)


def test_side_blocks_of_texts_look_back_only_and_gated_ones_keep_their_gate() -> None:
    model = BY_NAME["open_clip-CLIP"].model()
    adapter = vm.adapt(model, vm.Ladder(reduction=1, head=12))
    m = adapter.modules["ladder/:features"]
    assert not adapter.modules["ladder/visual:features"].blocks[0].causal
    x, block = fixed(2, 8, 24), model.transformer.resblocks[0]
    with adapter.disabled():
        assert close(m.blocks[0](x), block(x, attn_mask=model.attn_mask), 1e-4)  # its norms have another epsilon
    model = BY_NAME["transformers-Dinov2-swiglu"].model()
    (m,) = vm.adapt(model, vm.Ladder(reduction=1, head=12)).modules.values()
    mlp, x = model.encoder.layer[0].mlp, fixed(2, 5, 24)
    side = m.blocks[0]
    assert close(side.down(F.silu(side.gate(x)) * side.up(x)), mlp(x), 1e-5)


def test_pruning_keeps_the_largest_rows_of_one_set_of_channels() -> None:
    model = vit()
    adapter = vm.adapt(model, vm.Ladder(reduction=2, head=4))
    (m,) = adapter.modules.values()
    score = sum(W.abs().sum(1) for b in model.blocks for W in (b.attn.proj.weight, b.mlp.fc2.weight))
    channels = sorted(range(WIDTH), key=lambda c: -float(score[c]))[:12]
    channels.sort()
    for block, side in zip(model.blocks, m.blocks, strict=True):
        qkv = block.attn.qkv.weight.view(3, 3, 8, WIDTH)[..., channels]  # q k v, heads, rows, channels
        rows = [
            8 * head + r
            for head in range(3)
            for r in sorted(sorted(range(8), key=lambda r: -float(qkv[:, head, r].abs().sum()))[:4])
        ]
        assert torch.equal(side.v.weight, block.attn.qkv.weight[48:][rows][:, channels])
        assert torch.equal(side.k.bias, block.attn.qkv.bias[24:48][rows])
        assert torch.equal(side.out.weight, block.attn.proj.weight[channels][:, rows])
        assert torch.equal(side.norm2.weight, block.norm2.weight[channels])
        size = block.mlp.fc1.weight[:, channels].abs().sum(1)
        hidden = sorted(sorted(range(96), key=lambda r: -float(size[r]))[:48])
        assert torch.equal(side.up.weight, block.mlp.fc1.weight[hidden][:, channels])
        assert torch.equal(side.down.weight, block.mlp.fc2.weight[channels][:, hidden])
        assert torch.equal(side.down.bias, block.mlp.fc2.bias[channels])


def tuner(z: Tensor, t: Any) -> Tensor:
    h = z @ t.down.T + t.down_bias
    return z + 0.5 * h * (1 + torch.erf(h / 2**0.5)) @ t.up.T + t.up_bias


def test_res_tuning_by_hand() -> None:
    model = vit()
    m = attach(model, vm.ResTuningBypass(rank=5))
    base = copy.deepcopy(model)
    vm.use(base)
    x = b = base._pos_embed(base.patch_embed(PICTURES))
    for i, block in enumerate(base.blocks):
        x = block(x)
        b = tuner(b, m.vertical[i]) + tuner(x, m.horizontal[i])
    assert close(model(PICTURES), base.forward_head(base.norm(b)), 1e-5)


def test_res_tuning_of_a_unet_by_hand() -> None:
    case = BY_NAME["diffusers-SD1.5"]
    model = case.model().requires_grad_(False)
    y0 = case.run(model)
    adapter = vm.adapt(model, vm.ResTuningBypass(sites=("decoder",), rank=4), seed=0)
    assert close(case.run(model), y0, 1e-6), "the last tuners and the convolutions begin at zero"
    shake(adapter, 0.2)
    (m,) = adapter.modules.values()
    base = copy.deepcopy(model)
    vm.use(base)
    xs: list[Tensor] = []
    base.mid_block.register_forward_pre_hook(lambda _, args: xs.append(args[0]))
    for block in (base.mid_block, *base.up_blocks):
        block.register_forward_hook(lambda _, __, y: xs.append(y))

    def last(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        b = xs[0].movedim(1, -1)
        for i, x in enumerate(xs[1:]):
            if i:
                b = b.movedim(-1, 1)
                twice = b.repeat_interleave(x.shape[2] // b.shape[2], 2).repeat_interleave(x.shape[3] // b.shape[3], 3)
                b = F.conv2d(twice, m.upsample[i - 1].weight, m.upsample[i - 1].bias, padding=1).movedim(1, -1)
            b = tuner(b, m.vertical[i]) + tuner(x.movedim(1, -1), m.horizontal[i])
        return (b.movedim(-1, 1),)

    base.conv_norm_out.register_forward_pre_hook(last)
    assert close(case.run(model), case.run(base), 1e-5)


@pytest.mark.parametrize("side", ["fcn4", "test_resnet", "copy"])
def test_side_tuning_by_hand(side: str) -> None:
    model = vit()
    m = attach(model, vm.SideTuning(side=side, alpha=0.5), 0.05)
    base = copy.deepcopy(model)
    vm.use(base)
    share = 1 / (1 + torch.exp(-m.alpha))
    encoding = base.forward_head(base.forward_features(PICTURES), pre_logits=True)
    want = base.head(share * encoding + (1 - share) * m.side.eval()(PICTURES))
    assert close(model(PICTURES), want, 1e-5)


def test_side_tuning_counts_both_half_and_copies_what_it_is_told() -> None:
    model = vit()
    y0, head = model(PICTURES), model.head
    whole = vm.adapt(model, vm.SideTuning(side="copy"))
    assert close(model(PICTURES), y0, 1e-5)  # half the base and half its copy
    assert next(iter(whole.modules.values())).alpha == 0
    whole.detach()
    (m,) = vm.adapt(model, vm.SideTuning(side="copy", blocks=1)).modules.values()
    assert len(m.side.blocks) == 1
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(PICTURES))
        want = model.norm(copy.deepcopy(model.blocks[0])(x))[:, 0]
    assert close(m.side(PICTURES), want, 1e-6)
    assert model.head is head


def test_side_tuning_of_tokens_and_of_a_unet_by_hand() -> None:
    case = BY_NAME["transformers-ViT"]
    model = case.model().requires_grad_(False)
    m = attach(model, vm.SideTuning())
    base = copy.deepcopy(model)
    vm.use(base)
    tokens = base.vit(fixed(2, 3, 32, 32)).last_hidden_state
    want = base.classifier((tokens / 2 + m.side(fixed(2, 3, 32, 32))[:, None] / 2)[:, 0])
    with torch.no_grad():
        m.alpha.zero_()
    assert close(case.run(model), want, 1e-5)

    case = BY_NAME["diffusers-SD1.5"]
    model = case.model().requires_grad_(False)
    y0 = case.run(model)
    m = attach(model, vm.SideTuning(alpha=2.0), 0.05)
    share = torch.sigmoid(m.alpha)
    assert close(case.run(model), share * y0 + (1 - share) * m.side(fixed(2, 4, 8, 8)), 1e-5)


# -- the frozen backbone has no graph --------------------------------------------------------------------------------


@contextmanager
def saved() -> Iterator[dict[int, torch.UntypedStorage]]:
    """What autograd keeps, by address; held, so that no address comes twice."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def size(kept: dict[int, torch.UntypedStorage], model: nn.Module) -> int:
    """Bytes without those of parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(s.nbytes() for address, s in kept.items() if address not in parameters)


def graphs(blocks: Any, run: Callable[[], object]) -> list[bool]:
    """Which of the modules put out a tensor with a graph, all adapters having acted on it."""
    found: list[bool] = []
    handles = [
        b.register_forward_hook(
            lambda _, __, y: found.append((y[0] if isinstance(y, tuple) else y).grad_fn is not None)
        )
        for b in blocks
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("start", [0, 2, 3])
def test_dtl_has_no_graph_before_the_first_write_back(start: int) -> None:
    model = vit()
    shake(vm.adapt(model, vm.DTL(start=start)))
    assert graphs(model.blocks, lambda: model(PICTURES)) == [i >= start for i in range(DEPTH)]


@pytest.mark.parametrize("method", [vm.Ladder(reduction=2, head=4), vm.SideTuning()], ids=repr)
def test_no_block_has_a_graph_beside_a_side(method: Method) -> None:
    model = vit()
    shake(adapter := vm.adapt(model, method))
    assert not any(graphs([*model.blocks, model.patch_embed], lambda: model(PICTURES).sum().backward()))
    assert adapter.unused() == []


def test_only_the_end_of_the_last_block_has_a_graph_beside_a_bypass() -> None:
    model = vit()
    shake(vm.adapt(model, vm.ResTuningBypass()))
    assert graphs(model.blocks, lambda: model(PICTURES)) == [False] * (DEPTH - 1) + [True]  # b stands there
    assert not any(graphs([b.drop_path2 for b in model.blocks], lambda: model(PICTURES)))


@pytest.mark.parametrize("method", [vm.DTL(), vm.ResTuningBypass(sites=("decoder",)), vm.SideTuning()], ids=repr)
def test_a_unet_has_no_graph_before_the_decoder_and_none_at_all_beside_a_bypass(method: Method) -> None:
    case = BY_NAME["diffusers-SD1.5"]
    model = case.model()
    shake(vm.adapt(model, method))
    down = [resnet for block in model.down_blocks for resnet in block.resnets]
    up = [resnet for block in model.up_blocks for resnet in block.resnets]
    assert not any(graphs([*down, model.mid_block], lambda: case.run(model)))
    assert graphs(up, lambda: case.run(model)) == [isinstance(method, vm.DTL)] * len(up)


def test_what_dtl_keeps_of_the_first_blocks_is_what_its_maps_read() -> None:
    """Of every block before the write-back its input, for the gradient of A, and A x, for that of B: to the byte."""
    model, rank, start = vit(), 2, 3
    shake(vm.adapt(model, vm.DTL(rank=rank, start=start)))
    before: list[int] = []
    with saved() as kept:
        model.blocks[start].register_forward_pre_hook(lambda *_: before.append(size(kept, model)))
        model(PICTURES)
    tokens = 2 * 10
    assert before == [4 * tokens * (WIDTH + rank) * (start + 1)]


def test_saved_bytes_of_a_deep_model() -> None:
    """On twelve blocks: what LoRA keeps, DTL keeps about half of, and ladder and bypass a small part."""
    sizes = {}
    methods = {"lora": vm.LoRA(rank=2), "dtl": vm.DTL(), "ladder": vm.Ladder(reduction=8, head=8)}
    for name, method in methods.items():
        model = vit(depth=12, embed_dim=192)
        shake(vm.adapt(model, method))
        with saved() as kept:
            model(PICTURES)
        sizes[name] = size(kept, model)
    assert sizes["dtl"] < 0.6 * sizes["lora"]
    assert sizes["ladder"] < 0.3 * sizes["lora"]
    base = vit(depth=12, embed_dim=192).requires_grad_(False)
    with saved() as kept:
        base(PICTURES)
    assert not kept


# -- recomputation, company, files, errors ---------------------------------------------------------------------------

METHODS = (vm.DTL(kernel=3, start=1), vm.Ladder(reduction=2, head=4), vm.ResTuningBypass(rank=4), vm.SideTuning())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_exact_when_blocks_run_again(method: Method) -> None:
    results = []
    for on in (False, True):
        model = vit()
        model.set_grad_checkpointing(on)
        shake(adapter := vm.adapt(model, method, seed=0))
        y = model(PICTURES)
        y.square().mean().backward()
        results.append([y, *(p.grad for p in adapter.parameters())])
    assert all(close(b, a, 1e-6) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_prompts_of_others_pass(method: Method) -> None:
    """Joined around all blocks, so the side sees them too; they are gone again where the ladder ends."""
    model = vit()
    adapter = vm.adapt(model, [vm.VPT(sites=("tokens",), tokens=2), method])
    shake(adapter)
    y = model(PICTURES)
    y.sum().backward()
    assert y.shape == (2, 4)
    # a side that detaches what it reads lets no gradient through to what others do in the backbone, and that is told
    assert adapter.unused() == (["vpt/:tokens"] if isinstance(method, vm.Ladder | vm.ResTuningBypass) else [])


def test_prompts_of_others_are_not_convolved() -> None:
    model = vit()
    adapter = vm.adapt(model, [vm.VPT(sites=("tokens",), tokens=2), vm.DTL(kernel=3)])
    module = adapter.modules["dtl/:features"]
    h = fixed(1, 12, WIDTH)
    assert torch.equal(module._convolved(h, 2)[:, :3], h[:, :3])
    assert torch.equal(module._convolved(h, 2)[:, 3:], module._convolved(h[:, 2:], 0)[:, 1:])


def test_half_the_scale_halves_each_write_back() -> None:
    model = vit()
    base = model(PICTURES)
    adapter = vm.adapt(model, vm.DTL(start=DEPTH - 1))  # one write-back, which the final norm and the head then read
    shake(adapter, 0.2)
    seen: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for scale in (1, 0.5, 0):
        adapter.scale = scale
        y = model(PICTURES)
    assert close(seen[1], (seen[0] + seen[2]) / 2, 1e-6)
    assert close(y, base, 1e-6)


def test_running_statistics_of_a_side_are_saved(tmp_path: Path) -> None:
    model = vit().train()
    adapter = vm.adapt(model, vm.SideTuning(side="test_resnet"))
    model(PICTURES)
    model.eval()
    y = model(PICTURES)
    vm.save(adapter, tmp_path / "a.safetensors")
    adapter.detach()
    vm.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(PICTURES), y)


def test_a_copied_side_learns_alone() -> None:
    model = vit()
    adapter = vm.adapt(model, vm.SideTuning(side="copy"))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(PICTURES).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    (m,) = adapter.modules.values()
    assert not torch.equal(m.side.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("timm-vit_tiny_patch16_224", vm.Ladder(), r"24 channels, which reduction=8 and head=8 do not divide"),
        ("timm-swin_tiny_patch4_window7_224", vm.Ladder(), r"no site of kind 'features'"),
        ("timm-swin_tiny_patch4_window7_224", vm.Ladder(sites=("features.stage",)), r"one width over all blocks"),
        ("timm-swin_tiny_patch4_window7_224", vm.ResTuningBypass(sites="features.stage"), r"one width over all blocks"),
        ("diffusers-SD1.5", vm.Ladder(), r"no site of kind 'features'"),
        ("diffusers-SD1.5", vm.SideTuning(side="resnet18"), r"puts out a map, and 'resnet18' a vector"),
        ("diffusers-SD1.5", vm.SideTuning(side="copy"), r"puts out a map"),
        ("timm-vit_tiny_patch16_224", vm.SideTuning(side="rasnet18"), r"'rasnet18' is neither .* nor a timm model"),
        ("timm-resnet18", vm.SideTuning(side="copy", blocks=1), r"ResNet has stages"),
        ("transformers-ViT", vm.SideTuning(side="copy"), r"only a timm model can be copied"),
        ("timm-vit_tiny_patch16_224", vm.DTL(start=9), r"start=9 lies behind the last block"),
        ("open_clip-CLIP", vm.DTL(kernel=3), r"no grid of patches to convolve .* where="),
        ("timm-vit_tiny_patch16_224", vm.DTL(sites=("block",)), r"'features'.*'block'"),
        ("timm-vit_tiny_patch16_224", vm.SideTuning(sites=("features",)), r"whole model"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, method: Method, message: str) -> None:
    model = BY_NAME[name].model()
    with pytest.raises(vm.InputError, match=message):
        vm.adapt(model, method)


def test_a_copy_needs_a_plain_base() -> None:
    model = vit()
    vm.adapt(model, vm.LoRA(), name="lora")
    with pytest.raises(vm.InputError, match="attach it before other adapters"):
        vm.adapt(model, vm.SideTuning(side="copy"), name="side")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vm.DTL(kernel=2), "odd"),
        (lambda: vm.DTL(rank=0), "rank"),
        (lambda: vm.SideTuning(blocks=2), "side='copy' keeps"),
        (lambda: vm.SideTuning(pretrained=True), "for timm models"),
        (lambda: vm.Ladder(temperature=0), "temperature"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(vm.InputError, match=message):
        make()
