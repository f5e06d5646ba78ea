r"""Why filters collapse and how psBN brings them back, as numbers (arXiv 2001.11216).

The paper's section 4 follows one filter `y = ReLU(gamma * x_hat + beta)` with `x_hat ~ N(0, 1)`. It
fires with probability `Phi(z)`, where `z = beta / |gamma|`. One step of SGD on nothing but noise
moves that probability (Theorem 1): `K`, `J`, `drift`, and `simulate_drift`, which knows only Eq. 1.
Section 5 is about a filter that no longer fires, so that weight decay alone moves it: `C`,
`C_increment`, `decay_factors`, `decay_path`, and the forecast `steps_until_active`.

In section 4 `beta` is what the layer adds: for psBN give `beta + alpha`. In section 5 `beta` is the
trained parameter and `alpha` stands on its own, as in Eq. 6.

**Where Eq. 5 comes from.** Let `f(gamma, beta) = Phi(beta / gamma)`, `gamma > 0`. Then

    f_bb = -z phi / gamma^2,   f_bg = (z^2 - 1) phi / gamma^2,   f_gg = (2z - z^3) phi / gamma^2.

The step of Eq. 1 is `-eta g H (x_hat, 1)` with `H = [x_hat > -z]` and `g` independent of `x_hat`,
`E g = 0`, `E g^2 = c^2`. So the first-order term is exactly 0, and the second moments of the step
are `eta^2 c^2` times the moments of the part of `x_hat` that fires,

    E[H] = Phi,   E[x_hat H] = phi,   E[x_hat^2 H] = Phi - z phi.

Half the sum of derivatives times moments is `eta^2 c^2 / (2 gamma^2)` times

    (2z - z^3) phi (Phi - z phi) + 2 (z^2 - 1) phi^2 - z phi Phi
        = (z^4 - 2) phi^2 + (z - z^3) phi Phi = K(z).

Eq. 3 to 5 stand as printed. What one has to know to use them:

* They are the second order of an expansion in `eta c / |gamma|`. For symmetric noise the next term
  is of fourth order; at `eta c = |gamma|` and beta = 0 less than a quarter of Eq. 3 is left
  (`simulate_drift` shows it).
* `c` is the standard deviation of the gradient. (The paper once calls `c` itself the variance; its
  Eq. 3 needs `c^2` to be.) Eq. 1 is a step on one activation. Gradients that are summed over `n`
  independent activations have `n c^2` in the place of `c^2`.
* Eq. 3 takes gamma and beta as independent. For filters given one by one, average `drift` over
  them.
* `K` is not negative everywhere: below `z = -1.1533` it is positive, up to 0.071. The few samples
  that fire there push beta either way, and Phi is convex. The part even in `z` is negative
  everywhere, and that is all that an even distribution of beta leaves of it.
* For `gamma < 0`, `(gamma, x_hat)` and `(-gamma, -x_hat)` give the same filter and the same step:
  the functions take `|gamma|`. The paper's `Phi(beta' / gamma')` for a step across `gamma = 0`
  would be the probability of not firing; `simulate_drift` uses `|gamma'|`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

_SQRT_2PI = np.sqrt(2 * np.pi)
# The integral of K over the real line: with d/dz (z^2 + 1) phi = (z - z^3) phi, integrating by
# parts leaves that of (z^4 - z^2 - 3) phi^2, and phi^2 has the moments 1, 1/2, 3/4 over 2 sqrt(pi).
_INTEGRAL_OF_K = -11 / (8 * np.sqrt(np.pi))


def _phi(z: NDArray) -> NDArray:
    return np.exp(-0.5 * np.square(z)) / _SQRT_2PI


def _numbers(name: str, value: ArrayLike) -> NDArray:
    array = np.asarray(value, dtype=np.float64)
    if np.isnan(array).any():
        raise ValueError(f"{name} holds NaN: wanted numbers")
    return array


def _scale(gamma: ArrayLike) -> NDArray:
    array = np.abs(_numbers("gamma", gamma))
    if (array == 0).any():
        raise ValueError(
            "gamma is 0 in at least one filter: beta / gamma is undefined, leave it out"
        )
    return array


def _positive(name: str, value: ArrayLike) -> NDArray:
    array = _numbers(name, value)
    if (array <= 0).any():
        raise ValueError(f"{name} is {array.min():g}: wanted a number above 0")
    return array


def _not_negative(name: str, value: ArrayLike) -> NDArray:
    array = _numbers(name, value)
    if (array < 0).any():
        raise ValueError(f"{name} is {array.min():g}: wanted 0 or above")
    return array


def log_abs_K(z: ArrayLike) -> tuple[NDArray, NDArray]:
    r"""Sign and logarithm of the absolute value of `K(z)`, Eq. 5, where `K` itself underflows.

    `phi(z)^2` is taken out of `K`; what is left is a polynomial and `Phi / phi`, the Mills ratio,
    which `erfcx` gives for `z < 0` without a quotient of vanishing numbers. For `z >= 0`, where
    `Phi / phi` overflows, only one `phi` is taken out. The fourth power of `1 + |z|` is taken out
    of both, so that nothing overflows on the way either. The two terms cancel only at the simple
    zero of `K`, `z = -1.1533`; elsewhere the relative error is a few units of rounding times
    `1 + z^2`, the condition of `exp(-z^2)`.

    Returns:
        sign: of `K`: -1, 0 or 1, in the shape of `z`.
        log_abs: `log |K(z)|`, in the shape of `z`.
    """
    z = _numbers("z", z)
    w = 1 + np.abs(z)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        s = np.where(np.isinf(z), np.sign(z), z / w)
        quartic = s**4 - 2 / w**4
        cubic = (s / w**2 - s**3) / w
        mills = np.sqrt(np.pi / 2) * special.erfcx(-np.minimum(z, 0) / np.sqrt(2))
        rest = np.where(z < 0, quartic + cubic * mills, quartic * _phi(z) + cubic * special.ndtr(z))
        log_phi = -0.5 * np.square(z) - np.log(_SQRT_2PI)
        log_abs = 4 * np.log(w) + np.log(np.abs(rest)) + log_phi * np.where(z < 0, 2, 1)
        ends = np.isinf(z)
        return np.where(ends, -s, np.sign(rest)), np.where(ends, -np.inf, log_abs)


def K(z: ArrayLike) -> NDArray:
    r"""What a noisy step does to the probability of firing, Eq. 5.

        K(z) = (z^4 - 2) phi(z)^2 + (z - z^3) phi(z) Phi(z)

    `K(0) = -1 / pi`; the integral over the line is `-11 / (8 sqrt(pi))`. Any real `z` will do;
    where the value is below the smallest double (`z > 38.6` or `z < -27.5`) it is a zero of the
    right sign, and `log_abs_K` still has its size.
    """
    sign, log_abs = log_abs_K(z)
    with np.errstate(under="ignore"):
        return np.copysign(np.exp(log_abs), sign)


@dataclass(frozen=True)
class Normal:
    """beta ~ N(mean, std^2) over the filters of a layer."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        _numbers("mean", self.mean)
        _positive("std", self.std)

    def sample(self, rng: np.random.Generator, size: tuple[int, ...]) -> NDArray:
        return rng.normal(self.mean, self.std, size)

    def expected_K(self, gamma: NDArray) -> NDArray:
        """`E K(beta / gamma)` in closed form, for `gamma > 0`.

        A normal density times phi, or phi^2, is a normal density again (with a smaller variance `v`
        and its mean `a` drawn to 0) times a constant. That leaves moments of a normal variable, and
        `M_k = E[z^k Phi(z)]`, which follow one from the other by Stein's lemma
        `E[(z - a) h(z)] = v E[h'(z)]`. Accurate relative to `max |K|`, not in the far tail.
        """
        mean, var = self.mean / gamma, np.square(self.std / gamma)

        shrink = 1 + 2 * var
        a, v = mean / shrink, var / shrink
        mass = np.exp(-np.square(mean) / shrink) / (2 * np.pi * np.sqrt(shrink))
        quartic = mass * (a**4 + 6 * a**2 * v + 3 * v**2 - 2)

        shrink = 1 + var
        a, v = mean / shrink, var / shrink
        mass = _phi(mean / np.sqrt(shrink)) / np.sqrt(shrink)
        # E[phi], E[z phi] and E[z^2 phi] under N(a, v)
        p0 = _phi(a / np.sqrt(1 + v)) / np.sqrt(1 + v)
        p1 = p0 * a / (1 + v)
        p2 = p0 * (v / (1 + v) + np.square(a / (1 + v)))
        m0 = special.ndtr(a / np.sqrt(1 + v))
        m1 = a * m0 + v * p0
        m2 = a * m1 + v * (m0 + p1)
        m3 = a * m2 + v * (2 * m1 + p2)
        return quartic + mass * (m1 - m3)


@dataclass(frozen=True)
class Uniform:
    """beta ~ U(low, high) over the filters of a layer."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        if not _numbers("low", self.low) < _numbers("high", self.high):
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}: wanted low < high")

    def sample(self, rng: np.random.Generator, size: tuple[int, ...]) -> NDArray:
        return rng.uniform(self.low, self.high, size)

    def expected_K(self, gamma: NDArray) -> NDArray:
        """`E K(beta / gamma)`: the difference of an antiderivative of `K`, for `gamma > 0`.

            A(z) = (z^2 + 1) phi Phi - (z^3 / 2 + z / 4) phi^2 - 11 / (8 sqrt(pi)) Phi(sqrt(2) z)

        Counted from the nearer end of the line, so that a tail keeps its digits. Where the interval
        is narrow the difference would lose them: there Gauss and Legendre's 24 points, exact to
        rounding for `|z2 - z1| < 1`.
        """
        low, high = self.low / gamma, self.high / gamma

        def antiderivative(z: NDArray) -> NDArray:
            phi = _phi(z)
            end = _INTEGRAL_OF_K * np.where(z < 0, 1, -1) * special.ndtr(-np.sqrt(2) * np.abs(z))
            return (z**2 + 1) * phi * special.ndtr(z) - (z**3 / 2 + z / 4) * phi**2 + end

        with np.errstate(under="ignore"):
            across = np.where((low < 0) & (high >= 0), _INTEGRAL_OF_K, 0.0)
            wide = (antiderivative(high) - antiderivative(low) + across) / (high - low)
            nodes, weights = np.polynomial.legendre.leggauss(24)
            points = (high + low)[..., None] / 2 + (high - low)[..., None] / 2 * nodes
            narrow = K(points) @ weights / 2
        return np.where(high - low < 1, narrow, wide)


def J(gamma: ArrayLike, beta: Normal | Uniform | ArrayLike) -> NDArray:
    """The mean of `K(beta / |gamma|)` over beta, Eq. 4; negative for every even distribution.

    Args:
        beta: a distribution of beta over the filters, or numbers, each one a point distribution
            (broadcast against `gamma`). `beta = 0`, as a layer starts, gives `-1 / pi`.

    Raises:
        ValueError: a gamma is 0.
    """
    scale = _scale(gamma)
    if isinstance(beta, Normal | Uniform):
        return beta.expected_K(scale)
    return K(_numbers("beta", beta) / scale)


def drift(
    gamma: ArrayLike, beta: Normal | Uniform | ArrayLike, lr: float, grad_std: float
) -> NDArray:
    """Expected change of the probability of firing in one noisy step, Eq. 3, to second order.

        E Phi(beta' / |gamma'|) - E Phi(beta / |gamma|) = eta^2 c^2 / (2 gamma^2) J(gamma)

    For each gamma; the integral over P(gamma) in Eq. 3 is the mean over the filters.

    Args:
        gamma: scales of the filters, any sign.
        beta: what the layer adds, one number for each filter, or its distribution (`J`).
        lr: eta.
        grad_std: c, the standard deviation of the gradient of the loss by the filter's output.

    Raises:
        ValueError: a gamma is 0; `lr` or `grad_std` is negative.
    """
    step = _not_negative("lr", lr) * _not_negative("grad_std", grad_std)
    return np.square(step / _scale(gamma)) / 2 * J(gamma, beta)


class Estimate(NamedTuple):
    """A mean over random draws and its standard error."""

    mean: NDArray
    stderr: NDArray


def simulate_drift(
    gamma: ArrayLike,
    beta: Normal | Uniform | ArrayLike,
    lr: float,
    grad_std: float,
    samples: int = 100_000,
    seed: int = 0,
    antithetic: bool = True,
) -> Estimate:
    """Take the noisy step of Eq. 1 many times and measure the change of `Phi(beta / |gamma|)`.

    It uses neither Eq. 3 nor any expansion: draw `x_hat ~ N(0, 1)`, a gradient `g ~ N(0, c^2)` and,
    from a distribution, beta; take the step if the filter fires; compare the exact probabilities.

    Args:
        samples: draws for each filter.
        antithetic: take the step for `g` and for `-g` and count their mean as one draw. It has the
            same expectation, and the part linear in `g`, which averages to 0 but makes nearly all
            of the variance, cancels in each pair.

    Returns:
        mean and standard error, in the common shape of `gamma` and `beta`.
    """
    scale = _scale(gamma)
    step = float(_not_negative("lr", lr) * _not_negative("grad_std", grad_std))
    if samples < 2:
        raise ValueError(f"samples is {samples}: wanted 2 or more, for a standard error")
    from_distribution = isinstance(beta, Normal | Uniform)
    shape = scale.shape if from_distribution else np.broadcast_shapes(scale.shape, np.shape(beta))
    fixed = None if from_distribution else _numbers("beta", beta)
    rng = np.random.default_rng(seed)
    count, total, squares = 0, np.zeros(shape), np.zeros(shape)
    chunk = max(2, int(2e6 // max(1, np.prod(shape))))  # draws need not stay in memory
    while count < samples:
        n = min(chunk, samples - count)
        b = beta.sample(rng, (n, *shape)) if from_distribution else fixed
        x = rng.standard_normal((n, *shape))
        g = step * rng.standard_normal((n, *shape)) * (scale * x + b > 0)
        change = special.ndtr((b - g) / np.abs(scale - g * x))
        if antithetic:
            change = (change + special.ndtr((b + g) / np.abs(scale + g * x))) / 2
        change -= special.ndtr(b / scale)
        total += change.sum(0)
        squares += np.square(change).sum(0)
        count += n
    mean = total / samples
    variance = (squares - samples * np.square(mean)) / (samples - 1)
    return Estimate(mean, np.sqrt(np.maximum(variance, 0) / samples))


def C(gamma: ArrayLike, beta: ArrayLike, alpha: float) -> NDArray:
    """How far a psBN filter is from silence: `(beta + alpha) / |gamma|`, section 5.

    It fires with probability `Phi(C)`. For BN this is `beta / |gamma|`, which decay does not move.
    """
    return (_numbers("beta", beta) + _positive("alpha", alpha)) / _scale(gamma)


def C_increment(gamma: ArrayLike, alpha: float, lr: ArrayLike, weight_decay: ArrayLike) -> NDArray:
    """What one step of decay without momentum adds to `C`, exactly (section 5).

        C^(t+1) - C^t = eta lambda / (1 - eta lambda) * alpha / |gamma^t|,

    since `(beta (1 - eta lambda) + alpha) / (|gamma| (1 - eta lambda))` is
    `(beta + alpha / (1 - eta lambda)) / |gamma|`.
    """
    rate = _decay_rate(lr, weight_decay)
    return rate / (1 - rate) * _positive("alpha", alpha) / _scale(gamma)


def _decay_rate(lr: ArrayLike, weight_decay: ArrayLike) -> NDArray:
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
    grad: Callable[[int, NDArray, NDArray], tuple[ArrayLike, ArrayLike]] | None = None,
) -> tuple[NDArray, NDArray]:
    """Where torch's SGD takes (gamma, beta) under a schedule, step by step.

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
        gamma and beta after 0, 1, ..., T steps: shape (T + 1, *shape).
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
) -> NDArray:
    """What is left of gamma, and of beta, after 0, 1, ..., T steps without a gradient.

    A step of SGD is linear in the parameter and its buffer, so it multiplies gamma and beta of
    every filter by the same number: `gamma^t = s_t gamma^0`, `beta^t = s_t beta^0`, and

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
) -> NDArray:
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
    alpha = _positive("alpha", alpha)
    rate = _decay_rate(lr, weight_decay)
    _check_momentum(momentum, dampening, nesterov)
    now_active = (beta + alpha) / scale >= active_C
    # Where it is not active now, the denominator is above alpha and the wanted factor below 1.
    wanted = alpha / np.where(now_active, alpha, active_C * scale - beta)
    if np.ndim(lr) == 0:
        steps = _first_below(wanted, float(rate), momentum, dampening, nesterov)
    else:
        factors = decay_factors(lr, weight_decay, momentum, dampening, nesterov)
        falling = np.minimum.accumulate(factors)
        steps = np.searchsorted(-falling, -wanted)
        steps = np.where(steps == len(factors), np.inf, steps)
    return np.where(now_active, 0.0, steps)


def _first_below(
    wanted: NDArray, rate: float, momentum: float, dampening: float, nesterov: bool
) -> NDArray:
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
    if np.isrealobj(roots) and not np.isclose(*roots, rtol=1e-6):
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

    def factor(t: NDArray) -> NDArray:
        return np.where(t < 1, 1.0, share_slow * slow ** (t - 1) + share_fast * fast ** (t - 1))

    steps = np.maximum(1, np.ceil(1 + np.log(wanted / share_slow) / np.log(slow)))
    # The fast part, gone after a few steps, can shift the crossing by some of them.
    while (late := (steps > 0) & (factor(steps - 1) <= wanted)).any():
        steps = steps - late
    while (early := factor(steps) > wanted).any():
        steps = steps + early
    return steps
