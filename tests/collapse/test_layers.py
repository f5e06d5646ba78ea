"""Which layers of a model or a state dict are measured."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from psbn_mmdet import norm
from psbn_mmdet.collapse import measure
from tests.helpers.collapsed_net import Net, collapse_by_hand


@pytest.mark.parametrize("kind", ["IN", "psIN"])
def test_instance_norm_is_measured_in_a_model(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True))
    with torch.no_grad():
        model[1].weight[2] = 1e-4
    if kind == "psIN":
        norm.to_psbn(model)
    assert measure(model).rows[0]["collapsed_filters"] == [2]


def test_a_psbn_layer_counts_with_what_it_adds():
    layer = norm.psBN2d(2, alpha=0.1)
    with torch.no_grad():
        layer.weight.zero_()
        layer.beta[0] = -0.1
    row = measure(layer).rows[0]
    assert (row["dead"], row["constant"]) == (1, 1)


@pytest.mark.parametrize("form", ["scripted", "traced", "exported"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_psbn_is_measured_in_every_form_of_a_model(form):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), norm.psBN2d(4, alpha=0.1)).eval()
    with torch.no_grad():
        model[2].weight[:2] = 0
        model[2].beta[:3] = torch.tensor([-0.2, 0.1, -0.1])
    x = torch.randn(1, 3, 4, 4)
    if form == "scripted":
        other = torch.jit.script(model)
    elif form == "traced":
        other = torch.jit.trace(model, x)
    else:
        other = torch.export.export(model, (x,)).module()
    report = measure(other)
    assert report.totals["filters"] == 7
    layer = report.layers[1]
    assert layer.gamma.tolist() == [0, 0, 1, 1]
    assert_close(layer.bias, torch.tensor([-0.1, 0.2, 0.0, 0.1]))  # beta + 0.1
    assert layer.alpha == pytest.approx(0.1)


def test_a_lazy_convolution_is_of_no_size_yet():
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4))
    assert measure(model).rows[0]["conv"] is None


def test_frozen_batch_norm_is_measured():
    from mmdet.models.layers import FrozenBatchNorm2d

    model = FrozenBatchNorm2d.convert_frozen_batchnorm(collapse_by_hand(Net()))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert measure(model).totals["collapsed"] == 8


def test_shared_layers_count_once_and_shared_convolutions_are_found():
    conv, bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    assert measure(nn.Sequential(conv, bn, nn.Conv2d(4, 4, 1), bn)).totals["filters"] == 4
    levels = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(4)) for _ in range(2))
    assert [row["conv"] for row in measure(levels).rows] == ["0.0", "1.0"]


def test_half_precision_is_measured():
    model = collapse_by_hand(Net()).half()
    assert measure(model).totals["collapsed"] == 8
    assert measure(model.state_dict()).totals["collapsed"] == 8
