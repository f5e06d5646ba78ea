"""Reading checkpoints without running code.

``torch.load(weights_only=True)`` builds tensors, containers and the classes on
an allow-list, and runs nothing that the file says. mmengine's own checkpoints
hold a few harmless classes besides, which importing this module allows;
without it mmengine 0.10 cannot resume under torch >= 2.6.
"""

import codecs
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from torch import Tensor

from ..errors import PsbnError
from .latest import is_whole


class CheckpointError(PsbnError, ValueError):
    """A checkpoint cannot be used; the message is one line that says why and what to do."""


def _history_statistic(owner: Any, name: str) -> Any:
    """Stands in for ``getattr`` in a checkpoint, which could reach anything.

    mmengine's log histories refer to their own four methods by it.
    """
    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f"GLOBAL getattr({owner!r}, {name!r})")


# What mmengine's checkpoints hold besides tensors: the log histories of the
# message hub, and numpy's arrays and scalars in them (numpy 2 renamed its core).
# None of it runs anything when it is built.
_HARMLESS: dict[str, Any] = {
    "mmengine.logging.history_buffer.HistoryBuffer": HistoryBuffer,
    "builtins.getattr": _history_statistic,
    "_codecs.encode": codecs.encode,  # how bytes are pickled
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{
        f"numpy.{core}.multiarray.{rebuild.__name__}": rebuild
        for core in ("core", "_core")
        for rebuild in (np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0])
    },
    **{
        f"numpy.dtypes.{kind.__name__}": kind
        for kind in {
            type(np.dtype(t)) for t in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")
        }
    },
}
_HAS_ALLOW_LIST = hasattr(torch.serialization, "add_safe_globals")  # torch >= 2.4
if _HAS_ALLOW_LIST:
    torch.serialization.add_safe_globals([(found, name) for name, found in _HARMLESS.items()])


class _AllowListUnpickler(pickle.Unpickler):
    """``weights_only`` with :data:`_HARMLESS` for torch < 2.4, which has no allow-list."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = torch._weights_only_unpickler._get_allowed_globals() | _HARMLESS
        module = "builtins" if module == "__builtin__" else module  # protocol 2's name
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return allowed[f"{module}.{name}"]


def _torch_load(path: Path, map_location: Any) -> Any:
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


def load(source: str | os.PathLike, map_location: Any = "cpu") -> Any:
    """Read a checkpoint of any PyTorch project, running nothing that it carries.

    Args:
        source: A file written by ``torch.save``, a ``.safetensors`` file, or the
            URL of either, which is kept in torch's hub cache.
        map_location: As in ``torch.load``.

    Raises:
        CheckpointError: The file is missing, cut off, no checkpoint, or carries
            something other than tensors and plain values.
    """
    text = os.fspath(source)
    path = _download(text) if urlparse(text).scheme in ("http", "https") else Path(text)
    if not path.is_file():
        raise CheckpointError(f"{text}: no such file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path, map_location)
    try:
        with warnings.catch_warnings():
            # torch speaks of a pickle protocol where it is about to refuse a plain pickle.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return _torch_load(path, map_location)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise CheckpointError(
                f"{text}: refused, since it carries {found[1]}, which is neither a tensor nor a "
                "plain value (nothing in it was run); save the model's state_dict() instead"
            ) from None
        raise CheckpointError(f"{text}: is no checkpoint of torch") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if "TorchScript" in str(error):
            reason = "is a TorchScript archive; save the model's state_dict() instead"
        elif not is_whole(path):
            reason = "is cut off or damaged; copy or download it again"
        else:
            reason = f"cannot be read: {str(error).splitlines()[0]}"
        raise CheckpointError(f"{text}: {reason}") from None


def _download(url: str) -> Path:
    """The file of a URL in torch's hub cache, where ``torch.hub`` itself would put it."""
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(url).path))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([a-f0-9]{8,})\.", path.name)
        try:
            torch.hub.download_url_to_file(url, str(path), digest and digest[1])
        except (URLError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{url}: could not be downloaded ({error}); put the file at {path} by hand"
            ) from None
    return path


def _load_safetensors(path: Path, map_location: Any) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"{path}: needs the package safetensors; install it") from None
    try:
        return load_file(path, device=str(map_location))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is no whole safetensors file ({error})") from None


def state_dict_of(checkpoint: Any, name: str = "the checkpoint") -> dict[str, Tensor]:
    """The tensors of a model within what :func:`load` returned, by key.

    Looks where PyTorch projects put them: at the top, or under ``state_dict``
    (mmengine, Lightning), ``model``, ``model_state_dict``, ``net``, ``params``.

    Raises:
        CheckpointError: There is none.
    """
    if isinstance(checkpoint, Mapping):
        keys = ("state_dict", "model", "model_state_dict", "net", "params")
        for candidate in [*(checkpoint.get(key) for key in keys), checkpoint]:
            if isinstance(candidate, Mapping):
                tensors = {k: v for k, v in candidate.items() if isinstance(v, Tensor)}
                if tensors:
                    return tensors
    raise CheckpointError(f"{name}: holds no state dict (a mapping of names to tensors)")
