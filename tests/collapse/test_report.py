"""Reports against hand-made truth."""

import json
import math

import pytest
import torch
from torch import nn

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
    rows = {row["name"].removeprefix("module."): row for row in report.rows}
    assert list(rows) == list(DEAD)
    for name, row in rows.items():
        collapsed = sorted(DEAD[name] + CONSTANT[name])
        assert row["collapsed_filters"] == collapsed
        assert row["constant_filters"] == CONSTANT[name]
        assert (row["dead"], row["constant"]) == (len(DEAD[name]), len(CONSTANT[name]))
        # The dead ones have bias / |gamma| of -10, -1.7, -3.3, -2.5, -2, -1.25 by hand.
        never_fire = {"bn1": [0], "block.bn1": [2]}.get(name, [])
        assert row["inactive_filters"] == sorted(never_fire + INACTIVE_ONLY[name])
        conv = {"bn1": "conv1", "block.bn1": "block.conv1"}
        conv |= {"block.bn2": "block.conv2", "block.down.1": "block.down.0"}
        assert row["conv"].removeprefix("module.") == conv[name]
    totals = report.totals
    assert (totals["filters"], totals["collapsed"], totals["dead"]) == (28, 8, 6)
    assert (totals["constant"], totals["inactive"]) == (2, 4)
    assert report.summary().startswith("8 of 28 filters collapsed (28.57%)\n")


def test_values_that_are_not_finite_are_counted_and_leave_valid_json(net):
    with torch.no_grad():
        net.bn1.weight[0] = math.nan
        net.block.bn1.bias[:] = math.inf
    report = measure(net)
    assert report.totals["not_finite"] == 5
    assert report.rows[1]["activation_probability"] != report.rows[1]["activation_probability"]
    assert "5 filters have a gamma or bias that is not finite" in report.table()
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
        with pytest.raises(ValueError, match="FLOPs need the model"):
            measure(Net().state_dict(), inputs=(3, 8, 8))
