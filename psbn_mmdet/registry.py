"""All that the package registers with mmengine; importing this module does it.

The layers, the model type ``ToPsBN`` and the hooks get their names in mmengine's root registries,
so that ``norm_cfg=dict(type='psBN')`` works in every library built on mmengine, and in the scope
``psbn_mmdet``: for a type written ``psbn_mmdet.psBN`` mmengine imports this module by itself, so
such a config needs no import. Names are all that is added; nothing of mmengine is changed.

``import psbn_mmdet`` imports this module where mmengine has been imported before, as it has when a
config's ``custom_imports`` are read; so does the first use of a name of the package. A script that
imports psbn_mmdet before mmengine, and uses no name of it, imports ``psbn_mmdet.registry``.
"""

from __future__ import annotations

from typing import Any

from .installed import check_environment

check_environment()  # before anything below fails in a less helpful way

from mmengine.config.utils import MODULE2PACKAGE  # noqa: E402
from mmengine.registry import HOOKS as MMENGINE_HOOKS  # noqa: E402
from mmengine.registry import MODELS as MMENGINE_MODELS  # noqa: E402
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS  # noqa: E402
from mmengine.registry import Registry, build_runner_from_cfg  # noqa: E402

from . import LAYERS, norm  # noqa: E402
from .norm.model import to_psbn_model  # noqa: E402

MODELS = Registry("model", scope="psbn_mmdet", parent=MMENGINE_MODELS, locations=["psbn_mmdet"])
HOOKS = Registry("hook", scope="psbn_mmdet", parent=MMENGINE_HOOKS, locations=["psbn_mmdet"])
RUNNERS = Registry(
    "runner",
    build_func=build_runner_from_cfg,
    scope="psbn_mmdet",
    parent=MMENGINE_RUNNERS,
    locations=["psbn_mmdet.launch.runner"],  # for runner_type="psbn_mmdet.Runner" in a config
)


def _register(own: Registry, root: Registry, name: str, thing: Any) -> None:
    for registry in (own, root):
        registry.register_module(name, module=thing)


for _name in LAYERS:
    _register(MODELS, MMENGINE_MODELS, _name, getattr(norm, _name))
_register(MODELS, MMENGINE_MODELS, "ToPsBN", to_psbn_model)

# So that configs can inherit `psbn_mmdet::retinanet/...`.
MODULE2PACKAGE["psbn_mmdet"] = "psbn_mmdet"

# Behind the registries, which mmengine.hooks, a second's import, finds filled.
from .collapse.hook import SparsityLoggerHook  # noqa: E402
from .collapse.narrow import stripped_model  # noqa: E402
from .collapse.revive_hook import LiftGamma, ReviveFilters  # noqa: E402
from .decay.hook import AnchoredBiasDecay  # noqa: E402
from .norm.hook import PsBNHook  # noqa: E402

for _hook in (SparsityLoggerHook, AnchoredBiasDecay, PsBNHook, ReviveFilters, LiftGamma):
    _register(HOOKS, MMENGINE_HOOKS, _hook.__name__, _hook)
_register(MODELS, MMENGINE_MODELS, "Stripped", stripped_model)
