"""Criteria and counts against written-out formulas."""

import math

import pytest
import torch
from torch import nn

from psbn_mmdet import collapse


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
