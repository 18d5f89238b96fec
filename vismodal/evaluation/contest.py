"""A contestant of `vismodal bench emoji` on the pipeline: attached, with its new word where it has one, and trained."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator

import vismodal as vm
from vismodal.callbacks import Progress
from vismodal.diffusion.adapting import within
from vismodal.diffusion.denoise import Prompts, Weights, denoising
from vismodal.diffusion.encode import native_size
from vismodal.diffusion.kinds import Pipe
from vismodal.diffusion.pictures import Pictures
from vismodal.diffusion.words import teach
from vismodal.draw import seed_of
from vismodal.entries import Entry, Member
from vismodal.evaluation.emoji_tasks import Task
from vismodal.train import Plan, fit


@dataclass(frozen=True)
class Lesson:
    """What a contestant learns and how long, the rows of a batch, and the weight of what is usual; 0 leaves it out."""

    task: Task
    plan: Plan
    batch: int
    prior: float


def worded(pipe: Pipe, each: Entry, word: str, begin: str) -> Entry:
    """The contestant with each method where it belongs and, of textual inversion, with the bench's `word`.

    Its vectors begin as the tokens of `begin`, cut or repeated to as many as there are, unless the entry has `starts`.
    """

    def fitted(member: Member) -> Member:
        method = member.method
        if isinstance(method, vm.TextualInversion):
            ids = pipe.tokenizer(begin, add_special_tokens=False).input_ids
            starts = tuple(ids[i % len(ids)] for i in range(sum(method.vectors)))
            method = replace(method, words=(word,), starts=method.starts or starts)
        if method.where == "*" and member.parts != each.parts:  # its sites' kinds may be in other parts too
            found = [within(part, getattr(pipe, part), method.sites) for part in member.parts]
            method = replace(method, where=tuple(g for w in found for g in ((w,) if isinstance(w, str) else w)))
        return replace(member, method=method)

    return replace(each, members=tuple(map(fitted, each.members)))


def adapt(pipe: Pipe, each: Entry, seed: int) -> vm.Adapter:
    """The contestant on its parts of the pipeline, whose prompts may hold its word then."""
    pipe.unet.requires_grad_(False)  # where it is not adapted, gradients go through it all the same
    adapter = vm.adapt(each.models(pipe), each.methods, "bench", seed=seed_of(seed, "adapter"))
    teach(pipe, adapter)
    return adapter


def learn(pipe: Pipe, each: Entry, adapter: vm.Adapter, lesson: Lesson, accelerator: Accelerator) -> float:
    """Trains; the seconds that it took. Raises KeyboardInterrupt if somebody stopped it."""
    task, prior = lesson.task, lesson.prior
    pictures = partial(Pictures, pipe, size=native_size(pipe))
    sets = [pictures("learnt", task.learnt.images, task.learnt.captions)]
    if task.usual and prior:
        sets.append(pictures("usual", task.usual.images, task.usual.captions))
    prompts = Prompts(pipe, cache="text_encoder" not in each.parts)
    loss = denoising(pipe, sets, prompts, lesson.batch // len(sets), Weights(prior=prior))
    optimizer = torch.optim.AdamW(adapter.groups(each.rates))
    for model in adapter.models.values():
        model.train()  # dropout, where the method has any
    start = time.perf_counter()
    outcome = fit(loss, adapter, optimizer, plan=lesson.plan, accelerator=accelerator, callbacks=[Progress()])
    for model in adapter.models.values():
        model.eval()
    if outcome.stopped:
        raise KeyboardInterrupt
    return time.perf_counter() - start
