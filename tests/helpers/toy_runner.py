"""A Runner that trains the network of collapsed_net in seconds, and may be killed."""

import os
import signal
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch.nn import functional as F
from torch.utils.data import Dataset

from psbn_mmdet import norm
from psbn_mmdet.collapse.hook import SparsityLoggerHook
from psbn_mmdet.launch.runner import Runner
from tests.helpers.collapsed_net import Net


class Toy(BaseModel):
    """The network of the hand-made truth with a loss."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs, labels=None, mode="tensor"):
        out = self.net(torch.stack(inputs) if isinstance(inputs, list) else inputs)
        return {"loss": F.cross_entropy(out, torch.stack(labels))} if mode == "loss" else out


class Noise(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        return {"inputs": torch.randn(3, 6, 6, generator=g), "labels": torch.tensor(index % 5)}


class KillAt(Hook):
    """SIGKILL after some iterations, and half a record more in the trace."""

    priority = "LOWEST"

    def __init__(self, iteration, half_a_record=True):
        self.iteration, self.half_a_record = iteration, half_a_record

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.iteration:
            if self.half_a_record:
                with open(Path(runner.work_dir, "collapse.trace"), "ab") as file:
                    file.write(Path(runner.work_dir, "collapse.trace").read_bytes()[-60:-20])
            os.kill(os.getpid(), signal.SIGKILL)


def make_runner(work_dir, hook_list, net=None, iterations=12, seed=0, epochs=None, **kwargs):
    torch.manual_seed(seed)
    cfg = Config(
        {
            "optim_wrapper": {
                "optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
                **kwargs.pop("optim_wrapper", {}),
            },
            "model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None},
            "work_dir": str(work_dir),
        }
    )
    loop = {"by_epoch": False, "max_iters": iterations}
    if epochs:
        loop = {"by_epoch": True, "max_epochs": epochs}
    return Runner(
        Toy(net or norm.to_psbn(Net())),
        str(work_dir),
        train_dataloader={
            "dataset": Noise(),
            "batch_size": 4,
            "sampler": {"type": "DefaultSampler" if epochs else "InfiniteSampler", "shuffle": True},
            "collate_fn": {"type": "pseudo_collate"},
        },
        train_cfg=loop,
        optim_wrapper=cfg.optim_wrapper,
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": 4},
            "checkpoint": {"type": "CheckpointHook", "interval": 4, "by_epoch": False},
        },
        custom_hooks=hook_list,
        log_processor={"by_epoch": bool(epochs)},
        randomness={"seed": seed, "deterministic": False},
        experiment_name=f"toy-{os.getpid()}-{np.random.default_rng().integers(1 << 40)}",
        cfg=cfg,
        **kwargs,
    )


def program(work_dir, kill_at=0, resume=False):
    """What the killed and resumed processes run."""
    hook_list = [SparsityLoggerHook(interval=2, figures=False)]
    if kill_at:
        hook_list.append(KillAt(kill_at))
    make_runner(work_dir, hook_list, resume=resume).train()
