"""Weight decay alone: the path of a filter that no gradient reaches (the paper, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .theorem import _not_negative, _numbers, _positive, _scale


def C(gamma: ArrayLike, beta: ArrayLike, alpha: float) -> NDArray[Any]:
    """How far a psBN filter is from silence: `(beta + alpha) / |gamma|`, section 5.

    It fires with probability `Phi(C)`. For BN this is `beta / |gamma|`, which decay does not move.
    """
    return (_numbers("beta", beta) + _positive("alpha", alpha)) / _scale(gamma)


def C_increment(
    gamma: ArrayLike, alpha: float, lr: ArrayLike, weight_decay: ArrayLike
) -> NDArray[Any]:
    """What one step of decay without momentum adds to `C`, exactly (section 5).

    ::

        C^(t+1) - C^t = eta lambda / (1 - eta lambda) * alpha / |gamma^t|,

    since `(beta (1 - eta lambda) + alpha) / (|gamma| (1 - eta lambda))` is
    `(beta + alpha / (1 - eta lambda)) / |gamma|`.
    """
    rate = _decay_rate(lr, weight_decay)
    return rate / (1 - rate) * _positive("alpha", alpha) / _scale(gamma)


def _decay_rate(lr: ArrayLike, weight_decay: ArrayLike) -> NDArray[Any]:
    rate = _not_negative("lr", lr) * _not_negative("weight_decay", weight_decay)
    if (rate >= 1).any():
        raise ValueError(
            f"lr * weight_decay is {rate.max():g}: wanted below 1, else one step of decay takes a"
            " parameter to 0 or past it"
        )
    return rate


def _check_momentum(momentum: float, dampening: float, nesterov: bool) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum:g}: wanted 0 <= momentum < 1")
    if not 0 <= dampening < 1:
        raise ValueError(f"dampening is {dampening:g}: wanted 0 <= dampening < 1")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            "nesterov needs a momentum above 0 and a dampening of 0, as in torch's SGD"
        )


def decay_path(
    gamma: ArrayLike,
    beta: ArrayLike,
    lr: ArrayLike,
    weight_decay: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    grad: Callable[[int, NDArray[Any], NDArray[Any]], tuple[ArrayLike, ArrayLike]] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where torch's SGD takes (gamma, beta) under a schedule, step by step.

    ::

        d = g + lambda p;   u = mu u + (1 - tau) d  (the first time u = d);
        p = p - eta_t u,    or  p = p - eta_t (d + mu u)  with Nesterov.

    The same for BN (beta is its bias) and psBN: they differ in what is added, not in what decays.

    Args:
        lr: eta_t for each step: a sequence of T numbers.
        momentum: mu. The buffer u starts empty, as in a new optimizer.
        dampening: tau.
        grad: `grad(t, gamma, beta)` gives the gradients by gamma and beta at step t, without decay.
            None: the filter does not fire, both are 0.

    Returns:
        gamma and beta after 0, 1, ..., T steps: shape ``(T + 1, *shape)``.
    """
    rates = np.atleast_1d(_numbers("lr", lr))
    _decay_rate(rates, weight_decay)
    _check_momentum(momentum, dampening, nesterov)
    p = np.stack(np.broadcast_arrays(_numbers("gamma", gamma), _numbers("beta", beta)))
    path, u = [p], None
    for t, eta in enumerate(rates):
        d = weight_decay * p
        if grad is not None:
            d = d + np.stack(np.broadcast_arrays(*grad(t, p[0], p[1])))
        if momentum:
            u = d if u is None else momentum * u + (1 - dampening) * d
            d = d + momentum * u if nesterov else u
        p = p - eta * d
        path.append(p)
    return tuple(np.stack(path, axis=1))


def decay_factors(
    lr: ArrayLike,
    weight_decay: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> NDArray[Any]:
    """What is left of gamma, and of beta, after 0, 1, ..., T steps without a gradient.

    A step of SGD is linear in the parameter and its buffer, so it multiplies gamma and beta of
    every filter by the same number: `gamma^t = s_t gamma^0`, `beta^t = s_t beta^0`, and ::

        C^t = (beta^0 + alpha / s_t) / |gamma^0|        for s_t > 0.

    Without momentum `s_t` is the product of `1 - eta_t lambda`. AdamW, whose decay is apart from
    the gradient, does the same as SGD without momentum. (Adam with L2 does not: it divides the
    decay of each parameter by its own size, so that gamma and beta each lose about eta a step.)

    Args:
        lr: eta_t for each step: a sequence of T numbers.

    Returns:
        s_0 = 1, s_1, ..., s_T: shape (T + 1,).
    """
    return decay_path(1.0, 1.0, lr, weight_decay, momentum, dampening, nesterov)[0]


def steps_until_active(
    gamma: ArrayLike,
    beta: ArrayLike,
    alpha: float,
    lr: ArrayLike,
    weight_decay: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    active_C: float = -3.0,
) -> NDArray[Any]:
    """After how many steps of decay alone a silent psBN filter has `C >= active_C` again.

    By `decay_factors` that is the first t with `s_t <= alpha / (active_C |gamma| - beta)`. For a
    constant learning rate in closed form: without momentum `t = log s / log(1 - eta lambda)`,
    rounded up; with momentum `s_t` is the sum of two geometric sequences (the eigenvalues of the
    linear step), of which the slower one gives t. For a sequence of learning rates the recurrence
    is followed.

    Limits. The forecast is for no gradient at all: a filter that still fires on one activation in
    ten thousand gets one, which may outweigh the decay either way. A momentum buffer that is not
    empty adds a passing `eta u / (1 - mu)`. And float32 loses a decay of less than half a unit in
    the last place: below `eta lambda = 3e-8` without momentum (`eta lambda < 3e-8 (1 - mu)` with
    it) nothing moves there, for BN or psBN.

    Args:
        gamma, beta: of the filters, broadcast against each other.
        lr: a number for a learning rate that stays, or eta_t for each step.
        active_C: from which C on a filter counts as active. -3: it fires on 0.13 % of its inputs.
            For a given batch take minus its largest normalized input.

    Returns:
        Number of steps: 0 where active now, inf where the schedule ends too soon or nothing decays.

    Raises:
        ValueError: a gamma is 0, `alpha <= 0`, a negative learning rate or decay,
            `lr * weight_decay >= 1`.
    """
    scale, beta = _scale(gamma), _numbers("beta", beta)
    shift = _positive("alpha", alpha)
    rate = _decay_rate(lr, weight_decay)
    _check_momentum(momentum, dampening, nesterov)
    now_active = (beta + shift) / scale >= active_C
    # Where it is not active now, the denominator is above alpha and the wanted factor below 1.
    wanted = shift / np.where(now_active, shift, active_C * scale - beta)
    if np.ndim(lr) == 0:
        steps = _first_below(wanted, float(rate), momentum, dampening, nesterov)
    else:
        factors = decay_factors(lr, weight_decay, momentum, dampening, nesterov)
        falling = np.minimum.accumulate(factors)
        steps = np.searchsorted(-falling, -wanted)
        steps = np.where(steps == len(factors), np.inf, steps)
    return np.where(now_active, 0.0, steps)


def _first_below(
    wanted: NDArray[Any], rate: float, momentum: float, dampening: float, nesterov: bool
) -> NDArray[Any]:
    """First t with `s_t <= wanted`, for `0 < wanted < 1` and a constant rate `eta lambda`."""
    if rate == 0:
        return np.full(np.shape(wanted), np.inf)
    if momentum == 0:
        return np.ceil(np.log(wanted) / np.log1p(-rate))
    # (s, eta u) after t steps: M^(t-1) times their values after the first, whose buffer is plain d.
    first = np.array([1 - rate * (1 + momentum * nesterov), rate])
    buffer = np.array([(1 - dampening) * rate, momentum])
    now = np.array([1 - rate, 0.0]) - momentum * buffer if nesterov else np.array([1, 0]) - buffer
    step = np.stack([now, buffer])
    roots = np.linalg.eigvals(step)
    share_slow = 0.0
    if np.isrealobj(roots) and not np.isclose(roots[0], roots[1], rtol=1e-6):
        slow, fast = roots.max(), roots.min()
        share_slow = ((step @ first)[0] - fast * first[0]) / (slow - fast)
    if share_slow <= 0:
        # The decay, or its first step, is so strong that s_t soon swings through 0: count it out.
        values, state = [1.0], first
        while values[-1] > wanted.min():
            values.append(state[0])
            state = step @ state
        return np.searchsorted(-np.minimum.accumulate(values), -wanted).astype(np.float64)
    share_fast = first[0] - share_slow

    def factor(t: NDArray[Any]) -> NDArray[Any]:
        return np.where(t < 1, 1.0, share_slow * slow ** (t - 1) + share_fast * fast ** (t - 1))

    steps = np.maximum(1, np.ceil(1 + np.log(wanted / share_slow) / np.log(slow)))
    # The fast part, gone after a few steps, can shift the crossing by some of them.
    while (late := (steps > 0) & (factor(steps - 1) <= wanted)).any():
        steps = steps - late
    while (early := factor(steps) > wanted).any():
        steps = steps + early
    return steps
