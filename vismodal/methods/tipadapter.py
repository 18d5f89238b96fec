"""Tip-Adapter and Tip-Adapter-F (Zhang et al. 2021, arXiv 2111.03930, equations 3 to 6).

    logits' = logits + alpha exp(-beta (1 - f Kᵀ)) V        f: b D, K: N D, V: N C, one-hot

K are the features of N labelled pictures, each the mean over augmented views (10 in the official code), which alone is
normalised; f are the normalised features of pictures. Nothing is trained; F trains K (AdamW at 1e-3 with eps 1e-4 for
20 epochs), whose rows are not normalised again then. alpha and beta are searched at the end, in the official grid of
20 x 200 values. The official scripts search on the test data for ImageNet; `search` is for validation data alone.

    tip = vm.adapt(clf, vm.TipAdapter())
    vm.TipAdapter.remember(tip, [train] * 10)       # ten passes over batches of pictures and labels, in one order
    vm.TipAdapter.search(tip, validation)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.clip import CLIPClassifier, Similarity, similarity
from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.site import Site

Batches = Iterable[tuple[Tensor, Tensor]]  # pictures and labels


class Adapted(Protocol):
    """What this file needs of an adapter."""

    @property
    def models(self) -> Mapping[str, nn.Module]: ...

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...


class Cache(SpanModule):
    """K with its labels, and what weighs it."""

    K: Tensor
    labels: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, site: Site, method: TipAdapter):
        super().__init__()
        head = cast(Similarity, site.modules["enter"])
        self.classes = head.classes
        labels = torch.arange(self.classes, device=site.device).repeat_interleave(method.shots)
        K = torch.zeros(len(labels), head.width, device=site.device, dtype=torch.float32)
        if method.train_keys:
            self.K = nn.Parameter(K)
        else:
            self.register_buffer("K", K)
        self.register_buffer("labels", labels)
        self.register_buffer("alpha", torch.tensor(method.alpha, device=site.device, dtype=torch.float32))
        self.register_buffer("beta", torch.tensor(method.beta, device=site.device, dtype=torch.float32))

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        if not len(self.labels):
            raise RuntimeError("TipAdapter remembers no pictures yet: vm.TipAdapter.remember(adapter, passes)")
        context["f"] = x
        return x

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        f = context["f"]
        return y + (self.alpha * self.votes(f @ self.K.to(f.dtype).T, self.beta)).to(y.dtype)

    def votes(self, affinity: Tensor, beta: Tensor) -> Tensor:
        """exp(-beta (1 - affinity)) V: b N -> b C."""
        V = F.one_hot(self.labels, self.classes)
        weights = torch.exp(beta * (affinity - 1))
        return weights @ V.to(weights.dtype)

    def hold(self, K: Tensor, labels: Tensor) -> None:
        """These rows from now on; an optimiser of K keeps it."""
        self.K.data, self.labels.data = K.to(self.K), labels.to(self.labels)


class Found(NamedTuple):
    """What a search chose, and its share of right answers on the validation data."""

    alpha: float
    beta: float
    accuracy: float


@dataclass(frozen=True, kw_only=True, repr=False)
class TipAdapter(Method):
    """Tip-Adapter, arXiv 2111.03930, on a CLIPClassifier.

    Args:
        train_keys: K is trained: Tip-Adapter-F.
        alpha: weight of the remembered pictures, until it is searched.
        beta: how sharply they are told apart, until it is searched.
        shots: makes room for as many pictures of each class at once; pictures that are remembered make their own.
    """

    sites: tuple[str, ...] = ("logits",)
    train_keys: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    shots: int = 0

    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "arXiv 2111.03930"
    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.span is not None and site.kind == "logits"

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(f"TipAdapter goes to ('logits',) of a CLIPClassifier, not to {site.key}")
        return Built(tuple(Cache(site, self) for site in sites))

    def resize(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        cache = cast(Cache, module)
        if {"K", "labels"} <= tensors.keys() and tensors["K"].shape[1:] == cache.K.shape[1:]:
            cache.hold(tensors["K"], tensors["labels"])

    @staticmethod
    def remember(adapter: Adapted, passes: Iterable[Batches]) -> None:
        """Fills the adapter's cache. Each pass gives the same pictures in the same order, augmented anew.

        Raises `InputError` where the passes differ in their labels, or a label is none of the classes.
        """
        classifier, cache = _parts(adapter)
        total: Tensor | None = None
        first: Tensor | None = None
        for each in passes:
            features, labels = classifier.encode(each, normalise=False)
            if first is not None and not torch.equal(first, labels):
                raise InputError("the passes differ in their labels; give the same pictures in the same order")
            total, first = features if total is None else total + features, labels
        if total is None or first is None:
            raise InputError("TipAdapter.remember was given no pass over pictures")
        if not 0 <= int(first.min()) <= int(first.max()) < cache.classes:
            raise InputError(f"labels go from {first.min()} to {first.max()}, and there are {cache.classes} classes")
        cache.hold(F.normalize(total, dim=-1), first)

    @staticmethod
    def search(
        adapter: Adapted,
        validation: Batches,
        alphas: Sequence[float] = tuple(0.1 + i * 2.9 / 20 for i in range(20)),
        betas: Sequence[float] = tuple(0.1 + i * 6.9 / 200 for i in range(200)),
    ) -> Found:
        """Sets alpha and beta to the first of those with most right answers on validation data, which must be neither
        the remembered pictures nor the test data."""
        classifier, cache = _parts(adapter)
        f, labels = classifier.encode(validation)
        with torch.no_grad():
            logits = similarity(classifier.model, f, classifier.text_features().float())
            affinity = f @ cache.K.float().T
            best = Found(float("nan"), float("nan"), -1.0)
            for beta in betas:
                votes = cache.votes(affinity, torch.tensor(beta, device=f.device))
                for alpha in alphas:
                    right = ((logits + alpha * votes).argmax(-1) == labels).float().mean().item()
                    if right > best.accuracy:
                        best = Found(alpha, beta, right)
            cache.alpha.fill_(best.alpha)
            cache.beta.fill_(best.beta)
        return best


def _parts(adapter: Adapted) -> tuple[CLIPClassifier, Cache]:
    caches = [m for m in adapter.modules.values() if isinstance(m, Cache)]
    classifiers = [m for m in adapter.models.values() if isinstance(m, CLIPClassifier)]
    if len(caches) != 1 or len(classifiers) != 1:
        raise InputError("give an adapter with one TipAdapter on one CLIPClassifier")
    return classifiers[0], caches[0]
