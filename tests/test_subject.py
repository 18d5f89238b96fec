"""The embedded subject: the committed pictures are what the code draws, suit the tiny model, and are found."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vismodal import paths
from vismodal.data.photos import read_photos
from vismodal.data.subject import CLASS_PROMPT, POSES, PROMPT, draw, main, subject_folder
from vismodal.errors import InputError
from vismodal.paths import asset

COLOURS = {"teal": (46, 196, 182), "orange": (255, 138, 31), "yellow": (255, 217, 59), "red": (229, 53, 63)}
BUDGET = 150_000  # bytes of the whole folder


def share(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    """How much of the picture is within 40 of a colour."""
    return float((np.abs(picture.astype(int) - colour).max(axis=-1) <= 40).mean())


def test_drawing_anew_gives_the_committed_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path / "new")])
    assert str(tmp_path / "new") in capsys.readouterr().out
    names = sorted(path.name for path in subject_folder().iterdir())
    assert names == sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == sorted(f"{i}.{suffix}" for i in range(1, 7) for suffix in ("png", "txt"))
    for name in names:
        committed, drawn = subject_folder() / name, tmp_path / "new" / name
        if name.endswith("txt"):
            assert committed.read_bytes() == drawn.read_bytes()
        else:  # the files' bytes depend on zlib's version, the pixels must not
            assert np.array_equal(np.asarray(Image.open(committed)), np.asarray(Image.open(drawn))), name


def test_drawing_is_deterministic() -> None:
    assert all(draw(pose).tobytes() == draw(pose).tobytes() for pose in POSES[1:3])


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "vismodal.data.subject", str(tmp_path / "out")],
        cwd=Path(paths.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 6


def test_a_file_in_the_way_is_a_short_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "out")])
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err


def test_the_folder_reads_as_photos_with_captions() -> None:
    found = read_photos(subject_folder())
    assert len(found.photos) == len(POSES) == 6 and not found.rejected
    for photo, pose in zip(found.photos, POSES, strict=True):
        assert photo.image.size == (256, 256)
        assert photo.caption == f"{PROMPT} on a {pose.background} background"
    assert "sks robot" in PROMPT and "robot" in CLASS_PROMPT and "sks" not in CLASS_PROMPT
    assert sum(path.stat().st_size for path in subject_folder().iterdir()) <= BUDGET


def test_every_background_is_another_and_the_robot_lies_whole_on_it() -> None:
    pictures = [np.asarray(draw(pose)) for pose in POSES]
    backgrounds = {tuple(picture[0, 0].tolist()) for picture in pictures}
    assert len(backgrounds) == len({pose.background for pose in POSES}) == 6
    for picture in pictures:
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (border == picture[0, 0]).all()
        rows = np.flatnonzero((picture != picture[0, 0]).any(axis=(1, 2)))
        # The tiny model's training pictures show things at 44 to 60 of 64 pixels.
        assert 44 / 64 - 0.02 <= (rows[-1] - rows[0] + 1) / 256 <= 63 / 64


def test_the_colours_survive_at_64_pixels() -> None:
    for pose in POSES:
        small = np.asarray(draw(pose).resize((64, 64), Image.Resampling.BICUBIC))
        found = {name: share(small, colour) for name, colour in COLOURS.items()}
        assert found["teal"] > 0.05 and min(found.values()) > 0.003, (pose.background, found)


# --- where it lies


def test_an_installed_package_has_its_assets_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "vismodal"
    (package / "assets" / "subject").mkdir(parents=True)
    (tmp_path / "site-packages" / "assets" / "subject").mkdir(parents=True)  # another project's
    monkeypatch.setattr(paths, "_PACKAGE", package)
    assert subject_folder() == package / "assets" / "subject"


def test_another_projects_assets_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets" / "subject").mkdir(parents=True)
    (tmp_path / "vismodal").mkdir()
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "vismodal")
    with pytest.raises(InputError, match="this installation has no assets folder"):
        asset("subject")
    (tmp_path / "pipelines").mkdir()  # a checkout
    assert asset("subject") == tmp_path / "assets" / "subject"


@pytest.mark.parametrize("name", ["nothing", ""])
def test_an_unknown_asset_says_what_there_is(name: str) -> None:
    with pytest.raises(InputError, match=rf"no embedded '{name}': .*subject.*write one of these"):
        asset(name)
