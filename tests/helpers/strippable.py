"""Small networks of every kind of wiring, with filters killed by hand."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from psbn_mmdet.norm import norm_layers


def with_statistics(model, seed=0):
    """Give every BN layer parameters and statistics as after training; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            size = module.weight.shape
            module.weight.data.copy_(torch.rand(size, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(size, generator=generator) * 0.3)
            module.running_mean.copy_(torch.randn(size, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
    return model.eval()


def kill(norm, filters, bias=-0.5):
    """Let some filters of a layer collapse: dead behind a ReLU unless the bias is positive."""
    with torch.no_grad():
        norm.weight[filters] = 0
        norm.bias[filters] = torch.as_tensor(bias, dtype=norm.bias.dtype)


def kill_at_random(model, share=0.5, seed=0, bias=-0.5):
    """Kill a share of the filters of each BN layer: name -> filters."""
    generator = torch.Generator().manual_seed(seed)
    killed = {}
    for name, norm in norm_layers(model).items():
        if isinstance(norm, _BatchNorm):
            order = torch.randperm(norm.num_features, generator=generator)
            killed[name] = sorted(order[: int(share * norm.num_features)].tolist())
            kill(norm, killed[name], bias)
    return killed


def detector(config, norm_seed=0, **model):
    """A detector of mmdet with a random network, statistics as after training; eval mode."""
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.hub import get_config
    from mmengine.registry import MODELS

    register_all_modules()
    cfg = get_config(f"mmdet::{config}")
    cfg = Config(dict(model=cfg.model))
    cfg.merge_from_dict({f"model.{key}": value for key, value in model.items()})
    torch.manual_seed(0)
    return with_statistics(MODELS.build(cfg.model), norm_seed)


def conv_bn(inputs, filters, kernel=3, act=nn.ReLU, **conv):
    layers = [nn.Conv2d(inputs, filters, kernel, padding=kernel // 2, bias=False, **conv)]
    layers += [nn.BatchNorm2d(filters)]
    return nn.Sequential(*layers, act()) if act else nn.Sequential(*layers)


def head(channels, pool=2):
    linear = nn.Linear(pool**2 * channels, 5)
    return nn.Sequential(nn.AdaptiveAvgPool2d(pool), nn.Flatten(), linear)


def chain():
    return nn.Sequential(conv_bn(3, 8), conv_bn(8, 12), conv_bn(12, 8, 1), head(8))


class Block(nn.Module):
    """A residual block: of two 3x3 convolutions, or of 1x1, 3x3 and 1x1."""

    def __init__(self, inputs, filters, bottleneck):
        super().__init__()
        self.first = conv_bn(inputs, filters, 1 if bottleneck else 3)
        self.middle = conv_bn(filters, filters) if bottleneck else nn.Identity()
        self.last = conv_bn(filters, 16, 1 if bottleneck else 3, act=None)
        self.skip = conv_bn(inputs, 16, 1, act=None) if inputs != 16 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.last(self.middle(self.first(x))) + self.skip(x))


def resnet(bottleneck):
    blocks = [Block(n, 8, bottleneck) for n in (6, 16, 16)]
    return nn.Sequential(conv_bn(3, 6), *blocks, conv_bn(16, 6, 1), head(6))


class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self, pool=1):
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(conv_bn(6 + 4 * i, 8, 1), conv_bn(8, 4)) for i in range(3)
        )
        self.head = head(18, pool)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1))


def mobilenet():
    depthwise = [conv_bn(16, 16, groups=16, act=nn.ReLU6), conv_bn(16, 8, 1, act=None)]
    return nn.Sequential(conv_bn(3, 6), conv_bn(6, 16, 1, act=nn.ReLU6), *depthwise, head(8))


def resnext():
    return nn.Sequential(conv_bn(3, 8), conv_bn(8, 12, groups=4), conv_bn(12, 8, 1), head(8))


class SharedHead(nn.Module):
    """One head for two levels, with a norm layer of its own for each, as RetinaSepBN's."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = conv_bn(3, 8), conv_bn(8, 8, stride=2)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.shared, self.out = conv_bn(8, 8), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        fine = self.stem(x)
        levels = [fine, self.down(fine)]
        norms = zip(self.norms, levels, strict=True)
        return [self.out(self.shared(norm(self.conv(x)).relu())) for norm, x in norms]


NETS = {
    "chain": chain,
    "basic": lambda: resnet(False),
    "bottleneck": lambda: resnet(True),
    "dense": Dense,
    "depthwise": mobilenet,
    "grouped": resnext,
    "shared": SharedHead,
}
