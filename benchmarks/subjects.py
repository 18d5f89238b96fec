"""DreamBooth on the embedded model by people's eyes: three photographed subjects, each alone and all in one run.

    python benchmarks/subjects.py --data DATA                # DATA/dreambooth/{dog6,teapot,robot_toy}, DATA/weights
    python benchmarks/subjects.py --data DATA --steps 20 --write false      # to see it work

Trains by `vismodal dreambooth` with its defaults (the run of all three takes three times the steps), draws and measures
by `vismodal evaluate personalisation` with DINOv2. The sheet and the figures go to benchmarks/results/subjects.*.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from jsonargparse import auto_cli

from pipelines.dreambooth import Config as DreamBooth
from pipelines.dreambooth import main as dreambooth
from pipelines.evaluate_personalisation import Config as Evaluate
from pipelines.evaluate_personalisation import main as evaluate
from vismodal.data.photos import read_photos
from vismodal.diffusion.recipe import Subject
from vismodal.evaluation.personalisation import Scores
from vismodal.files import write_file
from vismodal.reports.run import cut, grid, sheet, square, write_image
from vismodal.runs import known
from vismodal.table import markdown

RESULTS = Path(__file__).parent / "results"
SIDE, SHOWN, STEPS = 64, 4, 600
JUDGE = "vit_small_patch14_dinov2"


@dataclass(frozen=True)
class Named:
    """A subject of DATA/dreambooth: its word, which no other one has, and what it is one of."""

    folder: str
    word: str
    noun: str

    @property
    def prompt(self) -> str:
        return f"a photo of {self.word} {self.noun}"


SUBJECTS = (Named("dog6", "sks", "dog"), Named("teapot", "zwx", "teapot"), Named("robot_toy", "ktn", "robot"))


@dataclass(frozen=True)
class Config:
    """Teach the embedded model three subjects, alone and together, for a sheet that a person can judge.

    Args:
        data: folder with `dreambooth/SUBJECT/*.jpg` and `weights/*dinov2*.safetensors`.
        steps: for each subject; without it 600, the pipeline's for the embedded model.
        write: whether to write the sheet and the table into benchmarks/results.
    """

    data: Path
    steps: int | None = None
    write: bool = True


def train(config: Config, subjects: tuple[Named, ...], output: Path) -> Path:
    """The adapter of a run with all of these subjects, for so many times the steps."""
    steps = len(subjects) * (config.steps or STEPS)
    quiet = DreamBooth(output=output, steps=steps, sample_every=0, save_every=0, sample_count=1)
    photos = [config.data / "dreambooth" / each.folder for each in subjects]
    if len(subjects) == 1:
        (one,) = subjects
        asked = replace(quiet, photos=photos[0], prompt=one.prompt, subject=one.word)
    else:
        several = tuple(Subject(f, s.prompt, s.word) for f, s in zip(photos, subjects, strict=True))
        asked = replace(quiet, subjects=several, sample_prompts=tuple(each.prompt for each in subjects))
    if dreambooth(asked).stopped:
        raise KeyboardInterrupt
    return output / "adapter.safetensors"


def measure(config: Config, subject: Named, adapters: dict[str, Path], output: Path) -> dict[str, Scores]:
    """The figures of the real photos, the base and the adapters; pictures in `output`/pictures."""
    (weights,) = (config.data / "weights").glob(f"*{JUDGE}*.safetensors")
    asked = Evaluate(
        adapters=tuple(f"{name}={path}" for name, path in adapters.items()),
        photos=config.data / "dreambooth" / subject.folder,
        subject=subject.word,
        class_name=subject.noun,
        prompts=(subject.prompt, f"{subject.prompt} on a blue background"),
        count=SHOWN,
        class_count=2,
        vision=JUDGE,
        vision_weights=str(weights),
        vision_size=98,
        output=output,
    )
    return evaluate(asked).scores


def main(config: Config) -> None:
    """Trains, measures, prints and writes the sheet and the table."""
    rows, cells, found = [], [], {}
    with TemporaryDirectory() as folder:
        root = Path(folder)
        together = train(config, SUBJECTS, root / "together")
        for subject in SUBJECTS:
            adapters = {"alone": train(config, (subject,), root / subject.folder), "together": together}
            scores = measure(config, subject, adapters, root / f"{subject.folder}-scores")
            photos = read_photos(config.data / "dreambooth" / subject.folder).photos[: 2 * SHOWN]
            rows.append((f"{subject.folder}: photos", grid([square(p.image, SIDE) for p in photos], 2 * SHOWN)))
            for name in ("base", "alone", "together"):
                drawn = cut(root / f"{subject.folder}-scores" / "pictures" / f"{name}.png", SIDE)
                rows.append(
                    (f'{name}, DINO {known(scores[name]["dino"]):.3f}: "{subject.prompt}"', grid(drawn, 2 * SHOWN))
                )
            found[subject.folder] = scores
            cells.append([subject.folder, *(f"{known(row['dino']):.3f}" for row in scores.values())])
    table = markdown(["subject", "real", "base", "alone", "together"], cells)
    print(table)
    if config.write:
        write_image(RESULTS / "subjects.png", sheet(rows))
        write_file(RESULTS / "subjects.json", json.dumps(found, indent=1) + "\n")
        head = "# Three subjects, each alone and all in one run\n\nDINO by `vismodal evaluate personalisation`, "
        head += f"with {JUDGE} at 98 px; two prompts, {SHOWN} seeds each, tiny-sd; by `benchmarks/subjects.py`.\n\n"
        write_file(RESULTS / "subjects.md", f"{head}{table}\n\n![](subjects.png)\n")


if __name__ == "__main__":
    main(auto_cli(Config, as_positional=False))
