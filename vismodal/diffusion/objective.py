"""What DreamBooth descends on: the loss over the photos and the class images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from vismodal.diffusion.denoise import Mixed, Pictures, Prompts, Reading, Weights, denoising
from vismodal.diffusion.kinds import Pipe
from vismodal.diffusion.recipe import Recipe
from vismodal.diffusion.subjects import Shown
from vismodal.runs import known
from vismodal.train import Micro


def weights_of(config: Recipe) -> Weights:
    return Weights(config.prior, config.min_snr, config.offset_noise, config.levels)


def loss_of(
    config: Recipe, pipe: Pipe, subjects: Sequence[Shown], classes: Sequence[Shown]
) -> Callable[[Micro], Mapping[str, Tensor]]:
    """The loss of a micro-batch, over the subjects' photos and, with a prior, as many images of their classes."""
    size, crop, flip, cache = known(config.resolution), config.crop, config.flip, config.cache
    pictures = partial(Pictures, pipe, size=size, crop=crop, flip=flip, cache=cache)

    def reading(name: str, shown: Sequence[Shown]) -> Reading:
        names = [name] if len(shown) == 1 else [f"{name} {i}" for i in range(len(shown))]
        each = [
            pictures(n, [p.image for p in s.photos], s.prompts, sizes=[p.size or p.image.size for p in s.photos])
            for n, s in zip(names, shown, strict=True)
        ]
        return Mixed(name, each) if len(each) > 1 else each[0]

    sets = [reading("instance", subjects), *([reading("class", classes)] if config.prior else [])]
    encode = Prompts(pipe, cache=cache and not config.train_text_encoder and not config.tokens)
    return denoising(pipe, sets, encode, known(config.batch), weights_of(config))
