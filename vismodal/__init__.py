"""vismodal: parameter-efficient adaptation of vision, vision-language and diffusion models.

import vismodal as vm
a = vm.adapt(model, vm.LoRA(rank=8), name="pets")
"""

from vismodal.adapter import Adapter
from vismodal.attach import adapt, attached, sites, use
from vismodal.catalogue import families, methods
from vismodal.checkpoint import load, save
from vismodal.errors import InputError
from vismodal.methods import (
    BOFT,
    OFT,
    VPT,
    AdapterPlus,
    AdaptFormer,
    Convpass,
    FacT,
    Houlsby,
    LoHa,
    LoKr,
    LoRA,
    Pfeiffer,
    Prefix,
    RepAdapter,
    Tune,
)
from vismodal.site import Site, Sites, Span, Tower, Weight

__version__ = "0.1.0"

__all__ = [
    "BOFT",
    "OFT",
    "VPT",
    "AdaptFormer",
    "Adapter",
    "AdapterPlus",
    "Convpass",
    "FacT",
    "Houlsby",
    "InputError",
    "LoHa",
    "LoKr",
    "LoRA",
    "Pfeiffer",
    "Prefix",
    "RepAdapter",
    "Site",
    "Sites",
    "Span",
    "Tower",
    "Tune",
    "Weight",
    "adapt",
    "attached",
    "families",
    "load",
    "methods",
    "save",
    "sites",
    "use",
]
