"""What commands show: with rich on a terminal, as plain text into a pipe or file.

rich comes with mmengine and with the extra ``ap``. Without it a terminal gets the plain text, too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")


def show(grid: list[list[str]]) -> None:
    """Print rows of cells, the heads first; the first column to the left, numbers to the right."""
    if not _draws(sys.stdout):
        from ..collapse.report import aligned

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


def show_markdown(text: str) -> None:
    """Print Markdown: drawn on a terminal, and as it is into a pipe or file, to be pasted."""
    if not _draws(sys.stdout):
        print(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


def progress(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """The items, with a bar on stderr while they are taken, where that is a terminal."""
    if not _draws(sys.stderr):
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total, console=Console(stderr=True), transient=True)


def working(what: str) -> AbstractContextManager[Any]:
    """Within it stderr says what is being done, where that is a terminal."""
    if not _draws(sys.stderr):
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)


def _draws(stream: TextIO) -> bool:
    return stream.isatty() and importlib.util.find_spec("rich") is not None
