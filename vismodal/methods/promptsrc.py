"""PromptSRC: self-regulating prompts (Khattak et al. 2023, arXiv 2307.06948, equations 3 to 6).

    loss      CE + 25 mean|t - t0| + 10 mean|f - f0| + KL(p0 || p) / (b C)
    average   P <- sum over epochs e of w_e P_e,  w_e ~ N(e; mean, std), sum w = 1, at the end of training

on the prompts of IVLP (see there). t: C D and f: b D are the normalised features of classes and pictures, p: b C the
softmax of their logits; t0, f0 and p0 those of the model without prompts, t0 of the classifier's own prompts. The
official code divides KL by b C, as here, where the paper has no such factor, and makes t0 of 60 templates, whose
features it averages before they are normalised; here a CLIPClassifier with these templates normalises them before too.
The terms are those of the last forward in train mode. Other adapters on weights act in f0 and t0 as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.clip import Images, Texts, similarity
from vismodal.errors import InputError
from vismodal.methods.base import Built, SpanModule, share
from vismodal.methods.deepprompts import Context, DeepImages, DeepTexts, check_depth, context, why_no_text
from vismodal.methods.ivlp import IVLP
from vismodal.site import Site


class Kept:
    """Normalised features of the last forward in train mode, with and without prompts; of a graph, so never copied."""

    pair: tuple[Tensor, Tensor] | None = None

    def keep(self, y: Tensor, y0: Tensor) -> None:
        self.pair = F.normalize(y, dim=-1), F.normalize(y0, dim=-1)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("pair", "zero_shot")}


class Pictures(Kept, SpanModule):
    """f and f0."""

    shared: Images

    def __init__(self, site: Site):
        super().__init__()
        share(self, site.modules["enter"])

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        if self.training:
            with torch.no_grad():
                context["f0"] = context["aside"]("enter", x)
        return x

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        if self.training:
            self.keep(y, context["f0"])
        return y


class Regulated(Kept, DeepTexts):
    """P, t and t0, which is computed once."""

    shared: Texts
    zero_shot: Tensor | None = None

    def __init__(self, site: Site, each: Context, depth: int):
        super().__init__(site, each, depth)
        self.register_buffer("average", torch.zeros_like(self.P.detach()))
        share(self, site.modules["enter"])

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        if self.training and (self.zero_shot is None or self.zero_shot.device != self.P.device):
            with torch.no_grad():
                self.zero_shot = context["aside"]("enter", self.shared.ids)
        return super().enter(x, context)

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        if self.training:
            self.keep(y, cast(Tensor, self.zero_shot))
        return y


class Averaged(DeepImages):
    """Q."""

    def __init__(self, site: Site, n: int, depth: int):
        super().__init__(site, n, depth)
        self.register_buffer("average", torch.zeros_like(self.Q.detach()))


@dataclass(frozen=True, kw_only=True, repr=False)
class PromptSRC(IVLP):
    """Self-regulating prompts, arXiv 2307.06948, on a CLIPClassifier.

    Args:
        text_weight: of mean|t - t0|.
        image_weight: of mean|f - f0|.
        logit_weight: of KL(p0 || p) / (b C).
        epochs: into how many parts training is cut for the average.
        mean: the epoch whose prompts weigh most; the official code takes 15 of 20, 45 of 50 for few shots.
        std: of the weights, in epochs; 1 of 20, 5 of 50.
    """

    sites: tuple[str, ...] = ("image.features", "text.features", "tokens")
    text_tokens: int = 4
    image_tokens: int = 4
    depth: int | None = 9
    text_weight: float = 25.0
    image_weight: float = 10.0
    logit_weight: float = 1.0
    epochs: int = 20
    mean: float = 15.0
    std: float = 1.0

    paper: ClassVar[str] = "arXiv 2307.06948"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or not self.std > 0:
            raise InputError(f"{self!r}: epochs must be at least 1, std above 0")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return super().fits(site) or (site.span is not None and site.kind == "image.features")

    def build(self, sites: Sequence[Site]) -> Built:
        missing = [kind for kind in PromptSRC.sites if kind not in {s.kind for s in sites}]
        if missing:
            raise InputError(f"PromptSRC compares both towers with the base: sites lacks {', '.join(missing)}")
        return super().build(sites)

    def module(self, site: Site) -> nn.Module:
        if site.kind == "image.features":
            return Pictures(site)
        if not why_no_text(site):
            depth = check_depth("PromptSRC", self.depth, site)
            return Regulated(site, context(site, self.words, self.text_tokens), depth)
        return Averaged(site, self.image_tokens, check_depth("PromptSRC", self.depth, site))

    def loss(self, modules: Sequence[nn.Module]) -> Tensor | None:
        pictures = next(m for m in modules if isinstance(m, Pictures))
        texts = next(m for m in modules if isinstance(m, Regulated))
        if pictures.pair is None or texts.pair is None:
            return None
        (f, f0), (t, t0) = pictures.pair, texts.pair
        pictures.pair = texts.pair = None
        p, p0 = (similarity(pictures.shared.model, *each).log_softmax(-1) for each in ((f, t), (f0, t0)))
        terms = (
            self.text_weight * (t - t0).abs().mean(),
            self.image_weight * (f - f0).abs().mean(),
            self.logit_weight * F.kl_div(p, p0, reduction="sum", log_target=True) / p.numel(),
        )
        return torch.stack(terms).sum()

    def step(self, modules: Sequence[nn.Module], step: int, steps: int) -> None:
        weights = [math.exp(-(((e - self.mean) / self.std) ** 2) / 2) for e in range(1, self.epochs + 1)]
        ends = [round(e * steps / self.epochs) for e in range(1, self.epochs + 1)]
        weight = sum(w for w, end in zip(weights, ends, strict=True) if end == step) / sum(weights)
        for module in modules:
            if not isinstance(module, Regulated | Averaged):
                continue
            prompts, average = next(module.parameters()), cast(Tensor, module.average)
            with torch.no_grad():
                average.add_(prompts, alpha=weight)
                if step == steps:
                    prompts.copy_(average)
