"""The methods: one paper, one file. `METHODS` is the registry that the tables and the tests read."""

from vismodal.methods.adalora import AdaLoRA
from vismodal.methods.adapterplus import AdapterPlus
from vismodal.methods.adaptformer import AdaptFormer
from vismodal.methods.base import Built, Condition, Method, Part, WeightModule
from vismodal.methods.boft import BOFT
from vismodal.methods.clipadapter import CLIPAdapter
from vismodal.methods.cocoop import CoCoOp
from vismodal.methods.convpass import Convpass
from vismodal.methods.coop import CoOp
from vismodal.methods.dora import DoRA
from vismodal.methods.dtl import DTL
from vismodal.methods.dylora import DyLoRA
from vismodal.methods.fact import FacT
from vismodal.methods.houlsby import Houlsby
from vismodal.methods.ia3 import IA3
from vismodal.methods.ipadapter import IPAdapter
from vismodal.methods.ivlp import IVLP
from vismodal.methods.ladder import Ladder
from vismodal.methods.loha import LoHa
from vismodal.methods.lokr import LoKr
from vismodal.methods.lora import LoRA
from vismodal.methods.maple import MaPLe
from vismodal.methods.noah import NOAH
from vismodal.methods.oft import OFT
from vismodal.methods.pfeiffer import Pfeiffer
from vismodal.methods.pissa import PiSSA
from vismodal.methods.prefix import Prefix
from vismodal.methods.promptsrc import PromptSRC
from vismodal.methods.repadapter import RepAdapter
from vismodal.methods.restuning import ResTuningBypass
from vismodal.methods.selective import BitFit, CrossAttention, LinearProbe, NormTuning
from vismodal.methods.sidetuning import SideTuning
from vismodal.methods.sparse import SparseMask
from vismodal.methods.ssf import SSF
from vismodal.methods.t2iadapter import T2IAdapter
from vismodal.methods.textualinversion import TextualInversion
from vismodal.methods.tipadapter import TipAdapter
from vismodal.methods.tune import Tune
from vismodal.methods.unipelt import UniPELT
from vismodal.methods.vera import VeRA
from vismodal.methods.vpt import VPT

METHODS: tuple[type[Method], ...] = (
    LoRA, Tune, AdaptFormer, Houlsby, Pfeiffer, AdapterPlus, Convpass, RepAdapter,
    VPT, Prefix, UniPELT, NOAH,
    LoHa, LoKr, FacT, OFT, BOFT,
    SideTuning, Ladder, ResTuningBypass, DTL,
    DoRA, PiSSA, VeRA, AdaLoRA, DyLoRA, IA3, SSF, BitFit, NormTuning, CrossAttention, LinearProbe, SparseMask,
    CoOp, CoCoOp, MaPLe, IVLP, PromptSRC, CLIPAdapter, TipAdapter,
    TextualInversion, T2IAdapter, IPAdapter,
)  # fmt: skip

__all__ = [
    "BOFT",
    "DTL",
    "IA3",
    "IVLP",
    "METHODS",
    "NOAH",
    "OFT",
    "SSF",
    "VPT",
    "AdaLoRA",
    "AdaptFormer",
    "AdapterPlus",
    "BitFit",
    "Built",
    "CLIPAdapter",
    "CoCoOp",
    "CoOp",
    "Condition",
    "Convpass",
    "CrossAttention",
    "DoRA",
    "DyLoRA",
    "FacT",
    "Houlsby",
    "IPAdapter",
    "Ladder",
    "LinearProbe",
    "LoHa",
    "LoKr",
    "LoRA",
    "MaPLe",
    "Method",
    "NormTuning",
    "Part",
    "Pfeiffer",
    "PiSSA",
    "Prefix",
    "PromptSRC",
    "RepAdapter",
    "ResTuningBypass",
    "SideTuning",
    "SparseMask",
    "T2IAdapter",
    "TextualInversion",
    "TipAdapter",
    "Tune",
    "UniPELT",
    "VeRA",
    "WeightModule",
]
