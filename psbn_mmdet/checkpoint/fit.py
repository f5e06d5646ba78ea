"""Whether a checkpoint fits a model: what mmengine would only warn of is refused."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..norm.layers import PostShift
from .convert import prefixes
from .read import CheckpointError, state_dict_of


def mismatch(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool) -> str | None:
    """Why loading would leave the model computing something else, or None.

    mmengine only warns of such keys and goes on.

    Args:
        model: The model that is to be loaded into.
        state_dict: What is to be loaded.
        strict: Whether every parameter and statistic of the model must come from
            the state dict, in its shape, as for testing and resuming. If not,
            only a psBN layer whose plain twin would lose beta and alpha counts.
    """
    modules = dict(model.named_modules())
    for prefix in sorted(prefixes(state_dict, "psbn")):
        layer = modules.get(prefix[:-1])
        if layer is not None and not isinstance(layer, PostShift):
            return (
                f"it is a psBN checkpoint, and the model's {prefix[:-1]} is a "
                f"{type(layer).__name__}, which would lose its bias: set norm_cfg's type to psBN, "
                "or convert it with tools/convert_checkpoint.py --to bn"
            )
    if not strict:
        return None
    bn = {prefix + "bias" for prefix in prefixes(state_dict, "bn")}
    missing, other = [], []
    for key, value in model.state_dict().items():
        bias = re.sub(r"(beta|alpha)$", "bias", key)
        if key in state_dict:
            if state_dict[key].shape != value.shape:
                other.append(key)
        elif bias not in bn and not key.endswith("num_batches_tracked"):
            missing.append(key)
    if other:
        return (
            f"{len(other)} tensors have another shape, as {other[0]}: "
            f"{tuple(state_dict[other[0]].shape)} instead of "
            f"{tuple(model.state_dict()[other[0]].shape)}; is it of this config?"
        )
    if missing:
        return f"{len(missing)} tensors are missing, as {missing[0]}; is it of this config?"
    known = set(model.state_dict())
    extra = [k for k in state_dict if k not in known and k not in bn and "num_batches" not in k]
    if extra:
        return (
            f"{len(extra)} tensors have no place in the model, as {extra[0]}; is it of this config?"
        )
    return None


def require_fit(model: nn.Module, checkpoint: Any, name: str, strict: bool) -> None:
    """Refuse a checkpoint that does not give a model the function it was saved with.

    Args:
        model: What it is to be loaded into.
        checkpoint: What was read.
        name: Where it came from, for the message.
        strict: As in :func:`mismatch`.

    Raises:
        CheckpointError: It does not fit.
    """
    wrong = mismatch(model, state_dict_of(checkpoint, name), strict)
    if wrong:
        raise CheckpointError(f"{name}: {wrong}")
