"""What DreamBooth descends on: the loss over the photos and the class images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from vismodal import runs
from vismodal.data.photos import Photo
from vismodal.diffusion.denoise import Pictures, Prompts, Weights, denoising
from vismodal.diffusion.generate import Generate, fill_folder
from vismodal.diffusion.kinds import Pipe
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
    return runs.read_and_tell(folder, config.resolution)


def loss_of(
    config: Recipe, pipe: Pipe, photos: Sequence[Photo], prompts: Sequence[str], class_photos: Sequence[Photo]
) -> Callable[[Micro], Mapping[str, Tensor]]:
    """The loss of a micro-batch, over the photos and, with a prior, as many class images."""
    size, crop, flip, cache = known(config.resolution), config.crop, config.flip, config.cache
    pictures = partial(Pictures, pipe, size=size, crop=crop, flip=flip, cache=cache)
    named = {"instance": (photos, prompts)}
    if config.prior:
        named["class"] = (class_photos, [known(config.class_prompt)] * len(class_photos))
    sets = [
        pictures(name, [p.image for p in found], said, sizes=[p.size or p.image.size for p in found])
        for name, (found, said) in named.items()
    ]
    encode = Prompts(pipe, cache=cache and not config.train_text_encoder)
    return denoising(pipe, sets, encode, known(config.batch), weights_of(config))
