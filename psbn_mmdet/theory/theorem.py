r"""Theorem 1: what one noisy step does to the probability that a filter fires (section 4).

**Where Eq. 5 comes from.** Let `f(gamma, beta) = Phi(beta / gamma)`, `gamma > 0`. Then ::

    f_bb = -z phi / gamma^2,   f_bg = (z^2 - 1) phi / gamma^2,   f_gg = (2z - z^3) phi / gamma^2.

The step of Eq. 1 is `-eta g H (x_hat, 1)` with `H = [x_hat > -z]` and `g` independent of `x_hat`,
`E g = 0`, `E g^2 = c^2`. So the first-order term is exactly 0, and the second moments of the step
are `eta^2 c^2` times the moments of the part of `x_hat` that fires, ::

    E[H] = Phi,   E[x_hat H] = phi,   E[x_hat^2 H] = Phi - z phi.

Half the sum of derivatives times moments is `eta^2 c^2 / (2 gamma^2)` times ::

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

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

_SQRT_2PI = np.sqrt(2 * np.pi)
# The integral of K over the real line: with d/dz (z^2 + 1) phi = (z - z^3) phi, integrating by
# parts leaves that of (z^4 - z^2 - 3) phi^2, and phi^2 has the moments 1, 1/2, 3/4 over 2 sqrt(pi).
_INTEGRAL_OF_K = -11 / (8 * np.sqrt(np.pi))


def _phi(z: NDArray[Any]) -> NDArray[Any]:
    return np.exp(-0.5 * np.square(z)) / _SQRT_2PI


def _numbers(name: str, value: ArrayLike) -> NDArray[Any]:
    array = np.asarray(value, dtype=np.float64)
    if np.isnan(array).any():
        raise ValueError(f"{name} holds NaN: wanted numbers")
    return array


def _scale(gamma: ArrayLike) -> NDArray[Any]:
    array = np.abs(_numbers("gamma", gamma))
    if (array == 0).any():
        raise ValueError(
            "gamma is 0 in at least one filter: beta / gamma is undefined, leave it out"
        )
    return array


def _positive(name: str, value: ArrayLike) -> NDArray[Any]:
    array = _numbers(name, value)
    if (array <= 0).any():
        raise ValueError(f"{name} is {array.min():g}: wanted a number above 0")
    return array


def _not_negative(name: str, value: ArrayLike) -> NDArray[Any]:
    array = _numbers(name, value)
    if (array < 0).any():
        raise ValueError(f"{name} is {array.min():g}: wanted 0 or above")
    return array


def log_abs_K(z: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
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


def K(z: ArrayLike) -> NDArray[Any]:
    r"""What a noisy step does to the probability of firing, Eq. 5.

    ::

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

    def __post_init__(self) -> None:
        _numbers("mean", self.mean)
        _positive("std", self.std)

    def sample(self, rng: np.random.Generator, size: tuple[int, ...]) -> NDArray[Any]:
        return rng.normal(self.mean, self.std, size)

    def expected_K(self, gamma: NDArray[Any]) -> NDArray[Any]:
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

    def __post_init__(self) -> None:
        if not _numbers("low", self.low) < _numbers("high", self.high):
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}: wanted low < high")

    def sample(self, rng: np.random.Generator, size: tuple[int, ...]) -> NDArray[Any]:
        return rng.uniform(self.low, self.high, size)

    def expected_K(self, gamma: NDArray[Any]) -> NDArray[Any]:
        """`E K(beta / gamma)`: the difference of an antiderivative of `K`, for `gamma > 0`.

        ::

            A(z) = (z^2 + 1) phi Phi - (z^3 / 2 + z / 4) phi^2 - 11 / (8 sqrt(pi)) Phi(sqrt(2) z)

        Counted from the nearer end of the line, so that a tail keeps its digits. Where the interval
        is narrow the difference would lose them: there Gauss and Legendre's 24 points, exact to
        rounding for `|z2 - z1| < 1`.
        """
        low, high = self.low / gamma, self.high / gamma

        def antiderivative(z: NDArray[Any]) -> NDArray[Any]:
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


def J(gamma: ArrayLike, beta: Normal | Uniform | ArrayLike) -> NDArray[Any]:
    """The mean of `K(beta / |gamma|)` over beta, Eq. 4; negative for every even distribution.

    Args:
        beta: a distribution of beta over the filters, or numbers, each one a point distribution
            (broadcast against `gamma`). `beta = 0`, as a layer starts, gives `-1 / pi`.

    Raises:
        ValueError: a gamma is 0.
    """
    scale = _scale(gamma)
    if isinstance(beta, (Normal, Uniform)):
        return beta.expected_K(scale)
    return K(_numbers("beta", beta) / scale)


def drift(
    gamma: ArrayLike, beta: Normal | Uniform | ArrayLike, lr: float, grad_std: float
) -> NDArray[Any]:
    """Expected change of the probability of firing in one noisy step, Eq. 3, to second order.

    ::

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

    mean: NDArray[Any]
    stderr: NDArray[Any]


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
    distribution = beta if isinstance(beta, (Normal, Uniform)) else None
    fixed = np.zeros(()) if isinstance(beta, (Normal, Uniform)) else _numbers("beta", beta)
    shape = np.broadcast_shapes(scale.shape, fixed.shape)
    rng = np.random.default_rng(seed)
    count, total, squares = 0, np.zeros(shape), np.zeros(shape)
    chunk = max(2, int(2e6 // max(1, math.prod(shape))))  # draws need not stay in memory
    while count < samples:
        n = min(chunk, samples - count)
        b = distribution.sample(rng, (n, *shape)) if distribution else fixed
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
