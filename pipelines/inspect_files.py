"""What is in a file of an adapter or of tokens: its format, method, ranks, sites, base, trigger words, and doubts.

    vismodal inspect sks.safetensors
    vismodal inspect --json loras/*.safetensors > loras.json

The same from Python: `print(vismodal.formats.summary.inspect("sks.safetensors"))`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vismodal.errors import InputError
from vismodal.formats.summary import Summary, inspect


@dataclass(frozen=True)
class Config:
    """Say what is in files of adapters and tokens, of vismodal or of other tools.

    Args:
        files: safetensors files; of textual inversion also .pt and .bin.
        json: print JSON instead of tables.
    """

    files: tuple[Path, ...] = ()
    json: bool = False

    POSITIONAL: ClassVar[str] = "files"


def main(config: Config) -> dict[str, Summary]:
    """Prints and gives what is in each file."""
    if not config.files:
        raise InputError("no file; write one, such as sks.safetensors")
    found = {str(path): inspect(path.expanduser()) for path in config.files}
    if config.json:
        print(json.dumps({path: summary.as_dict() for path, summary in found.items()}, indent=1, ensure_ascii=False))
        return found
    for i, (path, summary) in enumerate(found.items()):
        print("\n" * bool(i) + f"{path}\n{summary}")
    return found


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["inspect", *sys.argv[1:]]))
