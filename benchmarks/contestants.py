"""Parts of `methods.py`: who runs on which model, with which options, and where the search for a rate begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import vismodal as vm
from vismodal.methods import Method

Name = Literal["tiny-vit", "tiny-clip", "tiny-sd"]
NAMES: tuple[Name, ...] = get_args(Name)

FULL = "full fine-tuning"  # all parameters of a copy of the model, without the library
IMAGES = "*visual*"  # for what a text tower cannot take: prompts, a grid of patches, a ladder
WEIGHTS = ("attn.*", "xattn.*", "mlp.*", "conv")  # of a UNet, as in `vismodal bench emoji`
SMALL = {"tokens": (2, 4, 8), "ranks": (2, 4, 8, 16), "widths": (2, 4, 8, 16)}  # NOAH's, a sixth of the paper's


@dataclass(frozen=True)
class Contestant:
    """A method as it runs on one model, and the learning rate that is tried first.

    Args:
        method: None trains all parameters, plainly.
        lr: of AdamW; the search goes up or down from there.
    """

    method: Method | None
    lr: float


# where the search begins: whole matrices, then vectors and prompts; all others at 3e-3
WHOLE = (FULL, "Tune", "CrossAttention", "SideTuning")
VECTORS = ("IA3", "SSF", "BitFit", "NormTuning", "VeRA", "VPT", "VPT-shallow", "Prefix", "LinearProbe", "CoOp")
VECTORS += ("CLIPAdapter",)


def start(label: str) -> float:
    return 3e-4 if label in WHOLE else 1e-2 if label in VECTORS else 3e-3


def contestants(model: Name) -> dict[str, Contestant]:
    """By label, those that the model can take."""
    options = {"tiny-vit": VIT, "tiny-clip": CLIP, "tiny-sd": SD}[model]
    found: dict[str, Contestant] = {FULL: Contestant(None, start(FULL))}
    for label, kind in LABELS.items():
        if label in LEFT_OUT[model]:
            continue
        settings = {**COMMON.get(label, {}), **options.get(label, {})}
        found[label] = Contestant(kind(**settings), start(label))
    return found


LABELS: Mapping[str, type[Method]] = {
    **{m.__name__: m for m in (vm.LinearProbe, vm.Tune, vm.BitFit, vm.NormTuning, vm.CrossAttention, vm.SparseMask)},
    **{m.__name__: m for m in (vm.LoRA, vm.DoRA, vm.PiSSA, vm.VeRA, vm.AdaLoRA, vm.DyLoRA, vm.LoHa, vm.LoKr)},
    "CLIP-LoRA": vm.LoRA,
    "FacT-TT": vm.FacT,
    "FacT-TK": vm.FacT,
    **{m.__name__: m for m in (vm.OFT, vm.BOFT, vm.IA3, vm.SSF)},
    **{m.__name__: m for m in (vm.AdaptFormer, vm.Houlsby, vm.Pfeiffer, vm.AdapterPlus, vm.Convpass, vm.RepAdapter)},
    "VPT": vm.VPT,
    "VPT-shallow": vm.VPT,
    **{m.__name__: m for m in (vm.Prefix, vm.UniPELT, vm.NOAH, vm.SideTuning, vm.Ladder, vm.ResTuningBypass)},
    "DTL": vm.DTL,
    "DTL+": vm.DTL,
    **{m.__name__: m for m in (vm.CoOp, vm.CoCoOp, vm.MaPLe, vm.IVLP, vm.PromptSRC, vm.CLIPAdapter)},
    "Tip-Adapter": vm.TipAdapter,
    "Tip-Adapter-F": vm.TipAdapter,
}

# of CLIPClassifier alone
CLASSIFIER = (
    "CoOp",
    "CoCoOp",
    "MaPLe",
    "IVLP",
    "PromptSRC",
    "CLIPAdapter",
    "Tip-Adapter",
    "Tip-Adapter-F",
    "CLIP-LoRA",
)
# Why: a CLIP has no head. UniPELT's gates need q, k and v of a layer of their own, which neither
# nn.MultiheadAttention nor a UNet has. A UNet's stream has no width, grid or prefix that is known beforehand.
LEFT_OUT: Mapping[Name, tuple[str, ...]] = {
    "tiny-vit": (*CLASSIFIER, "CrossAttention"),
    "tiny-clip": ("LinearProbe", "CrossAttention", "UniPELT"),
    "tiny-sd": (*CLASSIFIER, "LinearProbe", "UniPELT", "Convpass", "Ladder", "VPT-shallow"),
}

COMMON: Mapping[str, Mapping[str, Any]] = {
    "Tune": {"sites": ("attn.*", "mlp.*")},
    "FacT-TK": {"tucker": True},
    "VPT": {"patch_size": 4},
    "VPT-shallow": {"patch_size": 4, "sites": ("tokens",)},
    "NOAH": SMALL,
    "DTL+": {"kernel": 3},
    "Tip-Adapter-F": {"train_keys": True},
    # arXiv 2405.18541
    "CLIP-LoRA": {
        "sites": ("attn.q", "attn.k", "attn.v"), "rank": 2, "alpha": 1.0, "rank_stabilised": True, "dropout": 0.25,
    },
}  # fmt: skip
VIT: Mapping[str, Mapping[str, Any]] = {
    "UniPELT": {"width": 12},  # the paper's sixteenth of the model's width
    "SideTuning": {"side": "copy"},
}
CLIP: Mapping[str, Mapping[str, Any]] = {
    **{label: {"where": IMAGES} for label in ("Convpass", "VPT", "VPT-shallow", "Prefix", "SideTuning", "Ladder")},
    **{label: {"where": IMAGES} for label in ("ResTuningBypass", "DTL+", "NOAH")},
    **{label: {"depth": 3} for label in ("MaPLe", "PromptSRC")},  # the text tower has three blocks
}
SD: Mapping[str, Mapping[str, Any]] = {
    **{
        label: {"sites": WEIGHTS}
        for label in (
            "Tune", "SparseMask", "LoRA", "DoRA", "PiSSA", "VeRA", "AdaLoRA", "DyLoRA", "LoHa", "LoKr",
            "FacT-TT", "FacT-TK", "OFT", "BOFT",
        )
    },
    "IA3": {"sites": ("attn.k", "attn.v", "xattn.k", "xattn.v", "mlp.down")},
    "SSF": {"sites": ("norm", "attn.*", "xattn.*", "mlp.*", "conv")},
    "RepAdapter": {"sites": ("attn.*", "xattn.*", "mlp.*"), "bias": False},  # its q, k and v have no bias
    "Houlsby": {"sites": ("*attn", "mlp")},
    "Prefix": {"sites": ("keys", "xattn.keys")},
    "NOAH": {"sites": ("block", "attn.q", "attn.k", "attn.v", "mlp")},
    "SideTuning": {"alpha": 3.0},  # near the base: a side that sees neither step nor text can only correct it
    "ResTuningBypass": {"sites": ("decoder",)},
}  # fmt: skip
