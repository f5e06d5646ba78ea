"""The registry scope ``psbn_mmdet``.

For a type written ``psbn_mmdet.psBN`` mmengine imports ``psbn_mmdet.registry``
by itself, so such a config needs no import.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry("model", scope="psbn_mmdet", parent=MMENGINE_MODELS, locations=["psbn_mmdet"])
HOOKS = Registry("hook", scope="psbn_mmdet", parent=MMENGINE_HOOKS, locations=["psbn_mmdet"])
