"""Post-shifted batch normalization (psBN, arXiv 2001.11216) for the MMDetection ecosystem.

Beside mmengine, importing the package registers its layers and hooks
(:mod:`psbn_mmdet.registry`) and changes nothing else. Without mmengine it needs torch alone, and
its parts are imported when they are used: ``psbn_mmdet.ap`` needs no torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.2.0.dev0"

_LAYERS = ["psBN", "psBN1d", "psBN2d", "psBN3d", "psIN", "psIN1d", "psIN2d", "psIN3d", "psSyncBN"]
_ROOMS = ["ap", "checkpoint", "collapse", "decay", "launch", "norm", "registry", "theory"]
__all__ = [*_LAYERS, "to_bn", "to_psbn"]

if sys.modules.get("mmengine"):
    from . import registry  # noqa: F401


def __getattr__(name: str) -> Any:
    if sys.modules.get("mmengine"):  # imported since
        importlib.import_module(f"{__name__}.registry")
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.norm"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
