"""One run of the study: rounds of SGD with restarted cosine annealing, on mmengine's Runner.

The paper (section 3.1) trains with momentum 0.9, batch 128, weight decay 5e-4
and a learning rate that falls from 0.1 to 0 along a cosine within each round of
100 epochs. What it leaves open, and what is done here:

- the learning rate falls at every iteration, and momentum is kept over a
  restart, as in SGDR, which it cites;
- weight decay is on every parameter, gamma and beta included unless ``norm_decay=False``: it
  is what takes non-trainable filters to 0 (section 4.3);
- a last batch that is not full is dropped;
- the subset of images and random labels are the same for all seeds of an
  experiment; a seed decides the initial weights, the order and the augmentation.

Everything random in an iteration follows from the seed and its number, so a run
that was killed goes on exactly, to the bit, from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from psbn_mmdet.checkpoint import CheckpointError, load_weights
from psbn_mmdet.checkpoint import load as load_checkpoint
from psbn_mmdet.collapse import THRESHOLD, gather, measure, norm_modules
from psbn_mmdet.collapse.backward import pull_back
from psbn_mmdet.collapse.criteria import does
from psbn_mmdet.collapse.hook import SparsityLoggerHook
from psbn_mmdet.collapse.lifting import lift_gamma
from psbn_mmdet.collapse.reviving import revive
from psbn_mmdet.norm import lift
from studies.runs import RunError, check_settings, write_json

from .data import (
    Batches,
    DataError,
    Split,
    balanced_subset,
    fingerprint,
    load,
    normalise,
    random_labels,
    scaled,
)
from .pruning import cut, size_of
from .settings import Settings

DATA_SEED = 0
"""Of the subset of images and the random labels, for all runs alike."""

MEASURED_IMAGES = 256
"""Test images on whose loss it is measured what each filter does."""

CHECKPOINT_SECONDS = 120.0
"""How much work a kill may cost; writing takes some milliseconds."""


class Classifier(BaseModel):
    """A network and its cross-entropy, as mmengine's Runner wants them."""

    def __init__(self, network: nn.Module, amp: bool = False) -> None:
        super().__init__()
        self.amp = amp
        # Channels last: ResNet-20 steps are a sixth faster so on a CPU.
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor]:
        """(N, 3, S, S) -> logits (N, 10), or ``{'loss': ...}`` for ``mode='loss'``."""
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.network(inputs)
        logits = logits.float()
        if mode != "loss":
            return logits
        assert labels is not None
        return {"loss": F.cross_entropy(logits, labels)}


class RoundsTrainLoop(IterBasedTrainLoop):
    """Takes batch i for iteration i.

    mmengine's own loop, resumed, draws all earlier batches once more.
    """

    def run(self) -> nn.Module:
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        while self._iter < self._max_iters:
            self.run_iter(self.dataloader.dataset[self._iter])
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model


class RoundsHook(Hook):
    """Measures and keeps a checkpoint at the end of each round; writes progress and the last state.

    ``WORK_DIR/round_K.pth`` stay, ``last.pth`` is replaced every
    ``checkpoint_seconds``. What was measured so far travels in the checkpoints.
    """

    priority = "VERY_LOW"  # behind the scheduler: a checkpoint holds the next iteration's lr

    def __init__(self, settings: Settings, test: Split, checkpoint_seconds: float) -> None:
        self.settings, self.test = settings, test
        self.checkpoint_seconds = checkpoint_seconds
        self.rounds: list[dict[str, Any]] = []
        self.epoch_losses: list[float] = []
        self.loss_sum: Tensor | float = 0.0

    def before_train(self, runner: Runner) -> None:
        self._saved = self._told = time.monotonic()
        self._started_at = runner.iter
        self._began = time.monotonic()

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        s = self.settings
        if s.shuffle_before and runner.iter == (s.shuffle_before - 1) * s.iterations_per_round:
            shuffle_parameters(runner.model, s.seed)
            runner.optim_wrapper.optimizer.state.clear()  # momentum of other weights
            runner.logger.info("the entries of every parameter tensor were shuffled")
        if s.lift and runner.iter == 0:
            lift_gamma(runner.model.network, every=s.lift == "every")
        if s.revive and runner.iter % s.iterations_per_round == 0:
            self._revive(runner)

    def _revive(self, runner: Runner) -> None:
        """Give collapsed filters a new life, before a round; momentum of other weights goes."""
        network = runner.model.network
        images = runner.train_dataloader.dataset[runner.iter]["inputs"]
        before = [parameter.detach().clone() for parameter in network.parameters()]
        revive(network, images, seed=self.settings.seed)
        state = runner.optim_wrapper.optimizer.state
        for parameter, old in zip(network.parameters(), before, strict=True):
            if "momentum_buffer" in state.get(parameter, {}):
                state[parameter]["momentum_buffer"][parameter != old] = 0
        runner.model.train()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        s, done = self.settings, runner.iter + 1
        # On the device, so that nothing waits for it.
        self.loss_sum = self.loss_sum + outputs["loss"].detach().double()
        if done % s.iterations_per_epoch == 0:
            self.epoch_losses.append(float(self.loss_sum) / s.iterations_per_epoch)
            self.loss_sum = 0.0
            if not math.isfinite(self.epoch_losses[-1]):
                runner.logger.warning(f"the loss is {self.epoch_losses[-1]} at iteration {done}")
        if done % s.iterations_per_round == 0:
            self._end_round(runner, done // s.iterations_per_round)
        elif time.monotonic() - self._saved >= self.checkpoint_seconds:
            self._save(runner, "last.pth")
        if time.monotonic() - self._told >= 2 or done == s.iterations:
            self._tell(runner, done)

    def _end_round(self, runner: Runner, number: int) -> None:
        s = self.settings
        network = runner.model.network
        row: dict[str, Any] = {"round": number, "train_loss": self.epoch_losses[-1]}
        row["epoch_losses"] = self.epoch_losses[-s.epochs :]
        row["accuracy"] = accuracy(network, self.test)
        if s.norm != "none":
            row.update(collapse_of(network, self.test))
            if s.evaluate_pruned:
                row["pruned_accuracy"] = pruned_accuracy(network, self.test)
        runner.model.train()
        self.rounds.append(row)
        shown = {k: v for k, v in row.items() if k != "epoch_losses"}
        runner.logger.info("end of " + json.dumps(shown))
        self._save(runner, f"round_{number}.pth")
        Path(runner.work_dir, "last.pth").unlink(missing_ok=True)

    def _save(self, runner: Runner, name: str) -> None:
        runner.save_checkpoint(runner.work_dir, name + ".new", by_epoch=False)
        os.replace(Path(runner.work_dir, name + ".new"), Path(runner.work_dir, name))
        self._saved = time.monotonic()

    def _tell(self, runner: Runner, done: int) -> None:
        now = time.monotonic()
        progress = {
            "iteration": done,
            "iterations": self.settings.iterations,
            "iterations_of_process": done - self._started_at,
            "seconds_of_process": now - self._began,
        }
        write_json(Path(runner.work_dir, "progress.json"), progress)
        self._told = now

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["study"] = {
            "rounds": self.rounds,
            "epoch_losses": self.epoch_losses,
            "loss_sum": float(self.loss_sum),
        }
        # The log's histories grow with the run and only feed its printed averages.
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        study = checkpoint["study"]
        self.rounds, self.epoch_losses = list(study["rounds"]), list(study["epoch_losses"])
        self.loss_sum = study["loss_sum"]


@torch.no_grad()
def shuffle_parameters(model: nn.Module, seed: int) -> None:
    """Permute the entries within each parameter tensor (the paper, section 3.6)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))


@torch.no_grad()
def probabilities(network: nn.Module, split: Split, batch_size: int = 500) -> Tensor:
    """Softmax of all images of a split, (N, 10), in evaluation mode."""
    network.eval()
    device = next(network.parameters()).device
    parts = []
    for images in split.images.split(batch_size):
        inputs = normalise(images.to(device)).contiguous(memory_format=torch.channels_last)
        parts.append(network(inputs).softmax(1))
    return torch.cat(parts).cpu()


def _percent_right(scores: Tensor, labels: Tensor) -> float:
    return 100 * (scores.argmax(1) == labels).double().mean().item()


def accuracy(network: nn.Module, split: Split) -> float:
    """Top-1 in percent; leaves the network in evaluation mode."""
    return _percent_right(probabilities(network, split), split.labels)


def totals_on(network: nn.Module, loss: Callable[[nn.Module], Any]) -> dict[str, float]:
    """The totals of :func:`measure`, with what is stuck and idle by the gradient of a loss.

    In eval mode; the network is left as it was. ``measure`` itself, given the loss, would find out
    how the network is wired as well, which takes far longer.
    """
    modules = norm_modules(network).values()
    seen = does(*pull_back(network, modules, loss), unit=1.0)
    return measure(network).at(*gather(modules), seen).totals


def collapse_of(network: nn.Module, split: Split) -> dict[str, float]:
    """Sparsity in FLOPs (the paper's), shares of collapsed, stuck and idle filters, mean P(active).

    All in percent, but for ``filters``, their number. What is stuck and idle is measured on the
    cross-entropy of the first images of ``split``.
    """
    images, labels = split.images[:MEASURED_IMAGES], split.labels[:MEASURED_IMAGES]
    device = next(network.parameters()).device

    def loss(of: nn.Module) -> Tensor:
        inputs = normalise(images.to(device)).contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(of(inputs).float(), labels.to(device))

    totals = totals_on(network, loss)
    flops = measure(network, inputs=(3, *images.shape[-2:])).totals
    shares = {
        "sparsity": flops["sparsity_percent"],
        "collapsed": totals["collapsed_percent"],
        "stuck": totals["stuck_percent"],
        "idle": totals["idle_percent"],
        "filters": totals["filters"],
    }
    if math.isfinite(totals["activation_probability"]):  # it is NaN where no ReLU follows
        shares["p_active"] = 100 * totals["activation_probability"]
    return shares


@torch.no_grad()
def pruned_accuracy(network: nn.Module, split: Split) -> float:
    """Accuracy with the gamma of collapsed filters at 0; what is left of them is a constant."""
    kept = {}
    for module in network.modules():
        gamma = getattr(module, "weight", None)
        if isinstance(gamma, Tensor) and gamma.dim() == 1:
            kept[gamma] = gamma.clone()
            gamma[gamma.abs() < THRESHOLD] = 0
    try:
        return accuracy(network, split)
    finally:
        for gamma, value in kept.items():
            gamma.copy_(value)


def ensemble_accuracy(settings: Settings, folder: Path, test: Split) -> float:
    """Accuracy of the averaged softmax of the last rounds' snapshots (Table 1)."""
    network = settings.network_module().to(get_device())
    scores = torch.zeros(len(test), 10)
    for number in range(settings.rounds - settings.ensemble + 1, settings.rounds + 1):
        network.load_state_dict(network_state(folder / f"round_{number}.pth"))
        scores += probabilities(network, test)
    return _percent_right(scores, test.labels)


def network_state(path: Path) -> dict[str, Tensor]:
    """The state dict of the network in a checkpoint of a run."""
    state = load_checkpoint(path)["state_dict"]
    return {k.removeprefix("network."): v for k, v in state.items()}


def latest_checkpoint(folder: Path) -> Path | None:
    """What a run goes on from: ``last.pth``, else the last round's.

    Both are renamed into place when whole, and ``last.pth`` goes at the end of
    each round.
    """
    rounds = sorted(folder.glob("round_*.pth"), key=lambda p: int(p.stem.split("_")[1]))
    last = folder / "last.pth"
    if last.exists() and rounds:
        return max(last, rounds[-1], key=lambda p: p.stat().st_mtime_ns)
    return last if last.exists() else (rounds[-1] if rounds else None)


def make_runner(
    settings: Settings,
    train: Split,
    test: Split,
    folder: str | os.PathLike[str],
    *,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    hooks: tuple[Hook, ...] = (),
) -> Runner:
    """The mmengine job of a run, which goes on from what is in its folder.

    Args:
        settings: Of the run.
        train, test: Images as :func:`study_data` gives them.
        folder: Its work dir; parents are beside it.
        checkpoint_seconds: Between checkpoints within a round.
        hooks: More hooks.

    Raises:
        RunError: The parent is not finished or does not fit, or ``amp`` is asked of
            a processor without bfloat16.
    """
    folder, device = Path(folder), get_device()
    if settings.amp:
        check_amp(device)
    torch.manual_seed(settings.seed)
    network = settings.network_module()
    resume_from = latest_checkpoint(folder)
    if settings.parent and (settings.cut or not resume_from):
        _start_from_parent(network, folder.parent / settings.parent)
        if settings.load_bn == "shift" and not resume_from:
            lift(network)
    if settings.cut:
        network = cut(network, settings)
    batches = Batches(
        train,
        settings.batch_size,
        settings.iterations,
        settings.seed,
        device,
        settings.augment,
    )
    if batches.per_epoch != settings.iterations_per_epoch:
        raise RunError(f"{len(train)} training images were given, not {settings.images or 50_000}")
    custom_hooks: list[Any] = [RoundsHook(settings, test, checkpoint_seconds), *hooks]
    if settings.trace_interval:
        custom_hooks.append(SparsityLoggerHook(settings.trace_interval, figures=False))
    optimizer = dict(type=settings.optimizer, lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "SGD":
        optimizer["momentum"] = settings.momentum
    return Runner(
        Classifier(network, settings.amp),
        work_dir=str(folder),
        train_dataloader=DataLoader(batches, batch_size=None),
        train_cfg=dict(type=RoundsTrainLoop, max_iters=settings.iterations),
        optim_wrapper=dict(
            optimizer=optimizer, paramwise_cfg=without_norm_decay(settings.norm_decay)
        ),
        param_scheduler=dict(
            type="CosineRestartLR",
            periods=[settings.iterations_per_round] * settings.rounds,
            restart_weights=[1] * settings.rounds,
            eta_min=0,
            by_epoch=False,
        ),
        default_hooks=dict(
            checkpoint=None,
            sampler_seed=None,
            logger=dict(
                type="LoggerHook", interval=settings.iterations_per_epoch, log_metric_by_epoch=False
            ),
        ),
        custom_hooks=custom_hooks,
        log_processor=dict(by_epoch=False),
        load_from=str(resume_from) if resume_from else None,
        resume=resume_from is not None,
        # CPU kernels are deterministic by themselves; the switch would slow them down.
        randomness=dict(seed=settings.seed, deterministic=device != "cpu"),
        experiment_name=f"{folder.parent.name}-{folder.name}",
    )


def without_norm_decay(norm_decay: bool) -> dict[str, float] | None:
    """Mmengine's ``paramwise_cfg`` for whether gamma and beta decay; None where all does alike."""
    return None if norm_decay else dict(norm_decay_mult=0.0)


def check_amp(device: str) -> None:
    """Whether ``amp`` makes anything faster here.

    Raises:
        RunError: The processor has no bfloat16. torch would emulate it, in several times the time.
    """
    from psbn_mmdet.launch.amp import cpu_has_bfloat16  # brings all of mmdet, which takes seconds

    if device == "cpu" and not cpu_has_bfloat16():
        raise RunError(
            "amp: this processor does not compute in bfloat16 (no avx512_bf16 or amx_bf16 in "
            "/proc/cpuinfo) and would take several times as long; say --set amp=False"
        )


def _start_from_parent(network: nn.Module, parent: Path) -> None:
    checkpoint = latest_checkpoint(parent)
    if checkpoint is None or not (parent / "result.json").exists():
        raise RunError(f"{parent}: is not finished, and this run starts from its weights")
    state = network_state(checkpoint)
    try:
        load_weights(network, state, str(parent))
    except CheckpointError as error:
        raise RunError(str(error)) from None


def study_data(settings: Settings, root: str | os.PathLike[str]) -> tuple[Split, Split]:
    """Training and test images of a run.

    Raises:
        DataError: See :func:`studies.cifar.data.load`.
    """
    train = balanced_subset(load(root, train=True), settings.images, DATA_SEED)
    test = balanced_subset(load(root, train=False), settings.test_images, DATA_SEED)
    train, test = (scaled(split, settings.image_size) for split in (train, test))
    if settings.random_labels:
        train = random_labels(train, DATA_SEED)
    return train, test


def train_run(
    settings: Settings,
    folder: str | os.PathLike[str],
    data_root: str | os.PathLike[str],
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> dict[str, Any]:
    """Do a run, or the rest of it, and write ``result.json``; nothing if that is there.

    Returns:
        The content of ``result.json``: settings, rounds, the data's fingerprint,
        versions, device.

    Raises:
        RunError, DataError: It cannot be done.
    """
    folder = Path(folder)
    check_settings(settings, folder)
    result_path = folder / "result.json"
    if result_path.exists():
        return json.loads(result_path.read_text())
    crc = fingerprint(data_root)
    train, test = study_data(settings, data_root)
    runner = make_runner(settings, train, test, folder, checkpoint_seconds=checkpoint_seconds)
    hook = next(h for h in runner.hooks if isinstance(h, RoundsHook))
    network = runner.model.network
    start = {}
    if settings.cut:
        start = {**size_of(network, settings.image_size), "accuracy": accuracy(network, test)}
    runner.train()
    result = {
        "settings": asdict(settings),
        "data_crc32": crc,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "rounds": hook.rounds,
    }
    if start:
        result["start"] = start
    if settings.ensemble:
        result["ensemble_accuracy"] = ensemble_accuracy(settings, folder, test)
    write_json(result_path, result)
    return result


def _end_with_parent() -> None:
    """End this process when its standard input is closed, as it is when the parent is gone."""

    def wait() -> None:
        os.read(0, 1)  # sys.stdin has a lock, on which the interpreter would fail to end
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """``FOLDER DATA_ROOT``: do the run whose settings stand in its folder; the engine's worker.

    Its standard input is a pipe that the engine holds open.
    """
    _end_with_parent()
    folder, data_root = Path(sys.argv[1]), sys.argv[2]
    settings = Settings(**json.loads((folder / "settings.json").read_text()))
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"{folder}: another process is doing this run")
        try:
            train_run(settings, folder, data_root)
        except (RunError, DataError) as error:
            sys.exit(str(error))
