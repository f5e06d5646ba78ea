"""The data loaders of a run: seeded by where it stands, begun there, and not ended by a SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from mmengine.dataset import worker_init_fn as mmengine_worker_init_fn
from mmengine.dist import get_rank
from mmengine.registry import DATASETS, FUNCTIONS, LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import IterableDataset

from ..checkpoint import meta_of
from .config import UsageError
from .seeding import SeededBatchSampler, SeededDataset

WORKER_GRACE = 60
"""Seconds that a worker of the data loader lives on after SIGTERM; the training needs them
to finish its step and to save."""


# FlexibleRunner wants a name
@FUNCTIONS.register_module("psbn_init_worker", force=True)  # type: ignore[untyped-decorator]
def init_worker(worker_id: int, inner: Callable[[int], None] | None = None) -> None:
    """Start a worker of a data loader that a SIGTERM to all of a job does not end at once.

    Args:
        worker_id: Its number.
        inner: Further initialisation.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.set_wakeup_fd(-1)  # the training's, as is what listens there
        threading.Thread(target=_outlive, daemon=True).start()
    if inner is not None:
        inner(worker_id)


def _outlive() -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)  # the training has no more use for it: what torch's own handler does
        signal.alarm(WORKER_GRACE)


class SeededLoaders(Runner if TYPE_CHECKING else object):  # type: ignore[misc]
    """A mixin for a Runner class: its data loaders are made of the pieces of :mod:`.seeding`."""

    _for_training = False
    _passed: int | None = None  # in a loop of iterations, those that were trained with before

    def build_train_loop(self, loop: Any) -> Any:
        """As the Runner does, with a seeded data loader."""
        self._for_training = True
        if isinstance(loop, dict) and _is_of_iterations(loop):
            # the loop starts its loader at once, and it must start where the run goes on
            resumed = self._resume and self._load_from
            self._passed = meta_of(self._load_from).get("iter", 0) if resumed else 0
        try:
            return super().build_train_loop(loop)
        finally:
            self._for_training = False

    def build_dataloader(
        self, dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False
    ) -> Any:
        """As the Runner does; a loader that is not a config is used as it is.

        Raises:
            UsageError: A file of the data set is not there.
        """
        if isinstance(dataloader, dict):
            dataloader = dict(dataloader)
            dataloader["worker_init_fn"] = {
                "type": "psbn_init_worker",
                "inner": _inner_init(dataloader, seed or 0),
            }
        try:
            if self._for_training and isinstance(dataloader, dict):
                dataloader = _seeded(dataloader, seed or 0, self._passed)
            return super().build_dataloader(dataloader, seed, diff_rank_seed)
        except FileNotFoundError as error:  # of a kind that check_data does not know
            raise UsageError(
                f"{error.filename or error}: no such file, but a data set of the config "
                "needs it; set --data-root"
            ) from error


def _is_of_iterations(loop: dict[str, Any]) -> bool:
    kind = loop.get("type")
    if kind is None:
        return not loop.get("by_epoch", True)
    kind = LOOPS.get(kind) if isinstance(kind, str) else kind
    return isinstance(kind, type) and issubclass(kind, IterBasedTrainLoop)


def _inner_init(dataloader: dict[str, Any], seed: int) -> Callable[[int], None]:
    """The initialisation that a config names, or mmengine's."""
    quiet = dataloader.pop("disable_subprocess_warning", False)
    given = dict(dataloader.pop("worker_init_fn", None) or {})
    if not given:
        return partial(
            mmengine_worker_init_fn,
            num_workers=dataloader.get("num_workers", 0),
            rank=get_rank(),
            seed=seed,
            disable_subprocess_warning=quiet,
        )
    kind = given.pop("type")
    return partial(FUNCTIONS.get(kind) if isinstance(kind, str) else kind, **given)


def _seeded(dataloader: dict[str, Any], seed: int, passed: int | None) -> dict[str, Any]:
    dataset = dataloader["dataset"]
    if isinstance(dataset, dict):
        dataset = DATASETS.build(dataset)
        if hasattr(dataset, "full_init"):
            dataset.full_init()
    if isinstance(dataset, IterableDataset):  # draws its own order: there is nothing to name
        return {**dataloader, "dataset": dataset}
    batches = {"type": SeededBatchSampler, "seed": seed, "passed": passed}
    batches["batch_sampler"] = dataloader.pop("batch_sampler", None)
    if batches["batch_sampler"] is None:
        batches["drop_last"] = dataloader.pop("drop_last", False)
    return {**dataloader, "dataset": SeededDataset(dataset), "batch_sampler": batches}
