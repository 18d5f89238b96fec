"""Rows of one batch that belong to different adapters, against a batch for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_diffusion import tiny_pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, close, fixed, shake

import vismodal as vm
from vismodal.methods import Method

METHODS: dict[str, Method] = {
    "lora": vm.LoRA(rank=2),
    "dora": vm.DoRA(rank=2),
    "prompts": vm.VPT(tokens=2, patch_size=16),
    "adaptformer": vm.AdaptFormer(rank=4),
    "tune": vm.Tune(sites=("norm", "head")),
}


def vit(*names: str) -> nn.Module:
    """With these adapters, none of them as it was made."""
    import timm

    torch.manual_seed(0)
    size = {"depth": 2, "embed_dim": 24, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, **size).eval()
    for name in names:
        shake(vm.adapt(model, METHODS[name], name))
    vm.use(model)
    return model


def separately(model: nn.Module, rows: Sequence[str | None], x: Tensor) -> Tensor:
    found = []
    for i, name in enumerate(rows):
        vm.use(model, *([name] if name else []))
        found.append(model(x[i : i + 1]))
    vm.use(model)
    return torch.cat(found)


def test_every_row_is_what_its_own_adapter_makes_of_it() -> None:
    model = vit(*METHODS)
    rows = ["dora", None, "lora", "prompts", "lora", "tune", "adaptformer"]
    x = fixed(1, 3, 32, 32).expand(len(rows), -1, -1, -1)
    with torch.no_grad():
        truth, base = separately(model, rows, x), model(x)
        with vm.route(model, rows):
            y = model(x)
        assert close(y, truth)
        assert torch.equal(model(x), base)  # and afterwards none of them acts, as before
    distinct = [i for i in range(len(rows)) if all((y[i] - y[j]).abs().max() > 1e-4 for j in range(i))]
    assert distinct == [0, 1, 2, 3, 5, 6]  # the fourth is the second of lora


def test_a_row_may_have_several_adapters_and_batches_may_be_copies() -> None:
    model = vit("lora", "adaptformer")
    x = fixed(4, 3, 32, 32)
    with torch.no_grad():
        vm.use(model, "adaptformer", "lora")
        both = model(x)
        vm.use(model)
        base = model(x)
        with vm.route(model, [None, ("adaptformer", "lora")]):
            y = model(x)
    assert close(y[0::2], base[0::2]) and close(y[1::2], both[1::2])
    assert not close(both[1::2], base[1::2], 1e-3)


def test_time_ids_and_texts_go_with_their_rows() -> None:
    case = BY_NAME["diffusers-SDXL"]
    model = case.model()
    shake(vm.adapt(model, vm.LoRA(rank=2), "a"))
    with torch.no_grad():
        truth = case.run(model)
        vm.use(model)
        base = case.run(model)
        with vm.route(model, [None, "a"]):
            y = case.run(model)
    assert close(y[0], base[0]) and close(y[1], truth[1]) and not close(y[1], base[1], 1e-3)


@pytest.mark.parametrize("name", ["open_clip-CLIP", "transformers-CLIP"])
def test_features_are_routed_and_what_compares_rows_is_refused(name: str) -> None:
    model = BY_NAME[name].model()
    shake(vm.adapt(model, vm.LoRA(rank=2), "a"))
    x = fixed(2, 3, 32, 32)

    def features() -> Tensor:
        out = model.encode_image(x) if name.startswith("open_clip") else model.get_image_features(x)
        return out if isinstance(out, Tensor) else out.pooler_output

    with torch.no_grad():
        truth = features()
        vm.use(model)
        base = features()
        with vm.route(model, [None, "a"]):
            y = features()
            with pytest.raises(RuntimeError, match="rows are routed here"):
                tower = model.visual if name.startswith("open_clip") else model.vision_model
                tower(x)
            with pytest.raises(vm.InputError, match=r"not made of rows|3 rows, but 2 are routed"):
                BY_NAME[name].run(model)  # pictures against other texts
        assert torch.equal(features(), base)
    assert close(y[0], base[0]) and close(y[1], truth[1]) and not close(y[1], base[1], 1e-3)


def test_each_adapter_learns_from_its_own_rows() -> None:
    model = vit("lora", "adaptformer")
    x, labels = fixed(3, 3, 32, 32), torch.tensor([0, 1, 2])
    rows = ["lora", "adaptformer", "lora"]
    adapters = vm.attached(model)
    with vm.route(model, rows):
        loss = F.cross_entropy(model(x), labels, reduction="none")
    loss.sum().backward()  # after the context, too
    found = {name: [p.grad.clone() for p in adapter.parameters()] for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        at = [i for i, row in enumerate(rows) if row == name]
        vm.use(model, name)
        for p in adapter.parameters():
            p.grad = None
        F.cross_entropy(model(x[at]), labels[at], reduction="none").sum().backward()
        truth = [p.grad for p in adapter.parameters()]
        assert all(close(a, b) for a, b in zip(found[name], truth, strict=True))
        assert any(g.abs().max() > 0 for g in truth)


def test_checkpointing_is_refused_and_not_silently_wrong() -> None:
    model = vit("lora", "adaptformer")
    model.set_grad_checkpointing(True)
    model.train()
    vm.use(model, "lora")
    with vm.route(model, ["lora", "adaptformer"]):
        loss = model(fixed(2, 3, 32, 32)).sum()
    with pytest.raises(RuntimeError, match="a row's own"):
        loss.backward()
    model(fixed(2, 3, 32, 32)).sum().backward()  # and what comes later is as ever


def test_what_does_not_fit_is_told_and_nothing_is_left() -> None:
    model = vit("lora")
    before = dict(model.__dict__)
    with (
        pytest.raises(vm.InputError, match=r"no adapter .pets.*which has lora"),
        vm.route(model, ["pets"]),
    ):
        pass
    with pytest.raises(vm.InputError, match="no rows are given"), vm.route(model, []):
        pass
    with pytest.raises(vm.InputError, match="3 rows, but 2 are routed"), vm.route(model, ["lora", None]):
        model(fixed(3, 3, 32, 32))
    vm.attached(model)["lora"].merge()
    with pytest.raises(vm.InputError, match="unmerge"), vm.route(model, ["lora", None]):
        pass
    vm.attached(model)["lora"].unmerge()
    assert {k: v for k, v in model.__dict__.items() if k != "forward"}.keys() == before.keys()
    assert "forward" not in model.__dict__


def test_an_output_that_is_no_batch_is_refused() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean()

    model = Mean()
    shake(vm.adapt(model, vm.LoRA(rank=2), "lora"))
    with pytest.raises(vm.InputError, match="not made of rows"), vm.route(model, ["lora", None]):
        model(fixed(2, 3, 32, 32))


def test_pictures_of_one_batch_by_several_adapters(tmp_path: Path) -> None:
    """Under guidance, with adapters on the UNet and on the text encoder; diffusers cannot do that."""
    pipe = tiny_pipeline(tmp_path)
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for seed, name in enumerate(("pets", "style")):
        shake(vm.adapt(models, vm.LoRA(sites=("attn.*",), rank=2), name, seed=seed), 0.3)
    rows, prompts = ["pets", None, "style"], ["a cat", "a dog", "a cup"]

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        made = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            return pipe(prompts, generator=made, num_inference_steps=3, guidance_scale=5.0, output_type="pt").images

    truth = []
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        vm.use(models, *([row] if row else []))
        truth.append(draw([prompt], [i]))
    vm.use(models)
    base = draw(prompts, [0, 1, 2])
    with vm.route(models, rows):
        images = draw(prompts, [0, 1, 2])
    assert close(images, torch.cat(truth))
    assert close(images[1], base[1]) and not close(images[0], base[0], 1e-3) and not close(images[2], base[2], 1e-3)
