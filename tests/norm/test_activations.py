"""What follows each norm layer, told from the model's own code."""

from collections import Counter
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.nn import functional as F

from psbn_mmdet import psBN2d, to_psbn
from psbn_mmdet.decay import anchor_bias_decay
from psbn_mmdet.norm import followed_by, norm_layers, rectified
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
        assert "not anchored, as no ReLU follows: inner.0.linear.bias" in said
        anchored.remove()
        anchored = anchor_bias_decay(model, optimizer, layers="all", log=None)
        assert set(anchored.names) == set(verdicts)

    @pytest.mark.parametrize(
        ("after", "verdict"),
        [
            ([nn.ReLU6()], True),
            ([nn.Dropout(), nn.Identity(), nn.PReLU()], True),
            ([nn.SiLU()], False),
            ([nn.Hardswish()], True),
            ([nn.Hardsigmoid()], True),
            ([nn.Threshold(1.0, 0.0)], True),
            ([nn.Conv2d(4, 4, 1), nn.ReLU()], False),
            ([], False),
            ([nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))], True),
        ],
    )
    def test_by_what_follows(self, after, verdict):
        assert rectified(nn.Sequential(nn.BatchNorm2d(4), *after)) == {"0.bias": verdict}

    @pytest.mark.parametrize(
        ("rest", "kind"),
        [
            (lambda m, y: torch.where(y > 0, y, 0), "relu"),
            (lambda m, y: torch.where(y > 0, y, torch.zeros_like(y)), "relu"),
            (lambda m, y: torch.where(y > 0, y, 1.0), "hard"),
            (lambda m, y: torch.maximum(y, torch.zeros_like(y)), "relu"),
            (lambda m, y: torch.max(y, torch.zeros_like(y)), "relu"),
            (lambda m, y: y * (y > 0), "relu"),
            (lambda m, y: y * (y > 0).float(), "relu"),
            (lambda m, y: (y > 0).to(y) * y, "relu"),
            (lambda m, y: F.hardswish(y), "hard"),
            (lambda m, y: y.clamp(min=-1), "hard"),
            (lambda m, y: y * (y < 0), "other"),
        ],
    )
    def test_rectifiers_written_out(self, rest, kind):
        assert followed_by(Model(rest))["bn"] == kind
        assert rectified(Model(rest))["bn.bias"] is (kind != "other")

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


class Model(nn.Module):
    """A norm layer, and a function of its output and the model that is the rest of forward."""

    def __init__(self, rest, **parts):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.rest = rest
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.rest(self, self.bn(x))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class Own(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, factor=1.0):
        return self.function(x)


class Joined(nn.Module):
    def forward(self, *values):
        return torch.cat(values, 1)


class Undecidable(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else x.relu()


def then_in_place(model, y):
    F.relu_(y)
    return model.conv(y)


USES = {
    "ReLU as a method": (lambda m, y: y.relu(), "relu"),
    "ReLU6": (lambda m, y: F.relu6(y), "relu"),
    "a clamp at 0": (lambda m, y: y.clamp(min=0), "relu"),
    "a clamp at 0 and 6": (lambda m, y: torch.clamp(y, 0, 6), "relu"),
    "a threshold at 0": (lambda m, y: F.threshold(y, 0.0, 0.0), "relu"),
    "a threshold at 1": (lambda m, y: F.threshold(y, 1.0, 0.0), "hard"),
    "an argument in a list": (lambda m, y: m.listed([m.conv(y), y]).relu(), "none"),
    "an argument in a list alone": (lambda m, y: m.listed([m.conv.weight, y]).relu(), "relu"),
    "one of many arguments": (lambda m, y: m.starred(m.conv.weight, y).relu(), "relu"),
    "a clamp below 0": (lambda m, y: y.clamp(-1, 1), "hard"),
    "Hardtanh": (lambda m, y: F.hardtanh(y), "hard"),
    "LeakyReLU": (lambda m, y: F.leaky_relu(y, 0.1), "leaky"),
    "SiLU": (lambda m, y: F.silu(y), "other"),
    "x * sigmoid(x)": (lambda m, y: m.conv(y * y.sigmoid()), "other"),
    "a convolution": (lambda m, y: m.conv(y).relu(), "none"),
    "the end": (lambda m, y: y, "none"),
    "nothing": (lambda m, y: m.conv(torch.zeros(1, 4, 2, 2)), "none"),
    "a sum": (lambda m, y: (m.conv(y.relu()) + y).relu(), "relu"),
    "a sum used twice": (lambda m, y: (m.conv(y + 1), (y + 1).relu()), "none"),
    "pooling": (lambda m, y: F.avg_pool2d(y, 2).relu(), "relu"),
    "change of shape": (lambda m, y: y.flatten(1)[:, :2].relu(), "relu"),
    "a chunk": (lambda m, y: y.chunk(2, dim=1)[0].relu(), "relu"),
    "its shape alone": (lambda m, y: m.conv(torch.zeros(y.shape) + y.size(0)) + y.relu(), "relu"),
    "a ReLU and a convolution": (lambda m, y: m.conv(y) + y.relu(), "none"),
    "a ReLU and a SiLU": (lambda m, y: F.silu(y) + y.relu(), "other"),
    "an in-place ReLU, and then a convolution": (then_in_place, "relu"),
    "a positive factor": (lambda m, y: (2 * y / 3).relu(), "relu"),
    "a negative factor": (lambda m, y: (-0.5 * y).relu(), "unknown"),
    "minus": (lambda m, y: (y - 0.1).relu(), "relu"),
    "subtracted": (lambda m, y: (0.1 - y).relu(), "unknown"),
    "a gate of any sign": (lambda m, y: (y * m.conv.weight[0]).relu(), "unknown"),
    "negated": (lambda m, y: (-y).relu(), "unknown"),
}
MODULES = {
    "torch's activation": (nn.Hardswish(), "hard"),
    "torch's ReLU6": (nn.ReLU6(), "relu"),
    "Hardtanh from 0": (nn.Hardtanh(0, 6), "relu"),
    "Hardtanh": (nn.Hardtanh(), "hard"),
    "Threshold from 0": (nn.Threshold(0, 0), "relu"),
    "Threshold": (nn.Threshold(0, 1), "hard"),
    "PReLU": (nn.PReLU(), "leaky"),
    "attention": (nn.MultiheadAttention(4, 1), "none"),
    "another norm": (nn.BatchNorm2d(4), "none"),
    "GroupNorm": (nn.GroupNorm(2, 4), "none"),
    "pooling": (nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), "relu"),
    "an own rectifier": (Own(F.relu), "relu"),
    "an own Swish": (nn.Sequential(Own(lambda x: x * x.sigmoid()), nn.Conv2d(4, 4, 1)), "other"),
    "an own identity and ReLU": (nn.Sequential(Own(lambda x: x), nn.ReLU()), "relu"),
    "a gate of its own, and ReLU": (nn.Sequential(Gate(), nn.ReLU()), "none"),
    "a module that decides by its input": (Undecidable(), "unknown"),
}


class TestFollowedBy:
    @pytest.mark.parametrize("use", USES)
    def test_by_use(self, use):
        rest, expected = USES[use]
        listed, starred = Own(lambda values: torch.cat(values, 1)), Joined()
        assert followed_by(Model(rest, listed=listed, starred=starred)) == {"bn": expected}

    @pytest.mark.parametrize("name", MODULES)
    def test_by_module(self, name):
        module, expected = MODULES[name]
        assert followed_by(nn.Sequential(nn.BatchNorm2d(4), module))["0"] == expected

    def test_drop_path_passes_as_in_evaluation(self):
        from mmcv.cnn.bricks import DropPath

        model = nn.Sequential(nn.BatchNorm2d(4), DropPath(0.5), nn.ReLU())
        assert followed_by(model) == {"0": "relu"}
        assert model[1].training

    def test_covers_psbn_and_every_other_norm_layer_by_name(self):
        model = nn.Sequential(
            nn.Sequential(psBN2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
            nn.InstanceNorm2d(4),
            nn.SiLU(),
            nn.SyncBatchNorm(4),
        )
        expected = {"0.0": "relu", "1": "other", "3": "none"}
        assert followed_by(model) == expected
        assert followed_by(model, whole=False) == {**expected, "3": "unknown"}
        assert followed_by(psBN2d(4)) == {"": "unknown"}

    def test_a_shared_layer_is_relu_only_if_all_its_uses_are(self):
        shared = nn.BatchNorm2d(4)
        model = nn.Sequential(shared, nn.Conv2d(4, 4, 1), shared, nn.ReLU())
        assert followed_by(model) == {"0": "none"}
        assert rectified(model) == {"0.bias": True}

    def test_branches_by_an_argument_take_its_default(self):
        class Switched(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(4)

            def forward(self, x, activate=True):
                return self.bn(x).relu() if activate else self.bn(x)

        class Uses(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = Switched()

            def forward(self, x):
                return self.part(x, activate=False)

        assert followed_by(Switched()) == {"bn": "relu"}
        assert followed_by(Uses()) == {"part.bn": "none"}

    def test_parts_that_the_default_path_leaves_out_are_looked_at_alone(self):
        class Auxiliary(nn.Module):
            def __init__(self):
                super().__init__()
                self.main = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
                self.aux = nn.Sequential(
                    nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
                )

            def forward(self, x, mode="tensor"):
                return self.main(x) if mode == "tensor" else self.aux(self.main(x))

        assert followed_by(Auxiliary()) == {"main.0": "relu", "aux.0": "other", "aux.3": "unknown"}

    @pytest.mark.parametrize("layer", [nn.BatchNorm2d, psBN2d])
    def test_exported(self, layer):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), layer(4), nn.ReLU6()).eval()
        exported = torch.export.export(model, (torch.randn(2, 3, 4, 4),)).module()
        assert followed_by(exported) == {"1": "relu"}

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_scripted_is_unknown_also_as_a_part(self):
        part = torch.jit.script(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
        assert followed_by(part) == {"0": "unknown"}
        model = nn.Sequential(nn.BatchNorm2d(4), part)
        assert followed_by(model) == {"0": "unknown", "1.0": "unknown"}

    def test_leaves_the_model_and_the_random_numbers_as_they_are(self):
        class Remembers(nn.Sequential):
            def __init__(self, *parts):
                super().__init__(*parts)
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x):
                self.seen = x
                self.calls += 1
                return super().forward(x) + torch.rand(())

        model = Remembers(nn.BatchNorm2d(4), nn.ReLU())
        random = torch.get_rng_state()
        assert followed_by(model) == {"0": "relu"}
        assert not hasattr(model, "seen")
        assert model.calls == 0
        assert torch.equal(torch.get_rng_state(), random)


class TestDetectors:
    """Models of mmdet's own configs, with the numbers of layers counted from their papers."""

    @staticmethod
    def build(config, **changes):
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules

        register_all_modules(init_default_scope=True)
        cfg = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / config)
        cfg.model.backbone.init_cfg = None
        cfg.merge_from_dict({f"model.{key}": value for key, value in changes.items()})
        return MODELS.build(cfg.model)

    @pytest.mark.parametrize("convert", [lambda model: model, to_psbn], ids=["BN", "psBN"])
    @pytest.mark.parametrize(
        "config", ["yolox/yolox_tiny_8xb8-300e_coco.py", "rtmdet/rtmdet_tiny_8xb32-300e_coco.py"]
    )
    @pytest.mark.filterwarnings("ignore:no ReLU follows")
    def test_swish_detectors_have_no_rectifier(self, config, convert):
        """YOLOX: each BN is a ConvModule's, with a Swish of mmcv's own; RTMDet: with SiLU."""
        model = convert(self.build(config))
        assert followed_by(model) == dict.fromkeys(norm_layers(model), "other")
        assert set(rectified(model).values()) <= {False}
        if convert is not to_psbn:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
            with pytest.raises(ValueError, match="no ReLU follows any of the"):
                anchor_bias_decay(model, optimizer)

    def test_efficientnet_with_a_retinanet_head(self):
        """EfficientNet-B0: Swish, and linear bottlenecks; the head: ReLU; FPN: none.

        MBConv blocks: 16, each with a linear BN at its end; the first has no expansion, so Swish
        follows 15 expansions, 16 depthwise convolutions and the stem; the last 1x1 convolution is
        left out of the detector. FPN: a norm on each of the 5 outputs, none on the lateral
        convolutions. Head: 4 layers of 2 branches, each with a BN for each of 5 levels.
        """
        model = self.build(
            "efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py",
            **{"backbone.arch": "b0", "neck.in_channels": [40, 112, 320]},
        )
        kinds = Counter((name.split(".")[0], kind) for name, kind in followed_by(model).items())
        assert kinds[("bbox_head", "relu")] == 4 * 2 * 5
        assert kinds[("backbone", "other")] == 15 + 16 + 1
        assert kinds[("backbone", "none")] == 16
        assert kinds[("neck", "none")] == 5
        assert sum(kinds.values()) == len(norm_layers(model)) == 40 + 32 + 16 + 5

    def test_mobilenet_v2(self):
        """17 linear bottlenecks; ReLU6 after 16 expansions, 17 depthwise, stem and last."""
        from mmdet.models import MobileNetV2

        kinds = Counter(followed_by(MobileNetV2(out_indices=(7,))).values())
        assert kinds == {"relu": 16 + 17 + 2, "none": 17}

    def test_retinanet(self):
        """All 53 of ResNet-50: each is followed by the shared ReLU, at once or after the sum."""
        verdicts = rectified(self.build(ROOT / "configs/retinanet/retinanet_bn_500.py"))
        assert len(verdicts) == 53
        assert set(verdicts.values()) == {True}
