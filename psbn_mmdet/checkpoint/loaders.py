"""Import this (``custom_imports``) for configs that load checkpoints, before mmengine loads any.

It makes sure that mmengine's functions are replaced (see :mod:`.install`; importing the package
does the same), and holds :class:`CheckpointGuard`, for a Runner that must not go on with a
checkpoint that fits in part.
"""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from .fit import mismatch
from .install import hold_to_all, install
from .unwrap import CheckpointError, state_dict_of

install()


class CheckpointGuard(Hook):
    """Refuses a checkpoint of which a model would be only partly loaded.

    What is checked is what mmengine loads after this hook and those of others, and the average of
    weights that ``EMAHook`` goes on with.

    Args:
        strict: True for testing; a resumed run is always held to it.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Hold the model to the state dict that it is about to load.

        Raises:
            CheckpointError: A run is to be resumed from what holds weights alone, or from an
                average that does not fit.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if self.strict or runner._resume:
            hold_to_all(model)
        if not runner._resume:
            return
        absent = [key for key in ("meta", "message_hub") if key not in checkpoint]
        if absent:
            raise CheckpointError(
                f"{runner._load_from}: has no {absent[0]}, so it is not the checkpoint of a run "
                "and cannot be resumed; take its weights with load_from and resume=False"
            )
        if "ema_state_dict" in checkpoint:
            average = state_dict_of(checkpoint["ema_state_dict"], str(runner._load_from))
            if wrong := mismatch(model, average, strict=True):
                raise CheckpointError(f"{runner._load_from}: its ema_state_dict: {wrong}")
