"""Peers of revival, each in a few lines: what others do for networks that have stopped to learn.

Settings were fixed before the first run and not tuned.

- **ReDo** (Sokar et al. 2023, arXiv 2302.12902), as published: a unit is dormant where its mean
  activation is at most tau = 0.025 of its layer's mean; fresh incoming and zero outgoing weights.
  Batch normalization and residual sums are not treated in any way. Once, before the training.
- **Shrink and perturb** (Ash and Adams 2020, arXiv 1910.08475): every parameter of the backbone
  becomes 0.6 times itself, plus noise: here 0.1 times fresh initial weights, whose scale fits each
  layer. Once, before the training.
- **The same of gamma alone** is nobody's method but a control: two seeds of shrink and perturb were
  6 AP ahead of BN, and gamma is small in these backbones (median 0.05 and less), so its size may be
  what matters. Written down after those two seeds and before the control's first run. When it had
  two seeds, 6 AP ahead as well, a second control followed: **gamma of the collapsed alone** becomes
  0.1, all other parameters stay.
- **L2 Init** (Kumar et al. 2023, arXiv 2308.11958): decay toward the initial weights instead of
  toward 0, of the same strength; those of a freshly initialised backbone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

REDO, SHRINK, L2_INIT = "ReDo", "shrink and perturb", "L2 Init"
GAMMA_ALONE = "gamma alone shrunk and perturbed"
GAMMA_LIFTED = "gamma of the collapsed set to 0.1"
PEERS = (REDO, SHRINK, L2_INIT, GAMMA_ALONE, GAMMA_LIFTED)

TAU = 0.025
KEPT, NOISE = 0.6, 0.1


@torch.no_grad()
def redo(backbone: Any, fresh: Any, images: Tensor) -> int:
    """Reset the dormant units of an mmdet ResNet of basic blocks; returns their number.

    Args:
        backbone: Changed in place.
        fresh: The same, freshly initialised: incoming weights come from there.
        images: (N, 3, H, W), on which activations are measured, with the statistics of the batch.
    """
    blocks = [b for name in backbone.res_layers for b in getattr(backbone, name)]
    fresh_blocks = [b for name in fresh.res_layers for b in getattr(fresh, name)]
    # Each convolution with those that read it, and the module whose input is what they read.
    units: list[tuple[nn.Conv2d, nn.Conv2d, list[nn.Conv2d]]] = []
    units.append((backbone.conv1, fresh.conv1, _entries(blocks[0])))
    for i, (block, new) in enumerate(zip(blocks, fresh_blocks, strict=True)):
        units.append((block.conv1, new.conv1, [block.conv2]))
        if i + 1 < len(blocks):
            units.append((block.conv2, new.conv2, _entries(blocks[i + 1])))
    activations: dict[nn.Module, Tensor] = {}
    hooks = [
        readers[0].register_forward_pre_hook(
            lambda module, inputs: activations.__setitem__(module, inputs[0].abs().mean((0, 2, 3)))
        )
        for _, _, readers in units
    ]
    buffers = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone.train()
    backbone(images)
    for hook in hooks:
        hook.remove()
    for name, value in backbone.named_buffers():
        value.copy_(buffers[name])
    dormant = [(a := activations[readers[0]]) <= TAU * a.mean() for _, _, readers in units]
    for (conv, new, _), each in zip(units, dormant, strict=True):
        conv.weight[each] = new.weight[each]
    for (_, _, readers), each in zip(units, dormant, strict=True):
        for reader in readers:
            reader.weight[:, each] = 0
    return sum(int(each.sum()) for each in dormant)


def _entries(block: Any) -> list[nn.Conv2d]:
    """What reads the input of a block by a convolution; an identity beside it is not treated."""
    return [block.conv1, *([] if block.downsample is None else [block.downsample[0]])]


@torch.no_grad()
def shrink_and_perturb(backbone: nn.Module, fresh: nn.Module, *, gamma_alone: bool = False) -> None:
    """Parameters become 0.6 times themselves plus 0.1 times the fresh ones, in place.

    Args:
        backbone: Changed in place.
        fresh: The same, freshly initialised.
        gamma_alone: Only the gamma of the norm layers does.
    """
    gammas = {module.weight for module in backbone.modules() if isinstance(module, _BatchNorm)}
    for theta, new in zip(backbone.parameters(), fresh.parameters(), strict=True):
        if not gamma_alone or theta in gammas:
            theta.mul_(KEPT).add_(new, alpha=NOISE)


def decay_toward(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], initial: list[Tensor]
) -> None:
    """Weight decay toward ``initial``: each step adds lambda (theta - initial) to the gradient.

    The optimizer's own weight decay adds lambda theta; this hook adds the rest, before each step
    and so behind the clipping.
    """
    strength = {
        p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    pairs = list(zip(parameters, initial, strict=True))

    def before(*_: Any) -> None:
        for parameter, start in pairs:
            if parameter.grad is not None:
                parameter.grad.add_(start, alpha=-strength[parameter])

    optimizer.register_step_pre_hook(before)
