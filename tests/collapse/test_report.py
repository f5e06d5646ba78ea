"""Reports against hand-made truth."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from psbn_mmdet import norm
from psbn_mmdet.collapse import measure
from tests.helpers.collapsed_net import (
    CONSTANT,
    DEAD,
    INACTIVE_ONLY,
    VARIANTS,
    Net,
    collapse_by_hand,
)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return collapse_by_hand(Net())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("source", ["model", "state dict", "DataParallel's state dict"])
def test_a_report_has_exactly_the_filters_collapsed_by_hand(net, variant, source):
    model = VARIANTS[variant](net)
    if source == "model":
        report = measure(model)
    elif source == "state dict":
        report = measure(model.state_dict())
    else:
        report = measure({"module." + k: v for k, v in model.state_dict().items()})
    rows = {(row["name"]).removeprefix("module."): row for row in report.rows}
    assert list(rows) == list(DEAD)
    for name, row in rows.items():
        collapsed = sorted(DEAD[name] + CONSTANT[name])
        assert row["collapsed_filters"] == collapsed
        # Only behind bn1 and block.bn1 stands a ReLU right there, which a state dict does not tell.
        told = source == "model" and name in ("bn1", "block.bn1")
        assert row["constant_filters"] == (CONSTANT[name] if told else [])
        assert row["dead"] == (len(DEAD[name]) if told else 0)
        assert row["inactive_filters"] == (INACTIVE_ONLY[name] if told else [])
        conv = {"bn1": "conv1", "block.bn1": "block.conv1"}
        conv.update({"block.bn2": "block.conv2", "block.down.1": "block.down.0"})
        assert (row["conv"]).removeprefix("module.") == conv[name]
    totals = report.totals
    assert (totals["filters"], totals["collapsed"]) == (28, 8)
    told = (totals["told"], totals["dead"], totals["constant"], totals["inactive"])
    assert told == ((12, 3, 1, 1) if source == "model" else (0, 0, 0, 0))
    assert report.summary().startswith("8 of 28 filters collapsed (28.57%)\n")


def test_values_that_are_not_finite_are_counted_and_leave_valid_json(net):
    with torch.no_grad():
        net.bn1.weight[0] = math.nan
        net.block.bn1.bias[:] = math.inf
    report = measure(net)
    assert report.totals["not_finite"] == 5
    assert report.rows[1]["activation_probability"] != report.rows[1]["activation_probability"]
    assert report.summary().startswith("5 of 28 filters have a NaN or infinite gamma or bias")
    lines = report.table(limit=2).splitlines()
    assert lines[1].split()[0] == "block.bn1"
    column = lines[0].split().index("finite") - 1  # "not finite" is one head
    assert lines[1].split()[column] == "4"
    assert lines[2].startswith("bn1 ")
    assert lines[2].split()[column] == "1"
    assert report.rows[0]["not_finite_filters"] == [0]
    assert 0 not in report.rows[0]["collapsed_filters"]
    layers = json.loads(report.to_json(), parse_constant=pytest.fail)["layers"]
    assert layers[1]["activation_probability"] is None


def test_the_table_ranks_layers_and_ends_with_the_totals(net):
    lines = measure(net).table(limit=2).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["bn1", "block.down.1"]
    assert lines[3] == "... and 2 more layers"
    assert lines[5] == "8 of 28 filters collapsed (28.57%)"


def test_json_holds_the_sets(net):
    content = json.loads(measure(net).to_json())
    assert content["totals"]["collapsed"] == 8
    got = {row["name"]: row["collapsed_filters"] for row in content["layers"]}
    assert got == {name: sorted(DEAD[name] + CONSTANT[name]) for name in DEAD}


class TestBadInput:
    @pytest.mark.parametrize("threshold", [-1e-9, math.nan, math.inf])
    def test_a_threshold_below_zero(self, threshold):
        with pytest.raises(ValueError, match=r"gamma. must not be negative"):
            measure(Net(), threshold=threshold)

    def test_a_probability_above_one(self):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 2"):
            measure(Net(), inactive_below=2)

    def test_a_model_without_a_layer(self):
        with pytest.raises(ValueError, match="no normalization layer with a gamma"):
            measure(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)))

    def test_a_state_dict_without_a_recognisable_layer_names_the_way_out(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
        with pytest.raises(ValueError, match="measure the model itself"):
            measure(model.state_dict())

    def test_a_lazy_layer(self):
        with pytest.raises(ValueError, match="run the model once first"):
            measure(nn.Sequential(nn.LazyBatchNorm2d()))

    def test_neither_model_nor_state_dict(self):
        with pytest.raises(TypeError, match="got str"):
            measure("resnet50.pth")

    def test_flops_of_a_state_dict(self):
        with pytest.raises(ValueError, match="a state dict cannot be run"):
            measure(Net().state_dict(), inputs=(3, 8, 8))


class Activations(nn.Module):
    """Four layers with the same half that collapsed; what follows is in their names."""

    def __init__(self):
        super().__init__()
        for name in ("relu", "silu", "leaky", "linear"):
            conv, bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            with torch.no_grad():
                bn.weight[0], bn.bias[0] = 0.0, -1.0
                bn.weight[1], bn.bias[1] = 0.1, -1.0
            setattr(self, f"conv_{name}", conv)
            setattr(self, f"bn_{name}", bn)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = F.relu(self.bn_relu(self.conv_relu(x)))
        x = F.silu(self.bn_silu(self.conv_silu(x)))
        x = F.leaky_relu(self.bn_leaky(self.conv_leaky(x)))
        return self.head(self.bn_linear(self.conv_linear(x)))


class TestWhatFollows:
    def test_only_a_relu_makes_filters_dead_or_inactive(self):
        report = measure(Activations())
        rows = {(row["name"]).removeprefix("bn_"): row for row in report.rows}
        follows = {name: row["followed_by"] for name, row in rows.items()}
        assert follows == {"relu": "relu", "silu": "other", "leaky": "leaky", "linear": "none"}
        states = {n: (r["dead"], r["constant"], r["inactive_filters"]) for n, r in rows.items()}
        passes = (0, 0, [])
        assert states == {"relu": (1, 0, [1]), "silu": passes, "leaky": passes, "linear": passes}
        assert rows["silu"]["collapsed_filters"] == [0]
        totals = report.totals
        assert (totals["collapsed"], totals["told"], totals["inactive"]) == (4, 4, 1)
        assert "12 filters: the weights alone do not show" in report.summary()
        assert [line.split()[-2] for line in report.table().splitlines()[1:5]] == [
            *("relu", "other", "leaky", "none"),
        ]

    def test_of_a_state_dict_only_collapsed_is_told(self):
        report = measure(Activations().state_dict())
        assert {row["followed_by"] for row in report.rows} == {"unknown"}
        assert (report.totals["collapsed"], report.totals["told"]) == (4, 0)
        assert "16 filters: the weights alone do not show" in report.summary()

    def test_in_front_of_a_sum_the_weights_do_not_tell(self):
        followed = {row["name"]: row["followed_by"] for row in measure(Net()).rows}
        assert followed == {
            "bn1": "relu", "block.bn1": "relu", "block.bn2": "sum", "block.down.1": "sum",
        }  # fmt: skip

    def test_a_layer_that_has_not_started_is_not_collapsed(self):
        net = Net()
        nn.init.zeros_(net.block.bn2.weight)
        report = measure(net, (3, 10, 10))
        assert report.totals["collapsed"] == report.flops.sparsity == 0
        assert "1 layers (e.g. block.bn2) have not started" in report.summary()
        net.block.bn2.bias.data[3] = 1e-8
        report = measure(net, (3, 10, 10))
        assert report.totals["collapsed"] == 8
        assert report.flops.sparsity > 0

    @pytest.mark.parametrize("act", ["SiLU", "ReLU6"])
    def test_conv_modules_of_a_detector(self, act):
        from mmdet.models.backbones import CSPDarknet

        cfg = dict(norm_cfg=dict(type="BN"), act_cfg=dict(type=act))
        model = CSPDarknet(widen_factor=0.125, deepen_factor=0.33, **cfg)
        for layer in norm.norm_layers(model).values():
            nn.init.constant_(layer.bias, -9.0)
        totals = measure(model).totals
        assert totals["inactive"] == (totals["filters"] if act == "ReLU6" else 0)


class TestNearlyLinear:
    def psbn_net(self, gamma):
        model = norm.to_psbn(Activations(), alpha=0.1)
        for layer in norm.norm_layers(model).values():
            nn.init.constant_(layer.weight, gamma)
            nn.init.zeros_(layer.beta)
        return model

    def test_psbn_layers_whose_alpha_is_large_against_gamma_are_named(self):
        # Phi(0.1 / gamma) > 0.95 is gamma < 0.0608; only one of the layers has a ReLU.
        report = measure(self.psbn_net(0.06))
        assert report.nearly_linear == ["bn_relu"]
        assert json.loads(report.to_json())["nearly_linear"] == ["bn_relu"]
        assert (
            "1 layers (e.g. bn_relu) are nearly linear: P(ReLU active) > 0.95." in report.summary()
        )
        assert measure(self.psbn_net(0.061)).nearly_linear == []
        assert "nearly linear" not in measure(self.psbn_net(0.061)).summary()

    def test_a_state_dict_does_not_tell_where_a_relu_stands(self):
        assert measure(self.psbn_net(0.06).state_dict()).nearly_linear == []

    def test_batch_norm_has_no_alpha_to_be_large(self):
        assert measure(norm.to_bn(self.psbn_net(0.06))).nearly_linear == []

    def test_the_alpha_of_each_layer_is_known(self):
        model = self.psbn_net(1.0)
        for source in (model, model.state_dict()):
            assert [layer.alpha for layer in measure(source).layers] == pytest.approx([0.1] * 4)
        assert measure(Net()).layers[0].alpha is None
