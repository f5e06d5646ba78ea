"""Anchored bias decay as a hook of mmengine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook

from .anchor import AnchoredBiases, NothingToAnchor, anchor_bias_decay, check_limits


class AnchoredBiasDecay(Hook):
    """`anchor_bias_decay` for mmengine: `custom_hooks=[dict(type='AnchoredBiasDecay', alpha=0.1)]`.

    Starts with the training, when weights are initialised, loaded or resumed, and takes each
    optimizer of the run that has such biases. What it logs says which. Checkpoints stay those of
    plain BN; beside the weights they hold the betas (`anchored_bias_decay`), so that a resumed run
    is exact.

    Args:
        alpha, layers, init, max_ratio, any_optimizer: see `anchor_bias_decay`. A resumed run keeps
            its biases whatever `init` says.
    """

    key = "anchored_bias_decay"

    def __init__(
        self,
        alpha: float = 0.1,
        layers: str | Sequence[str] = "relu",
        init: str = "auto",
        max_ratio: float | None = None,
        any_optimizer: bool = False,
    ) -> None:
        self.alpha, self.max_ratio = check_limits(alpha, max_ratio)
        self.layers, self.any_optimizer = layers, any_optimizer
        self.init = init
        self.anchored: list[AnchoredBiases | None] = []  # for each optimizer
        self._saved: list[dict[str, Any]] = []

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get(self.key, [])

    def before_train(self, runner: Any) -> None:
        init = "keep" if runner.iter > 0 else self.init
        wrapper = runner.optim_wrapper
        wrappers = wrapper.values() if hasattr(wrapper, "values") else [wrapper]
        self.anchored, nothing = [], []
        for w in wrappers:
            try:
                anchored = anchor_bias_decay(
                    runner.model,
                    w.optimizer,
                    self.alpha,
                    layers=self.layers,
                    init=init,
                    max_ratio=self.max_ratio,
                    any_optimizer=self.any_optimizer,
                    log=runner.logger.info,
                )
            except NothingToAnchor as error:
                anchored = None
                nothing.append(error)
            except Exception:
                self.after_train(runner)
                raise
            self.anchored.append(anchored)
        if not any(self.anchored):
            raise nothing[0]
        for anchored, state in zip(self.anchored, self._saved):
            if anchored:
                anchored.load_state_dict(state)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        states = [anchored.state_dict() if anchored else {} for anchored in self.anchored]
        checkpoint[self.key] = states

    def after_train(self, runner: Any) -> None:
        for anchored in filter(None, self.anchored):
            anchored.remove()
