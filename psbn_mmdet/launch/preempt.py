"""What a run does about SIGTERM, which Slurm sends before it takes the nodes away.

It saves ``WORK_DIR/preempted.pth`` when the current step has ended, and ends with
:data:`PREEMPTED`, so that a batch script can tell this from a failure and put the job back
into the queue; ``--resume`` goes on from there.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from .exact import gradients_are_pending

PREEMPTED = 75
"""Exit status of a run that was asked to end and saved: ``EX_TEMPFAIL`` of sysexits.h."""

FILE = "preempted.pth"


class Preempted(Exception):
    """The run has saved and is to end."""


class Preemption(Hook):
    """Saves and ends the training after a SIGTERM to any of its processes.

    Use it as a context manager around everything, the Runner's construction
    included: a signal in that time counts as well.

    Args:
        folder: Where the checkpoint goes.
    """

    priority = "LOWEST"  # after the hooks that belong to the step

    def __init__(self, folder: str | os.PathLike) -> None:
        self._path = Path(folder, FILE)
        self._asked = False
        self._group: Any = None
        self._before: Any = None

    def __enter__(self) -> Preemption:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # A launcher that sees one rank end sends SIGTERM to the others. They are about to end by
        # themselves, and must do so with the status that has the job requeued.
        saved = kind is not None and issubclass(kind, Preempted)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if saved else self._before)

    def _note(self, *_: Any) -> None:
        self._asked = True

    def before_train(self, runner: Runner) -> None:
        """Prepare the exchange: over gloo, which does not wait for what a GPU has still to do."""
        if dist.is_initialized() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Save after the step in which the signal came, or after the update that it belongs to.

        All ranks save after the same one.
        """
        if self._any_rank_asked() and not gradients_are_pending(runner):
            self._save(runner, {"epoch": runner.epoch, "iter": runner.iter + 1})

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Do not wait for the end of a validation; a resumed run begins with it."""
        loader = runner.val_dataloader
        # so many batches every rank has, and can exchange after
        common = len(loader.dataset) // (get_world_size() * (loader.batch_size or 1))
        if runner.train_loop is not None and batch_idx < common and self._any_rank_asked():
            runner.logger.warning("the validation was interrupted; --resume begins with it")
            for hook in runner.hooks:  # it has put the averaged weights into the model
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)
            self._save(runner, {"epoch": runner.epoch, "iter": runner.iter})

    def after_train(self, runner: Runner) -> None:
        """Remove what a preempted run left: the training has its end."""
        if runner.rank == 0:
            self._path.unlink(missing_ok=True)

    def _any_rank_asked(self) -> bool:
        if not dist.is_initialized():
            return self._asked
        asked = torch.tensor(int(self._asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked)

    def _save(self, runner: Runner, meta: dict) -> None:
        if runner.rank == 0:
            start = time.monotonic()
            partial = self._path.with_suffix(".pth.part")
            runner.save_checkpoint(str(partial.parent), partial.name, meta=meta)
            partial.replace(self._path)  # whole, or not there
            print(
                f"SIGTERM: saved {self._path} at iteration {meta['iter']} in "
                f"{time.monotonic() - start:.1f} s; --resume goes on from it",
                flush=True,
            )
        if dist.is_initialized():  # a launcher may kill all when one exits
            dist.barrier(group=self._group)
        raise Preempted
