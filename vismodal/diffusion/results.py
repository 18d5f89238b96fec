"""What a run of DreamBooth leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest

import vismodal as vm
from vismodal import runs
from vismodal.diffusion.exports import export
from vismodal.diffusion.generate import Samples
from vismodal.diffusion.kinds import Pipe
from vismodal.diffusion.processes import ZERO_SNR
from vismodal.diffusion.recipe import PHOTO, Recipe
from vismodal.diffusion.subjects import Shown, subjects_of
from vismodal.diffusion.words import words_of
from vismodal.reports import run as report
from vismodal.runs import known


def write_results(config: Recipe, pipe: Pipe, sample: Samples, adapter: vm.Adapter, subjects: Sequence[Shown]) -> None:
    """The adapter in our format and in others', and what people look at; then says what to do next."""
    output, steps, known_by = known(config.output), known(config.steps), subjects_of(config)
    told = {"prompt": known_by[0].prompt, "subject": ", ".join(each.subject for each in known_by)}
    sampling = {ZERO_SNR: "true"} if config.zero_snr else {}
    vm.save(adapter, output / "adapter.safetensors", told | sampling)
    others = export(pipe, adapter, output, told | sampling)
    photos = [photo for turn in zip_longest(*(shown.photos for shown in subjects)) for photo in turn if photo]
    real = [report.square(photo.image, known(config.resolution)) for photo in photos[: config.sample_count]]
    report.write_sheet(output, real, sample(0), sample(steps), f"after {steps} steps")
    report.loss_plot(output / "metrics.jsonl", output / "loss.png")
    using = report.Using(
        methods=tuple(dict.fromkeys(type(method).__name__ for method in adapter.methods.values())),
        parameters=adapter.num_parameters,
        parts=tuple(adapter.models),
        words=bool(words_of(adapter)),
        loading=others.loading,
        halves=not adapter.fixed,
    )
    report.dreambooth_card(output, {**asdict(config), **told}, using)
    print(f"before and after: {output / 'sheet.png'}")
    print(f"adapter: {', '.join((str(output / 'adapter.safetensors'), *others.notes))}")
    photos_of = f'--photos {config.photos or "FOLDER"} --prompt "{PHOTO if config.photos is None else config.prompt}"'
    more = f"{runs.resume_command('dreambooth', output)} --steps {2 * steps}"
    print(f"next: {more if config.model else f'vismodal dreambooth {photos_of} --model OWNER/STABLE-DIFFUSION'}")
