"""What a trace shows: the state of each filter at each moment, summed by layer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from . import criteria
from .criteria import STATES
from .trace import Trace

COLORS = dict(
    zip(
        STATES,
        ("#8195a8", "#e69f00", "#d62839", "#7b1fa2", "#f08fb0", "#4c9f70", "#2a9d8f"),
        strict=True,
    )
)
MEASURES = ("collapsed", "stuck", "idle", "inactive", "not finite")
"""What is counted over time, in the order of :func:`counted`."""


def _known(
    trace: Trace, index: slice | NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """gamma, bias, relu, started, does: (moments, F) each."""
    gamma, bias, does = (
        torch.from_numpy(np.array(values[index]))
        for values in (trace.gamma, trace.bias, trace.does)
    )
    sizes = [layer.filters for layer in trace.layers]
    relu = np.repeat([layer.followed_by == "relu" for layer in trace.layers], sizes)
    started = torch.ones(gamma.shape, dtype=torch.bool)
    for layer, at in zip(trace.layers, np.cumsum([0, *sizes[:-1]]), strict=True):
        part = slice(at, at + layer.filters)
        zero = (gamma[:, part] == 0).all(1) & (bias[:, part] == (layer.alpha or 0)).all(1)
        started[zero, part] = False
    return gamma, bias, torch.from_numpy(relu).expand_as(gamma), started, does


def states(trace: Trace, index: slice | NDArray[np.int64] = slice(None)) -> NDArray[np.uint8]:
    """An index into STATES for each filter: (moments, F) for a slice of moments."""
    known, thresholds = _known(trace, index), (trace.threshold, trace.inactive_below)
    return criteria.states(*known, *thresholds).numpy()


def counted(
    trace: Trace, index: slice | NDArray[np.int64] = slice(None)
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which filters are what, and of how many that is known: (len(MEASURES), moments, F) each.

    A filter may be collapsed and stuck. The shares of collapsed filters are of the finite ones,
    those of stuck and idle of the measured, that of inactive of those with a ReLU right behind.
    """
    gamma, bias, relu, started, does = _known(trace, index)
    finite = ~criteria.not_finite(gamma, bias)
    measured = finite & (does != criteria.UNKNOWN)
    masks = (
        criteria.collapsed(gamma, trace.threshold) & started & finite,
        measured & (does == criteria.STUCK),
        measured & (does == criteria.IDLE),
        criteria.inactive(gamma, bias, trace.inactive_below, relu, trace.threshold),
        ~finite,
    )
    bases = (finite, measured, measured, finite & relu, torch.ones_like(finite))
    return torch.stack(masks).numpy(), torch.stack(bases).numpy()


def percent(masks: NDArray[np.bool_], bases: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(..., F) -> (...): the share in percent, NaN where there are none."""
    n = bases.sum(-1)
    return np.divide(100 * masks.sum(-1), n, out=np.full(n.shape, np.nan), where=n > 0)


def evenly(length: int, most: int) -> NDArray[np.int64]:
    """Indices of at most ``most`` of ``length`` moments, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, max(most, 2))).round().astype(int))


def starts(trace: Trace) -> NDArray[np.int64]:
    """(layers + 1,), where the filters of each layer start, and the number of all."""
    return np.cumsum([0, *(layer.filters for layer in trace.layers)])


def sum_by_layer(trace: Trace, masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(..., F) -> (..., layers)."""
    return np.add.reduceat(masks, starts(trace)[:-1], axis=-1, dtype=np.int64)


def non_trainable(trace: Trace, half_width: float, bottom: float) -> list[tuple[float, float]]:
    """Corners of the non-trainable region within |gamma| <= half_width, bias >= bottom.

    Phi(bias / |gamma|) < p is bias < Phi^-1(p) |gamma|, a wedge below the origin.
    """
    p = torch.tensor(trace.inactive_below, dtype=torch.float64)
    slope = -float(torch.special.ndtri(p))  # 3.09 for p = 1e-3
    if bottom >= 0 or not np.isfinite(slope) or slope <= 0:
        return []
    reach = min(half_width, -bottom / slope)
    corners = [(-reach, -slope * reach), (0.0, 0.0), (reach, -slope * reach)]
    if reach == half_width:
        corners += [(half_width, bottom), (-half_width, bottom)]
    return corners
