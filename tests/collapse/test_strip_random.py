"""No random network that strip accepts computes anything else."""

import collections
import copy
import os

import pytest
import torch

from psbn_mmdet.collapse import StripError, strip
from psbn_mmdet.collapse.shadows import tensors_in
from tests.helpers.random_nets import RandomNet


def largest_difference(a, b, seed):
    """In float64, on inputs of several scales, signs and sizes, per channel of each output."""
    a, b = copy.deepcopy(a).double(), copy.deepcopy(b).double()
    generator = torch.Generator().manual_seed(seed + 1)
    worst = 0.0
    for scale, size in ((1, 16), (-20, 16), (300, 17), (0.01, 23), (-3, 32)):
        x = scale * torch.randn(3, 3, size, size + 1, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            try:
                expected = tensors_in(a(x))
            except RuntimeError:  # streams that meet are of one size at even ones alone
                continue
            for p, q in zip(expected, tensors_in(b(x)), strict=True):
                assert p.shape == q.shape
                dims = [d for d in range(p.dim()) if d != 1]
                apart, high = (p - q).abs().amax(dims), p.abs().amax(dims)
                # Constants are folded into weights of float32.
                allowed = 3e-6 * high + 3e-7 * high.max()
                worst = max(worst, float((apart / allowed.clamp(min=1e-300)).max()))
    return worst


def check(seed, counts):
    net = RandomNet(seed).eval()
    try:
        stripped = strip(net, (3, 16, 16))
    except StripError as error:
        counts[str(error)[:60]] += 1
        raise
    killed = sum(
        int((m.weight == 0).sum())
        for m in net.modules()
        if hasattr(m, "num_features") and getattr(m, "weight", None) is not None
    )
    filters = stripped.record["filters"]
    counts["nets"] += 1
    counts["killed"] += killed
    counts["gone"] += filters["dead"] + filters["constant"]
    counts["unread"] += filters["unread"]
    for kept in stripped.record["kept"]:
        assert kept["why"]
        counts[f"kept: {kept['why'].split(' (')[0][-40:]}"] += len(kept["filters"])
    assert filters["dead"] + filters["constant"] + filters["kept"] == killed
    assert largest_difference(net, stripped.model, seed) <= 1, net.steps
    assert stripped.model.train()(torch.randn(2, 3, 16, 16)) is not None  # training goes on
    return stripped


@pytest.mark.parametrize("seed", range(20))
def test_no_accepted_network_differs(seed):
    check(seed, collections.Counter())


@pytest.mark.slow
def test_of_many_networks_none_is_refused_and_most_of_what_was_killed_goes():
    """PSBN_TEST_NETS of them."""
    counts = collections.Counter()
    for seed in range(1000, 1000 + int(os.environ.get("PSBN_TEST_NETS", "40"))):
        check(seed, counts)
    print("\n".join(f"{number:6d}  {what}" for what, number in counts.most_common()))
    assert counts["gone"] > 0.4 * counts["killed"]
