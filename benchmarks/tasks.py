"""Parts of `methods.py`: an embedded model each, what it is to learn, and how well it has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from contestants import Name
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import vismodal as vm
from vismodal.data.photos import pixels
from vismodal.diffusion import losses
from vismodal.diffusion.denoise import Prompts, Weights, denoising
from vismodal.diffusion.encode import draw_latents, encode_images, encode_prompts, native_size
from vismodal.diffusion.pictures import Pictures
from vismodal.diffusion.processes import noise_schedule
from vismodal.draw import generator, shuffled
from vismodal.evaluation import emoji_tasks
from vismodal.evaluation.emoji_scores import answers
from vismodal.methods import Method
from vismodal.train import Micro

AT_ONCE = 64  # pictures that are scored together
LEVELS = 8  # of noise, at which each held-out picture is scored
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # C of the logistic regression


class Judged(NamedTuple):
    """On one part of the data: the mean loss, and a score for each picture, of which more is better."""

    loss: float
    scores: Tensor  # n


class Task(Protocol):
    """A model and what it is to learn. `base` is never changed: contestants adapt copies."""

    base: nn.Module
    heads: tuple[Method, ...]  # what every contestant trains besides
    about: str

    def loss(self, model: nn.Module, batch: int) -> Callable[[Micro], Mapping[str, Tensor]]:
        """For training `model`, the base's copy."""

    def judged(self, model: nn.Module, part: str) -> Judged:
        """On "val" or "test"."""

    def baselines(self) -> dict[str, dict[str, Judged]]:
        """By label and part; contestants are compared with the first."""


def task(name: Name, data: Path, seed: int, sizes: Mapping[str, int]) -> Task:
    """`sizes` are options of the task's class."""
    kinds: dict[Name, type] = {"tiny-vit": Photos, "tiny-clip": FewShots, "tiny-sd": Style}
    made: Task = kinds[name](data, seed, **sizes)
    return made


# -- pictures with a class -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """Pictures n 3 s s, normalised, and their classes, n."""

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]

    def shots(self, count: int, seed: int) -> Labelled:
        """At most `count` pictures of each class."""
        order = torch.tensor([shuffled(seed, "shots", len(self.y), i) for i in range(len(self.y))])
        each = [order[self.y[order] == c][:count] for c in range(len(self.classes))]
        chosen = torch.cat(each)
        return Labelled(self.x[chosen], self.y[chosen], self.classes)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(AT_ONCE), self.y.split(AT_ONCE), strict=True))


def read(folder: Path, size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Labelled]:
    """The parts train, val and test of a data set, a folder for each class."""
    if not folder.is_dir():
        raise vm.InputError(f"{folder} is missing: write --data FOLDER with transfer/{folder.name}")
    return {part: _read(folder / part, size, mean, std) for part in ("train", "val", "test")}


def _read(folder: Path, size: int, mean: Sequence[float], std: Sequence[float]) -> Labelled:
    classes = sorted(f.name for f in folder.iterdir())
    files = [(f, i) for i, name in enumerate(classes) for f in sorted((folder / name).iterdir())]
    shown = []
    for file, _ in files:
        with Image.open(file) as picture:
            shown.append(pixels(picture.convert("RGB"), size))
    middle, spread = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    x = (torch.stack(shown) / 2 + 0.5 - middle) / spread
    return Labelled(x, torch.tensor([i for _, i in files]), tuple(classes))


def moved(x: Tensor, most: int, r: torch.Generator) -> Tensor:
    """A picture c s s, moved by up to `most` pixels over its mirrored edges: the only augmentation, the same for all.
    No mirror images: a mirrored 3 is none."""
    down, right = torch.randint(2 * most + 1, (2,), generator=r).tolist()
    padded = F.pad(x[None], (most,) * 4, mode="reflect")[0]
    return padded[:, down : down + x.shape[-1], right : right + x.shape[-1]]


class Classes:
    """What the two classification tasks have in common."""

    base: nn.Module
    parts: dict[str, Labelled]

    def drawn(self, rows: Sequence[int], generators: Iterable[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Pictures of the training part, each moved, and their classes."""
        train = self.parts["train"]
        most = train.x.shape[-1] // 10
        x = [moved(train.x[i], most, r) for i, r in zip(rows, generators, strict=True)]
        return torch.stack(x), train.y[list(rows)]

    def loss(self, model: nn.Module, batch: int) -> Callable[[Micro], Mapping[str, Tensor]]:
        count = len(self.parts["train"].y)

        def loss(micro: Micro) -> Mapping[str, Tensor]:
            places = micro.positions(batch)
            rows = [shuffled(micro.seed, "pictures", count, place) for place in places]
            x, y = self.drawn(rows, (micro.generator("moved", place) for place in places))
            with torch.autocast(x.device.type, torch.bfloat16):
                logits = model(x)
            return {"loss": F.cross_entropy(logits.float(), y)}

        return loss

    def turn(self, seed: int, i: int) -> list[tuple[Tensor, Tensor]]:
        """All of the training part in its own order, moved anew in every turn."""
        rows = range(len(self.parts["train"].y))
        return [self.drawn(rows, (generator(seed, "turn", i, row) for row in rows))]

    def judged(self, model: nn.Module, part: str) -> Judged:
        with torch.no_grad():
            logits = torch.cat([model(x) for x, _ in self.parts[part].batches()])
        y = self.parts[part].y
        return Judged(F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float())

    def probe(self, encode: Callable[[Tensor], Tensor]) -> tuple[nn.Linear, dict[str, Judged]]:
        """Logistic regression on features of the base, its strength chosen on the validation part."""
        from sklearn.linear_model import LogisticRegression

        with torch.no_grad():
            f = {k: torch.cat([encode(x) for x, _ in p.batches()]).double() for k, p in self.parts.items()}
        y = self.parts["train"].y
        mean, std = f["train"].mean(0), f["train"].std(0) + 1e-6
        standard = ((f["train"] - mean) / std).numpy()
        found = []
        for strength in STRENGTHS:
            fitted = LogisticRegression(C=strength, max_iter=2000).fit(standard, y.numpy())
            head = _linear(torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_), mean, std)
            judged = {k: _scored(head(v), self.parts[k].y) for k, v in f.items() if k != "train"}
            found.append((head, judged))
        return max(found, key=lambda each: each[1]["val"].scores.mean().item())


@torch.no_grad()
def _linear(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> nn.Linear:
    """A regression on standardised features as a layer on features as they are."""
    if len(weight) == 1:  # of two classes, sklearn gives the second's alone
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    head = nn.Linear(*reversed(weight.shape), dtype=weight.dtype)
    head.weight.copy_(weight / std)
    head.bias.copy_(bias - head.weight @ mean)
    return head.requires_grad_(False)


def _scored(logits: Tensor, y: Tensor) -> Judged:
    return Judged(F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float())


class Photos(Classes):
    """tiny-vit on a folder of photos. Its head is a logistic regression on what the base sees; all go on from there."""

    heads = (vm.LinearProbe(),)

    def __init__(self, data: Path, seed: int, name: str = "handdigits10") -> None:
        import timm

        model: Any = vm.models.load("tiny-vit").eval()
        config = timm.data.resolve_model_data_config(model)
        self.parts = read(data / "transfer" / name, config["input_size"][-1], config["mean"], config["std"])
        classes = len(self.parts["train"].classes)
        head, self.fitted = self.probe(lambda x: model.forward_head(model.forward_features(x), pre_logits=True))
        model.reset_classifier(classes)
        model.head.load_state_dict(head.state_dict())
        self.base = model.eval()
        sizes = "/".join(str(len(p.y)) for p in self.parts.values())
        self.about = f"`transfer/{name}`: {classes} classes, {sizes} pictures to train, validate and test; everybody "
        self.about += "starts with the head that a logistic regression on the base's features gave, and trains it too"

    def baselines(self) -> dict[str, dict[str, Judged]]:
        return {"untouched base, logistic regression": self.fitted}


class FewShots(Classes):
    """tiny-clip on a few pictures of each class, from zero-shot."""

    heads = ()

    def __init__(self, data: Path, seed: int, name: str = "cifar10", shots: int = 16) -> None:
        model, _, tokenizer = vm.models.load("tiny-clip")
        visual: Any = model.visual
        size = visual.image_size[0]
        self.parts = read(data / "transfer" / name, size, visual.image_mean, visual.image_std)
        self.parts["train"] = self.parts["train"].shots(shots, seed)
        self.base = vm.CLIPClassifier(model, tokenizer, self.parts["train"].classes, "a photo of a {}.").eval()
        classes, *sizes = (len(x) for x in (self.base.classes, self.parts["val"].y, self.parts["test"].y))
        self.about = (
            f"`transfer/{name}`: {classes} classes, {shots} pictures of each to train, {sizes[0]} to validate, "
        )
        self.about += f'{sizes[1]} to test; the head is zero-shot, of "a photo of a {{}}."'

    def baselines(self) -> dict[str, dict[str, Judged]]:
        zero_shot = {part: self.judged(self.base, part) for part in ("val", "test")}
        base: Any = self.base
        return {
            "untouched base, zero-shot": zero_shot,
            "untouched base, logistic regression": self.probe(lambda x: F.normalize(base.image(x), dim=-1))[1],
        }


# -- a style ---------------------------------------------------------------------------------------------------------


class Style:
    """tiny-sd on the Fluent style; scored by the loss on emoji that are not learnt from, with fixed noise."""

    heads = ()

    def __init__(
        self, data: Path, seed: int, emoji: int = 64, held_out: int = 64, val: int = 16, views: int = 4
    ) -> None:
        self.pipe: Any = vm.models.load("tiny-sd")
        self.base = self.pipe.unet.eval()
        emojis = emoji_tasks.read(data, "penguin", held_out, seed)
        style = emoji_tasks.style(emojis, "sks", emoji + val, views, seed)
        self.size, learnt = native_size(self.pipe), emoji * views
        images, captions = style.learnt.images, style.learnt.captions
        self.learnt = Pictures(self.pipe, "learnt", images[:learnt], captions[:learnt], size=self.size)
        self.prompts = Prompts(self.pipe, cache=True)
        asked = answers(style, emojis.fluent, seed)
        self.parts = {
            "val": self.fixed(images[learnt::views], captions[learnt::views], seed, "val"),
            "test": self.fixed(asked, [q.prompt for q in style.questions], seed, "test"),
        }
        self.about = f'"in sks style" from {learnt} pictures of {emoji} Fluent emoji; the loss on {val} others to '
        self.about += (
            f"validate and on {len(asked)} to test that no part of the model has seen, at {LEVELS} levels each"
        )

    def fixed(
        self, images: Sequence[Image.Image], prompts: Sequence[str], seed: int, part: str
    ) -> list[dict[str, Any]]:
        """For each picture: its mean latent with noise at every level, what is to be predicted, and the text."""
        kind, alpha_bar = noise_schedule(self.pipe)
        t = ((torch.arange(LEVELS) + 0.5) / LEVELS * len(alpha_bar)).long()
        rows = []
        for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            mean, std = encode_images(self.pipe, pixels(image, self.size)[None])
            x = draw_latents(self.pipe, mean, std, torch.zeros_like(mean)).expand(LEVELS, -1, -1, -1)
            noise = torch.randn(x.shape, generator=generator(seed, "fixed noise", part, i))
            with torch.no_grad():
                text = encode_prompts(self.pipe, [prompt])
            target = losses.denoising_target(kind, x, noise, alpha_bar[t])
            rows.append({"x": losses.add_noise(x, noise, alpha_bar[t]), "t": t, "target": target, "text": text})
        return rows

    def loss(self, model: nn.Module, batch: int) -> Callable[[Micro], Mapping[str, Tensor]]:
        pipe: Any = copy.copy(self.pipe)
        pipe.unet = model
        return denoising(pipe, [self.learnt], self.prompts, batch, Weights())

    def judged(self, model: nn.Module, part: str) -> Judged:
        each = []
        with torch.no_grad():
            for row in self.parts[part]:
                text = {name: t.expand(LEVELS, *t.shape[1:]) for name, t in row["text"].items()}
                predicted = model(row["x"], row["t"], **text).sample
                each.append(losses.per_sample_mse(predicted, row["target"]).mean())
        scores = torch.stack(each)
        return Judged(scores.mean().item(), -scores)

    def baselines(self) -> dict[str, dict[str, Judged]]:
        return {"untouched base": {part: self.judged(self.base, part) for part in ("val", "test")}}
