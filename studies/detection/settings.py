"""What decides the outcome of a run of the study."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from studies.runs import RunError

from .peers import PEERS

MODEL_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo" / "demo_bn.py"

BN, PRESERVE, SHIFT, ANCHORED = "BN", "psBN preserve", "psBN shift", "AnchoredBiasDecay"
NO_NORM_DECAY = "BN without norm decay"
METHODS = (BN, NO_NORM_DECAY, PRESERVE, SHIFT, ANCHORED)
"""How the backbone is normalised and decays; psBN takes over a pretrained bias in two ways.

Without norm decay: no weight decay of gamma and beta, mmengine's ``norm_decay_mult=0``."""


@dataclass(frozen=True)
class Settings:
    """All that decides the outcome of a run; the defaults are the published recipe.

    A decay far above COCO's stands in for its many steps: a filter without a gradient shrinks by a
    factor of 0.67 in these 800 steps, as by one of 0.54 in a COCO schedule (configs/README.md).
    At lr 0.05 and 16 epochs AP came out as 0 to 32 by chance (tried); here seeds agree well.

    Args:
        method: One of :data:`METHODS`.
        alpha: Of psBN and of the anchored decay; the paper's 0.1 by default.
        max_ratio: Of the anchored decay: alpha is at most this many times the RMS of the layer's
            gamma; None for alpha everywhere.
        backbone: Name of the run of the CIFAR-10 study that pretrained the backbone; None to
            train from scratch.
        backbone_round: After which round of that run.
        revive: Whether its collapsed filters are revived before the training.
        peer: What is done to the backbone instead: one of :data:`.peers.PEERS`, or nothing.
        base_channels: Of the backbone: 16 is a quarter of ResNet-18's width.
        width, height: The images are resized to.
        train_images, test_images: How many are used; None for all.
        batch_size: Images of a step.
        lr: At the start of each round; it falls along a cosine to 0 within it.
        warmup: Iterations at the start of each round in which lr rises linearly.
        momentum: Of SGD.
        weight_decay: On every parameter, gamma and beta included, but for :data:`NO_NORM_DECAY`.
        max_norm: Gradients of a larger L2 norm are scaled to it.
        rounds: Number of rounds.
        epochs: Of each round.
        seed: Of the weights, order and flips.

    Raises:
        RunError: A value that cannot be.
    """

    method: str = BN
    alpha: float = 0.1
    max_ratio: float | None = None
    backbone: str | None = None
    backbone_round: int = 0
    revive: bool = False
    peer: str = ""
    base_channels: int = 16
    width: int = 160
    height: int = 120
    train_images: int | None = None
    test_images: int | None = None
    batch_size: int = 8
    lr: float = 0.02
    warmup: int = 50
    momentum: float = 0.9
    weight_decay: float = 5e-3
    max_norm: float = 10.0
    rounds: int = 1
    epochs: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RunError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.peer not in ("", *PEERS):
            raise RunError(f"peer must be one of {', '.join(PEERS)}, got {self.peer!r}")
        positive = ("alpha", "batch_size", "lr", "rounds", "epochs", "base_channels")
        for name in (*positive, "width", "height"):
            if not isinstance(getattr(self, name), (int, float)):
                raise RunError(f"{name} must be a number, got {getattr(self, name)!r}")
            if not getattr(self, name) > 0:
                raise RunError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_ratio is not None and self.method != ANCHORED:
            raise RunError(f"max_ratio is of {ANCHORED}, and method is {self.method!r}")
        if self.backbone and self.backbone_round < 1:
            raise RunError(f"backbone_round must be at least 1, got {self.backbone_round}")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.width, self.height


def learning_rate(settings: Settings, iteration: int, per_round: int) -> float:
    """Lr of an iteration: linear warm-up times a cosine from lr to 0, again in each round."""
    step = iteration % per_round
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    return settings.lr * warm * (1 + math.cos(math.pi * step / per_round)) / 2


def model_config(settings: Settings, classes: int) -> dict[str, Any]:
    """The RetinaNet of ``configs/demo`` with this run's backbone, for objects of 8 to 60 pixels.

    Three levels with anchors of 16 to 100 pixels, where COCO's five have 32 to 813.
    """
    channels = settings.base_channels
    norm: dict[str, Any] = dict(type="BN")
    if settings.method in (PRESERVE, SHIFT):
        norm = dict(type="psBN", alpha=settings.alpha)
    model = dict(
        backbone=dict(
            base_channels=channels,
            stem_channels=channels,
            norm_cfg=norm,
            zero_init_residual=False,  # or a branch that has not learnt yet reads as collapsed
        ),
        neck=dict(in_channels=[channels * 2**i for i in range(4)], num_outs=3),
        bbox_head=dict(
            num_classes=classes,
            anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32]),
        ),
    )
    cfg = Config.fromfile(MODEL_CONFIG)
    cfg.merge_from_dict(dict(model=model))
    return cfg.model
