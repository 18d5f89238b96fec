"""What DreamBooth descends on: the loss over the photos and the class images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

import vismodal as vm
from vismodal.diffusion.denoise import Prompts, Weights, denoising
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.pictures import Masks, Mixed, Pictures, Reading
from vismodal.diffusion.recipe import Recipe
from vismodal.diffusion.subjects import Shown
from vismodal.runs import known
from vismodal.train import Micro


def weights_of(config: Recipe) -> Weights:
    return Weights(config.prior, config.min_snr, config.offset_noise, config.levels)


def loss_of(
    config: Recipe, pipe: Pipe, adapter: vm.Adapter, subjects: Sequence[Shown], classes: Sequence[Shown]
) -> Callable[[Micro], Mapping[str, Tensor]]:
    """The loss of a micro-batch, over the subjects' photos and, with a prior, as many pictures of their classes."""
    size, crop, flip, cache = known(config.resolution), config.crop, config.flip, config.cache
    grid = kind_of(pipe).grid(pipe) if config.buckets else None
    pictures = partial(Pictures, pipe, size=size, crop=crop, flip=flip, cache=cache, grid=grid)

    def reading(name: str, shown: Sequence[Shown], learnt: bool) -> Reading:
        each = []
        for i, s in enumerate(shown):
            images, sizes = [p.image for p in s.photos], [p.size or p.image.size for p in s.photos]
            masks = Masks([p.mask for p in s.photos], config.mask_floor) if learnt and is_masked([s]) else None
            drop = config.caption_dropout if learnt else 0.0
            one = name if len(shown) == 1 else f"{name} {i}"
            each.append(pictures(one, images, s.prompts, sizes=sizes, masks=masks, drop=drop))
        return Mixed(name, each) if len(each) > 1 else each[0]

    sets = [reading("instance", subjects, True), *([reading("class", classes, False)] if config.prior else [])]
    encode = Prompts(pipe, cache=cache and not config.train_text_encoder and not config.tokens)
    base = adapter.disabled if config.prior and config.prior_by != "images" else None
    return denoising(pipe, sets, encode, known(config.batch), weights_of(config), base)


def is_masked(subjects: Sequence[Shown]) -> bool:
    """Whether a photo has a mask."""
    return any(photo.mask for shown in subjects for photo in shown.photos)


def patience_of(config: Recipe, adapter: vm.Adapter, subjects: Sequence[Shown]) -> int:
    """Steps within which every site has to get a gradient: more than one where the loss of a step may say nothing to
    some, by an empty prompt, a black mask, the weight 0 of Min-SNR at no signal, or drop-path."""
    rests = any(method.rests for method in adapter.methods.values())
    return 20 if rests or config.caption_dropout or config.zero_snr or is_masked(subjects) else 1
