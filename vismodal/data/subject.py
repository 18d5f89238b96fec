"""The embedded subject: six drawings of one little robot, so that DreamBooth can learn something without a download.

    python -m vismodal.data.subject OUT      # draws assets/subject anew, bit for bit

It is flat and bright like the emoji that the embedded model was trained on, and made of few large shapes that survive
at 64 pixels: a teal egg with one big eye, an orange ball on its antenna, orange hands and feet, a yellow belly with a
red heart.
"""

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from vismodal.paths import asset

PROMPT = "a drawing of sks robot"  # every caption starts with it
CLASS_PROMPT = "a drawing of a robot"  # what the subject is one of
_SIZE = 256  # pixels of a picture's side
_FINER = 8  # drawn this much larger, then averaged
_CENTRE = 50.0  # of the robot's own units: it stands between 0 and 100, x to the right, y down
_TURNS = [2 * math.pi * i / 96 for i in range(96)]  # the corners of a round shape

_BODY, _SHADE, _LIMB = "#2EC4B6", "#1FA398", "#17867F"
_ORANGE, _YELLOW, _RED, _PINK = "#FF8A1F", "#FFD93B", "#E5353F", "#FF9EAA"
_WHITE, _NAVY = "#FFFFFF", "#1B2A4A"

Point = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """A filled polygon."""

    points: tuple[Point, ...]
    colour: str


@dataclass(frozen=True)
class Pose:
    """Where the robot is and what it does. Angles in degrees; an arm's 0 hangs down, 90 points outwards, 180 up."""

    background: str  # as the caption names it
    colour: str
    centre: Point = (50, 52)  # of the picture's 100 x 100
    scale: float = 0.8
    tilt: float = 0.0  # clockwise
    arms: tuple[float, float] = (35, 35)  # left and right in the picture
    legs: tuple[float, float] = (0, 0)  # outwards
    gaze: Point = (0, 0)  # of the pupil, -1 to 1

    @property
    def caption(self) -> str:
        return f"{PROMPT} on a {self.background} background"


# The backgrounds' names and colours are those that the embedded model was trained on (pipelines/pretrain/data.py).
POSES = (
    Pose("yellow", "#FAD746"),
    Pose("pink", "#FA96BE", tilt=8, arms=(25, 135), gaze=(0.6, -0.4)),
    Pose("blue", "#2D69DC", centre=(50, 47), arms=(135, 135), legs=(32, 32), gaze=(0, -0.8)),
    Pose("red", "#D63030", centre=(39, 61), scale=0.7, tilt=-8, arms=(75, 15), legs=(24, -14), gaze=(-1, 0)),
    Pose("purple", "#8746BE", centre=(59, 44), scale=0.7, tilt=24, arms=(95, 95), legs=(18, 18), gaze=(-0.6, 0.7)),
    Pose("gray", "#8C8C8C", centre=(52, 50), scale=0.95, tilt=-4, arms=(115, 30), gaze=(0.9, 0.2)),
)


def ellipse(centre: Point, rx: float, ry: float, colour: str) -> Shape:
    """A polygon, because PIL's own ellipse cannot be tilted."""
    return Shape(tuple((centre[0] + rx * math.cos(t), centre[1] + ry * math.sin(t)) for t in _TURNS), colour)


def line(points: Sequence[Point], width: float, colour: str) -> Iterator[Shape]:
    """A thick line through `points` with round ends and joints."""
    for a, b in itertools.pairwise(points):
        length = math.dist(a, b)
        across = ((a[1] - b[1]) * width / 2 / length, (b[0] - a[0]) * width / 2 / length)
        ends = [(p[0] + s * across[0], p[1] + s * across[1]) for p, s in ((a, 1), (b, 1), (b, -1), (a, -1))]
        yield Shape(tuple(ends), colour)
    for point in points:
        yield ellipse(point, width / 2, width / 2, colour)


def heart(centre: Point, size: float, colour: str) -> Shape:
    """The curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, `size` wide."""
    points = []
    for t in _TURNS:
        up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((centre[0] + size / 32 * 16 * math.sin(t) ** 3, centre[1] - size / 32 * up))
    return Shape(tuple(points), colour)


def polar(start: Point, angle: float, length: float) -> Point:
    """`length` away from `start`; 0 degrees is down, 90 to the right."""
    return start[0] + length * math.sin(math.radians(angle)), start[1] + length * math.cos(math.radians(angle))


def robot(pose: Pose) -> Iterator[Shape]:
    """The robot's shapes, from back to front, upright and in its own units."""
    yield from line([(50, 30), (50, 6)], 4.5, _NAVY)
    yield ellipse((50, 6), 7, 7, _ORANGE)
    for side, arm, leg in ((-1, pose.arms[0], pose.legs[0]), (1, pose.arms[1], pose.legs[1])):
        hip = (50 + side * 12, 76.0)
        foot = polar(hip, side * leg, 16)
        yield from line([hip, foot], 9, _LIMB)
        yield ellipse((foot[0] + side * 3, foot[1] + 1), 9, 6, _ORANGE)
        shoulder = (50 + side * 27, 51.0)
        hand = polar(shoulder, side * arm, 21)
        yield from line([shoulder, hand], 9, _LIMB)
        yield ellipse(hand, 7, 7, _ORANGE)
    yield ellipse((50, 50), 31, 33, _SHADE)
    yield ellipse((48.5, 48.5), 28.5, 30.5, _BODY)
    yield ellipse((50, 69), 17, 12, _YELLOW)
    yield heart((50, 69.5), 14, _RED)
    yield from face(pose)


def face(pose: Pose) -> Iterator[Shape]:
    """One big eye, pink cheeks and a smile."""
    yield ellipse((50, 35), 16, 16, _NAVY)
    yield ellipse((50, 35), 13.5, 13.5, _WHITE)
    pupil = (50 + 5 * pose.gaze[0], 35 + 5 * pose.gaze[1])
    yield ellipse(pupil, 8, 8, _NAVY)
    yield ellipse((pupil[0] - 2.5, pupil[1] - 3), 2.8, 2.8, _WHITE)
    for side in (-1, 1):
        yield ellipse((50 + side * 20, 50), 4, 3, _PINK)
    smile = [polar((50, 50), angle, 5.5) for angle in range(-60, 61, 10)]
    yield from line(smile, 1.8, _NAVY)


def draw(pose: Pose) -> Image.Image:
    """The picture of a pose: RGB, 256 x 256."""
    fine = _SIZE * _FINER
    image = Image.new("RGB", (fine, fine), pose.colour)
    canvas = ImageDraw.Draw(image)
    cos, sin = math.cos(math.radians(pose.tilt)), math.sin(math.radians(pose.tilt))
    for shape in robot(pose):
        placed = []
        for x, y in shape.points:
            dx, dy = pose.scale * (x - _CENTRE), pose.scale * (y - _CENTRE)
            at = pose.centre[0] + cos * dx - sin * dy, pose.centre[1] + sin * dx + cos * dy
            placed.append((round(at[0] * fine / 100), round(at[1] * fine / 100)))
        canvas.polygon(placed, fill=shape.colour)
    return image.reduce(_FINER)


def write_subject(folder: Path) -> list[Path]:
    """Draws `1.png` to `6.png` with their captions `1.txt` to `6.txt` into `folder`; gives the pictures' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, pose in enumerate(POSES, start=1):
        path = folder / f"{number}.png"
        draw(pose).save(path, optimize=True)
        path.with_suffix(".txt").write_text(pose.caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def subject_folder() -> Path:
    """Where the embedded subject's pictures and captions lie, in a checkout as in an installed package."""
    return asset("subject")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vismodal.data.subject", description="Draws the embedded subject.")
    parser.add_argument("out", type=Path, help="the folder to write the pictures and their captions to")
    try:
        paths = write_subject(parser.parse_args(argv).out)
    except OSError as error:
        parser.error(str(error))
    print(f"{len(paths)} pictures with captions are in {paths[0].parent}")


if __name__ == "__main__":
    main()
