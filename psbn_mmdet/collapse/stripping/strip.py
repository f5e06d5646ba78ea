"""``strip``: a smaller network of the same function, and the proof that it is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ...norm import PostShift, to_bn
from ..criteria import THRESHOLD, check_thresholds, collapsed, dead, not_finite
from ..layers import Layer, layers_of_model, norm_modules
from .coupling import StripError, couple
from .plan import Plan, plan, restricted
from .proof import Difference, DoesNotRunError, difference, runner
from .record import filters_record, inactive_bound, inactive_of, kinds_of, macs_record
from .surgery import Cut, cut_of, fold, take_out
from .wiring import Fate, arriving_constants

TOLERANCE = 1e-3
"""Largest difference of the outputs relative to the largest of them.

That of the threshold of |gamma|; half precision rounds by as much. What is exactly dead or constant
differs by the rounding of float32, 1e-6 or so."""

Borders = Literal["exact", "fold"]


@dataclass(frozen=True)
class Stripped:
    """A network without its collapsed filters.

    Args:
        model: In eval mode, with plain BN in the place of psBN.
        record: What went and why, what stayed and why, and the proof; JSON can hold it.
    """

    model: nn.Module
    record: dict[str, Any]


def strip(
    model: nn.Module,
    inputs: tuple[int, ...] | Tensor | Callable[[nn.Module], Any],
    *,
    threshold: float = THRESHOLD,
    inactive_below: float | None = None,
    borders: Borders = "exact",
    tolerance: float = TOLERANCE,
) -> Stripped:
    """Take the filters that carry nothing out of a network.

    - *dead* filters (collapsed, nothing comes through the ReLU) go;
    - *constant* ones (collapsed, a constant comes through) go, and what reads them gets the
      constant into its bias, or into the running mean of its BN. At the border of a convolution
      that pads with zeros that is not exact: there, of all constant channels with the same
      readers one stays and carries the constants of the others, which is;
    - *inactive* ones (the ReLU practically never fires) go if ``inactive_below`` is given;
    - so do the channels of depthwise convolutions in between.

    In sums, concatenations, depthwise and grouped convolutions and shared layers a channel goes
    only if all that is coupled to it lets it. Which channels are coupled is told by
    Torch-Pruning's dependency graph, which constants arrive where by running the network on
    numbers that vary. What cannot be told stays, and the record says so.

    The result is run beside the original before it is returned.

    Args:
        model: Any module, of which nothing is changed. psBN becomes BN in the copy.
        inputs: Images to run both networks on: a tensor (N, C, H, W), at least two, for
            ``model(images)`` or a detector of mmdet; the size (C, H, W) of two random ones; or a
            function that calls the model it is given, with two different samples at least.
        threshold: Of |gamma|.
        inactive_below: Of the activation probability below which a filter is inactive, as
            :data:`INACTIVE_BELOW`; None: they stay.
        borders: ``"fold"``: fold constants into biases although padded borders then differ.
        tolerance: Of the largest difference of the outputs relative to the largest of them.

    Returns:
        The new network and the record.

    Raises:
        StripError: The model cannot be called so or traced, it has a kind of normalization layer
            that cannot be narrowed, or the outputs differ by more than ``tolerance``.
        MeasureError: A wrong threshold, or no normalization layer.
    """
    check_thresholds(threshold, 0 if inactive_below is None else inactive_below)
    if borders not in ("exact", "fold"):
        raise StripError(f"borders is 'exact' or 'fold', got {borders!r}")
    original = copy.deepcopy(model)
    original.eval()  # that of mmdet's backbones returns nothing
    n_psbn = sum(isinstance(m, PostShift) for m in original.modules())
    to_bn(original)
    _refuse_other_norms(original)
    run, described = runner(original, inputs)
    layers = layers_of_model(original)
    _refuse_not_finite(layers)
    coupling = couple(original, run)

    def attempt(
        inactive: float | None, fold_borders: bool
    ) -> tuple[nn.Module, Plan, Cut, Difference]:
        fates = _fates(original, layers, threshold, inactive)
        constants = arriving_constants(original, fates, run, fold_borders)
        planned = plan(original, coupling, constants, fold_borders)
        try:
            return carried_out(planned)
        except DoesNotRunError:
            # Code that counts on a number of channels, which no tracer sees: leave that whole.
            groups = {channel.group for channel in planned.gone}
            sound = {group for group in groups if runs(restricted(planned, original, {group}))}
            why = "the network does not run without it"
            return carried_out(restricted(planned, original, sound, why))

    def carried_out(planned: Plan) -> tuple[nn.Module, Plan, Cut, Difference]:
        twin = copy.deepcopy(original)
        constants, norms = planned.constants, coupling.normalized_by
        biases = fold(twin, planned.gone, planned.merged, constants, norms)
        cut = cut_of(twin, planned.gone, biases)
        take_out(twin, cut)
        return twin, planned, cut, difference(original, twin, run)

    def runs(planned: Plan) -> bool:
        try:
            carried_out(planned)
        except StripError:
            return False
        return True

    differences = {}
    if inactive_below is not None or borders == "fold":
        *_, exact = attempt(None, False)
        differences["dead and constant filters alone"] = exact.relative
        if inactive_below is not None and borders == "fold":
            *_, some = attempt(inactive_below, False)
            differences["with inactive filters"] = some.relative
    stripped, planned, cut, found = attempt(inactive_below, borders == "fold")
    if not found.relative <= tolerance:
        raise StripError(
            f"the outputs of the stripped network differ by {found.relative:.2g} of the largest "
            f"output, more than the tolerance of {tolerance:g}"
            + "".join(f"; {name}: {value:.2g}" for name, value in differences.items())
        )
    kinds = kinds_of(layers, threshold, inactive_below)
    record = {
        "threshold": threshold,
        "inactive_below": inactive_below,
        "borders": borders,
        "psbn_layers_to_bn": n_psbn,
        **filters_record(planned, kinds),
        "proof": {
            "images": described,
            "largest_relative_difference": found.relative,
            "largest_output": found.largest,
            "outputs": found.outputs,
            "tolerance": tolerance,
            "differences": differences,
        },
        "parameters": {
            name: sum(p.numel() for p in m.parameters())
            for name, m in (("before", original), ("after", stripped))
        },
        "macs": macs_record(original, stripped, inputs, threshold, planned, kinds),
        "cut": cut,
    }
    if inactive_below is not None:
        record["inactive_bound"] = inactive_bound(layers, record["removed"])
    return Stripped(stripped, record)


def _refuse_other_norms(model: nn.Module) -> None:
    for name, module in norm_modules(model).items():
        if not isinstance(module, (_BatchNorm, _InstanceNorm)):
            raise StripError(
                f"{name} is a {type(module).__name__}, which cannot be narrowed: replace it by "
                "torch's own BatchNorm first"
            )


def _refuse_not_finite(layers: list[Layer]) -> None:
    for layer in layers:
        if not_finite(layer.gamma, layer.bias).any():
            raise StripError(
                f"{layer.name} has a gamma or bias that is not finite: the weights are damaged or "
                "the training has diverged"
            )


def _fates(
    model: nn.Module, layers: list[Layer], threshold: float, inactive_below: float | None
) -> dict[nn.Module, Fate]:
    modules = norm_modules(model)
    fates = {}
    for layer in layers:
        gamma, bias = layer.gamma, layer.bias
        # What comes through the ReLU of a dead filter is below the threshold: nothing.
        is_dead = dead(gamma, bias, threshold, layer.relu)
        constant = torch.where(is_dead, bias.clamp(max=0), bias)
        constant = torch.where(collapsed(gamma, threshold), constant, torch.nan)
        fates[modules[layer.name]] = Fate(constant, inactive_of(layer, inactive_below), bias)
    return fates
