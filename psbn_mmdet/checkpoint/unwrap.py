"""The one state dict of a checkpoint, however its project wrapped it.

Every reader of this package and, once it is imported, everything that mmengine loads goes through
:func:`state_dict_of`, so that what is checked, measured or converted is what is loaded.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PsbnError

WEIGHTS = ("state_dict", "model", "model_state_dict", "model_state", "net", "params", "module")
"""Where projects keep the weights of a model: mmengine and Lightning, detectron2 and timm, ..."""

AVERAGES = (
    "state_dict_ema",
    "model_ema",
    "params_ema",
    "ema_state_dict",
    "ema_model",
    "ema",
    "model_ema_state_dict",
)
"""Where they keep an average of these; read only where there are no weights beside it."""

_COUNTERS = ("steps", "n_averaged")  # what an averaged model counts beside its `module.*`


class CheckpointError(PsbnError, ValueError):
    """A checkpoint cannot be used; the message is one line that says why and what to do."""


def state_dict_of(checkpoint: Any, name: str = "the checkpoint") -> "OrderedDict[str, Tensor]":
    """The tensors of a model within what :func:`load` returned, by the names of its modules.

    They are looked for under :data:`WEIGHTS`, within one another where they are nested, then under
    :data:`AVERAGES`, then at the top. NumPy arrays become tensors. What wraps a model while it
    trains is taken off the keys: ``module.`` in front of all (DistributedDataParallel, averages)
    and ``_orig_mod.`` anywhere (``torch.compile``). Versions of modules (``_metadata``) are kept.

    Raises:
        CheckpointError: There is none, or more than one could be meant.
    """
    found = checkpoint
    for key in locate(checkpoint, name):
        found = found[key]
    tensors = tensors_of(found, name)
    others = [key for key in tensors if key not in _COUNTERS]
    wrapped = all(key.startswith(("module.", "_orig_mod.")) for key in others)
    if wrapped and len(others) < len(tensors):
        tensors = _renamed(tensors, {key: key for key in others}.get, name)
    while others and all(key.startswith("module.") for key in others):
        tensors = _renamed(tensors, lambda key: key.removeprefix("module."), name)
        others = list(tensors)
    return _renamed(tensors, without_compiled, name)


def without_compiled(key: str) -> str:
    """A key or module name without what ``torch.compile`` puts into it."""
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


def locate(checkpoint: Any, name: str = "the checkpoint") -> tuple[str, ...]:
    """The keys that lead to the state dict of a checkpoint; none where it is one itself.

    Raises:
        CheckpointError: As in :func:`state_dict_of`.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{name}: holds no state dict (a mapping of names to tensors)")
    for places in (WEIGHTS, AVERAGES):
        held = [key for key in places if _holds_tensors(checkpoint.get(key))]
        if held[:1] == ["state_dict"]:  # mmengine reads it, whatever stands beside it
            held = ["state_dict"]
        if len(held) > 1:
            raise CheckpointError(
                f"{name}: holds several state dicts ({', '.join(held)}), so which one is meant is "
                "unknown; save one of them as state_dict"
            )
        if held:
            beside = [key for key, value in checkpoint.items() if _is_weight(key, value)]
            if beside:
                raise CheckpointError(
                    f"{name}: holds tensors under {held[0]} and beside it, as {beside[0]}, so "
                    "which are meant is unknown; save one state dict"
                )
            return (held[0], *locate(checkpoint[held[0]], name))
    if not any(isinstance(value, Tensor | np.ndarray) for value in checkpoint.values()):
        inside = [str(key) for key, value in checkpoint.items() if _holds_tensors(value)]
        hint = f"; there are tensors under {', '.join(inside[:5])}: save these" if inside else ""
        raise CheckpointError(f"{name}: holds no state dict (a mapping of names to tensors){hint}")
    return ()


def tensors_of(mapping: Mapping[str, Any], name: str) -> "OrderedDict[str, Tensor]":
    """The tensors of a mapping as PyTorch's modules load them, and nothing lost without a word.

    Plain values (an epoch, a flag) are left out; modules load none of them, except the
    ``_extra_state`` of their own.

    Raises:
        CheckpointError: Tensors are nested deeper, or the names are no strings.
    """
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in mapping.items():
        if isinstance(value, np.ndarray | np.number) and value.dtype.kind in "fiub":
            value = torch.as_tensor(np.array(value))
        if _holds_tensors(value):
            raise CheckpointError(
                f"{name}: the tensors under {key} stand in a mapping of their own beside other "
                "tensors; save them in one state dict, with names such as "
                f"{key}.{next(iter(value))}"
            )
        if isinstance(value, Tensor) and not isinstance(key, str):
            raise CheckpointError(f"{name}: its tensors have numbers for names, as {key!r}")
        if isinstance(value, Tensor) or str(key).endswith("_extra_state"):
            tensors[key] = value
    tensors._metadata = getattr(mapping, "_metadata", None) or OrderedDict()
    return tensors


def _is_weight(key: Any, value: Any) -> bool:
    """Whether an entry belongs to a state dict: ``conv1.weight``, but no counter of epochs."""
    return isinstance(value, Tensor | np.ndarray) and "." in str(key)


def _holds_tensors(value: Any) -> bool:
    """Whether there are tensors with names in a mapping.

    The state of an optimizer goes by numbers, so it has none.
    """
    return isinstance(value, Mapping) and any(
        isinstance(key, str) and (isinstance(v, Tensor | np.ndarray) or _holds_tensors(v))
        for key, v in value.items()
    )


def _renamed(
    tensors: "OrderedDict[str, Tensor]", rename: Callable[[str], str | None], name: str
) -> "OrderedDict[str, Tensor]":
    """A state dict under other names; those for which there is none are left out."""
    names = {key: new for key in tensors if (new := rename(key)) is not None}
    if len(set(names.values())) < len(names):
        taken = next(new for key, new in names.items() if key != new and new in tensors)
        raise CheckpointError(f"{name}: holds {taken} twice, once as the model was wrapped")
    renamed = OrderedDict((new, tensors[key]) for key, new in names.items())
    # A module's own name is that of its tensors without the last part.
    renamed._metadata = OrderedDict(
        ((rename(f"{module}.x".lstrip(".")) or "").rpartition(".")[0], version)
        for module, version in tensors._metadata.items()
    )
    return renamed
