"""The formulas against mpmath, Monte-Carlo, torch's own SGD and a real psBN layer."""

import mpmath as mp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.nn import functional as F

from psbn_mmdet import psBN1d, theory
from psbn_mmdet.theory import Normal, Uniform

EPS = np.finfo(np.float64).eps


def exact_K(z):
    z = mp.mpf(z)
    phi, Phi = mp.npdf(z), mp.erfc(-z / mp.sqrt(2)) / 2
    return (z**4 - 2) * phi**2 + (z - z**3) * phi * Phi


class TestK:
    # The root at -1.1533 is between grid points, at least 0.0033 away, so the terms, together below
    # 2 |K| / 0.0033 there, cancel at most 3 digits: the factor 600 below is for that point alone.
    grid = np.concatenate([np.linspace(-45, 45, 361), np.linspace(-3, 3, 121)])

    def test_sign_and_size_to_60_digits(self):
        """log|K| sums numbers up to z^2 with at most 8 roundings: error <= 8 eps (1 + z^2)."""
        sign, log_abs = theory.log_abs_K(self.grid)
        with mp.workdps(60):
            for z, s, value in zip(self.grid, sign, log_abs, strict=True):
                exact = exact_K(z)
                assert s == mp.sign(exact), z
                cancelled = 600 if abs(z + 1.1533) < 0.01 else 1
                error = abs(float(mp.log(abs(exact)) - mp.mpf(float(value))))
                assert error <= 8 * EPS * (1 + z * z) * cancelled, z

    def test_values_where_a_double_holds_them(self):
        z = np.linspace(-25, 37, 63)
        with mp.workdps(60):
            expected = np.array([float(exact_K(v)) for v in z])
        # As above, and one rounding of exp.
        assert (abs(theory.K(z) - expected) <= (8 * (1 + z**2) + 1) * EPS * abs(expected)).all()
        assert_allclose(theory.K(0.0), -1 / np.pi, rtol=2 * EPS)

    def test_underflows_to_a_zero_of_the_right_sign(self):
        z = np.array([-np.inf, -1e80, -40, 40, 1e80, np.inf])
        values = theory.K(z)
        assert (values == 0).all()
        assert np.signbit(values).tolist() == [False] * 3 + [True] * 3
        sign, log_abs = theory.log_abs_K([-40.0, 40.0])
        assert sign.tolist() == [1, -1]
        # K -> z^4 phi^2 (1 + 1/z^2 - 4/z^4 + ...) on the left and -z^3 phi (1 - 1/z^2) on the right
        left = 4 * np.log(40) - 1600 - np.log(2 * np.pi) + np.log1p(40.0**-2)
        right = 3 * np.log(40) - 800 - np.log(2 * np.pi) / 2 + np.log1p(-(40.0**-2))
        assert_allclose(log_abs, [left, right], atol=4 * 40.0**-4)

    def test_even_part_is_negative_everywhere(self):
        z = np.linspace(0, 45, 4501)
        sign_left, log_left = theory.log_abs_K(-z)
        sign_right, log_right = theory.log_abs_K(z)
        assert (sign_right < 0).all()
        assert ((sign_left < 0) | (log_left < log_right)).all()

    def test_is_positive_below_its_only_zero(self):
        z = np.linspace(-45, 45, 90_001)
        changes = z[:-1][np.diff(np.sign(theory.log_abs_K(z)[0])) != 0]
        assert_allclose(changes, [-1.1533], atol=1e-3)

    def test_is_half_the_second_derivatives_times_the_moments_of_the_step(self):
        """Eq. 5 from Eq. 1 by numbers: derivatives of Phi and moments of the truncated normal."""
        with mp.workdps(30):
            for gamma, beta in [(0.7, -1.3), (1.4, 0.6), (0.2, 0.05)]:

                def fires(g, b):
                    return mp.erfc(-(b / g) / mp.sqrt(2)) / 2

                def moment(k, z=beta / gamma):
                    return mp.quad(lambda x: x**k * mp.npdf(x), [-z, 3, 8, mp.inf])

                second = sum(
                    mp.diff(fires, (gamma, beta), order) * factor * moment(k)
                    for order, factor, k in [((2, 0), 1, 2), ((1, 1), 2, 1), ((0, 2), 1, 0)]
                )
                expected = float(second / 2)
                # mp.diff keeps about half of the 30 digits
                assert_allclose(theory.drift(gamma, beta, 1.0, 1.0), expected, rtol=1e-12)


class TestJ:
    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.3, 0.7), (-2.0, 0.01), (1.5, 0.5)])
    def test_normal_in_closed_form(self, mean, std):
        """Below 50 roundings of terms below 10 max|K| = 4."""
        gamma = np.array([0.1, 0.5, 1.0, 5.0])
        cuts = [mean + k * std for k in (-12, -6, -3, -1, 0, 1, 3, 6, 12)]
        for g in gamma:
            points = sorted({*cuts, *(z * g for z in (-6, -2, 0, 2, 6))})
            expected = mp.quad(
                lambda b, g=g: exact_K(b / g) * mp.npdf(b, mean, std),
                [p for p in points if cuts[0] <= p <= cuts[-1]],
            )
            assert_allclose(theory.J(g, Normal(mean, std)), float(expected), atol=200 * EPS)

    @pytest.mark.parametrize(
        ("low", "high"), [(-1, 1), (-0.3, 0.7), (0.2, 0.2001), (4, 9), (-9, -4), (-0.5, 3)]
    )
    @pytest.mark.parametrize("gamma", [0.3, 1.0, 5.0])
    def test_uniform_in_closed_form_also_in_the_tails(self, low, high, gamma):
        ends = [low / gamma, high / gamma]
        cuts = [z for z in np.arange(-30, 30.5, 0.5) if ends[0] < z < ends[1]]
        nearest = 0 if ends[0] < 0 < ends[1] else min(ends, key=abs)
        with mp.workdps(40):
            unit = exact_K(nearest)  # mp.quad stops at an absolute error
            total = mp.quad(lambda z: exact_K(z) / unit, [ends[0], *cuts, ends[1]], maxdegree=5)
            expected = float(total * unit / (mp.mpf(ends[1]) - mp.mpf(ends[0])))
        # The condition of exp(-z^2) as for K, at the end nearest to 0.
        value = theory.J(gamma, Uniform(low, high))
        assert_allclose(value, expected, rtol=40 * EPS * (1 + nearest**2))

    def test_whole_line(self):
        """Flat beta: the integral of K, -11 / (8 sqrt(pi)), by parts in the source."""
        assert_allclose(
            theory.J(1.0, Uniform(-50, 50)) * 100, -11 / (8 * np.sqrt(np.pi)), rtol=1e-15
        )

    @pytest.mark.parametrize("beta", [Normal(0, 1), Normal(0, 20), Uniform(-3, 3), 0.0])
    def test_even_beta_gives_a_negative_J(self, beta):
        assert (theory.J(np.geomspace(1e-3, 1e3, 61), beta) < 0).all()

    def test_beta_at_its_initial_0_gives_a_constant(self):
        assert_allclose(theory.J([-2.0, 0.01, 5.0], 0.0), -1 / np.pi, rtol=2 * EPS)


class TestDrift:
    """`antithetic` halves have means of second order only, so 20,000 draws give 1 to 4 %."""

    gamma = np.array([0.2, 1.0, -3.0])
    step = 0.01  # eta c / |gamma|: what Eq. 3 leaves out is a share of 0.01^2 = 1e-4, times a few

    @staticmethod
    def scores(estimate, expected):
        return (estimate.mean - expected) / estimate.stderr

    @pytest.mark.parametrize("name", ["point", "normal", "normal off 0", "uniform"])
    def test_simulation_agrees_within_its_standard_error(self, name):
        """Scores are standard normal: all below 4 (p = 6e-5 each), sum of squares chi-squared."""
        scores = []
        for i, g in enumerate(self.gamma):
            scale = abs(g)
            beta = {
                "point": scale * np.linspace(-2, 2, 9),
                "normal": Normal(0, scale),
                "normal off 0": Normal(-0.5 * scale, 0.4 * scale),
                "uniform": Uniform(-scale, 2 * scale),
            }[name]
            lr, grad_std = 0.02, self.step * scale / 0.02
            estimate = theory.simulate_drift(g, beta, lr, grad_std, 200_000, seed=i)
            expected = theory.drift(g, beta, lr, grad_std)
            assert (estimate.stderr < 0.06 * abs(expected)).all()
            scores.extend(np.ravel(self.scores(estimate, expected)))
        n = len(scores)
        assert np.abs(scores).max() < 4
        assert np.sum(np.square(scores)) < n + 4 * np.sqrt(2 * n)

    def test_plain_draws_agree_too(self):
        """No pairs: the linear part has a standard deviation 1 / step as large; so larger steps."""
        estimate = theory.simulate_drift(1.0, 0.5, 0.1, 1.0, 4_000_000, antithetic=False)
        expected = theory.drift(1.0, 0.5, 0.1, 1.0)
        assert abs(self.scores(estimate, expected)) < 3
        assert estimate.stderr < 0.02 * abs(expected)

    @pytest.mark.parametrize("factor", [0.25, 0.5, 2.0])
    def test_is_proportional_to_lr_and_noise_squared_and_to_gamma_to_the_minus_2(self, factor):
        """By draws of their own; the ratio of two means has the sum of their relative errors."""
        z = np.array([-0.5, 0.0, 1.0])

        def simulated(gamma, lr, grad_std, seed):
            return theory.simulate_drift(gamma, z * gamma, lr, grad_std, 200_000, seed)

        base = simulated(1.0, 0.1, 0.1, 1)
        for other, power in [
            (simulated(1.0, 0.1 * factor, 0.1, 2), 2),
            (simulated(1.0, 0.1, 0.1 * factor, 3), 2),
            (simulated(factor, 0.1, 0.1 * factor, 4), 0),
            (simulated(factor, 0.1, 0.1, 5), -2),
        ]:
            ratio = other.mean / base.mean
            error = np.hypot(other.stderr / other.mean, base.stderr / base.mean)
            # 0.02: the fourth order, (eta c / gamma)^2 <= 0.04^2 times a few
            assert (abs(ratio / factor**power - 1) < 4 * error + 0.02 * (power != 0)).all()

    def test_a_step_as_large_as_gamma_is_beyond_the_second_order(self):
        """At beta = 0. The probability cannot fall by more than there is, 1/2; Eq. 3 goes on."""
        share = {}
        for step in (0.02, 0.2, 0.5, 1.0, 10.0):
            estimate = theory.simulate_drift(1.0, 0.0, 1.0, step, 400_000)
            expected = theory.drift(1.0, 0.0, 1.0, step)
            share[step] = estimate.mean / expected
            deviates = abs(self.scores(estimate, expected)) > 10
            assert deviates == (step > 0.02)
        assert 1 < share[0.2] < 1.2  # the fourth order first adds to it
        assert share[0.5] < 0.8
        assert share[1.0] < 0.3
        assert expected < -1 < -0.5 < estimate.mean < 0

    def test_standard_error_is_that_of_all_draws_also_across_chunks(self):
        gamma, beta = np.ones(50), np.zeros(50)
        a = theory.simulate_drift(gamma, beta, 0.1, 1.0, 100_000)  # 3 chunks of 40,000
        assert_allclose(a.stderr, a.mean.std(ddof=1), rtol=4 / np.sqrt(2 * 49))
        assert_allclose(a.stderr, a.stderr.mean(), rtol=0.05)

    def test_sign_of_gamma_does_not_matter(self):
        assert theory.drift(-0.3, 0.2, 0.1, 1.0) == theory.drift(0.3, 0.2, 0.1, 1.0)


SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3},
]


def sgd_schedule(steps):
    """Warmup, cosine and a jump."""
    t = np.arange(steps)
    return np.where(
        t < 5, 0.02 * (t + 1), 0.05 * (1 + np.cos(np.pi * t / steps)) + 0.01 * (t == 20)
    )


class TestDecay:
    def test_C_moves_by_the_increment_of_section_5(self):
        lr = sgd_schedule(60)
        gamma0, beta0, alpha = np.array([0.5, -0.1, 2.0]), np.array([-3.0, -0.7, -5.0]), 0.1
        gamma, beta = theory.decay_path(gamma0, beta0, lr, 0.3)
        values = theory.C(gamma, beta, alpha)
        expected = theory.C_increment(gamma[:-1], alpha, lr[:, None], 0.3)
        # A difference of numbers up to 10, each with some four roundings.
        assert_allclose(np.diff(values, axis=0), expected, atol=4 * 10 * EPS * 4)
        assert (np.diff(values, axis=0) > 0).all()
        assert_allclose(beta / abs(gamma), np.broadcast_to(beta0 / abs(gamma0), gamma.shape))  # BN

    def test_factors_without_momentum_are_the_product(self):
        lr = sgd_schedule(200)
        factors = theory.decay_factors(lr, 0.1)
        expected = np.concatenate([[1], np.cumprod(1 - lr * 0.1)])
        assert_allclose(factors, expected, rtol=200 * 3 * EPS)

    @pytest.mark.parametrize("options", SGD)
    @pytest.mark.parametrize("with_gradient", [False, True])
    def test_is_torchs_sgd(self, options, with_gradient):
        """T steps with at most 6 roundings of terms below 2 max |p|."""
        lr = sgd_schedule(100)
        gamma0, beta0 = np.array([0.5, -0.1, 2.0]), np.array([-3.0, -0.7, 0.2])
        grads = np.random.default_rng(0).normal(0, 0.1, (100, 2, 3))

        def grad(t, gamma, beta):
            return grads[t, 0] + gamma, grads[t, 1] - 0.1 * beta

        path = theory.decay_path(
            gamma0, beta0, lr, 0.01, grad=grad if with_gradient else None, **options
        )
        gamma, beta = (torch.tensor(v, requires_grad=True) for v in (gamma0, beta0))
        optimizer = torch.optim.SGD([gamma, beta], lr=1.0, weight_decay=0.01, **options)
        for t, eta in enumerate(lr):
            optimizer.param_groups[0]["lr"] = eta
            gamma.grad, beta.grad = torch.zeros(3).double(), torch.zeros(3).double()
            if with_gradient:
                gamma.grad = torch.tensor(grads[t, 0]) + gamma.detach()
                beta.grad = torch.tensor(grads[t, 1]) - 0.1 * beta.detach()
            optimizer.step()
            assert_allclose(path[0][t + 1], gamma.detach().numpy(), atol=12 * EPS * (t + 1) * 3)
            assert_allclose(path[1][t + 1], beta.detach().numpy(), atol=12 * EPS * (t + 1) * 3)


class TestForecast:
    gamma = np.array([0.5, -0.1, 0.01, 1.0, 0.02])
    beta = np.array([-3.0, -0.7, -0.5, 0.2, -0.3])

    def brute(self, lr, weight_decay, options, active_C=-3.0):
        gamma, beta = theory.decay_path(self.gamma, self.beta, lr, weight_decay, **options)
        active = theory.C(gamma, beta, 0.1) >= active_C
        return np.where(active.any(0), active.argmax(0), np.inf)

    @pytest.mark.parametrize("options", SGD)
    @pytest.mark.parametrize("rate", [1e-3, 0.01, 0.3])
    @pytest.mark.parametrize("active_C", [-3.0, 0.0, -30.0])
    def test_closed_form_counts_the_steps_of_the_recurrence(self, options, rate, active_C):
        """Also with a decay so strong that momentum swings the parameters through 0."""
        steps = theory.steps_until_active(
            self.gamma, self.beta, 0.1, rate, 1.0, active_C=active_C, **options
        )
        horizon = int(40 / rate)
        lr = np.full(horizon, rate)
        assert np.isfinite(steps).all()
        assert (steps < horizon).all()
        assert steps.tolist() == self.brute(lr, 1.0, options, active_C).tolist()

    def test_closed_form_for_any_momentum_and_dampening(self):
        """Also where the buffer makes the first step larger than those after it."""
        rng = np.random.default_rng(0)
        for _ in range(200):
            momentum, dampening = rng.uniform(0.01, 0.97), rng.uniform(0, 0.99)
            nesterov = rng.random() < 0.3
            rate = 10 ** rng.uniform(-2.5, -0.2)
            gamma, beta = rng.uniform(0.01, 1, 20), rng.uniform(-4, 0, 20)
            options = dict(
                momentum=momentum, dampening=0 if nesterov else dampening, nesterov=nesterov
            )
            steps = theory.steps_until_active(gamma, beta, 0.1, rate, 1.0, **options)
            lr = np.full(int(steps.max()) + 2, rate)
            path = theory.C(*theory.decay_path(gamma, beta, lr, 1.0, **options), 0.1)
            assert steps.tolist() == (path >= -3).argmax(0).tolist()

    @pytest.mark.parametrize("options", SGD)
    def test_under_a_schedule(self, options):
        lr = sgd_schedule(100)
        steps = theory.steps_until_active(self.gamma, self.beta, 0.1, lr, 0.5, **options)
        assert steps.tolist() == self.brute(lr, 0.5, options).tolist()
        assert steps[3] == 0
        if not options:
            assert np.isinf(steps).any()  # the schedule ends first

    def test_written_out(self):
        """gamma 0.5, beta -3, alpha 0.1, C = -5.8: active at s = 0.1 / (3 - 1.5) = 1 / 15."""
        steps = theory.steps_until_active(0.5, -3.0, 0.1, 0.1, 5e-4)
        assert steps == np.ceil(np.log(1 / 15) / np.log(1 - 5e-5)) == 54160
        share, buffer, count = 1.0, 0.0, 0
        while share > 1 / 15:  # momentum 0.9: ten times as fast, to first order
            buffer = 0.9 * buffer + 5e-4 * share
            share, count = share - 0.1 * buffer, count + 1
        assert theory.steps_until_active(0.5, -3.0, 0.1, 0.1, 5e-4, momentum=0.9) == count == 5400

    def test_never_without_decay(self):
        assert theory.steps_until_active(0.5, -3.0, 0.1, 0.1, 0.0) == np.inf
        assert theory.steps_until_active(0.5, -3.0, 0.1, [0.1] * 9, 0.0, momentum=0.9) == np.inf

    @pytest.mark.parametrize("options", SGD)
    @pytest.mark.parametrize("scheduled", [False, True])
    def test_of_a_real_psbn_layer_step_for_step(self, options, scheduled):
        """A filter silent on a whole batch has a gradient of exactly 0 until the forecast."""
        torch.manual_seed(0)
        x = torch.randn(64, 5, dtype=torch.float64)
        target = torch.randn(64, 5, dtype=torch.float64)
        layer = psBN1d(5, alpha=0.1).double()
        gamma0 = torch.tensor([0.5, -0.1, 0.01, 1.0, 0.05], dtype=torch.float64)
        beta0 = torch.tensor([-3.0, -0.7, -0.5, 0.2, -0.4], dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(gamma0)
            layer.beta.copy_(beta0)
        alpha = float(layer.alpha)
        silent = [0, 1, 2, 4]
        x_hat = F.batch_norm(x, None, None, training=True, eps=layer.eps)
        # fires once gamma x_hat + beta + alpha > 0 for the largest gamma x_hat of the batch
        active_C = -(x_hat * gamma0.sign()).amax(0).numpy()

        steps = 400
        lr = sgd_schedule(steps) if scheduled else np.full(steps, 0.06)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=0.5, **options)
        first, path = np.full(5, np.inf), []
        for t in range(steps):
            optimizer.param_groups[0]["lr"] = lr[t]
            path.append((layer.weight.detach().numpy().copy(), layer.beta.detach().numpy().copy()))
            y = torch.relu(layer(x))
            fires = (y > 0).any(0).numpy()
            first[fires & np.isinf(first)] = t
            optimizer.zero_grad()
            (y - target).square().mean().backward()
            optimizer.step()

        forecast = [
            theory.steps_until_active(
                gamma0[i].item(),
                beta0[i].item(),
                alpha,
                lr if scheduled else 0.06,
                0.5,
                active_C=active_C[i],
                **options,
            )
            for i in range(5)
        ]
        assert np.isfinite(first).all(), "the run is too short to tell"
        assert first.tolist() == forecast
        assert first[3] == 0
        gamma, beta = theory.decay_path(gamma0.numpy(), beta0.numpy(), lr, 0.5, **options)
        for i in silent:
            until = int(first[i]) + 1
            # As for torch's SGD above: 6 roundings a step of terms below 2 * 3.
            atol = 12 * EPS * until * 3
            assert_allclose([p[0][i] for p in path[:until]], gamma[:until, i], rtol=0, atol=atol)
            assert_allclose([p[1][i] for p in path[:until]], beta[:until, i], rtol=0, atol=atol)

    @staticmethod
    def rare_filter(sign):
        """A filter that fires on 2 % of its inputs, pushed down (1) or up (-1) by the loss."""
        torch.manual_seed(0)
        layer = psBN1d(1, alpha=0.1).double()
        with torch.no_grad():
            layer.weight.fill_(0.5)
            layer.beta.fill_(-1.1)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.01)
        grads, values = [], []
        for _ in range(200):
            values.append((layer.weight.item(), layer.beta.item()))
            optimizer.zero_grad()
            (sign * torch.relu(layer(torch.randn(512, 1).double())).mean()).backward()
            grads.append((layer.weight.grad.item(), layer.beta.grad.item()))
            optimizer.step()
        gamma, beta = np.array(values).T
        return gamma, beta, grads, float(layer.alpha)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_does_not_hold_where_a_gradient_arrives(self, sign):
        """2 % of the inputs are enough to beat the decay. With its gradients the path is exact."""
        gamma, beta, grads, alpha = self.rare_filter(sign)
        decayed = theory.C(*theory.decay_path(0.5, -1.1, np.full(199, 0.1), 0.01), alpha)
        trained = theory.C(gamma, beta, alpha)
        forecast = theory.steps_until_active(0.5, -1.1, alpha, 0.1, 0.01, active_C=-1.96)
        assert 0 < forecast < 200
        if sign > 0:  # the loss wants silence: forecast to be above -1.96, it never gets there
            assert trained.max() < -1.96 < decayed[-1]
        else:  # the loss wants it: back long before decay alone would do it
            assert (trained >= -1.96).argmax() < forecast / 2
        path = theory.decay_path(0.5, -1.1, np.full(199, 0.1), 0.01, grad=lambda t, g, b: grads[t])
        assert_allclose(path, [gamma, beta], rtol=0, atol=12 * EPS * 200 * 2)

    def test_does_not_hold_where_float32_loses_the_decay(self):
        """lr * weight_decay = 1e-8 is below half a unit in the last place, 3e-8: nothing moves."""
        for rate, moves in [(1e-8, False), (1e-6, True)]:
            layer = psBN1d(1, alpha=0.1)
            with torch.no_grad():
                layer.beta.fill_(-3.0)
            optimizer = torch.optim.SGD(layer.parameters(), lr=rate, weight_decay=1.0)
            for _ in range(100):
                layer.beta.grad = torch.zeros(1)
                optimizer.step()
            assert (layer.beta.item() != -3.0) == moves


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.drift([1.0, 0.0], 0.1, 0.1, 1.0), "gamma is 0"),
        (lambda: theory.J(0.0, Normal()), "gamma is 0"),
        (lambda: theory.C(0.0, 0.1, 0.1), "gamma is 0"),
        (lambda: theory.K([0.0, np.nan]), "z holds NaN"),
        (lambda: theory.C(1.0, 0.1, 0.0), "alpha is 0: wanted a number above 0"),
        (lambda: theory.steps_until_active(1.0, -9.0, -0.1, 0.1, 0.1), "alpha is -0.1"),
        (lambda: theory.drift(1.0, 0.1, -0.1, 1.0), "lr is -0.1: wanted 0 or above"),
        (lambda: theory.decay_factors([0.1, -0.2], 0.1), "lr is -0.2"),
        (lambda: theory.decay_factors([0.1], -0.1), "weight_decay is -0.1"),
        (
            lambda: theory.C_increment(1.0, 0.1, 2.0, 0.5),
            "lr [*] weight_decay is 1: wanted below 1",
        ),
        (lambda: theory.steps_until_active(1.0, -9.0, 0.1, 3.0, 0.5), "weight_decay is 1.5"),
        (lambda: theory.decay_factors([0.1], 0.1, momentum=1.0), "momentum is 1"),
        (lambda: theory.decay_factors([0.1], 0.1, 0.9, dampening=-1), "dampening is -1"),
        (lambda: theory.decay_factors([0.1], 0.1, nesterov=True), "nesterov needs a momentum"),
        (lambda: theory.simulate_drift(1.0, 0.0, 0.1, 1.0, samples=1), "samples is 1"),
        (lambda: Normal(0, 0), "std is 0"),
        (lambda: Uniform(1, 1), "low is 1 and high is 1"),
    ],
)
def test_bad_input_gets_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
