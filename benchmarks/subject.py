"""DreamBooth on the embedded model, measured: does a photographed subject come closer, and does the base stay?

    python benchmarks/subject.py --data DATA                      # DATA/dreambooth/dog6, DATA/weights/*dinov2*
    python benchmarks/subject.py --data DATA --subject cat2 --prompt "a photo of sks cat"

Similarity is the DINO metric of DreamBooth (arXiv 2208.12242, section 4.2): the mean cosine between the features of
generated and of real pictures, over all pairs, before and after training. The figures go to
benchmarks/results/subject.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import auto_cli
from PIL import Image

import vismodal as vm
from pipelines.dreambooth import Config as DreamBooth
from pipelines.dreambooth import main as dreambooth
from vismodal.data.photos import read_photos
from vismodal.diffusion.encode import native_size
from vismodal.diffusion.generate import generate
from vismodal.diffusion.load import load_pipeline
from vismodal.evaluation.judge import dino
from vismodal.paths import asset

RESULTS = Path(__file__).parent / "results"
PROMPTS = ("{}", "{} on a blue background", "{} on a green background", "a picture of {}")


@dataclass(frozen=True)
class Config:
    """Teach the embedded model one subject and measure it.

    Args:
        data: folder with `dreambooth/SUBJECT/*.jpg` and `weights/*dinov2*.safetensors`.
        subject: which of the subjects.
        prompt: what its photos show.
        steps: of training; without it, the pipeline's for the embedded model.
        seeds: pictures for each of the four prompts.
        write: whether to write the table.
    """

    data: Path
    subject: str = "dog6"
    prompt: str = "a photo of sks dog"
    steps: int | None = None
    seeds: int = 4
    write: bool = True


def measure(config: Config, output: Path) -> dict[str, float]:
    """Trains into `output`; similarity before and after. Raises AssertionError if the base has changed."""
    pipe = load_pipeline(asset("tiny-sd"))
    texts = [p.format(config.prompt) for p in PROMPTS for _ in range(config.seeds)]
    seeds = [*range(config.seeds)] * len(PROMPTS)

    def draw() -> list[Image.Image]:
        return generate(pipe, texts, seeds, size=native_size(pipe), steps=20, guidance=4.0)

    before = draw()
    photos = config.data / "dreambooth" / config.subject
    dreambooth(DreamBooth(photos=photos, prompt=config.prompt, output=output, steps=config.steps))
    adapter = vm.load({"unet": pipe.unet}, output / "adapter.safetensors")
    after = draw()
    with adapter.disabled():
        assert all(a.tobytes() == b.tobytes() for a, b in zip(before, draw(), strict=True)), "the base has changed"
    judge = dino(config.data)
    real = judge.features([p.image for p in read_photos(photos).photos])
    own = (real @ real.T)[~torch.eye(len(real), dtype=torch.bool)].mean()
    similarity = {"base": before, "adapter": after}
    return {"real": own.item()} | {n: (judge.features(x) @ real.T).mean().item() for n, x in similarity.items()}


def main(config: Config) -> None:
    """Measures, prints and writes the table."""
    with TemporaryDirectory() as folder:
        found = measure(config, Path(folder) / "run")
    print(json.dumps({"subject": config.subject, **found}, indent=2))
    if not config.write:
        return
    path = RESULTS / "subject.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[config.subject] = found
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=2) + "\n")
    lines = [f"| {n} | {r['real']:.3f} | {r['base']:.3f} | {r['adapter']:.3f} |" for n, r in rows.items()]
    table = ["| subject | real photos among themselves | base | adapter |", "| --- | --- | --- | --- |", *lines]
    head = "# DINO similarity to the subject's photos\n\nMean cosine of DINOv2 ViT-S/14 features at 98 px over four"
    head += " prompts and four seeds, tiny-sd; by `benchmarks/subject.py`.\n\n"
    (RESULTS / "subject.md").write_text(head + "\n".join(table) + "\n")


if __name__ == "__main__":
    main(auto_cli(Config, as_positional=False))
