"""Which channels carry nothing but a constant, and which constant, found by running the network.

Every live channel is given numbers that certainly vary, every collapsed one the constant that it
puts out, and the network itself does the rest: it adds, concatenates, rectifies and pools. A
channel that arrives somewhere as one and the same number in every run carries nothing there, and
that number is what it adds. No knowledge of the graph is needed, nor of which activation follows.

Two runs are made, one with positive and one with negative numbers, so that no rectifier can hide
a live channel in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor, nn

from ..flops import filters_of

Run = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Fate:
    """What the filters of a normalization layer put out.

    Args:
        constant: (C,), the number that a collapsed filter puts out, NaN for the others.
        inactive: (C,) bool, filters whose output is never positive.
        bias: (C,).
    """

    constant: Tensor
    inactive: Tensor
    bias: Tensor


def is_padded(layer: nn.Module) -> bool:
    """Whether a convolution sees zeros beside its input at the border."""
    if not isinstance(layer, nn.modules.conv._ConvNd) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and max(layer.kernel_size) > 1
    return max(layer.padding) > 0


def arriving_constants(
    model: nn.Module, fates: Mapping[nn.Module, Fate], run: Run, ignore_borders: bool
) -> dict[str, Tensor]:
    """The constant that arrives in each input channel of each convolution and linear layer.

    Args:
        model: In eval mode. Nothing of it is changed.
        fates: Of its normalization layers.
        run: Calls the model it is given.
        ignore_borders: Take a constant for one although a zero-padded convolution makes something
            else of it at the border.

    Returns:
        By the name of the layer, (C_in,), NaN where something varies. A layer that did not run is
        missing.
    """
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, dim: int) -> None:
        others = [d for d in range(x.dim()) if d != dim]
        if x.numel() == 0:
            return
        least, most = (x.amin(others), x.amax(others)) if others else (x, x)
        low[name] = torch.minimum(low.get(name, least), least)
        high[name] = torch.maximum(high.get(name, most), most)

    for sign in (1, -1):
        noise = _Noise(sign)
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if module in fates:
                    hook = _norm_hook(fates[module], noise)
                elif filters_of(module):
                    hook = _conv_hook(name, module, noise, note, ignore_borders)
                else:
                    continue
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
                padded = ignore_borders and is_padded(module)
                if padded and not getattr(module, "transposed", False):
                    stack.callback(setattr, module, "padding_mode", module.padding_mode)
                    module.padding_mode = "replicate"
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(0)
            run(model)
    return {
        name: torch.where(_equal(low[name], high[name]), high[name], torch.nan).float().cpu()
        for name in low
    }


class _Noise:
    """Numbers of one sign, 0.1 to 0.9: any rectifier or clip lets those of one sign through."""

    def __init__(self, sign: int) -> None:
        self.sign = sign
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, like: Tensor) -> Tensor:
        drawn = torch.rand(like.shape, generator=self.generator) * 0.8 + 0.1
        return (self.sign * drawn).to(like.device, like.dtype)


def _norm_hook(fate: Fate, noise: _Noise) -> Callable:
    def after(module, args, kwargs, output):
        x = args[0] if args else next(iter(kwargs.values()))
        along = [-1 if d == 1 else 1 for d in range(output.dim())]
        constant, inactive, bias = (
            t.to(output.device).view(along) for t in (fate.constant, fate.inactive, fate.bias)
        )
        numbers = noise(output)
        # Never positive, and as close to 0 as it may come: 2 bias < y < 0.
        numbers = torch.where(inactive, 2 * bias * (numbers.abs() - 0.1) / 0.8, numbers)
        numbers = torch.where(constant.isnan(), numbers, constant)
        return torch.where(_constant_in(x, 1).view(along), output, numbers).to(output.dtype)

    return after


def _conv_hook(
    name: str, conv: nn.Module, noise: _Noise, note: Callable, ignore_borders: bool
) -> Callable:
    linear = isinstance(conv, nn.Linear)
    known = linear or isinstance(conv, nn.modules.conv._ConvNd)

    def after(module, args, kwargs, output):
        x = args[0] if args else next(iter(kwargs.values()))
        dim = x.dim() - 1 if linear else int(x.dim() == conv.weight.dim())
        note(name, x, dim)
        varies = ~_constant_in(x, dim)
        if is_padded(conv) and not ignore_borders:
            varies |= x.abs().amax([d for d in range(x.dim()) if d != dim]) > 0
        reached = _reached(conv, varies) if known else varies.any().expand(filters_of(conv))
        if not isinstance(output, Tensor):
            return output
        dim = output.dim() - 1 if linear else int(output.dim() == conv.weight.dim())
        along = [-1 if d == dim else 1 for d in range(output.dim())]
        return torch.where(reached.view(along), noise(output), output)

    return after


def _reached(conv: Any, varies: Tensor) -> Tensor:
    """Which filters have a weight other than 0 for an input channel that varies: (C_out,)."""
    groups = getattr(conv, "groups", 1)
    nonzero = (conv.weight != 0).flatten(2).any(2) if conv.weight.dim() > 2 else conv.weight != 0
    if getattr(conv, "transposed", False):  # (C_in, C_out / groups)
        nonzero = nonzero.unflatten(0, (groups, -1)).transpose(1, 2)
    else:
        nonzero = nonzero.unflatten(0, (groups, -1))
    return (nonzero & varies.view(groups, 1, -1)).any(2).flatten()


def _constant_in(x: Tensor, dim: int) -> Tensor:
    """Which channels hold one number within this call; of a single value only 0 is known to."""
    others = [d for d in range(x.dim()) if d != dim]
    if x.numel() == 0:
        return torch.zeros(x.shape[dim], dtype=torch.bool, device=x.device)
    if x.numel() == x.shape[dim]:
        return x.flatten() == 0
    return _equal(x.amin(others), x.amax(others))


def _equal(low: Tensor, high: Tensor) -> Tensor:
    rounding = 64 * torch.finfo(low.dtype).eps
    return high - low <= rounding * torch.maximum(low.abs(), high.abs())
