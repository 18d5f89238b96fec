"""From a picture file's bytes to an upright RGB picture, or the reason why there is none. Safe in several threads."""

import threading
import warnings
from typing import IO

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin, features

MIN_SIDE = 16  # pixels; less shows no subject
MAX_PIXELS = 2**27  # 134 million: above every camera's pictures, 400 MB once decoded
_WHITE = (255, 255, 255)
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


class Unusable(Exception):
    """A file that is no usable photo; the message is the reason."""


class _Quiet:
    """PIL's warnings are off while a thread is inside.

    The filters belong to the whole process, and `warnings.catch_warnings` puts back those that it found: of two threads
    that overlap, the one that began later would put back "ignore" for good. Here the first one in changes them and the
    last one out puts them back.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.found = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.found = warnings.catch_warnings()
                self.found.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.found.__exit__(None, None, None)


_quiet = _Quiet()


def decode(stream: IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB picture in an open jpg, png or webp file.

    Raises Unusable with the reason: another format, too small, more than `max_pixels` by its header, or damaged.
    """
    try:
        with _quiet:  # PIL warns of odd EXIF and the like; here a file is used or its defect named
            picture = _opened(stream)
            _check_size(*picture.size, max_pixels)
            picture.load()
            return _rgb(_upright(picture))
    except Unusable:
        raise
    except Exception as error:  # a damaged file makes PIL raise nearly anything: SyntaxError, struct.error, zlib's
        raise Unusable(f"truncated or corrupt ({str(error) or type(error).__name__})") from error


def _opened(stream: IO[bytes]) -> ImageFile.ImageFile:
    """The picture with its header read. Which format it is, the first bytes say: many a .jpg is a webp.

    `Image.open` is not used, because its check of the size follows a global that others may have set to anything: it
    would warn, raise or pass where `max_pixels` says otherwise.
    """
    head = stream.read(12)
    stream.seek(0)
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(stream)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile(stream)
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        if not features.check("webp"):
            raise Unusable("a webp picture, which this build of Pillow cannot read; save it as png")
        return WebPImagePlugin.WebPImageFile(stream)
    if not head:
        raise Unusable("an empty file")
    raise Unusable("its content is no jpg, png or webp picture, whatever its name says; save it again as one of these")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise Unusable(f"{width} x {height} pixels is too small; the shorter side must have at least {MIN_SIDE}")
    if width * height > max_pixels:
        raise Unusable(
            f"{width} x {height} pixels is too large, a decompression bomb perhaps; make it smaller: "
            f"at most {max_pixels:,} pixels are read"
        )


def _upright(picture: Image.Image) -> Image.Image:
    """Turned and mirrored as EXIF says; left as stored where the EXIF data is damaged."""
    try:
        undo = _UPRIGHT.get(int(picture.getexif()[_ORIENTATION]))
    except Exception:  # no tag, or a parser lost in damaged bytes: the picture itself is still whole
        undo = None
    return picture if undo is None else picture.transpose(undo)


def _rgb(picture: Image.Image) -> Image.Image:
    """Any mode as RGB, transparency laid on white."""
    if picture.mode.startswith("I"):  # 16-bit grey: `convert` would clip all above 255 to white
        picture = picture.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*_WHITE, 255)), layer).convert("RGB")
    return picture.convert("RGB")
