"""Few-shot adaptation of CLIP: the methods by name with their usual settings, and the searches that use validation
data. What goes into the classifier is in `data`, what is measured in `task`, how it is trained in `trial`.

The base-to-new protocol (Zhou et al. 2022, arXiv 2203.05557, section 4.1) trains on the first half of the classes and
tests on each half among its own names; H = 2 b n / (b + n).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vismodal.adapter import Adapter
from vismodal.checkpoint import load, read, to_json
from vismodal.clip import CLIPClassifier
from vismodal.entries import written
from vismodal.errors import InputError
from vismodal.methods import Method, TipAdapter

Search = Literal["", "cache", "scale", "probe"]
STRENGTHS = tuple(10.0**e for e in range(-4, 7))  # of logistic regression: sklearn's C


@dataclass(frozen=True)
class Recipe:
    """A method under the name that its paper gives it.

    Args:
        method: its class in vismodal, in lower case; "" trains nothing.
        options: that differ from the class's defaults.
        image_only: it stays within the image tower.
        lr: AdamW's learning rate; 0 trains nothing.
        embedded: the same for the embedded CLIP, which is small and less trained; tried on cifar10 (LOG.md).
        weight_decay: of matrices.
        eps: AdamW's.
        search: what validation data decides: "cache" Tip-Adapter's alpha and beta, "scale" the place between base and
            adapted model (WiSE-FT), "probe" the strength of regularisation.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    image_only: bool = False
    lr: float = 1e-3
    embedded: float = 1e-2
    weight_decay: float = 0.0
    eps: float = 1e-8
    search: Search = ""


_CLIP_LORA = {
    "sites": ("attn.q", "attn.k", "attn.v"), "rank": 2, "alpha": 1, "rank_stabilised": True, "dropout": 0.25
}  # fmt: skip
RECIPES = {
    "zero-shot": Recipe("", lr=0, embedded=0),
    "coop": Recipe("coop", {"words": "a photo of a"}, lr=2e-3),
    "cocoop": Recipe("cocoop", lr=2e-3),
    "maple": Recipe("maple", lr=2e-3),
    "promptsrc": Recipe("promptsrc", lr=2e-3),
    "ivlp": Recipe("ivlp", lr=2e-3),
    "vpt": Recipe("vpt", {"tokens": 8}, image_only=True, lr=2e-3),
    "clip-adapter": Recipe("clipadapter", lr=1e-3),
    "tip-adapter": Recipe("tipadapter", lr=0, embedded=0, search="cache"),
    "tip-adapter-f": Recipe("tipadapter", {"train_keys": True}, lr=1e-3, eps=1e-4, search="cache"),
    "clip-lora": Recipe("lora", _CLIP_LORA, lr=2e-4, embedded=3e-3, weight_decay=1e-2),
    "wise-ft": Recipe(
        "tune", {"sites": ("attn.*", "mlp.*", "norm")}, image_only=True, lr=1e-5, embedded=3e-4, search="scale"
    ),
    "linear-probe": Recipe("", lr=0, embedded=0, search="probe"),
}
_IMAGES = {"open_clip": "model.visual*", "transformers": "model.vision_model*"}


@dataclass(frozen=True)
class Contestant:
    """A method that takes part: what was written, and what that means."""

    label: str
    method: Method | None
    lr: float
    weight_decay: float
    eps: float
    search: Search

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-").lower()

    @property
    def tied(self) -> bool:
        """Whether it knows the classes that it was trained on and no others."""
        cache = isinstance(self.method, TipAdapter)
        return cache or self.search == "probe" or bool(getattr(self.method, "per_class", False))

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the outcome, as JSON values."""
        plain = {k: getattr(self, k) for k in ("lr", "weight_decay", "eps", "search")}
        return plain | {"method": json.loads(json.dumps(to_json(self.method))) if self.method else None}


def contestant(text: str, library: str, depth: int, embedded: bool = False, lr: float | None = None) -> Contestant:
    """What a text such as "coop" or "clip-lora(rank=4, lr=2e-3)" describes, for a model of a library.

    Args:
        text: a name of `RECIPES`, or the class of any method, in any case; options in brackets, among them lr,
            weight_decay and search ("scale" chooses by validation data how far to go from the base).
        library: of the model.
        depth: blocks of the shallower tower, which bounds how deep prompts go.
        embedded: whether it is the one that comes along.
        lr: instead of the usual rate of each method that is trained, unless the text has one.

    Raises `InputError` naming what there is.
    """
    name, bracket, rest = text.strip().partition("(")
    names = {key.replace("-", ""): key for key in RECIPES}
    key = names.get(name.strip().lower().replace("-", "").replace("_", ""))
    recipe = RECIPES[key] if key else Recipe(name.strip().lower())
    if not recipe.method:
        if bracket:
            raise InputError(f"{text}: {key} has no options; write {key}")
        return Contestant(text.strip(), None, 0.0, 0.0, 0.0, recipe.search)
    given = _written(text, recipe, bracket + rest)
    usual: dict[str, Any] = dict(recipe.options)
    if recipe.image_only:
        usual["where"] = _IMAGES[library]
    if getattr(given.method, "depth", None):  # deep prompts, written for 12 blocks
        usual["depth"] = min(depth, given.method.depth)
    method = given.make(usual)
    own = _own(text, recipe, given.own, method)
    usual_lr = recipe.embedded if embedded else recipe.lr
    rate = own.get("lr", (lr or usual_lr) if usual_lr else 0.0)
    decay = float(own.get("weight_decay", recipe.weight_decay))
    return Contestant(text.strip(), method, rate, decay, eps=recipe.eps, search=own.get("search", recipe.search))


def _own(text: str, recipe: Recipe, own: Mapping[str, Any], method: Method) -> Mapping[str, Any]:
    """The settings beside the method's own options. Raises `InputError` for what it cannot have."""
    search, decay = own.get("search", recipe.search), own.get("weight_decay", 0)
    if search not in ("", recipe.search, "scale") or (search == "scale" and not method.interpolates):
        what = '"scale"' if method.interpolates else '""'
        raise InputError(f"{text}: search can be {what} here, not {search!r}")
    if not isinstance(decay, int | float) or isinstance(decay, bool) or not decay >= 0:
        raise InputError(f"{text}: weight_decay must be a number of at least 0, not {decay!r}")
    if not recipe.lr and ("lr" in own or getattr(method, "train_keys", False)):
        raise InputError(f"{text}: nothing is trained in tip-adapter; write tip-adapter-f, where the keys are")
    return own


def _written(text: str, recipe: Recipe, options: str) -> Any:
    try:
        return written(f"{recipe.method}{options}", ("lr", "weight_decay", "search"))
    except InputError as error:
        if str(error).startswith("no method"):
            raise InputError(f"no method {text!r}; write one of {', '.join(RECIPES)}, or another's class") from None
        if ";" in text:
            raise InputError(f"{text!r} is not one method; write several with --compare") from None
        raise InputError(f"{text}: {error}") from None


# -- classes ---------------------------------------------------------------------------------------------------------


def halves(classes: Sequence[str]) -> tuple[list[int], list[int]]:
    """The labels of the base classes, of which there is one more where their number is odd, and of the new ones."""
    if len(classes) < 4:
        raise InputError(f"base-to-new needs two classes in each half; there are {len(classes)} in all")
    cut = -(-len(classes) // 2)
    return list(range(cut)), list(range(cut, len(classes)))


def harmonic(base: float, new: float) -> float:
    """H, the harmonic mean of two accuracies; 0 where one of them is."""
    return 2 * base * new / (base + new) if base and new else 0.0


def check_classes(trained: Sequence[str], given: Sequence[str], path: Path, tied: bool) -> str:
    """A note where an adapter of these classes is used on others. Raises `InputError` where it knows no others."""
    if list(trained) == list(given):
        return ""
    gone, new = [c for c in trained if c not in given], [c for c in given if c not in trained]
    what = "; ".join(
        f"{label} {', '.join(map(repr, names[:5]))}{' ...' if len(names) > 5 else ''}"
        for label, names in (("it lacks", new), ("it has besides", gone)) if names
    ) or "the order differs"  # fmt: skip
    if tied:
        raise InputError(
            f"{path} was made for {len(trained)} classes and knows no others; the {len(given)} given do not match: "
            f"{what}. Give a folder with its classes, or train anew"
        )
    return f"note: {path.name} was trained on other classes ({what}); it is applied to those given"


# -- searches on validation data -----------------------------------------------------------------------------------


class Scale(NamedTuple):
    """How far from the base to the adapted model, and the accuracy of every place that was tried."""

    alpha: float
    tried: dict[float, float]


def search_scale(adapter: Adapter, score: Callable[[], float], alphas: Sequence[float]) -> Scale:
    """Sets `adapter.scale` to the first of the alphas with the highest score on validation data."""
    tried = {}
    for alpha in alphas:
        adapter.scale = alpha
        tried[alpha] = score()
    best = max(tried, key=lambda a: tried[a])
    adapter.scale = best
    return Scale(best, tried)


class Probe(NamedTuple):
    """A linear classifier on features: weight C D, bias C, sklearn's strength C of the fit, its validation accuracy."""

    weight: Tensor
    bias: Tensor
    strength: float
    accuracy: float

    def right(self, features: Tensor, labels: Tensor) -> float:
        """Share of right answers on features n D."""
        answers = (features.double().cpu() @ self.weight.T + self.bias).argmax(-1)
        return (answers == labels.cpu()).double().mean().item()


def linear_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """Logistic regression by L-BFGS on features n D, the first of the strengths with the best validation accuracy
    (as Radford et al. 2021, arXiv 2103.00020, appendix A.3, on a coarser grid)."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, y = (t.cpu().double().numpy() for t in train)
    best: Probe | None = None
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # weak regularisation: what counts is validation
            fitted = LogisticRegression(C=strength, max_iter=1000).fit(x, y.astype(int))
        weight, bias = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
        if classes == 2:  # sklearn has one row then
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        found = Probe(weight, bias, strength, 0.0)
        found = found._replace(accuracy=found.right(*validation))
        if best is None or found.accuracy > best.accuracy:
            best = found
    assert best is not None
    return best


# -- files -----------------------------------------------------------------------------------------------------------


def load_adapter(
    clf: CLIPClassifier, path: Path, classes: Sequence[str], name: str | None = None
) -> tuple[Adapter, str]:
    """An adapter that `vismodal clip` saved, at the scale that was chosen, and a note where its classes are others; or
    one that was saved of the model alone.

    Raises `InputError` where it knows its own classes only and these are others.
    """
    header, _ = read(path)
    if "classes" not in header:  # of the model alone, as `vismodal clip pairs` saves it
        return load(clf.model, path, name), ""
    methods = json.loads(header["methods"]).values()
    tied = any(m["method"] == "TipAdapter" or m.get("per_class") for m in methods)
    note = check_classes(json.loads(header["classes"]), classes, path, tied)
    adapter = load(clf, path, name)
    if scale := header.get("scale"):
        adapter.scale = float(scale)
    return adapter, note


def shallow(model: nn.Module) -> int:
    """Blocks of the shallower tower of a CLIP."""
    from vismodal.attach import sites

    found = [s for s in sites(model) if s.kind == "block"]
    counts = [sum(s.tower == tower for s in found) for tower in ("image", "text")]
    return min(c for c in (*counts, 9) if c)
