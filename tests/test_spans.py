"""The span port, with two small methods of the tests' own: a parallel adapter and a prompt around each block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES, Case, close, fixed, shake

import vismodal as vm
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.site import Site


class Bottleneck(SpanModule):
    """x + f(x) + U gelu(D x): reads the stream where the span begins, adds where it ends. Lazy in its width."""

    def __init__(self, width: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(3, width) / width**0.5)
        self.up = nn.Parameter(torch.zeros(width, 3))

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        context["x"] = x
        return x

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y + F.gelu(context["x"] @ self.down.T) @ self.up.T


@dataclass(frozen=True, kw_only=True)
class Parallel(Method):
    sites: tuple[str, ...] = ("mlp",)
    width: int = 24
    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "AdaptFormer, arXiv 2205.13535"
    mergeable: ClassVar[bool] = False

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(Bottleneck(self.width) for _ in sites))


class Tokens(SpanModule):
    """Prompts joined after the class token where the span begins and taken out where it ends."""

    def __init__(self, width: int):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(2, width))

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return torch.cat([x[:, :1], self.prompt.expand(len(x), -1, -1), x[:, 1:]], 1)

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return torch.cat([y[:, :1], y[:, 3:]], 1)


@dataclass(frozen=True, kw_only=True)
class Prompts(Parallel):
    sites: tuple[str, ...] = ("block",)
    interpolates: ClassVar[bool] = False

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(Tokens(self.width) for _ in sites))


def vit() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "num_classes": 4, "depth": 2, "embed_dim": 24, "num_heads": 3, "drop_path_rate": 0.0}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def test_parallel_adapter_equals_the_formula() -> None:
    model = vit()
    adapter = vm.adapt(model, Parallel())
    block, module = model.blocks[0], adapter.modules["parallel/blocks.0:mlp"]
    x = fixed(2, 5, 24)
    y0 = block(x)
    shake(adapter, 0.3)
    mid = x + block.attn(block.norm1(x))  # the stream after the attention
    want = mid + block.mlp(block.norm2(mid)) + F.gelu(mid @ module.down.T) @ module.up.T
    assert close(block(x), want, 1e-6)
    adapter.scale = 0.5
    assert close(block(x), (want + y0) / 2, 1e-6)
    adapter.scale = 0
    assert torch.equal(block(x), y0)


def test_deep_prompts_equal_the_replace_rule() -> None:
    model = vit()
    adapter = vm.adapt(model, Prompts())
    prompts = [m.prompt for m in adapter.modules.values()]
    images = fixed(2, 3, 32, 32)
    with adapter.disabled():
        x = model._pos_embed(model.patch_embed(images))
        for block, prompt in zip(model.blocks, prompts, strict=True):  # arXiv 2203.12119, equation 5
            x = block(torch.cat([x[:, :1], prompt.expand(2, -1, -1), x[:, 1:]], 1))
            x = torch.cat([x[:, :1], x[:, 3:]], 1)
        want = model.forward_head(model.norm(x))
    assert close(model(images), want, 1e-6)
    with pytest.raises(vm.InputError, match=r"Prompts cannot be interpolated: scale must be 0 or 1, not 0\.5"):
        adapter.scale = 0.5
    assert adapter.scale == 1
    with pytest.raises(vm.InputError, match=r"Prompts .* cannot merge"):
        adapter.merge()


def test_enters_run_in_order_and_exits_in_reverse() -> None:
    model = vit()
    first = vm.adapt(model, Prompts(), name="first", seed=1)
    second = vm.adapt(model, Prompts(), name="second", seed=2)
    seen: list[Tensor] = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(fixed(1, 3, 32, 32))
    a, b = (next(iter(x.modules.values())).prompt for x in (first, second))
    assert torch.equal(seen[0][0, 1:5], torch.cat([b, a]))
    vm.use(model, "second", "first")
    model(fixed(1, 3, 32, 32))
    assert torch.equal(seen[1][0, 1:5], torch.cat([a, b]))


SPANS = [
    pytest.param(case, kind, id=f"{case.name}-{kind}")
    for case in CASES
    if not any(name in case.name for name in ("resn", "convnext", "swin", "timm-tower", "diffusers"))
    for kind in ("attn", "mlp", "block")
]


@pytest.mark.parametrize(("case", "kind"), SPANS)
def test_spans_of_every_family(case: Case, kind: str) -> None:
    model = case.model().requires_grad_(False)
    y0 = case.run(model)
    adapter = vm.adapt(model, Parallel(sites=(kind,)), name="a")
    assert close(case.run(model), y0, 2e-6)  # nn.MultiheadAttention leaves its fused path once gradients flow
    shake(adapter)
    y = case.run(model)
    y.square().mean().backward()
    assert adapter.unused() == []
    with adapter.disabled():
        assert torch.equal(case.run(model), y0)
    twin = copy.deepcopy(model)
    adapter.detach()
    assert torch.equal(case.run(model.requires_grad_(False)), y0)
    assert torch.equal(case.run(twin), y)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["attn", "xattn", "mlp", "block"])
def test_spans_of_a_unet(kind: str) -> None:
    case = next(c for c in CASES if c.name == "diffusers-SD1.5")
    model = case.model().requires_grad_(False)
    y0 = case.run(model)
    adapter = vm.adapt(model, Parallel(sites=(kind,), width=16, where="*down*"))
    shake(adapter)
    case.run(model).square().mean().backward()
    assert adapter.unused() == []
    with adapter.disabled():
        assert torch.equal(case.run(model), y0)


class Running(SpanModule):
    """A sum over the blocks, written back into each, s <- s + x_i A and x_i <- x_i + s; prompts around it all."""

    def __init__(self, width: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(width, width) / width)
        self.prompt = nn.Parameter(torch.randn(2, width))

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return torch.cat([x[:, :1], self.prompt.expand(len(x), -1, -1), x[:, 1:]], 1)

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        i = int(name.rpartition(".")[2])
        context[name] = context.get(f"block.{i - 1}", 0) + y @ self.A
        return y + context[name]

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        return torch.cat([y[:, :1], y[:, 3:]], 1)


@dataclass(frozen=True, kw_only=True)
class Ladder(Parallel):
    sites: tuple[str, ...] = ("features",)
    interpolates: ClassVar[bool] = False

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(Running(s.width) for s in sites))


class Counter(SpanModule):
    """Notes how many tokens others have joined, and adds that to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.1))

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return x + self.gain * context["extra"]


@dataclass(frozen=True, kw_only=True)
class Counting(Parallel):
    sites: tuple[str, ...] = ("attn",)

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(Counter() for _ in sites))


@pytest.mark.parametrize("name", ["timm-vit_tiny_patch16_224", "transformers-ViT", "transformers-CLIP"])
def test_spans_over_all_blocks_are_exact_under_checkpointing(name: str) -> None:
    """A running state over recomputed blocks, with a span inside each that has to know of the joined tokens."""
    case = next(c for c in CASES if c.name == name)
    kinds = {"where": "*vision*"} if "CLIP" in name else {}
    results = []
    for on in (False, True):
        model = case.model().train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        if on:
            case.checkpoint(model)  # type: ignore[misc]
        adapter = vm.adapt(model, [Counting(**kinds), Ladder(**kinds)], seed=0)
        shake(adapter)
        y = case.run(model)
        y.square().mean().backward()
        assert adapter.unused() == []
        results.append([y, *(p.grad for p in adapter.parameters())])
    assert all(close(b, a, 1e-5) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]
    counters = [m for m in adapter.modules.values() if isinstance(m, Counter)]
    assert all(m.gain.grad is not None and m.gain.grad != 0 for m in counters), "each saw the joined tokens"
    copy.deepcopy(model)


def test_hooks_stand_in_the_same_order_whoever_came_first() -> None:
    outputs = []
    for order in ((0, 1), (1, 0)):
        model = vit()
        for i in order:
            shake(vm.adapt(model, (Ladder(), Prompts())[i], name="ab"[i], seed=i))
        vm.use(model, "a", "b")
        outputs.append(model(fixed(2, 3, 32, 32)))
    assert torch.equal(*outputs)


def test_checkpointing_and_compiling() -> None:
    gradients = []
    for on in (False, True):
        model = vit().train()
        model.set_grad_checkpointing(on)
        adapter = vm.adapt(model, [Parallel(), Prompts()], seed=0)
        shake(adapter)
        model(fixed(2, 3, 32, 32)).square().mean().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(close(b, a, 1e-5) for a, b in zip(*gradients, strict=True))
    model.set_grad_checkpointing(False)
    y = model(fixed(2, 3, 32, 32))
    torch._dynamo.reset()
    assert close(torch.compile(model, backend="eager", fullgraph=True)(fixed(2, 3, 32, 32)), y, 1e-6)
