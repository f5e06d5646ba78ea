"""Post-shifted normalization: the layers, and whole models converted from and to plain ones.

- :mod:`.layers`: psBN and psIN, y = BN(x) + alpha (Eq. 6)
- :mod:`.sync`: psSyncBN, statistics over all processes
- :mod:`.convert`: ``to_psbn`` and ``to_bn``
- :mod:`.rectified`: which norm layers a rectifier follows
"""

from .convert import to_bn, to_psbn
from .layers import (
    PostShift,
    psBN,
    psBN1d,
    psBN2d,
    psBN3d,
    psIN,
    psIN1d,
    psIN2d,
    psIN3d,
)
from .rectified import rectified
from .sync import psSyncBN

__all__ = [
    "PostShift",
    "psBN",
    "psBN1d",
    "psBN2d",
    "psBN3d",
    "psIN",
    "psIN1d",
    "psIN2d",
    "psIN3d",
    "psSyncBN",
    "rectified",
    "to_bn",
    "to_psbn",
]
