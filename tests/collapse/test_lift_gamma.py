"""lift_gamma and LiftGamma: which gammas change, to what, and what is said."""

import copy

import pytest
import torch
from mmengine.hooks import EMAHook
from torch import nn

from psbn_mmdet import to_psbn
from psbn_mmdet.collapse import CallError, MeasureError, lift_gamma, norm_modules
from psbn_mmdet.collapse.lifting import summary
from psbn_mmdet.collapse.revive_hook import LiftGamma
from psbn_mmdet.collapse.reviving import ReviveError
from tests.helpers.strippable import chain, conv_bn, kill, kill_at_random, with_statistics
from tests.helpers.toy_runner import make_runner


def two_layers():
    """gamma of the first: 0.5, 1e-4, -1e-4, 0; of the second: -0.5, 1, 2."""
    net = with_statistics(nn.Sequential(conv_bn(3, 4), conv_bn(4, 3)))
    net[0][1].weight.data = torch.tensor([0.5, 1e-4, -1e-4, 0.0])
    net[1][1].weight.data = torch.tensor([-0.5, 1.0, 2.0])
    return net


@pytest.mark.parametrize("psbn", [False, True])
def test_by_hand(psbn):
    net = two_layers()
    if psbn:
        to_psbn(net)
    before = copy.deepcopy(net.state_dict())
    record = lift_gamma(net)
    assert net[0][1].weight.tolist() == pytest.approx([0.5, 0.1, 0.1, 0.1])
    assert net[1][1].weight.tolist() == [-0.5, 1.0, 2.0]
    assert record["filters"] == {"all": 7, "collapsed": 3, "lifted": 3, "left": 0}
    assert record["change"] is None
    record = lift_gamma(net, every=True, gamma=0.2)
    assert net[0][1].weight.tolist() == pytest.approx([0.5, 0.26, 0.26, 0.26])
    assert net[1][1].weight.tolist() == pytest.approx([-0.1, 0.8, 1.4])
    assert record["filters"] == {"all": 7, "collapsed": 0, "lifted": 7, "left": 0}
    for key, value in net.state_dict().items():
        if not (key.endswith(".weight") and value.dim() == 1):
            assert torch.equal(value, before[key]), key


def test_how_much_the_outputs_change():
    """By hand: a filter of gamma 0 and bias 0 puts out 0.1 x_hat afterwards."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0)).eval()
    net[0].weight.data.fill_(1)
    net[1].weight.data = torch.tensor([2.0, 0.0])
    images = torch.tensor([1.0, -3.0, 0.5, 2.0]).view(4, 1, 1, 1)
    with torch.no_grad():
        before, record = net(images), lift_gamma(net, images)
        after = net(images)
    assert torch.equal(before[:, 1], torch.zeros(4, 1, 1))
    assert torch.allclose(after[:, 1].flatten(), torch.tensor([0.1, -0.3, 0.05, 0.2]))
    # The channel was 0, so its change stands as it is, less float32's rounding of the others.
    assert record["change"] == pytest.approx(0.3, rel=1e-3)
    assert "outputs: changed by up to 0.3" in summary(record)
    net[1].weight.data = torch.tensor([2.0, 5e-4])
    assert lift_gamma(net, images)["change"] == pytest.approx(0.0995 / 5e-4, rel=1e-3)


def test_what_stays():
    """A layer that zero_init_residual has made, in mmdet's way and in torchvision's; a frozen one.

    Training mode, random numbers and buffers come out as they were.
    """
    net = nn.Sequential(*(conv_bn(3, 3, act=None) for _ in range(4))).train()
    kill(net[0][1], [0, 1, 2], bias=0)
    to_psbn(net)
    nn.init.zeros_(net[1][1].weight)  # torchvision's: bias is alpha
    nn.init.zeros_(net[2][1].weight)  # mmdet's: bias is 0
    nn.init.zeros_(net[2][1].bias)
    nn.init.zeros_(net[3][1].weight)
    net[3][1].bias.data.fill_(1)
    net[3][1].weight.requires_grad_(False)
    buffers = {key: value.clone() for key, value in net.named_buffers()}
    record = lift_gamma(net, torch.randn(2, 3, 4, 4), every=True)
    assert not any(norm.weight.any() for norm in norm_modules(net).values())
    assert record["filters"] == {"all": 12, "collapsed": 3, "lifted": 0, "left": 3}
    assert record["left"] == {
        "gamma and bias start at 0": ["0.1", "1.1", "2.1"],
        "its gamma is not trained": ["3.1"],
    }
    assert record["change"] == 0
    assert "left, as its gamma is not trained: 3.1" in summary(record)
    assert all(module.training for module in net.modules())
    for key, value in net.named_buffers():
        assert torch.equal(value, buffers[key])


def test_wrong_input():
    with pytest.raises(MeasureError, match="above the threshold"):
        lift_gamma(chain(), gamma=1e-4)
    with pytest.raises(CallError, match="cannot be called"):
        lift_gamma(chain(), torch.zeros(2, 5, 8, 8))
    broken = two_layers()
    broken[1][1].weight.data[0] = torch.nan
    before = broken[0][1].weight.clone()
    with pytest.raises(MeasureError, match=r"1\.1 has a gamma that is not finite"):
        lift_gamma(broken)
    assert torch.equal(broken[0][1].weight, before)


def dead_chain():
    torch.manual_seed(0)
    net = with_statistics(chain())
    kill_at_random(net)
    return net


class Log:
    """What a hook says."""

    def __init__(self, runner):
        self.info_lines, self.warnings = [], []
        runner.logger.info = self.info_lines.append
        runner.logger.warning = self.warnings.append

    def of(self, hook):
        lines = [*self.info_lines, *self.warnings]
        return [line for line in lines if str(line).startswith(hook)]


def train(tmp_path, hook, net, hooks=()):
    runner = make_runner(tmp_path, [hook, *hooks], net=net, iterations=1)
    log = Log(runner)
    runner.train()
    return log.of("LiftGamma")


def test_in_a_training(tmp_path):
    """Before the first step: one step of lr 0.1 moves gamma little."""
    net = dead_chain()
    dead = {name: norm.weight == 0 for name, norm in norm_modules(net).items()}
    count = sum(int(mask.sum()) for mask in dead.values())
    average = EMAHook()
    said = train(tmp_path, {"type": "LiftGamma", "module": "net"}, net, [average])
    assert len(said) == 1 and f"gamma of {count} of" in said[0]
    theirs = average.ema_model.module.net
    for name, norm in norm_modules(net).items():
        assert (norm.weight[dead[name]] - 0.1).abs().max() < 0.02
        assert (theirs.get_submodule(name).weight[dead[name]] - 0.1).abs().max() < 0.02


def test_not_after_a_resume(tmp_path):
    net = dead_chain()
    runner = make_runner(tmp_path, [], net=net)
    hook = LiftGamma(module="")

    class Resumed:
        iter, model, hooks, logger = 3, runner.model, [], runner.logger

    hook.before_train(Resumed)
    assert any((norm.weight == 0).any() for norm in norm_modules(net).values())


class RunningStatistics(nn.Sequential):
    """As a backbone of mmdet with norm_eval=True."""

    def train(self, mode=True):
        super().train(mode)
        for norm in norm_modules(self).values():
            norm.eval()
        return self


def test_running_statistics_get_a_warning(tmp_path):
    said = train(tmp_path, LiftGamma("net", every=True), RunningStatistics(*dead_chain()))
    assert len(said) == 2 and "set norm_eval=False" in said[1]
    assert "normalize by running statistics" in said[1]


def test_a_part_that_is_not_there(tmp_path):
    with pytest.raises(ReviveError, match=r"has no 'backbone'; it has .*net"):
        train(tmp_path, LiftGamma(), dead_chain())
