"""PNGs that say how they were made: what `vismodal generate --like X.png` reads.

A text chunk `vismodal` holds the settings as JSON, another, `parameters`, what web UIs read. Files and local models are
named without their folders, which are nobody's business where a picture is shown; an adapter is known by the digest of
its file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from vismodal.diffusion.adapters import FILES, digest_of
from vismodal.errors import InputError
from vismodal.files import write_file
from vismodal.runs import CONFIG

CHUNK = "vismodal"
Precision = Literal["no", "bf16", "fp16"]


class Worn(NamedTuple):
    """An adapter that acted on a picture: its name, its file's name and digest, its strength."""

    name: str
    file: str
    digest: str
    strength: float


class Given(NamedTuple):
    """A picture that steered an adapter: the adapter's name, the picture's file and digest."""

    name: str
    file: str
    digest: str


@dataclass(frozen=True)
class Settings:
    """How a picture was made.

    Args:
        prompt, negative, seed, size, steps, guidance: as the pipeline was given them; the prompt without tags.
        model: id on the Hub, or a local folder's last name; None is the embedded model.
        local: whether the model is a folder.
        base: shapes and values of the denoiser's fingerprint.
        adapters: those that acted, in order.
        version: of vismodal.
        sampler: as web UIs call it.
        conditions: what steered the adapters that something steers.
        precision: of the denoiser and the text encoders.
    """

    prompt: str
    negative: str
    seed: int
    size: int
    steps: int
    guidance: float
    model: str | None
    local: bool
    base: tuple[str, str]
    adapters: tuple[Worn, ...]
    version: str
    sampler: str = ""
    conditions: tuple[Given, ...] = ()
    precision: Precision = "no"


def write_picture(path: Path, image: Image.Image, settings: Settings) -> Path:
    """A PNG with its settings, whole or absent."""
    chunks, buffer = PngInfo(), io.BytesIO()
    plain = asdict(settings) | {
        "adapters": [worn._asdict() for worn in settings.adapters],
        "conditions": [given._asdict() for given in settings.conditions],
    }
    chunks.add_text(CHUNK, json.dumps(plain))
    chunks.add_text("parameters", parameters(settings))
    image.save(buffer, "png", pnginfo=chunks)
    return write_file(path, buffer.getvalue())


# schedulers by the names that web UIs have for their samplers
_SAMPLERS = {
    "DDIM": "DDIM", "PNDM": "PLMS", "EulerDiscrete": "Euler", "EulerAncestralDiscrete": "Euler a", "LMSDiscrete": "LMS",
    "HeunDiscrete": "Heun", "KDPM2Discrete": "DPM2", "KDPM2AncestralDiscrete": "DPM2 a", "UniPCMultistep": "UniPC",
    "DPMSolverMultistep": "DPM++ 2M", "DPMSolverSDE": "DPM++ SDE", "FlowMatchEulerDiscrete": "Euler", "LCM": "LCM",
}  # fmt: skip


def sampler_of(scheduler: object) -> str:
    """A scheduler of diffusers as web UIs call its sampler; by its own name where they have none."""
    name = type(scheduler).__name__.removesuffix("Scheduler")
    return _SAMPLERS.get(name, name)


def parameters(settings: Settings) -> str:
    """The settings as AUTOMATIC1111's web UI writes and reads them: prompt with tags, negative, then one line of pairs.

    Adapters stand in the prompt as `<lora:NAME:STRENGTH>`. A value with a comma, colon or line break is quoted.
    """
    tags = "".join(f" <lora:{worn.name}:{worn.strength:g}>" for worn in settings.adapters)
    pairs = {
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "CFG scale": f"{settings.guidance:g}",
        "Seed": settings.seed,
        "Size": f"{settings.size}x{settings.size}",
        "Model": settings.model or "tiny-sd",
        "Version": f"vismodal {settings.version}",
    }
    texts = {name: str(value) for name, value in pairs.items() if value != ""}
    quoted = {n: json.dumps(v, ensure_ascii=False) if set(v) & set(",:\n") else v for n, v in texts.items()}
    lines = [f"{settings.prompt}{tags}", *([f"Negative prompt: {settings.negative}"] if settings.negative else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in quoted.items())])


def read_settings(path: Path) -> Settings:
    """The settings of a picture. Raises `InputError` where there are none, or they cannot be read."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(CHUNK)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from error
    if text is None:
        raise InputError(f"{path} carries no settings; give a png that vismodal generate wrote, and that nobody edited")
    try:
        given: dict[str, Any] = json.loads(text)
        worn = tuple(Worn(a["name"], a["file"], a["digest"], float(a["strength"])) for a in given.pop("adapters"))
        steering = tuple(Given(a["name"], a["file"], a["digest"]) for a in given.pop("conditions", ()))
        shapes, values = given.pop("base")
        return Settings(**given, base=(shapes, values), adapters=worn, conditions=steering)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"the settings in {path} are of another version, or damaged: {error!r}") from error


def beside(picture: Path) -> dict[str, Any]:
    """The settings of the run whose folder a picture lies in; empty where it has been moved."""
    try:
        found = yaml.safe_load((picture.parent / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def find_adapters(picture: Path, worn: Sequence[Worn]) -> list[str]:
    """Where the adapters of a picture lie, as NAME=FILE: by its run's settings, beside it, or here, by content.

    Raises `InputError` for the first that is not found.
    """
    return _find(picture, worn, "adapters", "the adapter")


def find_conditions(picture: Path, given: Sequence[Given]) -> list[str]:
    """Where the pictures lie that steered a picture's adapters, as `find_adapters` says it."""
    return _find(picture, given, "conditions", "a condition of")


def _find(picture: Path, wanted: Sequence[Worn] | Sequence[Given], setting: str, what: str) -> list[str]:
    listed = (str(text) for text in beside(picture).get(setting) or ())
    named = [
        Path(text.partition("=")[2] if "=" in text and not Path(text).expanduser().exists() else text)
        for text in listed
    ]
    given = [path.expanduser() for path in named]
    places = [place for path in given for place in ((path / file for file in FILES) if path.is_dir() else (path,))]
    found = []
    for each in wanted:
        there = (path for path in (*places, picture.parent / each.file, Path(each.file)) if path.is_file())
        path = next((path for path in there if digest_of(path) == each.digest), None)
        if path is None:
            raise InputError(
                f"{picture.name} was made with {what} {each.name!r}, {each.file} (SHA-256 {each.digest}...), which is "
                f"not here; write --{setting} {each.name}=FILE"
            )
        found.append(f"{each.name}={path}")
    return found
