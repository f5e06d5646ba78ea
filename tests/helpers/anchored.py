"""A BN model with anchored biases beside a real psBN model."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from psbn_mmdet import to_psbn
from tests.helpers.layers import randomize

ALPHA = 0.1


STEPS = 12


def small_net(norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        norm(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


def as_psbn_computes(model):
    """Biases that are a sum beta + alpha in floating point, so that both start at the same bit."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
            module.bias.data = (module.bias.data - ALPHA) + ALPHA
    return model


def pair(build=small_net, dtype=torch.float32):
    bn = as_psbn_computes(randomize(build().to(dtype)))
    psbn = to_psbn(copy.deepcopy(bn), ALPHA)
    for a, b in zip(norm_biases(bn), norm_biases(psbn), strict=True):
        assert torch.equal(a, b)
    return bn, psbn


def norm_biases(model):
    kinds = nn.modules.batchnorm._NormBase
    return [m.bias.detach().clone() for m in model.modules() if isinstance(m, kinds)]


def batches(steps=STEPS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        yield x.to(dtype), torch.randint(4, (4,), generator=generator)


def train(model, optimizer, steps=STEPS, step=None, data=None):
    """Losses and the biases after each step."""
    losses, biases = [], []
    for i, (x, target) in enumerate(data or batches(steps)):
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        (step or plain_step)(model, optimizer, i)
        losses.append(loss.item())
        biases.append(norm_biases(model))
    return losses, biases


def plain_step(model, optimizer, i):
    optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.05),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.05, nesterov=True),
    "dampening": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, dampening=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.05),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.05, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.05, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001, weight_decay=0.1, momentum=0.9),
}
if torch.__version__ < "2.4":  # on CUDA alone
    OPTIMIZERS = {name: make for name, make in OPTIMIZERS.items() if "fused" not in name}
if hasattr(torch.optim, "Adafactor"):  # from torch 2.5 on
    OPTIMIZERS["Adafactor"] = lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1)
