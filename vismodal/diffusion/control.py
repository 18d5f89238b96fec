"""What steers a picture beside its prompt: the edges of a picture, or a picture itself; in training and in drawing.

control = Edges(size=64, factor=8)
adapter = vm.adapt(pipe.unet, control.method())
images = draw(pipe, adapter, control.rows(pictures), prompts, seeds, size=64, steps=20, guidance=4.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import vismodal as vm
from vismodal.data.decode import Unusable
from vismodal.data.edges import edges
from vismodal.data.photos import pixels, read_picture
from vismodal.diffusion.adapters import AdapterFile
from vismodal.diffusion.generate import generate
from vismodal.diffusion.kinds import Pipe
from vismodal.diffusion.pictures import Pictures, Row
from vismodal.draw import shuffled
from vismodal.errors import InputError
from vismodal.evaluation.encoders import Encoder, clip_encoders
from vismodal.methods import Condition, Method
from vismodal.reports.run import square
from vismodal.train import Micro

CONTROL, ENCODER = "control", "encoder"  # entries of a file's header


class Control(Protocol):
    """One way to steer."""

    @property
    def header(self) -> dict[str, str]:
        """What a file says of it."""

    def method(self) -> Method:
        """Its method, fit for its conditions."""

    def rows(self, images: Sequence[Image.Image]) -> Tensor:
        """The condition that pictures make, a row for each."""

    def shown(self, image: Image.Image) -> Image.Image:
        """What people see of a picture's condition."""

    def agreement(self, rows: Tensor, drawn: Sequence[Image.Image]) -> float:
        """How well drawn pictures follow their conditions, from -1 to 1."""


@dataclass(frozen=True)
class Edges(Control):
    """The edges of pictures, by a T2I-Adapter.

    Args:
        size: side in pixels of what is drawn.
        factor: pixels a side of one latent.
    """

    size: int
    factor: int

    @property
    def header(self) -> dict[str, str]:
        return {CONTROL: "edges"}

    def method(self) -> Method:
        return vm.T2IAdapter(factor=self.factor)

    def rows(self, images: Sequence[Image.Image]) -> Tensor:
        """b x 1 x size x size."""
        return edges(torch.stack([pixels(image, self.size) for image in images]))

    def shown(self, image: Image.Image) -> Image.Image:
        grey = (255 * (1 - self.rows([image])[0, 0])).round().byte()
        return Image.fromarray(grey.numpy()).convert("RGB")

    def agreement(self, rows: Tensor, drawn: Sequence[Image.Image]) -> float:
        """Mean correlation of the edges of a picture with those given; 0 for one without any."""
        a, b = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (rows, self.rows(drawn)))
        return F.cosine_similarity(a, b).mean().item()


@dataclass(frozen=True)
class Likeness(Control):
    """A picture, by an IP-Adapter.

    Args:
        encoder: of pictures.
        name: the encoder's, as `clip_encoders` takes it; None is the embedded one.
        size: side in pixels at which a picture is shown.
    """

    encoder: Encoder
    name: str | None
    size: int

    @property
    def header(self) -> dict[str, str]:
        return {CONTROL: "picture", **({ENCODER: self.name} if self.name else {})}

    def method(self) -> Method:
        return vm.IPAdapter(width=self.rows([Image.new("RGB", (8, 8))]).shape[1])

    def rows(self, images: Sequence[Image.Image]) -> Tensor:
        """b x width: unit features times the root of their number, so that an entry is about 1. One picture at a time:
        what it makes does not depend on its neighbours in a batch."""
        features = torch.cat([self.encoder.features([image]) for image in images])
        return features * math.sqrt(features.shape[1])

    def shown(self, image: Image.Image) -> Image.Image:
        return square(image, self.size)

    def agreement(self, rows: Tensor, drawn: Sequence[Image.Image]) -> float:
        """Mean cosine of the features of a picture with those given."""
        return F.cosine_similarity(rows, self.rows(drawn)).mean().item()


def control_of(header: Mapping[str, str], pipe: Pipe, size: int) -> Control | None:
    """What steers the adapter whose file has this header; None for one that nothing does.

    Raises `InputError` for a name that this version does not know, or an encoder that cannot be had.
    """
    kind = header.get(CONTROL)
    if kind is None:
        return None
    if kind == "edges":
        return Edges(size, pipe.vae_scale_factor)
    if kind == "picture":
        return Likeness(clip_encoders(header.get(ENCODER))[0], header.get(ENCODER), size)
    raise InputError(f"there is no control {kind!r}; write edges or picture")


@dataclass(frozen=True)
class Picture:
    """A picture that steers an adapter, and the row that it makes."""

    path: Path
    row: Tensor


def read_conditions(
    given: Sequence[str], files: Mapping[str, AdapterFile], pipe: Pipe, size: int
) -> dict[str, Picture]:
    """By their adapters' names, the pictures in `given`: NAME=FILE, or FILE for all adapters that something steers.

    Raises `InputError` for a name that no such adapter has, and a file that is no picture.
    """
    controls = {name: control_of(file.header, pipe, size) for name, file in files.items()}
    steered = {name: control for name, control in controls.items() if control is not None}
    found: dict[str, Picture] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        named = equals and not Path(text).expanduser().exists()
        names, path = ([name], Path(rest).expanduser()) if named else (list(steered), Path(text).expanduser())
        if not names or not set(names) <= steered.keys():
            raise InputError(
                f"{text} steers no adapter; those that something steers are: {', '.join(steered) or 'none'}"
            )
        if twice := [name for name in names if name in found]:
            raise InputError(f"{twice[0]} is steered by {found[twice[0]].path} and {path}; write one of them")
        try:
            image = read_picture(path)
        except Unusable as error:
            raise InputError(f"{path} cannot steer: {error}") from error
        found |= {name: Picture(path, steered[name].rows([image])) for name in names}
    return found


# -- in training -----------------------------------------------------------------------------------------------------


class Steered(Pictures):
    """Pictures with a condition for each; now and then a row's text, its condition, or both are left out.

    Args:
        given: a row for each picture.
        drop: how often each of the three happens (IP-Adapter, section 4.1.2: .05).
    """

    def __init__(
        self,
        pipe: Pipe,
        name: str,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        given: Condition,
        *,
        size: int,
        drop: float,
    ) -> None:
        super().__init__(pipe, name, images, prompts, size=size)
        self.given, self.drop = given, drop

    def draw(self, micro: Micro, place: int) -> Row:
        row = super().draw(micro, place)
        return row._replace(prompt="") if self._dropped(micro, place)[0] else row

    def conditions(self, micro: Micro, places: Sequence[int]) -> Tensor:
        """One row for each place of the reading."""
        indices = [shuffled(micro.seed, self.name, len(self.images), place) for place in places]
        from_ = [self.given.away if self._dropped(micro, place)[1] else self.given.rows for place in places]
        return torch.stack([rows[index] for rows, index in zip(from_, indices, strict=True)])

    def _dropped(self, micro: Micro, place: int) -> tuple[bool, bool]:
        """Whether the text, and whether the condition is left out."""
        u = torch.rand((), generator=micro.generator(f"{self.name} drop", place)).item()
        return u < 2 * self.drop, self.drop <= u < 3 * self.drop


Loss = Callable[[Micro], Mapping[str, Tensor]]


def steering(adapter: vm.Adapter, pictures: Steered, batch: int, loss: Loss) -> Loss:
    """The loss of a micro-batch, in which each row has its picture's condition; it stays until the next one."""

    def steered(micro: Micro) -> Mapping[str, Tensor]:
        adapter.condition = pictures.conditions(micro, micro.positions(batch))
        return loss(micro)

    return steered


# -- in drawing ------------------------------------------------------------------------------------------------------


def draw(
    pipe: Pipe,
    adapter: vm.Adapter,
    rows: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: int,
    steps: int,
    guidance: float,
    batch: int = 4,
) -> list[Image.Image]:
    """One picture for each prompt, its seed and its row of the condition, `batch` at a time."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        with adapter.given(rows[part]):
            images += generate(pipe, prompts[part], seeds[part], size=size, steps=steps, guidance=guidance, batch=batch)
    return images
