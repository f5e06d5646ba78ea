"""What a filter does: the one place that decides.

A filter is a channel of a normalization layer y = gamma * x_hat + bias, x_hat of mean 0 and
variance 1. BN, SyncBN, InstanceNorm and their post-shifted twins are one case, as the ``bias`` of
the latter is beta + alpha.

**From the weights alone** a filter is *collapsed* when |gamma| < 1e-3 (the paper, arXiv 2001.11216,
section 3.1). More is known only where a ReLU stands right behind the layer, before any sum
(``relu``). There

- a collapsed filter is *dead* (nothing comes through) or *constant* (a positive bias does);
- one that has not collapsed is *inactive* when its ReLU practically never fires,
  Phi(bias / |gamma|) < 1e-3 (Eq. 2), so that no gradient arrives.

In front of a residual sum neither follows: what else is summed decides whether the ReLU fires. Of
such layers these words are not said. A layer whose gamma is all exactly 0 and whose bias is as it
was made has not started (``zero_init_residual``); its filters are not called collapsed.

**Measured** by one backward pass (:mod:`.backward`), whatever the wiring:

- *stuck*: no gradient arrives at gamma nor at bias. Weight decay alone acts.
- *idle*: a gradient arrives, but the filter carries nothing: were it set to its mean over the
  batch, no output would change.
- *carrying*: the rest.

A filter whose gamma or bias is NaN or infinite is *not finite* and nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import PsbnError

THRESHOLD = 1e-3
"""``|gamma|`` below which a filter is collapsed (the paper, section 3.1)."""

INACTIVE_BELOW = 1e-3
"""Activation probability below which a filter is inactive: ``bias < -3.09 |gamma|``.

At the coarsest levels of a detector a training step shows a filter about a
thousand positions, of which then less than one lets a gradient through."""

NEARLY_LINEAR_ABOVE = 0.95
"""Mean activation probability above which a ReLU is nearly the identity: ``bias > 1.64 |gamma|``.

The shift of psBN does that to a layer whose gamma is small against alpha. With ``c = bias /
|gamma|`` and Gaussian x_hat the share of the variance of ReLU(x_hat + c) that a linear function of
x_hat explains is ::

    Phi(c)^2 / ((c^2 + 1) Phi(c) + c phi(c) - (c Phi(c) + phi(c))^2),

73% at P(active) = Phi(c) = 0.5, 97% at 0.9 and 98.6% at 0.95: what is left of the layer's
nonlinearity is then a twentieth of a usual ReLU's."""

ROUNDING = float(torch.finfo(torch.float32).eps)
"""What is smaller than this beside the largest of its kind in the network counts as nothing.

A filter moves the outputs by sums in which the others stand beside it: what is below half a unit
in the last place of these is rounded away. Decay takes weights through all magnitudes down to
1e-45, so that a limit is needed; measured on such networks, few lie within a decade of it."""

UNKNOWN, STUCK, IDLE, CARRYING = range(4)
"""What :func:`does` tells of a filter."""

STATES = ("live", "inactive", "collapsed", "stuck", "idle", "carrying", "not finite")
"""What is shown of a filter: the measured state, or where there is none that of the weights."""


class MeasureError(PsbnError, ValueError):
    """Something cannot be measured; the message is one line that says why and what to do."""


def not_finite(gamma: Tensor, bias: Tensor) -> Tensor:
    """Whether gamma or bias is NaN or infinite, elementwise."""
    return ~(torch.isfinite(gamma) & torch.isfinite(bias))


def not_started(gamma: Tensor, bias: Tensor, alpha: float | None = None) -> bool:
    """Whether a layer is as ``zero_init_residual`` makes it: gamma all exactly 0, bias untouched.

    mmdet sets both gamma and bias to 0, torchvision gamma alone: the bias of a psBN layer is then
    ``alpha``.

    Args:
        gamma, bias: (C,), of one layer.
        alpha: Of a psBN layer.
    """
    untouched = [bias == 0] + ([] if alpha is None else [bias == alpha])
    return not gamma.any() and any(bool(each.all()) for each in untouched)


def collapsed(gamma: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """``|gamma| < threshold``, elementwise."""
    return gamma.abs() < threshold


def constant(
    gamma: Tensor, bias: Tensor, threshold: float = THRESHOLD, relu: Tensor | None = None
) -> Tensor:
    """Collapsed, and a constant to the layers behind: not dead.

    Args:
        gamma, bias: (C,).
        threshold: Of ``|gamma|``, and of the bias that counts as more than nothing behind a ReLU.
        relu: (C,) bool, whether a ReLU follows; True everywhere by default.
    """
    passes = bias >= threshold
    if relu is not None:
        passes = passes | ~relu
    return collapsed(gamma, threshold) & passes & ~not_finite(gamma, bias)


def dead(
    gamma: Tensor, bias: Tensor, threshold: float = THRESHOLD, relu: Tensor | None = None
) -> Tensor:
    """Collapsed, and nothing of note comes out of the ReLU behind; arguments as in `constant`."""
    silent = collapsed(gamma, threshold) & ~constant(gamma, bias, threshold, relu)
    return silent & ~not_finite(gamma, bias)


def activation_probability(gamma: Tensor, bias: Tensor) -> Tensor:
    """``P(gamma * x_hat + bias > 0) = Phi(bias / |gamma|)`` for x_hat ~ N(0, 1) (Eq. 2).

    For gamma = 0 it is 1 or 0, as the bias is positive or not.
    """
    return torch.where(
        gamma == 0, (bias > 0).to(gamma.dtype), torch.special.ndtr(bias / gamma.abs())
    )


def inactive(
    gamma: Tensor,
    bias: Tensor,
    below: float = INACTIVE_BELOW,
    relu: Tensor | None = None,
    threshold: float = THRESHOLD,
) -> Tensor:
    """Not collapsed, but the ReLU right behind practically never fires: no gradient arrives.

    Args:
        gamma, bias: (C,).
        below: Of the activation probability.
        relu: (C,) bool, whether it is known that a ReLU stands there; True everywhere by default.
        threshold: Of ``|gamma|``. Of a collapsed filter ``bias / |gamma|`` tells nothing: both
            may be 1e-41, and the rounding of what stands in front is larger.
    """
    silent = activation_probability(gamma, bias) < below
    silent = silent & ~collapsed(gamma, threshold) & ~not_finite(gamma, bias)
    return silent if relu is None else silent & relu


def nearly_linear(
    gamma: Tensor,
    bias: Tensor,
    threshold: float = THRESHOLD,
    above: float = NEARLY_LINEAR_ABOVE,
) -> bool:
    """Whether the ReLU behind a layer lets nearly everything through.

    The mean activation probability is that of the filters that carry a signal
    (finite and not collapsed); of a layer without any it is False.

    Args:
        gamma, bias: (C,), of one layer.
        threshold: Of ``|gamma|``.
        above: Threshold of the mean activation probability.
    """
    carrying = ~collapsed(gamma, threshold) & ~not_finite(gamma, bias)
    mean = activation_probability(gamma, bias)[carrying].mean()  # NaN for none
    return bool(mean > above)


def does(gradient: Tensor, effect: Tensor, unit: float | None = None) -> Tensor:
    """What each filter of a network does, from one backward pass.

    Args:
        gradient: (F,), of all filters of the network, the larger of ``|dL/dgamma|`` and
            ``|dL/dbias|``; NaN where it was not measured.
        effect: (F,), by how much L changes, to first order, when the filter is set to its mean; in
            any unit, as L may be.
        unit: How much of L one output is, if that is known; else the largest effect stands for it.

    Returns:
        (F,) uint8 of UNKNOWN, STUCK, IDLE and CARRYING. Nothing is what is less than
        :data:`ROUNDING` of the largest gradient in the network, and of the unit.
    """
    known = torch.isfinite(gradient) & torch.isfinite(effect)
    result = torch.full(gradient.shape, UNKNOWN, dtype=torch.uint8)
    if not known.any():
        return result
    result[known] = CARRYING
    result[known & (effect <= ROUNDING * (effect[known].max() if unit is None else unit))] = IDLE
    result[known & (gradient <= ROUNDING * gradient[known].max())] = STUCK
    return result


def states(
    gamma: Tensor,
    bias: Tensor,
    relu: Tensor,
    started: Tensor,
    measured: Tensor,
    threshold: float = THRESHOLD,
    inactive_below: float = INACTIVE_BELOW,
) -> Tensor:
    """What is shown of each filter: an index into :data:`STATES`, uint8; all of one shape.

    Args:
        gamma, bias: Of the filters.
        relu: Bool, whether it is known that a ReLU stands right behind.
        started: Bool, whether its layer has (:func:`not_started`).
        measured: As :func:`does` tells it.
        threshold: Of ``|gamma|``.
        inactive_below: Of the activation probability.
    """
    result = torch.zeros(gamma.shape, dtype=torch.uint8)
    result[inactive(gamma, bias, inactive_below, relu, threshold)] = 1
    result[collapsed(gamma, threshold) & started] = 2
    result = torch.where(measured == UNKNOWN, result, measured + 2)
    result[not_finite(gamma, bias)] = 6
    return result


def filter_l1(weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """L1 norm of each filter of a convolution or linear layer (the paper's Fig. 1a).

    Args:
        weight: (C_out, C_in / groups, ...), or (C_in, C_out / groups, ...) if
            ``transposed``.
        transposed: Whether it is of a transposed convolution.
        groups: Of a transposed convolution.

    Returns:
        (C_out,).
    """
    if transposed:
        per_group = weight.unflatten(0, (groups, -1)).flatten(3)
        return torch.linalg.vector_norm(per_group, 1, dim=(1, 3)).flatten()
    return torch.linalg.vector_norm(weight.flatten(1), 1, dim=1)


def count(
    gamma: Tensor,
    bias: Tensor,
    threshold: float = THRESHOLD,
    inactive_below: float = INACTIVE_BELOW,
    relu: Tensor | None = None,
    started: Tensor | None = None,
    measured: Tensor | None = None,
) -> dict[str, float]:
    """How many of some filters are in which state.

    Args:
        gamma, bias: (C,), of one layer or of all of them together.
        threshold: Of ``|gamma|``.
        inactive_below: Of the activation probability.
        relu: (C,) bool, whether it is known that a ReLU stands right behind; True by default.
        started: (C,) bool, whether the filter's layer has (:func:`not_started`); True by default.
        measured: (C,) as :func:`does` tells it; UNKNOWN by default.

    Returns:
        Counts: ``filters``, ``not_finite``, ``collapsed``; ``told``, those with a ReLU right
        behind, and of these ``dead``, ``constant``, ``inactive``; ``measured``, and of these
        ``stuck``, ``idle``, ``carrying``. ``collapsed_percent`` of the finite filters, the others
        of those told or of those measured; NaN if there are none. ``activation_probability``,
        the mean over the told that have not collapsed; NaN if there are none.
    """
    every = torch.ones(gamma.shape, dtype=torch.bool, device=gamma.device)
    relu = every if relu is None else relu
    started = every if started is None else started
    measured = torch.zeros_like(every, dtype=torch.uint8) if measured is None else measured
    finite = ~not_finite(gamma, bias)
    told, known = finite & relu, finite & (measured != UNKNOWN)
    shrunk = collapsed(gamma, threshold)
    masks = {
        "collapsed": (finite, shrunk & started),
        "dead": (told, dead(gamma, bias, threshold)),
        "constant": (told, constant(gamma, bias, threshold)),
        "inactive": (told, inactive(gamma, bias, inactive_below, relu, threshold)),
        "stuck": (known, measured == STUCK),
        "idle": (known, measured == IDLE),
        "carrying": (known, measured == CARRYING),
    }
    counts: dict[str, float] = {
        "filters": gamma.numel(),
        "not_finite": int((~finite).sum()),
        "told": int(told.sum()),
        "measured": int(known.sum()),
    }
    for name, (base, mask) in masks.items():
        of = int(base.sum())
        counts[name] = int((mask & base).sum())
        counts[f"{name}_percent"] = 100 * counts[name] / of if of else math.nan
    probability = activation_probability(gamma, bias)[told & ~shrunk]
    return {**counts, "activation_probability": float(probability.mean())}


def check_thresholds(threshold: float, inactive_below: float) -> None:
    """Raise MeasureError unless both can be thresholds."""
    if not (math.isfinite(threshold) and threshold >= 0):
        raise MeasureError(
            f"the threshold of |gamma| must not be negative (the paper's is {THRESHOLD}), "
            f"got {threshold}"
        )
    if not 0 <= inactive_below <= 1:
        raise MeasureError(
            f"the threshold of the activation probability must be in [0, 1], got {inactive_below}"
        )
