"""How mmengine reads checkpoints once this module is imported (``custom_imports``).

- local files and URLs run no code, whatever the version of torch;
- ``torchvision://NAME`` needs no torchvision: mmengine itself ships the table of
  the files that these names stand for.

And :class:`CheckpointGuard`, which stops where mmengine would go on with a
warning and a network that computes something else.
"""

from pathlib import Path
from typing import Any

import mmengine
from mmengine.dist import barrier, get_rank
from mmengine.hooks import Hook
from mmengine.runner import CheckpointLoader, Runner

from .fit import require_fit
from .read import CheckpointError, load

_TABLE = Path(mmengine.__path__[0], "hub", "torchvision_0.12.json")


def load_local(filename: str, map_location: Any = "cpu") -> Any:
    return load(filename, map_location or "cpu")


def load_url(filename: str, map_location: Any = "cpu") -> Any:
    if get_rank() == 0:  # who downloads, for all on a shared disk
        load(filename, "meta")
    barrier()
    return load(filename, map_location or "cpu")


def load_torchvision(filename: str, map_location: Any = "cpu") -> Any:
    name = filename.partition("://")[2]
    table = mmengine.load(_TABLE)
    if name not in table:
        raise CheckpointError(f"{filename}: no such file in {_TABLE}; give its URL instead")
    return load_url(table[name], map_location)


for _prefixes, _loader in [
    ("", load_local),
    (("http://", "https://"), load_url),
    (("torchvision://", "modelzoo://"), load_torchvision),
]:
    CheckpointLoader.register_scheme(_prefixes, _loader, force=True)


class CheckpointGuard(Hook):
    """:func:`require_fit` for whatever a Runner loads.

    Args:
        strict: True for testing; a resumed run is always held to it.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = getattr(runner.model, "module", runner.model)
        require_fit(model, checkpoint, runner._load_from, self.strict or runner._resume)
