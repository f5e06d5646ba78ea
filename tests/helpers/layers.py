"""Layers with non-trivial parameters."""

import torch


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Non-trivial gamma, beta, means and variances in every normalization layer."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.weight is not None:
            torch.nn.init.uniform_(module.weight, -1.5, 1.5)
            bias = module.beta if hasattr(module, "beta") else module.bias
            torch.nn.init.normal_(bias, 0, 0.5)
    return model
