"""The search for the best subnet of a trained supernet (Zhang et al. 2022, arXiv 2206.04673, section 3.3).

    supernet = vm.adapt(model, vm.NOAH())                     # and train it
    found = vm.evolve(supernet, lambda: accuracy(model), budget=640_000)
    supernet.detach()
    best = vm.adapt(model, found.method)                      # and train that: the subnet, anew

An evolution: random subnets within the budget of parameters; of all that were scored the best become parents; their
mutations and crossings, and random ones where those are too few, are the next generation. The official code rejects
what is above the budget; random subnets are made smaller here until they are within it, since of those drawn from
large sizes hardly one would be. It draws sizes again only where a mutation adds blocks, here all sizes mutate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import nn
from tqdm import tqdm

from vismodal.adapter import Adapter
from vismodal.errors import InputError
from vismodal.methods import NOAH
from vismodal.methods.subnets import Sizes, Space

TRIES = 10  # to find a child that is new and within the budget, for each that is wanted


@dataclass(frozen=True)
class Found:
    """The best subnet: its score, its parameters, the method that trains it anew, and all that were scored."""

    method: NOAH
    score: float
    parameters: int
    scores: dict[Sizes, float]


def evolve(
    adapter: Adapter,
    score: Callable[[], float],
    budget: int,
    *,
    generations: int = 15,
    population: int = 50,
    parents: int = 10,
    mutations: int = 25,
    crossings: int = 25,
    rate: float = 0.2,
    deepen: float = 0.4,
    seed: int = 0,
) -> Found:
    """Search a trained supernet for the subnet of at most `budget` parameters with the highest score, which acts then.

    Args:
        adapter: with `NOAH` among its methods.
        score: of the model in eval mode, larger is better: its accuracy on validation data. Runs without gradients.
        budget: parameters of a subnet, heads and other methods not counted.
        generations: how many; the first one is random.
        population: subnets of a generation.
        parents: the best so far, from which children come.
        mutations: at most so many children of one parent in a generation.
        crossings: at most so many of two.
        rate: probability that a child's prompts, ranks or widths mutate, and then of each size to be drawn again.
        deepen: probability that a mutation draws the number of blocks again.
        seed: of all draws.

    Raises `InputError` where nothing is within the budget.
    """
    method, modules = _supernet(adapter)
    for name, value in (("generations", generations), ("population", population), ("parents", parents)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if any(m.training for m in modules):
        raise InputError("the model is in train mode, where subnets are drawn; call model.eval() before the search")
    random, space = Random(f"{seed} evolve"), method.space(modules)
    least = method.count(modules, space.smallest())
    if least > budget:
        raise InputError(f"the smallest subnet has {least:,} parameters, above the budget of {budget:,}")
    scores: dict[Sizes, float] = {}

    def best() -> list[Sizes]:
        return sorted(scores, key=scores.__getitem__, reverse=True)[:parents]

    def mutated() -> Sizes:
        return space.mutate(random.choice(best()), random, rate, deepen)

    def crossed() -> Sizes:
        return space.cross(random.choice(best()), random.choice(best()), random)

    def drawn() -> Sizes:
        return _within(method, modules, space, random, budget)

    def new(subnet: Sizes) -> bool:
        return subnet not in scores and method.count(modules, subnet) <= budget

    before = method.chosen(modules)
    quiet = 0.1 if sys.stderr.isatty() else 15.0
    try:
        with torch.no_grad(), tqdm(total=generations * population, desc="searching", mininterval=quiet) as bar:
            for generation in range(generations):
                children: list[Source] = [(mutated, mutations), (crossed, crossings)] if scores else []
                for subnet in _generation([*children, (drawn, population)], population, new):
                    method.choose(modules, subnet)
                    scores[subnet] = float(score())
                    bar.update()
                bar.set_postfix(best=f"{max(scores.values()):.4f}")
                bar.update((generation + 1) * population - bar.n)  # fewer where hardly any are left to try
    finally:
        top = max(scores, key=scores.__getitem__, default=before)
        method.choose(modules, top)
    return Found(replace(method, subnet=top), scores[top], method.count(modules, top), scores)


Source = tuple[Callable[[], Sizes], int]  # what makes subnets, and how many are wanted of it


def _generation(sources: Sequence[Source], population: int, new: Callable[[Sizes], bool]) -> Iterator[Sizes]:
    """New subnets, from each source until it has given enough or was asked ten times as often."""
    given = 0
    for make, wanted in sources:
        stop = min(given + wanted, population)
        for _ in range(TRIES * wanted):
            if given == stop:
                break
            subnet = make()
            if new(subnet):
                given += 1
                yield subnet


def _within(method: NOAH, modules: Sequence[nn.Module], space: Space, random: Random, budget: int) -> Sizes:
    """A random subnet, made smaller until it is within the budget."""
    subnet = space.draw(random)
    while method.count(modules, subnet) > budget:
        subnet = space.smaller(subnet, random) or space.smallest()
    return subnet


def _supernet(adapter: Adapter) -> tuple[NOAH, list[nn.Module]]:
    for slot, method in adapter.methods.items():
        if isinstance(method, NOAH) and not method.subnet:
            return method, [m for key, m in adapter.modules.items() if key.partition("/")[0] == slot]
    raise InputError(f"{adapter!r} has no supernet to search; make one with vm.adapt(model, vm.NOAH())")
