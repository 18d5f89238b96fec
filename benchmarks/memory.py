"""What a training step keeps in memory for its backward: side networks beside LoRA.

    python benchmarks/memory.py                 # a few minutes and 8 GB on 2 cores; writes results/memory.md
    python benchmarks/memory.py --quick true    # small models, seconds; prints the tables only

Bytes of all tensors that autograd saves in one forward in fp32 training mode, each storage once, without the parameters
(`torch.autograd.graph.saved_tensors_hooks`). They do not depend on the machine's load. Random weights and inputs. A
side network beside a frozen backbone keeps what the side itself needs and nothing of the backbone; DTL keeps the
backbone from the first write-back on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse import auto_cli
from measure import facts, kept_bytes
from torch import Tensor, nn

import vismodal as vm
from vismodal.methods import Method
from vismodal.table import markdown

Run = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Config:
    """Settings of the run.

    Args:
        quick: small models; none of its figures mean anything.
        batch: pictures of 224 px for ViT-B/16.
        threads: of torch.
    """

    quick: bool = False
    batch: int = 8
    threads: int = 2


VIT: Mapping[str, Method] = {
    "LoRA r=8, q and v": vm.LoRA(),
    "DTL r=2": vm.DTL(),
    "DTL+ r=2": vm.DTL(kernel=3),
    "Res-Tuning bypass r=32": vm.ResTuningBypass(),
    "Ladder, 1/8 of the width": vm.Ladder(),
    "Side-tuning, fcn4": vm.SideTuning(),
    "Side-tuning, ResNet-18": vm.SideTuning(side="resnet18"),
}
UNET: Mapping[str, Method] = {
    "LoRA r=8, all attention": vm.LoRA(sites=("attn.*", "xattn.*")),
    "DTL r=2": vm.DTL(),
    "DTL+ r=2": vm.DTL(kernel=3),
    "Res-Tuning bypass r=32": vm.ResTuningBypass(sites=("decoder",)),
    "Side-tuning, fcn4": vm.SideTuning(),
}


def vit(c: Config) -> tuple[str, nn.Module, Run]:
    """ViT-B/16, or a small one."""
    sizes: dict[str, Any] = {"img_size": 32, "depth": 4, "embed_dim": 192, "num_heads": 3} if c.quick else {}
    x = torch.randn(c.batch, 3, sizes.get("img_size", 224), sizes.get("img_size", 224))
    model = timm.create_model("vit_base_patch16_224", num_classes=100, **sizes)
    return f"ViT-B/16, batch {c.batch}, 224 px", model, lambda m: m(x)


def unet(c: Config) -> tuple[str, nn.Module, Run]:
    """The UNet of Stable Diffusion 1.5 from its published config, or a small one."""
    from diffusers import UNet2DConditionModel

    channels = (16, 32, 32, 32) if c.quick else (320, 640, 1280, 1280)
    model = UNet2DConditionModel(
        block_out_channels=channels, cross_attention_dim=768, attention_head_dim=8, norm_num_groups=8 if c.quick else 32
    )
    x, steps, text = torch.randn(1, 4, 32, 32), torch.tensor([500]), torch.randn(1, 77, 768)
    return "UNet of Stable Diffusion 1.5, batch 1, 256 px", model, lambda m: m(x, steps, text).sample


def table(name: str, model: nn.Module, run: Run, methods: Mapping[str, Method]) -> str:
    """A row for training all of it and one for each method, with what it keeps and how much that is of LoRA's."""

    def kept() -> int:
        return kept_bytes(model, lambda: run(model).square().mean())

    model.train()
    found = {"all parameters": (sum(p.numel() for p in model.parameters()), kept())}
    for label, method in methods.items():
        adapter = vm.adapt(model, method, seed=0)
        found[label] = adapter.num_parameters, kept()
        adapter.detach()
        print(f"{name}, {label}: {show(found[label][1])}", flush=True)
    lora = next(size for label, (_, size) in found.items() if label.startswith("LoRA"))
    rows = [[label, f"{n:,}", show(size), f"{size / lora:.2f}"] for label, (n, size) in found.items()]
    head = ["trained", "parameters", "kept for the backward", "of LoRA's"]
    return f"## {name}\n\n{markdown(head, rows)}\n"


def show(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def main(c: Config) -> Sequence[str]:
    """Measure, print the tables, and write them where the run is a full one."""
    torch.set_num_threads(c.threads)
    torch.manual_seed(0)
    tables = [table(*make(c), methods) for make, methods in ((vit, VIT), (unet, UNET))]
    about = {k: v for k, v in facts(("torch", "timm", "diffusers")).items() if k not in ("load before", "cores")}
    note = (__doc__ or "").split("\n\n")[-1].strip()
    versions = ", ".join(f"{k} {v}" for k, v in {"vismodal": vm.__version__, **about}.items())
    text = f"# What a step keeps for its backward\n\n{note}\n\nMeasured with {versions}.\n\n" + "\n".join(tables)
    print(f"\n{text}")
    if not c.quick:
        (Path(__file__).parent / "results" / "memory.md").write_text(text)
    return tables


if __name__ == "__main__":
    main(auto_cli(Config, as_positional=False))
