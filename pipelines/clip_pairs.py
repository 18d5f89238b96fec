"""Contrastive fine-tuning of CLIP or SigLIP on pictures with texts, with an eye on what it forgets.

    vismodal clip pairs --pairs catalogue                           a folder with metadata.jsonl or a CSV
    vismodal clip pairs --pairs catalogue --retain flowers         and what is forgotten: zero-shot on other data
    vismodal clip pairs --pairs catalogue --batch 1024 --part 32    a large batch in the memory of a small one
    vismodal clip pairs --pairs catalogue --model ViT-B-16/laion2b_s34b_b88k --method "lora(rank=16)" --steps 2000

The loss is the model's own: symmetric cross-entropy for CLIP, sigmoid for SigLIP. Where the method merges, the adapted
model is written for open_clip and for transformers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

import vismodal as vm
from vismodal import clip_export, runs
from vismodal.callbacks import Progress
from vismodal.contrastive.batches import loss_of, read_parts
from vismodal.contrastive.loss import Loss, Temperature, Trained
from vismodal.contrastive.retention import Judge
from vismodal.data.folder import Folder, read_folder
from vismodal.data.pairs import Long
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
        retain: folder of pictures by class, as `vismodal clip` reads it, whose zero-shot accuracy should stay; it is
            measured on the test part, or else on val.
        templates: what the names of those classes are put into.
        model: the embedded CLIP unless given: a folder, OWNER/NAME of transformers on the Hub, or of open_clip
            hf-hub:OWNER/NAME or ARCH/TAG such as ViT-B-32/laion2b_s34b_b79k.
        library: whose model it is to be, where there is a choice.
        method: any method that goes on both towers or one, with its options: "lora(rank=16)", "dora",
            "tune(sites=('norm','bias'))".
        loss: infonce (CLIP's), sigmoid (SigLIP's), or auto: what the model was made for.
        learn_scale: train the temperature too (and SigLIP's bias); 1 / temperature never goes beyond 100, or beyond the
            model's own where that is more.
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
    train, val = read_parts(known(config.pairs), config.val, config.held_out, config.seed, config.long, model)
    check_batch(config.batch, len(train.pairs), accelerator.num_processes)
    judge = Judge(model, val, retained(config), config.templates)
    adapter = vm.adapt(
        model.model, written(config.method, ()).make(), name="clip", seed=seed_of(config.seed, "adapter")
    )
    trained = Trained(adapter, Temperature(model.model, config.learn_scale).to(accelerator.device))
    loss = loss_of(
        model, train, trained.temperature, config.loss, batch=config.batch, part=config.part, augment=config.augment
    )
    config = replace(config, output=runs.claim(config.output, "clip-pairs", config.resume, accelerator))
    output = known(config.output)
    same = runs.identity(config, FREE, pairs=train.digest, **runs.bases(adapter))
    checkpoints = Checkpoints(output / "checkpoints", same, config.save_every)
    checkpoints.check(config.steps)
    if accelerator.is_main_process:
        runs.save_config(config, output)
    accelerator.print(
        f"training {adapter.num_parameters:,} parameters on {train.told}; {val.told} for retrieval; into {output}"
    )
    model.model.train()
    stopped = train_with(loss, trained, config, checkpoints, accelerator)
    model.model.eval()
    if stopped:
        return Result(output, [], stopped=True)
    sweep = judge.sweep(adapter, config.alphas) if accelerator.is_main_process else []
    if accelerator.is_main_process:
        write_results(config, model, trained, sweep, {"train": train.told, "val": val.told})
    accelerator.wait_for_everyone()
    return Result(output, sweep)


def train_with(
    loss: Callable[[Micro], Mapping[str, Tensor]],
    trained: Trained,
    config: Config,
    checkpoints: Checkpoints,
    accelerator: Accelerator,
) -> bool:
    """Trains to the end, unless somebody stops it: then it says how to go on, and gives True."""
    output = known(config.output)
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
    return outcome.stopped


def check_batch(batch: int, pictures: int, world: int) -> None:
    """Raises `InputError` for a batch that cannot be shared out, or that would hold a picture twice."""
    if batch % world:
        raise InputError(f"batch {batch} cannot be shared out evenly among {world} processes")
    if batch > pictures:
        raise InputError(
            f"batch is {batch}, and there are {pictures} pictures to train on; a picture may be in a batch once: write "
            "a smaller batch"
        )


def retained(config: Config) -> Folder | None:
    """The data whose zero-shot accuracy should stay."""
    if config.retain is None:
        return None
    folder = read_folder(config.retain.expanduser(), seed=config.seed)
    for note in folder.notes:
        print(f"note: {note}", file=sys.stderr)
    return folder


def write_results(
    config: Config, model: Pretrained, trained: Trained, sweep: Sequence[dict[str, float]], data: dict[str, str]
) -> None:
    """The adapter, the merged model for both libraries, and what people look at; then says where they are."""
    output, adapter = known(config.output), trained.adapter
    header = {name: str(value.item()) for name, value in trained.temperature.named_parameters()}
    vm.save(adapter, output / "adapter.safetensors", {"temperature": json.dumps(header)})
    exported = clip_export.write_adapted(model, adapter, output, trained.temperature.write)
    write_file(output / "results.json", json.dumps({"data": data, "sweep": sweep, "exports": exported}, indent=1))
    clip_report.retention_plot(sweep, output / "retention.png")
    report.loss_plot(output / "metrics.jsonl", output / "loss.png")
    told = "\n".join(f"- {line}" for line in exported)
    clip_report.pairs_card(output, sweep, asdict(config), adapter.num_parameters, data, told)
    print(clip_report.pairs_table(sweep))
    print("\n".join(exported).replace("PATH/", f"{output.resolve()}/"))
    print(f"results: {output / 'README.md'}")


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["clip", "pairs", *sys.argv[1:]]))
