"""What a collapsed filter is: criteria and counts.

Every measure is read off gamma (``weight``) and the added constant (``bias``)
of a normalization layer y = gamma * x_hat + bias, x_hat of mean 0 and variance
1. BN, SyncBN, InstanceNorm and their post-shifted twins are one case, as the
``bias`` of the latter is beta + alpha.

A filter is *collapsed* when |gamma| < 1e-3, the paper's threshold (arXiv
2001.11216, section 3.1). The filter itself then says nothing; what is left is
the bias. Behind a ReLU two cases differ: *dead* (the output is about 0) and
*constant* (a positive bias still comes through). A filter is *inactive* when
its ReLU practically never fires, Phi(bias / |gamma|) < 1e-3 (Eq. 2): the
non-trainable region, which a filter enters long before weight decay has shrunk
gamma.

Dead and inactive speak of a ReLU, or another activation that is exactly 0 below
0 (ReLU6), which the mask ``relu`` marks: SiLU, LeakyReLU or no activation at
all let a negative value and its gradient through. A collapsed filter without a
ReLU is *constant*: it passes act(bias), whatever the sign of the bias. (The last
layer of a residual block has the addition between itself and the ReLU.)

A filter whose gamma or bias is NaN or infinite is *not finite* and nothing
else: it is in none of the other counts and not in the base of the percentages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import PsbnError

THRESHOLD = 1e-3
"""|gamma| below which a filter is collapsed (the paper, section 3.1)."""

INACTIVE_BELOW = 1e-3
"""Activation probability below which a filter is inactive: bias < -3.09 |gamma|.

At the coarsest levels of a detector a training step shows a filter about a
thousand positions, of which then less than one lets a gradient through."""

NEARLY_LINEAR_ABOVE = 0.95
"""Mean activation probability above which a ReLU is nearly the identity: bias > 1.64 |gamma|.

The shift of psBN does that to a layer whose gamma is small against alpha. With c = bias / |gamma|
and Gaussian x_hat the share of the variance of ReLU(x_hat + c) that a linear function of x_hat
explains is

    Phi(c)^2 / ((c^2 + 1) Phi(c) + c phi(c) - (c Phi(c) + phi(c))^2),

73% at P(active) = Phi(c) = 0.5, 97% at 0.9 and 98.6% at 0.95: what is left of the layer's
nonlinearity is then a twentieth of a usual ReLU's."""


class MeasureError(PsbnError, ValueError):
    """Something cannot be measured; the message is one line that says why and what to do."""


def collapsed(gamma: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """|gamma| < threshold, elementwise."""
    return gamma.abs() < threshold


def not_finite(gamma: Tensor, bias: Tensor) -> Tensor:
    """Whether gamma or bias is NaN or infinite, elementwise."""
    return ~(torch.isfinite(gamma) & torch.isfinite(bias))


def constant(
    gamma: Tensor, bias: Tensor, threshold: float = THRESHOLD, relu: Tensor | None = None
) -> Tensor:
    """Collapsed, and a constant to the layers behind: not dead.

    Args:
        gamma, bias: (C,).
        threshold: Of |gamma|, and of the bias that counts as more than nothing behind a ReLU.
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
    """P(gamma * x_hat + bias > 0) = Phi(bias / |gamma|) for x_hat ~ N(0, 1) (Eq. 2).

    For gamma = 0 it is 1 or 0, as the bias is positive or not.
    """
    return torch.where(
        gamma == 0, (bias > 0).to(gamma.dtype), torch.special.ndtr(bias / gamma.abs())
    )


def inactive(
    gamma: Tensor, bias: Tensor, below: float = INACTIVE_BELOW, relu: Tensor | None = None
) -> Tensor:
    """Activation probability < ``below``: the non-trainable region of a ReLU unit.

    Args:
        gamma, bias: (C,).
        below: Threshold of the activation probability.
        relu: (C,) bool, whether a ReLU follows; True everywhere by default.
    """
    silent = (activation_probability(gamma, bias) < below) & ~not_finite(gamma, bias)
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
        threshold: Of |gamma|.
        above: Threshold of the mean activation probability.
    """
    carrying = ~collapsed(gamma, threshold) & ~not_finite(gamma, bias)
    mean = activation_probability(gamma, bias)[carrying].mean()  # NaN for none
    return bool(mean > above)


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
) -> dict[str, float]:
    """How many of some filters are in which state.

    Args:
        gamma, bias: (C,), of one layer or of all of them together.
        threshold: Of |gamma|.
        inactive_below: Of the activation probability.
        relu: (C,) bool, whether a ReLU follows the filter; True everywhere by default.

    Returns:
        Counts: ``filters``, ``collapsed`` = ``dead`` + ``constant``,
        ``inactive``, ``not_finite``. ``collapsed_percent``, ``dead_percent``,
        ``constant_percent`` and ``inactive_percent`` of the finite filters, NaN
        if there are none. ``activation_probability``, the mean over the finite
        filters with a ReLU, NaN if there are none.
    """
    unusable = not_finite(gamma, bias)
    n_constant = int(constant(gamma, bias, threshold, relu).sum())
    n_dead = int(dead(gamma, bias, threshold, relu).sum())
    counts = {
        "filters": gamma.numel(),
        "collapsed": n_constant + n_dead,
        "dead": n_dead,
        "constant": n_constant,
        "inactive": int(inactive(gamma, bias, inactive_below, relu).sum()),
        "not_finite": int(unusable.sum()),
    }
    finite = counts["filters"] - counts["not_finite"]
    judged = ~unusable if relu is None else ~unusable & relu
    return {
        **counts,
        **{
            f"{name}_percent": 100 * counts[name] / finite if finite else math.nan
            for name in ("collapsed", "dead", "constant", "inactive")
        },
        "activation_probability": float(activation_probability(gamma, bias)[judged].mean()),
    }


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
