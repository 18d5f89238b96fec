"""What every method says of itself, against one table written by hand from the papers, and facts about all of them."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import pytest
import timm
import torch
from zoo import BY_NAME, METHODS, close, fixed, shake

import vismodal as vm
from vismodal.methods import METHODS as registry
from vismodal.methods import Method


class Says(NamedTuple):
    survey: str  # arXiv 2403.14608
    merges: bool
    base: bool  # the output at the start is the base's
    between: bool  # scales between 0 and 1 mean something


ADAPTER, PROMPT, OTHER = "additive: adapters", "additive: soft prompts", "additive: others"
STRUCTURED, UNSTRUCTURED = "selective: structured", "selective: unstructured"
LOW_RANK, DERIVATIVE = "reparameterised: low rank", "reparameterised: LoRA derivatives"
SIDE = "efficiency: memory"
TABLE = {
    "T2IAdapter": Says(ADAPTER, False, False, True),
    "IPAdapter": Says(ADAPTER, False, False, True),
    "AdaptFormer": Says(ADAPTER, False, True, True),
    "Houlsby": Says(ADAPTER, False, False, True),  # off by about 1e-4
    "Pfeiffer": Says(ADAPTER, False, True, True),
    "AdapterPlus": Says(ADAPTER, False, False, True),  # by about 1%
    "Convpass": Says(ADAPTER, False, True, True),
    "RepAdapter": Says(ADAPTER, True, True, True),
    "CLIPAdapter": Says(ADAPTER, False, False, True),
    "TipAdapter": Says(ADAPTER, False, False, True),
    "VPT": Says(PROMPT, False, False, False),
    "Prefix": Says(PROMPT, False, False, False),
    "CoOp": Says(PROMPT, False, False, False),
    "CoCoOp": Says(PROMPT, False, False, False),
    "MaPLe": Says(PROMPT, False, False, False),
    "IVLP": Says(PROMPT, False, False, False),
    "PromptSRC": Says(PROMPT, False, False, False),
    "TextualInversion": Says(PROMPT, False, True, False),
    "IA3": Says(OTHER, True, True, True),
    "SSF": Says(OTHER, True, False, True),
    "Tune": Says(STRUCTURED, True, True, True),
    "BitFit": Says(STRUCTURED, True, True, True),
    "NormTuning": Says(STRUCTURED, True, True, True),
    "CrossAttention": Says(STRUCTURED, True, True, True),
    "LinearProbe": Says(STRUCTURED, True, True, True),
    "SparseMask": Says(UNSTRUCTURED, True, True, True),
    "LoRA": Says(LOW_RANK, True, True, True),
    "FacT": Says(LOW_RANK, True, True, True),
    "LoKr": Says(LOW_RANK, True, True, True),
    "LoHa": Says(LOW_RANK, True, True, True),
    "VeRA": Says(LOW_RANK, True, True, True),
    "DoRA": Says(DERIVATIVE, True, True, True),
    "AdaLoRA": Says(DERIVATIVE, True, True, True),
    "PiSSA": Says(DERIVATIVE, True, True, True),
    "DyLoRA": Says(DERIVATIVE, True, True, True),
    "OFT": Says(DERIVATIVE, True, True, True),
    "BOFT": Says(DERIVATIVE, True, True, True),
    "UniPELT": Says("hybrid", False, False, False),
    "NOAH": Says("hybrid", False, False, False),
    "SideTuning": Says(SIDE, False, False, True),
    "Ladder": Says(SIDE, False, False, True),
    "ResTuningBypass": Says(SIDE, False, False, True),
    "DTL": Says(SIDE, False, True, True),
}
every = pytest.mark.parametrize("method", registry, ids=lambda m: m.__name__)


def test_the_table_has_every_method() -> None:
    assert sorted(TABLE) == sorted(m.__name__ for m in registry)
    assert all(getattr(vm, m.__name__) is m and m.__name__ in vm.__all__ for m in registry)


@every
def test_a_method_is_what_its_paper_says(method: type[Method]) -> None:
    one = method()
    assert TABLE[method.__name__] == (one.survey, one.mergeable, one.starts_at_base, one.interpolates)
    assert method.paper.startswith("arXiv ")


@every
def test_a_method_names_its_paper_and_explains_its_fields(method: type[Method]) -> None:
    module, doc = inspect.getmodule(method), method.__doc__ or ""
    assert module is not None
    number = method.paper.removeprefix("arXiv ")
    assert number in (module.__doc__ or "") or number in doc or method in (vm.LinearProbe,)
    own = {name for c in method.__mro__ if c is not Method and issubclass(c, Method) for name in c.__annotations__}
    own -= {"sites", "survey", "paper", "mergeable", "interpolates", "starts_at_base", "elsewhere", "quantised"}
    own -= {"conditioned"}
    own -= {"kinds", "pair"}  # of the class, not of an instance
    own -= {"kinds", "pair", "whole"}  # of the class, not of an instance
    docs = " ".join(c.__doc__ or "" for c in method.__mro__ if issubclass(c, Method))
    assert [name for name in own if f"{name}:" not in docs] == []


def test_the_body_and_the_head_of_vit_base() -> None:
    for classes in (10, 1000):
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224", num_classes=classes)
        total = sum(p.numel() for p in model.parameters())
        assert total - 769 * classes == 85_798_656
        assert vm.adapt(model, vm.LinearProbe()).num_parameters == 769 * classes


VIT = [name for name, trial in METHODS.items() if any(g in ("*", "*vit*", "timm-vit*", "timm*") for g in trial.claims)]


@pytest.mark.parametrize("name", VIT)
def test_zeros_stay_zeros_while_the_model_is_built_anew(name: str) -> None:
    """The official code of some loses them, or begins with two zero factors."""
    case = BY_NAME["timm-vit_tiny_patch16_224"]
    model = case.model()
    adapter = vm.adapt(model, METHODS[name].make(model), seed=0)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    model.init_weights()
    model.reset_classifier(4)
    after = adapter.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    assert [k for k, v in after.items() if not v.any()] == [k for k, v in before.items() if not v.any()]


def test_one_method_twice_and_the_list_in_its_order() -> None:
    """MAM (arXiv 2110.04366), of the survey's hybrids, is a list: prefixes, and parallel adapters at the MLP."""
    model = BY_NAME["timm-vit_tiny_patch16_224"].model()
    images = fixed(2, 3, 32, 32)
    outputs = []
    for methods in ([vm.Prefix(tokens=2), vm.AdaptFormer(rank=4)], [vm.AdaptFormer(rank=4), vm.Prefix(tokens=2)]):
        adapter = vm.adapt(model, methods, seed=0)
        assert list(adapter.methods) == [type(m).__name__.lower() for m in methods]
        for key, module in adapter.modules.items():
            with torch.no_grad():
                for p in module.parameters():
                    p.copy_(fixed(*p.shape) * (1 + len(key)) / 50)
        outputs.append(model(images))
        adapter.detach()
    assert close(outputs[0], outputs[1], 1e-6)  # they act at different places
    adapter = vm.adapt(model, [vm.LoRA(rank=2), vm.LoRA(rank=2, sites=("attn.k",))])
    shake(adapter)
    assert {k.partition("/")[0] for k in adapter.modules} == {"lora", "lora_1"}
