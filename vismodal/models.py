"""The embedded models, offline, each as the users of its own library expect it.

    timm_model = vm.models.load("tiny-vit")
    model, preprocess, tokenizer = vm.models.load("tiny-clip")
    model, processor = vm.models.load("tiny-clip", library="transformers")
    pipe = vm.models.load("tiny-sd")

Importing this module costs nothing: each library is imported when a model of it is loaded. The files hold fp16; models
come in fp32 and in eval mode.

tiny-clip's texts get equal ids in both libraries. For that its config sets `tokenizer_kwargs` to {"clean":
"whitespace"}, which leaves lower-casing to the CLIPTokenizer as in transformers, and a `hf_tokenizer_name`, without
which open_clip takes its own vocabulary. The end of text is the last id, and the padding too; both libraries read a
text off the first of them (`pool_type` "eos" with its `eos_id`). What stays different: open_clip also repairs texts
with ftfy and HTML's entities, so that curly quotes and &amp; are other ids there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

from vismodal.errors import InputError
from vismodal.paths import asset

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from open_clip import CLIP
    from open_clip.tokenizer import HFTokenizer
    from PIL.Image import Image
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from vismodal.formats.open_clip import Twin

# each model's libraries, its own first, and the extra of this package that installs them
LIBRARIES = {"tiny-vit": ("timm",), "tiny-clip": ("open_clip", "transformers"), "tiny-sd": ("diffusers",)}
_EXTRAS = {"tiny-vit": "vismodal", "tiny-clip": "vismodal[clip]", "tiny-sd": "vismodal[diffusion]"}


class OpenClip(NamedTuple):
    """open_clip's three: a CLIP, what makes a PIL picture a (3, H, W) tensor, what makes B texts (B, L) ids."""

    model: CLIP
    preprocess: Callable[[Image], Tensor]
    tokenizer: HFTokenizer


@overload
def load(name: Literal["tiny-vit"], library: Literal["timm"] | None = None) -> VisionTransformer: ...
@overload
def load(name: Literal["tiny-clip"], library: Literal["open_clip"] | None = None) -> OpenClip: ...
@overload
def load(name: Literal["tiny-clip"], library: Literal["transformers"]) -> Twin: ...
@overload
def load(name: Literal["tiny-sd"], library: Literal["diffusers"] | None = None) -> StableDiffusionPipeline: ...
def load(name: str, library: str | None = None) -> Any:
    """An embedded model: "tiny-vit", "tiny-clip" or "tiny-sd".

    Args:
        name: which one.
        library: whose classes it has; None is its own, and "transformers" gives tiny-clip as a `Twin`.

    Raises `InputError` for a name or library that is not among these, for a library that is not installed, and where
    this installation lacks the model's files.
    """
    if name not in LIBRARIES:
        raise InputError(f"no embedded model {name!r}; write one of {', '.join(LIBRARIES)}")
    library = library or LIBRARIES[name][0]
    if library not in LIBRARIES[name]:
        raise InputError(f"{name} does not come in {library!r}; write one of {', '.join(LIBRARIES[name])}")
    folder = asset(name)
    with _installed(name):
        if name == "tiny-vit":
            return _vit(folder)
        if name == "tiny-sd":
            return _stable_diffusion(folder)
        return _clip(folder) if library == "open_clip" else _twin(folder)


@contextmanager
def _installed(name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f'{name} needs the package {error.name}, which is not installed; write pip install "{_EXTRAS[name]}"'
        ) from error


def _vit(folder: Path) -> VisionTransformer:
    import timm

    return cast("VisionTransformer", timm.create_model(f"local-dir:{folder}", pretrained=True).eval())


def _clip(folder: Path) -> OpenClip:
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return OpenClip(model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}"))


def _twin(folder: Path) -> Twin:
    from vismodal.formats.open_clip import twin

    model, _, tokenizer = _clip(folder)
    return twin(model, tokenizer)


def _stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    from vismodal.diffusion.load import load_pipeline

    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config()  # as diffusers has it: with a bar
    return cast("StableDiffusionPipeline", pipe)
