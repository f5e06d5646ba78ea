"""Small networks of every kind of wiring, with filters killed by hand."""

import torch
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
        norm.bias[filters] = torch.as_tensor(bias)


def kill_at_random(model, share=0.5, seed=0, keep=lambda name: False):
    """Kill a share of the filters of each BN layer that `keep` does not name: name -> filters."""
    generator = torch.Generator().manual_seed(seed)
    killed = {}
    for name, norm in norm_layers(model).items():
        if isinstance(norm, _BatchNorm) and not keep(name):
            order = torch.randperm(norm.num_features, generator=generator)
            killed[name] = sorted(order[: int(share * norm.num_features)].tolist())
            kill(norm, killed[name])
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
