"""Collapsed filters brought back at the start of a training of mmengine.

``ReviveFilters`` keeps what the network computes, ``LiftGamma`` does not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast, broadcast_object_list, get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from .criteria import THRESHOLD, check_thresholds
from .layers import norm_modules
from .lifting import GAMMA, lift_gamma
from .lifting import summary as lift_summary
from .reviving import TOLERANCE, ReviveError, revive, summary


class ReviveFilters(Hook):
    """Revives collapsed filters before the first iteration: ``dict(type='ReviveFilters')``.

    What the network computes stays the same (:func:`.reviving.revive`); what was revived and what
    was left, and why, stands in the log. A resumed training goes on as it is.

    Images come from the training data, prepared as for a training step. In a distributed training
    rank 0 revives and the others get its weights. Where filters are revived later, too, the
    optimizer forgets what it had collected for the weights that changed (momentum, Adam's moments),
    and the average of mmengine's ``EMAHook`` takes these weights over.

    With ``PsBNHook(shift=True)`` filters are revived first.

    Args:
        interval: Revive again at the start of every so many epochs; 0: never.
        epochs: Revive again at the start of these epochs, counted from 0, as where a schedule
            restarts.
        images: How many to take; 8 of 800x1333 need the memory of a training step of 8.
        threshold, tolerance, seed: As of :func:`.reviving.revive`.
    """

    priority = "ABOVE_NORMAL"

    def __init__(
        self,
        interval: int = 0,
        epochs: Sequence[int] = (),
        images: int = 8,
        threshold: float = THRESHOLD,
        tolerance: float = TOLERANCE,
        seed: int = 0,
    ) -> None:
        check_thresholds(threshold, 0)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 0:
            raise ReviveError(f"interval is a number of epochs, 0 for never, got {interval!r}")
        if any(isinstance(e, bool) or not isinstance(e, int) or e < 1 for e in epochs):
            raise ReviveError(f"epochs are whole numbers from 1 on, got {list(epochs)}")
        if isinstance(images, bool) or not isinstance(images, int) or images < 2:
            raise ReviveError(f"images is at least 2, got {images!r}")
        self.interval, self.epochs, self.images = interval, frozenset(epochs), images
        self.seed = seed
        self.options: dict[str, Any] = {
            "threshold": threshold,
            "tolerance": tolerance,
            "seed": seed,
        }

    def before_train(self, runner: Any) -> None:
        if runner.iter == 0:
            self._revive(runner)

    def before_train_epoch(self, runner: Any) -> None:
        epoch = runner.epoch
        due = epoch in self.epochs or (self.interval and epoch % self.interval == 0)
        if epoch > 0 and due:
            self._revive(runner)

    def _revive(self, runner: Any) -> None:
        model = unwrapped(runner.model)
        said: list[Any] = [None, None]  # the summary, or an error
        with handed_on(runner, model):
            if get_rank() == 0:
                try:
                    with undisturbed(self.seed):
                        record = revive(model, self._call(runner, model), **self.options)
                    said[0] = summary(record)
                except Exception as error:
                    if get_world_size() == 1:
                        raise
                    said[1] = f"{type(error).__name__}: {error}"
            broadcast_object_list(said, 0)
            if said[1] is not None:  # on all ranks, or the others would wait
                raise ReviveError(f"rank 0 could not revive: {said[1]}")
            if get_world_size() > 1:
                for tensor in (*model.parameters(), *model.buffers()):
                    broadcast(tensor.data, 0)
        runner.logger.info(f"ReviveFilters: {said[0]}")

    def _call(self, runner: Any, model: Any) -> Any:
        """A function that calls the model with training images, as a training step does."""
        loader = runner.train_dataloader
        dataset = loader.dataset
        count = min(self.images, len(dataset))
        order = torch.randperm(len(dataset))[:count].tolist()
        data: Any = loader.collate_fn([dataset[i] for i in order])
        data = model.data_preprocessor(data, True)

        def run(mode: str) -> Any:
            return lambda m: m._run_forward(data, mode=mode)

        modes = [run("loss")]
        # The network's own outputs say more than a loss, where there are any.
        mode, model_mode = run("tensor"), model.training
        with suppress(Exception), torch.no_grad():
            model.eval()
            mode(model)
            modes.insert(0, mode)
        model.train(model_mode)
        return lambda m: [call(m) for call in modes]


class LiftGamma(Hook):
    """Makes gamma large again before a fine-tuning: ``dict(type='LiftGamma', every=True)``.

    Before the first iteration, behind the loading of weights; not after a resume. **What the
    backbone computes changes** (:func:`.lifting.lift_gamma`), so what reads it should be trained
    anew, as neck and head of a new task are. The log says what was lifted, and warns of layers that
    do not normalize by batch statistics (``norm_eval=True``), whose running ones do not fit then.

    Args:
        module: The part of the model that is lifted; '' for all of it.
        every, gamma, threshold: As of :func:`.lifting.lift_gamma`.

    Raises:
        ReviveError: The model has no such part.
    """

    priority = "ABOVE_NORMAL"

    def __init__(
        self,
        module: str = "backbone",
        every: bool = False,
        gamma: float = GAMMA,
        threshold: float = THRESHOLD,
    ) -> None:
        self.module = module
        self.options: dict[str, Any] = {"every": every, "gamma": gamma, "threshold": threshold}

    def before_train(self, runner: Any) -> None:
        if runner.iter > 0:
            return
        model = unwrapped(runner.model)
        try:
            part = model.get_submodule(self.module)
        except AttributeError:
            names = ", ".join(name for name, _ in model.named_children())
            raise ReviveError(
                f"LiftGamma: the model has no {self.module!r}; it has {names}: name one of them "
                "with module=..., or '' for the whole model"
            ) from None
        with handed_on(runner, model):
            record = lift_gamma(part, **self.options)
        runner.logger.info(f"LiftGamma: {self.module or 'model'}: {lift_summary(record)}")
        self._warn(runner, model, part)

    @staticmethod
    def _warn(runner: Any, model: nn.Module, part: nn.Module) -> None:
        mode = model.training
        model.train()  # as the loop will do
        norms: dict[str, Any] = norm_modules(part)
        still = [k for k, norm in norms.items() if norm.weight.requires_grad and not norm.training]
        model.train(mode)
        if still:
            runner.logger.warning(
                f"LiftGamma: {len(still)} layers, as {still[0]}, normalize by running statistics, "
                "which do not fit any more: set norm_eval=False"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel.

    Raises:
        ReviveError: It is within another wrapper, whose parameters are not all here.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    if is_model_wrapper(model):
        raise ReviveError(
            f"filters cannot be revived within {type(model).__name__}: revive the checkpoint "
            "before (tools/revive_checkpoint.py)"
        )
    return model


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Random numbers of its own; those of the training go on as if nothing had been drawn."""
    # The pipelines draw from numpy's global generator.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def handed_on(runner: Any, model: nn.Module) -> Iterator[None]:
    """What changes within it, optimizers forget and averages of ``EMAHook`` take over."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    yield
    changed = {
        name: mask
        for name, tensor in tensors.items()
        if (mask := tensor.detach() != before[name]).any()
    }
    forget(runner.optim_wrapper, {id(tensors[name]): mask for name, mask in changed.items()})
    for hook in runner.hooks:
        if isinstance(hook, EMAHook) and hasattr(hook, "ema_model"):
            take_over(hook.ema_model.module, tensors, changed)


def forget(optim_wrapper: Any, changed: dict[int, Tensor]) -> None:
    """Set to 0 what optimizers have collected for some elements.

    Args:
        optim_wrapper: Of the Runner.
        changed: id of a parameter -> which of its elements.
    """
    wrappers = optim_wrapper.values() if hasattr(optim_wrapper, "values") else [optim_wrapper]
    for wrapper in wrappers:
        for param, state in wrapper.optimizer.state.items():
            mask = changed.get(id(param))
            if mask is None:
                continue
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    value.masked_fill_(mask.to(value.device), 0)


@torch.no_grad()
def take_over(average: nn.Module, tensors: dict[str, Tensor], changed: dict[str, Tensor]) -> None:
    """Give an averaged model the weights that have changed."""
    theirs = dict(average.named_parameters()) | dict(average.named_buffers())
    for name, mask in changed.items():
        if name in theirs:
            old = theirs[name]
            old.copy_(torch.where(mask.to(old.device), tensors[name].to(old.device), old))
