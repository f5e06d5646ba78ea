"""The registry scope ``psbn_mmdet``.

For a type written ``psbn_mmdet.psBN`` mmengine imports ``psbn_mmdet.registry``
by itself, so such a config needs no import.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import Registry, build_runner_from_cfg

MODELS = Registry("model", scope="psbn_mmdet", parent=MMENGINE_MODELS, locations=["psbn_mmdet"])
HOOKS = Registry("hook", scope="psbn_mmdet", parent=MMENGINE_HOOKS, locations=["psbn_mmdet"])
RUNNERS = Registry(
    "runner",
    scope="psbn_mmdet",
    parent=MMENGINE_RUNNERS,
    build_func=build_runner_from_cfg,
    locations=["psbn_mmdet.launch.runner"],
)
