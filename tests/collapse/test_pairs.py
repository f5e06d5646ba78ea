"""Which convolution stands in front of which layer: in models by order, in state dicts by name."""

import pytest
import torch
from torch import nn

from psbn_mmdet.collapse import measure


def test_a_layer_behind_no_convolution_says_so():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1 = nn.BatchNorm2d(4)
            self.conv1 = nn.Conv2d(4, 4, 3)
            self.bn2 = nn.BatchNorm2d(4)
            self.conv2 = nn.Conv2d(4, 4, 3)

    report = measure(nn.Sequential(PreActivation(), PreActivation()))
    want = {"0.bn1": None, "0.bn2": "0.conv1", "1.bn1": None, "1.bn2": "1.conv1"}
    assert {row["name"]: row["conv"] for row in report.rows} == want
    assert [row["filter_l1_median"] is None for row in report.rows] == [True, False] * 2
    assert "2 of 4 layers: no convolution found in front" in report.summary()


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
