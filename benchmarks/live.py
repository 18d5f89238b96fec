"""Parts of `speed.py`: the adapter at work. Training steps, what they save for the backward, and forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from measure import Effort, Row, Time, compare, exact, kept_bytes, median, seconds, show
from peers import CLIP, VIT_B, VIT_S, Case, factors, fill, give, ours, theirs
from peft import inject_adapter_in_model
from torch import Tensor, nn

import vismodal as vm
from vismodal.site import Table

Models = Mapping[str, nn.Module]


def training(effort: Effort) -> Iterator[Row]:
    """ViT-S/16, ViT-B/16 (called layers), open_clip's image tower (`nn.MultiheadAttention`), fp32 and bf16 autocast."""
    x = torch.randn(effort.batch, 3, 224, 224)
    for case in (VIT_S, VIT_B, CLIP):
        base = case.build()
        models = {name: copy.deepcopy(base) for name in case.sites}
        adapters = {name: vm.adapt(models[name], ours(*sites)) for name, sites in case.sites.items()}
        for adapter in adapters.values():
            fill(adapter)
        last = list(case.sites)[-1]
        models["peft"] = inject_adapter_in_model(theirs(*case.targets), copy.deepcopy(base))
        give(adapters[last], models["peft"])
        yield replace(
            right(f"{case.name}, {last}", base, adapters[last], models[last], models["peft"], x), group=case.group
        )
        lean = {name: copy.deepcopy(base) for name in case.lean}
        for name, method in case.lean.items():
            fill(vm.adapt(lean[name], method))
        for dtype in (torch.float32, torch.bfloat16):
            rows = [*steps(effort, case, {**models, **lean}, x, dtype)]
            rows += forwards(effort, case, {**models, "base": base.requires_grad_(False)}, x, dtype)
            yield from (replace(row, group=case.group) for row in rows)


@torch.no_grad()
def right(where: str, base: nn.Module, adapter: vm.Adapter, model: nn.Module, peer: nn.Module, x: Tensor) -> Row:
    """Live outputs against the closed formula: BA added to the base's weights by hand."""
    by_hand = copy.deepcopy(base).eval()
    weights = dict(by_hand.named_parameters())
    for key, module in adapter.modules.items():
        path = key.partition("/")[2]
        A, B = factors(module)
        weights[path if path in weights else f"{path}.weight"].add_(B @ A)
    y = by_hand(x)
    off = [float((m.eval()(x) - y).abs().max() / y.abs().max()) for m in (model, peer)]
    note = "peft adds BA of out_proj twice (peft #3774)" if off[1] > 1e-4 else ""
    return exact("live output off W + BA", where, "error", off[0], off[1], note)


def steps(effort: Effort, case: Case, models: Models, x: Tensor, dtype: torch.dtype) -> Iterator[Row]:
    """Time of a step, and what the forward saves for the backward."""
    calls = {name: stepper(model.train(), x, dtype) for name, model in models.items()}
    samples = effort.interleave({name: partial(seconds, call) for name, call in calls.items()})
    saved = {name: saved_bytes(model, x, dtype) for name, model in models.items()}
    for name in (*case.sites, *case.lean):
        setting = f"{case.name}, {name}, {short(dtype)}"
        note = f"beside peft's LoRA, {list(case.sites)[-1]}" if name in case.lean else ""
        yield compare("training step", setting, "s", samples[name], samples["peft"], note)
        yield exact("saved for backward", setting, "bytes", saved[name], saved["peft"], note)


def stepper(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, x, dtype).backward()
        optimizer.step()

    return step


def loss_of(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        y: Tensor = model(x)
    return y.float().square().mean()


def saved_bytes(model: nn.Module, x: Tensor, dtype: torch.dtype) -> int:
    return kept_bytes(model, lambda: loss_of(model, x, dtype))


@torch.no_grad()
def forwards(effort: Effort, case: Case, models: Models, x: Tensor, dtype: torch.dtype) -> Iterator[Row]:
    """Beside the base, frozen as an adapted one is (torch takes other paths through frozen fused attention)."""
    calls = {name: partial(loss_of, model.eval(), x, dtype) for name, model in models.items()}
    samples = effort.interleave({name: partial(seconds, call) for name, call in calls.items()})
    for name in case.sites:
        base = compare("", "", "s", samples[name], samples["base"])
        note = f"{base.ratio:.2f} of the frozen base's {show(base.peer, 's')}"
        setting = f"{case.name}, {name}, {short(dtype)}"
        yield compare("forward, no_grad", setting, "s", samples[name], samples["peft"], note)


def short(dtype: torch.dtype) -> str:
    return "fp32" if dtype is torch.float32 else "bf16 autocast"


# -- the share of Python ---------------------------------------------------------------------------------------------

LAYERS, PASSES = 64, 10


class Tiny(nn.Module):
    """So small a layer that only the calls around it take time, as on a fast accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def overhead(effort: Effort) -> Iterator[Row]:
    """Time for each adapted layer where the arithmetic costs nothing."""
    base = nn.Sequential(*(Tiny() for _ in range(LAYERS)))
    model, peer = copy.deepcopy(base), inject_adapter_in_model(theirs("linear"), copy.deepcopy(base))
    table: Table = {Tiny: (vm.Weight("linear", "linear.weight"),)}
    vm.adapt(model, ours("linear"), sites=table)
    models = {"ours": model, "peft": peer, "base": base.requires_grad_(False)}
    for task, grad in {"forward, no_grad": False, "forward and backward": True}.items():
        samples = effort.interleave({n: partial(each, m, grad) for n, m in models.items()}, times=3)
        note = f"the layer alone: {show(median(samples['base']), 'us')}"
        yield compare(f"one layer, {task}", "Linear, 16 features", "us", samples["ours"], samples["peft"], note)


def each(model: nn.Module, grad: bool) -> Time:
    x = torch.randn(4, 16, requires_grad=grad)

    def passes() -> None:
        with torch.set_grad_enabled(grad):
            for _ in range(PASSES):
                y = model(x)
                if grad:
                    y.sum().backward()

    return seconds(passes) / (LAYERS * PASSES)
