"""Draw pictures with adapters: several at once, at any strength, or another one for each prompt of a batch.

    vismodal generate "a drawing of a strawberry on a blue background" --count 4
    vismodal generate "a photo of sks dog" --adapters dog.safetensors style.safetensors --strengths 0.8 0.5 --model OWNER/NAME
    vismodal generate "sks dog <lora:dog>" "my cat <lora:cat:0.7>" "a dog <lora:none>" --adapters dog.safetensors cat.safetensors
    vismodal generate "a photo of sks dog" --adapters runs/dreambooth-1/checkpoints/*.safetensors --sweep 0 0.5 1
    vismodal generate "a drawing of a cat" --adapters runs/control-1 --conditions my_picture.png
    vismodal generate --like runs/generate-1/0000.png --count 8

Each prompt of a batch has its own adapters, under guidance too, as if it had been drawn alone. From Python:
`main(Config(prompts=("a photo of sks dog",), adapters=("dog.safetensors",)))`.
"""  # noqa: E501 - command lines

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from accelerate import Accelerator
from PIL import Image

import vismodal as vm
from vismodal import runs
from vismodal.diffusion.adapters import AdapterFile, Shelf, Use, digest_of, read_adapters
from vismodal.diffusion.control import Picture, read_conditions
from vismodal.diffusion.encode import warn_of_long
from vismodal.diffusion.kinds import kind_of
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.processes import sample_as_trained
from vismodal.diffusion.requests import Manner, Request, draw, parse_prompt, read_prompts, usual
from vismodal.diffusion.settings import (
    Given,
    Precision,
    Settings,
    Worn,
    beside,
    find_adapters,
    find_conditions,
    read_settings,
    sampler_of,
    write_picture,
)
from vismodal.errors import InputError
from vismodal.fingerprint import Fingerprint, fingerprint
from vismodal.paths import asset
from vismodal.reports.run import write_image
from vismodal.reports.xy import xy_sheet
from vismodal.runs import known


@dataclass(frozen=True)
class Config:
    """Draw pictures with adapters: several at once, at any strength, or another one for each prompt of a batch.

    Args:
        prompts: what to draw. With a tag <lora:NAME> or <lora:NAME:STRENGTH> in it, by these adapters alone; with
            <lora:none>, by none.
        prompts_file: text file with a prompt on each line, tags as above.
        adapters: files of vismodal, diffusers, kohya or LyCORIS, folders of runs, or checkpoints of a run; NAME=FILE
            gives one a name for tags.
        strengths: how strongly they act, one for each or one for all: 0 is the base, 1 the adapter.
        sweep: strengths to try instead: a sheet for each prompt, with a row for each seed; with several adapters, each
            acting alone, a sheet for each prompt and seed, with a row for each of them.
        seeds: of the pictures of each prompt; from one seed on, `count` of them. Without it, drawn, and printed.
        count: pictures of each prompt.
        conditions: pictures that steer the adapters of vismodal control: FILE for all of them, or NAME=FILE for each.
        like: a png of an earlier run: all of its settings, but for those that are given.
        negative: what to lead away from.
        model: folder in diffusers' layout, or Hub id. Without it, the embedded small Stable Diffusion.
        output: folder for the pictures. Without it, the next free runs/generate-N.
        resolution: side in pixels; without it, what the model was made for.
        steps: of denoising; 25, or 20 with the embedded model.
        guidance: of classifier-free guidance; as usual with the kind of model, or 4 with the embedded one.
        batch: pictures at a time.
        mixed_precision: precision of the denoiser and the text encoders; no unless given.
        threads: of the CPU; torch's own choice, or 1 with the embedded model.
    """

    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    adapters: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    sweep: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    count: int = 1
    conditions: tuple[str, ...] = ()
    like: Path | None = None
    negative: str | None = None
    model: str | None = None
    output: Path | None = None
    resolution: int | None = None
    steps: int | None = None
    guidance: float | None = None
    batch: int = 4
    mixed_precision: Precision | None = None
    threads: int | None = None

    POSITIONAL: ClassVar[str] = "prompts"


EXAMPLES = ("a drawing of a strawberry on a blue background", "a drawing of a cat on an orange background")


@dataclass(frozen=True)
class Result:
    """The folder, its pictures in the order of prompts and seeds, and the sheets."""

    output: Path
    pictures: tuple[Path, ...]
    sheets: tuple[Path, ...]


def main(config: Config) -> Result:
    """Draws, writes and tells the seeds. Raises `InputError` for input that cannot be used; then nothing is written."""
    config, before = checked(config)
    with runs.cpu_threads(known(config.threads)):
        files = read_adapters(config.adapters)
        pipe = load_pipeline(config.model or asset("tiny-sd"), known(config.mixed_precision), Accelerator().device)
        sample_as_trained(pipe, [file.header for file in files.values()])
        manner = Manner.fitting(pipe, config.resolution, known(config.steps), config.guidance, known(config.negative))
        config = replace(config, resolution=manner.size, guidance=manner.guidance)
        for_all = uses_of(config, files, before)
        texts = [parse_prompt(text, for_all) for text in config.prompts]
        if config.sweep:
            texts = [(prompt, (Use(n, s),)) for prompt, _ in texts for n in files for s in config.sweep]
        given = read_conditions(config.conditions, files, pipe, manner.size)
        shelf = Shelf(pipe, files, {name: picture.row for name, picture in given.items()})
        requests = [Request(prompt, seed, uses) for prompt, uses in texts for seed in config.seeds]
        # what does not fit is told before anything is drawn; a new word is as long as it has vectors
        warn_of_long(pipe, {shelf.spell(request.prompt, request.uses): request.prompt for request in requests})
        base = fingerprint(kind_of(pipe).model(pipe))
        theirs = Fingerprint(base.name, *before.base) if before else base
        if theirs.shapes != base.shapes or not theirs.same_values(base):
            print(f"warning: {config.like} was made on another model; the pictures will differ", file=sys.stderr)
        images = draw(pipe, shelf, requests, manner, config.batch)
        return write_results(config, files, given, requests, images, base, sampler_of(pipe.scheduler))


def checked(config: Config) -> tuple[Config, Settings | None]:
    """The settings filled in, and those of the picture that is to be alike. Raises `InputError` for what is wrong."""
    before = read_settings(config.like) if config.like else None
    if before is not None:
        config = alike(config, before)
    texts = (*config.prompts, *(read_prompts(config.prompts_file) if config.prompts_file else ()))
    if not texts and config.model:
        raise InputError('there is no prompt; write one, as in vismodal generate "a photo of a dog", or --prompts_file')
    if config.sweep and not config.adapters:
        raise InputError("sweep tries the strengths of adapters; write --adapters FILES")
    if config.sweep and (config.strengths or any("<lora:" in text for text in texts)):
        raise InputError("sweep says the strengths of all adapters; leave out strengths and tags")
    runs.at_least(config, 1, "count", "batch")
    if len(config.seeds) > 1 and config.count > 1:
        raise InputError(
            f"{len(config.seeds)} seeds and count {config.count} are given; give one seed, or leave out count"
        )
    first = config.seeds[0] if config.seeds else secrets.randbelow(2**32)
    if min((first, *config.seeds)) < 0 or max((first + config.count, *config.seeds)) >= 2**63:
        raise InputError(f"seeds are numbers from 0 to 2^63 - 1, not {', '.join(map(str, config.seeds))}")
    seeds = config.seeds if len(config.seeds) > 1 else tuple(range(first, first + config.count))
    if len(set(seeds)) < len(seeds):
        raise InputError("a seed is given twice, which would draw the same picture again")
    filled = replace(
        config,
        prompts=texts or EXAMPLES,
        prompts_file=None,
        seeds=seeds,
        count=1,
        output=runs.new_folder(config.output, "generate"),
        negative=config.negative or "",
        mixed_precision=config.mixed_precision or "no",
        **usual(config.model, config.steps, config.guidance, config.threads),
    )
    runs.at_least(filled, 1, "steps", "threads")
    return filled, before


def alike(config: Config, before: Settings) -> Config:
    """The settings of a picture, but for those that are given."""
    like, model = known(config.like), config.model or before.model
    if before.local and config.model is None:
        model = beside(like).get("model")
        if model is None or not Path(model).expanduser().is_dir():
            raise InputError(f"{like.name} was made with a model in a folder {before.model!r}; write --model FOLDER")
    return replace(
        config,
        prompts=config.prompts or (() if config.prompts_file else (before.prompt,)),
        adapters=config.adapters or tuple(find_adapters(like, before.adapters)),
        conditions=config.conditions or (() if config.adapters else tuple(find_conditions(like, before.conditions))),
        seeds=config.seeds or (before.seed,),
        negative=before.negative if config.negative is None else config.negative,
        model=model,
        resolution=config.resolution or before.size,
        steps=config.steps or before.steps,
        guidance=before.guidance if config.guidance is None else config.guidance,
        mixed_precision=config.mixed_precision or before.precision,
    )


def uses_of(config: Config, files: Mapping[str, AdapterFile], before: Settings | None) -> list[Use]:
    """The adapters of a prompt without tags. Raises `InputError` where strengths are too few or too many."""
    worn = before.adapters if before else ()
    earlier = {w.digest: w.strength for w in worn} | {(w.name, w.digest): w.strength for w in worn}
    given: Sequence[float] = config.strengths or [
        earlier.get((name, file.digest), earlier.get(file.digest, 1.0)) for name, file in files.items()
    ]
    given = list(given) * (len(files) if len(given) == 1 else 1)
    if len(given) != len(files):
        raise InputError(f"{len(files)} adapters have {len(given)} strengths; give one for each, or one for all")
    return [Use(name, strength) for name, strength in zip(files, given, strict=True)]


def write_results(
    config: Config,
    files: Mapping[str, AdapterFile],
    given: Mapping[str, Picture],
    requests: Sequence[Request],
    images: Sequence[Image.Image],
    base: Fingerprint,
    sampler: str,
) -> Result:
    """The pictures with their settings, the sheets and the run's settings; then tells the seeds."""
    output = known(config.output)
    local = config.model is not None and Path(config.model).expanduser().is_dir()
    pictures: list[Path] = []
    for number, (request, image) in enumerate(zip(requests, images, strict=True)):
        worn = tuple(Worn(u.name, files[u.name].path.name, files[u.name].digest, u.strength) for u in request.uses)
        steering = [(u.name, given[u.name].path) for u in request.uses if u.name in given]
        settings = Settings(
            prompt=request.prompt,
            negative=known(config.negative),
            seed=request.seed,
            size=known(config.resolution),
            steps=known(config.steps),
            guidance=known(config.guidance),
            model=Path(config.model).expanduser().resolve().name if config.model and local else config.model,
            local=local,
            base=(base.shapes, base.values),
            adapters=worn,
            version=vm.__version__,
            sampler=sampler,
            conditions=tuple(Given(name, path.name, digest_of(path)) for name, path in steering),
            precision=known(config.mixed_precision),
        )
        pictures.append(write_picture(output / f"{number:04d}.png", image, settings))
        acting = " + ".join(f"{use.name} {use.strength:g}" for use in request.uses) or "base"
        print(f"{pictures[-1]}: seed {request.seed}, {acting}, {request.prompt!r}")
    sheets = swept(config, list(files), requests, images) if config.sweep else [by_seed(config, requests, images)]
    names = ["sheet.png"] if len(sheets) == 1 else [f"sheet-{number:02d}.png" for number in range(len(sheets))]
    written = tuple(write_image(output / name, sheet) for name, sheet in zip(names, sheets, strict=True))
    runs.save_config(config, output)
    print(f"{'sheet' if len(written) == 1 else 'sheets'}: {', '.join(map(str, written))}")
    print(f"again: vismodal generate --like {pictures[0]}")
    return Result(output, tuple(pictures), written)


def by_seed(config: Config, requests: Sequence[Request], images: Sequence[Image.Image]) -> Image.Image:
    """A row for each prompt, a column for each seed."""
    width = len(config.seeds)
    rows = [[requests[i].prompt, *(f"[{u.name} {u.strength:g}]" for u in requests[i].uses)]
            for i in range(0, len(requests), width)]  # fmt: skip
    cells = [images[i : i + width] for i in range(0, len(images), width)]
    return xy_sheet(cells, [" ".join(row) for row in rows], [f"seed {seed}" for seed in config.seeds])


def swept(
    config: Config, names: Sequence[str], requests: Sequence[Request], images: Sequence[Image.Image]
) -> list[Image.Image]:
    """A column for each strength; rows are the seeds of one adapter, or else the adapters for each seed."""
    found = {
        (request.prompt, request.seed, *request.uses[0]): image for request, image in zip(requests, images, strict=True)
    }
    prompts = dict.fromkeys(request.prompt for request in requests)
    columns = [f"strength {strength:g}" for strength in config.sweep]

    def sheet(prompt: str, rows: Mapping[str, tuple[int, str]], title: str) -> Image.Image:
        cells = [[found[prompt, *row, strength] for strength in config.sweep] for row in rows.values()]
        return xy_sheet(cells, list(rows), columns, title)

    if len(names) == 1:
        seeds = {f"seed {seed}": (seed, names[0]) for seed in config.seeds}
        return [sheet(prompt, seeds, f"{prompt}, {names[0]}") for prompt in prompts]
    return [
        sheet(prompt, {name: (seed, name) for name in names}, f"{prompt}, seed {seed}")
        for prompt in prompts
        for seed in config.seeds
    ]


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["generate", *sys.argv[1:]]))
