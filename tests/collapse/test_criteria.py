"""Criteria and counts against written-out formulas."""

import math

import pytest
import torch
from torch import nn

from psbn_mmdet import collapse
from psbn_mmdet.collapse import criteria


class TestMeasures:
    gamma = torch.tensor([1.0, -2.0, 9.9e-4, -9.9e-4, 1e-3, 0.0, 0.0, 1e-9], dtype=torch.float64)
    bias = torch.tensor([0.0, 3.0, 0.5, -0.5, 0.0, 0.2, -0.2, 1e-9], dtype=torch.float64)

    def test_collapsed_is_gamma_below_the_threshold(self):
        want = [False, False, True, True, False, True, True, True]
        assert collapse.collapsed(self.gamma).tolist() == want

    def test_a_positive_bias_makes_a_collapsed_filter_a_constant(self):
        assert collapse.constant(self.gamma, self.bias).nonzero().flatten().tolist() == [2, 5]
        assert collapse.dead(self.gamma, self.bias).nonzero().flatten().tolist() == [3, 6, 7]

    def test_activation_probability_is_the_share_of_normal_samples_above_zero(self):
        got = collapse.activation_probability(self.gamma, self.bias)

        def phi(z):
            return 0.5 * (1 + math.erf(z / math.sqrt(2)))

        want = [0.5, phi(1.5), 1.0, 0.0, 0.5, 1.0, 0.0, phi(1.0)]
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))

    def test_inactive_is_bias_below_minus_309_gamma(self):
        # Phi(-3.0902) = 1e-3
        gamma = torch.tensor([1.0, 1.0, -2.0, -2.0])
        bias = torch.tensor([-3.09, -3.0905, -6.18, -6.181])
        assert collapse.inactive(gamma, bias).tolist() == [False, True, False, True]

    def test_filter_l1_sums_absolute_weights(self):
        weight = torch.arange(-12.0, 12.0).view(2, 3, 2, 2)
        assert collapse.filter_l1(weight).tolist() == [sum(range(1, 13)), sum(range(12))]

    @pytest.mark.parametrize("groups", [1, 2])
    def test_filter_l1_of_a_transposed_convolution_is_what_an_impulse_brings_out(self, groups):
        conv = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
        with torch.no_grad():
            conv.weight.abs_()
            want = conv(torch.ones(1, 4, 1, 1)).sum((0, 2, 3))
        got = collapse.filter_l1(conv.weight.detach(), transposed=True, groups=groups)
        torch.testing.assert_close(got, want)


class TestWithoutReLU:
    """Half a layer each: filter 0 collapsed, bias -1; 1 far below; 2 collapsed, bias +1; 3 live."""

    gamma = torch.tensor([0.0, 0.1, 0.0, 1.0])
    bias = torch.tensor([-1.0, -1.0, 1.0, 0.0])

    def test_behind_a_relu_a_negative_bias_is_dead_or_inactive(self):
        counts = collapse.count(self.gamma, self.bias)
        assert (counts["dead"], counts["constant"], counts["inactive"]) == (1, 1, 1)
        assert counts["activation_probability"] == pytest.approx((0 + 0.5) / 2)

    def test_where_no_relu_stands_right_behind_only_collapsed_is_told(self):
        counts = collapse.count(self.gamma, self.bias, relu=torch.zeros(4, dtype=torch.bool))
        assert (counts["collapsed"], counts["dead"], counts["constant"]) == (2, 0, 0)
        assert (counts["told"], counts["inactive"]) == (0, 0)
        assert math.isnan(counts["activation_probability"])

    def test_the_mask_is_by_filter(self):
        relu = torch.tensor([True, False, False, True])
        counts = collapse.count(self.gamma, self.bias, relu=relu)
        assert (counts["dead"], counts["constant"], counts["inactive"]) == (1, 0, 0)
        assert counts["activation_probability"] == pytest.approx(0.5)

    def test_silu_lets_gradient_through_where_relu_does_not(self):
        # What the counts above rest on, from torch itself.
        for act, reaches in [(nn.ReLU(), False), (nn.SiLU(), True), (nn.LeakyReLU(), True)]:
            bias = torch.tensor(-1.0, requires_grad=True)
            act(0 * torch.randn(9) + bias).sum().backward()
            assert bool(bias.grad) is reaches


class TestNotFinite:
    nan, inf = math.nan, math.inf

    def test_it_is_no_other_state_and_not_in_the_percentages(self):
        gamma = torch.tensor([self.nan, 0.0, self.inf, 0.0, 1.0, 1.0, 0.0])
        bias = torch.tensor([0.0, self.nan, 0.0, self.inf, -self.inf, -9.0, 0.5])
        counts = collapse.count(gamma, bias)
        assert (counts["filters"], counts["not_finite"]) == (7, 5)
        assert (counts["collapsed"], counts["dead"], counts["constant"]) == (1, 0, 1)
        assert counts["inactive"] == 1
        assert counts["collapsed_percent"] == counts["inactive_percent"] == 50
        assert counts["constant_percent"] == 50
        assert counts["activation_probability"] == pytest.approx(0, abs=1e-12)  # Phi(-9)
        assert collapse.not_finite(gamma, bias).tolist() == [True] * 5 + [False] * 2

    def test_nothing_finite_has_no_percentage(self):
        counts = collapse.count(torch.full((3,), self.nan), torch.zeros(3))
        for name in ("collapsed", "constant", "inactive"):
            assert counts[name] == 0
            assert math.isnan(counts[f"{name}_percent"])


class TestNearlyLinear:
    def test_the_threshold_is_a_mean_of_95_percent(self):
        # Phi(1.6449) = 0.95
        gamma = torch.full((8,), 0.1)
        assert not collapse.nearly_linear(gamma, torch.full((8,), 0.1644))
        assert collapse.nearly_linear(gamma, torch.full((8,), 0.1646))

    def test_what_is_left_of_the_nonlinearity_there(self):
        # The share of the variance of ReLU(x + c) that is linear in x, by sampling at quantiles.
        x = torch.special.ndtri((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1e6)
        assert collapse.NEARLY_LINEAR_ABOVE == 0.95
        for probability, linear in [(0.5, 0.73), (0.9, 0.97), (0.95, 0.986)]:
            c = torch.special.ndtri(torch.tensor(probability, dtype=torch.float64))
            phi = torch.exp(-(c**2) / 2) / math.sqrt(2 * math.pi)
            variance = (c**2 + 1) * probability + c * phi - (c * probability + phi) ** 2
            assert float(probability**2 / variance) == pytest.approx(linear, abs=5e-3)
            sampled = torch.corrcoef(torch.stack([x, torch.relu(x + c)]))[0, 1] ** 2
            assert float(sampled) == pytest.approx(float(probability**2 / variance), abs=1e-4)

    def test_filters_without_a_signal_do_not_count(self):
        gamma = torch.tensor([1.0, 0.0, 9e-4, math.nan])
        bias = torch.tensor([0.0, 1.0, 1.0, 1.0])
        assert not collapse.nearly_linear(gamma, bias)
        assert not collapse.nearly_linear(gamma[1:], bias[1:])
        assert collapse.nearly_linear(torch.tensor([-1.0, 0.0]), torch.tensor([2.0, -9.0]))


@pytest.mark.parametrize("threshold", [0, 1e-3, 5])
def test_thresholds_that_can_be(threshold):
    collapse.check_thresholds(threshold, 0)
    collapse.check_thresholds(threshold, 1)


def test_a_threshold_itself_is_not_below_it():
    gamma, bias = torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.5])
    assert collapse.collapsed(gamma, 0.5).tolist() == [False, True]
    assert collapse.constant(gamma, bias, 0.5).tolist() == [False, True]
    half = torch.tensor([1.0])
    assert not collapse.inactive(half, torch.zeros(1), below=0.5).any()


class TestDoes:
    def told(self, gradient, effect):
        found = criteria.does(torch.tensor(gradient), torch.tensor(effect))
        return [("unknown", "stuck", "idle", "carrying")[code] for code in found]

    def test_nothing_is_what_rounding_takes_beside_the_largest(self):
        eps = 2.0**-23
        gradient = [1.0, 0.0, 1e-41, eps / 2, 2 * eps, 1.0]
        effect = [4.0, 0.0, 0.0, 4.0, 5 * eps, 3 * eps]
        want = ["carrying", "stuck", "stuck", "stuck", "carrying", "idle"]
        assert self.told(gradient, effect) == want

    def test_the_unit_of_the_loss_does_not_matter(self):
        gradient, effect = torch.rand(50), torch.rand(50)
        gradient[::3], effect[::5] = 0, 0
        want = criteria.does(gradient, effect)
        for scale in (1e-20, 65536.0):
            assert torch.equal(criteria.does(gradient * scale, effect * scale), want)

    def test_what_was_not_measured_and_an_overflow_are_unknown(self):
        assert self.told([math.nan, 1.0, math.inf], [math.nan, 1.0, 1.0]) == [
            *("unknown", "carrying", "unknown"),
        ]
        assert self.told([math.nan], [math.nan]) == ["unknown"]


def test_a_layer_that_has_not_started():
    zero, one = torch.zeros(3), torch.tensor([0.0, 1e-41, 0.0])
    assert criteria.not_started(zero, zero)
    assert criteria.not_started(zero, torch.full((3,), 0.1), alpha=0.1)
    assert not criteria.not_started(zero, torch.full((3,), 0.1))
    assert not criteria.not_started(one, zero)
    assert not criteria.not_started(zero, one)
