"""Random numbers that depend on where a run stands, and not on how it got there.

mmengine seeds the workers of the data loader once, when they start. A resumed run starts
them again, so its images are flipped and cropped differently from those of an uninterrupted
run. Here every image and every step begins with random numbers of its own, a function of

    (seed, epoch, batch of the epoch, place in the batch, rank)     for an image,
    (seed, iteration, rank)                                         for a step,

whatever was drawn before, by whatever number of workers. So a run that is killed and
resumed equals an uninterrupted one to the bit, also from the middle of an epoch. What
keeps a state of its own between images does not take part: the caches of ``CachedMosaic``
and ``CachedMixUp``, the size that ``BatchSyncRandomResize`` holds for some steps.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from mmengine.dataset import worker_init_fn as mmengine_worker_init_fn
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, Dataset, IterableDataset, Sampler

from ..checkpoint import CheckpointError
from .config import UsageError

POSITION = "position_in_epoch"
"""Key in a checkpoint's ``meta``: a dictionary of ``batches``, how many of the epoch were
trained with, ``batches_per_epoch`` and ``processes``."""

WORKER_GRACE = 60
"""Seconds that a worker of the data loader lives on after SIGTERM; the training needs them
to finish its step and to save."""


def seed_all(*key: int, generator: Callable[[int], Any] = torch.manual_seed) -> None:
    """Seed Python's, NumPy's and torch's generators with a function of ``key``.

    Args:
        key: Integers, at least 0. Different keys give independent random numbers
            (NumPy's ``SeedSequence``).
        generator: Seeds torch; ``torch.default_generator.manual_seed`` leaves GPUs alone.
    """
    words = np.random.SeedSequence(key).generate_state(6)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:4])  # noqa: NPY002  the generator that transforms draw from
    generator(int(words[4]) << 31 | int(words[5]) >> 1)


class Draw(NamedTuple):
    """What a sampler asks a :class:`SeededDataset` for."""

    index: Any
    key: tuple[int, ...]


class SeededDataset(Dataset):
    """A data set whose items are drawn with random numbers that their :class:`Draw` names.

    Everything else is passed on to the data set that it wraps: hooks read and set attributes of
    that one.

    Args:
        dataset: The data set, or its config.
    """

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, dict):
            dataset = DATASETS.build(dataset)
        object.__setattr__(self, "_dataset", dataset)

    def __getitem__(self, draw: Any) -> Any:
        if not isinstance(draw, Draw):
            return self._dataset[draw]
        seed_all(*draw.key, generator=torch.default_generator.manual_seed)
        return self._dataset[draw.index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        # not before unpickling has set _dataset, and no way around __getitem__
        if name == "_dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)


class SeededBatchSampler(Sampler):
    """A batch sampler that gives every index the key of its random numbers.

    Args:
        sampler: Of indices.
        batch_size: Images in a batch.
        seed: Of the run.
        batch_sampler: Config of the batch sampler; by default consecutive indices.
        drop_last: Whether that default one leaves an incomplete batch out.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        seed: int,
        batch_sampler: dict | None = None,
        drop_last: bool = False,
    ) -> None:
        self._batches = (
            DATA_SAMPLERS.build(
                batch_sampler, default_args={"sampler": sampler, "batch_size": batch_size}
            )
            if batch_sampler
            else BatchSampler(sampler, batch_size, drop_last)
        )
        self._indices = sampler
        self._seed = seed
        self.batch_size, self.drop_last = batch_size, drop_last
        self.epoch = 0
        self.skip = 0  # batches to leave out of the next epoch, since they were trained with

    @property
    def sampler(self) -> SeededBatchSampler:
        """The object on which mmengine sets the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Shuffle and draw as in this epoch."""
        self.epoch = epoch
        if hasattr(self._indices, "set_epoch"):
            self._indices.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(self._batches):
            if number >= skip:
                key = (self._seed, self.epoch, number)
                yield [Draw(i, (*key, place, get_rank())) for place, i in enumerate(batch)]

    def __len__(self) -> int:
        return len(self._batches)


def gradients_are_pending(runner: Runner) -> bool:
    """Whether gradients have been accumulated since the last update; no checkpoint holds them."""
    wrapper = runner.optim_wrapper
    parts = wrapper.optim_wrappers.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return not all(part.should_update() for part in parts)


def init_worker(worker_id: int, inner: Callable[[int], None] | None = None) -> None:
    """Start a worker of a data loader that a SIGTERM to all of a job does not end at once.

    Args:
        worker_id: Its number.
        inner: Further initialisation.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_outlive, daemon=True).start()
    if inner is not None:
        inner(worker_id)


def _outlive() -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)  # the training has no more use for it: what torch's own handler does
        signal.alarm(WORKER_GRACE)


class SeededLoaders(Runner if TYPE_CHECKING else object):  # type: ignore[misc]
    """A mixin for a Runner class: its data loaders are made of the pieces above."""

    _for_training = False

    def build_train_loop(self, loop: Any) -> Any:
        """As the Runner does, with a seeded data loader."""
        self._for_training = True
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
                "type": init_worker,
                "inner": _inner_init(dataloader, seed or 0),
            }
        try:
            if self._for_training and isinstance(dataloader, dict):
                dataloader = _seeded(dataloader, seed or 0)
            return super().build_dataloader(dataloader, seed, diff_rank_seed)
        except FileNotFoundError as error:  # of a kind that check_data does not know
            raise UsageError(
                f"{error.filename or error}: no such file, and a data set of the config reads it; "
                "--data-root says where the data is"
            ) from error


def _inner_init(dataloader: dict, seed: int) -> Callable[[int], None]:
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


def _seeded(dataloader: dict, seed: int) -> dict:
    dataset = dataloader["dataset"]
    if isinstance(dataset, dict):
        dataset = DATASETS.build(dataset)
        if hasattr(dataset, "full_init"):
            dataset.full_init()
    if isinstance(dataset, IterableDataset):  # draws its own order: there is nothing to name
        return {**dataloader, "dataset": dataset}
    batches = {"type": SeededBatchSampler, "seed": seed}
    batches["batch_sampler"] = dataloader.pop("batch_sampler", None)
    if batches["batch_sampler"] is None:
        batches["drop_last"] = dataloader.pop("drop_last", False)
    return {**dataloader, "dataset": SeededDataset(dataset), "batch_sampler": batches}


class ExactResume(Hook):
    """Seeds every step, and goes on in the middle of an epoch where a checkpoint was saved there.

    mmengine starts such an epoch from its beginning, with the iteration of its middle.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._skip = 0  # batches of the epoch that the run goes on in
        self._first_iteration: int | None = None  # of the current epoch; None between epochs

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Learn how many batches of its epoch a checkpoint has seen.

        Raises:
            CheckpointError: They are not known, or the epoch is divided in another way now, or the
                checkpoint has weights alone.
        """
        if not runner._resume:
            return
        meta, name = checkpoint["meta"], runner._load_from
        wanted = {"optimizer": "optimizer", "param_schedulers": "learning-rate schedule"}
        if not runner.param_schedulers:
            del wanted["param_schedulers"]
        if lacking := [what for key, what in wanted.items() if key not in checkpoint]:
            raise CheckpointError(
                f"{name}: holds no state of the {' or '.join(lacking)} to go on with, as no "
                "best_*.pth does; resume from an epoch_N.pth or iter_N.pth, or begin a new "
                "training with it by --cfg-options load_from="
            )
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return
        length = len(runner.train_dataloader)
        position = meta.get(POSITION)
        if position is None:  # mmengine's own; its iter_N.pth are of the middle
            batches = meta["iter"] - meta["epoch"] * length
            if batches and name.rpartition("/")[2].startswith("iter_"):
                raise CheckpointError(
                    f"{name}: was saved in the middle of epoch {meta['epoch'] + 1}, and does not "
                    "say where; resume from an epoch_N.pth"
                )
            return
        now = {"batches_per_epoch": length, "processes": get_world_size()}
        then = {key: position[key] for key in now}
        if position["batches"] and now != then:
            raise CheckpointError(
                f"{name}: was saved after {position['batches']} of {then['batches_per_epoch']} "
                f"batches of an epoch on {then['processes']} processes, now there are {length} on "
                f"{now['processes']}; resume with the same, or from an epoch_N.pth"
            )
        self._skip = position["batches"]

    @property
    def within_an_epoch(self) -> bool:
        """Whether the run is to go on after the beginning of an epoch."""
        return self._skip > 0

    def before_train_epoch(self, runner: Runner) -> None:
        """Leave out what was trained with."""
        skip, self._skip = self._skip, 0
        self._first_iteration = runner.iter - skip
        sampler = getattr(runner.train_dataloader, "batch_sampler", None)
        if isinstance(sampler, SeededBatchSampler):
            sampler.skip = skip
            sampler.epoch = runner.epoch  # also where a config has no DistSamplerSeedHook
        elif skip:
            raise CheckpointError(
                f"{runner._load_from}: was saved in the middle of an epoch, and this data loader "
                "cannot begin there; resume from an epoch_N.pth"
            )

    def after_train_epoch(self, runner: Runner) -> None:
        """What is saved from here on, as at a validation, is of no epoch's middle."""
        self._first_iteration = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what the model draws: dropout, sampled boxes."""
        seed_all(runner.seed or 0, runner.iter, get_rank())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Say in the checkpoint where it stands in its epoch."""
        meta = checkpoint["meta"]
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return
        inside = self._first_iteration is not None and meta["epoch"] == runner.epoch
        meta[POSITION] = {
            "batches": meta["iter"] - self._first_iteration if inside else 0,
            "processes": get_world_size(),
            "batches_per_epoch": len(runner.train_dataloader),
        }


class MissedValidation(Hook):
    """Makes up for the validation that was due when the checkpoint of a resumed run was saved.

    Checkpoints are saved before it, and mmengine goes on after it: the schedulers that look at its
    metrics (``ReduceOnPlateauLR``) and the best checkpoint would miss one.

    Args:
        exact: The hook of the same run.
    """

    priority = "LOWEST"  # when the other hooks are ready for a validation

    def __init__(self, exact: ExactResume) -> None:
        self._exact = exact

    def before_train(self, runner: Runner) -> None:
        """Validate, if the uninterrupted run would have done so at this point."""
        loop = runner.train_loop
        if not runner._resume or runner.val_loop is None or self._exact.within_an_epoch:
            return
        if isinstance(loop, EpochBasedTrainLoop):
            done, end = loop.epoch, loop.max_epochs
        elif isinstance(loop, IterBasedTrainLoop):
            done, end = loop.iter, loop.max_iters
        else:
            return
        loop._decide_current_val_interval()
        if done >= max(loop.val_begin, 1) and (done % loop.val_interval == 0 or done == end):
            runner.logger.info("validating first, which was due when the checkpoint was saved")
            runner.val_loop.run()
