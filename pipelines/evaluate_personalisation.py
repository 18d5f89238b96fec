"""Measure personalised generators: how like the subject, how obedient to the prompt, and what became of everything else.

    vismodal evaluate personalisation runs/dreambooth-1                    # the embedded model and subject
    vismodal evaluate personalisation dog.safetensors --photos my_dog --class_name dog --kind live --model OWNER/NAME
    vismodal evaluate personalisation a.safetensors b.safetensors --photos my_dog --clip ViT-B-32/openai --vision vit_small_patch16_dinov3
    vismodal evaluate personalisation --generated pictures --photos my_dog  # drawn elsewhere

What the figures are, as formulas: `vismodal/evaluation/personalisation.py`. From Python:
`main(Config(adapters=("dog.safetensors",), photos=Path("my_dog"), class_name="dog", model="..."))`.
"""  # noqa: E501 - command lines

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from accelerate import Accelerator
from PIL import Image

from vismodal import runs
from vismodal.classification.vision import EMBEDDED, Source
from vismodal.data.photos import Photo
from vismodal.data.subject import CLASS_PROMPT, PROMPT, subject_folder
from vismodal.diffusion.adapters import AdapterFile, Shelf, Use, read_adapters
from vismodal.diffusion.encode import warn_of_long
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.processes import sample_as_trained
from vismodal.diffusion.prompts import check_class, check_subject, has_word, without_word
from vismodal.diffusion.requests import Manner, Request, draw, usual
from vismodal.diffusion.settings import read_settings
from vismodal.draw import seed_of
from vismodal.errors import InputError
from vismodal.evaluation.dreambench import Subject, prompts_of
from vismodal.evaluation.encoders import Encoder, TextEncoder, clip_encoders, vision_encoder
from vismodal.evaluation.personalisation import SCORES, Scores, Seen, by_prompt, real_scores, scores
from vismodal.files import write_file
from vismodal.paths import asset
from vismodal.reports.run import grid, sheet, square, write_image
from vismodal.runs import known
from vismodal.table import table


@dataclass(frozen=True)
class Config:
    """Measure personalised generators: likeness to the subject, obedience to the prompt, and what became of the rest.

    Args:
        adapters: files of vismodal, diffusers, kohya or LyCORIS, or folders of runs; NAME=FILE gives one a name in the
            table. Each is measured alone, beside the base.
        strengths: how strongly they act, one for each or one for all.
        generated: folder of pictures that were drawn elsewhere, instead of adapters; with captions, or as vismodal
            generate leaves them, their prompts count too.
        photos: folder with real pictures of the subject. Without it, those of the embedded subject.
        subject: the word for the subject; without it, as the adapter's file says, or sks.
        class_name: what the subject is one of, such as dog; without it, as the adapter's file says.
        kind: which of DreamBench's 25 prompts: for an object, or a live subject.
        prompts: prompts with the subject's word instead. For the embedded subject, it on five grounds.
        count: pictures of each prompt.
        class_prompt: prompt of the class pictures; without it, "a photo of a CLASS".
        class_count: how many there are.
        drift_prompts: prompts without the subject's word whose pictures should stay; without them, the prompts
            without that word.
        vision: model of timm for DINO, PRES, DIV and drift; without it, the embedded tiny-vit.
        vision_weights: checkpoint file for it.
        vision_size: side in pixels of its input, where it is not its own.
        clip: model for CLIP-I and CLIP-T: ARCH/TAG of open_clip, a folder, or a Hub id; without it, tiny-clip.
        model: folder in diffusers' layout, or Hub id. Without it, the embedded small Stable Diffusion.
        output: folder for the results. Without it, the next free runs/evaluate-N.
        resolution: side in pixels; without it, what the model was made for.
        steps: of denoising; 25, or 20 with the embedded model.
        guidance: of classifier-free guidance; as usual with the kind of model, or 4 with the embedded one.
        batch: pictures at a time.
        seed: of everything random.
        mixed_precision: precision of the denoiser and the text encoders.
        threads: of the CPU; torch's own choice, or 1 with the embedded model.
    """

    adapters: tuple[str, ...] = ()
    strengths: tuple[float, ...] = (1.0,)
    generated: Path | None = None
    photos: Path | None = None
    subject: str | None = None
    class_name: str | None = None
    kind: Subject = "object"
    prompts: tuple[str, ...] = ()
    count: int = 4
    class_prompt: str | None = None
    class_count: int = 16
    drift_prompts: tuple[str, ...] = ()
    vision: str | None = None
    vision_weights: str | None = None
    vision_size: int | None = None
    clip: str | None = None
    model: str | None = None
    output: Path | None = None
    resolution: int | None = None
    steps: int | None = None
    guidance: float | None = None
    batch: int = 4
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    threads: int | None = None

    POSITIONAL: ClassVar[str] = "adapters"


GROUNDS = ("white", "orange", "green", "black", "blue")


@dataclass(frozen=True)
class Result:
    """The folder, and the figures by row: "real", "base", then the adapters, or the folder of pictures."""

    output: Path
    scores: dict[str, Scores]


@dataclass(frozen=True)
class Judges:
    """The encoders that look at the pictures."""

    vision: Encoder
    clip: Encoder
    texts: TextEncoder

    def see(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str] | None,
        kind: Sequence[Image.Image] = (),
        plain: Sequence[Image.Image] = (),
    ) -> Seen:
        return Seen(
            self.vision.features(pictures),
            self.clip.features(pictures),
            None if prompts is None else self.texts.features(prompts),
            self.vision.features(kind) if kind else None,
            self.vision.features(plain) if plain else None,
        )


def main(config: Config) -> Result:
    """Draws, measures, prints the table and writes the results. Raises `InputError` for input that cannot be used."""
    config, files = checked(config)
    with runs.cpu_threads(known(config.threads)):
        photos = runs.read_and_tell(config.photos or subject_folder(), captions=False)
        if len(photos) == 1:
            print(
                "note: there is one real picture, so that of real ones among themselves is not known", file=sys.stderr
            )
        device = Accelerator().device
        source = Source(config.vision or EMBEDDED, config.vision_weights, config.vision_size)
        judges = Judges(vision_encoder(source, device), *clip_encoders(config.clip, device))
        real = judges.see([photo.image for photo in photos], None)
        if config.generated:
            return folder_of(config, judges, photos, real)
        return adapters_of(config, files, judges, photos, real)


def checked(config: Config) -> tuple[Config, dict[str, AdapterFile]]:
    """The settings filled in, and the adapters. Raises `InputError` for what makes no sense."""
    if bool(config.adapters) == bool(config.generated):
        raise InputError("give adapters to be measured, such as dog.safetensors, or --generated FOLDER with pictures")
    if config.generated and config.photos is None:
        raise InputError("the real pictures are missing; write --photos FOLDER")
    if config.photos is None and config.model is not None:
        raise InputError(f"the subject's real pictures are missing; write --photos FOLDER, for {config.model}")
    runs.at_least(config, 1, "count", "batch")
    runs.at_least(config, 2, "class_count")
    if config.vision is None and (config.vision_weights or config.vision_size):
        raise InputError("vision_weights and vision_size are for a model of timm; write --vision NAME too")
    files = read_adapters(config.adapters)
    config = replace(
        config,
        strengths=config.strengths * (len(files) if len(config.strengths) == 1 else 1),
        output=runs.new_folder(config.output, "evaluate"),
        **usual(config.model, config.steps, config.guidance, config.threads),
    )
    runs.at_least(config, 1, "steps", "threads")
    if files and len(config.strengths) != len(files):
        raise InputError(f"{len(files)} adapters have {len(config.strengths)} strengths; give one for each, or one")
    if names := files.keys() & {"real", "base"}:
        raise InputError(f"an adapter cannot be called {names.pop()!r}, as a row of the table is; write NAME=FILE")
    return (asked(config, files) if files else config), files


def asked(config: Config, files: Mapping[str, AdapterFile]) -> Config:
    """The settings with all prompts filled in. Raises `InputError` where the subject or its class is not known."""
    header = next(iter(files.values())).header
    said = {word: None for file in files.values() for word in file.header.get("subject", "").split(", ") if word}
    if len(said) > 1 and config.subject is None:
        raise InputError(
            f"the adapters' files name several subjects: {', '.join(said)}; write --subject WORD, and measure adapters "
            "of another word by themselves"
        )
    word = config.subject or next(iter(said), "sks")
    own = config.photos is None and not config.prompts
    prompts = config.prompts or (tuple(f"{PROMPT} on a {ground} background" for ground in GROUNDS) if own else ())
    class_prompt = config.class_prompt or (CLASS_PROMPT if own else None)
    if not prompts or class_prompt is None:
        noun = config.class_name or class_in(header.get("prompt", ""), word)
        prompts = prompts or tuple(prompts_of(config.kind, word, noun))
        class_prompt = class_prompt or f"a photo of a {noun}"
    for prompt in prompts:
        check_subject(prompt, word)
    check_class(class_prompt, word)
    plain = config.drift_prompts or tuple(dict.fromkeys(without_word(prompt, word) for prompt in prompts))
    if named := [prompt for prompt in plain if has_word(prompt, word)]:
        raise InputError(f"the drift prompt {named[0]!r} names the subject, which is to change; leave {word!r} out")
    return replace(config, subject=word, prompts=prompts, class_prompt=class_prompt, drift_prompts=plain)


def class_in(prompt: str, word: str) -> str:
    """ "dog" of "a photo of sks dog". Raises `InputError` where no one to three words stand at its end."""
    noun = prompt.partition(f"{word} ")[2].strip()
    if not 1 <= len(noun.split()) <= 3:
        raise InputError(f"what {word!r} is one of does not stand in the adapter's file; write e.g. --class_name dog")
    return noun


def adapters_of(
    config: Config, files: Mapping[str, AdapterFile], judges: Judges, photos: Sequence[Photo], real: Seen
) -> Result:
    """Draws with the base and each adapter, and measures."""
    pipe = load_pipeline(config.model or asset("tiny-sd"), config.mixed_precision, Accelerator().device)
    sample_as_trained(pipe, [file.header for file in files.values()])
    manner = Manner.fitting(pipe, config.resolution, known(config.steps), config.guidance)
    config = replace(config, resolution=manner.size, guidance=manner.guidance)
    warn_of_long(pipe, [*config.prompts, *config.drift_prompts, known(config.class_prompt)])
    shelf = Shelf(pipe, files)
    contestants: dict[str, tuple[Use, ...]] = {"base": ()}
    contestants |= {name: (Use(name, s),) for name, s in zip(files, config.strengths, strict=True)}
    for uses in contestants.values():  # what does not fit is told before anything is drawn
        shelf.row(uses)
    make = partial(draw, pipe, shelf, manner=manner, batch=config.batch)
    prompts = [prompt for prompt in config.prompts for _ in range(config.count)]
    bare = [without_word(prompt, known(config.subject)) for prompt in prompts]  # CLIP does not know the word
    base: Seen | None = None
    found: dict[str, Scores] = {"real": real_scores(real)}
    details: dict[str, Any] = {}
    drawn: dict[str, list[Image.Image]] = {}
    for name, uses in contestants.items():
        pictures, of_class, plain = (
            make([Request(prompt, seed_of(config.seed, what, i), uses) for i, prompt in enumerate(texts)], what=name)
            for what, texts in (
                ("asked", prompts),
                ("class", [known(config.class_prompt)] * config.class_count),
                ("plain", config.drift_prompts),
            )
        )
        seen = judges.see(pictures, bare, of_class, plain)
        found[name], details[name] = scores(seen, real, base), by_prompt(seen, real, prompts)
        base, drawn[name] = base or seen, pictures
        write_image(known(config.output) / "pictures" / f"{name}.png", grid(pictures, config.count))
        write_image(known(config.output) / "pictures" / f"{name}-class.png", grid(of_class, config.count))
    return write_results(config, judges, photos, found, details, drawn)


def folder_of(config: Config, judges: Judges, photos: Sequence[Photo], real: Seen) -> Result:
    """Measures pictures that were drawn elsewhere; CLIP-T where the prompt of each one is known."""
    pictures = runs.read_and_tell(known(config.generated))
    prompts = [photo.caption or drawn_by(photo.path) for photo in pictures]
    said = [prompt for prompt in prompts if prompt is not None]
    whole = len(said) == len(prompts)
    if not whole:
        print(f"note: {len(prompts) - len(said)} pictures have no prompt, so that there is no CLIP-T", file=sys.stderr)
    word = config.subject or "sks"
    seen = judges.see([p.image for p in pictures], [without_word(p, word) for p in said] if whole else None)
    name = known(config.generated).expanduser().resolve().name or "pictures"
    found = {"real": real_scores(real), name: scores(seen, real)}
    details = {name: by_prompt(seen, real, said)} if whole else {}
    return write_results(config, judges, photos, found, details, {name: [p.image for p in pictures]})


def drawn_by(path: Path) -> str | None:
    """The prompt in a picture of `vismodal generate`."""
    try:
        return read_settings(path).prompt
    except InputError:
        return None


def write_results(
    config: Config,
    judges: Judges,
    photos: Sequence[Photo],
    found: dict[str, Scores],
    details: Mapping[str, Any],
    drawn: Mapping[str, Sequence[Image.Image]],
) -> Result:
    """The table, metrics.json, and a sheet of the first pictures."""
    output = known(config.output)
    rows = [[name, *("-" if row[key] is None else f"{row[key]:.3f}" for key in SCORES)] for name, row in found.items()]
    print(table(["", *SCORES.values()], rows))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    encoders = {"vision": judges.vision.name, "clip": judges.clip.name}
    metrics = {"scores": found, "by_prompt": details, "encoders": encoders, "settings": settings}
    write_file(output / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    side = min(256, config.resolution or 256)
    lines = [("real", [photo.image for photo in photos])]
    lines += [(name, list(pictures[:: 1 if config.generated else config.count])) for name, pictures in drawn.items()]
    page = [(name, grid([square(image, side) for image in images[:8]], len(images[:8]))) for name, images in lines]
    write_image(output / "sheet.png", sheet(page))
    runs.save_config(config, output)
    print(
        f"DINO by {judges.vision.name}, CLIP by {judges.clip.name}; {output / 'metrics.json'}, {output / 'sheet.png'}"
    )
    return Result(output, found)


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["evaluate", "personalisation", *sys.argv[1:]]))
