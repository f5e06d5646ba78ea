"""Where a run stands, in its checkpoints: what makes a resumed run go on as if it had not ended.

Beside what mmengine saves, a checkpoint says after how many batches of how many images on how many
processes it was saved, which images the last of them was and what came out for them, and holds
what hooks and modules keep in plain attributes (:mod:`.hook_state`). From there

- a run goes on in the middle of an epoch, or of a loop of iterations, passing over indices and not
  reading images;
- what cannot be exact, since the data would be divided in another way, is refused;
- the last batch is drawn again and compared: where it comes out otherwise (another data set, a
  transform with a cache), the log says that the run goes on, and not to the bit;
- the validation that was due when the checkpoint was saved is made up for.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.structures import BaseDataElement

from ..checkpoint import CheckpointError
from .hook_state import HeldState
from .seeding import Draw, SeededBatchSampler, SeededDataset, own_generators, seed_all, seed_own

POSITION = "position"
"""Key in a checkpoint's ``meta``."""

HELD = "held"
"""Key in a checkpoint: the plain state of hooks and modules, by rank."""

_LOOKED_AT = 4096
"""Values of an array that go into its digest."""


def digest(batch: Any) -> int:
    """A checksum of the arrays in a batch, of every so many of their values.

    An augmentation changes most of an image, so a sample tells; it takes microseconds.
    """
    value = 0
    for array in _arrays(batch):
        flat = array.reshape(-1)
        flat = np.ascontiguousarray(flat[:: max(1, flat.size // _LOOKED_AT)])
        value = zlib.crc32(flat.tobytes(), zlib.crc32(repr((array.shape, value)).encode()))
    return value


def _arrays(node: Any) -> Iterator[np.ndarray]:
    if isinstance(node, torch.Tensor):
        node = node.detach().cpu()
        yield (node.float() if node.dtype == torch.bfloat16 else node).numpy()
    elif isinstance(node, np.ndarray) and node.dtype != object:
        yield node
    elif isinstance(node, BaseDataElement):  # boxes and labels
        yield from _arrays([value for _, value in sorted(node.items(), key=lambda item: item[0])])
    elif isinstance(node, dict):
        yield from _arrays([node[key] for key in sorted(node, key=str)])
    elif isinstance(node, (list, tuple)):
        for inner in node:
            yield from _arrays(inner)
    elif hasattr(node, "tensor"):  # mmdet's boxes
        yield from _arrays(node.tensor)


class ExactResume(Hook):
    """Seeds every step, writes where a run stands into its checkpoints, and goes on from there."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._skip = 0  # batches of the epoch that the run goes on in
        self._first_iteration: int | None = None  # of the current epoch; None between epochs
        self._held: HeldState | None = None
        self._held_before: dict[str, Any] | None = None  # what a checkpoint has for this rank
        self._gathered: list[dict[str, Any]] | None = None  # the state of all ranks, just now
        self._before_validation: dict[str, Any] | None = None
        self._generators: list[Any] = []  # of the model's own
        self._batch: dict[str, Any] = {}  # the one in training
        self._to_compare: dict[str, Any] | None = None

    # -- resuming --------------------------------------------------------------------------

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Learn where a checkpoint stands.

        Raises:
            CheckpointError: That is not known, or the data is divided in another way now, or the
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
                f"{name}: has no state of the {' or '.join(lacking)} (a best_*.pth never "
                "has); resume from an epoch_N.pth or iter_N.pth, or start a new training "
                "from its weights: --cfg-options load_from="
            )
        held = checkpoint.get(HELD) or [{}]
        self._held_before = held[get_rank() if len(held) == get_world_size() else 0]
        position = meta.get(POSITION)
        if position is None:
            self._of_mmengine(runner, meta, name)
            return
        self._to_compare = position["last_batch"]
        now = _division(runner)
        then = {key: position[key] for key in now}
        if (then["batches_per_epoch"] is None) != (now["batches_per_epoch"] is None):
            kinds = ["iterations", "epochs"]
            if then["batches_per_epoch"] is None:
                kinds.reverse()
            raise CheckpointError(
                f"{name}: was saved by a training loop of {kinds[1]}, but the config has "
                f"one of {kinds[0]}; start a new training from its weights: --cfg-options "
                "load_from="
            )
        if position["batches"] and now != then:
            raise CheckpointError(
                f"{name}: was saved after {position['batches']} {_told(then)}, now there are "
                f"{_told(now)}; resume with the same, {_or_else(now)}"
            )
        if now["batches_per_epoch"] is not None:
            self._skip = position["batches"]

    def _of_mmengine(self, runner: Runner, meta: dict[str, Any], name: str) -> None:
        """Take a checkpoint that does not say where it stands, if it is of an epoch's end."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            batches = meta["iter"] - meta["epoch"] * len(runner.train_dataloader)
            if batches and name.rpartition("/")[2].startswith("iter_"):
                raise CheckpointError(
                    f"{name}: was saved in the middle of epoch {meta['epoch'] + 1} and does "
                    "not say where; resume from an epoch_N.pth"
                )

    @property
    def within_an_epoch(self) -> bool:
        """Whether the run is to go on after the beginning of an epoch."""
        return self._skip > 0

    def begin(self, runner: Runner) -> None:
        """Note what is held from now on, and restore what a checkpoint held."""
        self._held = HeldState(runner)
        if self._held_before:
            self._held.restore(self._held_before)
        self._generators = own_generators(list(_unwrapped(runner.model).modules()))

    def forget(self) -> None:
        """Let go of the run: a Runner must be gone when its process group is left."""
        self._held, self._generators = None, []

    def before_train_epoch(self, runner: Runner) -> None:
        """Leave out what was trained with."""
        skip, self._skip = self._skip, 0
        self._first_iteration = runner.iter - skip
        sampler = getattr(runner.train_dataloader, "batch_sampler", None)
        if self._to_compare and self._comes_out_again(runner):
            self._to_compare = None  # or a hook has still to exchange the pipeline
        if not isinstance(sampler, SeededBatchSampler):
            if skip:
                raise CheckpointError(
                    f"{runner._load_from}: was saved in the middle of an epoch, and this data "
                    "loader cannot start there; resume from an epoch_N.pth"
                )
        elif not sampler.iterations:
            sampler.skip = skip
            sampler.set_epoch(runner.epoch)  # also where a config has no DistSamplerSeedHook
        elif runner.iter:
            loop = runner.train_loop
            loop.dataloader_iterator = _Passed(loop.dataloader_iterator, runner.iter)

    def _comes_out_again(self, runner: Runner) -> bool:
        """Whether the last batch of the run before comes out as it did; rank 0 has it."""
        if get_rank() != 0 or self._to_compare is None:
            return True
        loader = runner.train_dataloader
        if not isinstance(loader.dataset, SeededDataset):
            return True
        draws = [Draw(_index(index), tuple(key)) for index, key in self._to_compare["draws"]]
        try:
            batch = loader.collate_fn([loader.dataset[draw] for draw in draws])
        except (IndexError, KeyError, FileNotFoundError):  # a data set that has become smaller
            return False
        return digest(batch) == self._to_compare["digest"]

    # -- training --------------------------------------------------------------------------

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what the model draws: dropout, sampled boxes."""
        if self._to_compare:
            if not self._comes_out_again(runner):
                runner.logger.warning(
                    "not to the bit: the last batch before the interruption is different now. "
                    "The data changed, or a transform keeps state between images (e.g. the "
                    "caches of CachedMosaic and CachedMixUp)"
                )
            self._to_compare = None
        self._before_validation = self._gathered = None
        sampler = getattr(runner.train_dataloader, "batch_sampler", None)
        given = sampler.given if isinstance(sampler, SeededBatchSampler) else None
        self._batch = {}
        if given and get_rank() == 0:
            draws = [[_index(draw.index), list(draw.key)] for draw in given.popleft()]
            self._batch = {"iter": runner.iter + 1, "draws": draws, "digest": digest(data_batch)}
        key = (runner.seed or 0, runner.iter, get_rank())
        seed_all(*key)
        seed_own(self._generators, *key)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Gather what the ranks hold, where a checkpoint is about to be saved."""
        for hook in _checkpoint_hooks(runner, by_epoch=False):
            if hook.every_n_train_iters(runner, hook.interval, hook.save_begin) or (
                hook.save_last and hook.is_last_train_iter(runner)
            ):
                self.gather(runner)
                return

    def after_train_epoch(self, runner: Runner) -> None:
        """What is saved from here on, as at a validation, is of no epoch's middle."""
        self._first_iteration = None
        for hook in _checkpoint_hooks(runner, by_epoch=True):
            if hook.every_n_epochs(runner, hook.interval, hook.save_begin) or (
                hook.save_last and hook.is_last_train_epoch(runner)
            ):
                self.gather(runner)
                return

    def before_val_epoch(self, runner: Runner) -> None:
        """Keep what a checkpoint saved in a validation must hold: the run resumed repeats that."""
        if self._held is None:  # no training
            return
        self.gather(runner)
        self._before_validation = {HELD: self._gathered}
        if runner.param_schedulers is not None:
            self._before_validation["param_schedulers"] = _states(runner.param_schedulers)

    # -- saving ----------------------------------------------------------------------------

    def gather(self, runner: Runner) -> None:
        """Have the plain state of all ranks at hand for a checkpoint; all ranks call it.

        A checkpoint is saved by rank 0 alone.
        """
        if self._held is not None:
            self._gathered = all_gather_object(self._held.state())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint where it stands."""
        meta = checkpoint["meta"]
        if self._before_validation is not None:
            kept = self._before_validation
            checkpoint.update({key: kept[key] for key in kept if key in (HELD, *checkpoint)})
        elif self._held is not None:
            checkpoint[HELD] = self._gathered or [self._held.state()]
        if not isinstance(runner.train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            return
        division = _division(runner)
        if division["batches_per_epoch"] is None:
            batches = meta["iter"]
        else:
            inside = self._first_iteration is not None and meta["epoch"] == runner.epoch
            batches = meta["iter"] - self._first_iteration if inside else 0
        last = self._batch if self._batch.get("iter") == meta["iter"] else None
        meta[POSITION] = {"batches": batches, "last_batch": last, **division}


class MissedValidation(Hook):
    """Makes up for the validation that was due when the checkpoint of a resumed run was saved.

    Checkpoints are saved before it, and mmengine goes on after it: the schedulers that look at its
    metrics (``ReduceOnPlateauLR``), the hooks that do and the best checkpoint would miss one.

    Args:
        exact: The hook of the same run.
    """

    priority = "LOWEST"  # when the other hooks are ready for a validation

    def __init__(self, exact: ExactResume) -> None:
        self._exact = exact

    def before_train(self, runner: Runner) -> None:
        """Validate, if the uninterrupted run would have done so at this point."""
        self._exact.begin(runner)
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
            runner.logger.info(
                "validating first: a validation was due when the checkpoint was saved"
            )
            runner.val_loop.run()


class _Passed:
    """The batches of a loop of iterations, of which the first so many need not be there.

    mmengine asks for all that a resumed run was trained with, and throws them away.
    """

    def __init__(self, batches: Iterator[Any], passed: int) -> None:
        self._batches, self._passed = batches, passed

    def __iter__(self) -> _Passed:
        return self

    def __next__(self) -> Any:
        if self._passed:
            self._passed -= 1
            return None
        return next(self._batches)


def _division(runner: Runner) -> dict[str, Any]:
    """How the data is divided into batches."""
    loader = runner.train_dataloader
    of_iterations = isinstance(runner.train_loop, IterBasedTrainLoop)
    sampler = getattr(loader, "batch_sampler", None)
    return {
        "batches_per_epoch": None if of_iterations else len(loader),
        "batch_size": sampler.batch_size if isinstance(sampler, SeededBatchSampler) else None,
        "processes": get_world_size(),
    }


def _told(division: dict[str, Any]) -> str:
    of, size = division["batches_per_epoch"], division["batch_size"]
    epoch = "" if of is None else f" and {of} batches in an epoch"
    return f"batches of {size} images on {division['processes']} processes{epoch}"


def _or_else(division: dict[str, Any]) -> str:
    if division["batches_per_epoch"] is None:
        return "or start a new training from its weights: --cfg-options load_from="
    return "or from an epoch_N.pth"


def _index(index: Any) -> Any:
    """An index as a checkpoint may hold it, and back."""
    return tuple(map(int, index)) if isinstance(index, (list, tuple)) else int(index)


def _checkpoint_hooks(runner: Runner, by_epoch: bool) -> list[CheckpointHook]:
    return [h for h in runner.hooks if isinstance(h, CheckpointHook) and h.by_epoch is by_epoch]


def _states(schedulers: Any) -> Any:
    if isinstance(schedulers, dict):
        return {name: _states(inner) for name, inner in schedulers.items()}
    return copy.deepcopy([scheduler.state_dict() for scheduler in schedulers])


def _unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)
