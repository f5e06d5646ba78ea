"""Which checkpoint a run goes on from, and what makes it this run's.

A work dir may have seen several runs. Each has an identity, drawn when it starts from scratch or
from a checkpoint that the user named, kept by every ``--resume`` without a name, and written into
each of its checkpoints (``meta["run"]``). ``WORK_DIR/run.json`` names the run that trained there
last. The one rule: **``--resume`` goes on from the newest whole checkpoint of that run.**
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..checkpoint import CheckpointError, is_whole, latest_whole, meta_of
from ..errors import written_whole
from .config import UsageError

FILE = "run.json"


class Start(NamedTuple):
    """Where a run begins."""

    run: str  # its identity
    checkpoint: str | None = None  # to go on from; None for from scratch
    seed: int | None = None  # that the checkpoint was trained with
    given: str | None = None  # the checkpoint that the user once named for this run


def checkpoint_hook(cfg: Config) -> dict[str, Any]:
    """The config of the hook that saves the checkpoints; empty where there is none."""
    return (cfg.get("default_hooks") or {}).get("checkpoint") or {}


def checkpoint_folder(cfg: Config) -> str:
    """Where a run's checkpoints go: its work dir, unless ``CheckpointHook`` has an ``out_dir``."""
    out = checkpoint_hook(cfg).get("out_dir")
    if not out or out == cfg.work_dir:
        return cfg.work_dir
    return os.path.join(out, os.path.basename(cfg.work_dir.rstrip(os.sep)))


def choose(cfg: Config, resume: str | None) -> Start:
    """Where to begin; for rank 0, which decides for all.

    Args:
        cfg: The config.
        resume: A checkpoint, or ``'auto'`` for the rule of this module; None for from scratch.

    Raises:
        CheckpointError: The checkpoint is missing or not whole, or which one it is cannot be told.
        UsageError: The checkpoints are not on the local disk, and none is named.
    """
    if resume is None:
        return Start(_new())
    if resume != "auto":
        path = resume if "://" in resume else find(resume)
        return Start(_new(), path, meta_of(path).get("seed"), given=path)
    folder = checkpoint_folder(cfg)
    if "://" in folder:
        raise UsageError(
            f"{folder}: is not a local folder, so the newest checkpoint is unknown; "
            "name it: --resume CHECKPOINT"
        )
    before = _run_of(cfg.work_dir)
    saved = latest_whole(
        folder,
        before and before.run,
        checkpoint_hook(cfg).get("filename_tmpl"),
        Path(cfg.work_dir, "last_checkpoint"),
    )
    run = before.run if before else _new()
    if saved is not None:
        print(f"resuming from {saved.path}")
        run = saved.meta.get("run") or run
        return Start(run, str(saved.path), saved.meta.get("seed"), before and before.given)
    if before and before.given:
        path = before.given if "://" in before.given else find(before.given)
        print(f"resuming from {path}, where this run started")
        return Start(run, path, meta_of(path).get("seed"), before.given)
    of_others = (
        " (its checkpoints belong to another run)" if any(Path(folder).glob("*.pth")) else ""
    )
    print(f"{folder}: nothing to resume{of_others}; starting from scratch")
    return Start(run)


def find(path: str, folder: str = "") -> str:
    """A checkpoint at a path; in ``folder`` under its name, where nothing is at the path.

    Raises:
        CheckpointError: It is missing or cut off.
    """
    own = os.path.join(folder, os.path.basename(path))
    path = own if folder and not os.path.exists(path) else path
    if not os.path.exists(path):
        where = "; copy rank 0's there, or use a work dir that all nodes share" if folder else ""
        raise CheckpointError(f"{path}: no such checkpoint to resume from{where}")
    if not is_whole(path):
        raise CheckpointError(
            f"{path}: is cut off; --resume without a name takes the newest complete one"
        )
    return path


class Identity(Hook):
    """Writes who a run is: into its work dir when it begins to train, and into its checkpoints.

    Until then a start that fails leaves the run that trained there before.

    Args:
        start: What :func:`choose` returned, on rank 0.
    """

    priority = "LOWEST"

    def __init__(self, start: Start) -> None:
        self._start = start

    def before_train(self, runner: Runner) -> None:
        """Write ``run.json``."""
        if runner.rank == 0:
            content = {"run": self._start.run, "resumed_from": self._start.given}
            with written_whole(Path(runner.work_dir, FILE)) as part:
                part.write_text(json.dumps(content) + "\n")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint whose it is."""
        checkpoint["meta"]["run"] = self._start.run


def _new() -> str:
    return secrets.token_hex(8)


def _run_of(work_dir: str) -> Start | None:
    """The run that trained in a work dir last, if that is known."""
    path = Path(work_dir, FILE)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        return Start(str(content["run"]), given=content.get("resumed_from"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: does not name a run; remove it, or name the checkpoint: --resume CHECKPOINT"
        ) from error
