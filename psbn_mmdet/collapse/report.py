"""A report on what the filters of a model or a checkpoint do, and on the FLOPs they cost."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from .backward import pull_back
from .calls import in_eval_mode, ways_to_compare
from .criteria import (
    IDLE,
    INACTIVE_BELOW,
    NEARLY_LINEAR_ABOVE,
    STUCK,
    THRESHOLD,
    MeasureError,
    check_thresholds,
    collapsed,
    constant,
    count,
    dead,
    does,
    inactive,
    nearly_linear,
    not_finite,
)
from .flops import Flops, probe
from .layers import (
    NO_GAMMA,
    Layer,
    layers_as_wired,
    layers_of_model,
    layers_of_state_dict,
    live_filters,
    norm_modules,
)
from .wiring import trace

Inputs = Tensor | tuple[int, ...] | Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Report:
    """What :func:`measure` saw: rows per layer, totals, JSON, a table as text.

    Args:
        layers: As they were read and measured.
        threshold, inactive_below: As :func:`measure` takes them.
        flops: If they were counted.
        unread: Layers of a state dict whose gamma cannot be read, with the reason.
    """

    layers: tuple[Layer, ...]
    threshold: float = THRESHOLD
    inactive_below: float = INACTIVE_BELOW
    flops: Flops | None = None
    unread: Mapping[str, str] = field(default_factory=dict)

    def _count(self, layers: Collection[Layer]) -> dict[str, float]:
        gamma, bias, *known = (
            torch.cat([getattr(layer, name) for layer in layers])
            for name in ("gamma", "bias", "relu", "started", "does")
        )
        return count(gamma, bias, self.threshold, self.inactive_below, *known)

    def at(self, gamma: Tensor, bias: Tensor, seen: Tensor | None = None) -> Report:
        """The same layers at another moment; their L1 norms and the FLOPs are left out.

        Args:
            gamma, bias: Of all layers concatenated, float32 on the CPU, as
                :func:`.layers.gather` reads them.
            seen: What the filters do, if it was measured, likewise.
        """
        sizes = [layer.gamma.numel() for layer in self.layers]
        parts = (gamma, bias, torch.zeros_like(gamma, dtype=torch.uint8) if seen is None else seen)
        layers = tuple(
            dataclasses.replace(layer, gamma=g, bias=b, filter_l1=None, does=d, firing=None)
            for layer, g, b, d in zip(
                self.layers, *(part.split(sizes) for part in parts), strict=True
            )
        )
        return Report(layers, self.threshold, self.inactive_below)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """For each layer in order: ``name``, the numbers of :func:`.criteria.count`, and the rest.

        ``..._filters`` are indices. ``conv`` and ``filter_l1_median`` are None where no convolution
        is known in front; ``followed_by`` is as :class:`.layers.Layer` has it; ``firing`` is the
        mean over its filters, None where it was not measured.
        """
        rows = []
        for layer in self.layers:
            gamma, bias, relu, started = layer.gamma, layer.bias, layer.relu, layer.started
            finite = ~not_finite(gamma, bias)
            sets = {
                "collapsed": collapsed(gamma, self.threshold) & started,
                "dead": dead(gamma, bias, self.threshold) & relu,
                "constant": constant(gamma, bias, self.threshold) & relu,
                "inactive": inactive(gamma, bias, self.inactive_below, relu, self.threshold),
                "stuck": layer.does == STUCK,
                "idle": layer.does == IDLE,
            }
            l1, firing = layer.filter_l1, layer.firing
            rows.append(
                {
                    "name": layer.name,
                    **self._count([layer]),
                    "started": bool(started.all()),
                    "followed_by": layer.followed_by,
                    "firing": None if firing is None else float(firing.nanmean()),
                    "conv": layer.conv,
                    "filter_l1_median": None if l1 is None else float(l1.median()),
                    **{f"{name}_filters": _indices(mask & finite) for name, mask in sets.items()},
                    "not_finite_filters": _indices(~finite),
                }
            )
        return rows

    @cached_property
    def totals(self) -> dict[str, float]:
        """The numbers of :func:`.criteria.count` over all; with FLOPs ``sparsity_percent``."""
        totals = self._count(self.layers)
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
            "unread": dict(self.unread),
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

    def grid(self, limit: int | None = None) -> list[list[str]]:
        """The table's cells: the heads, then a row for each layer.

        Layers with values that are not finite come first, then those with the largest share of
        collapsed filters; of equal ones those with more stuck, then with more inactive filters.
        Columns of what is not known are left out.

        Args:
            limit: Number of layers; all by default.
        """
        columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
            ("layer", lambda row: row["name"]),
            ("filters", lambda row: f"{row['filters']}"),
            ("collapsed", lambda row: f"{row['collapsed']}"),
            ("%", lambda row: _number(row["collapsed_percent"], ".1f")),
        ]
        if self.totals["not_finite"]:
            columns.append(("not finite", lambda row: f"{row['not_finite']}"))
        if self.totals["measured"]:
            for name in ("stuck", "idle", "carrying"):
                columns.append((name, partial(_told, name, "measured")))
        if any(layer.firing is not None for layer in self.layers):
            columns.append(("firing", lambda row: _number(row["firing"], ".3f")))
        if self.totals["told"]:
            for name in ("dead", "constant", "inactive"):
                columns.append((name, partial(_told, name, "told")))
            columns.append(("P(active)", lambda row: _number(row["activation_probability"], ".3f")))
        if any(layer.followed_by != "unknown" for layer in self.layers):
            columns.append(("followed by", lambda row: row["followed_by"]))
        columns.append(("median L1", lambda row: _number(row["filter_l1_median"], ".3g")))
        rows = sorted(self.rows, key=_rank)[:limit]
        return [
            [name for name, _ in columns],
            *([text(row) for _, text in columns] for row in rows),
        ]

    def table(self, limit: int | None = None) -> str:
        """:meth:`grid` as aligned text, with the summary below."""
        lines = aligned(self.grid(limit))
        if (more := len(self.layers) - len(lines) + 1) > 0:
            lines.append(f"... and {more} more layers")
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """The totals; the first line is ``N of M filters collapsed (P%)``.

        Before it stand lines on filters that are not finite and on layers that cannot be read, if
        there are any.
        """
        t, n_layers = self.totals, len(self.layers)
        lines = []
        if t["not_finite"]:
            lines.append(
                f"{t['not_finite']} of {t['filters']} filters have a NaN or infinite gamma or bias "
                "and are left out of the percentages"
            )
        if missing := self.missing:
            name, why = next(iter(missing.items()))
            lines.append(f"{len(missing)} layers are not counted (e.g. {name}: {why})")
        lines.append(
            f"{t['collapsed']} of {t['filters']} filters collapsed ({t['collapsed_percent']:.2f}%)"
        )
        if t["measured"]:
            lines += [
                f"{t['stuck']} of {t['measured']} filters stuck ({t['stuck_percent']:.2f}%): "
                "no gradient reaches them",
                f"{t['idle']} idle ({t['idle_percent']:.2f}%): they get a gradient, but contribute "
                f"nothing; {t['carrying']} carrying ({t['carrying_percent']:.2f}%)",
            ]
        if t["told"]:
            lines.append(
                f"{t['inactive']} of {t['told']} filters directly before a ReLU inactive "
                f"({t['inactive_percent']:.2f}%): P(ReLU active) < {self.inactive_below:g}; mean "
                f"{_number(t['activation_probability'], '.3f')}"
            )
            lines.append(
                f"of those collapsed, {t['dead']} are dead (output 0) and {t['constant']} constant "
                "(positive bias)"
            )
        if self.flops is not None:
            lines.append(
                f"{self.flops.sparsity:.2f}% of FLOPs saved by removing the collapsed filters "
                f"({self.flops.total:.4g} -> {self.flops.remaining:.4g} multiply-accumulates)"
            )
        untold = t["filters"] - t["told"] - t["not_finite"]
        if untold > 0 and not t["measured"]:
            lines.append(
                f"{untold:.0f} filters: the weights alone do not show whether they still learn; "
                "measure with images"
            )
        if new := [row["name"] for row in self.rows if not row["started"]]:
            lines.append(
                f"{len(new)} layers (e.g. {new[0]}) have not started to train: gamma and bias are 0"
            )
        if none := [name for name, why in self.unread.items() if why == NO_GAMMA]:
            lines.append(f"{len(none)} layers (e.g. {none[0]}) have no gamma and cannot collapse")
        if unpaired := sum(layer.conv is None for layer in self.layers):
            lines.append(f"no convolution found before {unpaired} of {n_layers} layers")
        if self.nearly_linear:
            lines.append(nearly_linear_line(self.nearly_linear))
        return "\n".join(lines)

    @property
    def missing(self) -> dict[str, str]:
        """The unread layers that have a gamma, of which nothing is known therefore."""
        return {name: why for name, why in self.unread.items() if why != NO_GAMMA}

    def __str__(self) -> str:
        return self.table()


def nearly_linear_line(layers: list[str]) -> str:
    """What is wrong with the layers of :attr:`Report.nearly_linear`, and what to do."""
    return (
        f"{len(layers)} layers (e.g. {layers[0]}) are nearly linear: P(ReLU active) > "
        f"{NEARLY_LINEAR_ABOVE:g}. Lower alpha, reduce weight decay, or use "
        "AnchoredBiasDecay(max_ratio=1)"
    )


def aligned(grid: list[list[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in grid
    ]


def _rank(row: Mapping[str, Any]) -> tuple[float, ...]:
    finite = max(row["filters"] - row["not_finite"], 1)
    return (
        -row["not_finite"],
        -row["collapsed"] / finite,
        -row["stuck"] / finite,
        -row["inactive"] / finite,
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _told(name: str, base: str, row: Mapping[str, Any]) -> str:
    return str(row[name]) if row[base] else "-"


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
    inputs: Inputs | None = None,
    threshold: float = THRESHOLD,
    inactive_below: float = INACTIVE_BELOW,
) -> Report:
    """Find out what the filters of a model or a state dict do.

    With images, or a function that calls the model, the truth is measured by one
    forward and one backward pass in eval mode: which filters are *stuck*, *idle*
    and *carrying* (:mod:`.criteria`). Without, only the weights speak.

    In a model every BatchNorm and InstanceNorm with a gamma counts (subclasses,
    frozen and post-shifted ones too). A state dict has only names: a layer is
    where a gamma stands beside ``running_mean``, or ``weight, beta, alpha``
    together. An InstanceNorm without running statistics cannot be told from a
    GroupNorm or LayerNorm there and is not counted.

    The convolution in front of a layer is known by running the model with images
    (:mod:`.wiring`); without, by what names and shapes prove, whatever the order of
    definition or of the keys (:mod:`.convolutions`). Where none is known (a layer
    behind an addition or a concatenation, a filter that is parametrised, names that
    say nothing), the row says so. A state dict does not tell a transposed convolution
    from a plain one, so that its L1 norms are those of its input channels there.

    Args:
        source: A model, of which nothing is changed, or a state dict, whose layers
            are reported in the natural order of their names.
        inputs: Images (N, C, H, W), as the model gets them (of mmdet: normalised);
            or a function that calls the model it is given and returns its outputs,
            or a loss. The filters are measured, how often the rectifiers behind them fire
            too, and the FLOPs counted. Or the size
            (C, H, W) of an image: FLOPs are counted, per image, and nothing is
            measured, as noise is no image.
        threshold: Of ``|gamma|``.
        inactive_below: Of the activation probability.

    Raises:
        MeasureError: A wrong threshold, no normalization layer, ``inputs`` with a
            state dict, or such that the model cannot be called with.
        TypeError: ``source`` is neither.
    """
    check_thresholds(threshold, inactive_below)
    flops: Flops | None = None
    unread: dict[str, str] = {}
    if isinstance(source, nn.Module):
        layers = layers_of_model(source)
        if inputs is not None and not isinstance(inputs, tuple):
            layers = _measured(source, layers, inputs)
        if inputs is not None:
            size = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else inputs
            flops = probe(source, live_filters(source, threshold), size)
    elif isinstance(source, Mapping):
        layers, unread = layers_of_state_dict(source)
        if inputs is not None:
            raise MeasureError(
                "a state dict cannot be run: it does not say how layers connect; give the model"
            )
    else:
        raise TypeError(
            f"measure takes a module or a state dict (a mapping of names to tensors), "
            f"got {type(source).__name__}"
        )
    return Report(tuple(layers), threshold, inactive_below, flops, unread)


def _measured(
    model: nn.Module, layers: list[Layer], inputs: Tensor | Callable[[nn.Module], Any]
) -> list[Layer]:
    """The layers with what their filters do."""
    modules = norm_modules(model).values()
    call: Callable[[nn.Module], Any]
    if not isinstance(inputs, Tensor):
        call = inputs
        seen = pull_back(model, modules, call)
    else:
        for call in ways_to_compare(model, inputs):
            try:
                seen = pull_back(model, modules, call)
                break
            except MeasureError:
                raise
            except Exception as caught:  # whatever a forward() raises
                error = caught
        else:
            reason = " ".join(str(error).split())
            raise MeasureError(
                f"the model cannot be called with these images: {type(error).__name__}: "
                f"{reason[:200]}; give others, or a function that calls it"
            ) from error
    told = does(*seen, unit=1.0).split([layer.gamma.numel() for layer in layers])
    layers = [
        dataclasses.replace(layer, does=each) for layer, each in zip(layers, told, strict=True)
    ]
    with in_eval_mode(model):
        return layers_as_wired(model, layers, trace(model, call))
