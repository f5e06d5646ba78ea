"""A model type for configs: any model, with psBN in the place of every BatchNorm."""

from __future__ import annotations

from typing import Any

from mmengine.registry import MODELS
from torch import nn

from .convert import to_psbn


def to_psbn_model(of: str | type[nn.Module], alpha: float = 0.1, **model: Any) -> nn.Module:
    """Build a model of a config and convert it with :func:`to_psbn`; registered as ``ToPsBN``.

    For any config, also of networks with LayerNorm or GroupNorm, which stay, and of models made of
    several detectors: two overrides of a stock command do it, ::

        --cfg-options model.type=psbn_mmdet.ToPsBN model.of=RetinaNet

    or two lines of a config that inherits the other, ``model = dict(type='psbn_mmdet.ToPsBN',
    of='RetinaNet')``. All other keys of ``model`` stay where they are.

    The model itself is returned, converted before anything holds on to its parameters: the wrapper
    for distributed training, the optimizer, EMA. Pretrained BN weights are loaded later and into
    psBN, so the pretrained function is preserved. Testing and ``init_detector`` build the same
    model from the same config.

    Args:
        of: The type that the model has without conversion.
        alpha: As in :func:`to_psbn`.
        **model: The other keys of the model's config.

    Raises:
        TypeError, ValueError: As :func:`to_psbn`: there is no BatchNorm, or one of another kind.
    """
    return to_psbn(MODELS.build(dict(type=of, **model)), alpha)
