"""What a run does about SIGTERM, which Slurm sends before it takes the nodes away.

It ends with :data:`PREEMPTED`, so that a batch script can tell this from a failure and put the job
back into the queue; ``--resume`` goes on. What it does before depends on where it is:

- before the first step it has nothing to save, and ends at once, even while it waits for others;
- in a step, in saving and between the batches of a validation it saves ``preempted.pth`` at the
  next point that all ranks reach: the end of the step, of the epoch, of the batch;
- while metrics are computed, which takes minutes, rank 0 breaks off and saves.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner

PREEMPTED = 75
"""Exit status of a run that was asked to end and can be resumed: ``EX_TEMPFAIL`` of sysexits.h."""

FILE = "preempted.pth"


class Preempted(Exception):
    """The run has saved and is to end."""


class BrokenOffError(Exception):
    """A SIGTERM came while metrics were computed; the run is to save and to end."""


def gradients_are_pending(runner: Runner) -> bool:
    """Whether gradients have been accumulated since the last update; no checkpoint holds them."""
    wrapper = runner.optim_wrapper
    parts = wrapper.optim_wrappers.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return not all(part.should_update() for part in parts)


class Preemption(Hook):
    """Ends the training after a SIGTERM to any of its processes.

    Use it as a context manager around everything, the process group included: a signal in that
    time counts as well.

    Args:
        folder: Where the checkpoint goes.
        before_saving: Called on all ranks before one of them saves.
    """

    priority = "LOWEST"  # after the hooks that belong to the step

    def __init__(
        self,
        folder: str | os.PathLike[str],
        before_saving: Callable[[Runner], Any] = lambda runner: 0,
    ) -> None:
        self._path = Path(folder, FILE)
        self._before_saving = before_saving
        self.asked = False
        self._starting = True
        self.computing_metrics = False
        self._group: Any = None

    def __enter__(self) -> Preemption:
        self._handler = signal.signal(signal.SIGTERM, self._note)
        # Python runs a handler when what it waits for has returned. A byte in this socket is
        # written at once, and a thread reads it, whatever the main one waits for.
        self._bell, bell = socket.socketpair()
        bell.setblocking(False)
        self._ringer = bell
        self._wakeup = signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._bell,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # A launcher that sees one rank end sends SIGTERM to the others. They are about to end by
        # themselves, and must do so with the status that has the job requeued.
        saved = kind is not None and self.asked
        self._starting = False
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if saved else self._handler)
        self._ringer.close()  # ends the thread

    def _listen(self, bell: socket.socket) -> None:
        with bell:
            while rung := bell.recv(64):
                if signal.SIGTERM in rung and self._starting:
                    if os.environ.get("RANK", "0") == "0":
                        print("SIGTERM before the first step: there is nothing to save", flush=True)
                    sys.stderr.flush()
                    os._exit(PREEMPTED)

    def _note(self, *_: Any) -> None:
        self.asked = True
        if self.computing_metrics:
            self.computing_metrics = False
            raise BrokenOffError

    def is_asked_within(self, seconds: float) -> bool:
        """Whether the signal has come, or comes yet: a launcher sends it when another rank ends."""
        deadline = time.monotonic() + seconds
        while not self.asked and time.monotonic() < deadline:
            time.sleep(0.05)  # lets Python run the handler, too
        return self.asked

    def before_train(self, runner: Runner) -> None:
        """Prepare the exchange: over gloo, which does not wait for what a GPU has still to do."""
        if dist.is_initialized() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """From here on there is something to save."""
        self._starting = False

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Save after the step in which the signal came, or after the update that it belongs to.

        All ranks save after the same one.
        """
        if self._any_rank_asked() and not gradients_are_pending(runner):
            self._save_on_all(runner, {"epoch": runner.epoch, "iter": runner.iter + 1})

    def after_train_epoch(self, runner: Runner) -> None:
        """Do not begin a validation, nor another epoch; a checkpoint may have taken a while."""
        if self._any_rank_asked() and not gradients_are_pending(runner):
            by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
            self._save_on_all(runner, {"epoch": runner.epoch + by_epoch, "iter": runner.iter})

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Do not wait for the end of a validation; a resumed run begins with it."""
        if self._starting:  # one that is made up for: the run has not moved yet
            return
        loader = runner.val_dataloader
        # so many batches every rank has, and can exchange after
        common = len(loader.dataset) // (get_world_size() * (loader.batch_size or 1))
        if batch_idx < common and self._any_rank_asked():
            _end_validation(runner)
            self._save_on_all(runner, {"epoch": runner.epoch, "iter": runner.iter})
        if batch_idx == len(loader) - 1 and runner.rank == 0:
            self.computing_metrics = True
            if self.asked:  # since the exchange
                self._note()

    def break_off(self, runner: Runner) -> None:
        """Save after :class:`BrokenOffError`, while the other ranks wait for this one's metrics."""
        _end_validation(runner)
        self._save(runner, {"epoch": runner.epoch, "iter": runner.iter})

    def after_train(self, runner: Runner) -> None:
        """Remove what a preempted run left: the training has its end."""
        if runner.rank == 0:
            self._path.unlink(missing_ok=True)

    def _any_rank_asked(self) -> bool:
        if not dist.is_initialized():
            return self.asked
        asked = torch.tensor(int(self.asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked)

    def _save_on_all(self, runner: Runner, meta: dict[str, Any]) -> None:
        self.asked = True
        self._before_saving(runner)
        if runner.rank == 0:
            self._save(runner, meta)
        if dist.is_initialized():  # a launcher may kill all when one exits
            dist.barrier(group=self._group)
        raise Preempted

    def _save(self, runner: Runner, meta: dict[str, Any]) -> None:
        start = time.monotonic()
        partial = self._path.with_suffix(".pth.part")
        runner.save_checkpoint(str(partial.parent), partial.name, meta=meta)
        partial.replace(self._path)  # whole, or not there
        print(
            f"SIGTERM: saved {self._path} at iteration {meta['iter']} in "
            f"{time.monotonic() - start:.1f} s; --resume continues from it",
            flush=True,
        )


class AfterMetrics(Hook):
    """Tells :class:`Preemption` that the metrics are computed, before other hooks save the best."""

    priority = "VERY_HIGH"

    def __init__(self, preemption: Preemption) -> None:
        self._preemption = preemption

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        """Break off no more."""
        self._preemption.computing_metrics = False


def _end_validation(runner: Runner) -> None:
    """Take the averaged weights out of the model, which a validation has put there."""
    runner.logger.warning("the validation was interrupted; --resume starts with it")
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            hook.after_val_epoch(runner)
