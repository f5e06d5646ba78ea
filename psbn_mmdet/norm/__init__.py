"""Post-shifted normalization: the layers, and whole models converted from and to plain ones.

- :mod:`.layers`: psBN and psIN, y = BN(x) + alpha (Eq. 6)
- :mod:`.sync`: psSyncBN, statistics over all processes
- :mod:`.convert`: ``to_psbn`` and ``to_bn``
- :mod:`.model`: the model type ``ToPsBN`` for configs
- :mod:`.hook`: ``PsBNHook``, what psBN does in a training, and the lift by alpha
- :mod:`.recognize`: what counts as a norm layer, in a model and in a state dict
- :mod:`.activations`: whether a rectifier, another activation or none follows each norm layer
"""

from .activations import followed_by, rectified
from .convert import to_bn, to_psbn
from .layers import (
    PostShift,
    lift,
    psBN,
    psBN1d,
    psBN2d,
    psBN3d,
    psIN,
    psIN1d,
    psIN2d,
    psIN3d,
    rebase,
)
from .recognize import added_bias, alpha_of, is_norm_layer, is_post_shifted, norm_kinds, norm_layers
from .sync import psSyncBN

__all__ = [
    "PostShift",
    "added_bias",
    "alpha_of",
    "followed_by",
    "is_norm_layer",
    "is_post_shifted",
    "lift",
    "norm_kinds",
    "norm_layers",
    "psBN",
    "psBN1d",
    "psBN2d",
    "psBN3d",
    "psIN",
    "psIN1d",
    "psIN2d",
    "psIN3d",
    "psSyncBN",
    "rebase",
    "rectified",
    "to_bn",
    "to_psbn",
]
