"""What all contestants on a classification task share: the data, the model, and how both are scored."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vismodal.classification.learning import Run, Scores, answers, score
from vismodal.classification.vision import Vision
from vismodal.data.digits import digits_folder
from vismodal.data.folder import Folder, few, read_folder
from vismodal.data.views import Views


@dataclass(frozen=True)
class Bench:
    """The task.

    Args:
        folder: the data.
        vision: the base model, on its device.
        accelerator: device, precision, processes.
        output: the run's folder.
        batch: pictures in a forward pass of scoring.
        val: what selection sees.
        test: what it does not; None where there is none.
    """

    folder: Folder
    vision: Vision
    accelerator: Accelerator
    output: Path
    batch: int
    val: Views
    test: Views | None

    def scores(self, model: Run, views: Views) -> Scores:
        """Of the model as it stands."""
        return score(answers(model, views, self.batch, self.accelerator.autocast), views.labels)

    def figures(self, model: Run) -> dict[str, Any]:
        """The scores of both parts as JSON values; no test is None."""
        parts = {"val": self.val, "test": self.test}
        return {part: asdict(self.scores(model, views)) if views else None for part, views in parts.items()}


def read_data(data: Path | None, val: float, test: float, seed: int, shots: int, accelerator: Accelerator) -> Folder:
    """The pictures of a folder, or without one the digits; what is left out or odd is a note, and told on stderr."""
    with accelerator.main_process_first():
        root = data.expanduser() if data else digits_folder(Path("runs") / "digits")
    folder = read_folder(root, val=val, test=test, seed=seed)
    notes = list(folder.notes) + (few(folder, shots, seed)[1] if shots else [])
    if not folder.test:
        notes.append("there is no test part: the figures are of validation data, which also chose the epoch")
    if accelerator.is_main_process:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    return replace(folder, notes=tuple(notes))
