"""A training of a second in which everything is random that can be, and hooks that interrupt it.

A config names it by ``custom_imports``, so that it also runs in processes started from outside.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS
from torch import nn
from torch.nn import functional as F

from psbn_mmdet import psBN2d
from psbn_mmdet.checkpoint import load
from psbn_mmdet.launch.preempt import Preemption


@MODELS.register_module()
class DropoutNet(BaseModel):
    """Convolution, psBN, dropout, classifier."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), psBN2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, img, label, mode="tensor"):
        x = torch.relu(self.bn(self.conv(torch.stack(img))))
        scores = self.fc(F.dropout(x, 0.3, self.training).mean((2, 3)))
        if mode == "loss":
            return {"loss": F.cross_entropy(scores, torch.stack(label))}
        return list(scores)


@TRANSFORMS.register_module()
class Noise:
    """Noise of the three generators that transforms draw from."""

    def __call__(self, results):
        img = results["img"] * random.uniform(0.5, 1.5)
        img = img + np.random.normal(size=img.shape)  # noqa: NPY002  what transforms use
        img = torch.from_numpy(img.astype("float32").transpose(2, 0, 1).copy())
        return {"img": img + torch.rand(img.shape), "label": torch.tensor(results["label"])}


@DATASETS.register_module()
class Stripes(BaseDataset):
    """Sixteen images whose stripes tell their class, unless they are flipped."""

    def load_data_list(self):
        rng = np.random.default_rng(0)
        images = rng.normal(size=(16, 6, 6, 3)).astype("float32")
        return [{"img": img, "img_shape": (6, 6), "label": i % 3} for i, img in enumerate(images)]


@DATASETS.register_module()
class ListedStripes(Stripes):
    """Their classes are in a file."""

    def load_data_list(self):
        labels = json.loads(Path(self.ann_file).read_text())
        return [{**item, "label": labels[item["label"]]} for item in super().load_data_list()]


@DATASETS.register_module()
class ReadsAList(Stripes):
    def load_data_list(self):
        return Path("no/such/list.txt").read_text().split()


@METRICS.register_module()
class MeanScore(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [s.mean().item() for s in data_samples]

    while_computing = staticmethod(lambda: None)

    def compute_metrics(self, results):
        self.while_computing()
        # as COCO's of a class without objects
        return {"mean": float(np.mean(results)), "no_value": float("nan"), "inf": float("inf")}


class At(Hook):
    """Does something after an iteration, counted from 1; in validation after a batch."""

    priority = "ABOVE_NORMAL"  # before a checkpoint of the same iteration is written, as any signal

    def __init__(self, iteration, ranks=(0, 1), validation=False):
        self.iteration, self.ranks, self.validation = iteration, ranks, validation

    def after_train_iter(self, runner, *args, **kwargs):
        if not self.validation and runner.iter + 1 == self.iteration and get_rank() in self.ranks:
            self.act(runner)

    def after_val_iter(self, runner, *args, **kwargs):
        if self.validation and runner.iter == self.iteration and get_rank() in self.ranks:
            self.act(runner)


@HOOKS.register_module()
class Kill(At):
    """SIGKILL, once the checkpoint of that iteration is there."""

    priority = "LOWEST"

    def act(self, runner):
        if torch.distributed.is_initialized():  # rank 0 writes the checkpoint
            torch.distributed.barrier()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises where a worker is killed
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class Terminate(At):
    """SIGTERM to the process and its data loader's workers, as Slurm sends it to all of a step."""

    def act(self, runner):
        for child in psutil.Process().children(recursive=True):
            child.terminate()
        os.kill(os.getpid(), signal.SIGTERM)


@HOOKS.register_module()
class TerminateIn(Hook):
    """SIGTERM to all processes of the training at the so-many-th call of a hook's method.

    Args:
        point: Its name; ``metrics`` while they are computed, which rank 0 does alone.
        call: From 1.
        others: Whether the other processes get it, too.
    """

    def __init__(self, point, call=1, others=True):
        calls = []

        def act(*args, **kwargs):
            calls.append(1)
            if len(calls) == call and (get_rank() == 0 or not others):
                everyone = psutil.Process().parent().children(recursive=True)
                pids = [p.pid for p in everyone if "multiprocessing" not in str(p.cmdline())]
                # by another process: a worker ends at once if it is its own that asks
                subprocess.Popen(["kill", *map(str, pids if others else [os.getpid()])])
                time.sleep(0.3)

        if point == "metrics":
            MeanScore.while_computing = staticmethod(act)
        else:
            setattr(self, point, act)


@HOOKS.register_module()
class WaitFor(At):
    """Writes WORK_DIR/waiting and waits for another file."""

    def __init__(self, path, **kwargs):
        super().__init__(**kwargs)
        self.path = Path(path)

    def act(self, runner):
        Path(runner.work_dir, "waiting").touch()
        deadline = time.monotonic() + 120
        while not self.path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(self.path)
            time.sleep(0.02)


@HOOKS.register_module()
class WaitForSigterm(At):
    """Writes WORK_DIR/waiting and waits until the run has been asked to end."""

    def act(self, runner):
        (preemption,) = (hook for hook in runner.hooks if isinstance(hook, Preemption))
        Path(runner.work_dir, "waiting").touch()
        deadline = time.monotonic() + 120
        while not preemption.asked:
            if time.monotonic() > deadline:
                raise TimeoutError("no SIGTERM")
            time.sleep(0.02)


def make_config(path, loop="epoch", hooks=(), every=None, workers=0, epochs=3, **changes):
    """Write the config of such a training.

    Args:
        path: A file that ends in ``.py``.
        loop: ``'epoch'`` or ``'iter'``.
        hooks: Configs of custom hooks.
        every: Iterations between checkpoints; by default they follow epochs (of 4 iterations in
            one process, 2 in two; in a loop of iterations every 4).
        workers: Of the data loader.
        epochs: Of the training; in a loop of iterations 4 of these each.
        changes: Dotted keys, with ``__`` for the dot, and values.

    Returns:
        The path.
    """
    loader = {
        "batch_size": 4,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "dataset": {
            "type": "Stripes",
            "pipeline": [{"type": "mmcv.RandomFlip", "prob": 0.5}, {"type": "Noise"}],
        },
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "collate_fn": {"type": "pseudo_collate"},
    }
    by_epoch = loop == "epoch"
    sampler = {"type": "DefaultSampler" if by_epoch else "InfiniteSampler", "shuffle": True}
    cfg = Config(
        {
            "custom_imports": {"imports": ["tests.helpers.noisy_training"]},
            "model": {"type": "DropoutNet"},
            "train_dataloader": {**loader, "sampler": sampler},
            "train_cfg": {"by_epoch": True, "max_epochs": epochs}
            if by_epoch
            else {"by_epoch": False, "max_iters": 4 * epochs},
            "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.2, "momentum": 0.9}},
            "param_scheduler": [{"type": "LinearLR", "by_epoch": False, "end": 10}],
            "default_hooks": {
                "checkpoint": {
                    "type": "CheckpointHook",
                    "interval": every or (1 if by_epoch else 4),
                    "by_epoch": by_epoch and not every,
                }
            },
            "custom_hooks": list(hooks),
            "randomness": {"seed": 5},
        }
    )
    if changes.pop("validate", False):
        cfg.val_dataloader = {**loader, "sampler": {"type": "DefaultSampler", "shuffle": False}}
        cfg.val_cfg, cfg.val_evaluator = {"type": "ValLoop"}, {"type": "MeanScore"}
        cfg.train_cfg.val_interval = 1
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    cfg.dump(path)
    return path


def state(checkpoint):
    """What must be equal to the bit: weights, the optimizer's state and the schedulers'."""
    content = load(checkpoint)
    kept = {key: content[key] for key in ("state_dict", "optimizer", "param_schedulers")}
    return {**kept, **{key: content[key] for key in ("ema_state_dict",) if key in content}}


def last(work_dir):
    """The state at the end of a training."""
    name = Path(Path(work_dir, "last_checkpoint").read_text()).name
    return state(Path(work_dir, name))


def equal(a, b):
    """Whether two states are, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
