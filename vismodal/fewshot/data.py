"""Few-shot data as a classifier takes it: the pictures of some classes, or their features, computed once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from vismodal.clip import CLIPClassifier, Images
from vismodal.data.folder import Item
from vismodal.data.pictures import Pictures
from vismodal.draw import generator
from vismodal.errors import InputError
from vismodal.ports import acting
from vismodal.prefix.frozen import FrozenPrefix
from vismodal.pretrained import Pretrained

AT_ONCE = 64  # pictures that are encoded together
TEXTS = 1024  # prompts of one forward, where every picture has class features of its own


@dataclass(frozen=True)
class Copies:
    """Augmented copies of each picture, drawn by seed and picture; `count` 0 is the plain picture alone."""

    count: int = 0
    size: int = 0
    seed: int = 0

    def at(self, position: int) -> int:
        """Which copy stands at a position of the endless reading."""
        return int(torch.randint(max(1, self.count), (), generator=generator(self.seed, "copy", position)))


PLAIN = Copies()


class Inputs:
    """What goes into a classifier: pictures, or features of theirs as far as these are computed once.

    Features of whole pictures are enough where nothing acts within the image tower: for prompts in texts, CLIP-Adapter
    and Tip-Adapter. For what acts in its last blocks `fill` keeps what comes before these.
    """

    def __init__(self, pictures: Pictures, clf: CLIPClassifier, copies: Copies = PLAIN):
        self.pictures, self.copies = pictures, copies
        self.device = next(clf.model.parameters()).device
        self.features = self._encode(clf) if clf.keeps_images else None  # n V D
        self.prefix: FrozenPrefix | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, items: Sequence[int], copies: Sequence[int] | None = None) -> Tensor:
        """b 3 h w, or b D; of each item the copy given, by default the first."""
        copies = [0] * len(items) if copies is None else copies
        if self.features is not None:
            return self.features[torch.tensor(items), torch.tensor(copies)]
        if self.prefix is not None:
            return self._from_prefix(self.prefix, items, copies)
        return self._pixels(items, copies)

    def passes(self, labels: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
        """All pictures in order with their labels, in batches; once for each copy."""
        return [
            [(self.batch(items, [copy] * len(items)), labels[items]) for items in parts(len(self), AT_ONCE)]
            for copy in range(max(1, self.copies.count))
        ]

    def fill(
        self, clf: CLIPClassifier, reads: int, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        """Computes the part of the image tower that nothing acts on, of all pictures in order: rows then do not depend
        on the batches that training draws, nor on where it was stopped.

        Left alone: what acts on the whole classifier or on its image step, which may read the pictures (PromptSRC), and
        training that `reads` fewer pictures in all than two of each.
        """
        if self.features is not None or acting([clf, clf.image]) or reads < 2 * len(self) * max(1, self.copies.count):
            return
        plain = Images(clf.model)
        self.prefix = prefix = FrozenPrefix(clf.model, call=plain)
        try:
            with autocast(), torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                for items, copy in self._rounds():
                    self._from_prefix(prefix, items, [copy] * len(items))
                    if not prefix.share:
                        break
        except InputError as error:
            print(f"note: pictures are encoded whole at every step: {error}", file=sys.stderr)
        if not prefix.share:
            self.prefix = None

    def _from_prefix(self, prefix: FrozenPrefix, items: Sequence[int], copies: Sequence[int]) -> Tensor:
        """Features as the model stands, with their gradients; pictures are read where nothing is kept of them."""
        keys: list[Hashable] = list(zip(items, copies, strict=True))
        return cast(Tensor, prefix(lambda missing: self._pixels(*zip(*cast(Any, missing), strict=True)), keys))

    def _rounds(self) -> list[tuple[list[int], int]]:
        """All pictures in order, copy by copy."""
        return [(items, copy) for copy in range(max(1, self.copies.count)) for items in parts(len(self), AT_ONCE)]

    def _encode(self, clf: CLIPClassifier) -> Tensor:
        plain, rows = Images(clf.model), []  # not the classifier's own step, on which an adapter may stand
        was = clf.training
        clf.eval()
        with torch.inference_mode(False), torch.no_grad():
            for copy in range(max(1, self.copies.count)):
                each = [plain(self._pixels(items, [copy] * len(items))) for items in parts(len(self), AT_ONCE)]
                rows.append(torch.cat(each))
        clf.train(was)
        return torch.stack(rows, 1)

    def _pixels(self, items: Sequence[int], copies: Sequence[int]) -> Tensor:
        if not self.copies.count:
            return self.pictures.batch(items).to(self.device)
        keys = [(self.copies.seed, "augment", i, copy) for i, copy in zip(items, copies, strict=True)]
        return self.pictures.augmented(items, keys, self.copies.size).to(self.device)


class Part:
    """A part of the data for some of the classes: pictures, and their labels among these, n.

    Args:
        items: labelled files.
        labels: of the classes that are taken, in the order of the classifier's names.
        model: whose preprocessing it is.
    """

    def __init__(self, items: Sequence[Item], labels: Sequence[int], model: Pretrained):
        kept = [item for item in items if item.label in labels]
        self.pictures = Pictures([item.path for item in kept], model.preprocess)
        self.labels = torch.tensor([labels.index(item.label) for item in kept])
        self._base: dict[Copies, Inputs] = {}

    def inputs(self, clf: CLIPClassifier, copies: Copies = PLAIN) -> Inputs:
        """Features of the untouched image tower are computed once for all methods."""
        if not clf.keeps_images:
            return Inputs(self.pictures, clf, copies)
        if copies not in self._base:
            self._base[copies] = Inputs(self.pictures, clf, copies)
        return self._base[copies]

    def accuracy(self, clf: CLIPClassifier) -> float:
        """Share of right answers, in eval mode."""
        inputs, was, right = self.inputs(clf), clf.training, 0
        clf.eval()
        with torch.no_grad():
            size = AT_ONCE if clf.keeps_text else max(1, TEXTS // len(clf.classes))
            for items in parts(len(inputs), size):
                right += int((clf(inputs.batch(items)).argmax(-1).cpu() == self.labels[items]).sum())
        clf.train(was)
        return right / len(inputs)


def parts(n: int, size: int) -> list[list[int]]:
    """The numbers up to n in runs of `size`."""
    return [list(range(i, min(n, i + size))) for i in range(0, n, size)]
