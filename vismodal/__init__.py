"""vismodal: parameter-efficient adaptation of vision, vision-language and diffusion models.

import vismodal as vm
a = vm.adapt(model, vm.LoRA(rank=8), name="pets")
"""

from vismodal import models
from vismodal.adapter import Adapter, adapt, attached, sites, use
from vismodal.catalogue import families, methods
from vismodal.checkpoint import load, save
from vismodal.errors import InputError
from vismodal.methods import LoRA, Tune
from vismodal.site import Site, Sites, Span, Tower, Weight

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "InputError",
    "LoRA",
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
    "models",
    "save",
    "sites",
    "use",
]
