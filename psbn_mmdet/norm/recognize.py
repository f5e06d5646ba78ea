"""What counts as a normalization layer, in a model and in a state dict: the one place that decides.

Here, that is normalization with a gamma per channel over statistics per channel: BatchNorm and
InstanceNorm of every kind, and their post-shifted twins. GroupNorm and LayerNorm are left out: a
collapsed gamma there is another matter, and the paper does not treat them.

In a state dict there are only names and shapes. Some layers cannot be told from others by these
(an InstanceNorm without running statistics looks as a LayerNorm does); they are called unknown
rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

Kind = Literal["bn", "psbn", "unknown"]

_SCRIPTED = {"BatchNorm", "InstanceNorm", "SyncBatchNorm", "psBN", "psIN", "psSyncBN"}
_BN = ("weight", "bias", "running_mean", "running_var")


def is_norm_layer(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm or InstanceNorm of any kind.

    These are: torch's own layers, synchronised, lazy and post-shifted ones and all other
    subclasses; their scripted forms; and whatever holds ``weight``, ``bias``, ``running_mean`` and
    ``running_var`` as one-dimensional tensors, such as the FrozenBatchNorm2d of mmdet and
    torchvision, mmcv's SyncBatchNorm or a layer of an exported program. Of an exported
    post-shifted layer, ``weight``, ``beta`` and ``alpha`` are what there is. What only passes its
    attributes on, as a wrapper for activation checkpointing or a compiled layer does, is none.
    """
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return True
    if isinstance(module, torch.jit.ScriptModule) and (
        module.original_name.rstrip("123d") in _SCRIPTED
    ):
        return True
    if all(_has_dim(module, name, 1) for name in _BN):
        return True
    return is_post_shifted(module) and _has_dim(module, "weight", 1)


def is_post_shifted(module: nn.Module) -> bool:
    """Whether a module adds ``beta + alpha``: a psBN layer, also scripted, traced or exported."""
    return _has_dim(module, "beta", 1) and _has_dim(module, "alpha", 0)


def _has_dim(module: nn.Module, name: str, dim: int) -> bool:
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    tensor = dict(own).get(name)
    if tensor is None or nn.parameter.is_lazy(tensor):
        return False
    return tensor.dim() == dim


def alpha_of(module: nn.Module) -> float | None:
    """The number that a post-shifted layer adds to beta; None for any other module.

    It is the constructed one where there is a layer. Of traced and exported ones the buffer is
    left, which averages and casts may have rounded.
    """
    if not is_post_shifted(module):
        return None
    return float(getattr(module, "initial_alpha", module.alpha))  # type: ignore[arg-type]


def added_bias(module: nn.Module) -> Tensor | None:
    """What a normalization layer adds, detached; None if it adds nothing."""
    if (alpha := alpha_of(module)) is not None:
        return module.beta.detach() + alpha  # type: ignore[operator]
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The normalization layers of a model by name, each once; ``affine=False`` ones included."""
    return {name: module for name, module in model.named_modules() if is_norm_layer(module)}


def norm_kinds(state_dict: Mapping[str, Tensor]) -> dict[str, Kind]:
    """Which entries of a state dict belong to normalization layers, and of which kind.

    The answer depends on names and shapes only, never on the order of the keys (safetensors files
    come sorted).

    ===========  =====================================================================
    kind         tensors of one layer
    ===========  =====================================================================
    ``bn``       ``weight, bias, running_mean, running_var``, all of shape (C,); a
                 BatchNorm, or an InstanceNorm that tracks statistics; no ``beta``, ``alpha``
    ``psbn``     ``weight, beta`` of shape (C,) and a 0-dim ``alpha``; any post-shifted
                 layer (with ``bias``, if it was saved by 0.2 or later)
    ``unknown``  ``weight`` and ``bias`` or ``beta``, both of shape (C,), but neither of
                 the above: InstanceNorm without statistics, GroupNorm, LayerNorm, or a
                 post-shifted layer that is incomplete
    ===========  =====================================================================

    Layers without a gamma and a shift (``affine=False``) are not listed.

    Args:
        state_dict: Tensors by key, as ``model.state_dict()`` gives them. Other values are passed
            over.

    Returns:
        Kind by the layer's name, as in ``model.named_modules()``: ``'layer1.0.bn1'``, and ``''``
        for the state dict of a single layer.
    """
    shapes: dict[str, dict[str, torch.Size]] = {}
    for key, value in state_dict.items():
        if isinstance(value, Tensor):
            layer, _, name = key.rpartition(".")
            shapes.setdefault(layer, {})[name] = value.shape
    kinds: dict[str, Kind] = {}
    for layer, shape in shapes.items():
        per_channel = shape.get("weight", ())
        if len(per_channel) != 1:
            continue
        if all(shape.get(name) == per_channel for name in _BN) and not {"beta", "alpha"} & {*shape}:
            kinds[layer] = "bn"
        elif (shape.get("beta"), shape.get("alpha")) == (per_channel, ()) and (
            shape.get("bias", per_channel) == per_channel
        ):
            kinds[layer] = "psbn"
        elif per_channel in (shape.get("bias"), shape.get("beta")):
            kinds[layer] = "unknown"
    return kinds
