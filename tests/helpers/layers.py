"""Layers with non-trivial parameters, and what a training step makes of them."""

import torch
from torch.testing import assert_close


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


def one_step(layer, x, weights):
    """Output, gradients and statistics of two training steps on the same batch."""
    x = x.clone().requires_grad_()
    layer(x)
    y = layer(x)
    (y * weights).sum().backward()
    return {
        "y": y.detach(),
        "x.grad": x.grad,
        "weight.grad": layer.weight.grad,
        "beta.grad": layer.beta.grad,
        "running_mean": layer.running_mean.clone(),
        "running_var": layer.running_var.clone(),
        "num_batches_tracked": layer.num_batches_tracked.clone(),
    }


def assert_together_one_step(results: list, expected: dict, **close: float) -> None:
    """The steps of several processes are :func:`one_step` on their concatenated batches."""
    for name in ("y", "x.grad"):
        assert_close(torch.cat([r[name] for r in results]), expected[name], **close)
    for name in ("weight.grad", "beta.grad"):
        gradients = [r[name] for r in results if r[name] is not None]
        assert_close(sum(gradients), expected[name], **close)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for result in results:
            assert_close(result[name], expected[name], **close)
