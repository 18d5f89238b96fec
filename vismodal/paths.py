"""Where the files that come with the package lie: embedded models and pictures.

In a checkout they are in `assets/` beside the package; the wheel maps that folder to `vismodal/assets/`. The module is
not called `assets`, so that it does not hide behind that folder.
"""

from pathlib import Path

from vismodal.errors import InputError

_PACKAGE = Path(__file__).resolve().parent


def _assets() -> Path | None:
    """The folder of embedded files, or None where there is none."""
    installed = _PACKAGE / "assets"
    if installed.is_dir():
        return installed
    checkout = _PACKAGE.parent
    # Only a checkout has pipelines/ beside the package: a foreign `site-packages/assets` must not pass for ours.
    if (checkout / "assets").is_dir() and (checkout / "pipelines").is_dir():
        return checkout / "assets"
    return None


def asset(name: str) -> Path:
    """The file or folder `name` (like "subject" or "tiny-sd/unet") that comes with the package.

    Raises InputError that lists what there is, if `name` is not among it.
    """
    root = _assets()
    if root is None:
        raise InputError(
            f"no embedded {name!r}: this installation has no assets folder beside or in {_PACKAGE}; "
            "install vismodal from its wheel or run it in a whole checkout"
        )
    path = root / name
    if not name or not path.exists():
        there = ", ".join(sorted(p.name for p in root.iterdir() if not p.name.startswith("."))) or "nothing"
        raise InputError(f"no embedded {name!r}: {root} holds {there}; write one of these")
    return path
