"""Checkpoints: read without running code, converted, checked against a model, the last whole one.

- :mod:`.read`: files and URLs of any PyTorch project
- :mod:`.loaders`: the same for whatever mmengine loads
- :mod:`.convert`: state dicts from BN to psBN and back
- :mod:`.fit`: whether a checkpoint gives a model the function it was saved with
- :mod:`.latest`: the newest checkpoint of a work dir that was written to its end
"""

from .convert import bn_state_dict, psbn_state_dict
from .fit import mismatch, require_fit
from .latest import is_whole, latest_whole
from .read import CheckpointError, load, state_dict_of

__all__ = [
    "CheckpointError",
    "bn_state_dict",
    "is_whole",
    "latest_whole",
    "load",
    "mismatch",
    "psbn_state_dict",
    "require_fit",
    "state_dict_of",
]
