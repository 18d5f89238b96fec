"""Plain-text and Markdown tables, one look for every `print` of the library and for the README."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned in plain text; `rich` draws them, imported here since most runs print no table."""
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*head, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in rows:
        drawn.add_row(*row)
    console = Console(file=StringIO(), width=160, color_system=None, force_jupyter=False, markup=False, highlight=False)
    console.print(drawn)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")  # type: ignore[attr-defined]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub-flavoured Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True, repr=False)
class Listing:
    """Rows that print as a table; `markdown()` is the same for a README."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return table(self.head, self.rows)

    def markdown(self) -> str:
        return markdown(self.head, self.rows)
