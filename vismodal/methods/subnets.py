"""The subnets of a supernet as tuples of sizes: drawing, mutating and crossing them. Pure functions of a generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

Sizes = tuple[int, ...]  # of a subnet: those of all blocks for the first part, then those for the second, and so on


@dataclass(frozen=True)
class Part:
    """One kind of module: the sizes to choose from, and for how many of its first blocks. Blocks behind have size 0."""

    blocks: int
    sizes: Sizes
    depths: Sizes

    def draw(self, random: Random) -> Sizes:
        depth = random.choice(self.depths)
        return self._filled([random.choice(self.sizes) for _ in range(depth)])

    def smallest(self) -> Sizes:
        return self._filled([min(self.sizes)] * min(self.depths))

    def mutate(self, sizes: Sizes, random: Random, rate: float, deepen: float) -> Sizes:
        """Each size drawn again with probability `rate`, the depth with `deepen`."""
        depth = random.choice(self.depths) if random.random() < deepen else self.depth(sizes)
        kept = [s if s and random.random() >= rate else random.choice(self.sizes) for s in sizes[:depth]]
        return self._filled(kept)

    def smaller(self, sizes: Sizes, random: Random) -> Sizes | None:
        """One size a step down, or the last blocks without any; None for the smallest."""
        above = [i for i, s in enumerate(sizes) if s > min(self.sizes)]
        if above:
            i = random.choice(above)
            return (*sizes[:i], max(s for s in self.sizes if s < sizes[i]), *sizes[i + 1 :])
        depths = [d for d in self.depths if d < self.depth(sizes)]
        return self._filled(list(sizes[: max(depths)])) if depths else None

    def depth(self, sizes: Sizes) -> int:
        return sum(map(bool, sizes))

    def _filled(self, sizes: Sequence[int]) -> Sizes:
        return (*sizes, *[0] * (self.blocks - len(sizes)))


@dataclass(frozen=True)
class Space:
    """All subnets."""

    parts: tuple[Part, ...]

    def split(self, subnet: Sizes) -> list[Sizes]:
        """By part."""
        ends = [sum(p.blocks for p in self.parts[: i + 1]) for i in range(len(self.parts))]
        return [subnet[end - p.blocks : end] for p, end in zip(self.parts, ends, strict=True)]

    def draw(self, random: Random) -> Sizes:
        return sum((p.draw(random) for p in self.parts), ())

    def smallest(self) -> Sizes:
        return sum((p.smallest() for p in self.parts), ())

    def mutate(self, subnet: Sizes, random: Random, rate: float, deepen: float) -> Sizes:
        """Each part with probability `rate`."""
        pairs = zip(self.parts, self.split(subnet), strict=True)
        return sum((p.mutate(s, random, rate, deepen) if random.random() < rate else s for p, s in pairs), ())

    def cross(self, one: Sizes, other: Sizes, random: Random) -> Sizes:
        """Each part from either."""
        return sum(map(random.choice, zip(self.split(one), self.split(other), strict=True)), ())

    def smaller(self, subnet: Sizes, random: Random) -> Sizes | None:
        """A step down in one part; None for the smallest."""
        split = self.split(subnet)
        for i in random.sample(range(len(split)), len(split)):
            down = self.parts[i].smaller(split[i], random)
            if down is not None:
                return sum((*split[:i], down, *split[i + 1 :]), ())
        return None
