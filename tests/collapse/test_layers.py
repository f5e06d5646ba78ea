"""Which layers of a model or a state dict are measured."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

from psbn_mmdet import norm
from psbn_mmdet.checkpoint import load, state_dict_of
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
    row = measure(nn.Sequential(layer, nn.ReLU())).rows[0]
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


class TestStateDicts:
    """What is in the file is used, and what cannot be read is named."""

    def state_dict(self):
        return collapse_by_hand(Net()).state_dict()

    def test_a_pruned_gamma_is_weight_orig_times_its_mask(self):
        net = collapse_by_hand(Net())
        mask = torch.ones(8)
        mask[[1, 3]] = 0  # alive by hand
        prune.custom_from_mask(net.bn1, "weight", mask)
        (row, *_) = measure(net.state_dict()).rows
        assert (row["name"], row["collapsed_filters"]) == ("bn1", [0, 1, 3, 5, 6])

    def test_shape_1_c_1_1(self):
        found = self.state_dict()
        for name in ("weight", "bias", "running_mean"):
            found[f"bn1.{name}"] = found[f"bn1.{name}"].view(1, 8, 1, 1)
        assert measure(found).totals == pytest.approx(
            measure(self.state_dict()).totals, nan_ok=True
        )

    def test_without_a_bias_it_adds_nothing(self):
        found = self.state_dict()
        del found["bn1.bias"]
        (layer, *_) = measure(found).layers
        assert layer.bias.tolist() == [0.0] * 8

    @pytest.mark.parametrize(
        ("spoil", "why"),
        [
            (lambda s: s.update({"bn1.weight": s["bn1.weight"].to(torch.int8)}), "torch.int8"),
            (lambda s: s.update({"bn1.weight": s["bn1.weight"][:3]}), "has shape (3,)"),
            (lambda s: s.update({"bn1.scale": s.pop("bn1.weight")}), "['bias', 'scale']"),
            (
                lambda s: s.update({"bn1.parametrizations.weight.original": s.pop("bn1.weight")}),
                "parametrized",
            ),
        ],
    )
    def test_a_gamma_that_cannot_be_read_is_named_and_never_counted_as_fine(self, spoil, why):
        found = self.state_dict()
        spoil(found)
        report = measure(found)
        assert why in report.unread["bn1"]
        assert [*report.missing] == ["bn1"]
        assert report.totals["filters"] == 20
        assert report.summary().startswith("1 layers are not counted (e.g. bn1: ")

    def test_no_gamma_at_all_cannot_collapse(self):
        net = Net()
        net.bn1 = nn.BatchNorm2d(8, affine=False)
        report = measure(net.state_dict())
        assert report.missing == {}
        assert "1 layers (e.g. bn1) have no gamma and cannot collapse" in report.summary()

    def test_a_lone_weight_beside_a_layer_is_a_prelu(self):
        class Unit(nn.Module):
            def __init__(self, slopes):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
                self.act = nn.PReLU(slopes)

        for slopes, follows in [(4, "leaky"), (1, "leaky"), (3, "unknown")]:
            assert measure(Unit(slopes).state_dict()).layers[0].followed_by == follows
        numbered = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4), nn.ReLU(),
        )  # fmt: skip
        follows = [x.followed_by for x in measure(numbered.state_dict()).layers]
        assert follows == ["leaky", "unknown"]


PUBLISHED = {  # filters, collapsed (|gamma| < 1e-3 by plain torch), followed by PReLU
    "lprnet.pth": (1028, 791, 0),
    "espnet_enc_q3.pth": (1126, 334, 11),
    "extremec3.pth": (1554, 487, 38),
    "3ddfa_mb05.pth": (5472, 247, 0),
    "fastestdet_coco.pth": (4189, 5, 0),
    "ultralight_slim-320.pth": (2272, 52, 0),
    "yunet_s.pth": (752, 1, 0),
    "akamaster_resnet20-12fca82f.th": (688, 17, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_have_the_filters_that_plain_torch_counts(name, shared_data):
    path = shared_data / "checkpoints" / name
    if not path.exists():
        pytest.skip(f"no real checkpoint at {path}")
    tensors = state_dict_of(load(path), name)
    report = measure(tensors)
    # gamma is the weight beside running_mean
    gammas = [tensors[k[: -len("running_mean")] + "weight"] for k in tensors if "running_mean" in k]
    joined = torch.cat([g.flatten().abs() for g in gammas])
    leaky = sum(layer.followed_by == "leaky" for layer in report.layers)
    found = report.totals["filters"], report.totals["collapsed"], leaky
    assert found == PUBLISHED[name]
    assert found[:2] == (joined.numel(), int((joined < 1e-3).sum()))
