"""Speed and memory against peft: import, injection, training step, forward, merge, files, switch.

    OMP_WAIT_POLICY=passive python benchmarks/speed.py                 # minutes on 2 cores; writes results/speed.md
    OMP_WAIT_POLICY=passive python benchmarks/speed.py --quick true    # about a minute; prints the table only

Both packages run in this one process, interleaved. LoRA r=8 everywhere, on the same base values, AdamW, random pixels.
peft's LoRA cannot adapt rows of a fused qkv: its r=8 over the whole has as many parameters as ours on q and v apart,
and is compared with both that and ours over the whole. Where peft has several ways, its fastest is taken. Columns are
medians by the wall clock, ratios medians over the rounds; below 1, ours takes less. Processor time says more where
other programs run beside.

torch runs `nn.MultiheadAttention` in bf16 autocast without gradients as a product that copies the weights for every
picture (aten::bmm, four fifths of the time): there the frozen base alone takes six times as long as in fp32, and with
it a side network, beside which the backbone builds no graph.
"""

import copy
import gc
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from kept import files, merging, switching
from live import overhead, training
from measure import Effort, Row, Time, compare, facts, fastest, report, seconds, show, write
from peers import CLIP, SDXL, VIT_B, VIT_S, Case, count, ours, theirs
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

import vismodal as vm

PARAMETERS = {VIT_S: 147_456, VIT_B: 294_912, CLIP: 442_368, SDXL: 11_612_160}
SDXL_SITES = 560
QUICK = Effort(rounds=2, least=2, seconds=2, batch=1)  # shows that all runs; figures that mean something need more

Part = Literal["imports", "injection", "training", "overhead", "merging", "files", "switching"]


def imports(effort: Effort) -> Iterator[Row]:
    """What the packages add to `import torch`, each in a new process."""
    samples = effort.interleave({name: partial(import_cost, name) for name in ("vismodal", "peft")})
    yield compare("import, over torch's", "a new process", "s", samples["vismodal"], samples["peft"])


def import_cost(name: str) -> Time:
    """Ours brings in neither transformers nor diffusers."""
    code = (
        f"import sys, time, torch; wall, cpu = time.perf_counter(), time.process_time(); import {name}; "
        "print(time.perf_counter() - wall, time.process_time() - cpu, "
        "*(sys.modules.keys() & {'transformers', 'diffusers'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wall, cpu, *heavy = run.stdout.split()
    assert name != "vismodal" or not heavy, f"import vismodal imports {heavy}"
    return Time(float(wall), float(cpu))


Way = Callable[[Any], Any]


def injection(effort: Effort) -> Iterator[Row]:
    """LoRA r=8 into ViT-S/16, ViT-B/16, open_clip's ViT-B/32, and every attention projection of SDXL's UNet."""
    for case in (VIT_S, VIT_B, CLIP):
        inject = {
            "peft get_peft_model": lambda m, case=case: get_peft_model(m, theirs(*case.targets)),
            "peft inject_adapter_in_model": lambda m, case=case: inject_adapter_in_model(theirs(*case.targets), m),
        }
        yield from injected(effort, case, inject, times=3)
    inject = {
        "peft add_adapter": lambda m: m.add_adapter(theirs(*SDXL.targets)) or m,
        "peft inject_adapter_in_model": lambda m: inject_adapter_in_model(theirs(*SDXL.targets), m),
        "peft low_cpu_mem_usage": lambda m: inject_adapter_in_model(theirs(*SDXL.targets), m, low_cpu_mem_usage=True),
        "peft under torch.device('meta')": on_meta,
    }
    yield from injected(effort, SDXL, inject, times=1)
    sites = len(vm.adapt(SDXL.build(), ours(*SDXL.shared)).modules)
    assert sites == SDXL_SITES, f"{sites} sites, not {SDXL_SITES}"


def on_meta(model: Any) -> nn.Module:
    with torch.device("meta"):
        return inject_adapter_in_model(theirs(*SDXL.targets), model)


def injected(effort: Effort, case: Case, peer: Mapping[str, Way], times: int) -> Iterator[Row]:
    """Each of our site lists against the fastest of peft's ways; all must make the same number of parameters."""
    base = case.build()
    mine: dict[str, Way] = {name: partial(vm.adapt, method=ours(*sites)) for name, sites in case.sites.items()}
    ways = {**mine, **peer}
    samples = effort.interleave({n: partial(inject, base, way, PARAMETERS[case]) for n, way in ways.items()}, times)
    best = fastest(samples, "peft")
    for name in mine:
        note = f"{PARAMETERS[case]:,} parameters; {best}"
        row = compare("injection", f"{case.name}, {name}", "s", samples[name], samples[best], note)
        yield replace(row, group=case.group)


def inject(base: nn.Module, way: Way, parameters: int) -> Time:
    model, made = copy.deepcopy(base), list[Any]()
    taken = seconds(lambda: made.append(way(model)))
    found = made[0].num_parameters if isinstance(made[0], vm.Adapter) else count(made[0])
    assert found == parameters, f"{found:,} parameters, not {parameters:,}"
    return taken


# -- the run ---------------------------------------------------------------------------------------------------------

PARTS: Mapping[Part, Callable[[Effort], Iterator[Row]]] = {
    "imports": imports,
    "injection": injection,
    "training": training,
    "overhead": overhead,
    "merging": merging,
    "files": files,
    "switching": switching,
}


@dataclass(frozen=True)
class Config:
    """Settings of the run.

    Args:
        quick: few rounds, instead of `effort`.
        effort: how long to measure.
        threads: of torch.
        parts: what to measure.
        out: the table without its suffix; by default results/speed for a full run, else none is written.
    """

    quick: bool = False
    effort: Effort = field(default_factory=Effort)
    threads: int = 2
    parts: tuple[Part, ...] = tuple(PARTS)
    out: Path | None = None


def main(c: Config) -> Sequence[Row]:
    """Measure, print the table, and write it where the run is a full one."""
    torch.set_num_threads(c.threads)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # open_clip, on random weights
    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter, as meant
    gc.freeze()  # what was imported need not be searched for garbage before every call
    about = {"vismodal": vm.__version__, **facts(("peft", "torch", "timm", "open_clip_torch", "diffusers"))}
    rows: list[Row] = []
    for part in c.parts:
        for row in PARTS[part](QUICK if c.quick else c.effort):
            rows.append(row)
            print(f"{row.task}, {row.setting}: {show(row.ours, row.unit)} / {show(row.peer, row.unit)}", flush=True)
    note = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
    text = report("Speed and memory against peft", rows, about, note, "peft")
    print(f"\n{text}")
    out = c.out or (None if c.quick or len(c.parts) < len(PARTS) else Path(__file__).parent / "results" / "speed")
    if out:
        write(text, rows, about, out)
    return rows


if __name__ == "__main__":
    main(auto_cli(Config, as_positional=False))
