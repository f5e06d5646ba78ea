"""One run of the study: rounds of SGD on a small RetinaNet, its boxes written after each round.

Everything random in an iteration follows from the seed and its number, and a checkpoint is kept at
the end of each round, so a run that was killed goes on exactly, to the bit, from the last round.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

import psbn_mmdet  # noqa: F401  registers psBN and the hooks
from psbn_mmdet.ap.coco_files import read_annotations, read_results
from psbn_mmdet.ap.evaluate import evaluate
from psbn_mmdet.checkpoint import CheckpointError, bn_state_dict, load_weights
from psbn_mmdet.collapse import gather, norm_modules
from psbn_mmdet.collapse.lifting import lift_gamma
from psbn_mmdet.collapse.reviving import revive
from psbn_mmdet.norm import lift
from studies.cifar.rounds import (
    RoundsTrainLoop,
    latest_checkpoint,
    network_state,
    totals_on,
    without_norm_decay,
)
from studies.runs import RunError, check_settings, write_json

from .data import Batches, Images, samples
from .peers import (
    GAMMA_ALONE,
    GAMMA_LIFTED,
    L2_INIT,
    REDO,
    SHRINK,
    decay_toward,
    redo,
    shrink_and_perturb,
)
from .settings import ANCHORED, BN, NO_NORM_DECAY, SHIFT, Settings, learning_rate, model_config

TEST_BATCH = 16

MEASURED_IMAGES = 16
"""Training images, the first ones, on whose loss it is measured what each filter does."""


def build_model(
    settings: Settings, classes: int, pretrained: Path | None = None, images: Images | None = None
) -> nn.Module:
    """The detector with fresh weights, but for its backbone where that is pretrained.

    Args:
        settings: Of the run; the seed decides the fresh weights, the same for all methods.
        classes: Of the data.
        pretrained: Checkpoint of the CIFAR-10 study.
        images: By whose first batch collapsed filters are revived, where ``settings`` say so.

    Raises:
        RunError: The checkpoint does not fit.
    """
    model = _fresh(settings, classes)
    if pretrained and settings.revive:
        assert images is not None
        model.backbone.load_state_dict(_revived(settings, classes, pretrained, images))
    elif pretrained:
        load_backbone(model.backbone, pretrained)
        if settings.peer == GAMMA_LIFTED:
            lift_gamma(model.backbone)
        elif settings.peer in (SHRINK, GAMMA_ALONE):
            fresh = _fresh(settings, classes).backbone
            alone = settings.peer == GAMMA_ALONE
            shrink_and_perturb(model.backbone, fresh, gamma_alone=alone)
        elif settings.peer == REDO:
            assert images is not None
            fresh = _fresh(settings, classes).backbone
            batch = samples(images, list(range(settings.batch_size)))
            redo(model.backbone, fresh, model.data_preprocessor(batch)["inputs"])
    if pretrained and settings.method == SHIFT:
        lift(model)
    return model.to(memory_format=torch.channels_last)  # a sixth faster on a CPU


def _fresh(settings: Settings, classes: int) -> Any:
    register_all_modules(init_default_scope=False)
    torch.manual_seed(settings.seed)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(model_config(settings, classes))
        model.init_weights()
    return model


def _revived(
    settings: Settings, classes: int, pretrained: Path, images: Images
) -> dict[str, torch.Tensor]:
    """The backbone's state dict, with plain BN, after its collapsed filters were revived.

    In a detector whose neck and head are then left behind: what reads the backbone is fresh and so
    need not be told to ignore the revived filters.
    """
    model = _fresh(replace(settings, method=BN), classes)
    load_backbone(model.backbone, pretrained)
    batch = samples(images, list(range(settings.batch_size)))
    revive(model, model.data_preprocessor(batch)["inputs"], seed=settings.seed)
    return model.backbone.state_dict()


def load_backbone(backbone: nn.Module, pretrained: Path) -> None:
    """Load what the CIFAR-10 study trained, as plain BN: psBN layers take over its bias.

    Raises:
        RunError: There is no such checkpoint, or it does not fit.
    """
    if not pretrained.exists():
        raise RunError(f"{pretrained}: no such checkpoint, and this run starts from it")
    prefix = "backbone."
    state = {
        key.removeprefix(prefix): value
        for key, value in network_state(pretrained).items()
        if key.startswith(prefix)
    }
    if any(key.endswith(".beta") for key in state):
        state = bn_state_dict(state)
    try:
        load_weights(backbone, state, str(pretrained))
    except CheckpointError as error:
        raise RunError(str(error)) from None


def filters_of(model: BaseModel, images: Images) -> dict[str, float]:
    """The state of a detector's filters, all of which are in its backbone.

    Percentages of the filters that have collapsed, that are stuck and that are idle (measured on
    the loss of some images, in eval mode), the mean P(active) of the layers with a ReLU right
    behind, the median |gamma|. The model is left as it was.
    """
    batch = samples(images, list(range(min(MEASURED_IMAGES, len(images)))))

    def loss(detector: Any) -> torch.Tensor:
        data = detector.data_preprocessor(batch, training=True)
        return detector.parse_losses(detector(**data, mode="loss"))[0]

    gamma, _ = gather(norm_modules(model).values())
    totals = totals_on(model, loss)
    return {
        "collapsed": totals["collapsed_percent"],
        "stuck": totals["stuck_percent"],
        "idle": totals["idle_percent"],
        "active_probability": totals["activation_probability"],
        "gamma_median": float(gamma.abs().median()),
    }


@torch.no_grad()
def detect(model: BaseModel, images: Images) -> list[dict[str, Any]]:
    """Boxes of all images in COCO's result format, in pixels of the original images."""
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(images), TEST_BATCH):
        indices = list(range(start, min(start + TEST_BATCH, len(images))))
        for sample in model.val_step(samples(images, indices)):
            predicted = sample.pred_instances
            corners = predicted.bboxes.double()
            boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
            for box, score, label in zip(
                boxes.tolist(), predicted.scores.tolist(), predicted.labels.tolist(), strict=True
            ):
                found.append(
                    {
                        "image_id": sample.img_id,
                        "category_id": images.categories[label],
                        "bbox": [round(v, 2) for v in box],
                        "score": round(score, 5),
                    }
                )
    model.train(was_training)
    return found


class RoundsHook(Hook):
    """Sets the learning rate; at the end of each round detects, measures, keeps a checkpoint."""

    priority = "VERY_LOW"  # behind the anchored decay, whose state goes into the checkpoint

    def __init__(
        self, settings: Settings, per_epoch: int, train: Images, test: Images, annotations: Path
    ) -> None:
        self.settings, self.train, self.test = settings, train, test
        self.annotations = annotations
        self.per_epoch, self.per_round = per_epoch, per_epoch * settings.epochs
        self.rounds: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.seconds = 0.0

    def before_train(self, runner: Runner) -> None:
        self._began = time.monotonic()
        if not self.rounds:
            self.start = filters_of(runner.model, self.train)
        if self.settings.peer == L2_INIT:
            fresh = _fresh(self.settings, len(self.train.categories)).backbone
            decay_toward(
                runner.optim_wrapper.optimizer,
                list(runner.model.backbone.parameters()),
                [p.detach() for p in fresh.parameters()],
            )

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        lr = learning_rate(self.settings, runner.iter, self.per_round)
        for group in runner.optim_wrapper.optimizer.param_groups:
            group["lr"] = lr

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.losses.append(float(outputs["loss"].detach()))
        if len(self.losses) == self.per_round:
            self._end_round(runner, (runner.iter + 1) // self.per_round)

    def _end_round(self, runner: Runner, number: int) -> None:
        results = Path(runner.work_dir, f"round_{number}.bbox.json")
        found = detect(runner.model, self.test)
        write_results(results, found)
        row = {
            "round": number,
            "train_loss": sum(self.losses[-self.per_epoch :]) / self.per_epoch,
            **average_precision(self.annotations, results, found),
            **filters_of(runner.model, self.train),
        }
        self.losses = []
        self.rounds.append(row)
        runner.logger.info("end of " + json.dumps(row))
        self.seconds += time.monotonic() - self._began
        self._began = time.monotonic()
        name = f"round_{number}.pth"
        runner.save_checkpoint(runner.work_dir, f"{name}.new", by_epoch=False)
        Path(runner.work_dir, f"{name}.new").rename(Path(runner.work_dir, name))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["study"] = dict(rounds=self.rounds, start=self.start, seconds=self.seconds)
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        study = checkpoint["study"]
        self.rounds, self.start = list(study["rounds"]), study["start"]
        self.seconds = study["seconds"]


def write_results(path: Path, found: list[dict[str, Any]]) -> None:
    """A COCO result file, whole or not at all; without the indentation that triples its size."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(found))
    new.rename(path)


def average_precision(
    annotations: Path, results: Path, found: list[dict[str, Any]]
) -> dict[str, float]:
    """AP, AP50 and AP75 in points, as COCO defines them; 0 where nothing was found."""
    names = ("AP", "AP50", "AP75")
    if not found:
        return dict.fromkeys(names, 0.0)
    truth = read_annotations(annotations)
    numbers, _ = evaluate(truth, read_results(results, truth))
    return {name: 100 * float(numbers[name]) for name in names}


def train_run(
    settings: Settings,
    folder: Path,
    train: Images,
    test: Images,
    annotations: Path,
    data_crc32: str,
    pretrained: Path | None = None,
) -> dict[str, Any]:
    """Do a run, or the rest of it, and write ``result.json``; nothing if that is there.

    Args:
        settings: Of the run.
        folder: Its work dir.
        train, test: Images.
        annotations: COCO annotations of ``test``.
        data_crc32: Fingerprint of the data, for the record.
        pretrained: Checkpoint of the backbone, see :func:`build_model`.

    Returns:
        The content of ``result.json``.

    Raises:
        RunError: It cannot be done.
    """
    check_settings(settings, folder)
    result_path = folder / "result.json"
    if result_path.exists():
        return json.loads(result_path.read_text())
    per_epoch = len(train) // settings.batch_size
    batches = Batches(
        train, settings.batch_size, settings.rounds * settings.epochs * per_epoch, settings.seed
    )
    hook = RoundsHook(settings, per_epoch, train, test, annotations)
    hooks: list[Any] = [hook]
    if settings.method == ANCHORED:
        limits = dict(alpha=settings.alpha, max_ratio=settings.max_ratio)
        hooks.append(dict(type="AnchoredBiasDecay", **limits))
    resume_from = latest_checkpoint(folder)
    runner = Runner(
        build_model(settings, len(train.categories), pretrained, train),
        work_dir=str(folder),
        train_dataloader=DataLoader(batches, batch_size=None),
        train_cfg=dict(type=RoundsTrainLoop, max_iters=len(batches)),
        optim_wrapper=dict(
            optimizer=dict(
                type="SGD",
                lr=settings.lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            ),
            clip_grad=dict(max_norm=settings.max_norm),
            paramwise_cfg=without_norm_decay(settings.method != NO_NORM_DECAY),
        ),
        default_hooks=dict(
            checkpoint=None,
            sampler_seed=None,
            param_scheduler=None,
            logger=dict(type="LoggerHook", interval=per_epoch, log_metric_by_epoch=False),
        ),
        custom_hooks=hooks,
        log_processor=dict(by_epoch=False),
        load_from=str(resume_from) if resume_from else None,
        resume=resume_from is not None,
        randomness=dict(seed=settings.seed),
        experiment_name=f"{folder.parent.name}-{folder.name}-{os.getpid()}",
        log_level="WARNING",
    )
    runner.train()
    result = {
        "settings": asdict(settings),
        "data_crc32": data_crc32,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": hook.seconds,
        "start": hook.start,
        "rounds": hook.rounds,
    }
    write_json(result_path, result)
    return result
