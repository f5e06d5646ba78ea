"""What a trace shows: the state of each filter at each moment, summed by layer.

Where the trace knows that no ReLU follows a layer, its filters are judged accordingly
(:mod:`.criteria`).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .criteria import collapsed, constant, inactive, not_finite
from .trace import Trace

STATES = ("live", "inactive", "dead", "constant", "not finite")
COLORS = {
    "live": "#8195a8",
    "inactive": "#e69f00",
    "dead": "#d62839",
    "constant": "#9b5de5",
    "not finite": "#2a9d8f",
}


def states(trace: Trace, index: slice | NDArray[np.int64] = slice(None)) -> NDArray[np.uint8]:
    """An index into STATES for each filter: (moments, F) for a slice of moments.

    A collapsed filter is dead or constant, whether inactive or not.
    """
    gamma, bias = torch.tensor(trace.gamma[index]), torch.tensor(trace.bias[index])
    relu = torch.tensor(trace.relu)
    state = inactive(gamma, bias, trace.inactive_below, relu).byte()
    state[collapsed(gamma, trace.threshold)] = 2
    state[constant(gamma, bias, trace.threshold, relu)] = 3
    state[not_finite(gamma, bias)] = 4
    return state.numpy()


def is_collapsed(states: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Dead or constant."""
    return (states == 2) | (states == 3)


def percent(states: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(T, F) -> (T,): the share of some filters among those that are finite, in percent."""
    finite = (states != 4).sum(1)
    return np.divide(100 * mask.sum(1), finite, out=np.full(len(mask), np.nan), where=finite > 0)


def evenly(length: int, most: int) -> NDArray[np.int64]:
    """Indices of at most ``most`` of ``length`` moments, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, max(most, 2))).round().astype(int))


def starts(trace: Trace) -> NDArray[np.int64]:
    """(layers + 1,), where the filters of each layer start, and the number of all."""
    return np.cumsum([0, *(layer.filters for layer in trace.layers)])


def sum_by_layer(trace: Trace, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(T, F) -> (T, layers)."""
    return np.add.reduceat(mask, starts(trace)[:-1], axis=1, dtype=np.int64)


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


def inactive_states(trace: Trace) -> NDArray[np.bool_]:
    """(T, F), whether a filter is inactive; it may be collapsed, too."""
    gamma, bias = torch.tensor(trace.gamma), torch.tensor(trace.bias)
    return inactive(gamma, bias, trace.inactive_below, torch.tensor(trace.relu)).numpy()
