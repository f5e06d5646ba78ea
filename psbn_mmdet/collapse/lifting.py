"""``lift_gamma``: a gamma that lets gradients through, for filters that have lost theirs.

:func:`.reviving.revive` keeps what a network computes, and so has to start from zeros. Where the
function need not be kept, as before a fine-tuning with a new head, it is enough to make gamma large
again: what reaches the weights of a filter is multiplied by it. In the detection study that brought
back more AP than revival (docs/when-to-use.md has the numbers).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..norm import added_bias, alpha_of
from .calls import Calls, compare, outputs_of
from .criteria import THRESHOLD, MeasureError, check_thresholds, collapsed, not_finite, not_started
from .layers import norm_modules
from .wiring import Run

GAMMA = 0.1
"""What a lifted gamma is, or is raised by: that of the study, where it was not tuned."""

KEPT = 0.6
"""The share of its gamma that a filter keeps when every gamma is lifted: that of shrink and perturb
(Ash and Adams 2020, arXiv 1910.08475), and of the study."""


@torch.no_grad()
def lift_gamma(
    model: nn.Module,
    images: Tensor | Run | None = None,
    *,
    every: bool = False,
    gamma: float = GAMMA,
    threshold: float = THRESHOLD,
) -> dict[str, Any]:
    """Make the gamma of collapsed filters large again, in place, which changes the outputs.

    By how much is measured if there are images. It is often little, as the weights in front of a
    collapsed filter have decayed, too. The layers behind should normalize by batch statistics in
    the training that follows: their running ones do not fit any more.

    Layers whose gamma is not trained, and those that ``zero_init_residual`` starts with gamma and
    bias 0, stay as they are.

    Args:
        model: Any module, or the part of one that is to be lifted, as ``detector.backbone``.
        images: (N, C, H, W), as the network gets them, or a function that calls the model it is
            given and returns outputs; None: the change is not measured.
        every: Every gamma becomes ``0.6 gamma + gamma_new``; else that of collapsed filters alone
            becomes ``gamma_new``.
        gamma: ``gamma_new``.
        threshold: Of ``|gamma|``.

    Returns:
        A record that JSON can hold: ``filters`` (counts of ``all``, ``collapsed``, ``lifted``, and
        of ``left``, the collapsed ones that stay), ``left`` (reason -> layers) and ``change``: the
        largest one in a channel of the outputs relative to the largest value there, or None.

    Raises:
        MeasureError: A wrong gamma or threshold, no normalization layer or one that is not finite.
        CallError: The model cannot be called with the images.
    """
    check_thresholds(threshold, 0)
    if not gamma > threshold:
        raise MeasureError(
            f"gamma must be above the threshold {threshold:g}, got {gamma:g}: filters below count "
            "as collapsed"
        )
    norms: dict[str, Any] = norm_modules(model)
    for name, norm in norms.items():
        if not_finite(norm.weight, norm.weight).any():
            raise MeasureError(
                f"{name} has a gamma that is not finite: the weights are damaged or the training "
                "has diverged"
            )
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        calls = None if images is None else Calls(model, images)
        before = outputs_of(model, calls.first) if calls else []
        record = _lift(norms, every, gamma, threshold)
        record["change"] = None
        if calls:
            record["change"] = compare(before, outputs_of(model, calls.first)).relative
    finally:
        for module, mode in modes.items():
            module.training = mode
    return record


def _lift(norms: dict[str, Any], every: bool, gamma: float, threshold: float) -> dict[str, Any]:
    counts = {"all": 0, "collapsed": 0, "lifted": 0, "left": 0}
    left: dict[str, list[str]] = {}
    for name, norm in norms.items():
        found = collapsed(norm.weight, threshold)
        counts["all"] += len(found)
        bias = added_bias(norm)
        if not_started(norm.weight, torch.zeros(1) if bias is None else bias, alpha_of(norm)):
            left.setdefault("gamma and bias start at 0", []).append(name)
            continue
        counts["collapsed"] += int(found.sum())
        if not (isinstance(norm.weight, nn.Parameter) and norm.weight.requires_grad):
            if found.any() or every:
                left.setdefault("its gamma is not trained", []).append(name)
            counts["left"] += int(found.sum())
            continue
        if every:
            norm.weight.mul_(KEPT).add_(gamma)
        else:
            norm.weight[found] = gamma
        counts["lifted"] += len(found) if every else int(found.sum())
    return {"gamma": gamma, "threshold": threshold, "every": every, "filters": counts, "left": left}


def summary(record: dict[str, Any]) -> str:
    """A few lines about what was lifted, for people."""
    filters, gamma = record["filters"], record["gamma"]
    how = f"is {KEPT:g} gamma + {gamma:g} now" if record["every"] else f"is {gamma:g} now"
    lines = [
        f"gamma of {filters['lifted']} of {filters['all']} filters {how}; "
        f"{filters['collapsed']} were collapsed"
    ]
    for why, layers in record["left"].items():
        names = ", ".join(layers[:3]) + (" ..." if len(layers) > 3 else "")
        lines.append(f"  left, as {why}: {names}")
    if record["change"] is not None:
        lines.append(f"outputs: changed by up to {record['change']:.2g} of their channel's largest")
    return "\n".join(lines)
