"""A hook that shows, while a model trains, which of its filters collapse."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ..norm.layers import PostShift
from .criteria import INACTIVE_BELOW, THRESHOLD, check_thresholds, count
from .layers import gather, norm_modules
from .report import measure
from .trace import FILE_NAME, TraceError, Writer, read


class SparsityLoggerHook(Hook):
    """Measures the filters (:mod:`psbn_mmdet.collapse`) at an interval and shows them.

    - The totals go into the log line and to every visualization backend, as
      ``collapsed_percent``, ``constant_percent``, ``inactive_percent`` and the
      mean ``activation_probability``.
    - gamma and bias of every filter go into ``WORK_DIR/collapse.trace``
      (:mod:`psbn_mmdet.trace`), before the first iteration, at the interval and
      after the last. A resumed run goes on in the same file, without a gap or a
      double. A record takes about 6 bytes per filter: 160 kB for a ResNet-50.
    - At the end figures and an HTML page are drawn into the run's log folder.

    Only rank 0 measures, with one synchronisation of the device. The training is
    not touched: weights come out equal to the bit with and without the hook.

    At the start it warns of psBN layers whose beta is not decayed, which psBN
    needs to do anything, and of layers that start with gamma = 0, as the last
    one of a residual block often does: they read as collapsed until they have
    moved, but they are not.

    Args:
        interval: Iterations (or epochs) from one measurement to the next.
        by_epoch: Whether ``interval`` is in epochs.
        threshold: Of |gamma|.
        inactive_below: Of the activation probability.
        input_size: (C, H, W) of an image: also log the FLOPs that removing the
            collapsed filters would save, at the start and at the end, if the
            model can be called with images alone, as most detectors can.
        figures: Whether to draw at the end.

    Raises:
        ValueError: A wrong interval or threshold; when training starts, a model
            without normalization layers.
    """

    priority = "NORMAL"  # before the logger, so that it prints what was measured

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
        if not is_main_process():
            return
        model = _unwrapped(runner.model)
        self._layers = norm_modules(model).values()
        for warning in [*_decay_warnings(model, runner), *_zero_gamma_warnings(model, runner.iter)]:
            runner.logger.warning(warning)
        report = measure(model, *self.thresholds, self.input_size)
        self._writer = Writer(Path(runner.work_dir, FILE_NAME), report, runner.iter)
        if self._writer.moved_to:
            runner.logger.info(
                f"the trace of another run was moved aside to {self._writer.moved_to}"
            )
        if runner.iter == 0:
            self._writer.write_norms(0, report)
        # Also after a resume: the last record may have been lost with the machine.
        if (not self.by_epoch and runner.iter % self.interval == 0) or runner.iter == 0:
            self._measure(runner, runner.iter)
        runner.logger.info(f"before training:\n{report.summary()}")

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if (
            not self.by_epoch
            and is_main_process()
            and self.every_n_train_iters(runner, self.interval)
        ):
            self._measure(runner, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch and is_main_process() and self.every_n_epochs(runner, self.interval):
            self._measure(runner, runner.iter)

    def after_train(self, runner: Runner) -> None:
        if not is_main_process():
            return
        self._measure(runner, runner.iter)
        report = measure(_unwrapped(runner.model), *self.thresholds, self.input_size)
        self._writer.write_norms(runner.iter, report)
        self._writer.close()
        runner.logger.info(f"after training:\n{report.summary()}")
        if self.figures:
            self._draw(runner)

    def _measure(self, runner: Runner, iteration: int) -> None:
        gamma, bias = gather(self._layers)
        self._writer.write(iteration, gamma, bias)
        found = count(gamma, bias, *self.thresholds)
        # mmengine averages what is named loss, time or grad_norm; these are not.
        for name in ("collapsed", "constant", "inactive"):
            percent = 100 * found[name] / found["filters"]
            runner.message_hub.update_scalar(f"train/{name}_percent", percent)
        runner.message_hub.update_scalar(
            "train/activation_probability", found["activation_probability"]
        )

    def _draw(self, runner: Runner) -> None:
        try:
            from .figures import write_figures
            from .page import write_page

            trace = read(self._writer.path)
            folder = Path(runner.log_dir, "collapse")
            write_figures(trace, folder)
            write_page({runner.experiment_name: trace}, folder / "collapse.html")
        except (ImportError, TraceError, OSError) as error:  # nothing to lose a run for
            runner.logger.warning(f"no figures of the collapsed filters: {error}")
        else:
            runner.logger.info(f"figures of the collapsed filters: {folder}")


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _optimizers(runner: Runner) -> Iterator[torch.optim.Optimizer]:
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if hasattr(wrapper, "values") else [wrapper]
    for each in wrappers:
        yield each.optimizer


def undecayed_betas(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the trained ``beta`` of psBN layers that an optimizer updates without decay."""
    decay = {
        id(p): group.get("weight_decay", 0)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return [
        f"{name}.beta" if name else "beta"
        for name, module in model.named_modules()
        if isinstance(module, PostShift)
        and module.beta.requires_grad
        and decay.get(id(module.beta)) == 0
    ]


def _decay_warnings(model: nn.Module, runner: Runner) -> Iterator[str]:
    cfg = (getattr(runner, "cfg", None) or {}).get("optim_wrapper") or {}
    culprits: dict[str, list[str]] = {}
    for optimizer in _optimizers(runner):
        for name in undecayed_betas(model, optimizer):
            culprits.setdefault(responsible_key(name, cfg), []).append(name)
    for key, names in culprits.items():
        yield (
            f"psBN does nothing without weight decay, and beta of {len(names)} layers "
            f"(as {names[0]}) has none: {key}"
        )


def responsible_key(name: str, optim_wrapper: Mapping[str, Any]) -> str:
    """What in a config takes weight decay from the ``beta`` of a normalization layer.

    The order of the rules is that of mmengine's DefaultOptimWrapperConstructor.

    Args:
        name: Of the parameter.
        optim_wrapper: The config of that name.
    """
    constructor = optim_wrapper.get("constructor", "DefaultOptimWrapperConstructor")
    if constructor != "DefaultOptimWrapperConstructor":
        return f"see the param groups that optim_wrapper.constructor={constructor!r} makes"
    if not (optim_wrapper.get("optimizer") or {}).get("weight_decay"):
        return "set optim_wrapper.optimizer.weight_decay (the paper: 5e-4, on COCO 1e-4)"
    rules = optim_wrapper.get("paramwise_cfg") or {}
    keys = rules.get("custom_keys") or {}
    for key in sorted(sorted(keys), key=len, reverse=True):
        if key in name:
            return f"mend decay_mult in optim_wrapper.paramwise_cfg.custom_keys[{key!r}]"
    for rule in ("norm_decay_mult", "flat_decay_mult"):
        if rules.get(rule) is not None:
            return f"remove optim_wrapper.paramwise_cfg.{rule}={rules[rule]}"
    return "see the param groups of the optimizer"


def _zero_gamma_warnings(model: nn.Module, iteration: int) -> Iterator[str]:
    if iteration > 0:
        return
    zero = [name for name, m in norm_modules(model).items() if not m.weight.detach().any()]
    if zero:
        yield (
            f"{len(zero)} layers (as {zero[0]}) start with gamma = 0 in all filters, as the last "
            "one of a residual block by zero_init_residual: they read as collapsed at step 0, but "
            "are not"
        )
