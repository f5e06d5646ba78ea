"""A hook that shows, while a model trains, which of its filters collapse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ..decay.hook import AnchoredBiasDecay
from ..errors import PsbnError
from ..norm.hook import PsBNHook, decay_warnings, optimizers
from .backward import Watch
from .criteria import (
    INACTIVE_BELOW,
    THRESHOLD,
    MeasureError,
    check_thresholds,
    does,
)
from .flops import Flops
from .layers import norm_modules, read_filters, refuse_sharded
from .report import Report, measure, nearly_linear_line
from .trace import TraceError, Writer, read


class SparsityLoggerHook(Hook):
    """Measures the filters (:mod:`psbn_mmdet.collapse`) at an interval and shows them.

    - A line in the log and, at the same iteration, a point in every visualization
      backend: ``collapse/collapsed_percent``; by the forward and backward pass of that
      iteration ``collapse/stuck_percent``, ``collapse/idle_percent`` and
      ``collapse/carrying_percent``; of layers with a ReLU right behind
      ``collapse/inactive_percent`` and the mean ``collapse/activation_probability``; and
      how many filters have a gamma or bias that is ``collapse/not_finite`` (the
      percentages leave them out). With psBN or ``AnchoredBiasDecay`` also
      ``collapse/nearly_linear_layers``, those whose ReLU passes nearly everything. What
      is not known, as stuck before the first iteration, gets no point.
    - gamma, bias and state of every filter go into ``WORK_DIR/collapse.trace``
      (:mod:`psbn_mmdet.collapse.trace`), or ``collapse-1.trace``, ... where another run
      has one. A resumed run goes on in the same file, without a gap or a double. A
      record takes 11 bytes per filter: 290 kB for a ResNet-50.
    - At the end figures and an HTML page are drawn into the run's log folder.

    It measures before the first iteration, at the interval and after the last. gamma and
    bias are those after the iteration's step; the pass was made with those before it.
    Layers that are frozen are not told stuck or carrying.

    Where mmengine's ``EMAHook`` averages the weights, all this is of the weights that
    are trained, which weight decay acts on. Those that are evaluated and saved are
    the averaged ones: they are measured, too, as ``collapse/ema_collapsed_percent``
    and so on.

    Only rank 0 measures, on its share of the batch, with two synchronisations of the
    device. The training is not touched: weights come out equal to the bit with and
    without the hook. What cannot be written or drawn, as on a full disk, or measured,
    as the FLOPs of a model that wants more than images, gets a warning and ends no training.

    It warns of psBN layers whose beta is not decayed, which psBN needs to do
    anything; and, once they appear, of values that are not finite and of layers whose
    alpha makes ReLU pass nearly everything (:func:`.criteria.nearly_linear`).

    Args:
        interval: Iterations (or epochs) from one measurement to the next.
        by_epoch: Whether ``interval`` is in epochs.
        threshold: Of ``|gamma|``.
        inactive_below: Of the activation probability.
        input_size: (C, H, W) of an image: also log the FLOPs that removing the
            collapsed filters would save, at the start and at the end, of a model
            that can be called with images alone, or a detector of mmdet.
        figures: Whether to draw at the end.

    Raises:
        ValueError: A wrong interval or threshold; when training starts, a model
            without normalization layers.
    """

    priority = "LOW"  # after EMAHook, to see the averaged weights of this iteration

    def __init__(
        self,
        interval: int = 200,
        by_epoch: bool = False,
        threshold: float = THRESHOLD,
        inactive_below: float = INACTIVE_BELOW,
        input_size: tuple[int, int, int] | None = None,
        figures: bool = True,
    ) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be a whole number of at least 1, got {interval!r}")
        check_thresholds(threshold, inactive_below)
        self.interval = interval
        self.by_epoch = by_epoch
        self.thresholds = threshold, inactive_below
        self.input_size = input_size and tuple(input_size)
        self.figures = figures

    def before_train(self, runner: Runner) -> None:
        refuse_sharded(runner.model)  # on every rank, or the others would wait for rank 0
        if not is_main_process():
            return
        model = _unwrapped(runner.model)
        self._warned: set[str] = set()
        self._writer: Writer | None = None
        self._last: int | None = None  # iteration that was measured
        self._watch: Watch | None = None
        for warning in _decay_warnings(model, runner):
            runner.logger.warning(warning)
        start = self._report(runner)
        modules: dict[str | None, Any] = dict(model.named_modules())
        self._convs = [modules.get(layer.conv) if layer.conv else None for layer in start.layers]
        self._lifted = {x.name for x in start.layers if x.alpha is not None} | _anchored(runner)
        self._measured = {"": (start, norm_modules(model).values())}
        if (averaged := _averaged(runner)) is not None:
            self._measured["ema_"] = start, norm_modules(averaged).values()
            runner.logger.info(
                "EMAHook averages the weights: collapse/ema_... is of the averaged ones, which are "
                "evaluated and saved; all else is of the weights that are trained"
            )
        self._open_trace(runner, start)
        # Also after a resume: the last record may have been lost with the machine.
        if (not self.by_epoch and runner.iter % self.interval == 0) or runner.iter == 0:
            self._measure(runner, runner.iter)
        runner.logger.info(f"before training:\n{start.summary()}")

    def before_train_iter(self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        if not is_main_process():
            return
        if self.by_epoch:
            last = self.end_of_epoch(runner.train_dataloader, batch_idx)
            due = last and self.every_n_epochs(runner, self.interval)
        else:
            due = self.every_n_train_iters(runner, self.interval)
        if due or self.is_last_train_iter(runner):
            self._watch = Watch(norm_modules(_unwrapped(runner.model)).values())
            self._watch.start()

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if not is_main_process():
            return
        if self._watch is not None:
            self._watch.stop()
        if not self.by_epoch and self.every_n_train_iters(runner, self.interval):
            self._measure(runner, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch and is_main_process() and self.every_n_epochs(runner, self.interval):
            self._measure(runner, runner.iter)

    def after_train(self, runner: Runner) -> None:
        if not is_main_process():
            return
        self._measure(runner, runner.iter)
        report = self._report(runner)
        runner.logger.info(f"after training:\n{report.summary()}")
        if self._writer is None:
            return
        with self._writing(runner):
            self._writer.close()
        if self.figures:
            self._draw(runner, self._writer.path, report.flops)

    def _report(self, runner: Runner) -> Report:
        """On the model as it is, with FLOPs if they are wanted and can be counted."""
        model = _unwrapped(runner.model)
        if self.input_size:
            try:
                return measure(model, self.input_size, *self.thresholds)
            except MeasureError as error:
                self._warn_once(runner, "flops", f"no FLOPs of the collapsed filters: {error}")
        return measure(model, None, *self.thresholds)

    def _open_trace(self, runner: Runner, report: Report) -> None:
        try:
            self._writer = Writer(runner.work_dir, report, runner.iter)
        except OSError as error:
            runner.logger.warning(f"no trace of the filters in this run: {error}")
            return
        runner.logger.info(f"the filters of this run go into {self._writer.path}")

    def _measure(self, runner: Runner, iteration: int) -> None:
        if iteration == self._last:
            return
        self._last = iteration
        told = None if self._watch is None else does(*self._watch.seen())
        self._watch = None
        scalars: dict[str, float] = {
            "iter": iteration
        }  # as LoggerHook: for trackers that know no steps
        lines = []
        for prefix, (layers, modules) in self._measured.items():
            gamma, bias, norm = read_filters(modules, None if prefix else self._convs)
            report = layers.at(gamma, bias, None if prefix else told)
            if self._writer and not prefix:
                seen = torch.cat([layer.does for layer in report.layers])
                with self._writing(runner):
                    self._writer.write(iteration, gamma, bias, norm, seen)
            self._warn_of(runner, iteration, report)
            values = _scalars(report, self._lifted)
            scalars.update({f"collapse/{prefix}{name}": v for name, v in values.items()})
            lines.append(("averaged weights: " if prefix else "") + _line(report))
        try:
            runner.visualizer.add_scalars(scalars, step=iteration)
        except OSError as error:
            self._warn_once(runner, "scalars", f"measures of collapse are not logged: {error}")
        runner.logger.info(f"collapse at iteration {iteration}: {'; '.join(lines)}")

    @contextmanager
    def _writing(self, runner: Runner) -> Iterator[None]:
        """A warning for what cannot be written to the trace, at the first of several failures."""
        try:
            yield
        except (OSError, TraceError) as error:
            self._warn_once(
                runner,
                "trace",
                f"the trace misses a record, and more until it can be written: {error}",
            )
        else:
            self._warned.discard("trace")

    def _warn_of(self, runner: Runner, iteration: int, report: Report) -> None:
        if report.totals["not_finite"]:
            name = next(row["name"] for row in report.rows if row["not_finite"])
            self._warn_once(
                runner,
                "not_finite",
                f"at iteration {iteration} {report.totals['not_finite']} of "
                f"{report.totals['filters']} filters (the first in {name}) have a gamma or bias "
                "that is not finite: the training has diverged",
            )
        if linear := report.nearly_linear_of(self._lifted):
            self._warn_once(
                runner,
                "nearly_linear",
                f"at iteration {iteration}: {nearly_linear_line(linear)}",
            )

    def _warn_once(self, runner: Runner, subject: str, text: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            runner.logger.warning(text)

    def _draw(self, runner: Runner, path: Path, flops: Flops | None) -> None:
        try:
            from .figures import write_figures
            from .page import write_page

            trace = dataclasses.replace(read(path), flops=flops)
            folder = Path(runner.log_dir, "collapse")
            write_figures(trace, folder)
            write_page({runner.experiment_name: trace}, folder / "collapse.html")
        except (ImportError, PsbnError, OSError) as error:  # nothing to lose a run for
            runner.logger.warning(f"no figures of the collapsed filters: {error}")
        else:
            runner.logger.info(f"figures of the collapsed filters: {folder}")


def _anchored(runner: Runner) -> set[str]:
    """Names of the layers whose bias an ``AnchoredBiasDecay`` of the run pulls toward its alpha."""
    handles = [
        handle for hook in runner.hooks if isinstance(hook, AnchoredBiasDecay)
        for handle in hook.anchored if handle
    ]  # fmt: skip
    return {name.rpartition(".")[0] for handle in handles for name in handle.names}


def _scalars(report: Report, lifted: Collection[str]) -> dict[str, float]:
    """What is logged of a report: name -> value; nothing that is not known.

    Args:
        report: It.
        lifted: The layers that have an alpha.
    """
    totals = report.totals
    names = ("collapsed", "stuck", "idle", "carrying", "inactive")
    keys = [*(f"{name}_percent" for name in names), "activation_probability", "not_finite"]
    # A NaN would make a line of scalars.json that is no JSON.
    scalars = {key: totals[key] for key in keys if math.isfinite(totals[key])}
    if lifted:
        scalars["nearly_linear_layers"] = len(report.nearly_linear_of(lifted))
    return scalars


def _line(report: Report) -> str:
    """The same for the log."""
    t = report.totals
    finite = t["filters"] - t["not_finite"]
    if not finite:
        return f"none of {t['filters']} filters has a finite gamma and bias"
    line = f"{t['collapsed_percent']:.2f}% of {finite} filters collapsed"
    if t["measured"]:
        line += f", {t['stuck_percent']:.2f}% stuck, {t['idle_percent']:.2f}% idle"
    if t["told"]:
        line += f", {t['inactive_percent']:.2f}% of {t['told']} with a ReLU right behind inactive"
    return line + (f", {t['not_finite']} not finite" if t["not_finite"] else "")


def _averaged(runner: Runner) -> nn.Module | None:
    """The model with the averaged weights of EMAHook, if the runner has one."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            return cast(nn.Module, hook.ema_model.module)
    return None


def _unwrapped(model: nn.Module) -> nn.Module:
    return cast(nn.Module, model.module) if is_model_wrapper(model) else model


def _decay_warnings(model: nn.Module, runner: Runner) -> Iterator[str]:
    if not any(isinstance(hook, PsBNHook) for hook in runner.hooks):  # which says it itself
        cfg = (getattr(runner, "cfg", None) or {}).get("optim_wrapper") or {}
        yield from decay_warnings(model, optimizers(runner), cfg)
