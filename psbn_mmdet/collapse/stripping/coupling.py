"""Which channels of which layers go or stay together, by Torch-Pruning's dependency graph."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ...errors import PsbnError
from ...python38 import zip_strict
from ..flops import filters_of
from .wiring import Run


class StripError(PsbnError, ValueError):
    """A network cannot be stripped; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Channel:
    """Entries of several layers that are one channel: all of them go, or none.

    Args:
        group: The convolution or linear layer whose filters it is one of.
        entries: (layer, side, index) each. The side is ``out`` (a filter), ``in`` (an input
            channel), or ``both`` (of a normalization layer or a depthwise convolution).
        blocked: Why it can never go, or None.
    """

    group: str
    entries: tuple[tuple[str, str, int], ...]
    blocked: str | None = None

    @property
    def inputs(self) -> list[tuple[str, int]]:
        """(layer, input channel) of each layer that reads it."""
        return [(name, index) for name, side, index in self.entries if side == "in"]


@dataclass(frozen=True)
class Coupling:
    """The channels of a network.

    Args:
        channels: All that were traced.
        normalized_by: Convolution -> the BN layers that alone read it and read nothing else; None
            where something else reads it.
    """

    channels: tuple[Channel, ...]
    normalized_by: dict[str, tuple[str, ...] | None]


def couple(model: nn.Module, run: Run) -> Coupling:
    """Trace a network.

    Args:
        model: In eval mode; nothing of it is changed.
        run: Calls the model it is given and returns its outputs, tensors nested in any way.

    Raises:
        StripError: It cannot be traced, or torch_pruning is not installed.
    """
    try:
        import torch_pruning as tp
    except ImportError:
        raise StripError(
            "stripping needs torch_pruning, not installed here; pip install 'psbn_mmdet[strip]'"
        ) from None
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if getattr(module, "with_cp", False):  # mmdet's checkpointing hides the graph
            setattr(module, "with_cp", False)  # noqa: B010 (not an attribute of nn.Module)
    outputs_of_layers: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda module, args, out: outputs_of_layers.extend(tensors_in(out)))
        for m in twin.modules()
        if filters_of(m)
    ]

    def outputs(model: nn.Module, _: Any) -> list[Tensor]:
        model.requires_grad_(True)  # eval() of mmdet's backbones freezes stages
        results = [t for t in tensors_in(run(model)) if t.grad_fn is not None]
        # An operation of its own marks each output, also one that is a layer's. What leaves the
        # graph otherwise (proposals) has none: there the layers themselves are starting points,
        # the last first, so that no layer with another behind it is taken for an output.
        starts = [t for t in reversed(outputs_of_layers) if t.grad_fn is not None]
        return [t * 1 for t in results] + starts

    graph = tp.DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(twin, None, forward_fn=outputs, verbose=False)
    except Exception as error:  # whatever a model or the tracer raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StripError(f"the model cannot be traced: {reason[0]}") from error
    finally:
        for hook in hooks:
            hook.remove()
    channels = _consistent(twin, list(_channels(twin, graph, tp)))
    if not channels:
        raise StripError(
            "the model cannot be traced: no gradient reaches any convolution or linear layer "
            "(does it run under torch.no_grad or inference_mode?)"
        )
    return Coupling(channels, _normalized_by(twin, graph))


def _channels(model: nn.Module, graph: Any, tp: Any) -> Iterator[Channel]:
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    covered: set[tuple[nn.Module, int]] = set()
    for module in [m for m in graph.module2node if isinstance(m, (nn.Linear, _ConvNd))]:
        missing = [i for i in range(filters_of(module)) if (module, i) not in covered]
        if not missing:
            continue
        prune = graph.get_pruner_of_module(module).prune_out_channels
        entries: dict[int, list[tuple[str, str, int]]] = defaultdict(list)
        blocked: dict[int, str] = {}
        for item in graph.get_pruning_group(module, prune, missing):
            node, layer = item.dep.target, item.dep.target.module
            inward = item.dep.handler.__name__ == "prune_in_channels"
            name, side, reason = names.get(layer, ""), None, None
            if isinstance(layer, tp.ops._OutputOp):
                reason = "it reaches the output of the model"
            elif isinstance(layer, _ConvNd) and node.type == tp.ops.OPTYPE.DEPTHWISE_CONV:
                side = "both"
                if layer.groups != layer.in_channels:
                    reason = f"{name} has several input channels for each filter"
            elif isinstance(layer, (nn.Linear, _ConvNd)):
                side = "in" if inward else "out"
            elif isinstance(layer, (_BatchNorm, _InstanceNorm)) or (
                isinstance(layer, nn.PReLU) and layer.num_parameters > 1
            ):
                side = "both"
            elif isinstance(layer, nn.Module) and any(
                True for _ in layer.parameters(recurse=False)
            ):
                if not isinstance(layer, nn.PReLU):
                    reason = f"{name} is a {type(layer).__name__}, which is left whole"
            elif isinstance(layer, nn.Parameter):
                reason = "a parameter outside of any known layer is combined with it"
            if side and not _owns_its_weight(layer, uses):
                reason = f"the weight of {name} is parametrized or shared with another layer"
            if side != "in" and not reason and not node.outputs:
                reason = f"what reads {name or 'it'} was not traced"
            for index, root in zip_strict(item.idxs, item.root_idxs):
                if reason:
                    blocked.setdefault(root, reason)
                if side:
                    entries[root].append((name, side, index))
                    if side != "in":
                        covered.add((layer, index))
        for root, found in entries.items():
            unique = tuple(dict.fromkeys(found))
            if not any(side == "in" for _, side, _ in unique):
                blocked.setdefault(root, f"what reads {names[module]} was not traced")
            yield Channel(names[module], unique, blocked.get(root))


def _owns_its_weight(layer: nn.Module, uses: Mapping[int, int]) -> bool:
    own = [layer._parameters.get("weight"), layer._parameters.get("bias")]
    plain = "weight" in layer._parameters and not nn.utils.parametrize.is_parametrized(layer)
    return plain and all(p is None or uses[id(p)] == 1 for p in own)


def _consistent(model: nn.Module, channels: list[Channel]) -> tuple[Channel, ...]:
    """Block what contradicts itself: entries that do not exist, or that two channels claim.

    Torch-Pruning infers from numbers of channels what a reshape or a concatenation does, and can
    be wrong (a concatenation that is pooled to more than one position and flattened, say).
    """
    modules = dict(model.named_modules())
    claims: dict[tuple[str, str, int], int] = defaultdict(int)
    for channel in channels:
        for entry in channel.entries:
            claims[entry] += 1
    checked = []
    for channel in channels:
        real = tuple(e for e in channel.entries if e[2] < width(modules[e[0]], e[1]))
        if len(real) < len(channel.entries) or any(claims[entry] > 1 for entry in real):
            reason = channel.blocked or "Torch-Pruning traces its way inconsistently"
            channel = Channel(channel.group, real, reason)
        checked.append(channel)
    return tuple(checked)


def width(layer: nn.Module, side: str) -> int:
    """How many channels a layer has on a side."""
    if isinstance(layer, nn.Linear):
        return layer.in_features if side == "in" else layer.out_features
    if isinstance(layer, _ConvNd):
        return layer.in_channels if side == "in" else layer.out_channels
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters
    if isinstance(layer, (_BatchNorm, _InstanceNorm)):
        return layer.num_features
    return -1


def _normalized_by(model: nn.Module, graph: Any) -> dict[str, tuple[str, ...] | None]:
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, tuple[str, ...] | None] = {}
    for module, node in graph.module2node.items():
        if isinstance(module, (nn.Linear, _ConvNd)):
            alone = node.outputs and all(
                isinstance(n.module, _BatchNorm)
                and n.module.running_mean is not None
                and all(i is node for i in n.inputs)
                for n in node.outputs
            )
            norms = dict.fromkeys(names[n.module] for n in node.outputs) if alone else None
            found[names[module]] = None if norms is None else tuple(norms)
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors of nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for child in value for tensor in tensors_in(child)]
    return []
