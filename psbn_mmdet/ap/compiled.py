"""What runs a million times, compiled by numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``numba.njit`` that releases the GIL and keeps what it compiled for the next time.

    numba keeps it beside the module or, where that cannot be written, in the user's cache folder
    (or in NUMBA_CACHE_DIR). Where neither can, it raises; here nothing is kept then.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)
