"""Few-shot adaptation of CLIP to a folder of pictures, one method or several under one budget.

    vismodal clip                                       digits: zero-shot, CoOp and Tip-Adapter-F on the embedded CLIP
    vismodal clip --data flowers --model ViT-B-16/laion2b_s34b_b88k --method clip-lora --shots 16 --steps 2000
    vismodal clip --data flowers --compare coop maple "clip-lora(rank=4)" linear-probe --seeds 3 --shots 8
    vismodal clip --data flowers --method promptsrc --base_to_new       trained on half of the classes, tested on all
    vismodal clip --data flowers --adapter runs/clip-1/adapter.safetensors      only measured

Validation data decides what a method leaves open (Tip-Adapter's alpha and beta, WiSE-FT's alpha, a probe's strength);
test data decides nothing and is looked at last.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

import vismodal as vm
from vismodal import runs
from vismodal.callbacks import Progress
from vismodal.clip import Templates
from vismodal.data.digits import digits_folder
from vismodal.data.folder import read_folder
from vismodal.draw import seed_of, shuffled
from vismodal.entries import split
from vismodal.errors import InputError
from vismodal.fewshot.data import Copies, Inputs, Part
from vismodal.fewshot.recipes import Contestant, load_adapter, search_scale
from vismodal.fewshot.task import Task, caches
from vismodal.files import write_file
from vismodal.pretrained import Library, load_clip
from vismodal.reports import clip as clip_report
from vismodal.reports import run as report
from vismodal.resume import Checkpoints
from vismodal.runs import known
from vismodal.table import table
from vismodal.train import Micro, Plan, Schedule, fit


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
            in names are read as spaces.
        shots: training pictures of each class; 0 takes all.
        seeds: how many times, with other pictures and other initial values each time.
        base_to_new: train on the first half of the classes, and test on both halves.
        augment: train on this many augmented copies of each picture (a part of it, mirrored or not); 0 on itself.
        steps: updates of the methods that are trained.
        batch: pictures of an update, of all processes together.
        learning_rate: for all methods; without it each has its own, which options may change.
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
    "data", "method", "compare", "model", "library", "templates", "seed", "seeds", "adapter", "output", "resume",
    "save_every", "threads",
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
        given: Templates | None = config.templates if templates is None else templates
        assert given is not None
        return run(config, given)


def checked(config: Config) -> Config:
    """The settings filled in. Raises `InputError` for what makes no sense."""
    if config.method and config.compare:
        raise InputError("method and compare are given; write --compare alone, with all methods")
    runs.at_least(config, 1, "seeds", "steps", "batch")
    runs.at_least(config, 0, "shots", "augment", "warmup", "clip", "save_every")
    if config.learning_rate is not None and not config.learning_rate > 0:
        raise InputError(f"learning_rate must be above 0, not {config.learning_rate}")
    if not config.alphas or not all(0 <= a <= 1 for a in config.alphas):
        raise InputError(f"alphas must be one or more numbers from 0 to 1, not {config.alphas}")
    methods = tuple(m for text in config.compare for m in split(text))
    methods = methods or ((config.method,) if config.method else ("zero-shot", "coop", "tip-adapter-f"))
    if len(set(methods)) < len(methods):
        raise InputError(f"compare names a method twice: {', '.join(methods)}")
    threads = config.threads or (torch.get_num_threads() if config.model else 1)
    templates = config.templates or (("a photo of a {}.",) if config.data else ("a picture of the digit {}.",))
    return replace(config, compare=methods, method=None, threads=threads, templates=templates)


def run(config: Config, templates: Templates) -> Result:
    """`main` for settings that are filled in."""
    accelerator = runs.start_accelerator(config.mixed_precision, None)
    place = config.data.expanduser() if config.data else digits_folder(Path("runs") / "digits")
    folder = read_folder(place, seed=config.seed)
    for note in folder.notes:
        print(f"note: {note}", file=sys.stderr)
    if config.batch % accelerator.num_processes:
        raise InputError(f"batch {config.batch} cannot be shared out among {accelerator.num_processes} processes")
    if not folder.test:
        raise InputError(f"{folder.root} has no test part, and no other data may be reported on; make one")
    model = load_clip(config.model, config.library)
    model.model.to(accelerator.device)
    task = Task(folder, model, templates, config.base_to_new)
    if config.adapter:
        return measure(task, config.adapter)
    entries = task.entries(config.compare)
    output = runs.claim(config.output, "clip", config.resume, accelerator)
    if accelerator.is_main_process:
        runs.save_config(replace(config, output=output), output)
    scores: list[dict[str, Any]] = []
    for entry in entries:
        for seed in range(config.seed, config.seed + config.seeds):
            single = len(entries) * config.seeds == 1
            folder_of = output if single else output / entry.slug / f"seed-{seed}"
            found = score(Job(config, task, entry, seed, folder_of, accelerator))
            if found is None:
                accelerator.print(f"stopped; go on with: {runs.resume_command('clip', output)}")
                return Result(output, scores, stopped=True)
            scores.append(found)
    if accelerator.is_main_process:
        write_results(config, output, scores)
    return Result(output, scores)


@dataclass(frozen=True)
class Job:
    """One method with one seed, and where its results go."""

    config: Config
    task: Task
    entry: Contestant
    seed: int
    folder: Path
    accelerator: Accelerator

    @property
    def name(self) -> str:
        return f"{self.entry.label}, seed {self.seed}"


def score(job: Job) -> dict[str, Any] | None:
    """Trains and measures: its scores, also in its folder; None where it was stopped."""
    task, entry, main = job.task, job.entry, job.accelerator.is_main_process
    clf = task.classifier(task.labels)
    content = {"method": entry.identity, "prompts": clf.text.prompts, "data": task.folder.digest}
    same = runs.identity(job.config, FREE, **content | {"seed": job.seed})
    done = job.folder / "results.json"
    if done.exists():
        kept: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        if kept.pop("identity", None) != json.loads(json.dumps(same)):
            raise InputError(f"{job.folder} holds results of other settings or data; give those, or another output")
        return kept
    start, train = time.perf_counter(), task.shots(job.config.shots, job.seed)
    found: dict[str, Any] | None
    if entry.method:
        found = adapted(job, clf, train, same)
    elif entry.search == "probe":
        found = task.probe(clf, train, job.folder / "probe.safetensors" if main else None)
    else:
        found = {**task.scores(task.test.accuracy(clf)), "parameters": 0, **caches(clf)}
    if found is None:
        return None
    scores = {"method": entry.label, "seed": job.seed, **found, "seconds": round(time.perf_counter() - start, 2)}
    if main:
        write_file(done, json.dumps(scores | {"identity": same}, indent=1, ensure_ascii=False))
    told = ", ".join(f"{name} {100 * scores[key]:.1f}%" for key, name in clip_report.SCORES.items() if key in scores)
    job.accelerator.print(f"{job.name}: {told}")
    return scores


def adapted(job: Job, clf: vm.CLIPClassifier, train: Part, same: Mapping[str, Any]) -> dict[str, Any] | None:
    """Trains a method, lets validation data decide what it leaves open, saves it, and only then sees test data."""
    task, file = job.task, job.folder / "adapter.safetensors"
    adapter = vm.adapt(clf, known(job.entry.method), name="clip", seed=seed_of(job.seed, "adapter"))
    try:
        clf.train()
        cached = caches(clf)
        if not trained(job, clf, adapter, train, same):
            return None
        clf.eval()
        facts = decided(job, clf, adapter)
        if job.accelerator.is_main_process:
            vm.save(adapter, file, task.header(clf, adapter))
        job.accelerator.wait_for_everyone()
        test = task.test.accuracy(clf)
        count = adapter.num_parameters
    finally:
        adapter.detach()
    return {**task.scores(test, file), **facts, "parameters": count, **cached}


def trained(job: Job, clf: vm.CLIPClassifier, adapter: vm.Adapter, train: Part, same: Mapping[str, Any]) -> bool:
    """Whether training, where the method has any, came to its end."""
    config, entry = job.config, job.entry
    inputs = Inputs(train.pictures, clf, Copies(config.augment, job.task.model.size, job.seed))
    if entry.search == "cache":
        vm.TipAdapter.remember(adapter, inputs.passes(train.labels))
    told = ", ".join(f"{name} {'computed once' if how == 'once' else how}" for name, how in caches(clf).items())
    job.accelerator.print(f"{job.name}: {adapter.num_parameters:,} parameters; {told}")
    if not entry.lr:
        return True
    groups = adapter.groups(config.learning_rate or entry.lr, entry.weight_decay)
    log = job.folder / "metrics.jsonl"
    outcome = fit(
        loss_of(config, clf, inputs, train.labels),
        adapter,
        torch.optim.AdamW(groups, eps=entry.eps),
        plan=Plan(config.steps, 1, job.seed, config.schedule, config.warmup, config.clip),
        accelerator=job.accelerator,
        checkpoints=Checkpoints(job.folder / "checkpoints", {**same, **runs.bases(adapter)}, config.save_every),
        log=log,
        callbacks=[Progress()],
    )
    if not outcome.stopped and job.accelerator.is_main_process:
        report.loss_plot(log, job.folder / "loss.png")
    return not outcome.stopped


def decided(job: Job, clf: vm.CLIPClassifier, adapter: vm.Adapter) -> dict[str, Any]:
    """Searches on validation data: what they chose, and its accuracy there."""
    val = job.task.val
    facts: dict[str, Any] = {}
    if job.entry.search == "cache":
        tip = vm.TipAdapter.search(adapter, val.inputs(clf).passes(val.labels)[0])
        facts = {"alpha": tip.alpha, "beta": tip.beta}
    elif job.entry.search == "scale":
        place = search_scale(adapter, lambda: val.accuracy(clf), job.config.alphas)
        facts = {"scale": place.alpha, "validation by scale": {str(a): right for a, right in place.tried.items()}}
    return {**facts, "validation": val.accuracy(clf)}


def loss_of(
    config: Config, clf: vm.CLIPClassifier, inputs: Inputs, labels: Tensor
) -> Callable[[Micro], dict[str, Tensor]]:
    """Cross-entropy of a micro-batch, and its share of right answers."""

    def loss(micro: Micro) -> dict[str, Tensor]:
        places = micro.positions(config.batch // micro.world)
        items = [shuffled(micro.seed, "pictures", len(inputs), p) for p in places]
        logits = clf(inputs.batch(items, [inputs.copies.at(p) for p in places]))
        target = labels[items].to(logits.device)
        right = (logits.argmax(-1) == target).float().mean()
        return {"loss": F.cross_entropy(logits.float(), target), "accuracy": right}

    return loss


def measure(task: Task, file: Path) -> Result:
    """The accuracy of a saved adapter on test data."""
    clf = task.classifier(task.labels)
    adapter, note = load_adapter(clf, file, task.classes(task.labels))
    if note:
        print(note, file=sys.stderr)
    test = task.test.accuracy(clf)
    adapter.detach()
    print(f"{file.name}: accuracy {100 * test:.1f}% on {len(task.test.labels)} test pictures")
    return Result(None, [{"method": file.name, "test": test}])


def write_results(config: Config, output: Path, scores: Sequence[Mapping[str, Any]]) -> None:
    """The table, as text, JSON and a plot, and the card; then says where they are."""
    head, rows = clip_report.few_shot_table(scores)
    if len(scores) > 1:
        write_file(output / "results.json", json.dumps(list(scores), indent=1, ensure_ascii=False))
    clip_report.accuracy_plot(scores, output / "accuracy.png")
    clip_report.few_shot_card(output, scores, asdict(config))
    print(table(head, rows))
    print(f"results: {output / 'README.md'}, {output / 'results.json'}")


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["clip", *sys.argv[1:]]))
