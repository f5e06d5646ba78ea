"""How a command prints a table: with rich on a terminal, as aligned text into a pipe or file."""

from __future__ import annotations

import importlib.util
import sys

from ..collapse.report import aligned


def show(grid: list[list[str]]) -> None:
    """Print rows of cells, the heads first; the first column to the left, numbers to the right.

    rich comes with mmengine. Without it a terminal gets the text, too.
    """
    if not (sys.stdout.isatty() and importlib.util.find_spec("rich")):
        print("\n".join(aligned(grid)))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    (first, *heads), *rows = grid
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
