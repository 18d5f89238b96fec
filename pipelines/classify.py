"""Adapt a vision model of timm or transformers to the pictures in a folder, and compare methods that do so.

    vismodal classify                                      # the embedded tiny-vit learns digits
    vismodal classify --data pets --model vit_base_patch16_224 --method "lora(rank=8)" --epochs 20
    vismodal classify --data pets --compare "lora; vpt(tokens=8); adaptformer; ssf" --repeats 3 --tune 6
    vismodal classify --config runs/classify-1/config.yaml --resume

The same from Python: `main(Config(data=Path("pets"), model="vit_base_patch16_224", method="lora"))`. A run that was
finished is not made again by `--resume`, which may also add methods and seeds.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list

import vismodal as vm
from vismodal import runs
from vismodal.callbacks import read_log, watchers
from vismodal.classification import learning
from vismodal.classification.bench import Bench, read_data
from vismodal.classification.classifier import save_classifier
from vismodal.classification.contestants import Contestant, attach, contestants, trials
from vismodal.classification.learning import BEST, Objective, Run, Validation
from vismodal.classification.vision import EMBEDDED, Source, fresh_head, hub_id, load_vision
from vismodal.data.folder import few
from vismodal.data.hub import as_folder
from vismodal.data.views import Augment, Views
from vismodal.draw import seed_of
from vismodal.errors import InputError
from vismodal.prefix.frozen import FrozenPrefix
from vismodal.reports.classification import Outcome
from vismodal.reports.classification_page import Shown, about, write_all
from vismodal.resume import Checkpoints
from vismodal.runs import known
from vismodal.train import Plan, Schedule, fit


@dataclass(frozen=True)
class Config:
    """Adapt a vision model to the pictures in a folder; compare methods on it.

    Args:
        data: folder DIR/CLASS/*.jpg, or DIR/{train,val,test}/CLASS/*.jpg; or OWNER/NAME on the Hub, or a folder that
            the package datasets reads (pip install "vismodal[datasets]"). Without it, scikit-learn's digits.
        image_column: of a data set of that package, where the types of its columns do not tell.
        label_column: likewise.
        model: tiny-vit (embedded), a name of timm (timm.list_models() has them), a folder of timm or transformers,
            hf-hub:OWNER/NAME of timm or OWNER/NAME of transformers on the Hub.
        weights: a checkpoint file for a timm model, instead of its pretrained one.
        image_size: side in pixels of a timm model's input, where it is not to be the model's own.
        method: what to train, by name or with options: lora "lora(rank=4, lr=2e-3)" "vpt(tokens=8) + bitfit". The new
            head is always trained too; linearprobe is the head alone, tune(sites=("*",)) nearly everything.
        compare: several methods under one budget, instead of `method`: "lora; vpt(tokens=8); adaptformer".
        output: folder for the results. Without it, the next free runs/classify-N.
        resume: go on with the run in `output`; to the bit what it would have become without the stop.
        shots: training pictures of each class, drawn by the seed; 0 takes all.
        val: share of each class for validation, where the folder has no val.
        test: share of each class for the test, where the folder has no parts.
        epochs: readings of the training pictures, each rounded up to whole updates.
        batch: pictures in a forward pass, on each process.
        accumulate: forward passes for each update.
        learning_rate: of AdamW, after warming up, for all methods that are written without an lr of their own. Without
            it, each method's usual one.
        schedule: course of the learning rate.
        warmup: share of the updates over which it rises from zero.
        weight_decay: of AdamW, on matrices; biases, norms and other vectors have none.
        clip: largest norm of the gradient; 0 is off.
        label_smoothing: share of the target that all classes get alike.
        mixup: alpha of mixup, usually 0.2 to 0.8; 0 is off.
        crop: least share of a training picture that a random crop shows; 1 shows it as in evaluation.
        flip: mirror training pictures half of the times.
        randaugment: magnitude of two operations of RandAugment, usually 9; 0 is off.
        copies: how many versions of each picture crop, flip and randaugment make; 0 makes new ones all the time.
        cache: compute what the model does before its first adapter once for each picture: adapters in the last blocks,
            side networks and linear probes are then a fraction of the work. Results are equal up to rounding. It needs
            pictures that come again: no mixup, and with random changes some `copies`.
        tune: trials of learning rate and scale for each method, judged by validation data; 0 takes them as they are.
        repeats: runs with seeds seed, seed + 1, ...; the table has mean and deviation.
        seed: of everything random. The parts of a folder without any are drawn from it too, the same in all repeats.
        mixed_precision: of the computation; bf16 is faster on most machines, fp16 needs a GPU.
        score_every: epochs from one look at the validation data to the next.
        threads: of the CPU; torch's own choice, or 1 with the embedded model, which is too small to be shared out. A
            resume is exact to the bit with as many.
        track: one of accelerate's trackers, such as tensorboard or wandb.
    """

    data: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    model: str = EMBEDDED
    weights: str | None = None
    image_size: int | None = None
    method: str = "lora"
    compare: tuple[str, ...] = ()
    output: Path | None = None
    resume: bool = False
    shots: int = 0
    val: float = 0.2
    test: float = 0.2
    epochs: int = 10
    batch: int = 32
    accumulate: int = 1
    learning_rate: float | None = None
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    crop: float = 1.0
    flip: bool = False
    randaugment: int = 0
    copies: int = 0
    cache: bool = False
    tune: int = 0
    repeats: int = 1
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    score_every: int = 1
    threads: int | None = None
    track: str | None = None


# What may differ where a finished run's result is taken over: it decides nothing, or its content is compared instead.
FREE = {
    "data", "image_column", "label_column", "model", "weights", "method", "compare", "output", "resume",
    "learning_rate", "tune", "repeats", "seed", "threads", "track",
}  # fmt: skip


def main(config: Config) -> Path:
    """Trains, and gives the folder of the results. Raises `InputError` for input that cannot be used."""
    config = checked(config)
    with runs.cpu_threads(known(config.threads)):
        return run(config)


def checked(config: Config) -> Config:
    """The settings with threads filled in. Raises `InputError` for what makes no sense."""
    runs.at_least(config, 1, "epochs", "batch", "accumulate", "repeats", "score_every")
    runs.at_least(config, 0, "shots", "warmup", "weight_decay", "clip", "mixup", "tune", "val", "test")
    runs.at_least(config, 1, *(name for name in ("threads", "image_size") if getattr(config, name) is not None))
    if config.learning_rate is not None and not config.learning_rate > 0:
        raise InputError(f"learning_rate must be above 0, not {config.learning_rate}")
    if not (config.val > 0 and config.test > 0 and config.val + config.test < 1):
        raise InputError(f"val={config.val} and test={config.test} must be above 0, and leave something to learn from")
    if not config.warmup < 1:
        raise InputError(f"warmup is a share of the updates and must be below 1, not {config.warmup}")
    Objective(2, config.batch, config.label_smoothing, config.mixup)
    augment = augment_of(config)
    if augment.copies and not augment.random:
        raise InputError(f"copies={augment.copies} of each picture would all be alike; write crop, flip or randaugment")
    if config.cache and (config.mixup or (augment.random and not augment.copies)):
        todo = "leave out mixup" if config.mixup else "write copies=4, or leave out crop, flip and randaugment"
        raise InputError(f"no picture would come twice, so that cache has nothing to keep; {todo}")
    return replace(config, threads=config.threads or (1 if config.model == EMBEDDED else torch.get_num_threads()))


def run(config: Config) -> Path:
    """`main` for settings that are filled in."""
    entries = contestants(config.compare or (config.method,), config.learning_rate)
    accelerator = runs.start_accelerator(config.mixed_precision, config.track)
    with accelerator.main_process_first():
        data = as_folder(config.data, Path("runs") / "datasets", config.image_column, config.label_column)
    folder = read_data(data, config.val, config.test, config.seed, config.shots, accelerator)
    vision = load_vision(source_of(config), len(folder.classes))
    vision.model.to(accelerator.device)
    for each in entries:
        attach(each, vision.model, config.seed).detach()  # what does not fit is told before anything is written
    output = runs.claim(config.output, "classify", config.resume, accelerator)
    config = replace(config, output=output)
    if accelerator.is_main_process:
        runs.save_config(config, output)
    val, test = (Views(items, vision.config) for items in (folder.val, folder.test))
    bench = Bench(folder, vision, accelerator, output, 2 * config.batch, val, test if folder.test else None)
    try:
        results = [compete(config, bench, each) for each in entries]
    except KeyboardInterrupt:
        accelerator.print(f"stopped; go on with: {runs.resume_command('classify', output)}")
        raise
    if accelerator.is_main_process:
        write_results(config, bench, results)
    accelerator.wait_for_everyone()
    return output


def compete(c: Config, bench: Bench, each: Contestant) -> list[Outcome]:
    """One run for each seed, with the learning rate and the scale of the best trial on validation data."""
    tried = trials(each, c.tune, c.seed)
    if len(tried) > 1:
        bench.accelerator.print(f"{each.label}: {len(tried)} trials of learning rate and scale")
        found = [learn(c, bench, trial, c.seed) for trial in tried]
        best = max(range(len(tried)), key=lambda i: (found[i]["val"]["accuracy"], -found[i]["val"]["loss"]))
        each = tried[best]
    return [learn(c, bench, each, c.seed + i) for i in range(c.repeats)]


def learn(c: Config, bench: Bench, each: Contestant, seed: int) -> Outcome:
    """Trains once, unless this run was finished before; scores its best epoch and its last."""
    main = bench.accelerator.is_main_process
    place = bench.output / "runs" / f"{each.slug}-lr{each.lr:.3g}-x{each.scale:g}-seed{seed}"
    fresh_head(bench.vision.model, len(bench.folder.classes), seed_of(seed, "head"))
    adapter = attach(each, bench.vision.model, seed_of(seed, "adapter"))
    try:
        world = bench.accelerator.num_processes
        content = {"data": bench.folder.digest, "processes": world, "model": runs.bases(adapter), "seed": seed}
        same = json.loads(json.dumps(runs.identity(c, FREE, **content, **each.identity)))
        # all do what the first process found
        found = broadcast_object_list([learning.finished(place, same) if main else None])[0]
        if found is None:
            found = broadcast_object_list([train(c, bench, adapter, each.lr, seed, place, same)])[0]
            if main:
                learning.finish(place, same, found)
    finally:
        adapter.detach()
    tested = f", test {100 * found['test']['accuracy']:.1f}%" if found["test"] else ""
    where = f"{each.label} (lr {each.lr:g}, scale {each.scale:g}, seed {seed})"
    bench.accelerator.print(f"{where}: validation {100 * found['val']['accuracy']:.1f}%{tested}")
    return Outcome(place, each.label, seed, each.lr, each.scale, found)


def train(
    c: Config, bench: Bench, adapter: vm.Adapter, lr: float, seed: int, place: Path, same: dict[str, object]
) -> dict[str, object] | None:
    """The figures of a run, on the main process. Raises KeyboardInterrupt if somebody stopped it."""
    folder, model, accelerator = bench.folder, bench.vision.model, bench.accelerator
    items, _ = few(folder, c.shots, seed) if c.shots else (folder.train, [])
    views = Views(items, bench.vision.config, augment_of(c), seed)
    seer: Run = FrozenPrefix(model) if c.cache else model
    loss = Objective(len(folder.classes), c.batch, c.label_smoothing, c.mixup).loss(seer, views)
    epoch = math.ceil(len(items) / (c.batch * c.accumulate * accelerator.num_processes))
    steps = epoch * c.epochs
    model.train()
    learning.calibrate(adapter, loss, seed)
    outcome = fit(
        loss,
        adapter,
        torch.optim.AdamW(adapter.groups(lr, c.weight_decay)),
        plan=Plan(steps, c.accumulate, seed, c.schedule, round(c.warmup * steps), c.clip),
        accelerator=accelerator,
        checkpoints=Checkpoints(place / "checkpoints", same, epoch * c.score_every, keep=1),
        log=place / "metrics.jsonl",
        callbacks=watchers(
            accelerator,
            c.track,
            f"classify-{place.name}",
            same,
            Validation(partial(bench.scores, seer, bench.val), adapter, place, epoch * c.score_every, epoch),
        ),
    )
    model.eval()
    if outcome.stopped:
        raise KeyboardInterrupt
    return figures(bench, seer, adapter, place, steps) if accelerator.is_main_process else None


def figures(bench: Bench, seer: Run, adapter: vm.Adapter, place: Path, steps: int) -> dict[str, object]:
    """Of a run that has just made its last step; then the adapter is the one of its best epoch."""
    best, last = learning.best_epoch(place), bench.figures(seer)
    learning.restore_best(adapter, place)
    return {
        "epoch": best["epoch"],
        **(last if best["step"] == steps else bench.figures(seer)),
        "last": last,
        "parameters": adapter.num_parameters,
        "bytes": (place / BEST).stat().st_size,
        "seconds": read_log(place / "metrics.jsonl")[-1]["seconds"],
    }


def write_results(c: Config, bench: Bench, results: Sequence[Sequence[Outcome]]) -> None:
    """The best adapter with all that predicting needs, and what people look at; then says what to do next."""
    output, folder, source = bench.output, bench.folder, source_of(c)
    winner = max(results, key=lambda outcomes: sum(o["val"]["accuracy"] for o in outcomes))
    best = max(winner, key=lambda o: (o["val"]["accuracy"], -o["val"]["loss"]))
    part, views = ("test", bench.test) if bench.test else ("val", bench.val)
    fresh_head(bench.vision.model, len(folder.classes), 0)
    adapter = vm.load(bench.vision.model, best.folder / BEST, "classify")  # what is shown is what the file gives
    save_classifier(adapter, output / "adapter.safetensors", source, bench.vision, folder.classes)
    logits = learning.answers(bench.vision.model, views, 2 * c.batch, bench.accelerator.autocast)
    adapter.detach()
    scores = learning.score(logits, views.labels)
    hub = hub_id(bench.vision.model, source)
    base = hub or Path(c.model).name
    shown = Shown(folder, results, best, scores, part, asdict(c), about(folder, base, c.epochs, c.shots))
    more = {"classes": folder.classes, "processes": bench.accelerator.num_processes, "notes": folder.notes}
    more["best"] = f"runs/{best.folder.name}"
    print("\n" + write_all(output, shown, logits, base, hub, more))
    file, picture = output / "adapter.safetensors", views.items[0].path
    print(f"report: {output / 'report.html'}\nadapter: {file}")
    print(f"next: vismodal predict --adapter {shlex.quote(str(file))} {shlex.quote(str(picture))}")


# -- small parts -------------------------------------------------------------------------------------------------------


def source_of(config: Config) -> Source:
    """Where the base model comes from."""
    return Source(config.model, config.weights, config.image_size)


def augment_of(config: Config) -> Augment:
    """What changes training pictures."""
    return Augment(config.crop, config.flip, config.randaugment, config.copies)


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["classify", *sys.argv[1:]]))
