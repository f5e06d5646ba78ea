"""What decides the outcome of a run of the study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from studies.runs import RunError

from .networks import MMDET_RESNET18, NETWORKS, VGG_STAGES, build_network

NORMS: dict[str, dict[str, Any] | None] = {
    "BN": dict(type="BN"),
    "psBN": dict(type="psBN"),
    "IN": dict(type="IN", affine=True),  # mmcv's has no gamma by default
    "psIN": dict(type="psIN"),
    "none": None,
}
ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "ReLU": dict(type="ReLU"),
    "LeakyReLU": dict(type="LeakyReLU", negative_slope=0.01),
    "none": None,
}


@dataclass(frozen=True)
class Settings:
    """All that decides the outcome of a run; the defaults are the paper's.

    Args:
        network: One of :data:`~.networks.NETWORKS`.
        width: Factor on its channels.
        norm: One of :data:`NORMS`.
        alpha: Of psBN and psIN.
        load_bn: How psBN takes over BN weights of ``parent``: 'preserve' keeps its function,
            'shift' lifts the network by alpha.
        act: One of :data:`ACTIVATIONS`.
        gamma_init: Initial gamma (Fig. 5b).
        images: Number of training images, class-balanced; None for all.
        test_images: Likewise, of the test set.
        image_size: Images are scaled down to so many pixels a side; 32 as they are.
        random_labels: Whether labels are shuffled once (section 3.3).
        augment: Whether to pad, crop and flip.
        batch_size: Images of a step.
        optimizer: 'SGD' with ``momentum`` or 'Adam' (with decay as an L2 term).
        lr: At the start of each round.
        momentum: Of SGD.
        weight_decay: On every parameter.
        norm_decay: Whether on gamma and beta of the norm layers, too.
        rounds: Number of rounds.
        epochs: Of each round.
        seed: Of weights, order and augmentation.
        shuffle_before: Shuffle the entries of every parameter tensor before
            this round, if any (section 3.6).
        revive: Whether collapsed filters are revived before each round
            (:func:`psbn_mmdet.collapse.revive`), those of ``parent`` included.
        lift: Whose gamma is lifted before the first round
            (:func:`psbn_mmdet.collapse.lift_gamma`): 'collapsed', 'every' or None.
        parent: Name of the run whose final weights this one starts from, if any.
        cut: Whether and how the network is made smaller before it is trained: 'strip',
            'magnitude' or 'uniform' (:mod:`.pruning`), each to the FLOPs that stripping the
            parent's leaves.
        trace_interval: Iterations between records of gamma and beta; 0 for none.
        ensemble: Also average the softmax of so many last rounds (Table 1); 0 for not.
        evaluate_pruned: Also evaluate with the collapsed filters removed.
        amp: Train under autocast to bfloat16; weights, gradients, statistics and
            optimizer stay in float32, and evaluation is in float32.

    Raises:
        RunError: A value that cannot be.
    """

    network: str = "resnet20"
    width: float = 1.0
    norm: str = "BN"
    alpha: float = 0.1
    load_bn: str = "preserve"
    act: str = "ReLU"
    gamma_init: float = 1.0
    images: int | None = None
    test_images: int | None = None
    image_size: int = 32
    random_labels: bool = False
    augment: bool = True
    batch_size: int = 128
    optimizer: str = "SGD"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    norm_decay: bool = True
    rounds: int = 9
    epochs: int = 100
    seed: int = 0
    shuffle_before: int | None = None
    revive: bool = False
    lift: str | None = None
    parent: str | None = None
    cut: str | None = None
    trace_interval: int = 0
    ensemble: int = 0
    evaluate_pruned: bool = False
    amp: bool = False

    def __post_init__(self) -> None:
        for name, allowed in [
            ("network", NETWORKS),
            ("norm", tuple(NORMS)),
            ("act", tuple(ACTIVATIONS)),
            ("optimizer", ("SGD", "Adam")),
        ]:
            if getattr(self, name) not in allowed:
                raise RunError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.cut not in (None, "strip", "magnitude", "uniform"):
            raise RunError(f"cut must be strip, magnitude, uniform or None, got {self.cut!r}")
        if self.lift not in (None, "collapsed", "every"):
            raise RunError(f"lift must be collapsed, every or None, got {self.lift!r}")
        if self.cut and (not self.parent or self.norm != "BN"):
            raise RunError("only a parent's network with BN can be cut: name one, with norm=BN")
        for name in ("rounds", "epochs", "batch_size", "lr", "width"):
            if not getattr(self, name) > 0:
                raise RunError(f"{name} must be positive, got {getattr(self, name)}")
        if self.image_size not in (8, 16, 32):
            raise RunError(f"image_size must be 8, 16 or 32, got {self.image_size}")
        if self.network in VGG_STAGES and self.image_size < 32:
            raise RunError(f"{self.network} halves the image five times: image_size must be 32")
        if self.network == MMDET_RESNET18 and (self.norm == "none" or self.act != "ReLU"):
            raise RunError(f"{MMDET_RESNET18} always has a normalization and ReLU")
        if self.ensemble > self.rounds:
            raise RunError(f"an ensemble of {self.ensemble} needs as many rounds: {self.rounds}")

    @property
    def iterations_per_round(self) -> int:
        return self.epochs * self.iterations_per_epoch

    @property
    def iterations_per_epoch(self) -> int:
        return (self.images or 50_000) // self.batch_size

    @property
    def iterations(self) -> int:
        return self.rounds * self.iterations_per_round

    def network_module(self) -> nn.Module:
        """The network with weights from torch's global generator."""
        norm_cfg = NORMS[self.norm]
        if norm_cfg and self.norm.startswith("ps"):
            norm_cfg = dict(norm_cfg, alpha=self.alpha)
        return build_network(
            self.network, norm_cfg, ACTIVATIONS[self.act], self.width, self.gamma_init
        )
