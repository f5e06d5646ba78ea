"""The one state dict of a checkpoint, however its project wrapped it.

Every reader of this package and all that mmengine loads go through :func:`state_dict_of`, so what
is checked, measured or converted is what is loaded.
"""

from __future__ import annotations

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


def state_dict_of(checkpoint: Any, name: str = "the checkpoint") -> OrderedDict[str, Tensor]:
    """The tensors of a model within what :func:`load` returned, by the names of its modules.

    They are looked for under :data:`WEIGHTS`, within one another where they are nested, then under
    any other name if one container alone holds names like ``conv1.weight``, then under
    :data:`AVERAGES`, then at the top. NumPy arrays become tensors. What wraps a model while it
    trains is taken off the keys: ``module.`` in front of all (DistributedDataParallel, averages)
    and ``_orig_mod.`` anywhere (``torch.compile``). Versions of modules (``_metadata``) are kept.

    Raises:
        CheckpointError: There is none, or more than one could be meant.
    """
    content = checkpoint
    for key in locate(checkpoint, name):
        content = content[key]
    tensors = _tensors_of(content, name)
    while True:
        unwrapped = _renamed(tensors, _without_compiled, name)
        named = [key for key in unwrapped if key not in _COUNTERS]
        if not named or not all(key.startswith("module.") for key in named):
            return unwrapped
        for counter in unwrapped.keys() - {*named}:
            del unwrapped[counter]
        tensors = _renamed(unwrapped, lambda key: key.removeprefix("module."), name)


def _without_compiled(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


def locate(checkpoint: Any, name: str = "the checkpoint") -> tuple[str, ...]:
    """The keys that lead to the state dict of a checkpoint; none where it is one itself.

    Raises:
        CheckpointError: As in :func:`state_dict_of`.
    """
    nothing = f"{name}: holds no state dict (a mapping of names to tensors)"
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(nothing)
    at_the_top = any(is_array(value) for value in checkpoint.values())
    others = [k for k, v in checkpoint.items() if k not in WEIGHTS + AVERAGES and _is_container(v)]
    for places in (WEIGHTS, others if len(others) == 1 and not at_the_top else (), AVERAGES):
        held = [key for key in places if holds_tensors(checkpoint.get(key))]
        if held[:1] == ["state_dict"]:  # mmengine reads it, whatever stands beside it
            held = ["state_dict"]
        if len(held) > 1:
            raise CheckpointError(
                f"{name}: holds several state dicts ({', '.join(held)}), so it is not "
                "clear which one to use; save one of them as state_dict"
            )
        if held:
            beside = [key for key, value in checkpoint.items() if _is_weight(key, value)]
            if beside:
                raise CheckpointError(
                    f"{name}: holds tensors in {held[0]} and beside it (e.g. {beside[0]}), so "
                    "it is not clear which to use; save one state dict"
                )
            return (held[0], *locate(checkpoint[held[0]], name))
    if at_the_top:
        return ()
    inside = [str(key) for key, value in checkpoint.items() if holds_tensors(value)]
    hint = f"; there are tensors under {', '.join(inside[:5])}: save one of them" if inside else ""
    raise CheckpointError(nothing + hint)


def _tensors_of(mapping: Mapping[str, Any], name: str) -> OrderedDict[str, Tensor]:
    """The tensors of a mapping as PyTorch's modules load them; none is lost without a word.

    Plain values (an epoch, a flag) are left out; modules load none of them, except the
    ``_extra_state`` of their own.

    Raises:
        CheckpointError: Tensors are nested deeper, or the names are no strings.
    """
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in mapping.items():
        if not isinstance(key, str) and (is_array(value) or holds_tensors(value)):
            raise CheckpointError(
                f"{name}: a tensor is named {key!r}, so this is not the state dict of a model"
            )
        if holds_tensors(value) and not str(key).endswith("_extra_state"):
            raise CheckpointError(
                f"{name}: the tensors in {key} are in a container of their own beside "
                "other tensors; save all of them in one flat state dict"
            )
        if is_array(value):
            tensors[key] = as_tensor(value)
        elif str(key).endswith("_extra_state"):
            tensors[key] = value
    _set_versions(tensors, _versions(mapping))
    return tensors


def is_array(value: Any) -> bool:
    """Whether it is a tensor, or a NumPy array of numbers."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.kind in "fiubc"
    return isinstance(value, Tensor)


def as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))


def holds_tensors(value: Any) -> bool:
    """Whether a container holds tensors that are, by their names, those of a model.

    The state of an optimizer goes by numbers, so it has none.
    """
    if isinstance(value, Mapping):
        return any(
            isinstance(k, str) and (is_array(v) or holds_tensors(v)) for k, v in value.items()
        )
    if isinstance(value, (list, tuple)):
        return any(is_array(v) or holds_tensors(v) for v in value)
    return False


def _is_weight(key: Any, value: Any) -> bool:
    """Whether an entry belongs to a state dict: ``conv1.weight``, but no counter of epochs."""
    return is_array(value) and "." in str(key)


def _is_container(value: Any) -> bool:
    """Whether a state dict is in it; what an optimizer keeps for each weight is none."""
    return isinstance(value, Mapping) and any(
        _is_weight(k, v) or _is_container(v) for k, v in value.items()
    )


def _versions(state_dict: Any) -> Mapping[str, Any]:
    """``_metadata``, which torch puts on a state dict: the version of each module's class."""
    metadata = getattr(state_dict, "_metadata", None)
    return metadata if isinstance(metadata, Mapping) else {}


def _set_versions(state_dict: OrderedDict[str, Tensor], versions: Mapping[str, Any]) -> None:
    if versions:
        state_dict._metadata = OrderedDict(versions)  # type: ignore[attr-defined]


def _renamed(
    tensors: OrderedDict[str, Tensor], rename: Callable[[str], str], name: str
) -> OrderedDict[str, Tensor]:
    """A state dict under other names."""
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in tensors.items():
        new = rename(key)
        if new in renamed:
            raise CheckpointError(
                f"{name}: holds {new} twice: once plain, once with a wrapper's prefix"
            )
        renamed[new] = tensor
    # Modules are renamed as tensors of theirs would be. A wrapper and what it wraps get the same
    # name; the inner one comes later and stays.
    modules = ((rename(f"{m}.x" if m else "x"), v) for m, v in _versions(tensors).items())
    _set_versions(renamed, {key.rpartition(".")[0]: version for key, version in modules})
    return renamed
