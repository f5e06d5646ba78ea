"""What is done to a backbone in place of revival, against formulas written out."""

import copy

import pytest
import torch
from mmdet.models import ResNet

from studies.detection.peers import (
    KEPT,
    NOISE,
    decay_toward,
    redo,
    shrink_and_perturb,
)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    sizes = dict(base_channels=8, stem_channels=8, out_indices=(3,), norm_eval=False)
    return [ResNet(18, **sizes) for _ in range(2)]


def test_redo_resets_what_is_silent_and_nothing_else(networks):
    network, fresh = networks
    block = network.layer2[0]
    with torch.no_grad():
        block.bn1.weight[3], block.bn1.bias[3] = 0, -1  # shut
        network.layer1[1].bn2.weight.zero_()  # the sum goes on with its other input
    before = copy.deepcopy(network.state_dict())
    count = redo(network, fresh, torch.randn(4, 3, 64, 64))
    after = network.state_dict()
    assert count == 1
    assert torch.equal(block.conv1.weight[3], fresh.layer2[0].conv1.weight[3])
    assert (block.conv2.weight[:, 3] == 0).all()
    with torch.no_grad():
        after["layer2.0.conv1.weight"][3] = before["layer2.0.conv1.weight"][3]
        after["layer2.0.conv2.weight"][:, 3] = before["layer2.0.conv2.weight"][:, 3]
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_redo_of_a_unit_behind_a_sum_zeroes_all_convolutions_that_read_it(networks):
    network, fresh = networks
    with torch.no_grad():
        for norm in (network.layer2[1].bn2, network.layer2[0].bn2, network.layer2[0].downsample[1]):
            norm.weight[5], norm.bias[5] = 0, -1
    redo(network, fresh, torch.randn(4, 3, 64, 64))
    assert torch.equal(network.layer2[1].conv2.weight[5], fresh.layer2[1].conv2.weight[5])
    assert (network.layer3[0].conv1.weight[:, 5] == 0).all()
    assert (network.layer3[0].downsample[0].weight[:, 5] == 0).all()


def test_shrink_and_perturb_by_the_formula(networks):
    network, fresh = networks
    before = [p.clone() for p in network.parameters()]
    shrink_and_perturb(network, fresh)
    for after, old, new in zip(network.parameters(), before, fresh.parameters(), strict=True):
        torch.testing.assert_close(after, KEPT * old + NOISE * new)


def test_of_gamma_alone_all_else_stays_as_it_was(networks):
    network, fresh = networks
    before = [p.clone() for p in network.parameters()]
    shrink_and_perturb(network, fresh, gamma_alone=True)
    changed = 0
    for (name, after), old in zip(network.named_parameters(), before, strict=True):
        gamma = ("bn" in name or "downsample.1" in name) and name.endswith("weight")
        torch.testing.assert_close(after, KEPT * old + NOISE if gamma else old)
        changed += gamma
    assert changed == 20  # the stem, two in each of eight blocks, three shortcuts


def test_decay_toward_the_initial_weights_by_the_formula():
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    initial = torch.tensor([1.0, 1.0])
    optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.5)
    decay_toward(optimizer, [weight], [initial])
    weight.grad = torch.tensor([0.3, 0.0])
    optimizer.step()
    # w - lr (g + lambda (w - w0)): 2 - 0.1 (0.3 + 0.5 * 1), -1 - 0.1 (0 + 0.5 * -2).
    torch.testing.assert_close(weight.detach(), torch.tensor([1.92, -0.9]))
