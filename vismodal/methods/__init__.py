"""The methods: one paper, one file. `METHODS` is the registry that the tables and the tests read."""

from vismodal.methods.adapterplus import AdapterPlus
from vismodal.methods.adaptformer import AdaptFormer
from vismodal.methods.base import Built, Method, Part, WeightModule
from vismodal.methods.boft import BOFT
from vismodal.methods.convpass import Convpass
from vismodal.methods.fact import FacT
from vismodal.methods.houlsby import Houlsby
from vismodal.methods.loha import LoHa
from vismodal.methods.lokr import LoKr
from vismodal.methods.lora import LoRA
from vismodal.methods.oft import OFT
from vismodal.methods.pfeiffer import Pfeiffer
from vismodal.methods.prefix import Prefix
from vismodal.methods.repadapter import RepAdapter
from vismodal.methods.tune import Tune
from vismodal.methods.vpt import VPT

METHODS: tuple[type[Method], ...] = (
    LoRA, Tune, AdaptFormer, Houlsby, Pfeiffer, AdapterPlus, Convpass, RepAdapter,
    VPT, Prefix,
    LoHa, LoKr, FacT, OFT, BOFT,
)  # fmt: skip

__all__ = [
    "BOFT",
    "METHODS",
    "OFT",
    "VPT",
    "AdaptFormer",
    "AdapterPlus",
    "Built",
    "Convpass",
    "FacT",
    "Houlsby",
    "LoHa",
    "LoKr",
    "LoRA",
    "Method",
    "Part",
    "Pfeiffer",
    "Prefix",
    "RepAdapter",
    "Tune",
    "WeightModule",
]
