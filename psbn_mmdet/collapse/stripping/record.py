"""The record of what :func:`.strip.strip` did: counts, reasons, FLOPs; and its summary as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Dict, List

import torch
from torch import Tensor, nn

from ...python38 import zip_strict
from ..criteria import activation_probability, collapsed, dead, inactive
from ..flops import Flops, probe
from ..layers import Layer, live_filters
from .coupling import Channel
from .plan import Plan
from .wiring import Run

Kinds = Dict[str, List[str]]
"""Normalization layer -> of each filter ``dead``, ``constant``, ``inactive`` or ``live``."""


def inactive_of(layer: Layer, below: float | None) -> Tensor:
    """Which filters of a layer are inactive, (C,) bool; none where that was not asked for."""
    if below is None or layer.followed_by != "relu":
        return torch.zeros_like(layer.gamma, dtype=torch.bool)
    return inactive(layer.gamma, layer.bias, below)


def kinds_of(layers: list[Layer], threshold: float, inactive_below: float | None) -> Kinds:
    kinds = {}
    for layer in layers:
        is_collapsed = collapsed(layer.gamma, threshold)
        is_dead = dead(layer.gamma, layer.bias, threshold, layer.relu)
        is_inactive = inactive_of(layer, inactive_below)
        kinds[layer.name] = [
            "dead" if d else "constant" if c else "inactive" if i else "live"
            for c, d, i in zip_strict(is_collapsed, is_dead, is_inactive)
        ]
    return kinds


def filters_record(planned: Plan, kinds: Kinds) -> dict[str, Any]:
    """``removed``: layer -> kind -> indices; ``kept``: what could not go, and why; counts."""
    removed: dict[str, dict[str, list[int]]] = {}
    for channel in planned.gone:
        for name, index in _norm_entries(channel, kinds):
            kind = kinds[name][index]
            # A live filter goes where only removed ones read it (in front of a depthwise one).
            kind = "unread" if kind == "live" else kind
            removed.setdefault(name, {}).setdefault(kind, []).append(index)
    kept: dict[tuple[str, str], list[int]] = defaultdict(list)
    seen = {(n, i) for n, by_kind in removed.items() for each in by_kind.values() for i in each}
    for channel, why in planned.kept:
        for name, index in _norm_entries(channel, kinds):
            seen.add((name, index))
            if kinds[name][index] != "live":
                kept[name, why].append(index)
    for name, of_filters in kinds.items():
        for index, kind in enumerate(of_filters):
            if kind != "live" and (name, index) not in seen:
                kept[name, "what is coupled to it was not traced"].append(index)
    for by_kind in removed.values():
        for each in by_kind.values():
            each.sort()
    counts = {
        kind: sum(len(by_kind.get(kind, [])) for by_kind in removed.values())
        for kind in ("dead", "constant", "inactive", "unread")
    }
    return {
        "filters": {
            "all": sum(map(len, kinds.values())),
            "removed": sum(counts.values()),
            **counts,
            "collapsed_but_kept": sum(
                kinds[name][i] in ("dead", "constant") for (name, _), e in kept.items() for i in e
            ),
        },
        "removed": removed,
        "kept": [
            {"layer": name, "filters": sorted(each), "why": why}
            for (name, why), each in kept.items()
        ],
        "merged": len(planned.merged),
    }


def _norm_entries(channel: Channel, kinds: Kinds) -> list[tuple[str, int]]:
    return [(name, index) for name, _, index in channel.entries if name in kinds]


def macs_record(
    original: nn.Module,
    stripped: nn.Module,
    inputs: tuple[int, ...] | Tensor | Run,
    threshold: float,
    planned: Plan,
    kinds: Kinds,
) -> dict[str, Any]:
    """Multiply-accumulates before, as predicted from the collapsed filters, and after.

    Those of a layer are in proportion to its weights. (The stripped network is not run for them,
    as detectors of two stages may choose another number of proposals on random numbers.)
    """
    size = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else inputs
    flops = probe(original, live_filters(original, threshold), size)
    old: dict[str, Any] = dict(original.named_modules())
    new: dict[str, Any] = dict(stripped.named_modules())
    after = {
        row["name"]: row["total"]
        * new[row["name"]].weight.numel()
        // old[row["name"]].weight.numel()
        for row in flops.rows
    }
    return {
        "before": flops.total,
        "predicted": flops.remaining,
        "after": sum(after.values()) + flops.elsewhere,
        "unlike_predicted": _explained(flops, after, planned, kinds),
    }


def _explained(
    flops: Flops, after: Mapping[str, int], planned: Plan, kinds: Kinds
) -> list[dict[str, Any]]:
    """The layers whose FLOPs are not what was predicted, and why."""
    whys: dict[str, dict[str, None]] = defaultdict(dict)
    for channel, reason in planned.kept:
        if any(kinds[name][index] != "live" for name, index in _norm_entries(channel, kinds)):
            for name, _, _ in channel.entries:
                whys[name][reason] = None
    fewer = "inactive filters went, or live ones that only removed ones read"
    chance = "its inputs vary; some were constant in the run that predicted, on few positions"
    lines = []
    for row in flops.rows:
        name, predicted = row["name"], row["remaining"]
        if after[name] != predicted:
            why = [fewer] if after[name] < predicted else [*whys[name]] or [chance]
            lines.append({"layer": name, "predicted": predicted, "after": after[name], "why": why})
    return lines


def inactive_bound(
    layers: list[Layer], removed: Mapping[str, Mapping[str, list[int]]]
) -> dict[str, float]:
    """Of the inactive filters that went: how often they fire at most, and their mean output.

    For x_hat ~ N(0, 1), z = bias / |gamma|: P(fires) = Phi(z), E[ReLU] = |gamma| phi(z) + bias
    Phi(z).
    """
    fires, mean = 0.0, 0.0
    for layer in layers:
        gone = removed.get(layer.name, {}).get("inactive", [])
        if gone:
            gamma, bias = layer.gamma[gone].abs().double(), layer.bias[gone].double()
            p = activation_probability(gamma, bias)
            density = torch.exp(-((bias / gamma) ** 2) / 2) / (2 * torch.pi) ** 0.5
            fires = max(fires, float(p.max()))
            mean = max(mean, float((gamma * density + bias * p).max()))
    return {"largest_probability": fires, "largest_mean_output": mean}


def summary(record: Mapping[str, Any], limit: int = 10) -> str:
    """A record in a few lines.

    Args:
        record: Of :func:`.strip.strip`.
        limit: Reasons for what stays to show.
    """
    filters, macs, proof = record["filters"], record["macs"], record["proof"]
    parameters = record["parameters"]
    lines = [
        f"{filters['removed']} of {filters['all']} filters removed: {filters['dead']} dead, "
        f"{filters['constant']} constant, {filters['inactive']} inactive, "
        f"{filters['unread']} that only these read or feed",
        f"multiply-accumulates {macs['before']:.4g} -> {macs['after']:.4g} "
        f"({100 * (1 - macs['after'] / macs['before']):.1f}% saved; "
        f"{macs['predicted']:.4g} predicted from the collapsed filters)",
        f"parameters {parameters['before']} -> {parameters['after']}",
        f"largest difference of the outputs {proof['largest_relative_difference']:.2g}, relative "
        f"to the largest output (images: {proof['images']})",
    ]
    lines += [f"  {name}: {value:.2g}" for name, value in proof["differences"].items()]
    if "inactive_bound" in record:
        bound = record["inactive_bound"]
        lines.append(
            f"inactive filters: of normal inputs each fires for {bound['largest_probability']:.2g} "
            f"at most, with a mean output of {bound['largest_mean_output']:.2g} at most"
        )
    if "seconds" in record:
        seconds = record["seconds"]
        lines.append(
            f"time {1000 * seconds['before']:.1f} -> {1000 * seconds['after']:.1f} ms per image: "
            f"{seconds['speedup']:.2f} times as fast (median of {seconds['rounds']} pairs)"
        )
    whys: dict[str, int] = defaultdict(int)
    for each in record["kept"]:
        whys[each["why"]] += len(each["filters"])
    if whys:
        lines.append(f"{sum(whys.values())} filters left whole:")
    ranked = sorted(whys.items(), key=lambda item: -item[1])
    lines += [f"  {n:5d}  {why}" for why, n in ranked[:limit]]
    if len(ranked) > limit:
        lines.append(f"  ... and {len(ranked) - limit} more reasons; the record has them all")
    return "\n".join(lines)
