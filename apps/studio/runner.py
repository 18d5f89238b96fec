"""One job: a command of vismodal in a process of its own, which says who it is and how it ended.

    python runner.py COMMAND --config FILE      # in the job's folder
    python runner.py --wait NUMBER              # a spare, which becomes one: see warm.py

The web process may be gone by then: `pid` and `exit` are files of the job's folder. `lock`, which this process holds
open from its first moment on, is let go by the system however the process ends.
"""

import os
import signal
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """The exit code of the command."""
    write("pid", os.getpid())
    from vismodal.cli import main as command

    code = command(arguments)
    write("exit", code)
    return code


def write(name: str, number: int) -> None:
    """A file with a number, whole or absent."""
    part = Path(f".{name}.part")
    part.write_text(str(number))
    os.replace(part, name)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have had it ignored
    given = sys.argv[1:]
    if given[0] == "--wait":
        from vismodal.cli import load_app

        given = load_app("studio.warm").wait(int(given[1]))
    sys.exit(main(given) if given else 0)
