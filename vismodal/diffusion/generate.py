"""Generate images with given seeds: samples of a run, and the class images of a prior."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from vismodal.diffusion.encode import decode_latents
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.draw import seed_of
from vismodal.reports.run import grid, write_image


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """In eval mode without gradients, and as before afterwards."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def generate(
    pipe: Pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: int,
    steps: int,
    guidance: float,
    negative: Sequence[str] = (),
    batch: int = 4,
) -> list[Image.Image]:
    """One image for each prompt and its seed, as plain `pipe(prompt, generator=...)` gives it, `batch` at a time.

    `negative` is what guidance leads away from, for each image; nothing where none is given.

    The latents are decoded here because a denoiser in half precision goes with an autoencoder in fp32, which the
    pipeline itself cannot mix.
    """
    kind = kind_of(pipe)
    images: list[Image.Image] = []
    with evaluating(*kind.modules(pipe)):
        for start in range(0, len(prompts), batch):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
            latents = pipe(
                list(prompts[start : start + batch]),
                generator=generators,
                height=size,
                width=size,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
                **({"negative_prompt": list(negative[start : start + batch])} if any(negative) else {}),
                **kind.calling,
            ).images
            decoded = decode_latents(pipe, kind.unpack(pipe, latents, size))
            images += pipe.image_processor.postprocess(decoded.float(), output_type="pil")
    return images


Generate = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]  # an image for each prompt and its seed


@dataclass(frozen=True)
class Samples:
    """Sample images of a run, alike at every step: `samples(120)` makes `folder`/step-0000120.png unless it is there.

    A row for each prompt, a column for each of `count` seeds that depend on `seed`; edge to edge and lossless.
    """

    generate: Generate
    folder: Path
    prompts: Sequence[str]
    count: int
    seed: int

    def __call__(self, step: int) -> Path:
        path = self.folder / f"step-{step:07d}.png"
        if not path.exists():
            seeds = [seed_of(self.seed, "sample", i) for i in range(self.count)]
            images = self.generate([p for p in self.prompts for _ in seeds], seeds * len(self.prompts))
            write_image(path, grid(images, self.count))
        return path


def fill_folder(
    folder: Path, count: int, make: Callable[[Sequence[int]], Sequence[Image.Image]], seed: int, batch: int = 4
) -> int:
    """Makes the images `generated-*.png` that a folder of `count` pictures lacks, each by its seed; gives how many.

    Whoever finds them and whoever makes them reads the same: the files are lossless, seeds depend on numbers alone,
    and batches always hold the same numbers, also after a run that was stopped in between.
    """
    from vismodal.data.masks import is_mask
    from vismodal.data.photos import SUFFIXES

    there = [p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and not is_mask(p)]
    own = [p for p in there if not p.name.startswith("generated-")]
    names = [folder / f"generated-{i:05d}.png" for i in range(max(0, count - len(own)))]
    made = 0
    missing = [
        start for start in range(0, len(names), batch) if not all(p.exists() for p in names[start : start + batch])
    ]
    for start in tqdm(missing, desc=f"making {folder.name} images", unit="batch", disable=not missing):
        paths = names[start : start + batch]
        images = make([seed_of(seed, "class image", start + i) for i in range(len(paths))])
        for path, image in zip(paths, images, strict=True):
            write_image(path, image)
            made += 1
    return made
