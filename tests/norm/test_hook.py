"""What psBN says and does at the start of a training."""

import logging
import warnings

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn
from torch.testing import assert_close

from psbn_mmdet import psBN, to_psbn
from psbn_mmdet.norm.hook import PsBNHook, decay_warnings
from tests.helpers.layers import randomize


class FakeRunner:
    """What the hook reads of a Runner."""

    def __init__(self, model, iteration=0, decay=1e-4, parameters=None):
        self.model, self.iter = model, iteration
        parameters = list(model.parameters() if parameters is None else parameters)
        self.optim_wrapper = OptimWrapper(torch.optim.SGD(parameters, 0.1, weight_decay=decay))
        self.logger = logging.getLogger("test of the hook")


def model():
    layers = (nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    return to_psbn(randomize(nn.Sequential(*layers)))


def said(runner, caplog, **kwargs):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        PsBNHook(**kwargs).before_train(runner)
    return [record.message for record in caplog.records]


def test_it_says_what_psbn_does(caplog):
    net = model()
    assert said(FakeRunner(net), caplog) == [
        "psBN: 2 layers, alpha 0.1; 2 took over the bias of a BN, function preserved "
        "(beta = bias - alpha)"
    ]
    net[2].beta.requires_grad_(False)
    (line,) = said(FakeRunner(net, parameters=[net[0].beta]), caplog)
    assert line.endswith("; 1 frozen (e.g. 2): psBN does nothing there")
    assert said(FakeRunner(nn.Sequential(psBN(3, alpha=0.2))), caplog) == [
        "psBN: 1 layers, alpha 0.2"
    ]
    (line,) = said(FakeRunner(nn.Sequential(nn.BatchNorm2d(3))), caplog)
    assert "no psBN layer" in line


def test_shift_lifts_once_at_the_start_and_not_after_a_resume(caplog):
    x = torch.randn(2, 3, 4, 4)
    for iteration, lifted in ((0, 0.1), (5, 0.0)):
        net = model().eval()
        y = net[:1](x)
        for _ in range(2):  # the loop of a Runner may start again
            said(FakeRunner(net, iteration), caplog, shift=True)
            assert_close(net[:1](x), y + lifted)
    fresh = nn.Sequential(psBN(3, alpha=0.2))
    said(FakeRunner(fresh), caplog, shift=True)
    assert torch.equal(fresh[0].beta.detach(), torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: torch.optim.SGD([p for n, p in m.named_parameters() if "beta" not in n], 0.1),
            "beta of 2 psBN layers (e.g. 0.beta) is in no optimizer",
        ),
        (
            lambda m: torch.optim.SGD(m.parameters(), 0.1),
            "psBN does nothing without it: set optim_wrapper.optimizer.weight_decay",
        ),
    ],
)
def test_what_makes_psbn_do_nothing_is_named(make, message):
    net = model()
    (warning,) = decay_warnings(net, [make(net)], {})
    assert message in warning
    assert not [*decay_warnings(net, [torch.optim.SGD(net.parameters(), 0.1, 0.9, 0, 1e-4)], {})]


def test_where_no_rectifier_follows_no_decay_is_asked_for():
    def warned(*activations):
        layers = [layer for act in activations for layer in (nn.BatchNorm2d(3), act)]
        net = to_psbn(nn.Sequential(*layers, nn.Conv2d(3, 3, 1)))
        (warning,) = decay_warnings(net, [torch.optim.SGD(net.parameters(), 0.1)], {})
        return warning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to_psbn says it, too
        assert "no ReLU follows any of the 2 psBN layers" in warned(nn.SiLU(), nn.SiLU())
    assert "beta of 1 psBN layers (e.g. 2.beta) has no weight decay" in warned(nn.SiLU(), nn.ReLU())
