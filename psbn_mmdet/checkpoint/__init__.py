"""Checkpoints: read without running code, converted, loaded into a model, the last whole one.

- :mod:`.pickles`: the pickles within them, read as data
- :mod:`.read`: files and URLs of any PyTorch project
- :mod:`.unwrap`: the one state dict within, by the model's own names
- :mod:`.weights`: loading it into a model, all or nothing
- :mod:`.convert`: state dicts from BN to psBN and back
- :mod:`.latest`: the newest checkpoint of a work dir that was written to its end
"""

from .convert import bn_config, bn_state_dict, convert_all, psbn_state_dict
from .latest import latest_whole
from .read import is_whole, load, meta_of
from .unwrap import CheckpointError, locate, state_dict_of
from .weights import load_weights

__all__ = [
    "CheckpointError",
    "bn_config",
    "bn_state_dict",
    "convert_all",
    "is_whole",
    "latest_whole",
    "load",
    "load_weights",
    "locate",
    "meta_of",
    "psbn_state_dict",
    "state_dict_of",
]
