"""DreamBooth (Ruiz et al. 2023, arXiv 2208.12242): teach a model a subject from a few photos, by LoRA or what you like.

    vismodal dreambooth                                    # the embedded model and subject, 76 s on 2 cores
    vismodal dreambooth --photos my_dog --prompt "a photo of sks dog" --model OWNER/STABLE-DIFFUSION
    vismodal dreambooth --config runs/dreambooth-1/config.yaml --resume
    vismodal dreambooth --method "oft(block_size=4)"
    vismodal dreambooth --method none --tokens sks:2            # textual inversion
    vismodal dreambooth --tokens sks --token_init robot --token_steps 300                    # pivotal tuning
    vismodal dreambooth --method crossattention --tokens sks --prior 1 --model OWNER/NAME    # Custom Diffusion

The same from Python: `main(Config(photos=Path("my_dog"), prompt="a photo of sks dog", model="..."))`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vismodal import runs
from vismodal.callbacks import Every, watchers
from vismodal.diffusion.adapting import adapt
from vismodal.diffusion.checks import check_read, checked, fitted
from vismodal.diffusion.encode import warn_of_long
from vismodal.diffusion.generate import Samples, generate
from vismodal.diffusion.load import load_pipeline, prepare
from vismodal.diffusion.objective import loss_of, patience_of
from vismodal.diffusion.recipe import FREE, Recipe
from vismodal.diffusion.results import write_results
from vismodal.diffusion.subjects import classes_of, content_of, read_subjects
from vismodal.ema import Ema, wearing
from vismodal.optimizers import optimizer_for
from vismodal.paths import asset
from vismodal.resume import Checkpoints
from vismodal.runs import known
from vismodal.train import Plan, fit


@dataclass(frozen=True)
class Config(Recipe):
    """Teach Stable Diffusion 1, 2, XL or 3, Flux or PixArt a subject, or several, from a few photos (DreamBooth)."""


@dataclass(frozen=True)
class Result:
    """Where the results lie, how many steps the adapter has seen, and whether the run was stopped before its end."""

    output: Path
    step: int
    stopped: bool = False


def main(config: Config) -> Result:
    """Trains and writes the results into a folder. Raises `InputError` for input that cannot be used."""
    config = checked(config)
    with runs.cpu_threads(known(config.threads)):
        return run(config)


def run(config: Config) -> Result:
    """`main` for settings that are filled in."""
    plan = Plan(known(config.steps), config.accumulate, config.seed, known(config.schedule), config.warmup, config.clip)
    accelerator = runs.start_accelerator(config.mixed_precision, config.track)
    pipe = load_pipeline(config.model or asset("tiny-sd"), config.mixed_precision, accelerator.device)
    prepare(pipe, config.zero_snr, config.base == "int8")
    config = fitted(config, pipe)
    subjects = read_subjects(config)  # at the model's resolution: a resume reads them alike
    check_read(config, subjects)
    adapter = adapt(config, pipe)
    optimizer = optimizer_for(config.optimizer, adapter.groups(known(config.learning_rate), config.weight_decay))
    warn_of_long(pipe, [*(prompt for shown in subjects for prompt in shown.prompts), *config.sample_prompts])
    config = replace(config, output=runs.claim(config.output, "dreambooth", config.resume, accelerator))
    output = known(config.output)  # until here nothing was written: bad input leaves no trace

    size, guidance = known(config.resolution), known(config.guidance)
    draw = partial(generate, pipe, size=size, steps=known(config.sample_steps), guidance=guidance)
    sample = Samples(draw, output / "samples", config.sample_prompts, config.sample_count, config.seed)
    with accelerator.main_process_first(), adapter.disabled():  # the others find what the first process makes
        if accelerator.is_main_process and not config.resume:
            runs.save_config(config, output)
        classes = classes_of(config, subjects, draw)
        sample(0)
    same = runs.identity(config, FREE, **content_of(config, subjects, classes), **runs.bases(adapter))
    checkpoints = Checkpoints(output / "checkpoints", same, config.save_every, config.keep)
    checkpoints.check(plan.steps)
    if accelerator.is_main_process:
        runs.save_config(config, output)
    accelerator.print(f"training {adapter.num_parameters:,} parameters on {len(adapter.modules)} sites, into {output}")
    ema = Ema(adapter, config.ema) if config.ema else None
    drawing = Every(config.sample_every, wearing(ema, sample), output / "sample-now")
    outcome = fit(
        loss_of(config, pipe, adapter, subjects, classes),
        adapter,
        optimizer,
        plan=plan,
        accelerator=accelerator,
        checkpoints=checkpoints,
        log=output / "metrics.jsonl",
        callbacks=watchers(accelerator, config.track, "dreambooth", same, drawing),
        ema=ema,
        patience=patience_of(config, adapter, subjects),
    )
    if outcome.stopped:
        again = runs.resume_command("dreambooth", output)
        accelerator.print(f"stopped after step {outcome.step} of {plan.steps}; go on with: {again}")
    elif accelerator.is_main_process:
        wearing(ema, write_results)(config, pipe, sample, adapter, subjects)
    return Result(output, outcome.step, outcome.stopped)


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["dreambooth", *sys.argv[1:]]))
