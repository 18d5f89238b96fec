"""With the frozen part kept, outputs and gradients are the same to the bit: every family, every kind of method."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import BY_NAME, close, fixed, image_tower, offered, shake, word_ids

import vismodal as vm
from vismodal.prefix import cut, store
from vismodal.prefix import frozen as prefix
from vismodal.prefix.calls import modules_of, tensors_in

LAST = slice(-1, None)
VIT = "timm-vit_tiny_patch16_224"
SIZES = {"dinov2": 28, "eva": 28, "beit": 32, "swin_": 56, "swinv2": 64, "convnext": 64, "timm-tower": 224}
SHARES = {
    "LoRA": 0.25,
    "AdaptFormer": 0.25,
    "VPT": 0.25,
    "LinearProbe": 0.9,
    "Ladder": 0.2,
    "Bypass": 0.2,
    "Side": 0.05,
}
SHARES |= {"DTL": 0.25, "NormTuning": 0.25, "CLIPAdapter": 0.9, "TipAdapter": 0.9, "CoOp": 0.3, "PromptSRC": 0.1}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def pictures(name: str, n: int = 3) -> Tensor:
    return fixed(n, 3, *[next((size for part, size in SIZES.items() if part in name), 32)] * 2)


def call_of(model: Any) -> Callable[[Tensor], Any]:
    """The part of a model that takes pictures alone."""
    if hasattr(model, "encode_image"):
        return model.encode_image
    if hasattr(model, "get_image_features"):
        return lambda x: model.get_image_features(pixel_values=x)
    return model


def attention(model: nn.Module) -> tuple[str, ...]:
    return offered(model, ("attn.q", "attn.v", "conv"))


def lora(model: nn.Module) -> vm.LoRA:
    return vm.LoRA(sites=attention(model), rank=2, layers=LAST, where=image_tower(model), dropout=0.1)


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "LoRA": lora,
    "AdaptFormer": lambda m: vm.AdaptFormer(sites=("mlp",), rank=4, layers=LAST, where=image_tower(m)),
    "NormTuning": lambda m: vm.NormTuning(layers=LAST, where=image_tower(m)),
    "VPT": lambda m: vm.VPT(tokens=2, layers=LAST, where=image_tower(m)),
    "LinearProbe": lambda m: vm.LinearProbe(),
    "Ladder": lambda m: vm.Ladder(reduction=2, head=4, where=image_tower(m)),
    "Bypass": lambda m: vm.ResTuningBypass(rank=4, where=image_tower(m)),
    "DTL": lambda m: vm.DTL(where=image_tower(m)),
    "Side": lambda m: vm.SideTuning(where=image_tower(m)),
}
CLIPS: dict[str, Callable[[nn.Module], Any]] = {
    "CLIPAdapter": lambda m: vm.CLIPAdapter(reduction=2),
    "TipAdapter": lambda m: vm.TipAdapter(train_keys=True, shots=2),
    "CoOp": lambda m: vm.CoOp(tokens=2),
    "PromptSRC": lambda m: vm.PromptSRC(depth=2),
    "LoRA": lora,
}
TRANSFORMERS = (
    "timm-vit_tiny_patch16_224", "timm-vit_small_patch14_reg4_dinov2", "timm-eva02_tiny_patch14_224",
    "timm-beit_base_patch16_224", "open_clip-CLIP", "open_clip-timm-tower", "transformers-ViT", "transformers-Dinov2",
    "transformers-CLIP",
)  # fmt: skip
WINDOWS = ("timm-swin_tiny_patch4_window7_224", "timm-swinv2_tiny_window8_256")
CONVS = ("timm-convnext_tiny", "timm-resnext50_32x4d", "timm-resnet18")
NOT_ALL = {  # methods that a family has no site for
    "LinearProbe": ("open_clip", "transformers-CLIP"),
    "VPT": ("beit", "eva02"),
    "Side": ("deit",),
}
PAIRS = [
    (name, method)
    for name in TRANSFORMERS
    for method in METHODS
    if not any(part in name for part in NOT_ALL.get(method, ()))
]
PAIRS += [(name, method) for name in WINDOWS for method in ("LoRA", "AdaptFormer", "LinearProbe", "DTL")]
PAIRS += [(name, method) for name in CONVS for method in ("LoRA", "LinearProbe")]
PAIRS += [(f"classifier-{name}", method) for name in ("flat", "clip", "siglip") for method in CLIPS]


def gradients(adapter: vm.Adapter, out: Any) -> dict[str, Tensor]:
    """Of a loss of all outputs and of what the methods add to it."""
    terms = [t.float().square().mean() for t in tensors_in(out)]
    penalty = adapter.penalty()
    loss = torch.stack(terms + ([penalty] if penalty is not None else [])).sum()
    for p in adapter.parameters():
        p.grad = None
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(map(torch.equal, a.values(), b.values())) and not any(map(is_nan, a.values()))


def is_nan(t: Tensor) -> bool:
    return bool(torch.isnan(t).any())


def drawn(run: Callable[[], Any]) -> Any:
    """Dropout in the adapter draws the same each time."""
    torch.manual_seed(5)
    return run()


def adapted(name: str, method: str) -> tuple[nn.Module, vm.Adapter]:
    model = BY_NAME[name].model()
    adapter = vm.adapt(model, (CLIPS if name.startswith("classifier") else METHODS)[method](model))
    shake(adapter)
    if "swin" in name:  # timm's default is 0.1
        no_drop_path(model)
    return model.train(), adapter


def no_drop_path(model: nn.Module) -> None:
    for m in model.modules():
        if hasattr(m, "drop_prob"):
            m.drop_prob = 0.0  # type: ignore[assignment]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_outputs_and_gradients_are_the_same_to_the_bit(name: str, method: str) -> None:
    model, adapter = adapted(name, method)
    x, call = pictures(name), call_of(model)
    forwards = [m.__dict__.get("forward") for m in modules_of(model)]
    plain = gradients(adapter, drawn(lambda: call(x)))
    cached = vm.FrozenPrefix(model, call=call)
    filling = gradients(adapter, drawn(lambda: cached(x, range(3))))
    assert same(filling, plain)
    assert len(plain) > 1
    assert same(gradients(adapter, drawn(lambda: cached(x, range(3)))), plain)
    assert cached.share > SHARES[method], str(cached)
    assert adapter.unused() == []
    assert [m.__dict__.get("forward") for m in modules_of(model)] == forwards
    if not cached.last[0].reads:  # type: ignore[index]
        assert method != "Side"
        assert same(gradients(adapter, drawn(lambda: cached(never, range(3)))), plain)


def never(keys: list[Any]) -> Tensor:
    raise AssertionError(f"asked for {keys}")


def vit(method: Any = None, **options: Any) -> tuple[Any, vm.Adapter]:
    import timm

    sizes = {"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})
    adapter = vm.adapt(model, method or vm.LoRA(rank=2, layers=slice(-2, None)))
    shake(adapter)
    return model, adapter


def test_the_cut_lies_before_the_first_adapted_block() -> None:
    shares = []
    for first in range(1, 4):
        model, _ = vit(vm.LoRA(layers=slice(first, None)))
        cached = vm.FrozenPrefix(model)
        cached(pictures(VIT), range(3))
        assert cached.at == (f"blocks.{first - 1}",)
        shares.append(cached.share)
    assert shares == sorted(shares) and shares[2] - shares[1] == pytest.approx(shares[1] - shares[0], abs=0.02)


@pytest.mark.parametrize("method", [vm.LoRA, vm.AdaptFormer])
def test_a_finer_cut_lies_within_the_block(method: Any) -> None:
    model, adapter = vit(method(layers=slice(2, None)))
    x, coarse, cached = pictures(VIT), vm.FrozenPrefix(model), vm.FrozenPrefix(model, fine=True)
    coarse(x, range(3))
    plain = gradients(adapter, drawn(lambda: model(x)))
    for _ in range(2):
        assert same(gradients(adapter, drawn(lambda: cached(x, range(3)))), plain)
    assert coarse.at == ("blocks.1",) and cached.share > coarse.share
    assert cached.at[0] == "blocks.1" and cached.at[1].startswith("blocks.2.")


def test_nothing_is_kept_where_an_adapter_touches_the_first_layer() -> None:
    model, _ = vit(vm.Tune(sites=("embed",)))
    cached = vm.FrozenPrefix(model)
    assert torch.equal(cached(pictures(VIT), range(3)), model(pictures(VIT)))
    assert cached.share == 0 and len(cached) == 0 and "very first" in str(cached)
    model, _ = vit(vm.LoRA(), patch_size=2, embed_dim=48)
    cached = vm.FrozenPrefix(model)
    cached(pictures(VIT), range(3))
    assert cached.share == 0 and "only" in str(cached)


def test_rows_that_are_known_and_rows_that_are_not() -> None:
    model, adapter = vit()
    x, cached = pictures(VIT, 6), vm.FrozenPrefix(model)
    asked: list[Any] = []

    def load(keys: list[Any]) -> Tensor:
        asked.extend(keys)
        return x[keys]

    cached(x[:2], [0, 1])
    for keys in ([1, 4, 0, 5], [3, 3, 1], [2, 0, 2]):
        y = cached(load, keys)
        assert close(y, model(x[keys])), keys
    assert asked == [4, 5, 3, 2]
    assert len(cached) == 6
    assert torch.equal(cached(x, torch.arange(6)), cached(load, range(6)))
    assert len(asked) == 4
    assert adapter.unused() == []


def test_beyond_memory_rows_go_to_disk_and_beyond_that_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK", 3000)
    model, _ = vit()
    x = pictures(VIT, 12)
    row = 5 * 24 * 4 + 32 + 256  # aligned, with what tells pictures apart
    cached = vm.FrozenPrefix(model, limit=4 * row, disk=3 * row)
    y = model(x)
    assert torch.equal(cached(x, range(12)), y)
    assert len(cached) == 7
    rows = cached.last[1].rows  # type: ignore[index,union-attr]
    assert [c.mapped is None for c in rows.chunks].count(False) >= 1
    assert rows.row == row
    assert close(cached(x, range(12)), y)
    assert torch.equal(cached(never, range(7)), cached(x[:7], range(7)))
    tiny = vm.FrozenPrefix(model, limit=0, disk=0)
    assert torch.equal(tiny(x, range(12)), y) and len(tiny) == 0
    assert torch.equal(tiny(x, range(12)), y)


def test_a_full_disk_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "reserve", full)
    model, _ = vit()
    cached = vm.FrozenPrefix(model, limit=0)
    assert torch.equal(cached(pictures(VIT), range(3)), model(pictures(VIT)))
    assert len(cached) == 0


def test_a_folder_is_found_again_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK", 3000)
    x = pictures(VIT, 6)
    keys = [("a", i) for i in range(5)] + ["ä"]

    def run(model: nn.Module, x: Any) -> tuple[Tensor, int]:
        cached = vm.FrozenPrefix(model, folder=tmp_path)
        out = cached(x, keys)
        computed.clear()
        again = cached(never, keys)
        assert torch.equal(out, again)
        found = len(cached)
        cached.close()
        return out, found

    computed: list[int] = []
    compute = prefix.FrozenPrefix._compute
    monkeypatch.setattr(prefix.FrozenPrefix, "_compute", lambda s, c, x: (computed.append(len(x)), compute(s, c, x))[1])
    torch.manual_seed(0)
    model, _ = vit()
    y, n = run(model, x)
    assert n == 6 and torch.equal(y, model(x))
    cached = vm.FrozenPrefix(model, folder=tmp_path)
    computed.clear()
    assert torch.equal(cached(lambda keys: x, keys), y)  # looks at the pictures once, to compare them
    assert computed == []
    other = vm.FrozenPrefix(model, folder=tmp_path)  # while the first one has the folder
    assert torch.equal(other(x, keys), y)
    assert computed == [6]
    cached.close()
    with pytest.raises(vm.InputError, match="another picture"):
        vm.FrozenPrefix(model, folder=tmp_path)(x + 1, keys)
    with torch.no_grad():
        model.blocks[0].norm1.weight.mul_(2)
    computed.clear()
    y, n = run(model, x)
    assert torch.equal(y, model(x)) and computed == []


def test_cut_short_files_are_computed_again(tmp_path: Path) -> None:
    model, _ = vit()
    x = pictures(VIT)
    cached = vm.FrozenPrefix(model, folder=tmp_path)
    y = cached(x, range(3))
    cached.close()
    (file,) = tmp_path.rglob("*.rows")
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1]), file.unlink, lambda: None):
        damage()
        cached = vm.FrozenPrefix(model, folder=tmp_path)
        assert torch.equal(cached(x, range(3)), y)
        cached.close()
    (index,) = tmp_path.rglob("index.json")
    index.write_text("{")
    assert torch.equal(vm.FrozenPrefix(model, folder=tmp_path)(x, range(3)), y)


def test_other_adapters_another_cut() -> None:
    model, late = vit(vm.LoRA(layers=slice(-1, None)))
    x, cached = pictures(VIT), vm.FrozenPrefix(model)
    assert torch.equal(cached(x, range(3)), model(x)) and cached.at == ("blocks.2",)
    early = vm.adapt(model, vm.LoRA(layers=slice(1, 2)), name="early")
    shake(early)
    for _ in range(2):
        assert torch.equal(cached(x, range(3)), model(x)) and cached.at == ("blocks.0",)
        early.scale = 0.5
    with early.disabled():
        assert torch.equal(cached(never, range(3)), model(x)) and cached.at == ("blocks.2",)
        with late.disabled():
            assert torch.equal(cached(x, range(3)), model(x)) and cached.at == ("the model",)
    early.detach()
    assert torch.equal(cached(never, range(3)), model(x)) and cached.at == ("blocks.2",)


def test_a_frozen_part_that_changes_is_computed_again() -> None:
    model, _ = vit(vm.LoRA(layers=slice(-1, None)))
    x, cached = pictures(VIT), vm.FrozenPrefix(model)
    before = cached(x, range(3))
    early = vm.adapt(model, vm.LoRA(layers=slice(1, 2)), name="early")
    shake(early)
    early.merge()
    assert torch.equal(cached(x, range(3)), model(x)) and cached.at == ("blocks.2",)
    assert not torch.equal(cached(x, range(3)), before)
    early.unmerge()
    early.enabled = False
    assert torch.equal(cached(x, range(3)), before)
    with torch.no_grad():
        model.pos_embed.mul_(2)
    assert torch.equal(cached(x, range(3)), model(x))


def test_parameters_of_the_base_that_are_trained_count_too() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=3)
    model.requires_grad_(False)
    model.blocks[2].requires_grad_(True)
    x, cached = pictures(VIT), vm.FrozenPrefix(model)
    optimizer = torch.optim.SGD(model.blocks[2].parameters(), 0.1)
    for _ in range(3):
        y = cached(x, range(3))
        assert torch.equal(y, model(x)) and cached.at == ("blocks.1",)
        y.square().mean().backward()
        optimizer.step()
    assert torch.equal(cached(never, range(3)), model(x))


@pytest.mark.parametrize("grad", [False, True])
def test_what_autocast_keeps_of_a_trial_is_not_used(grad: bool) -> None:
    model = BY_NAME[VIT].model().requires_grad_(False)
    model.head.requires_grad_(True)
    x, cached = pictures(VIT), vm.FrozenPrefix(model)
    for _ in range(2):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            y = cached(x, range(3))
        assert y.requires_grad == grad and cached.at == ("head_drop",)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(y, model(x))


@pytest.mark.parametrize("method", [vm.LoRA(layers=slice(1, 3)), vm.Ladder(reduction=2, head=4), vm.VPT(layers=LAST)])
def test_without_gradients_what_an_adapter_does_is_not_kept(method: Any) -> None:
    model, adapter = vit(method)
    x, cached = pictures(VIT), vm.FrozenPrefix(model)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(cached(x, range(3)), model(x))
            shake(adapter)
    adapter.trainable = False
    assert torch.equal(cached(x, range(3)), model(x))
    shake(adapter)
    assert torch.equal(cached(x, range(3)), model(x))


def test_texts_are_no_function_of_a_picture_even_if_there_are_as_many() -> None:
    clf = vm.CLIPClassifier(BY_NAME["open_clip-CLIP"].model(), word_ids, ["cat", "dog"])
    vm.adapt(clf, vm.CLIPAdapter(reduction=2))
    x, cached = pictures(VIT, 4), vm.FrozenPrefix(clf)
    for rows in ([0, 1], [2, 3], [3, 0]):
        assert close(cached(x[rows], rows), clf(x[rows]))
        assert cached.at == ("image",)


def test_training_is_the_same_step_by_step() -> None:
    runs = []
    for kept in (False, True):
        torch.manual_seed(0)
        model, adapter = vit([vm.LoRA(layers=slice(-2, None), dropout=0.2), vm.LinearProbe()])
        model.train()
        x, cached = pictures(VIT, 8), vm.FrozenPrefix(model)
        optimizer, losses = torch.optim.AdamW(adapter.parameters(), 1e-2), []
        for step in range(6):
            rows = list(range(4)) if step % 2 else list(range(4, 8))
            torch.manual_seed(step)
            y = cached(x[rows], rows) if kept else model(x[rows])
            loss = y.logsumexp(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, adapter.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][k], runs[1][1][k]) for k in runs[0][1])


AUTOCAST = [(VIT, "LoRA"), (VIT, "Side"), ("timm-swin_tiny_patch4_window7_224", "LoRA"), ("timm-resnet18", "LoRA")]


@pytest.mark.parametrize(("name", "method"), [*AUTOCAST, ("transformers-ViT", "LoRA"), ("open_clip-CLIP", "Ladder")])
def test_autocast_keeps_its_dtype(name: str, method: str) -> None:
    model, adapter = adapted(name, method)
    x, call = pictures(name), call_of(model)
    cached = vm.FrozenPrefix(model, call=call)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(adapter, drawn(lambda: call(x)))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert same(gradients(adapter, drawn(lambda: cached(x, range(3)))), plain)
    assert same(gradients(adapter, drawn(lambda: cached(x, range(3)))), gradients(adapter, drawn(lambda: call(x))))


@pytest.mark.parametrize("name", [VIT, "timm-swin_tiny_patch4_window7_224", "transformers-ViT", "open_clip-CLIP"])
@pytest.mark.parametrize("method", ["LoRA", "DTL"])
def test_checkpointed_blocks(name: str, method: str) -> None:
    model, adapter = adapted(name, method)
    BY_NAME[name].checkpoint(model)  # type: ignore[misc]
    x, call = pictures(name), call_of(model)
    plain = gradients(adapter, drawn(lambda: call(x)))
    cached = vm.FrozenPrefix(model, call=call)
    for _ in range(2):
        assert same(gradients(adapter, drawn(lambda: cached(x, range(3)))), plain)


def test_checkpointing_across_the_cut_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    model, _ = vit()
    blocks = model.blocks
    forward = type(blocks).forward
    blocks.forward = lambda x: checkpoint(lambda y: forward(blocks, y), x, use_reentrant=False)
    with pytest.raises(vm.InputError, match="checkpointing goes over several blocks"):
        vm.FrozenPrefix(model)(pictures(VIT), range(3))
    with torch.no_grad():
        assert torch.equal(vm.FrozenPrefix(model)(pictures(VIT), range(3)), model(pictures(VIT)))


def test_a_frozen_part_that_draws_is_refused() -> None:
    model, _ = vit(proj_drop_rate=0.3)
    model.train()
    with pytest.raises(vm.InputError, match=r"blocks\.\d comes out different"):
        vm.FrozenPrefix(model)(pictures(VIT), range(3))
    model.eval()
    assert torch.equal(vm.FrozenPrefix(model)(pictures(VIT), range(3)), model(pictures(VIT)))


def test_a_picture_that_is_another_is_refused() -> None:
    model, _ = vit()
    x, cached = pictures(VIT), vm.FrozenPrefix(model)
    cached(x, range(3))
    with pytest.raises(vm.InputError, match="under the key 1"):
        cached(x[[0, 2, 1]], range(3))


def test_what_cannot_be_kept_is_refused() -> None:
    model, _ = vit()
    x, cached = pictures(VIT), vm.FrozenPrefix(model)
    for pictures_, keys, why in (
        (x, [0, 1], "one for each"),
        (x.clone().requires_grad_(), range(3), "want gradients"),
        (x.long(), range(3), "floating-point"),
        (x, [0.5, 1, 2], "is no key"),
        (x * float("nan"), range(3), "own output is NaN"),
    ):
        with pytest.raises(vm.InputError, match=why):
            cached(pictures_, keys)  # type: ignore[arg-type]
    with pytest.raises(vm.InputError, match="no size"):
        vm.FrozenPrefix(model, limit="4 potatoes")
    with pytest.raises(vm.InputError, match="compiled"):
        vm.FrozenPrefix(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    model.blocks[0].compile(backend="eager")
    with pytest.raises(vm.InputError, match="compiled"):
        cached(x, range(3))


def test_one_forward_at_a_time() -> None:
    model, _ = vit()
    cached, failed = vm.FrozenPrefix(model), []

    def load(keys: list[Any]) -> Tensor:
        def other() -> None:
            try:
                cached(pictures(VIT), range(3))
            except RuntimeError as error:
                failed.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return pictures(VIT)

    cached(load, range(3))
    assert "one forward at a time" in failed[0]


def test_nothing_is_left_of_looking_for_the_cut() -> None:
    """Values, running statistics, random numbers, gradients, and what a backward has yet to read, also after errors."""
    model, adapter = vit([vm.LoRA(layers=slice(-1, None)), vm.SideTuning(side="resnet10t")], patch_size=4, embed_dim=96)
    model.train()
    x, held = pictures(VIT), copy.deepcopy(adapter.state_dict())
    out, random = model.forward_features(x), torch.random.get_rng_state()
    ran = adapter.unused()
    for stop in (0, 1, 5, 12, None):
        calls = iter(range(stop or 0))

        def call(x: Tensor, stop: int | None = stop, calls: Iterator[int] = calls) -> Any:
            if stop is not None and next(calls, None) is None:
                raise ValueError("stop")
            return model(x)

        with nullcontext() if stop is None else pytest.raises(ValueError, match="stop"):
            assert cut.find(model, call, x, set()).kept
        now = adapter.state_dict()
        assert all(torch.equal(held[k], now[k]) for k in held)
        assert torch.equal(random, torch.random.get_rng_state())
        assert all(p.grad is None for p in model.parameters())
        assert not any("forward" in m.__dict__ for m in modules_of(model))
    assert adapter.unused() and not ran
    out.square().mean().backward()


def test_methods_that_choose_by_data() -> None:
    model, adapter = vit(vm.SparseMask(density=0.1, layers=slice(-2, None)))
    x, cached, losses = pictures(VIT), vm.FrozenPrefix(model), []
    plain = copy.deepcopy(model)
    for run, of in ((lambda: cached(x, range(3)), adapter), (lambda: plain(x), vm.attached(plain)["default"])):
        torch.manual_seed(0)
        with of.calibrating():
            run().square().mean().backward()
        shake(of)
        losses.append(gradients(of, run()))
    assert same(*losses)
    assert cached.at == ("blocks.1",)


def test_a_method_that_switches_its_parts_is_left_whole() -> None:
    model, _ = vit(vm.NOAH(sites=("block", "attn.qkv", "mlp"), tokens=(1, 2), ranks=(1, 2), widths=(2, 4)))
    x, cached = pictures(VIT), vm.FrozenPrefix(model)
    assert torch.equal(cached(x, range(3)), model(x))
    assert cached.share == 0 and "in others not" in str(cached)


class Odd(nn.Module):
    """A model of no family, which calls one module twice and does something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mix = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for _ in range(2):
            x = x + self.mix(self.norm(x)).relu_()
        return self.head(x.mean(1))


def test_a_model_of_no_family() -> None:
    model = Odd()
    vm.adapt(model, vm.LoRA(sites=("out",), rank=2), sites={Odd: (vm.Weight("out", "head.weight"),)})
    x, cached = pictures(VIT), vm.FrozenPrefix(model)
    y = model(x)
    assert torch.equal(cached(x, range(3)), y) and torch.equal(cached(never, range(3)), y)
    assert cached.at == ("head, its input", "head")


def test_frozen_features_of_a_classifier() -> None:
    """Where no adapter acts, all of it is a constant: the image side of a classifier, say."""
    clf = BY_NAME["classifier-flat"].model()
    vm.adapt(clf, vm.TipAdapter())
    x, cached = pictures(VIT), vm.FrozenPrefix(clf.image)
    f = clf.image(x)
    assert torch.equal(cached(x, range(3)), f) and torch.equal(cached(never, range(3)), f)
    assert cached.share == 1
    lora_ = vm.adapt(BY_NAME["classifier-flat"].model(), vm.LoRA(where="*visual*"))
    inner: Any = next(iter(lora_.models.values()))
    shake(lora_)
    cached = vm.FrozenPrefix(inner.image)  # whose tower is adapted from above
    assert torch.equal(cached(x, range(3)), inner.image(x)) and cached.share < 1
