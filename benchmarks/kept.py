"""Parts of `speed.py`: merging and what it leaves behind, files, and switching."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Effort, Row, Time, compare, exact, fastest, seconds
from peers import CLIP, SDXL, VIT_B, VIT_S, Case, count, ours, pair, theirs
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

import vismodal as vm

CASES = (VIT_S, VIT_B, CLIP)
LARGEST_FILE = 1_182_440  # bytes, of r=8 over the whole qkv of ViT-B


def merging(effort: Effort) -> Iterator[Row]:
    """Time there and back, and how many elements of the base are then not what they were."""
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            yield from (replace(row, group=case.group) for row in merged(effort, case, dtype))


def merged(effort: Effort, case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """Of one model in one dtype."""
    base = case.build().to(dtype)
    model, adapter, peer = pair(case, base)
    tuner: Any = peer.base_model
    where = f"{case.name}, {list(case.sites)[-1]}, {str(dtype).partition('.')[2]}"
    both = {"ours": (adapter.merge, adapter.unmerge), "peft": (tuner.merge_adapter, tuner.unmerge_adapter)}
    for merge, unmerge in both.values():
        merge(), unmerge()
    off = changed(base, model), changed(base, peer)
    assert off[0] == 0, f"unmerging changed {off[0]:,} elements"
    adapted = sum(s.tensor.numel() for s in vm.sites(base) if s.kind in case.shared)
    yield exact("elements changed by merge and unmerge", where, "count", off[0], off[1], f"of {adapted:,} adapted")
    merges = effort.interleave({n: partial(first, *calls) for n, calls in both.items()}, times=2)
    unmerges = effort.interleave({n: partial(second, *calls) for n, calls in both.items()}, times=2)
    yield compare("merge", where, "s", merges["ours"], merges["peft"])
    yield compare("unmerge", where, "s", unmerges["ours"], unmerges["peft"])
    assert changed(base, model) == 0
    held = adapted * next(base.parameters()).element_size()
    yield exact("held while merged", where, "bytes", held, 0, "the rows that merging replaced")


def first(merge: Callable[[], object], unmerge: Callable[[], object]) -> Time:
    taken = seconds(merge)
    unmerge()
    return taken


def second(merge: Callable[[], object], unmerge: Callable[[], object]) -> Time:
    merge()
    return seconds(unmerge)


def changed(base: nn.Module, adapted: nn.Module) -> int:
    """Elements of the base's parameters that differ in the adapted model."""
    now = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in adapted.named_parameters()}
    return sum(int((p != now[n]).sum()) for n, p in base.named_parameters())


# -- files -----------------------------------------------------------------------------------------------------------


def files(effort: Effort) -> Iterator[Row]:
    """Saving, the size, and loading onto a fresh base, each against peft's faster way."""
    for case in CASES:
        yield from (replace(row, group=case.group) for row in filed(effort, case))


def filed(effort: Effort, case: Case) -> Iterator[Row]:
    """Of one model."""
    base = case.build()
    _, adapter, peer = pair(case, base)
    where = f"{case.name}, {list(case.sites)[-1]}"
    with tempfile.TemporaryDirectory() as name:
        file, folder = Path(name, "ours.safetensors"), Path(name, "peft")
        saves: dict[str, Callable[[], object]] = {
            "ours": lambda: vm.save(adapter, file),
            "peft save_pretrained": lambda: peer.save_pretrained(str(folder)),
            "peft state dict and config": lambda: save_lean(peer, folder),
        }
        samples = effort.interleave({n: partial(seconds, call) for n, call in saves.items()}, times=3)
        best = fastest(samples, "peft")
        yield compare("save", where, "s", samples["ours"], samples[best], best)
        size = file.stat().st_size
        assert case is not VIT_B or size <= LARGEST_FILE, f"{size:,} bytes, more than {LARGEST_FILE:,}"
        theirs, config = ((folder / f"adapter_{n}").stat().st_size for n in ("model.safetensors", "config.json"))
        yield exact("file", where, "bytes", size, theirs, f"peft: and {config:,} B of adapter_config.json")
        loads: dict[str, Callable[[nn.Module], object]] = {
            "ours": lambda model: vm.load(model, file),
            "peft from_pretrained": lambda model: from_pretrained(model, folder),
            "peft low_cpu_mem_usage": lambda model: from_pretrained(model, folder, low_cpu_mem_usage=True),
        }
        samples = effort.interleave({n: partial(on_copy, base, call) for n, call in loads.items()}, times=3)
        best = fastest(samples, "peft")
        yield compare("load onto the base", where, "s", samples["ours"], samples[best], best)


def save_lean(model: PeftModel, folder: Path) -> None:
    """What `save_pretrained` writes, without the model card."""
    save_file(get_peft_model_state_dict(model), folder / "adapter_model.safetensors", {"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))


def from_pretrained(model: Any, folder: Path, low_cpu_mem_usage: bool = False) -> PeftModel:
    peer = PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=low_cpu_mem_usage)
    assert count(peer) and not any(p.is_meta for p in peer.parameters())
    return peer


def on_copy(base: nn.Module, call: Callable[[nn.Module], object]) -> Time:
    model = copy.deepcopy(base)
    return seconds(lambda: call(model))


# -- switch ----------------------------------------------------------------------------------------------------------

NAMES = ("first", "second")


def switching(effort: Effort) -> Iterator[Row]:
    """From one adapter to another on the same model."""
    for case in (*CASES, SDXL):
        model, peer = case.build(), with_both(case)
        for name in NAMES:
            vm.adapt(model, ours(*case.shared), name)
        calls = {"ours": partial(vm.use, model), "peft": peer.set_adapter}
        samples = effort.interleave({n: partial(there_and_back, call) for n, call in calls.items()}, times=3)
        where = f"{case.name}, {list(case.sites)[-1]}"
        row = compare("switch between two adapters", where, "s", samples["ours"], samples["peft"])
        yield replace(row, group=case.group)


def with_both(case: Case) -> Any:
    """peft's adapters of both names, through its wrapper or through diffusers."""
    if case is SDXL:
        unet = case.build()
        for name in NAMES:
            unet.add_adapter(theirs(*case.targets), name)
        return unet
    peer = get_peft_model(case.build(), theirs(*case.targets), NAMES[0])
    peer.add_adapter(NAMES[1], theirs(*case.targets))
    return peer


def there_and_back(use: Callable[[str], object]) -> Time:
    return seconds(lambda: [use(name) for name in NAMES]) / len(NAMES)
