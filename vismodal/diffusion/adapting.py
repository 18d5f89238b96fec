"""What DreamBooth trains."""

from __future__ import annotations

from functools import partial

import vismodal as vm
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.presets import adapted, checkpoint_gradients, sites_of
from vismodal.diffusion.recipe import Recipe
from vismodal.draw import seed_of
from vismodal.runs import known


def adapt(config: Recipe, pipe: Pipe) -> vm.Adapter:
    """LoRA on the denoiser and, where they are trained, the text encoders; the models are in training mode then."""
    lora = partial(vm.LoRA, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
    kind, models = kind_of(pipe), adapted(pipe, config.train_text_encoder)
    methods = [
        lora(
            sites=sites_of(model, known(config.sites) if name == kind.denoiser else config.text_sites),
            where=f"{name}.*",
            layers=kind.layers.get(name),
        )
        for name, model in models.items()
    ]
    adapter = vm.adapt(models, methods, name="dreambooth", seed=seed_of(config.seed, "adapter"))
    for model in models.values():
        model.train()
    if config.gradient_checkpointing:
        checkpoint_gradients(models)
    return adapter
