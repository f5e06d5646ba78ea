"""Taking channels out of layers: constants go into biases, then the weights are cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Dict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ...python38 import zip_strict
from .coupling import Channel, StripError, width
from .wiring import is_padded

Cut = Dict[str, Dict[str, Any]]
"""Layer -> side (``out``, ``in``, ``both``) -> ``{"of": channels, "gone": [indices]}``; a layer
that was given a bias has ``{"bias": True}`` besides. JSON can hold it."""


@torch.no_grad()
def fold(
    model: nn.Module,
    gone: Iterable[Channel],
    merged: Mapping[Channel, Channel],
    constants: Mapping[str, Tensor],
    normalized_by: Mapping[str, tuple[str, ...] | None],
) -> list[str]:
    """Make a network indifferent to some input channels, which carry constants, in place.

    Their weights become 0. What they added, c * sum(w), goes into the weights of the channel that
    they are merged into if the layer pads with zeros, else into the bias of the layer, or into the
    running mean of the BN behind it if that alone reads it and the layer has no bias, or into a
    new bias.

    Args:
        model: Changed in place; only weights, no shapes.
        gone: The channels.
        merged: Those of them whose constant another channel carries from now on.
        constants: What arrives in each input channel, by layer.
        normalized_by: Of :class:`.coupling.Coupling`.

    Returns:
        The layers that were given a bias.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    added: dict[str, Tensor] = {}
    for channel in gone:
        into = merged.get(channel, channel)
        # Merged channels have the same readers in the same order.
        for (name, index), (_, carrier) in zip_strict(channel.inputs, into.inputs):
            layer = modules[name]
            taken = _input_weights(layer, index)
            constant = float(constants[name][index])
            if constant != 0 and channel in merged and is_padded(layer):
                _input_weights(layer, carrier).add_(
                    taken, alpha=constant / float(constants[name][carrier])
                )
            elif constant != 0:
                sums = constant * taken.double().flatten(1).sum(1)
                total = added.setdefault(name, sums.new_zeros(width(layer, "out")))
                _group_of(layer, index, total).add_(sums)
            taken.zero_()
    new = []
    for name, total in added.items():
        layer, norms = modules[name], normalized_by.get(name)
        if layer.bias is not None:
            layer.bias += total
        elif norms:
            for norm in norms:
                modules[norm].running_mean -= total
        else:
            layer.bias = nn.Parameter(total.to(layer.weight.dtype))
            new.append(name)
    return new


def _input_weights(layer: Any, index: int) -> Tensor:
    """The weights of an input channel, (filters that read it, ...), as a view."""
    if getattr(layer, "transposed", False):
        return layer.weight[index]
    group, at = divmod(index, layer.weight.shape[1])
    return layer.weight.unflatten(0, (getattr(layer, "groups", 1), -1))[group, :, at].unsqueeze(1)


def _group_of(layer: Any, index: int, values: Tensor) -> Tensor:
    """Those of the values per filter, (C_out,), whose filters read an input channel; a view."""
    return values.view(getattr(layer, "groups", 1), -1)[index // layer.weight.shape[1]]


def cut_of(model: nn.Module, gone: Iterable[Channel], biases: Iterable[str] = ()) -> Cut:
    """What to take out of each layer so that some channels are gone."""
    modules: dict[str, Any] = dict(model.named_modules())
    cut: Cut = {}
    for channel in gone:
        for name, side, index in channel.entries:
            entry = cut.setdefault(name, {}).setdefault(
                side, {"of": width(modules[name], side), "gone": []}
            )
            entry["gone"].append(index)
    for sides in cut.values():
        for entry in sides.values():
            entry["gone"].sort()
    for name in biases:
        cut.setdefault(name, {})["bias"] = True
    return cut


@torch.no_grad()
def take_out(model: nn.Module, cut: Cut) -> nn.Module:
    """Take channels out of the layers of a network, in place; what stays keeps its weights.

    Args:
        model: A network as it was before it was stripped; its weights do not matter.
        cut: What goes, as in a record.

    Returns:
        The same ``model``.

    Raises:
        StripError: The network is not the one that ``cut`` is of. It may be changed in part.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name, sides in cut.items():
        layer = modules.get(name)
        if layer is None:
            raise StripError(f"the model has no layer {name}: the record is of another model")
        for side, entry in sides.items():
            if side == "bias":
                continue
            if width(layer, side) != entry["of"]:
                raise StripError(
                    f"{name} has {width(layer, side)} channels where the record has "
                    f"{entry['of']}: the record is of another model"
                )
            gone = set(entry["gone"])
            kept = [i for i in range(entry["of"]) if i not in gone]
            _narrow(name, layer, side, kept)
        if sides.get("bias") and layer.bias is None:
            filters = width(layer, "out")
            layer.bias = nn.Parameter(layer.weight.new_zeros(filters))
    return model


def _narrow(name: str, layer: Any, side: str, kept: list[int]) -> None:
    if isinstance(layer, nn.PReLU):
        _select(layer, "weight", 0, kept)
        layer.num_parameters = len(kept)
    elif isinstance(layer, (_BatchNorm, _InstanceNorm)):
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            _select(layer, tensor, 0, kept)
        layer.num_features = len(kept)
    elif isinstance(layer, nn.Linear):
        _select(layer, "weight", 1 if side == "in" else 0, kept)
        if side == "in":
            layer.in_features = len(kept)
        else:
            _select(layer, "bias", 0, kept)
            layer.out_features = len(kept)
    elif side == "both":
        _select(layer, "weight", 0, kept)
        _select(layer, "bias", 0, kept)
        layer.in_channels = layer.out_channels = layer.groups = len(kept)
    else:
        _narrow_conv(name, layer, side, kept)


def _narrow_conv(name: str, conv: Any, side: str, kept: list[int]) -> None:
    channels = width(conv, side)
    per_group = channels // conv.groups
    by_group = [[i % per_group for i in kept if i // per_group == g] for g in range(conv.groups)]
    if len({len(part) for part in by_group}) > 1:
        raise StripError(f"{name} is a grouped convolution and would lose unequal numbers")
    # The dimension that runs through all groups, or the one that each group has for itself.
    if (side == "out") != conv.transposed:
        _select(conv, "weight", 0, kept)
    elif conv.groups == 1:
        _select(conv, "weight", 1, kept)
    else:
        parts = conv.weight.unflatten(0, (conv.groups, -1))
        chosen = [part[:, rows] for part, rows in zip_strict(parts, by_group)]
        _replace(conv, "weight", torch.cat(chosen))
    if side == "out":
        _select(conv, "bias", 0, kept)
        conv.out_channels = len(kept)
    else:
        conv.in_channels = len(kept)


def _select(layer: nn.Module, name: str, dim: int, kept: list[int]) -> None:
    tensor = getattr(layer, name)
    if tensor is not None:
        _replace(layer, name, tensor.index_select(dim, torch.tensor(kept, device=tensor.device)))


def _replace(layer: nn.Module, name: str, new: Tensor) -> None:
    old = getattr(layer, name)
    new = new.detach().clone()
    setattr(layer, name, nn.Parameter(new, old.requires_grad) if name in layer._parameters else new)
