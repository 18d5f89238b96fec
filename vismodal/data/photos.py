"""A folder of photos as people have it: read what is usable, and name what is not and why.

    found = read_photos("my_dog")
    for skipped in found.rejected:
        print(f"skipped {skipped}")
    x = pixels(found.photos[0].image, 512, crop="random", flip=True, generator=g)  # (3, 512, 512) in [-1, 1]

How one file becomes a picture is in `decode`, where captions come from in `captions`.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from vismodal.data.captions import METADATA, metadata_captions, text_caption
from vismodal.data.decode import MAX_PIXELS, Unusable, decode
from vismodal.data.masks import belongs_to, is_mask, read_mask
from vismodal.data.shapes import cut_box
from vismodal.errors import InputError, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_OTHER_PICTURES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".tif", ".tiff")
_IGNORED = ("thumbs.db", "desktop.ini", "__macosx")


@dataclass(frozen=True)
class Photo:
    """One usable photo: its file, the upright RGB picture, its caption and its mask where the folder has them.

    `size` is the (width, height) that it had before it was shrunk on reading; None where it was not read here. The mask
    is grey, of the picture's size: what is white is learnt.
    """

    path: Path
    image: Image.Image
    caption: str | None = None
    size: tuple[int, int] | None = None
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Rejected:
    """One file that was left out, and why. `str()` gives one line for people."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return one_line(f"{self.path.name}: {self.reason}")


@dataclass(frozen=True)
class Photos:
    """What a folder holds: at least one photo, and the files left out, both in natural order (2.jpg before 10.jpg)."""

    photos: tuple[Photo, ...]
    rejected: tuple[Rejected, ...] = ()


def read_photos(folder: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS, side: int | None = None) -> Photos:
    """Reads the jpg, png and webp pictures directly in `folder`, with their captions and masks.

    Pictures come out as RGB: turned as EXIF says, transparency laid on white, 16-bit grey scaled (not clipped), of an
    animation the first frame; colour profiles are not applied. What a file is, is told by its content, not its name.
    `max_pixels` is compared with the size in the file's header, before anything is decoded and whatever
    `PIL.Image.MAX_IMAGE_PIXELS` says. `side` shrinks larger pictures on reading, to that shorter side in pixels, so
    that a hundred phone photos fit into memory. Captions: see `vismodal.data.captions`; masks: `vismodal.data.masks`.

    Hidden files are ignored; every other file that gives no photo is in `Photos.rejected` with its reason.
    Raises InputError if the folder is not there, holds no usable photo, or if its metadata.jsonl is wrong.
    """
    root = _folder(folder)
    entries = listing(root)
    captions, rejected = _captions(root, [path for path in entries if os.path.isfile(path)])
    photos: list[Photo] = []
    masks = [path for path in entries if is_mask(path) and os.path.isfile(path)]
    for path in entries:
        if _holds_captions(path) or path in masks:
            continue
        try:
            picture = read_picture(path, max_pixels)
            photos.append(Photo(path, _shrunk(picture, side), captions.get(path), picture.size))
        except Unusable as error:
            rejected.append(Rejected(path, one_line(str(error))))
    photos, unused = _masked(photos, masks, max_pixels)
    rejected += unused
    if not photos:
        raise InputError(_nothing(root, rejected))
    return Photos(tuple(photos), tuple(sorted(rejected, key=lambda r: natural(r.path.name))))


def pixels(
    image: Image.Image,
    size: int,
    *,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A square cut out of an RGB picture, as a float32 tensor (3, size, size) in [-1, 1].

    The shorter side becomes `size` (bicubic, antialiased; small pictures are enlarged), the square lies in the middle
    or anywhere along the longer side; `flip` mirrors it half of the times. Both draws come from `generator`, and the
    crop's comes first, so that `flip` does not move it. Raises ValueError for a picture that is not RGB, a size below
    1, an unknown `crop`, or a draw without a generator.
    """
    if image.mode != "RGB" or size < 1:
        raise ValueError(f"pixels() takes an RGB picture and a size of at least 1, not {image.mode} and {size}")
    if crop not in ("center", "random"):
        raise ValueError(f'crop is "center" or "random", not {crop!r}')
    if (crop == "random" or flip) and generator is None:
        raise ValueError('crop="random" and flip=True draw from a generator: give generator=torch.Generator()')
    shape = (size, size)
    tensor = cut(image, shape, cut_box(*image.size, shape, generator if crop == "random" else None))
    mirrored = flip and bool(torch.randint(2, (), generator=generator))
    return tensor.flip(-1) if mirrored else tensor


def cut(image: Image.Image, shape: tuple[int, int], box: tuple[float, float, float, float]) -> Tensor:
    """A box (left, top, right, bottom) of an RGB picture at (height, width), a float32 tensor 3 h w in [-1, 1]."""
    # Only the box is resized, never the whole picture: a strip of 16 x 100,000 would become gigabytes first.
    part = image.resize(shape[::-1], Image.Resampling.BICUBIC, box=box)
    tensor: Tensor = pil_to_tensor(part).float() / 127.5 - 1
    return tensor


def _folder(given: str | os.PathLike[str]) -> Path:
    """The folder as a path, `~` expanded. Raises InputError with what there is instead.

    `os.path` here and below answers False where `Path` raises: for a name too long, or in a folder closed to us.
    """
    if os.fspath(given) == "":  # Path("") would be the current folder
        raise InputError("the photo folder's name is empty; write the folder that holds the pictures")
    root = Path(os.path.expanduser(given))
    if os.path.isdir(root):
        return root
    if os.path.exists(root):
        raise InputError(f"{root} is a file, not a folder; put the photos into a folder, or write {root.parent}")
    near = difflib.get_close_matches(root.name, _folders(root.parent), n=3)
    hint = f"did you mean {' or '.join(str(root.parent / n) for n in near)}?" if near else "write the photos' folder"
    raise InputError(f"there is no folder {root}; {hint}")


def _folders(parent: Path) -> list[str]:
    try:
        return [path.name for path in parent.iterdir() if os.path.isdir(path)]
    except OSError:  # not there either, or closed to us: no hint then
        return []


def listing(root: Path) -> list[Path]:
    """What lies directly in the folder and is not hidden, in natural order."""
    try:
        found = [p for p in root.iterdir() if not p.name.startswith(".") and p.name.lower() not in _IGNORED]
    except OSError as error:
        raise InputError(f"{root} cannot be read: {error.strerror or error}") from error
    return sorted(found, key=lambda path: natural(path.name))


def natural(name: str) -> tuple[list[str | int], str]:
    """Sorts 2.jpg before 10.jpg; the name itself decides between a1 and a01."""
    parts = re.split(r"(\d+)", name.casefold())  # text, number, text, ...: the kinds never meet
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _holds_captions(path: Path) -> bool:
    return (path.suffix.lower() == ".txt" or path.name == METADATA) and os.path.isfile(path)


def _captions(root: Path, files: Sequence[Path]) -> tuple[dict[Path, str], list[Rejected]]:
    """The caption of each picture that has one, and the text files that could not serve."""
    captions: dict[Path, str] = {}
    rejected: list[Rejected] = []
    if root / METADATA in files:
        rows = metadata_captions(root / METADATA, [path.name for path in files])
        captions = {root / name: caption for name, caption in rows.items()}
    for text in (path for path in files if path.suffix.lower() == ".txt"):
        pictures = [path for path in files if path.stem == text.stem and is_picture(path)]
        if not pictures:
            rejected.append(Rejected(text, "a text file that belongs to no photo (a.txt is the caption of a.jpg)"))
            continue
        try:
            caption = text_caption(text)
        except OSError as error:
            rejected.append(Rejected(text, f"cannot be read: {error.strerror or error}"))
            continue
        if caption is not None:
            captions |= dict.fromkeys(pictures, caption)
    return captions, rejected


def _masked(photos: Sequence[Photo], masks: Sequence[Path], max_pixels: int) -> tuple[list[Photo], list[Rejected]]:
    """The photos with their masks, and the masks that could not serve."""
    found, rejected = list(photos), []
    for path in masks:
        try:
            mask = read_mask(read_picture(path, max_pixels))
            whose = [i for i, photo in enumerate(found) if belongs_to(path, photo.path)]
            if not whose:
                raise Unusable("a mask that belongs to no photo (a.mask.png is the mask of a.jpg)")
            for i in whose:
                if found[i].size != mask.size:
                    sizes = ["{} x {}".format(*size) for size in (mask.size, found[i].size or (0, 0))]
                    raise Unusable(f"a mask of {sizes[0]} pixels, where {found[i].path.name} has {sizes[1]}")
                found[i] = replace(found[i], mask=mask.resize(found[i].image.size, Image.Resampling.BOX))
        except Unusable as error:
            rejected.append(Rejected(path, one_line(str(error))))
    return found, rejected


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB picture in a file. Raises `Unusable` (of `decode`) with the reason."""
    if os.path.isdir(path):
        raise Unusable("a folder; only the pictures directly in the folder above are read")
    if not os.path.isfile(path):  # a broken link, or a pipe, which would block on opening
        raise Unusable("not a file (a broken link or a device)")
    if not is_picture(path):
        todo = "; save it as one of these" if path.suffix.lower() in _OTHER_PICTURES else ""
        raise Unusable(f"not a jpg, png or webp picture{todo}")
    try:
        with path.open("rb") as stream:
            return decode(stream, max_pixels)
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror or error}") from error


def _shrunk(image: Image.Image, side: int | None) -> Image.Image:
    """The picture with its shorter side at most `side`."""
    if side is None or min(image.size) <= side:
        return image
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _nothing(root: Path, rejected: Sequence[Rejected]) -> str:
    """Why a folder gave no photo, and what to do."""
    todo = "put a few jpg, png or webp pictures of the subject there"
    inside = [path for path in listing(root) if os.path.isdir(path) and any(map(is_picture, listing(path)))]
    if inside and not any(is_picture(r.path) for r in rejected):
        return f"{root} has pictures in subfolders only, which are not read; write one of them, like {inside[0]}"
    if not rejected:
        return f"{root} is empty; {todo}"
    first = "; ".join(f"{r.path.name} ({r.reason})" for r in rejected[:3])
    more = f"; and {len(rejected) - 3} more" if len(rejected) > 3 else ""
    return f"{root} holds no usable photo: {first}{more}. Please {todo}"
