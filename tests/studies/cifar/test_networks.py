"""The networks against the published counts and against counts by hand."""

import pytest
import torch
from torch import nn

from psbn_mmdet import psBN, psIN
from psbn_mmdet.collapse import measure, probe
from studies.cifar.networks import build_network
from studies.cifar.settings import ACTIVATIONS, NORMS, Settings

BN, RELU = dict(type="BN"), dict(type="ReLU")


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "million_parameters", "million_macs"),
    [
        ("resnet20", 0.27, 41),  # He et al., table 6; multiply-adds as usually given
        ("resnet56", 0.85, 125),  # Li et al. (arXiv 1608.08710), table 1: 1.25e8
        ("resnet110", 1.7, 253),  # 2.53e8
        ("vgg16", 15.0, 313),  # 1.5e7, 3.13e8
    ],
)
def test_counts_are_the_published_ones(name, million_parameters, million_macs):
    network = build_network(name, BN, RELU)
    digits = len(str(million_parameters).split(".")[1]) if million_parameters < 10 else 0
    assert round(parameters(network) / 1e6, digits) == million_parameters
    assert round(probe(network, {}, (3, 32, 32)).total / 1e6) == million_macs


def resnet_by_hand(n):
    """Convolutions, gamma and beta, linear; multiply-adds of all of these but gamma and beta."""
    parameters = 3 * 16 * 9 + 32 + 64 * 10 + 10
    macs = 3 * 16 * 9 * 32**2 + 64 * 10
    for c_before, c, side in ((16, 16, 32), (16, 32, 16), (32, 64, 8)):
        convs = c_before * c * 9 + (2 * n - 1) * c * c * 9
        parameters += convs + 2 * n * 2 * c
        macs += convs * side**2
    return parameters, macs


@pytest.mark.parametrize(("name", "n"), [("resnet20", 3), ("resnet56", 9), ("resnet110", 18)])
def test_resnet_counts_by_hand(name, n):
    network = build_network(name, BN, RELU)
    assert (parameters(network), probe(network, {}, (3, 32, 32)).total) == resnet_by_hand(n)
    assert measure(network).totals["filters"] == 16 + 2 * n * (16 + 32 + 64)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("vgg11", [(3, 64, 32), (64, 128, 16), (128, 256, 8), (256, 256, 8), (256, 512, 4),
                   (512, 512, 4), (512, 512, 2), (512, 512, 2)]),
        ("vgg16", [(3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8),
                   (256, 256, 8), (256, 256, 8), (256, 512, 4), (512, 512, 4), (512, 512, 4),
                   (512, 512, 2), (512, 512, 2), (512, 512, 2)]),
    ],
)  # fmt: skip
def test_vgg_counts_by_hand(name, plan):
    network = build_network(name, BN, RELU)
    convs = sum(a * b * 9 for a, b, _ in plan)
    assert parameters(network) == convs + sum(2 * b for _, b, _ in plan) + 512 * 10 + 10
    macs = sum(a * b * 9 * side**2 for a, b, side in plan) + 512 * 10
    assert probe(network, {}, (3, 32, 32)).total == macs
    without = build_network(name, None, RELU)  # a bias in place of gamma and beta
    assert parameters(network) - parameters(without) == sum(b for _, b, _ in plan)


def test_shortcut_subsamples_and_pads_with_zeros():
    network = build_network("resnet20", BN, None).eval()
    block = network.layer2[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 16, 32, 32)
    y = block(x)
    assert y.shape == (2, 32, 16, 16)
    torch.testing.assert_close(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("name", ["resnet20", "vgg11"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_norm_and_activation_trains(name, norm, act):
    network = Settings(network=name, norm=norm, act=act, width=0.1).network_module()
    network(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    kinds = {"BN": nn.BatchNorm2d, "psBN": psBN, "IN": nn.InstanceNorm2d, "psIN": psIN}
    layers = [m for m in network.modules() if type(m) is kinds.get(norm)]
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == (0 if norm == "none" else len(convs))
    assert all(m.affine for m in layers)
    assert all((m.bias is None) == (norm != "none") for m in convs)
    slopes = {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == ({0.01} if act == "LeakyReLU" else set())
    assert any(isinstance(m, nn.ReLU) for m in network.modules()) == (act == "ReLU")


def test_without_activation_the_resnet_is_affine():
    network = build_network("resnet20", BN, None, width=0.25).eval().double()
    x, y = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    zero = network(torch.zeros_like(x))
    torch.testing.assert_close(network(x + y) - zero, network(x) + network(y) - 2 * zero)


def test_gamma_init_and_alpha_arrive():
    network = Settings(norm="psBN", gamma_init=0.05, alpha=0.2).network_module()
    layers = [m for m in network.modules() if isinstance(m, psBN)]
    assert len(layers) == 19
    for layer in layers:
        assert torch.equal(layer.weight, torch.full_like(layer.weight, 0.05))
        assert float(layer.alpha) == pytest.approx(0.2)


def test_width_scales_channels():
    network = build_network("resnet20", BN, RELU, width=0.3)
    channels = {m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)}
    assert channels == {5, 10, 19}
    network(torch.randn(2, 3, 32, 32))  # odd paddings of the shortcut too


def test_wrong_names_say_what_there_is():
    with pytest.raises(
        ValueError, match="resnet20, resnet56, resnet110, vgg11, vgg16, mmdet_resnet18, got 'r'"
    ):
        build_network("r")
    with pytest.raises(ValueError, match="width must be positive"):
        build_network("vgg11", width=0)
