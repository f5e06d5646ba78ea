"""A network with filters collapsed by hand, the truth that every surface must report."""

import torch
from torch import nn
from torch.nn import functional as F

from psbn_mmdet import norm

# The truth that every surface must report: layer -> filters collapsed by hand.
DEAD = {"bn1": [0, 5], "block.bn1": [2], "block.bn2": [], "block.down.1": [3, 4, 7]}


CONSTANT = {"bn1": [6], "block.bn1": [], "block.bn2": [1], "block.down.1": []}


INACTIVE_ONLY = {"bn1": [2], "block.bn1": [], "block.bn2": [7], "block.down.1": []}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.block = Block()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.block(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def collapse_by_hand(model):
    """A network with exactly the states of DEAD, CONSTANT and INACTIVE_ONLY."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in DEAD:
            bn = modules[name]
            bn.weight.uniform_(0.5, 1.5)
            bn.weight[1::2] *= -1
            bn.bias.uniform_(-0.5, 0.5)
            for i in DEAD[name]:
                bn.weight[i], bn.bias[i] = -1e-5 * (i + 1), -1e-4
            for i in CONSTANT[name]:
                bn.weight[i], bn.bias[i] = 9e-4, 0.25
            for i in INACTIVE_ONLY[name]:
                bn.weight[i], bn.bias[i] = 0.1, -0.4
    return model


def as_sync(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


VARIANTS = {
    "BN": lambda m: m,
    "SyncBN": as_sync,
    "psBN": norm.to_psbn,
    "psSyncBN": lambda m: norm.to_psbn(as_sync(m)),
    "psBN and back": lambda m: norm.to_bn(norm.to_psbn(m)),
}
