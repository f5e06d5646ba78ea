"""What a collapsed filter is: criteria and counts.

Every measure is read off gamma (``weight``) and the added constant (``bias``)
of a normalization layer y = gamma * x_hat + bias, x_hat of mean 0 and variance
1. BN, SyncBN, InstanceNorm and their post-shifted twins are one case, as the
``bias`` of the latter is beta + alpha.

A filter is *collapsed* when |gamma| < 1e-3, the paper's threshold (arXiv
2001.11216, section 3.1). The filter itself then says nothing; what is left is
the bias, which tells two cases apart behind a ReLU: *dead* (the output is
about 0) and *constant* (a positive bias still comes through). A filter is
*inactive* when its ReLU practically never fires, Phi(bias / |gamma|) < 1e-3
(Eq. 2): the non-trainable region, which a filter enters long before weight
decay has shrunk gamma. Dead, constant and inactive speak of a ReLU right behind
the layer; the last layer of a residual block has the addition in between.
"""

import math

import torch
from torch import Tensor

THRESHOLD = 1e-3
"""|gamma| below which a filter is collapsed (the paper, section 3.1)."""

INACTIVE_BELOW = 1e-3
"""Activation probability below which a filter is inactive: bias < -3.09 |gamma|.

At the coarsest levels of a detector a training step shows a filter about a
thousand positions, of which then less than one lets a gradient through."""


def collapsed(gamma: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """|gamma| < threshold, elementwise."""
    return gamma.abs() < threshold


def constant(gamma: Tensor, bias: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Collapsed, but with a bias of at least ``threshold``, which ReLU lets through.

    The filter is a constant to the layers behind it, not dead.
    """
    return collapsed(gamma, threshold) & (bias >= threshold)


def dead(gamma: Tensor, bias: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Collapsed, and nothing of note comes out of the ReLU behind."""
    return collapsed(gamma, threshold) & ~(bias >= threshold)


def activation_probability(gamma: Tensor, bias: Tensor) -> Tensor:
    """P(gamma * x_hat + bias > 0) = Phi(bias / |gamma|) for x_hat ~ N(0, 1) (Eq. 2).

    For gamma = 0 it is 1 or 0, as the bias is positive or not.
    """
    return torch.where(
        gamma == 0, (bias > 0).to(gamma.dtype), torch.special.ndtr(bias / gamma.abs())
    )


def inactive(gamma: Tensor, bias: Tensor, below: float = INACTIVE_BELOW) -> Tensor:
    """Activation probability < ``below``: the non-trainable region of a ReLU unit."""
    return activation_probability(gamma, bias) < below


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
) -> dict[str, float]:
    """How many of some filters are in which state.

    Args:
        gamma, bias: (C,), of one layer or of all of them together.
        threshold: Of |gamma|.
        inactive_below: Of the activation probability.

    Returns:
        ``filters``, ``collapsed`` = ``dead`` + ``constant``, ``inactive``,
        ``not_finite`` (counts), ``collapsed_percent``, and
        ``activation_probability``, the mean over the finite filters.
    """
    probability = activation_probability(gamma, bias)
    finite = torch.isfinite(gamma) & torch.isfinite(bias)
    n_collapsed = int(collapsed(gamma, threshold).sum())
    n_constant = int(constant(gamma, bias, threshold).sum())
    return {
        "filters": gamma.numel(),
        "collapsed": n_collapsed,
        "dead": n_collapsed - n_constant,
        "constant": n_constant,
        "inactive": int((probability < inactive_below).sum()),
        "not_finite": int((~finite).sum()),
        "collapsed_percent": 100 * n_collapsed / max(gamma.numel(), 1),
        "activation_probability": float(probability[finite].mean()) if finite.any() else math.nan,
    }


def check_thresholds(threshold: float, inactive_below: float) -> None:
    """Raise ValueError unless both can be thresholds."""
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(
            f"the threshold of |gamma| must not be negative (the paper's is {THRESHOLD}), "
            f"got {threshold}"
        )
    if not 0 <= inactive_below <= 1:
        raise ValueError(
            f"the threshold of the activation probability must be in [0, 1], got {inactive_below}"
        )
