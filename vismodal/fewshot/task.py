"""A few-shot task: data, model, and the names and prompts of the classes; what is measured on it and how."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vismodal.adapter import Adapter
from vismodal.attach import adapt
from vismodal.clip import CLIPClassifier, Templates
from vismodal.data.folder import Folder, few
from vismodal.errors import InputError
from vismodal.fewshot.data import Inputs, Part
from vismodal.fewshot.recipes import Contestant, contestant, halves, harmonic, linear_probe, load_adapter, shallow
from vismodal.files import write_tensors
from vismodal.fingerprint import fingerprint
from vismodal.pretrained import Pretrained
from vismodal.runs import known


class Task:
    """What all methods of a run have in common.

    Args:
        folder: the data.
        model: frozen, on its device.
        templates: as `CLIPClassifier` takes them; a mapping goes by the folders' names.
        base_to_new: only the first half of the classes is trained; the others are measured apart.

    Raises `InputError` for classes that are alike, parts without a picture, and prompts that are too long.
    """

    def __init__(self, folder: Folder, model: Pretrained, templates: Templates, base_to_new: bool = False):
        self.folder, self.model = folder, model
        if isinstance(templates, Mapping):
            templates = {_words(key): list(each) for key, each in templates.items()}
        self.templates = templates
        everything = list(range(len(folder.classes)))
        if alike := [n for n, times in Counter(map(_words, folder.classes)).items() if times > 1]:
            raise InputError(f"two folders are the class {alike[0]!r}: underscores are read as spaces; rename one")
        self.labels, self.new = halves(folder.classes) if base_to_new else (everything, [])
        self.classifier(everything)  # names and templates that make no sense are told before anything is written
        self.val, self.test = (self._part(name, self.labels) for name in ("val", "test"))
        self.unseen = self._part("test", self.new) if self.new else None
        self._drawn: dict[tuple[int, int], Part] = {}

    @cached_property
    def identity(self) -> dict[str, str]:
        """Data and model, whatever their places or names."""
        base = fingerprint(self.model.model)
        return {"data": self.folder.digest, "the model": f"{base.shapes} {base.values}"}

    def _part(self, name: str, labels: Sequence[int]) -> Part:
        part = Part(getattr(self.folder, name), labels, self.model)
        if not len(part.labels):
            these = ", ".join(map(repr, self.classes(labels)[:5]))
            raise InputError(f"the {name} part of {self.folder.root} has no picture of the classes {these}; add some")
        return part

    def classes(self, labels: Sequence[int]) -> list[str]:
        """Names of the folders."""
        return [self.folder.classes[i] for i in labels]

    def classifier(self, labels: Sequence[int]) -> CLIPClassifier:
        """Zero-shot, with underscores in the names read as spaces."""
        names = [_words(name) for name in self.classes(labels)]
        return CLIPClassifier(self.model.model, self.model.tokenizer, names, self.templates)

    def entries(self, texts: Sequence[str], lr: float | None = None) -> list[Contestant]:
        """The methods. Raises `InputError` for one that does not fit the model or the task, before any is trained."""
        depth = shallow(self.model.model)
        entries = [contestant(text, self.model.library, depth, self.model.embedded, lr) for text in texts]
        if twice := [slug for slug, times in Counter(e.slug for e in entries).items() if times > 1]:
            same = " and ".join(entry.label for entry in entries if entry.slug == twice[0])
            raise InputError(f"compare names a method twice: {same}")
        for entry in entries:
            if self.new and entry.tied:
                raise InputError(f"{entry.label} knows no classes but those it was trained on; leave out base_to_new")
            if entry.method:
                adapt(self.classifier(self.labels), entry.method, name="trial").detach()
        return entries

    def shots(self, count: int, seed: int) -> Part:
        """The training pictures that a seed draws, the same for all methods; all of them where `count` is 0."""
        key = count, seed if count else 0
        if key not in self._drawn:
            items, notes = few(self.folder, count, seed) if count else (self.folder.train, [])
            others = tuple(f"class {name!r} has" for name in self.classes(self.new))
            for note in notes:
                if not note.startswith(others):
                    print(f"note: {note}", file=sys.stderr)
            self._drawn[key] = Part(items, self.labels, self.model)
        return self._drawn[key]

    # -- measuring --

    def scores(self, test: float, file: Path | None = None) -> dict[str, float]:
        """The accuracy on test data, with that on the new classes where these are apart: of the adapter in `file`, on a
        classifier of their own, while none is attached to the model."""
        if not self.unseen:
            return {"test": test}
        others = self.classifier(self.new)
        adapter = load_adapter(others, file, self.classes(self.new))[0] if file else None
        new = self.unseen.accuracy(others)
        if adapter:
            adapter.detach()
        return {"base": test, "new": new, "H": harmonic(test, new)}

    def probe(self, clf: CLIPClassifier, train: Part, file: Path | None) -> dict[str, Any]:
        """Logistic regression on the normalised features, whose strength validation data decides."""

        def features(part: Part) -> Tensor:
            return F.normalize(known(part.inputs(clf).features)[:, 0].float(), dim=-1)

        found = linear_probe((features(train), train.labels), (features(self.val), self.val.labels), len(clf.classes))
        tensors = {"weight": found.weight.float(), "bias": found.bias.float()}
        if file:
            write_tensors(file, tensors, {"classes": json.dumps(self.classes(self.labels), ensure_ascii=False)})
        return {
            "test": found.right(features(self.test), self.test.labels),
            "validation": found.accuracy,
            "strength": found.strength,
            "parameters": sum(t.numel() for t in tensors.values()),
            "text features": "not used",
            "image features": "once",
        }

    def header(self, clf: CLIPClassifier, adapter: Adapter) -> dict[str, str]:
        """What an adapter's file says beside its tensors: classes, prompts by name, the scale that was chosen."""
        facts = {"classes": self.classes(self.labels), "prompts": dict(zip(clf.classes, clf.text.prompts, strict=True))}
        plain = {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}
        return plain | {"scale": str(adapter.scale)}


def caches(clf: CLIPClassifier, inputs: Inputs | None = None) -> dict[str, str]:
    """Which features are computed once, and which at every step since the method acts on them."""
    images = "once" if clf.keeps_images else "at every step"
    if inputs is not None and inputs.prefix is not None:
        images = f"{100 * inputs.prefix.share:.0f}% once"
    return {"text features": "once" if clf.keeps_text else "at every step", "image features": images}


def _words(name: str) -> str:
    """A folder's name as prompts have it."""
    return name.replace("_", " ")
