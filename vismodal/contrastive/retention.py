"""What fine-tuning taught and what it cost: retrieval on held-out pairs, zero-shot accuracy on other data, and both at
every place between the base and the adapted model (Wortsman et al. 2022, arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vismodal.adapter import Adapter
from vismodal.clip import CLIPClassifier, Images, encode_texts
from vismodal.contrastive.retrieval import recall
from vismodal.data.folder import Folder
from vismodal.data.pairs import Pairs
from vismodal.data.pictures import Pictures
from vismodal.fewshot.data import AT_ONCE, Part, parts
from vismodal.pretrained import Pretrained


class Judge:
    """Measures a model as it stands.

    Args:
        model: the one that is trained.
        val: pairs that training does not see.
        other: labelled pictures of another kind, whose test part (or else val) is classified by class names; or None.
        templates: of these names.
    """

    def __init__(self, model: Pretrained, val: Pairs, other: Folder | None, templates: Sequence[str]):
        self.model, self.templates = model, templates
        self.pictures = Pictures([pair.path for pair in val.pairs], model.preprocess)
        self.ids, self.image_of = model.tokenize(val.texts), torch.tensor(val.image_of)
        self.other: Part | None = None
        if other:
            self.names = [name.replace("_", " ") for name in other.classes]
            self.other = Part(other.test or other.val, range(len(self.names)), model)
            self.classifier()  # templates that make no sense are told before training

    def classifier(self) -> CLIPClassifier:
        return CLIPClassifier(self.model.model, self.model.tokenizer, self.names, self.templates)

    def __call__(self) -> dict[str, float]:
        """R@1, 5 and 10 both ways, and "zero-shot" where other data is given."""
        found = recall(*self.features(), self.image_of)
        return found | ({"zero-shot": self.other.accuracy(self.classifier())} if self.other else {})

    @torch.no_grad()
    def features(self) -> tuple[Tensor, Tensor]:
        """Normalised, of all pictures and all texts."""
        model, device = self.model.model, next(self.model.model.parameters()).device
        images = [Images(model)(self.pictures.batch(p).to(device)) for p in parts(len(self.pictures), AT_ONCE)]
        texts = [encode_texts(model, rows) for rows in self.ids.split(AT_ONCE)]
        f, t = (F.normalize(torch.cat(each).float(), dim=-1).cpu() for each in (images, texts))
        return f, t

    def sweep(self, adapter: Adapter, alphas: Sequence[float]) -> list[dict[str, float]]:
        """All of it at each alpha, among which are 0 and 1; at these alone where a method does not interpolate."""
        between = all(method.interpolates for method in adapter.methods.values())
        rows = []
        for alpha in sorted({0.0, 1.0, *(alphas if between else ())}):
            adapter.scale = alpha
            rows.append({"alpha": alpha, **self()})
        adapter.scale = 1.0
        return rows
