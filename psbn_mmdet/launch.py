"""What tools/train.py and tools/test.py do: mmdet's own Runner, with checks in front.

Beyond mmdet's tools: the same commands run distributed on CPU (gloo); a data
set at another place is one argument; ``--resume`` goes on from the newest
*whole* checkpoint; and what cannot work ends in one line before anything is
built.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, ValuesView
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.hub import get_config
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from mmengine.utils import is_installed

from .checkpoint import CheckpointError, is_whole, latest_whole, require_fit
from .checkpoint.loaders import CheckpointGuard


class UsageError(Exception):
    """A command cannot do what it was asked; the message is one line that says what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that training and testing share, under mmdet's names."""
    parser.add_argument("--work-dir", help="where to write (default work_dirs/CONFIG)")
    parser.add_argument(
        "--data-root", help="where the data set is (default: the config's data_root)"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="override the config, as model.backbone.norm_cfg.alpha=0.2 or key=[a,b]",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="job launcher",
    )
    parser.add_argument(
        "--check",
        type=int,
        metavar="PROCESSES",
        help="only check that so many processes here could do it",
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK instead.
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with one line for what the user can mend."""
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # mmengine's, many times
    try:
        yield
    except (UsageError, CheckpointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def load_config(
    source: str,
    cfg_options: dict[str, Any] | None = None,
    data_root: str | None = None,
    work_dir: str | None = None,
) -> Config:
    """A config with a command line's overrides.

    Args:
        source: A file, or ``package::path`` for one that an installed package
            ships, as ``psbn_mmdet::retinanet/retinanet_psbn_500.py``.
        cfg_options: Dotted keys and values, merged into it.
        data_root: Where the data set is, in place of the config's ``data_root``
            in every path that starts with it. ``cfg_options`` may say it too.
        work_dir: Where to write; by default the config's own or
            ``work_dirs/CONFIG``.

    Raises:
        UsageError: There is no such config or it does not load.
    """
    package = source.partition("::")[0]
    if "::" in source and not is_installed(package):
        raise UsageError(f"{source}: the package {package} is not installed")
    if "::" not in source and not Path(source).is_file():
        raise UsageError(f"{source}: no such config; those of this project are in configs/")
    try:
        cfg = get_config(source) if "::" in source else Config.fromfile(source)
        old_root = cfg.get("data_root")
        cfg.merge_from_dict(cfg_options or {})
    except Exception as error:  # a config is a program: it may raise anything
        raise UsageError(f"{source}: does not load: {type(error).__name__}: {error}") from error
    new_root = data_root or cfg.get("data_root")
    if data_root and not old_root:
        raise UsageError(f"{source}: has no data_root; name the data through --cfg-options instead")
    if new_root != old_root:
        _replace_prefix(cfg._cfg_dict, old_root, os.path.join(new_root, ""))
    cfg.work_dir = work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(source).stem))
    return cfg


def _replace_prefix(node: Any, old: str, new: str) -> None:
    """Replace ``old`` by ``new`` at the start of every string below ``node``, in place."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(value, dict | list):
            _replace_prefix(value, old, new)
        elif isinstance(value, str) and value.startswith(old):
            node[key] = new + value[len(old) :]


def check_processes(processes: int) -> None:
    """Whether this machine can run so many, one per GPU where there are GPUs.

    Raises:
        UsageError: It cannot.
    """
    gpus = torch.cuda.device_count()
    if processes < 1 or (gpus and processes > gpus):
        have = f"1 to {gpus}, one per GPU of this machine" if gpus else "at least 1"
        raise UsageError(f"{processes} processes asked for, {have} can run")


def check_data(cfg: Config, *phases: str) -> None:
    """Whether the files that the data sets of some phases name are there.

    Args:
        cfg: The config.
        phases: Of ``'train'``, ``'val'``, ``'test'``.

    Raises:
        UsageError: An annotation file or a folder of images is missing.
    """
    hint = f"link COCO-2017 to {cfg.get('data_root')} or say where it is with --data-root"
    for phase in phases:
        for dataset in _datasets(cfg.get(f"{phase}_dataloader") or {}):
            root = dataset.get("data_root") or ""
            annotations = dataset.get("ann_file")
            folder = (dataset.get("data_prefix") or {}).get("img")
            for what, name in [("annotation file", annotations), ("folder of images", folder)]:
                path = os.path.join(root, name or "")
                if name is not None and "://" not in path and not os.path.exists(path):
                    raise UsageError(f"{path}: no such {what}; {hint}")
        evaluators = cfg.get(f"{phase}_evaluator") or []
        for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
            path = evaluator.get("ann_file")
            if path and "://" not in path and not os.path.exists(path):
                raise UsageError(f"{path}: no such annotation file; {hint}")


def check_weights(cfg: Config, strict: bool = False) -> None:
    """Whether the checkpoints that a config starts from can be had and fit; downloads them.

    Args:
        cfg: The config.
        strict: As in :func:`psbn_mmdet.checkpoint.mismatch`: True for testing.

    Raises:
        CheckpointError: One is missing, not whole, not of this config or could
            not be downloaded.
    """
    for source in _pretrained(cfg.model):
        CheckpointLoader.load_checkpoint(source, map_location="cpu")
    if cfg.get("load_from"):
        checkpoint = CheckpointLoader.load_checkpoint(cfg.load_from, map_location="cpu")
        init_default_scope(cfg.get("default_scope", "mmengine"))
        require_fit(MODELS.build(cfg.model), checkpoint, cfg.load_from, strict or cfg.resume)


def _pretrained(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if node.get("type") == "Pretrained":
            yield node["checkpoint"]
        node = node.values()
    if isinstance(node, list | tuple | ValuesView):
        for child in node:
            yield from _pretrained(child)


def _datasets(node: dict) -> Iterator[dict]:
    """The data sets in a loader's config, within wrappers like RepeatDataset and ConcatDataset."""
    if "ann_file" in node:
        yield node
    inner = node.get("datasets") or [node.get("dataset") or {}]
    for child in inner:
        if child:
            yield from _datasets(child)


def _set_up_launcher(cfg: Config, launcher: str) -> None:
    """Let the Runner start distributed, on CPU as well.

    mmengine's own start calls ``torch.cuda.set_device``, so without a GPU the
    group is made here, and the wrapper must not ask for a device.
    """
    cfg.launcher = launcher
    if launcher == "none" or torch.cuda.is_available():
        return
    if launcher == "slurm":
        nodes = subprocess.check_output(
            ["scontrol", "show", "hostnames", os.environ["SLURM_NODELIST"]], text=True
        )
        os.environ.setdefault("MASTER_ADDR", nodes.split()[0])
        os.environ.setdefault("MASTER_PORT", "29500")
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    elif launcher != "pytorch":
        raise UsageError(f"launcher {launcher}: needs GPUs; without one use pytorch or slurm")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    cfg.setdefault(
        "model_wrapper_cfg",
        dict(
            type="MMDistributedDataParallel",
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get("find_unused_parameters", False),
        ),
    )


def _leave_group() -> None:
    """Leave the process group; call it when the last name of the Runner is gone.

    While a group lives (DDP keeps it, and cycles keep DDP), gloo's threads may
    hold tensors of the last collective. If they free them when the interpreter
    is already ending, the process aborts, and torchrun calls a finished job
    failed: of 25 programs of two processes and a few collectives, 6 to 8 did.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def _make_runner(cfg: Config, strict: bool) -> Runner:
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    runner.register_hook(CheckpointGuard(strict), priority="VERY_HIGH")
    return runner


def configure_training(
    cfg: Config, *, resume: str | None = None, amp: bool = False, auto_scale_lr: bool = False
) -> None:
    """Put the options of tools/train.py into its config, and check what it names.

    Args:
        cfg: The config, changed in place.
        resume: A checkpoint to go on from, or ``'auto'``: the newest whole one
            of the work dir; where there is none, training starts anew.
        amp: Mixed precision with dynamic loss scaling.
        auto_scale_lr: Scale the learning rate to the batch by the config's
            ``auto_scale_lr.base_batch_size``.

    Raises:
        UsageError: The config has no training, or the machine or the config
            does not allow an option, or data is missing.
        CheckpointError: The checkpoint to resume from is not whole.
    """
    if not cfg.get("train_dataloader"):
        raise UsageError(f"{cfg.filename}: has no train_dataloader, so nothing to train on")
    if amp:
        if not torch.cuda.is_available():
            raise UsageError("--amp needs a GPU; leave it out on CPU")
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if auto_scale_lr:
        if not (cfg.get("auto_scale_lr") or {}).get("base_batch_size"):
            raise UsageError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
    if resume == "auto":
        path = latest_whole(cfg.work_dir)
        print(
            f"resuming from {path}" if path else f"{cfg.work_dir}: nothing to resume: starting anew"
        )
        resume = path and str(path)
    elif resume and "://" not in resume:
        if not os.path.exists(resume):
            raise CheckpointError(f"{resume}: no such checkpoint to resume from")
        if not is_whole(resume):
            raise CheckpointError(
                f"{resume}: is cut off; --resume alone takes the newest whole one"
            )
    if resume:
        cfg.update(resume=True, load_from=resume)
    hook = cfg.get("default_hooks", {}).get("checkpoint") or {}
    if hook.get("max_keep_ckpts") == 1:
        # mmengine removes the old one first: a kill in between would lose the run.
        print(
            "max_keep_ckpts=1 would leave no whole checkpoint while the next is written: keeping 2"
        )
        hook.max_keep_ckpts = 2
    check_data(cfg, "train", "val")


def train(cfg: Config, launcher: str = "none") -> None:
    """Train by a config that :func:`configure_training` has seen."""
    _set_up_launcher(cfg, launcher)
    runner = _make_runner(cfg, strict=False)
    runner.train()
    del runner
    _leave_group()


def configure_test(cfg: Config, checkpoint: str) -> None:
    """Put the checkpoint of tools/test.py into its config, and check what it names.

    COCO results go to ``WORK_DIR/results.bbox.json``.

    Raises:
        UsageError: Data is missing.
        CheckpointError: The checkpoint is missing.
    """
    if "://" not in checkpoint and not os.path.exists(checkpoint):
        raise CheckpointError(f"{checkpoint}: no such checkpoint")
    cfg.load_from = checkpoint
    check_data(cfg, "test")
    evaluators = cfg.test_evaluator
    for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
        if evaluator.type == "CocoMetric" and not evaluator.get("outfile_prefix"):
            evaluator.outfile_prefix = os.path.join(cfg.work_dir, "results")


def evaluate(cfg: Config, launcher: str = "none") -> dict[str, float]:
    """Evaluate by a config that :func:`configure_test` has seen.

    Returns:
        The metrics, which also go to ``WORK_DIR/metrics.json``.
    """
    _set_up_launcher(cfg, launcher)
    runner = _make_runner(cfg, strict=True)
    metrics = runner.test()
    if runner.rank == 0:
        Path(cfg.work_dir, "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    del runner
    _leave_group()
    return metrics
