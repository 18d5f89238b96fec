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
from dataclasses import dataclass, field, replace
from random import Random

import torch
from torch import nn
from tqdm import tqdm

from vismodal.adapter import Adapter
from vismodal.errors import InputError
from vismodal.methods import NOAH
from vismodal.methods.subnets import Sizes

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
    for name, value in (("generations", generations), ("population", population), ("parents", parents)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    method, modules = _supernet(adapter)
    search = _Search(method, modules, budget, parents, rate, deepen, Random(f"{seed} evolve"))
    search.check()
    top = method.chosen(modules)  # which acts again where nothing was scored
    quiet = 0.1 if sys.stderr.isatty() else 15.0
    try:
        with torch.no_grad(), tqdm(total=generations * population, desc="searching", mininterval=quiet) as bar:
            for generation in range(generations):
                for subnet in search.generation(population, mutations, crossings):
                    method.choose(modules, subnet)
                    search.scores[subnet] = float(score())
                    bar.update()
                bar.set_postfix(best=f"{max(search.scores.values()):.4f}")
                bar.update((generation + 1) * population - bar.n)  # fewer where hardly any are left to try
    finally:
        top = next(iter(search.best()), top)
        method.choose(modules, top)
    return Found(replace(method, subnet=top), search.scores[top], method.count(modules, top), search.scores)


@dataclass
class _Search:
    """What was scored, and where the next subnets come from."""

    method: NOAH
    modules: Sequence[nn.Module]
    budget: int
    parents: int
    rate: float
    deepen: float
    random: Random
    scores: dict[Sizes, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.space = self.method.space(self.modules)

    def check(self) -> None:
        if any(m.training for m in self.modules):
            raise InputError("the model is in train mode, where subnets are drawn; call model.eval() before the search")
        least = self.count(self.space.smallest())
        if least > self.budget:
            raise InputError(f"the smallest subnet has {least:,} parameters, above the budget of {self.budget:,}")

    def count(self, subnet: Sizes) -> int:
        return self.method.count(self.modules, subnet)

    def best(self) -> list[Sizes]:
        return sorted(self.scores, key=self.scores.__getitem__, reverse=True)[: self.parents]

    def mutated(self) -> Sizes:
        return self.space.mutate(self.random.choice(self.best()), self.random, self.rate, self.deepen)

    def crossed(self) -> Sizes:
        return self.space.cross(self.random.choice(self.best()), self.random.choice(self.best()), self.random)

    def drawn(self) -> Sizes:
        """A random subnet, made smaller until it is within the budget."""
        subnet = self.space.draw(self.random)
        while self.count(subnet) > self.budget:
            subnet = self.space.smaller(subnet, self.random) or self.space.smallest()
        return subnet

    def generation(self, population: int, mutations: int, crossings: int) -> Iterator[Sizes]:
        """New subnets, from each source until it has given enough or was asked ten times as often."""
        children = [(self.mutated, mutations), (self.crossed, crossings)] if self.scores else []
        given = 0
        for make, wanted in (*children, (self.drawn, population)):
            stop = min(given + wanted, population)
            for _ in range(TRIES * wanted):
                if given == stop:
                    break
                subnet = make()
                if subnet not in self.scores and self.count(subnet) <= self.budget:
                    given += 1
                    yield subnet


def _supernet(adapter: Adapter) -> tuple[NOAH, list[nn.Module]]:
    for slot, method in adapter.methods.items():
        if isinstance(method, NOAH) and not method.subnet:
            return method, [m for key, m in adapter.modules.items() if key.partition("/")[0] == slot]
    raise InputError(f"{adapter!r} has no supernet to search; make one with vm.adapt(model, vm.NOAH())")
