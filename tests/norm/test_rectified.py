"""Which norm layers a rectifier follows, told from the model's own code."""

import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.nn import functional as F

from psbn_mmdet.decay import anchor_bias_decay
from psbn_mmdet.norm import rectified
from tests.helpers.paths import ROOT


class Block(nn.Module):
    """A residual block with one shared ReLU, a shortcut, a linear layer without one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.direct, self.second, self.shortcut, self.linear = (nn.BatchNorm2d(4) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.direct(self.conv(x)))
        y = self.second(self.conv(y))
        y += self.shortcut(x)
        y = F.leaky_relu_(y)
        return self.conv(self.linear(y))


class Untraceable(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        return self.last(self.inner(x))


class TestRectified:
    def test_block(self):
        assert rectified(Block()) == {
            "direct.bias": True,
            "second.bias": True,
            "shortcut.bias": True,
            "linear.bias": False,
        }

    def test_what_cannot_be_traced_is_unknown_and_taken(self, capsys):
        model = Untraceable(nn.Sequential(Block(), nn.BatchNorm2d(4)))
        verdicts = rectified(model)
        assert verdicts["inner.0.direct.bias"] is True
        assert verdicts["inner.0.linear.bias"] is False
        assert verdicts["inner.1.bias"] is None  # its output leaves the part that can be traced
        assert verdicts["last.bias"] is None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        anchored = anchor_bias_decay(model, optimizer)
        said = capsys.readouterr().out
        assert "inner.0.linear.bias" not in anchored.names
        assert set(anchored.names) == {name for name in verdicts if "linear" not in name}
        assert f"Taken: {', '.join(anchored.names)}\n" in said
        assert "biases of 5 norm layers decay toward 0.1; 5 of them start there" in said
        assert "left, as no rectifier follows: inner.0.linear.bias" in said
        anchored.remove()
        anchored = anchor_bias_decay(model, optimizer, layers="all", log=None)
        assert set(anchored.names) == set(verdicts)

    @pytest.mark.parametrize(
        ("after", "verdict"),
        [
            ([nn.ReLU6()], True),
            ([nn.Dropout(), nn.Identity(), nn.PReLU()], True),
            ([nn.SiLU()], False),
            ([nn.Conv2d(4, 4, 1), nn.ReLU()], False),
            ([], False),
            ([nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))], True),
        ],
    )
    def test_by_what_follows(self, after, verdict):
        assert rectified(nn.Sequential(nn.BatchNorm2d(4), *after)) == {"0.bias": verdict}

    def test_a_module_that_is_not_torchs_own_is_unknown(self):
        class Own(nn.Module):
            def forward(self, x):
                return x.clamp(min=0)

        assert rectified(nn.Sequential(nn.BatchNorm2d(4), Own())) == {"0.bias": None}

    def test_a_functional_layer_counts_where_it_is_traced(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm2d(4)
                self.mean, self.var = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
                self.gain, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

            def forward(self, x):
                x = F.batch_norm(self.norm(x), self.mean, self.var, self.gain, self.shift)
                return torch.relu_(x)

        assert rectified(Functional()) == {"norm.bias": False, "shift": True}

    def test_a_layer_used_twice_is_rectified_if_one_use_is(self):
        shared = nn.BatchNorm2d(4)
        model = nn.Sequential(shared, nn.Conv2d(4, 4, 1), shared, nn.ReLU())
        assert rectified(model) == {"0.bias": True}

    def test_leaves_the_model_as_it_is(self):
        class Remembers(nn.Sequential):
            def forward(self, x):
                self.seen = x
                return super().forward(x)

        model = Remembers(nn.BatchNorm2d(4), nn.ReLU())
        assert rectified(model) == {"0.bias": True}
        assert not hasattr(model, "seen")

    def test_retinanet(self):
        """All 53 of ResNet-50: each is followed by the shared ReLU, at once or after the sum."""
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules

        register_all_modules(init_default_scope=True)
        cfg = Config.fromfile(ROOT / "configs/retinanet/retinanet_bn_500.py")
        cfg.model.backbone.init_cfg = None
        verdicts = rectified(MODELS.build(cfg.model))
        assert len(verdicts) == 53
        assert set(verdicts.values()) == {True}
