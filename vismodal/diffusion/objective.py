"""What DreamBooth descends on: the loss over the photos and the class images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

import vismodal as vm
from vismodal import runs
from vismodal.data.photos import Photo
from vismodal.diffusion.denoise import Masks, Pictures, Prompts, Weights, denoising
from vismodal.diffusion.generate import Generate, fill_folder
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.recipe import Recipe
from vismodal.runs import known
from vismodal.train import Micro


def weights_of(config: Recipe) -> Weights:
    return Weights(config.prior, config.min_snr, config.offset_noise, config.levels)


def class_images(config: Recipe, generate: Generate) -> list[Photo]:
    """The class images; those that are missing are generated first."""
    folder, prompt = config.class_folder or known(config.output) / "class", known(config.class_prompt)
    made = fill_folder(folder, config.class_images, lambda seeds: generate([prompt] * len(seeds), seeds), config.seed)
    print(f"class images of {prompt!r}: {made} made, the others found in {folder}")
    return runs.read_and_tell(folder, config.resolution, masks=False)


def loss_of(
    config: Recipe,
    pipe: Pipe,
    adapter: vm.Adapter,
    photos: Sequence[Photo],
    prompts: Sequence[str],
    class_photos: Sequence[Photo],
) -> Callable[[Micro], Mapping[str, Tensor]]:
    """The loss of a micro-batch, over the photos and, with a prior, as many class images or photos once more."""
    size, crop, flip, cache = known(config.resolution), config.crop, config.flip, config.cache
    grid = kind_of(pipe).grid(pipe) if config.buckets else None
    pictures = partial(Pictures, pipe, size=size, crop=crop, flip=flip, cache=cache, grid=grid)

    def reading(name: str, found: Sequence[Photo], said: Sequence[str], learnt: bool = False) -> Pictures:
        images, sizes = [p.image for p in found], [p.size or p.image.size for p in found]
        masks = Masks([p.mask for p in found], config.mask_floor) if learnt and any(p.mask for p in found) else None
        drop = config.caption_dropout if learnt else 0.0
        return pictures(name, images, said, sizes=sizes, masks=masks, drop=drop)

    sets = [reading("instance", photos, prompts, learnt=True)]
    if config.prior:
        found = photos if config.prior_by == "photos" else class_photos
        sets.append(reading("class", found, [known(config.class_prompt)] * len(found)))
    encode = Prompts(pipe, cache=cache and not config.train_text_encoder)
    base = adapter.disabled if config.prior and config.prior_by != "images" else None
    return denoising(pipe, sets, encode, known(config.batch), weights_of(config), base)


def patience_of(config: Recipe, photos: Sequence[Photo]) -> int:
    """Steps within which every site has to get a gradient: more than one where the loss of a step may say nothing to
    some, by an empty prompt, a black mask, or the weight 0 of Min-SNR at no signal."""
    chance = config.caption_dropout or config.zero_snr or any(photo.mask for photo in photos)
    return 20 if chance else 1
