"""Contrastive fine-tuning of CLIP or SigLIP on pictures with texts, with an eye on what it forgets.

    vismodal clip pairs --pairs catalogue                           a folder with metadata.jsonl or a CSV
    vismodal clip pairs --pairs catalogue --retain flowers         and what is forgotten: zero-shot on other data
    vismodal clip pairs --pairs catalogue --batch 1024 --part 32    a large batch in the memory of a small one
    vismodal clip pairs --pairs catalogue --model ViT-B-16/laion2b_s34b_b88k --method "lora(rank=16)" --steps 2000

The loss is the model's own: symmetric cross-entropy for CLIP, sigmoid for SigLIP. Where the method merges, the adapted
model is written for open_clip and for transformers.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vismodal as vm
from vismodal import clip_export, runs
from vismodal.callbacks import Progress
from vismodal.clip import Images, encode_texts
from vismodal.contrastive.loss import Loss, Temperature, Trained, encoded, gathered, loss_named, row_at
from vismodal.contrastive.retention import Judge
from vismodal.data.folder import Folder, read_folder
from vismodal.data.pairs import Long, Pairs, fitting, held_out, read_pairs
from vismodal.data.pictures import Pictures
from vismodal.draw import seed_of
from vismodal.entries import written
from vismodal.errors import InputError
from vismodal.files import write_file
from vismodal.pretrained import Library, Pretrained, load_clip
from vismodal.reports import clip as clip_report
from vismodal.reports import run as report
from vismodal.resume import Checkpoints
from vismodal.runs import known
from vismodal.train import Micro, Plan, Schedule, fit


@dataclass(frozen=True)
class Config:
    """Fine-tune CLIP on pictures with their texts (contrastive), and measure retrieval and what was forgotten.

    Args:
        pairs: folder with a metadata.jsonl of file_name and text (one caption, or a list), or with a CSV; or that file.
            Folders train and val within, each with its own, are the parts; otherwise a share of pictures is held out.
        val: folder or file with other pairs for retrieval, where they lie elsewhere.
        held_out: share of pictures for retrieval, where no part of their own is given.
        long: captions longer than the model's context: truncate (their end is not seen), skip, or error. Told anyway.
        retain: folder of pictures by class, DIR/test/CLASS/*.jpg, whose zero-shot accuracy should stay.
        templates: what the names of those classes are put into.
        model: the embedded CLIP unless given: a folder, OWNER/NAME of transformers on the Hub, or of open_clip
            hf-hub:OWNER/NAME or ARCH/TAG such as ViT-B-32/laion2b_s34b_b79k.
        library: whose model it is to be, where there is a choice.
        method: any method that goes on both towers or one, with its options: "lora(rank=16)", "dora",
            "tune(sites=('norm','bias'))".
        loss: infonce (CLIP's), sigmoid (SigLIP's), or auto: what the model was made for.
        learn_scale: train the temperature too (and SigLIP's bias); 1 / temperature never goes beyond 100.
        batch: pairs of an update, of all processes together: each is a wrong answer to all others.
        part: pairs that go through the towers at a time; the gradient is that of the whole batch, for twice the
            forward time. 0 is all at once.
        augment: train on a random part of each picture, mirrored or not.
        steps: updates.
        learning_rate: of AdamW, after warming up.
        weight_decay: of matrices.
        schedule: course of the learning rate.
        warmup: updates over which it rises from zero.
        clip: largest norm of the gradient; 0 is off.
        alphas: places between base (0) and adapted model (1) that are measured, where the method allows it.
        output: folder for the results. Without it, the next free runs/clip-pairs-N.
        resume: go on with the run in `output`; to the bit what it would have become without the stop.
        seed: of everything random.
        mixed_precision: of the computation while training; fp16 needs a GPU.
        save_every: save a checkpoint every so many steps; a stop and the end save one anyway.
        threads: of the CPU; torch's own choice, or 1 with the embedded model.
    """

    pairs: Path | None = None
    val: Path | None = None
    held_out: float = 0.1
    long: Long = "truncate"
    retain: Path | None = None
    templates: tuple[str, ...] = ("a photo of a {}.",)
    model: str | None = None
    library: Library | None = None
    method: str = "lora(rank=8, sites=('attn.*', 'mlp.*'))"
    loss: Loss = "auto"
    learn_scale: bool = False
    batch: int = 128
    part: int = 0
    augment: bool = False
    steps: int = 200
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: Schedule = "cosine"
    warmup: int = 10
    clip: float = 1.0
    alphas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    output: Path | None = None
    resume: bool = False
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    save_every: int = 100
    threads: int | None = None


# What may differ between a stop and its resume: what does not touch the adapter, or is compared by its content.
FREE = {
    "pairs", "val", "retain", "templates", "model", "library", "alphas", "output", "resume", "steps", "save_every",
    "threads",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Where the results lie, the sweep over alpha, and whether the run was stopped before its end."""

    output: Path
    sweep: list[dict[str, float]]
    stopped: bool = False


def main(config: Config) -> Result:
    """Trains, measures and writes the results into a folder. Raises `InputError` for input that cannot be used."""
    config = checked(config)
    with runs.cpu_threads(known(config.threads)):
        return run(config)


def checked(config: Config) -> Config:
    """The settings filled in. Raises `InputError` for what makes no sense."""
    if config.pairs is None:
        raise InputError(
            'pairs is missing; write --pairs DIR, with rows {"file_name": ..., "text": ...} in metadata.jsonl'
        )
    runs.at_least(config, 2, "batch")
    runs.at_least(config, 1, "steps")
    runs.at_least(config, 0, "part", "warmup", "clip", "learning_rate", "weight_decay", "save_every")
    if not 0 < config.held_out < 1:
        raise InputError(f"held_out must be a share between 0 and 1, not {config.held_out}")
    if not config.alphas or not all(0 <= a <= 1 for a in config.alphas):
        raise InputError(f"alphas must be one or more numbers from 0 to 1, not {config.alphas}")
    return replace(config, threads=config.threads or (torch.get_num_threads() if config.model else 1))


def run(config: Config) -> Result:
    """`main` for settings that are filled in."""
    accelerator = runs.start_accelerator(config.mixed_precision, None)
    model = load_clip(config.model, config.library)
    model.model.to(accelerator.device)
    train, val = read(config, model)
    world = accelerator.num_processes
    if config.batch % world:
        raise InputError(f"batch {config.batch} cannot be shared out evenly among {world} processes")
    if config.batch > len(train.pairs):
        raise InputError(
            f"batch is {config.batch}, and there are {len(train.pairs)} pictures to train on; a picture may be in a "
            "batch once: write a smaller batch"
        )
    judge = Judge(model, val, retained(config), config.templates)
    adapter = adapt(config, model)
    trained = Trained(adapter, Temperature(model.model, config.learn_scale).to(accelerator.device))
    loss = loss_of(config, model, train, trained.temperature, world)
    config = replace(config, output=runs.claim(config.output, "clip-pairs", config.resume, accelerator))
    output = known(config.output)
    same = runs.identity(config, FREE, pairs=train.digest, **runs.bases(adapter))
    checkpoints = Checkpoints(output / "checkpoints", same, config.save_every)
    checkpoints.check(config.steps)
    if accelerator.is_main_process:
        runs.save_config(config, output)
    accelerator.print(
        f"training {adapter.num_parameters:,} parameters on {len(train.pairs)} pictures with {len(train.texts)} "
        f"captions; {len(val.pairs)} pictures for retrieval; into {output}"
    )
    outcome = fit(
        loss,
        trained,
        torch.optim.AdamW(trained.groups(config.learning_rate, config.weight_decay)),
        plan=Plan(config.steps, 1, config.seed, config.schedule, config.warmup, config.clip),
        accelerator=accelerator,
        checkpoints=checkpoints,
        log=output / "metrics.jsonl",
        callbacks=[Progress()],
    )
    if outcome.stopped:
        again = runs.resume_command("clip pairs", output)
        accelerator.print(f"stopped after step {outcome.step} of {config.steps}; go on with: {again}")
        return Result(output, [], stopped=True)
    model.model.eval()
    sweep = judge.sweep(adapter, config.alphas) if accelerator.is_main_process else []
    if accelerator.is_main_process:
        write_results(config, model, trained, sweep)
    accelerator.wait_for_everyone()
    return Result(output, sweep)


def read(config: Config, model: Pretrained) -> tuple[Pairs, Pairs]:
    """Pairs to train on, and others for retrieval; what is left out or cut is told on stderr."""
    place = known(config.pairs).expanduser()
    inner = place / "train"
    pairs = read_pairs(inner if inner.is_dir() else place)
    val_place = config.val or next(
        (place / n for n in ("val", "test") if inner.is_dir() and (place / n).is_dir()), None
    )
    both = (pairs, read_pairs(val_place)) if val_place else held_out(pairs, config.held_out, config.seed)
    kept = []
    for name, each in zip(("train", "val"), both, strict=True):
        for rejected in each.rejected:
            print(f"skipped {rejected}", file=sys.stderr)
        each, long = fitting(each, model.too_long, config.long)
        if long:
            done = "cut: their end is not seen" if config.long == "truncate" else "left out"
            more = f"{len(long)} captions have more than {model.context} tokens"
            print(f"{name}: {more} and are {done}; the first: {long[0]!r}", file=sys.stderr)
        kept.append(each)
    return kept[0], kept[1]


def retained(config: Config) -> Folder | None:
    """The data whose zero-shot accuracy should stay."""
    if config.retain is None:
        return None
    folder = read_folder(config.retain.expanduser(), seed=config.seed)
    for note in folder.notes:
        print(f"note: {note}", file=sys.stderr)
    return folder


def adapt(config: Config, model: Pretrained) -> vm.Adapter:
    """The method on both towers."""
    read = written(config.method, ())
    return vm.adapt(model.model, read.make(), name="clip", seed=seed_of(config.seed, "adapter"))


def loss_of(
    config: Config, model: Pretrained, train: Pairs, temperature: Temperature, world: int
) -> Callable[[Micro], dict[str, Tensor]]:
    """The loss of a batch: each picture once, with one of its captions, among those of all processes."""
    pictures = Pictures([pair.path for pair in train.pairs], model.preprocess)
    ids = model.tokenize(train.texts)
    first = torch.tensor([0, *(len(pair.texts) for pair in train.pairs)]).cumsum(0).tolist()  # of each one's captions
    contrast, images = loss_named(config.loss, temperature), Images(model.model)
    model.model.train()
    device = temperature.scale.device

    def loss(micro: Micro) -> dict[str, Tensor]:
        places = micro.positions(config.batch // world)
        items = [row_at(micro.seed, len(pictures), config.batch, p) for p in places]
        texts = [
            first[i] + int(torch.randint(first[i + 1] - first[i], (), generator=micro.generator("caption", p)))
            for i, p in zip(items, places, strict=True)
        ]
        if config.augment:
            x = pictures.augmented(items, [(micro.seed, "augment", p) for p in places], model.size)
        else:
            x = pictures.batch(items)
        f = F.normalize(encoded(images, x.to(device), config.part), dim=-1)
        t = F.normalize(
            encoded(lambda rows: encode_texts(model.model, rows), ids[texts].to(device), config.part), dim=-1
        )
        return {"loss": contrast(gathered(f), gathered(t)), "scale": temperature.scale.exp()}

    return loss


def write_results(config: Config, model: Pretrained, trained: Trained, sweep: Sequence[dict[str, float]]) -> None:
    """The adapter, the merged model for both libraries, and what people look at; then says where they are."""
    output, adapter = known(config.output), trained.adapter
    header = {name: str(value.item()) for name, value in trained.temperature.named_parameters()}
    vm.save(adapter, output / "adapter.safetensors", {"temperature": json.dumps(header)})
    exported = exports(config, model, trained)
    write_file(output / "results.json", json.dumps({"sweep": sweep, "exports": exported}, indent=1))
    clip_report.retention_plot(sweep, output / "retention.png")
    report.loss_plot(output / "metrics.jsonl", output / "loss.png")
    told = "\n".join(f"- {line}" for line in exported)
    clip_report.pairs_card(output, sweep, asdict(config), adapter.num_parameters, told)
    print(clip_report.pairs_table(sweep))
    print("\n".join(exported))
    print(f"results: {output / 'README.md'}")


def exports(config: Config, model: Pretrained, trained: Trained) -> list[str]:
    """Writes the merged model; says for each library where it is, or why it is not."""
    if not all(method.mergeable for method in trained.adapter.methods.values()):
        return [f"not exported: {config.method} does not merge into the weights; use adapter.safetensors"]
    merged = baked(model.model, trained)
    return clip_export.write(replace(model, model=merged), known(config.output))


def baked(model: nn.Module, trained: Trained) -> nn.Module:
    """A copy of the model with adapter and temperature in its weights."""
    merged: Any = copy.deepcopy(model)
    vm.attached(merged)[trained.adapter.name].detach(keep=True)
    trained.temperature.write(merged)
    return nn.Module.eval(merged)


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["clip", "pairs", *sys.argv[1:]]))
