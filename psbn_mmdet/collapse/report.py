"""A report on the collapsed filters of a model or a checkpoint, and on the FLOPs they cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..python38 import zip_strict
from .criteria import (
    INACTIVE_BELOW,
    NEARLY_LINEAR_ABOVE,
    THRESHOLD,
    MeasureError,
    check_thresholds,
    collapsed,
    constant,
    count,
    inactive,
    nearly_linear,
    not_finite,
)
from .flops import Flops, probe
from .layers import Layer, layers_of_model, layers_of_state_dict, live_filters


@dataclass(frozen=True)
class Report:
    """What :func:`measure` saw: rows per layer, totals, JSON, a table as text."""

    layers: tuple[Layer, ...]
    threshold: float = THRESHOLD
    inactive_below: float = INACTIVE_BELOW
    flops: Flops | None = None

    def at(self, gamma: Tensor, bias: Tensor) -> Report:
        """The same layers at another moment; their L1 norms and the FLOPs are left out.

        Args:
            gamma, bias: Of all layers concatenated, float32 on the CPU, as
                :func:`.layers.gather` reads them.
        """
        sizes = [layer.gamma.numel() for layer in self.layers]
        return Report(
            tuple(
                replace(layer, gamma=g, bias=b, filter_l1=None)
                for layer, g, b in zip_strict(self.layers, gamma.split(sizes), bias.split(sizes))
            ),
            self.threshold,
            self.inactive_below,
        )

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """For each layer in order: ``name``, the numbers of :func:`count`, and the rest.

        ``collapsed_filters``, ``constant_filters``, ``inactive_filters`` and
        ``not_finite_filters`` are indices; ``conv`` and ``filter_l1_median`` are
        None where no convolution is known in front; ``followed_by`` is as
        :func:`psbn_mmdet.norm.followed_by` has it, and ``"unknown"`` counts as a ReLU.
        """
        rows = []
        for layer in self.layers:
            gamma, bias, relu = layer.gamma, layer.bias, layer.relu
            l1 = layer.filter_l1
            unusable = not_finite(gamma, bias)
            rows.append(
                {
                    "name": layer.name,
                    **count(gamma, bias, self.threshold, self.inactive_below, relu),
                    "followed_by": layer.followed_by,
                    "conv": layer.conv,
                    "filter_l1_median": None if l1 is None else float(l1.median()),
                    "collapsed_filters": _indices(collapsed(gamma, self.threshold) & ~unusable),
                    "constant_filters": _indices(constant(gamma, bias, self.threshold, relu)),
                    "inactive_filters": _indices(inactive(gamma, bias, self.inactive_below, relu)),
                    "not_finite_filters": _indices(unusable),
                }
            )
        return rows

    @cached_property
    def totals(self) -> dict[str, float]:
        """The numbers of :func:`count` over all layers; with FLOPs, ``sparsity_percent``."""
        gamma = torch.cat([layer.gamma for layer in self.layers])
        bias = torch.cat([layer.bias for layer in self.layers])
        relu = torch.cat([layer.relu for layer in self.layers])
        totals = count(gamma, bias, self.threshold, self.inactive_below, relu)
        if self.flops is not None:
            totals["sparsity_percent"] = self.flops.sparsity
        return totals

    @cached_property
    def nearly_linear(self) -> list[str]:
        """The psBN layers whose ReLU lets nearly everything through.

        By :func:`.criteria.nearly_linear`. Where many layers are so, alpha is too
        large for the gammas of the network, which then computes a linear function
        there.
        """
        return self.nearly_linear_of({x.name for x in self.layers if x.alpha is not None})

    def nearly_linear_of(self, names: Collection[str]) -> list[str]:
        """The same for layers of other kinds that are lifted by an alpha, given by their names."""
        return [
            layer.name
            for layer in self.layers
            if layer.name in names
            and layer.relu.all()
            and nearly_linear(layer.gamma, layer.bias, self.threshold)
        ]

    def to_json(self) -> str:
        """Thresholds, totals, rows and FLOPs as a JSON object (NaN becomes null)."""
        content = {
            "threshold": self.threshold,
            "inactive_below": self.inactive_below,
            "totals": self.totals,
            "nearly_linear": self.nearly_linear,
            "layers": self.rows,
        }
        if self.flops is not None:
            content["macs"] = {
                "total": self.flops.total,
                "remaining": self.flops.remaining,
                "elsewhere": self.flops.elsewhere,
                "layers": self.flops.rows,
            }
        return json.dumps(_without_nan(content), indent=1, allow_nan=False)

    def table(self, limit: int | None = None) -> str:
        """Layers with values that are not finite, then ranked by the share that collapsed.

        Of equal ones those with more inactive filters come first. The totals
        follow.

        Args:
            limit: Show so many layers; all by default.
        """
        ranked = sorted(self.rows, key=_rank)
        shown = ranked[:limit]
        width = max([5, *(len(row["name"]) for row in shown)])
        lines = [
            f"{'layer':<{width}}  filters  collapsed      %   dead  constant  inactive"
            "  P(active)  followed by  median L1"
        ]
        for row in shown:
            l1 = row["filter_l1_median"]
            broken = f"  {row['not_finite']} not finite" if row["not_finite"] else ""
            lines.append(
                f"{row['name']:<{width}}  {row['filters']:7d}  {row['collapsed']:9d}"
                f"  {row['collapsed_percent']:5.1f}  {row['dead']:5d}  {row['constant']:8d}"
                f"  {row['inactive']:8d}  {row['activation_probability']:9.3f}"
                f"  {row['followed_by']:>11}"
                f"  {'-' if l1 is None else format(l1, '.3g'):>9}{broken}"
            )
        if len(shown) < len(ranked):
            lines.append(f"... and {len(ranked) - len(shown)} more layers")
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """The totals; the first line is ``N of M filters collapsed (P%)``.

        Before it stands a line on filters that are not finite, if there are any.
        """
        t = self.totals
        lines = []
        if t["not_finite"]:
            lines.append(
                f"{t['not_finite']} of {t['filters']} filters have a gamma or bias that is not "
                "finite; the percentages leave them out"
            )
        lines += [
            f"{t['collapsed']} of {t['filters']} filters collapsed ({t['collapsed_percent']:.2f}%)",
            f"  |gamma| < {self.threshold:g}; {t['dead']} dead, {t['constant']} constant "
            "(a positive bias comes through ReLU, or no ReLU follows)",
            f"{t['inactive']} of {t['filters']} filters inactive ({t['inactive_percent']:.2f}%)",
            f"  P(ReLU fires) < {self.inactive_below:g}; its mean is "
            f"{t['activation_probability']:.3f}",
        ]
        if self.flops is not None:
            lines.append(
                f"{self.flops.sparsity:.2f}% of FLOPs saved by removing the collapsed filters "
                f"({self.flops.total:.4g} -> {self.flops.remaining:.4g} multiply-accumulates)"
            )
        n_layers = len(self.layers)
        unknown = sum(layer.followed_by == "unknown" for layer in self.layers)
        without = sum(not layer.relu.all() for layer in self.layers)
        if unknown == n_layers:
            lines.append("a ReLU is assumed behind every layer: what follows is not known")
        elif unknown:
            lines.append(f"{unknown} of {n_layers} layers: what follows is not known, ReLU assumed")
        if without:
            lines.append(
                f"{without} of {n_layers} layers: no ReLU follows, so that none of their filters "
                "is dead or inactive"
            )
        unpaired = sum(layer.conv is None for layer in self.layers)
        if unpaired:
            lines.append(f"{unpaired} of {n_layers} layers: no convolution known in front")
        if self.nearly_linear:
            lines.append(
                f"{len(self.nearly_linear)} psBN layers (as {self.nearly_linear[0]}): alpha is "
                "large against gamma, so that their ReLU passes nearly everything (mean P(active) "
                f"> {NEARLY_LINEAR_ABOVE:g}) and the network is almost linear there"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _rank(row: Mapping[str, Any]) -> tuple[float, ...]:
    finite = max(row["filters"] - row["not_finite"], 1)
    return -row["not_finite"], -row["collapsed"] / finite, -row["inactive"] / finite


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return value


def measure(
    source: nn.Module | Mapping[str, Tensor],
    threshold: float = THRESHOLD,
    inactive_below: float = INACTIVE_BELOW,
    inputs: tuple[int, ...] | Callable[[nn.Module], Any] | None = None,
) -> Report:
    """Find the collapsed filters of a model or a state dict.

    In a model every BatchNorm and InstanceNorm with a gamma counts (subclasses,
    frozen and post-shifted ones too). A state dict has only names: a layer is
    where ``weight, bias, running_mean, running_var`` stand together, or
    ``weight, beta, alpha``. An InstanceNorm without running statistics cannot be
    told from a GroupNorm or LayerNorm there and is not counted.

    The convolution in front of a layer is known in a model by name (``bn1`` -
    ``conv1``) or as the last one defined before it among its siblings, in a state
    dict by what names and shapes prove, whatever the order of the keys
    (:mod:`.pairs`). Where none is known (a layer behind an addition or a
    concatenation, a filter that is parametrised, names that say nothing), the row
    says so. A state dict does not tell a transposed convolution from a plain one,
    so that its L1 norms are those of its input channels there.

    Whether a ReLU follows a layer is read off the model
    (:func:`psbn_mmdet.norm.followed_by`); of a state dict it is not known, and
    assumed.

    Args:
        source: A model, of which nothing is changed, or a state dict, whose layers
            are reported in the natural order of their names.
        threshold: Of |gamma|.
        inactive_below: Of the activation probability.
        inputs: Also count FLOPs: the size (C, H, W) of an input (of any model that
            takes one, and of mmdet's detectors), or a function that calls the
            model it is given; see :func:`.flops.probe`.

    Raises:
        MeasureError: A wrong threshold, no normalization layer, ``inputs`` with a
            state dict, or of a size that the model cannot be called with.
        TypeError: ``source`` is neither.
    """
    check_thresholds(threshold, inactive_below)
    flops = None
    if isinstance(source, nn.Module):
        layers = layers_of_model(source)
        if inputs is not None:
            flops = probe(source, live_filters(source, threshold), inputs)
    elif isinstance(source, Mapping):
        layers = layers_of_state_dict(source)
        if inputs is not None:
            raise MeasureError("FLOPs need the model: a state dict does not say how layers connect")
    else:
        raise TypeError(
            f"measure takes a module or a state dict (a mapping of names to tensors), "
            f"got {type(source).__name__}"
        )
    return Report(tuple(layers), threshold, inactive_below, flops)
