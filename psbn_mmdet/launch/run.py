"""Training and evaluation by a config, mmdet's own Runner at work."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner

from ..checkpoint import CheckpointError
from ..errors import written_whole
from ..norm.hook import PsBNHook, post_shifted
from .agreement import Agreement, agree_on_config
from .amp import BFloat16OptimWrapper, cpu_has_bfloat16
from .checks import (
    check_data,
    check_port,
    check_processes,
    check_synchronised_norm,
    check_work_dir,
)
from .config import UsageError, type_name, write_coco_results
from .data_loaders import SeededLoaders
from .distributed import from_rank_0, on_all_ranks, process_group, rank
from .position import ExactResume, MissedValidation
from .preempt import PREEMPTED, AfterMetrics, BrokenOffError, Preempted, Preemption
from .preview import CheckClasses, built, preview
from .resume import Identity, Start, checkpoint_folder, checkpoint_hook, choose, find
from .runner import Runner


def train(
    cfg: Config,
    launcher: str = "none",
    *,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
) -> None:
    """Train by a config; with a launcher, as one of its processes.

    Args:
        cfg: The config, changed in place.
        launcher: As in :func:`.process_group`.
        resume: As in :func:`configure_training`, as are the other options.
        amp: Mixed precision.
        auto_scale_lr: Scale the learning rate to the batch.

    Raises:
        PsbnError: What is asked for cannot be done.
        SystemExit: With :data:`.PREEMPTED`, where a SIGTERM came: ``--resume`` goes on.
    """
    exact = ExactResume()
    # A Runner must be gone when its process group is left: it lives in _run alone.
    preemption = Preemption(checkpoint_folder(cfg), exact.gather)
    with preemption, process_group(cfg, launcher):
        start = configure_training(cfg, resume=resume, amp=amp, auto_scale_lr=auto_scale_lr)
        status = _run(cfg, start, exact, preemption)
        exact.forget()
        if status:
            raise SystemExit(status)


def _run(cfg: Config, start: Start, exact: ExactResume, preemption: Preemption) -> int:
    """Train; returns the exit status."""
    runner = _make_runner(cfg)
    hooks = (exact, AfterMetrics(preemption), CheckClasses(), Agreement(), Identity(start))
    for hook in (*hooks, preemption, MissedValidation(exact)):
        runner.register_hook(hook)
    # A FlexibleRunner builds its model later.
    shifted = isinstance(runner.model, torch.nn.Module) and post_shifted(runner.model)
    if shifted and not any(isinstance(hook, PsBNHook) for hook in runner.hooks):
        runner.register_hook(PsBNHook())
    del shifted  # the layers must be gone with the runner
    try:
        runner.train()
    except Preempted:
        return PREEMPTED
    except BrokenOffError:
        preemption.break_off(runner)
        return PREEMPTED
    except RuntimeError as error:
        # Another rank has saved and left, and this one was waiting for it.
        if not (dist.is_initialized() and preemption.is_asked_within(2)):
            raise
        print(f"SIGTERM: rank {rank()} ended: {str(error).splitlines()[0]}", flush=True)
        return PREEMPTED
    return 0


def configure_training(
    cfg: Config, *, resume: str | None = None, amp: bool = False, auto_scale_lr: bool = False
) -> Start:
    """Put the options of tools/train.py into its config, and check what it names.

    Within :func:`.process_group` rank 0 decides what to resume and which seed to
    take, and all compare.

    Args:
        cfg: The config, changed in place.
        resume: A checkpoint to go on from, or ``'auto'``: the newest whole one
            of the run that trained in the work dir last; where there is none, training starts
            from scratch.
        amp: Mixed precision: float16 with dynamic loss scaling on GPU, bfloat16 on CPU.
        auto_scale_lr: Scale the learning rate to the batch by the config's
            ``auto_scale_lr.base_batch_size``.

    Returns:
        Where the run begins.

    Raises:
        UsageError: The config has no training, or the machine or the config
            does not allow an option, or data is missing, or nothing can be written, or the
            configs of the ranks differ.
        CheckpointError: The checkpoint to resume from is missing or not whole.
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
    hook = checkpoint_hook(cfg)
    if hook.get("max_keep_ckpts") == 1:
        # mmengine removes the old one first: a kill in between would lose the run.
        print(
            "max_keep_ckpts=1 would leave no complete checkpoint while the next is "
            "written; keeping 2"
        )
        hook["max_keep_ckpts"] = 2
    agree_on_config(cfg)
    on_all_ranks(lambda: _check_machine(cfg, "train", "val"))
    return _resume(cfg, resume)


def _check_machine(cfg: Config, *phases: str) -> None:
    check_work_dir(cfg.work_dir)
    check_data(cfg, *phases)
    check_synchronised_norm(cfg, dist.get_world_size() if dist.is_initialized() else 1)


def _use_amp(cfg: Config) -> None:
    kind = type_name(cfg.optim_wrapper) or "OptimWrapper"
    if kind not in ("OptimWrapper", "AmpOptimWrapper", BFloat16OptimWrapper.__name__):
        raise UsageError(
            f"--amp would replace the optim_wrapper {kind} of the config; leave it out"
        )
    if get_device() != "cpu":
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    elif cpu_has_bfloat16():
        for key in ("loss_scale", "dtype"):
            cfg.optim_wrapper.pop(key, None)
        cfg.optim_wrapper.type = BFloat16OptimWrapper.__name__
    else:
        raise UsageError(
            "--amp needs a GPU or a processor with bfloat16 (avx512_bf16 or amx_bf16 "
            "in /proc/cpuinfo); on this one it would only be slower"
        )


def _resume(cfg: Config, resume: str | None) -> Start:
    """Let rank 0 choose checkpoint and seed; find that checkpoint on every rank."""
    if resume is None and cfg.get("resume"):  # by the config
        resume = cfg.get("load_from") or "auto"
    start = from_rank_0(lambda: choose(cfg, resume))
    randomness = cfg.get("randomness") or {}
    given, seed = randomness.get("seed"), start.seed
    if rank() == 0 and given is not None and seed is not None and given != seed:
        print(f"{start.checkpoint} was trained with seed {seed}; using it instead of {given}")
    if seed is None:
        # drawn here, so that the data loader has it and the checkpoint names it
        seed = given if given is not None else from_rank_0(lambda: secrets.randbelow(2**31))
    cfg.randomness = {**randomness, "seed": seed}
    if start.checkpoint is None:
        cfg.resume = False
        return start
    path = start.checkpoint
    if "://" not in path:
        path = on_all_ranks(lambda: find(start.checkpoint or "", checkpoint_folder(cfg)))
    cfg.update(resume=True, load_from=path)
    return start


def _make_runner(cfg: Config) -> Any:
    """The Runner that a config names, or ours, with our data loaders.

    Raises:
        UsageError: It cannot be built, or is to load what it would read in its own way.
    """
    kind = RUNNERS.get(cfg.get("runner_type") or "Runner")
    bases = (SeededLoaders, kind) if issubclass(kind, Runner) else (SeededLoaders, Runner, kind)
    if issubclass(kind, FlexibleRunner):
        if cfg.get("load_from"):
            raise UsageError(
                f"runner_type={kind.__name__}: its strategies read checkpoints in their "
                f"own way, which can run code, so {cfg.load_from} is not loaded; leave out "
                "runner_type"
            )
        bases = (SeededLoaders, kind)
    made: Any = type(kind.__name__, bases, {})
    return built("Runner", lambda: made.from_cfg(cfg), cfg.get("model"))


def check(cfg: Config, processes: int, *, training: bool) -> list[str]:
    """Check what :func:`configure_training` or :func:`configure_test` leaves to the start.

    Args:
        cfg: The config that one of them has seen.
        processes: How many are to be started on this machine.
        training: Whether to train.

    Returns:
        What it found, in lines.

    Raises:
        PsbnError: That many processes cannot run here, their port is taken, something cannot be
            built, or the weights cannot be had or do not fit.
    """
    check_processes(processes, cfg)
    check_port()
    return [f"processes: {processes}", *preview(cfg, training=training)]


def configure_test(cfg: Config, checkpoint: str) -> None:
    """Put the checkpoint of tools/test.py into its config, and check what it names.

    COCO results go to ``WORK_DIR/results.bbox.json``.

    Raises:
        UsageError: Data is missing, nothing would be measured, or nothing can be written.
        CheckpointError: The checkpoint is missing.
    """

    def look() -> None:
        if "://" not in checkpoint and not os.path.exists(checkpoint):
            raise CheckpointError(f"{checkpoint}: no such checkpoint")
        _check_machine(cfg, "test")

    if not cfg.get("test_dataloader"):
        raise UsageError(f"{cfg.filename}: has no test_dataloader, so there is nothing to test on")
    on_all_ranks(look)
    cfg.load_from = checkpoint
    write_coco_results(cfg, os.path.join(cfg.work_dir, "results"))


def evaluate(cfg: Config, checkpoint: str, launcher: str = "none") -> dict[str, float]:
    """Evaluate a checkpoint by a config; with a launcher, as one of its processes.

    Returns:
        The metrics, which also go to ``WORK_DIR/metrics.json``; there null stands for what is no
        finite number, as the AP of a class without objects.

    Raises:
        PsbnError: What is asked for cannot be done.
    """
    with process_group(cfg, launcher):
        configure_test(cfg, checkpoint)
        return _evaluate(cfg)


def _evaluate(cfg: Config) -> dict[str, float]:
    runner = _make_runner(cfg)
    metrics = runner.test()
    if runner.rank == 0:
        # json writes NaN, which is no JSON, and reads it back as what we say
        known = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
        with written_whole(Path(cfg.work_dir, "metrics.json")) as part:
            part.write_text(json.dumps(known, indent=1, allow_nan=False) + "\n")
    return metrics
