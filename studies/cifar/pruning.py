"""Three ways to the same FLOPs from a network of which filters have collapsed (section 3.7).

- ``strip``: what carries nothing goes, and the function stays (:func:`psbn_mmdet.collapse.strip`);
- ``magnitude``: Torch-Pruning takes the groups of coupled filters with the smallest L2 norms of all
  layers, until no more multiply-accumulates are left than ``strip`` leaves;
- ``uniform``: a network from random weights of which all layers are narrower by one factor.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from psbn_mmdet.collapse import strip
from studies.runs import RunError

from .networks import macs, macs_of
from .settings import Settings

STEPS = 100
"""Into which Torch-Pruning divides its way to an empty network."""


def cut(network: nn.Module, settings: Settings) -> nn.Module:
    """The smaller network that ``settings.cut`` names.

    Args:
        network: The collapsed one, in which nothing is changed.
        settings: ``cut``, and ``network``, ``width``, ``norm`` and ``act`` of ``network``.

    Raises:
        RunError: Nothing of it can be taken out.
    """
    size = settings.image_size
    stripped = strip(network, (3, size, size)).model
    goal = macs_of(stripped, size)
    if goal == macs_of(network, size):
        raise RunError("nothing has collapsed that could be taken out: train for more rounds")
    if settings.cut == "strip":
        return stripped
    if settings.cut == "uniform":
        return uniform(settings, goal)
    return magnitude(copy.deepcopy(network), size, goal)


def magnitude(network: nn.Module, image_size: int, goal: int) -> nn.Module:
    """Narrowed in place by Torch-Pruning, to ``goal`` multiply-accumulates or the step below."""
    import torch_pruning as tp

    pruner = tp.pruner.BasePruner(
        network,
        torch.zeros(1, 3, image_size, image_size),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[network.fc],
    )
    for _ in range(STEPS):
        if macs_of(network, image_size) <= goal:
            return network
        pruner.step()
    raise RunError(f"Torch-Pruning cannot reach {goal} multiply-accumulates")


def uniform(settings: Settings, goal: int) -> nn.Module:
    """Fresh, of the largest width with ``goal`` multiply-accumulates at most."""
    low, high = 0.0, settings.width
    while high - low > 1e-3 * settings.width:
        middle = (low + high) / 2
        small_enough = macs(settings.network, middle, settings.image_size) <= goal
        low, high = (middle, high) if small_enough else (low, middle)
    if not low:
        raise RunError(f"{settings.network} has more than {goal} multiply-accumulates at any width")
    return replace(settings, width=low).network_module()


def size_of(network: nn.Module, image_size: int) -> dict[str, float]:
    """``macs`` (:func:`macs_of`) and ``parameters``."""
    parameters = sum(p.numel() for p in network.parameters())
    return {"macs": macs_of(network, image_size), "parameters": parameters}
