"""What a checkpoint may hold besides tensors, and ``torch.load`` held to it.

``torch.load(weights_only=True)`` builds tensors, containers and the classes on an allow-list, and
runs nothing that the file says. Importing this module puts on that list what mmengine's own
checkpoints hold; without it mmengine 0.10 cannot resume under torch >= 2.6.
"""

from __future__ import annotations

import codecs
import collections
import pickle
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging.history_buffer import HistoryBuffer


def _one_cycle(*args: Any) -> Any:
    """Stands for ``OneCycleParamScheduler``, which a checkpoint must not construct."""
    raise pickle.UnpicklingError("GLOBAL OneCycleParamScheduler")


def _getattr(owner: Any, name: str) -> Any:
    """Stands for ``getattr`` in a checkpoint, which could reach anything.

    mmengine's log histories refer to their own four methods by it, its one-cycle schedules to
    their two curves.
    """
    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(owner, name)
    if owner is _one_cycle and name in ("_annealing_cos", "_annealing_linear"):
        schedulers = import_module("mmengine.optim.scheduler.param_scheduler")
        return getattr(schedulers.OneCycleParamScheduler, name)
    raise pickle.UnpicklingError(f"GLOBAL getattr({owner!r}, {name!r})")


_REBUILD: tuple[Any, ...] = (np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0])
# None of it runs anything when it is built. numpy's arrays and scalars of numbers and strings, not
# of objects, stand in log histories and in what data sets say of themselves; numpy 2 renamed its
# core.
_ALLOWED: dict[str, Any] = {
    "mmengine.logging.history_buffer.HistoryBuffer": HistoryBuffer,
    "mmengine.config.config.ConfigDict": ConfigDict,
    "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler": _one_cycle,
    "builtins.getattr": _getattr,
    # On torch's own list from some later version on.
    **{f"builtins.{kind.__name__}": kind for kind in (set, bytearray, complex)},
    "collections.Counter": collections.Counter,
    "_codecs.encode": codecs.encode,  # how bytes are pickled
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{
        f"numpy.{core}.multiarray.{rebuild.__name__}": rebuild
        for core in ("core", "_core")
        for rebuild in _REBUILD
    },
    **{
        f"numpy.dtypes.{kind.__name__}": kind
        for kind in {type(np.dtype(code)) for code in "?bhilBHILefdFDUS"}
    },
}
# Named pairs on torch's own list are there from torch 2.6 on.
_HAS_ALLOW_LIST = torch.__version__ >= "2.6"  # a TorchVersion, which compares as one
if _HAS_ALLOW_LIST:
    torch.serialization.add_safe_globals([(value, name) for name, value in _ALLOWED.items()])


class _AllowListUnpickler(pickle.Unpickler):
    """``weights_only`` with :data:`_ALLOWED` for torch < 2.6."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {**torch._weights_only_unpickler._get_allowed_globals(), **_ALLOWED}
        module = "builtins" if module == "__builtin__" else module  # protocol 2's name
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return allowed[f"{module}.{name}"]


def torch_load(path: Path, map_location: Any) -> Any:
    """``torch.load``, running nothing; raises what that raises."""
    if _HAS_ALLOW_LIST:
        return torch.load(path, map_location=map_location, weights_only=True)
    module = SimpleNamespace(
        __name__=__name__,
        Unpickler=_AllowListUnpickler,
        load=lambda file, **kwargs: _AllowListUnpickler(file, **kwargs).load(),
    )
    loaded = torch.load(path, map_location=map_location, pickle_module=module)
    if isinstance(loaded, torch.jit.ScriptModule):
        raise RuntimeError("a TorchScript archive")
    return loaded
