"""The methods: one paper, one file. `METHODS` is the registry that the tables and the tests read."""

from vismodal.methods.base import Built, Method, Part, WeightModule
from vismodal.methods.lora import LoRA
from vismodal.methods.tune import Tune

METHODS: tuple[type[Method], ...] = (LoRA, Tune)

__all__ = ["METHODS", "Built", "LoRA", "Method", "Part", "Tune", "WeightModule"]
