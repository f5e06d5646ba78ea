"""ResNet-20/56/110 and VGG11/16 for 32x32 images, with any normalization and activation.

And the backbone of a detector: mmdet's own ResNet-18, to be pretrained on CIFAR-10.

ResNets are those of section 4.2 of He et al. (arXiv 1512.03385), with option A:
shortcuts have no parameters. VGGs are configurations A and D of Simonyan and
Zisserman (arXiv 1409.1556) with one linear layer behind, as is usual on CIFAR-10.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from mmcv.cnn import build_activation_layer, build_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from psbn_mmdet.collapse import probe

VGG_STAGES = {
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg16": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}
RESNET_BLOCKS = {"resnet20": 3, "resnet56": 9, "resnet110": 18}
MMDET_RESNET18 = "mmdet_resnet18"
NETWORKS = (*RESNET_BLOCKS, *VGG_STAGES, MMDET_RESNET18)

Cfg = dict[str, Any]


def build_network(
    name: str,
    norm_cfg: Cfg | None = None,
    act_cfg: Cfg | None = None,
    width: float = 1.0,
    gamma_init: float = 1.0,
    classes: int = 10,
) -> nn.Module:
    """A network with fresh weights from torch's global generator.

    Convolutions are initialised as by He et al. (normal, fan-out, ReLU).

    Args:
        name: One of :data:`NETWORKS`.
        norm_cfg: As in mmcv, such as ``dict(type='psBN', alpha=0.1)``; None for
            none, convolutions then have a bias.
        act_cfg: As in mmcv, such as ``dict(type='ReLU')``; None for none.
        width: Factor on the channels of every layer, rounded.
        gamma_init: What every gamma starts from.
        classes: Of the last layer.

    Raises:
        ValueError: An unknown name, a width without channels, or a normalization or
            activation that mmdet's ResNet does not have.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    if name in RESNET_BLOCKS:
        network: nn.Module = ResNet(RESNET_BLOCKS[name], norm_cfg, act_cfg, width, classes)
    elif name == MMDET_RESNET18:
        network = Backbone(norm_cfg, act_cfg, width, classes)
    else:
        network = VGG(VGG_STAGES[name], norm_cfg, act_cfg, width, classes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _NormBase):
            nn.init.constant_(module.weight, gamma_init)
    return network


def macs_of(network: nn.Module, image_size: int = 32) -> int:
    """Multiply-accumulates of one image, forward, in convolutions and linear layers."""
    return probe(network, {}, (3, image_size, image_size)).total


@lru_cache
def macs(name: str, width: float, image_size: int = 32) -> int:
    """:func:`macs_of` a network that :func:`build_network` builds; no random state is used."""
    with torch.random.fork_rng(devices=[]):
        return macs_of(build_network(name, dict(type="BN"), None, width), image_size)


def _norm(norm_cfg: Cfg | None, channels: int) -> nn.Module:
    return nn.Identity() if norm_cfg is None else build_norm_layer(norm_cfg, channels)[1]


def _act(act_cfg: Cfg | None) -> nn.Module:
    return nn.Identity() if act_cfg is None else build_activation_layer(act_cfg)


def _channels(channels: int, width: float) -> int:
    return max(1, round(channels * width))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads with zeros (option A)."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm_cfg: Any, act_cfg: Any) -> None:
        super().__init__()
        bias = norm_cfg is None
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=bias)
        self.bn1 = _norm(norm_cfg, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=bias)
        self.bn2 = _norm(norm_cfg, c_out)
        self.act = _act(act_cfg)
        self.stride, self.more = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            before = self.more // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.more - before))
        return self.act(y + x)


class ResNet(nn.Module):
    """6n+2 layers: a convolution, three stages of n blocks with 16, 32 and 64 channels, linear."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self, blocks: int, norm_cfg: Cfg | None, act_cfg: Cfg | None, width: float, classes: int
    ) -> None:
        super().__init__()
        widths = [_channels(c, width) for c in (16, 32, 64)]
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=norm_cfg is None)
        self.bn1 = _norm(norm_cfg, widths[0])
        self.act = _act(act_cfg)
        c_in = widths[0]
        for stage, c_out in enumerate(widths, 1):
            layers = []
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                layers.append(BasicBlock(c_in, c_out, stride, norm_cfg, act_cfg))
                c_in = c_out
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> logits (N, classes)."""
        x = self.act(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        # Not AdaptiveAvgPool2d, whose gradient on CUDA differs from run to run.
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    """3x3 convolutions in five stages, each behind it a maximum over 2x2, and one linear layer."""

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...],
        norm_cfg: Cfg | None,
        act_cfg: Cfg | None,
        width: float,
        classes: int,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = 3
        for stage in stages:
            for channels in stage:
                c_out = _channels(channels, width)
                layers += [
                    nn.Conv2d(c_in, c_out, 3, 1, 1, bias=norm_cfg is None),
                    _norm(norm_cfg, c_out),
                    _act(act_cfg),
                ]
                c_in = c_out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> logits (N, classes)."""
        return self.fc(torch.flatten(self.features(x), 1))


class Backbone(nn.Module):
    """mmdet's ResNet-18 with a linear layer behind: what a detector starts from.

    The strides are those of the detector, so 32x32 images end as one position.
    ``backbone`` is mmdet's module itself; its state dict fits a detector's backbone of
    ``base_channels = round(64 * width)``.
    """

    def __init__(
        self, norm_cfg: Cfg | None, act_cfg: Cfg | None, width: float, classes: int
    ) -> None:
        from mmdet.models.backbones import ResNet as MMDetResNet  # seconds, for this one alone

        super().__init__()
        if norm_cfg is None or (act_cfg or {}).get("type", "ReLU") != "ReLU":
            raise ValueError(f"{MMDET_RESNET18} always has a normalization and ReLU")
        base = _channels(64, width)
        self.backbone = MMDetResNet(
            18, stem_channels=base, base_channels=base, norm_cfg=norm_cfg, norm_eval=False
        )
        self.fc = nn.Linear(8 * base, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, classes)."""
        return self.fc(self.backbone(x)[-1].mean((2, 3)))
