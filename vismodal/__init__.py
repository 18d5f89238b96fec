"""vismodal: parameter-efficient adaptation of vision, vision-language and diffusion models.

import vismodal as vm
a = vm.adapt(model, vm.LoRA(rank=8), name="pets")
"""

from vismodal import models
from vismodal.adapter import Adapter
from vismodal.attach import adapt, attached, sites, use
from vismodal.catalogue import families, methods
from vismodal.checkpoint import load, save
from vismodal.clip import CLIPClassifier
from vismodal.errors import InputError
from vismodal.evolve import evolve
from vismodal.methods import (
    BOFT,
    DTL,
    IA3,
    IVLP,
    NOAH,
    OFT,
    SSF,
    VPT,
    AdaLoRA,
    AdapterPlus,
    AdaptFormer,
    BitFit,
    CLIPAdapter,
    CoCoOp,
    Convpass,
    CoOp,
    CrossAttention,
    DoRA,
    DyLoRA,
    FacT,
    Houlsby,
    Ladder,
    LinearProbe,
    LoHa,
    LoKr,
    LoRA,
    MaPLe,
    NormTuning,
    Pfeiffer,
    PiSSA,
    Prefix,
    PromptSRC,
    RepAdapter,
    ResTuningBypass,
    SideTuning,
    SparseMask,
    TipAdapter,
    Tune,
    UniPELT,
    VeRA,
)
from vismodal.prefix.frozen import FrozenPrefix
from vismodal.route import route
from vismodal.site import Site, Sites, Span, Tower, Weight

__version__ = "0.1.0"

__all__ = [
    "BOFT",
    "DTL",
    "IA3",
    "IVLP",
    "NOAH",
    "OFT",
    "SSF",
    "VPT",
    "AdaLoRA",
    "AdaptFormer",
    "Adapter",
    "AdapterPlus",
    "BitFit",
    "CLIPAdapter",
    "CLIPClassifier",
    "CoCoOp",
    "CoOp",
    "Convpass",
    "CrossAttention",
    "DoRA",
    "DyLoRA",
    "FacT",
    "FrozenPrefix",
    "Houlsby",
    "InputError",
    "Ladder",
    "LinearProbe",
    "LoHa",
    "LoKr",
    "LoRA",
    "MaPLe",
    "NormTuning",
    "Pfeiffer",
    "PiSSA",
    "Prefix",
    "PromptSRC",
    "RepAdapter",
    "ResTuningBypass",
    "SideTuning",
    "Site",
    "Sites",
    "Span",
    "SparseMask",
    "TipAdapter",
    "Tower",
    "Tune",
    "UniPELT",
    "VeRA",
    "Weight",
    "adapt",
    "attached",
    "evolve",
    "families",
    "load",
    "methods",
    "models",
    "route",
    "save",
    "sites",
    "use",
]
