"""A report on the collapsed filters of a model or a checkpoint, and on the FLOPs they cost."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .criteria import (
    INACTIVE_BELOW,
    THRESHOLD,
    check_thresholds,
    collapsed,
    constant,
    count,
    inactive,
)
from .flops import Flops, probe
from .layers import Layer, layers_of_model, layers_of_state_dict, norm_modules


@dataclass(frozen=True)
class Report:
    """What :func:`measure` found: rows per layer, totals, JSON, a table as text."""

    layers: tuple[Layer, ...]
    threshold: float = THRESHOLD
    inactive_below: float = INACTIVE_BELOW
    flops: Flops | None = None

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """For each layer in order: ``name``, the numbers of :func:`count`, and the rest.

        ``collapsed_filters`` and ``inactive_filters`` are indices;
        ``filter_l1_median`` is None where no convolution was found in front.
        """
        rows = []
        for layer in self.layers:
            gamma, bias = layer.gamma, layer.bias
            l1 = layer.filter_l1
            rows.append(
                {
                    "name": layer.name,
                    **count(gamma, bias, self.threshold, self.inactive_below),
                    "conv": layer.conv,
                    "filter_l1_median": None if l1 is None else float(l1.median()),
                    "collapsed_filters": _indices(collapsed(gamma, self.threshold)),
                    "constant_filters": _indices(constant(gamma, bias, self.threshold)),
                    "inactive_filters": _indices(inactive(gamma, bias, self.inactive_below)),
                }
            )
        return rows

    @cached_property
    def totals(self) -> dict[str, float]:
        """The numbers of :func:`count` over all layers; with FLOPs, ``sparsity_percent``."""
        gamma = torch.cat([layer.gamma for layer in self.layers])
        bias = torch.cat([layer.bias for layer in self.layers])
        totals = count(gamma, bias, self.threshold, self.inactive_below)
        if self.flops is not None:
            totals["sparsity_percent"] = self.flops.sparsity
        return totals

    def to_json(self) -> str:
        """Thresholds, totals, rows and FLOPs as a JSON object (NaN becomes null)."""
        content = {
            "threshold": self.threshold,
            "inactive_below": self.inactive_below,
            "totals": self.totals,
            "layers": self.rows,
        }
        if self.flops is not None:
            content["macs"] = {
                "total": self.flops.total,
                "remaining": self.flops.remaining,
                "layers": self.flops.rows,
            }
        return json.dumps(_without_nan(content), indent=1, allow_nan=False)

    def table(self, limit: int | None = None) -> str:
        """Layers ranked by the share that collapsed, then inactive; and the totals.

        Args:
            limit: Show so many layers; all by default.
        """
        ranked = sorted(self.rows, key=lambda r: (-r["collapsed_percent"], -_share_inactive(r)))
        shown = ranked[:limit]
        width = max([5, *(len(row["name"]) for row in shown)])
        lines = [
            f"{'layer':<{width}}  filters  collapsed      %   dead  constant  inactive"
            "  P(active)  median L1"
        ]
        for row in shown:
            l1 = row["filter_l1_median"]
            lines.append(
                f"{row['name']:<{width}}  {row['filters']:7d}  {row['collapsed']:9d}"
                f"  {row['collapsed_percent']:5.1f}  {row['dead']:5d}  {row['constant']:8d}"
                f"  {row['inactive']:8d}  {row['activation_probability']:9.3f}"
                f"  {'-' if l1 is None else format(l1, '.3g'):>9}"
            )
        if len(shown) < len(ranked):
            lines.append(f"... and {len(ranked) - len(shown)} more layers")
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """The totals; the first line is ``N of M filters collapsed (P%)``."""
        t = self.totals
        lines = [
            f"{t['collapsed']} of {t['filters']} filters collapsed ({t['collapsed_percent']:.2f}%)",
            f"  |gamma| < {self.threshold:g}; {t['dead']} dead, {t['constant']} constant "
            "(a positive bias comes through ReLU)",
            f"{t['inactive']} of {t['filters']} filters inactive "
            f"({100 * t['inactive'] / t['filters']:.2f}%)",
            f"  P(ReLU fires) < {self.inactive_below:g}; its mean is "
            f"{t['activation_probability']:.3f}",
        ]
        if self.flops is not None:
            lines.append(
                f"{self.flops.sparsity:.2f}% of FLOPs saved by removing the collapsed filters "
                f"({self.flops.total:.4g} -> {self.flops.remaining:.4g} multiply-accumulates)"
            )
        unpaired = sum(layer.conv is None for layer in self.layers)
        if unpaired:
            lines.append(f"{unpaired} of {len(self.layers)} layers: no convolution found in front")
        if t["not_finite"]:
            lines.append(f"{t['not_finite']} filters have a gamma or bias that is not finite")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _share_inactive(row: Mapping[str, Any]) -> float:
    return row["inactive"] / max(row["filters"], 1)


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
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

    The convolution in front of a layer is found by name (``bn1`` - ``conv1``) or
    as the nearest one before it among its siblings, and only if it has as many
    filters. Where that finds none (a layer behind an addition or a
    concatenation, a filter that is parametrised), the row says so.

    Args:
        source: A model, of which nothing is changed, or a state dict.
        threshold: Of |gamma|.
        inactive_below: Of the activation probability.
        inputs: Also count FLOPs: the size (C, H, W) of an input, or a function
            that calls the model it is given; see :func:`psbn_mmdet.flops.probe`.

    Raises:
        ValueError: A wrong threshold, no normalization layer, or ``inputs``
            with a state dict.
        TypeError: ``source`` is neither.
    """
    check_thresholds(threshold, inactive_below)
    flops = None
    if isinstance(source, nn.Module):
        layers = layers_of_model(source)
        if inputs is not None:
            live = {
                m: ~collapsed(m.weight.detach(), threshold) for m in norm_modules(source).values()
            }
            flops = probe(source, live, inputs)
    elif isinstance(source, Mapping):
        layers = layers_of_state_dict(source)
        if inputs is not None:
            raise ValueError("FLOPs need the model: a state dict does not say how layers connect")
    else:
        raise TypeError(
            f"measure takes a module or a state dict (a mapping of names to tensors), "
            f"got {type(source).__name__}"
        )
    return Report(tuple(layers), threshold, inactive_below, flops)
