"""The subjects of a run: their photos and prompts, and the class images that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vismodal import runs
from vismodal.data.photos import Photo
from vismodal.data.subject import subject_folder
from vismodal.diffusion.generate import Generate, fill_folder
from vismodal.diffusion.prompts import prompts_for
from vismodal.diffusion.recipe import Recipe, Subject
from vismodal.runs import known


@dataclass(frozen=True)
class Shown:
    """Pictures of one thing, and what each of them is said to show."""

    photos: Sequence[Photo]
    prompts: Sequence[str]


def subjects_of(config: Recipe) -> tuple[Subject, ...]:
    """Those that are named, or the one that the settings are about."""
    photos, prompt = config.photos or subject_folder(), known(config.prompt) if not config.subjects else ""
    one = Subject(photos, prompt, config.subject, config.class_prompt, config.class_folder)
    return config.subjects or (one,)


def read_subjects(config: Recipe) -> list[Shown]:
    """The photos of each subject, with their prompts."""
    found = []
    for subject in subjects_of(config):
        photos = runs.read_and_tell(subject.photos, config.resolution, config.captions, config.masks)
        found.append(Shown(photos, prompts_for(photos, subject.prompt, subject.subject)))
    return found


def classes_of(config: Recipe, subjects: Sequence[Shown], generate: Generate) -> list[Shown]:
    """What the classes are kept by, if they are: class images, or the photos once more with the class prompts."""
    if not config.prior:
        return []
    if config.prior_by != "photos":
        return class_images(config, generate)
    said = [known(subject.class_prompt) for subject in subjects_of(config)]
    return [Shown(s.photos, [prompt] * len(s.photos)) for s, prompt in zip(subjects, said, strict=True)]


def class_images(config: Recipe, generate: Generate) -> list[Shown]:
    """The class images of each subject, those that are missing generated first; one folder for equal class prompts."""
    prompts = list(dict.fromkeys(known(subject.class_prompt) for subject in subjects_of(config)))
    made: dict[tuple[Path, str], Shown] = {}
    each = []
    for subject in subjects_of(config):
        prompt = known(subject.class_prompt)
        number = prompts.index(prompt)
        folder = subject.class_folder or known(config.output) / (f"class-{number + 1}" if number else "class")
        if (folder, prompt) not in made:
            made[folder, prompt] = _filled(config, folder, prompt, generate)
        each.append(made[folder, prompt])
    return each


def _filled(config: Recipe, folder: Path, prompt: str, generate: Generate) -> Shown:
    count = fill_folder(folder, config.class_images, lambda seeds: generate([prompt] * len(seeds), seeds), config.seed)
    print(f"class images of {prompt!r}: {count} made, the others found in {folder}")
    photos = runs.read_and_tell(folder, config.resolution, masks=False)
    return Shown(photos, [prompt] * len(photos))


def content_of(config: Recipe, subjects: Sequence[Shown], classes: Sequence[Shown]) -> dict[str, object]:
    """What the pictures are, wherever they lie, for a resume to compare."""
    several: dict[str, object] = {}
    if config.subjects:
        said = [[len(shown.photos), *shown.prompts] for shown in subjects]
        several = {"subjects": said, "class_prompts": [subject.class_prompt for subject in config.subjects]}
    return {
        "photos": runs.digest(photo for shown in subjects for photo in shown.photos),
        "class_photos": runs.digest(photo for shown in classes for photo in shown.photos),
        **several,
    }
