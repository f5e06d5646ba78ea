"""The tools at work on drawn images, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

from mmengine.registry import MODELS, init_default_scope

from psbn_mmdet.checkpoint import load


def build(cfg):
    """The model of a config."""
    init_default_scope("mmdet")
    return MODELS.build(cfg.model)


TINY = [
    "train_cfg.max_epochs=3",
    "train_cfg.val_interval=3",
    "default_hooks.checkpoint.interval=1",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
]


def command(processes, config, work_dir, *arguments, test=None):
    tool = "test" if test else "train"
    if processes == 1:
        head = [sys.executable, f"tools/{tool}.py", config, *([test] if test else [])]
    else:
        head = [f"tools/dist_{tool}.sh", config, *([test] if test else []), str(processes)]
    return [*head, "--work-dir", str(work_dir), *map(str, arguments)]


def environment(**extra):
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **extra}


def run(*args, check=True, env=None, **kwargs):
    result = subprocess.run(
        command(*args, **kwargs), env=env or environment(), capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def weights(work_dir, epoch=3):
    return load(Path(work_dir) / f"epoch_{epoch}.pth")["state_dict"]
