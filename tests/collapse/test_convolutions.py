"""Which convolution stands in front of which layer, by names and shapes."""

import random
from collections import OrderedDict

import pytest
import torch
from torch import nn

from psbn_mmdet.collapse import measure


def test_a_layer_behind_no_convolution_says_so():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1 = nn.BatchNorm2d(4)
            self.conv1 = nn.Conv2d(4, 6, 3)
            self.bn2 = nn.BatchNorm2d(6)
            self.conv2 = nn.Conv2d(6, 4, 3)

    report = measure(nn.Sequential(PreActivation(), PreActivation()))
    want = {"0.bn1": None, "0.bn2": "0.conv1", "1.bn1": None, "1.bn2": "1.conv1"}
    assert {row["name"]: row["conv"] for row in report.rows} == want
    assert [row["filter_l1_median"] is None for row in report.rows] == [True, False] * 2
    assert "no convolution found before 2 of 4 layers" in report.summary()


def test_the_stem_of_several_convolutions_is_paired_with_its_last():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3)
            )
            self.bn1 = nn.BatchNorm2d(16)

    pairs = {row["name"]: row["conv"] for row in measure(Deep()).rows}
    assert pairs == {"conv1.1": "conv1.0", "bn1": "conv1.3"}


def test_a_convolution_is_given_away_once_and_only_to_as_many_channels():
    again = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    assert [row["conv"] for row in measure(again).rows] == ["0", None]
    shuffled = nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.BatchNorm2d(4))
    assert [row["conv"] for row in measure(shuffled).rows] == [None]


def test_inverted_residuals_are_paired_in_the_order_of_their_keys():
    # timm's names; the squeeze convolutions have as many channels as the layers around.
    def conv(*shape):
        return {"weight": torch.ones(shape)}

    def bn(channels):
        keys = ("weight", "bias", "running_mean", "running_var")
        return {key: torch.ones(channels) for key in keys}

    block = {
        "conv_pw": conv(8, 4, 1, 1), "bn1": bn(8), "conv_dw": conv(8, 1, 3, 3), "bn2": bn(8),
        "se.conv_reduce": conv(4, 8, 1, 1), "se.conv_expand": conv(8, 4, 1, 1),
        "conv_pwl": conv(4, 8, 1, 1), "bn3": bn(4),
    }  # fmt: skip
    state_dict = {f"blocks.0.{m}.{k}": v for m, group in block.items() for k, v in group.items()}
    rows = measure(state_dict).rows
    assert [row["conv"] for row in rows] == [f"blocks.0.conv_{x}" for x in ("pw", "dw", "pwl")]
    assert [row["filter_l1_median"] for row in rows] == [4, 9, 8]


def keys_of_state_dict(convs, norms):
    """A state dict of convolutions, name -> shape, and BN layers, name -> channels."""
    state_dict = {f"{name}.weight": torch.ones(shape) for name, shape in convs.items()}
    for name, channels in norms.items():
        for key in ("weight", "bias", "running_mean", "running_var"):
            state_dict[f"{name}.{key}"] = torch.ones(channels)
    return state_dict


class DenseLayer(nn.Sequential):
    def __init__(self, channels):
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm2d(channels), relu1=nn.ReLU(), conv1=nn.Conv2d(channels, 8, 1),
                norm2=nn.BatchNorm2d(8), relu2=nn.ReLU(), conv2=nn.Conv2d(8, 4, 3, padding=1),
            )
        )  # fmt: skip


def densenet():
    """torchvision's names; the second dense layer has as many inputs as inner filters."""
    layers = OrderedDict(conv0=nn.Conv2d(3, 4, 7), norm0=nn.BatchNorm2d(4), relu0=nn.ReLU())
    layers["denseblock1"] = nn.ModuleDict({f"denselayer{i}": DenseLayer(4 * i) for i in (1, 2, 3)})
    layers["transition1"] = nn.Sequential(
        OrderedDict(norm=nn.BatchNorm2d(16), relu=nn.ReLU(), conv=nn.Conv2d(16, 8, 1))
    )
    layers["norm5"] = nn.BatchNorm2d(8)
    return nn.ModuleDict({"features": nn.ModuleDict(layers), "classifier": nn.Linear(8, 2)})


def mobilenet():
    """torchvision's names: features.i.conv.0.0 and .0.1, .1.0 and .1.1, .2 and .3."""

    def conv_bn(c_in, c_out, kernel, groups=1):
        return nn.Sequential(
            nn.Conv2d(c_in, c_out, kernel, groups=groups, bias=False), nn.BatchNorm2d(c_out)
        )

    def block(c):
        linear = [nn.Conv2d(4 * c, c, 1), nn.BatchNorm2d(c)]
        conv = nn.Sequential(conv_bn(c, 4 * c, 1), conv_bn(4 * c, 4 * c, 3, 4 * c), *linear)
        return nn.ModuleDict({"conv": conv})

    blocks = [nn.Sequential(*conv_bn(3, 8, 3), nn.ReLU6()), *(block(8) for _ in range(11))]
    return nn.ModuleDict({"features": nn.Sequential(*blocks)})


def vgg():
    layers = []
    for c_in, c_out in [(3, 4), (4, 4), (4, 4), (4, 4), (4, 6)]:  # indices beyond 9
        layers += [nn.Conv2d(c_in, c_out, 3), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.ModuleDict({"features": nn.Sequential(*layers)})


def mmdet_resnet(depth, **kwargs):
    from mmdet.models.backbones import ResNet

    return ResNet(depth=depth, base_channels=8, stem_channels=8, **kwargs)


def mmdet_detector():
    """A backbone, a neck and a head of ConvModules; the head's have as many inputs as filters."""
    from mmcv.cnn import ConvModule
    from mmdet.models.necks import FPN

    norm_cfg = dict(type="BN")
    return nn.ModuleDict(
        {
            "backbone": mmdet_resnet(18),
            "neck": FPN([8, 16, 32, 64], 8, num_outs=4, norm_cfg=norm_cfg),
            "bbox_head": nn.ModuleDict(
                {
                    "cls_convs": nn.ModuleList(
                        ConvModule(8, 8, 3, norm_cfg=norm_cfg) for _ in range(4)
                    )
                }
            ),
        }
    )


def mmdet_other(kind, *args, **kwargs):
    from mmdet.models import backbones

    return getattr(backbones, kind)(*args, **kwargs)


NETWORKS = {
    "ResNet-18": lambda: mmdet_resnet(18),
    "ResNet-50, deep stem": lambda: mmdet_resnet(50, deep_stem=True, avg_down=True),
    "Res2Net": lambda: mmdet_other("Res2Net", depth=50, scales=4, base_width=26),
    "DenseNet": densenet,
    "MobileNet": mobilenet,
    "MobileNet of mmdet": lambda: mmdet_other("MobileNetV2", widen_factor=0.25),
    "VGG": vgg,
    "detector": mmdet_detector,
    "Darknet": lambda: mmdet_other("Darknet", depth=53),
}


def in_front(model):
    """Independently: the convolution whose output a layer was called on, or None."""
    names, made, found = {m: name for name, m in model.named_modules()}, {}, {}
    for module in names:
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, y: made.update({y: names[m]}))
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda m, args: found.update({names[m]: made.get(args[0])})
            )
    model.eval()
    model(torch.randn(1, 3, 64, 64))
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_the_order_of_the_keys_changes_nothing_and_every_pair_is_that_of_the_model(network):
    model = NETWORKS[network]()
    state_dict = model.state_dict()
    report = measure(state_dict)
    for seed in range(3):
        keys = list(state_dict)
        random.Random(seed).shuffle(keys)
        assert measure({k: state_dict[k] for k in keys}).to_json() == report.to_json()
    assert measure(dict(sorted(state_dict.items()))).to_json() == report.to_json()

    by_name = {layer.name: layer.conv for layer in report.layers}
    assert by_name == {layer.name: layer.conv for layer in measure(model).layers}
    if not isinstance(model, nn.ModuleDict):  # which only holds what has the names of a network
        want = in_front(model)
        known = [name for name in want if by_name[name] is not None]
        assert {name: by_name[name] for name in known} == {name: want[name] for name in known}
        assert len(known) > 0.4 * len(want)  # of a Res2Net many fit both ways


def test_dense_layers_normalize_first():
    rows = {row["name"]: row["conv"] for row in measure(densenet().state_dict()).rows}
    assert rows["features.norm0"] == "features.conv0"
    for i in (1, 2, 3):
        layer = f"features.denseblock1.denselayer{i}"
        assert (rows[f"{layer}.norm1"], rows[f"{layer}.norm2"]) == (None, f"{layer}.conv1")
    assert rows["features.transition1.norm"] is rows["features.norm5"] is None


def pairs(convs, norms):
    rows = measure(keys_of_state_dict(convs, norms)).rows
    return {row["name"]: row["conv"] for row in rows}


class TestNamesProve:
    def test_a_pair_that_fits_both_ways_is_unknown(self):
        assert pairs({"a.conv1": (4, 4, 1, 1)}, {"a.bn1": 4}) == {"a.bn1": None}

    def test_unless_pairs_with_the_same_names_fit_one_way_only(self):
        both = {"a.conv1": (4, 4, 1, 1), "b.conv1": (8, 3, 1, 1)}
        assert pairs(both, {"a.bn1": 4, "b.bn1": 8}) == {"a.bn1": "a.conv1", "b.bn1": "b.conv1"}
        first = {"a.conv1": (4, 4, 1, 1), "b.conv1": (8, 3, 1, 1)}
        assert pairs(first, {"a.bn1": 4, "b.bn1": 3}) == {"a.bn1": None, "b.bn1": None}

    def test_or_these_disagree(self):
        convs = {"a.conv1": (4, 4, 1, 1), "b.conv1": (8, 3, 1, 1), "c.conv1": (8, 3, 1, 1)}
        got = pairs(convs, {"a.bn1": 4, "b.bn1": 8, "c.bn1": 3})
        assert got == {"a.bn1": None, "b.bn1": "b.conv1", "c.bn1": None}

    def test_the_number_does_not_matter_where_the_names_decide(self):
        convs = {"a.conv1": (4, 4, 1, 1), "b.conv7": (8, 3, 1, 1)}
        assert pairs(convs, {"a.bn1": 4, "b.bn7": 8})["a.bn1"] == "a.conv1"

    def test_one_layer_that_normalizes_first_decides_for_its_siblings(self):
        convs = {"a.conv1": (4, 4, 1, 1), "a.conv2": (6, 4, 1, 1)}
        got = pairs(convs, {"a.norm1": 4, "a.norm2": 4})
        assert got == {"a.norm1": None, "a.norm2": "a.conv1"}

    def test_a_layer_within_its_convolution(self):
        convs = {"a.conv1": (4, 3, 1, 1), "b": (5, 3, 1, 1)}
        got = pairs(convs, {"a.conv1.norm": 4, "b.norm": 4})
        assert got == {"a.conv1.norm": "a.conv1", "b.norm": None}

    def test_something_between_two_numbers_is_not_skipped(self):
        convs = {"0": (4, 3, 1, 1), "1.fc": (4, 4)}
        assert pairs(convs, {"2": 4}) == {"2": None}
        assert pairs({"9": (4, 3, 1, 1)}, {"10": 4}) == {"10": "9"}
        assert pairs({"2": (4, 3, 1, 1)}, {"1": 4}) == {"1": None}

    def test_other_names(self):
        convs = {"a.conv1": (4, 3, 1, 1), "b.fc2": (4, 3), "convs.0": (4, 3, 1), "c.body": (4, 3)}
        norms = {"a.conv1_bn": 4, "b.bn2": 4, "bns.0": 4, "c.n": 4}
        want = {"a.conv1_bn": "a.conv1", "b.bn2": "b.fc2", "bns.0": "convs.0", "c.n": "c.body"}
        assert pairs(convs, norms) == want

    def test_a_convolution_of_two_layers_is_that_of_none(self):
        assert pairs({"conv1": (4, 3, 1)}, {"bn1": 4, "norm1": 4}) == {"bn1": None, "norm1": None}
