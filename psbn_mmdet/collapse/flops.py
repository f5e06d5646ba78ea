"""How many FLOPs a network costs, and how many of them go for nothing.

The multiply-accumulates of each convolution and linear layer are those that torch's
``FlopCounterMode`` counts while it runs. What is left of them when filters are removed follows from
the wiring (:mod:`.wiring`): an input channel of a layer that carries nothing but constants because
of them can go, as its contribution is one to the bias (at a padded border only about so).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .calls import in_eval_mode, ways_to_call
from .criteria import THRESHOLD, MeasureError
from .wiring import Reader, Wiring, trace

Shape = Sequence[int]


@dataclass(frozen=True)
class Flops:
    """Multiply-accumulates of a network.

    ``total``, and ``remaining`` when the filters are removed: of one sample if the
    input was given by its size, else of the whole call. ``rows`` has ``name``,
    ``total``, ``remaining`` of each convolution and linear layer in order of its
    first use. ``elsewhere``, a part of both, is what is multiplied outside of
    them and stays as it is.
    """

    total: int
    remaining: int
    rows: tuple[dict[str, Any], ...] = field(repr=False, default=())
    elsewhere: int = 0

    @property
    def sparsity(self) -> float:
        """Percentage saved: the paper's *sparsity*, if collapsed filters are removed."""
        return 100 * (1 - self.remaining / self.total) if self.total else 0.0


def filters_of(module: nn.Module) -> int:
    """Number of filters (output channels) of a convolution or linear layer, else 0.

    A convolution is whatever looks like torch's, mmcv's deformable ones included.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.out_features
    if not isinstance(weight, Tensor) or nn.parameter.is_lazy(weight):
        return 0
    if weight.dim() >= 3 and hasattr(module, "kernel_size"):
        return getattr(module, "out_channels", 0)
    return 0


def probe(
    model: nn.Module,
    live: Mapping[nn.Module, Tensor],
    inputs: tuple[int, ...] | Callable[[nn.Module], Any],
) -> Flops:
    """Count multiply-accumulates with and without some filters.

    Removed are: each filter whose every use is a normalization layer in which it
    is not live, and each input channel that is constant because of that. A live
    filter that only feeds removed ones stays, as the measure is what the
    collapsed filters themselves cost. Of what is not a convolution or linear
    module that is called, nothing can be removed. Nothing of the model is
    changed, and no global random state is used.

    Args:
        model: Any module, on any device.
        live: For normalization layers of the model, which filters stay: (C,)
            bool. Others count as live.
        inputs: Size of one input without the batch, as (3, 800, 1333), with
            which ``model(x)`` is called, or a detector of mmdet with data samples
            of its own; or a function that calls the model it is given.

    Raises:
        MeasureError: The model cannot be called with that size, or ran no
            convolution or linear layer.
    """
    with ExitStack() as stack:
        stack.enter_context(in_eval_mode(model))
        for parameter in model.parameters():  # FlopCounterMode would want the graph of a view
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        stack.callback(_set_fast_attention, _set_fast_attention(False))
        stack.enter_context(torch.no_grad())
        if callable(inputs):
            counted = _count(model, inputs)
        else:
            counted = _at_size(model, inputs, lambda call: _count(model, call))
        totals, elsewhere = counted
        if not totals:
            raise MeasureError(
                "the model ran no convolution or linear layer, so there are no FLOPs"
            )
        shares = {}
        if not all(mask.all() for mask in live.values()):
            shares = _shares(model, live, inputs)
    rows: tuple[dict[str, Any], ...] = tuple(
        {"name": name, "total": n, "remaining": round(n * shares.get(name, 1))}
        for name, n in totals.items()
    )
    total = sum(totals.values()) + elsewhere
    remaining = sum(row["remaining"] for row in rows) + elsewhere
    return Flops(total, remaining, rows, elsewhere)


def _at_size(
    model: nn.Module, size: tuple[int, ...], do: Callable[[Callable[[nn.Module], Any]], Any]
) -> Any:
    """Do something with the first way to call the model with an input of a size that works."""
    if not size or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise MeasureError(
            f"the size of an input is positive whole numbers, as (3, 800, 1333), got {size!r}"
        )
    reference = next(model.parameters())
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    for call in ways_to_call(model, x.to(reference.device, reference.dtype)):
        try:
            return do(call)
        except Exception as caught:  # whatever a forward() raises
            error = caught
    reason = " ".join(str(error).split())
    raise MeasureError(
        f"the model cannot be called with an input of size {tuple(size)}: "
        f"{type(error).__name__}: {reason[:200]}; give another size, or a function that calls it"
    ) from error


def _count(model: nn.Module, call: Callable[[nn.Module], Any]) -> tuple[dict[str, int], int]:
    """Multiply-accumulates within each convolution and linear layer, and outside of them."""
    counter = FlopCounterMode(display=False, custom_mapping=_FLOPS_OF_OTHERS)
    totals: dict[str, int] = {}
    running: list[list[int]] = []  # of each: the counter at its start, what it holds within

    def before(*_: Any) -> None:
        running.append([counter.get_total_flops(), 0])

    def after(name: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> None:
            start, within = running.pop()
            flops = counter.get_total_flops() - start - within
            if not flops and not isinstance(module, nn.Linear):  # an operator of mmcv
                outputs = [output] if isinstance(output, Tensor) else output
                positions = sum(y.numel() // y.shape[1] for y in outputs)
                flops = 2 * positions * module.weight.numel()
                counter.flop_counts["Global"]["custom"] += flops
            if running:
                running[-1][1] += counter.get_total_flops() - start
            totals[name] = totals.get(name, 0) + flops // 2

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if filters_of(module):
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
        stack.enter_context(counter)
        call(model)
    return totals, counter.get_total_flops() // 2 - sum(totals.values())


def _shares(
    model: nn.Module,
    live: Mapping[nn.Module, Tensor],
    inputs: tuple[int, ...] | Callable[[nn.Module], Any],
) -> dict[str, float]:
    """Of each layer that loses channels, the share of its work that is left."""
    names = {module: name for name, module in model.named_modules()}
    constants = {}
    for module, mask in live.items():
        bias = getattr(module, "bias", None)
        shift = torch.zeros(len(mask)) if bias is None else bias.detach().float().cpu()
        shift = torch.where(shift.abs() < THRESHOLD, 0, shift)  # dead: nothing of note
        constants[names[module]] = torch.where(mask.cpu(), torch.nan, shift)

    def both(call: Callable[[nn.Module], Any]) -> tuple[Wiring, Wiring]:
        return trace(model, call), trace(model, call, constants)

    if callable(inputs):
        whole, pruned = both(inputs)
    else:
        # The wiring is that of any size; most networks take a small one.
        small = (*inputs[:1], *(min(n, 64) for n in inputs[1:]))
        try:
            whole, pruned = _at_size(model, small, both)
        except MeasureError:
            whole, pruned = _at_size(model, inputs, both)
    shares = {}
    for name, reader in whole.readers.items():
        if name not in pruned.readers:
            continue
        kept_in = ~pruned.frozen_inputs(name) | whole.free_inputs(name)  # constant anyway: stays
        kept_out = ~_removed(whole, reader, constants)
        n_in, n_out = (kept.reshape(reader.groups, -1).sum(1) for kept in (kept_in, kept_out))
        left = int((n_in * n_out).sum())
        shares[reader.module] = left * reader.groups / (reader.inputs * reader.filters)
    return shares


def _removed(wired: Wiring, reader: Reader, constants: Mapping[str, Tensor]) -> np.ndarray:
    """(C_out,) bool, the filters whose every use is a normalization layer where they are gone."""
    removed = np.zeros(reader.filters, dtype=bool)
    if wired.used_otherwise(reader):
        return removed
    read = np.zeros(reader.filters, dtype=bool)
    kept = np.zeros(reader.filters, dtype=bool)
    for norm in wired.norms.values():
        index, filters = norm.slots.T[0], norm.slots.T[1] - reader.start
        mine = (filters >= 0) & (filters < reader.filters)
        gone = constants.get(norm.name, torch.full((norm.channels,), torch.nan)).isfinite().numpy()
        read[filters[mine]] = True
        kept[filters[mine]] |= ~gone[index[mine]]
    return read & ~kept


def _set_fast_attention(enabled: bool) -> bool:
    """Switch torch's own path of nn.MultiheadAttention, which counts as nothing; what it was."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    return before


def _attention_flops(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Of the two products, for shapes (B, heads, positions, channels)."""
    products = query[2] * key[2] * (query[3] + value[3])
    return 2 * query[0] * query[1] * products


def _mkldnn_rnn_flops(x: Shape, w0: Shape, w1: Shape, *args: Any, **kwargs: Any) -> int:
    """Of one layer in one direction, for x (T, B, C) and weights (gates * H, C), (gates * H, H)."""
    return 2 * x[0] * x[1] * (prod(w0) + prod(w1))


def _cudnn_rnn_flops(x: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    """Of all layers and directions."""
    return 2 * x[0] * x[1] * sum(prod(w) for w in weights if len(w) == 2)


# What FlopCounterMode does not know: the attention of the CPU, recurrent layers.
_FLOPS_OF_OTHERS = {
    getattr(torch.ops.aten, name): count
    for name, count in (
        ("_scaled_dot_product_flash_attention_for_cpu", _attention_flops),
        ("mkldnn_rnn_layer", _mkldnn_rnn_flops),
        ("_cudnn_rnn", _cudnn_rnn_flops),
    )
    if hasattr(torch.ops.aten, name)
}
