"""Few-shot adaptation of CLIP to a folder of pictures, one method or several under one budget.

    vismodal clip                                       digits: zero-shot, CoOp and Tip-Adapter-F on the embedded CLIP
    vismodal clip --data flowers --model ViT-B-16/laion2b_s34b_b88k --method clip-lora --shots 16 --steps 2000
    vismodal clip --data flowers --compare coop maple "clip-lora(rank=4)" linear-probe --seeds 3 --shots 8
    vismodal clip --data flowers --method promptsrc --base_to_new       trained on half of the classes, tested on all
    vismodal clip --data flowers --adapter runs/clip-1/coop/seed-0/adapter.safetensors    only measured

Validation data decides what a method leaves open (Tip-Adapter's alpha and beta, WiSE-FT's alpha, a probe's strength);
test data decides nothing and is looked at last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from vismodal import runs
from vismodal.checkpoint import read
from vismodal.clip import Templates
from vismodal.data.digits import digits_folder
from vismodal.data.folder import Folder, read_folder
from vismodal.entries import split
from vismodal.errors import InputError
from vismodal.fewshot.recipes import load_adapter
from vismodal.fewshot.task import Task
from vismodal.fewshot.trial import Budget, Trial, score
from vismodal.files import write_file
from vismodal.pretrained import Library, Pretrained, load_clip
from vismodal.reports import clip as clip_report
from vismodal.runs import known
from vismodal.table import table
from vismodal.train import Plan, Schedule


@dataclass(frozen=True)
class Config:
    """Adapt CLIP to the classes of a folder of pictures (few-shot); `vismodal clip pairs` is for pictures with texts.

    Args:
        data: folder with DIR/{train,val,test}/CLASS/*.jpg, or DIR/CLASS/*.jpg, of which parts are drawn. Without it,
            scikit-learn's digits.
        method: zero-shot, coop, cocoop, maple, promptsrc, ivlp, vpt, clip-adapter, tip-adapter, tip-adapter-f,
            clip-lora, wise-ft, linear-probe, or the class of any other method; with options as in "coop(tokens=4,
            lr=1e-3)". search="scale" lets validation data choose how far to go from the base, as WiSE-FT does.
        compare: several of these instead, each with the same pictures, steps and batches: "coop; maple; linear-probe".
        model: the embedded CLIP unless given: a folder, OWNER/NAME of transformers on the Hub, or of open_clip
            hf-hub:OWNER/NAME or ARCH/TAG such as ViT-B-32/laion2b_s34b_b79k.
        library: whose model it is to be, where there is a choice.
        templates: what the names of the classes are put into, "a photo of a {}." unless given; several are averaged. In
            YAML also a mapping from class to prompts, in Python (`main(config, templates)`) functions too. Underscores
            in names are read as spaces. A given adapter is measured with the prompts of its training.
        shots: training pictures of each class; 0 takes all.
        seeds: how many times, with other pictures and other initial values each time.
        base_to_new: train on the first half of the classes, and test on both halves.
        augment: train on this many augmented copies of each picture (a part of it, mirrored or not), of which
            Tip-Adapter takes the mean (10 in its paper); 0 on itself.
        steps: updates of the methods that are trained.
        batch: pictures of an update, of all processes together. CoCoOp encodes a prompt for each of them and each class
            at a time, and has 1 in its paper.
        learning_rate: for all methods that are trained, but for those with an lr of their own in brackets; without it
            each has its usual one.
        schedule: course of the learning rate.
        warmup: updates over which it rises from zero.
        clip: largest norm of the gradient; 0 is off.
        alphas: places between base and adapted model for search="scale".
        adapter: a file of an earlier run, to be measured instead of training.
        output: folder for the results. Without it, the next free runs/clip-N.
        resume: go on with the run in `output`; methods that are done are not done again.
        seed: of everything random.
        mixed_precision: of the computation while training; fp16 needs a GPU.
        save_every: save a checkpoint every so many steps; a stop and the end save one anyway.
        threads: of the CPU; torch's own choice, or 1 with the embedded model.
    """

    data: Path | None = None
    method: str | None = None
    compare: tuple[str, ...] = ()
    model: str | None = None
    library: Library | None = None
    templates: tuple[str, ...] | dict[str, list[str]] | None = None
    shots: int = 16
    seeds: int = 1
    base_to_new: bool = False
    augment: int = 0
    steps: int = 200
    batch: int = 32
    learning_rate: float | None = None
    schedule: Schedule = "cosine"
    warmup: int = 10
    clip: float = 1.0
    alphas: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(11))
    adapter: Path | None = None
    output: Path | None = None
    resume: bool = False
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    save_every: int = 200
    threads: int | None = None


# What may differ between a stop and its resume: what does not touch a method's outcome, or is compared by its content.
FREE = {
    "data", "method", "compare", "model", "library", "templates", "learning_rate", "seed", "seeds", "adapter", "output",
    "resume", "save_every", "threads",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Where the results lie, the scores of each method and seed, and whether the run was stopped before its end."""

    output: Path | None
    scores: list[dict[str, Any]]
    stopped: bool = False


def main(config: Config, templates: Templates | None = None) -> Result:
    """Trains, measures and writes the results into a folder. Raises `InputError` for input that cannot be used."""
    config = checked(config)
    with runs.cpu_threads(known(config.threads)):
        return run(config, templates or config.templates)


def checked(config: Config) -> Config:
    """The settings filled in. Raises `InputError` for what makes no sense."""
    if config.method and config.compare:
        raise InputError("method and compare are given; write --compare alone, with all methods")
    if config.adapter and (config.method or config.compare):
        raise InputError("adapter is only measured, and trains no method; leave out method and compare, or adapter")
    runs.at_least(config, 1, "seeds", "steps", "batch")
    runs.at_least(config, 0, "shots", "augment", "warmup", "clip", "save_every")
    if config.learning_rate is not None and not config.learning_rate > 0:
        raise InputError(f"learning_rate must be above 0, not {config.learning_rate}")
    if not config.alphas or not all(0 <= a <= 1 for a in config.alphas):
        raise InputError(f"alphas must be one or more numbers from 0 to 1, not {config.alphas}")
    methods = tuple(m for text in config.compare for m in split(text))
    methods = methods or ((config.method,) if config.method else ("zero-shot", "coop", "tip-adapter-f"))
    threads = config.threads or (torch.get_num_threads() if config.model else 1)
    return replace(config, compare=methods, method=None, threads=threads)


def run(config: Config, templates: Templates | None) -> Result:
    """`main` for settings that are filled in."""
    accelerator = runs.start_accelerator(config.mixed_precision, None)
    if config.batch % accelerator.num_processes:
        raise InputError(f"batch {config.batch} cannot be shared out among {accelerator.num_processes} processes")
    folder = data(config)
    model = load_clip(config.model, config.library)
    model.model.to(accelerator.device)
    if config.adapter:
        return measure(config, folder, model, templates, accelerator)
    task = Task(folder, model, templates or usual(config), config.base_to_new)
    entries = task.entries(config.compare, config.learning_rate)
    output = runs.claim(config.output, "clip", config.resume, accelerator)
    if accelerator.is_main_process:
        runs.save_config(replace(config, output=output), output)
    scores: list[dict[str, Any]] = []
    for entry in entries:
        for seed in range(config.seed, config.seed + config.seeds):
            place = output / entry.slug / f"seed-{seed}"
            trial = Trial(task, entry, seed, budget(config), place, accelerator)
            found = score(trial)
            if found is None:
                accelerator.print(f"stopped; go on with: {runs.resume_command('clip', output)}")
                return Result(output, scores, stopped=True)
            accelerator.print(f"{trial.name}: {told(found)}")
            scores.append(found)
    if accelerator.is_main_process:
        write_results(config, task.templates, output, scores)
    return Result(output, scores)


def data(config: Config) -> Folder:
    """The pictures, which must have a test part; what is left out is told on stderr."""
    place = config.data.expanduser() if config.data else digits_folder(Path("runs") / "digits")
    folder = read_folder(place, seed=config.seed)
    for note in folder.notes:
        print(f"note: {note}", file=sys.stderr)
    if not folder.test:
        raise InputError(f"{folder.root} has no test part, and no other data may be reported on; make one")
    return folder


def usual(config: Config) -> tuple[str, ...]:
    """What the names of classes are put into unless something is given."""
    return ("a photo of a {}.",) if config.data else ("a picture of the digit {}.",)


def budget(config: Config) -> Budget:
    """What all methods get alike."""
    plan = Plan(config.steps, 1, config.seed, config.schedule, config.warmup, config.clip)
    settings = runs.identity(config, FREE)
    return Budget(plan, config.shots, config.batch, config.augment, config.alphas, config.save_every, settings)


def measure(
    config: Config, folder: Folder, model: Pretrained, templates: Templates | None, accelerator: Accelerator
) -> Result:
    """The accuracy of a saved adapter on test data, with the prompts that it was trained with unless some are given."""
    file = known(config.adapter)
    header, _ = read(file)
    own = json.loads(header.get("prompts", "{}"))
    if templates is None and own:
        if own.keys() >= {name.replace("_", " ") for name in folder.classes}:
            templates = own
        else:
            print(f"note: {file.name} has prompts of its own classes; these get {usual(config)[0]!r}", file=sys.stderr)
    task = Task(folder, model, templates or usual(config), config.base_to_new)
    clf = task.classifier(task.labels)
    adapter, note = load_adapter(clf, file, task.classes(task.labels))
    if note:
        print(note, file=sys.stderr)
    test = task.test.accuracy(clf)
    adapter.detach()
    scores: dict[str, Any] = {"method": file.name, **task.scores(test, file)}
    accelerator.print(f"{file.name}: {told(scores)} on {len(folder.test)} test pictures")
    return Result(None, [scores])


def told(scores: Mapping[str, Any]) -> str:
    """Scores in a line."""
    return ", ".join(f"{name} {100 * scores[key]:.1f}%" for key, name in clip_report.SCORES.items() if key in scores)


def write_results(config: Config, templates: Templates, output: Path, scores: Sequence[Mapping[str, Any]]) -> None:
    """The table, as text, JSON and a plot, and the card; then says where they are."""
    head, rows = clip_report.few_shot_table(scores)
    write_file(output / "results.json", json.dumps(list(scores), indent=1, ensure_ascii=False))
    clip_report.accuracy_plot(scores, output / "accuracy.png")
    clip_report.few_shot_card(output, scores, {**asdict(config), "templates": clip_report.described(templates)})
    print(table(head, rows))
    print(f"results: {output / 'README.md'}; adapters: {output}/METHOD/seed-N/adapter.safetensors")


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["clip", *sys.argv[1:]]))
