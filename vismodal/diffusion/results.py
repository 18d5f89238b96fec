"""What a run of DreamBooth leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import vismodal as vm
from vismodal import runs
from vismodal.data.photos import Photo
from vismodal.diffusion.generate import Samples
from vismodal.diffusion.kinds import Pipe, kind_of
from vismodal.diffusion.processes import ZERO_SNR
from vismodal.diffusion.recipe import PHOTO, Recipe
from vismodal.files import write_tensors
from vismodal.formats import peft
from vismodal.reports import run as report
from vismodal.runs import known


def write_results(config: Recipe, pipe: Pipe, sample: Samples, adapter: vm.Adapter, photos: Sequence[Photo]) -> None:
    """The adapter in our format and in diffusers', and what people look at; then says what to do next."""
    output, steps = known(config.output), known(config.steps)
    said = {"prompt": known(config.prompt), "subject": config.subject} | ({ZERO_SNR: "true"} if config.zero_snr else {})
    vm.save(adapter, output / "adapter.safetensors", said)
    readable, parts = kind_of(pipe).lora_files, list(adapter.models)
    if readable:
        tensors, header = peft.to_peft(adapter.state_dict(), peft.scaling_of(adapter.modules))
        write_tensors(output / peft.FILE, tensors, header)
    real = [report.square(photo.image, known(config.resolution)) for photo in photos[: config.sample_count]]
    report.write_sheet(output, real, sample(0), sample(steps), f"after {steps} steps")
    report.loss_plot(output / "metrics.jsonl", output / "loss.png")
    report.dreambooth_card(output, asdict(config), adapter.num_parameters, parts, readable)
    print(f"before and after: {output / 'sheet.png'}")
    other = f"and for pipe.load_lora_weights {output / peft.FILE}"
    nobody = f"a {type(pipe).__name__} has no load_lora_weights"
    print(f"adapter: {output / 'adapter.safetensors'}, {other if readable else nobody}")
    photos_of = f'--photos {config.photos or "FOLDER"} --prompt "{PHOTO if config.photos is None else config.prompt}"'
    more = f"{runs.resume_command('dreambooth', output)} --steps {2 * steps}"
    print(f"next: {more if config.model else f'vismodal dreambooth {photos_of} --model OWNER/STABLE-DIFFUSION'}")
