"""Checkpoints: read without running code, converted, checked against a model, the last whole one.

- :mod:`.pickles`: the pickles within them, read as data
- :mod:`.schemes`: which file or URL a name stands for
- :mod:`.read`: files and URLs of any PyTorch project
- :mod:`.unwrap`: the one state dict within, by the model's own names
- :mod:`.fit`: whether it gives a model the function it was saved with
- :mod:`.convert`: state dicts from BN to psBN and back
- :mod:`.latest`: the newest checkpoint of a work dir that was written to its end
- :mod:`.install`: the same for all that mmengine loads; importing the package is enough
- :mod:`.loaders`: the hook that holds a Runner to loading all or nothing
"""

from .convert import bn_state_dict, convert_all, psbn_state_dict
from .fit import mismatch, require_fit
from .install import install
from .latest import latest_whole
from .read import is_whole, load, meta_of
from .unwrap import CheckpointError, locate, state_dict_of

install()

__all__ = [
    "CheckpointError",
    "bn_state_dict",
    "convert_all",
    "is_whole",
    "latest_whole",
    "load",
    "locate",
    "meta_of",
    "mismatch",
    "psbn_state_dict",
    "require_fit",
    "state_dict_of",
]
