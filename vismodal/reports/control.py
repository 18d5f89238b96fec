"""What a run of `vismodal control` says of its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vismodal.files import write_file

_PRIVATE = ("photos", "data", "model", "output", "resume", "track")  # places on this machine
_MEASURES = {
    "edges": "mean correlation of the edges of what is drawn with those given",
    "picture": "mean cosine of the encoder's features of what is drawn with those of the picture given",
}


def control_card(folder: Path, settings: Mapping[str, Any], parameters: int, agreement: tuple[float, float]) -> Path:
    """README.md of a run's folder: what it is, how well it follows, how to use it, the settings."""
    lines = [f"| {key} | `{value}` |" for key, value in settings.items() if key not in _PRIVATE and value is not None]
    text = _CARD.format(
        control=settings["control"],
        steps=settings["steps"],
        parameters=parameters,
        measure=_MEASURES[settings["control"]],
        before=agreement[0],
        after=agreement[1],
        held_out=settings["held_out"],
        settings="\n".join(["| setting | value |", "| --- | --- |", *lines]),
    )
    return write_file(folder / "README.md", text)


_CARD = """\
# Steered by: {control}

Trained with [vismodal](https://pypi.org/project/vismodal/): {steps} steps, {parameters:,} parameters.

![given, before and after](sheet.png)

| {measure}, {held_out} pictures that were not learnt from | |
| --- | --- |
| the base | {before:.3f} |
| steered | {after:.3f} |

```sh
vismodal generate "a drawing of a cat" --adapters . --conditions picture.png
```

![loss](loss.png)

{settings}
"""
