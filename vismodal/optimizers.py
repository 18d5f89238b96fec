"""The optimisers of pipelines by name. AdamW is torch's; the others have packages of their own, loaded when asked for.

optimizer = optimizer_for("prodigy", adapter.groups(1.0, 0.01))
fit(loss, adapter, optimizer, plan=plan)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from vismodal.errors import InputError

OptimizerName = Literal["adamw", "adamw8bit", "prodigy"]


def optimizer_for(name: OptimizerName, groups: Sequence[Mapping[str, Any]]) -> Optimizer:
    """The optimiser of parameter groups that have their learning rates and weight decays, as `adapter.groups` gives.

    adamw: AdamW (Loshchilov and Hutter 2019), torch's. adamw8bit: the same with its averages in 8 bits (Dettmers et
    al. 2022, arXiv 2110.02861), of bitsandbytes; tensors of fewer than 4096 entries keep theirs in fp32. prodigy: Adam
    that finds its own step size (Mishchenko and Defazio 2023, arXiv 2306.06101), of prodigyopt; the learning rate is a
    factor on what it finds, and 1. It runs with bias correction and with the safeguard for a warm-up, which its authors
    advise for diffusion models.

    Raises `InputError` where the package is missing, and for prodigy where groups differ in their learning rates.
    """
    params = [dict(group) for group in groups]
    match name:
        case "adamw":
            return torch.optim.AdamW(params)
        case "adamw8bit":
            made: Optimizer = _package("bitsandbytes", name, "8bit").optim.AdamW8bit(params)
            return made
        case "prodigy":
            rates = sorted({group["lr"] for group in params})
            if len(rates) > 1:
                raise InputError(
                    f"prodigy finds one step size for all, but is given the learning rates {rates}; make them equal, "
                    "with no ratio in the method and the same --token_learning_rate, or write --optimizer adamw"
                )
            prodigy = _package("prodigyopt", name, "prodigy").Prodigy
            found: Optimizer = prodigy(params, lr=rates[0], use_bias_correction=True, safeguard_warmup=True)
            return found
    raise InputError(f"there is no optimiser {name!r}; write adamw, adamw8bit or prodigy")


def _package(name: str, optimizer: str, extra: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
        raise InputError(
            f"the optimiser {optimizer} needs the package {name}, which {why}; write "
            f'pip install "vismodal[{extra}]", or --optimizer adamw'
        ) from error
