"""Post-shifted batch normalization (psBN, arXiv 2001.11216) for the MMDetection ecosystem.

Importing the package registers its layers, under their own names for every
library built on mmengine and under the scope ``psbn_mmdet``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from .installed import check_environment

check_environment()  # before anything below fails in a less helpful way

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS

from . import checkpoint, norm  # noqa: F401  checkpoint allows what mmengine's own hold
from .norm import (
    psBN,
    psBN1d,
    psBN2d,
    psBN3d,
    psIN,
    psIN1d,
    psIN2d,
    psIN3d,
    psSyncBN,
    to_bn,
    to_psbn,
)
from .norm.model import to_psbn_model
from .registry import HOOKS, MODELS

__version__ = "0.1.0"

__all__ = [
    "psBN",
    "psBN1d",
    "psBN2d",
    "psBN3d",
    "psIN",
    "psIN1d",
    "psIN2d",
    "psIN3d",
    "psSyncBN",
    "to_bn",
    "to_psbn",
]

for _name in __all__:
    if _name.startswith("ps"):
        for _registry in (MODELS, MMENGINE_MODELS):
            _registry.register_module(_name, force=True, module=getattr(norm, _name))
for _registry in (MODELS, MMENGINE_MODELS):
    _registry.register_module("ToPsBN", force=True, module=to_psbn_model)


def _on_use(module: str, name: str) -> Callable[..., Any]:
    """A builder that is imported when a config names it: mmengine.hooks takes a second."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return build


for _module, _name in [
    ("psbn_mmdet.collapse.hook", "SparsityLoggerHook"),
    ("psbn_mmdet.decay.hook", "AnchoredBiasDecay"),
]:
    for _registry in (HOOKS, MMENGINE_HOOKS):
        _registry.register_module(_name, force=True, module=_on_use(_module, _name))

for _registry in (MODELS, MMENGINE_MODELS):
    _registry.register_module(
        "Stripped",
        force=True,
        module=_on_use("psbn_mmdet.collapse.stripping.model", "stripped_model"),
    )

# So that configs can inherit `psbn_mmdet::retinanet/...`.
MODULE2PACKAGE["psbn_mmdet"] = "psbn_mmdet"
