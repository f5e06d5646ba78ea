"""Training and evaluation by a config, mmdet's own Runner at work."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zipfile
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS

from ..checkpoint import CheckpointError, is_whole, latest_whole, meta_of
from ..errors import written_whole
from .amp import BFloat16OptimWrapper, cpu_has_bfloat16
from .config import (
    UsageError,
    check_data,
    check_port,
    check_processes,
    check_weights,
    check_work_dir,
    type_name,
    write_coco_results,
)
from .distributed import agree, from_rank_0, on_all_ranks, rank
from .exact import ExactResume, MissedValidation, SeededLoaders
from .preempt import FILE as PREEMPTED_FILE
from .preempt import PREEMPTED, Preempted, Preemption
from .runner import Runner


def configure_training(
    cfg: Config, *, resume: str | None = None, amp: bool = False, auto_scale_lr: bool = False
) -> None:
    """Put the options of tools/train.py into its config, and check what it names.

    Within :func:`.process_group` rank 0 decides what to resume and which seed to
    take, and all compare.

    Args:
        cfg: The config, changed in place.
        resume: A checkpoint to go on from, or ``'auto'``: the newest whole one
            of the work dir; where there is none, training starts from scratch.
        amp: Mixed precision: float16 with dynamic loss scaling on GPU, bfloat16 on CPU.
        auto_scale_lr: Scale the learning rate to the batch by the config's
            ``auto_scale_lr.base_batch_size``.

    Raises:
        UsageError: The config has no training, or the machine or the config
            does not allow an option, or data is missing, or nothing can be written.
        CheckpointError: The checkpoint to resume from is missing, not whole, or not the
            same on all nodes.
    """
    for key in ("train_dataloader", "train_cfg", "optim_wrapper"):
        if not cfg.get(key):
            raise UsageError(f"{cfg.filename}: has no {key}, so it cannot be trained")
    if amp:
        _use_amp(cfg)
    if auto_scale_lr:
        if not (cfg.get("auto_scale_lr") or {}).get("base_batch_size"):
            raise UsageError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
    hook = _checkpoint_hook(cfg)
    if hook.get("max_keep_ckpts") == 1:
        # mmengine removes the old one first: a kill in between would lose the run.
        print(
            "max_keep_ckpts=1 would leave no whole checkpoint while the next is written: keeping 2"
        )
        hook["max_keep_ckpts"] = 2
    on_all_ranks(lambda: _check_machine(cfg))
    _resume(cfg, resume)


def _check_machine(cfg: Config) -> None:
    check_work_dir(cfg.work_dir)
    check_data(cfg, "train", "val")


def _use_amp(cfg: Config) -> None:
    kind = type_name(cfg.optim_wrapper) or "OptimWrapper"
    if kind not in ("OptimWrapper", "AmpOptimWrapper", BFloat16OptimWrapper.__name__):
        raise UsageError(f"--amp would replace the config's optim_wrapper {kind}; leave it out")
    if get_device() != "cpu":
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    elif cpu_has_bfloat16():
        for key in ("loss_scale", "dtype"):
            cfg.optim_wrapper.pop(key, None)
        cfg.optim_wrapper.type = BFloat16OptimWrapper.__name__
    else:
        raise UsageError(
            "--amp needs a GPU or a processor that computes in bfloat16 (avx512_bf16 or amx_bf16 "
            "in /proc/cpuinfo); on this one it would only be slower: leave it out"
        )


def _resume(cfg: Config, resume: str | None) -> None:
    """Let rank 0 choose checkpoint and seed; find that checkpoint on every rank."""
    if resume is None and cfg.get("resume"):  # by the config
        resume = cfg.get("load_from") or "auto"
    path, seed = from_rank_0(lambda: _choose(cfg, resume))
    randomness = cfg.get("randomness") or {}
    given = randomness.get("seed")
    if rank() == 0 and given is not None and seed is not None and given != seed:
        print(f"{path} was trained with seed {seed}: taking that, not {given}")
    if seed is None:
        # drawn here, so that the data loader has it and the checkpoint names it
        seed = given if given is not None else from_rank_0(lambda: secrets.randbelow(2**31))
    cfg.randomness = {**randomness, "seed": seed}
    if path is None:
        cfg.resume = False
        return
    if "://" not in path:
        chosen = path
        path = on_all_ranks(lambda: _find(chosen, checkpoint_folder(cfg)))
        agree(f"checkpoint {os.path.basename(path)}", _fingerprint(path))
    cfg.update(resume=True, load_from=path)


def _checkpoint_hook(cfg: Config) -> dict:
    return (cfg.get("default_hooks") or {}).get("checkpoint") or {}


def checkpoint_folder(cfg: Config) -> str:
    """Where a run's checkpoints go: its work dir, unless ``CheckpointHook`` has an ``out_dir``."""
    out = _checkpoint_hook(cfg).get("out_dir")
    if not out or out == cfg.work_dir:
        return cfg.work_dir
    return os.path.join(out, os.path.basename(cfg.work_dir.rstrip(os.sep)))


def _choose(cfg: Config, resume: str | None) -> tuple[str | None, int | None]:
    """The checkpoint to go on from and its seed."""
    if resume is None:
        return None, None
    if resume == "auto":
        folder = checkpoint_folder(cfg)
        preempted = Path(folder, PREEMPTED_FILE)
        paths = [preempted if is_whole(preempted) else None, latest_whole(folder)]
        metas = {p: meta_of(p) for p in paths if p is not None}
        if not metas:
            print(f"{folder}: nothing to resume: starting from scratch")
            return None, None
        path = max(metas, key=lambda p: metas[p].get("iter", 0))
        print(f"resuming from {path}")
        return str(path), metas[path].get("seed")
    if "://" in resume:
        return resume, meta_of(resume).get("seed")
    return _find(resume, ""), meta_of(resume).get("seed")


def _find(path: str, folder: str) -> str:
    """A checkpoint at the path that rank 0 named, or by that name in this rank's folder."""
    own = os.path.join(folder, os.path.basename(path))
    path = own if folder and not os.path.exists(path) else path
    if not os.path.exists(path):
        where = "; copy rank 0's there, or use a work dir that all nodes share" if folder else ""
        raise CheckpointError(f"{path}: no such checkpoint to resume from{where}")
    if not is_whole(path):
        raise CheckpointError(f"{path}: is cut off; --resume alone takes the newest whole one")
    return path


def _fingerprint(path: str) -> str:
    """A fingerprint of a checkpoint's content, from the checksums in its zip directory.

    A file of torch's format before 1.6, which is no zip archive, is read whole.
    """
    if not zipfile.is_zipfile(path):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    with zipfile.ZipFile(path) as archive:
        content = sorted((i.filename.partition("/")[2], i.CRC) for i in archive.infolist())
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _make_runner(cfg: Config) -> Runner:
    kind = RUNNERS.get(cfg.get("runner_type", "Runner"))
    bases = (SeededLoaders, kind) if issubclass(kind, Runner) else (SeededLoaders, Runner, kind)
    made: Any = type(kind.__name__, bases, {})
    return made.from_cfg(cfg)


def train(cfg: Config) -> None:
    """Train by a config that :func:`configure_training` has seen.

    Raises:
        SystemExit: With :data:`.PREEMPTED`, where a SIGTERM came: the run has saved.
    """
    try:
        with Preemption(checkpoint_folder(cfg)) as preemption:
            runner = _make_runner(cfg)
            exact = ExactResume()
            for hook in (exact, preemption, MissedValidation(exact)):
                runner.register_hook(hook)
            runner.train()
            return
    except Preempted:
        del runner  # an exception would hold it, and it the process group
    raise SystemExit(PREEMPTED)


def check(cfg: Config, processes: int, *, strict: bool) -> None:
    """Check what :func:`configure_training` or :func:`configure_test` leaves to the start.

    Args:
        cfg: The config that one of them has seen.
        processes: How many are to be started on this machine.
        strict: As in :func:`.check_weights`.

    Raises:
        PsbnError: That many processes cannot run here, their port is taken, or the weights
            cannot be had or do not fit.
    """
    check_processes(processes, cfg)
    check_port()
    check_weights(cfg, strict)


def configure_test(cfg: Config, checkpoint: str) -> None:
    """Put the checkpoint of tools/test.py into its config, and check what it names.

    COCO results go to ``WORK_DIR/results.bbox.json``.

    Raises:
        UsageError: Data is missing, nothing would be measured, or nothing can be written.
        CheckpointError: The checkpoint is missing.
    """

    def check() -> None:
        if "://" not in checkpoint and not os.path.exists(checkpoint):
            raise CheckpointError(f"{checkpoint}: no such checkpoint")
        check_work_dir(cfg.work_dir)
        check_data(cfg, "test")

    if not cfg.get("test_dataloader"):
        raise UsageError(f"{cfg.filename}: has no test_dataloader, so nothing to test on")
    on_all_ranks(check)
    cfg.load_from = checkpoint
    write_coco_results(cfg, os.path.join(cfg.work_dir, "results"))


def evaluate(cfg: Config) -> dict[str, float]:
    """Evaluate by a config that :func:`configure_test` has seen.

    Returns:
        The metrics, which also go to ``WORK_DIR/metrics.json``; there null stands for what is no
        finite number, as the AP of a class without objects.
    """
    runner = _make_runner(cfg)
    metrics = runner.test()
    if runner.rank == 0:
        # json writes NaN, which is no JSON, and reads it back as what we say
        known = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
        with written_whole(Path(cfg.work_dir, "metrics.json")) as part:
            part.write_text(json.dumps(known, indent=1, allow_nan=False) + "\n")
    return metrics
