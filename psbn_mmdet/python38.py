"""What Python gained after 3.8, the version of mmdet's installation page, as newer ones have it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T")

if TYPE_CHECKING:
    zip_strict = zip
else:

    def zip_strict(*iterables: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
        """Pair the items of iterables of equal length: `zip(..., strict=True)` of Python 3.10.

        Raises:
            ValueError: one has fewer items than another, once the shortest is used up.
        """
        if sys.version_info >= (3, 10):
            return zip(*iterables, strict=True)
        return _zip_strict(iterables)


_MISSING = object()


def _zip_strict(iterables: tuple[Iterable[Any], ...]) -> Iterator[tuple[Any, ...]]:
    for items in itertools.zip_longest(*iterables, fillvalue=_MISSING):
        if any(item is _MISSING for item in items):
            raise ValueError("zip_strict() has iterables of different lengths")
        yield items


def pairwise(items: Iterable[T]) -> Iterator[tuple[T, T]]:
    """Pair each item with the next: `itertools.pairwise` of Python 3.10."""
    first, second = itertools.tee(items)
    next(second, None)
    return zip(first, second)


def removeprefix(text: str, prefix: str) -> str:
    """Take `prefix` from the front of `text` if it is there: `str.removeprefix` of Python 3.9."""
    return text[len(prefix) :] if text.startswith(prefix) else text


def removesuffix(text: str, suffix: str) -> str:
    """Take `suffix` from the end of `text` if it is there: `str.removesuffix` of Python 3.9."""
    return text[: len(text) - len(suffix)] if text.endswith(suffix) else text
