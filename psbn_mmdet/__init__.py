"""Post-shifted batch normalization (psBN, arXiv 2001.11216) for the MMDetection ecosystem.

Where mmengine is there, the layers and hooks are registered (:mod:`psbn_mmdet.registry`) and
nothing else is changed: at once if mmengine has been imported before, as it has when a config's
``custom_imports`` are read, or else when a name of this package is first used. Without mmengine the
package needs torch alone, and ``psbn_mmdet.ap`` not even that.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

__version__ = "0.2.0"

# Here, so that they are known without torch; registered under the same names.
LAYERS = ["psBN", "psBN1d", "psBN2d", "psBN3d", "psIN", "psIN1d", "psIN2d", "psIN3d", "psSyncBN"]
_ROOMS = [
    "ap",
    "checkpoint",
    "collapse",
    "commands",
    "decay",
    "launch",
    "norm",
    "registry",
    "theory",
]
__all__ = [*LAYERS, "to_bn", "to_psbn"]

if sys.modules.get("mmengine"):
    from . import registry  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in (*_ROOMS, *__all__):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "ap" and _has_mmengine():
        importlib.import_module(f"{__name__}.registry")
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.norm"), name)


def _has_mmengine() -> bool:
    if "mmengine" in sys.modules:
        return sys.modules["mmengine"] is not None
    spec = find_spec("mmengine")
    return spec is not None and spec.origin is not None  # else folders that an uninstall has left


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
