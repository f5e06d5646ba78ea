"""The figure of an experiment, drawn from its JSON alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from psbn_mmdet.collapse.figures import FIGURE_STYLE

from .experiments import TWIN
from .settings import BN
from .summary import FILTERS, measured_filters

COLORS = ("#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d")


def _points(
    axes: Axes, x: Any, values: list[dict[str, Any]], label: str, color: str, **style: Any
) -> None:
    """Values with their interval, or where they have none, with their deviation over seeds."""
    mean = np.array([v["mean"] for v in values])
    spread = [(v["low"], v["high"]) if "low" in v else _deviation(v) for v in values]
    low, high = np.array(spread).T
    # A bootstrap's interval need not hold the value itself.
    error = np.maximum([mean - low, high - mean], 0)
    drawn: dict[str, Any] = {"marker": "o", "ms": 4, "lw": 1.2, "capsize": 2, **style}
    axes.errorbar(x, mean, error, color=color, label=label, **drawn)


def _deviation(value: dict[str, Any]) -> tuple[float, float]:
    std = value["std"] or 0  # None for a single seed
    return value["mean"] - std, value["mean"] + std


def _lines(summary: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for entry in summary["arms"].values():
        lines.setdefault(entry["line"], []).append(entry)
    return lines


def _draw_transfer(figure: Figure, summary: dict[str, Any]) -> None:
    """AP, its difference to BN, and what is still collapsed, against collapse at the start."""
    figure.set_size_inches(14, 4.4)
    left, middle, right = figure.subplots(1, 3)
    differences = {(d["arm"], d["baseline"]): d for d in summary["differences"][-1]}
    arms = {(e["line"], e["x"]): arm for arm, e in summary["arms"].items()}
    for i, (color, (line, of_line)) in enumerate(zip(COLORS, _lines(summary).items())):
        aside = 0.6 * (i - 1.5)
        entries = [e for e in of_line if e["x"] != TWIN]
        for entry in (e for e in of_line if e["x"] == TWIN):
            at = [entry["start"]["collapsed"]["mean"] + aside]
            style: dict[str, Any] = dict(
                label=f"{line}, pretrained with psBN", color=color, mfc="white", marker="D"
            )
            _points(left, at, [entry["rounds"][-1]["AP"]], **style)
            _points(right, at, [entry["rounds"][-1]["collapsed"]], **style)
        x = np.array([e["start"]["collapsed"]["mean"] for e in entries]) + aside
        _points(left, x, [e["rounds"][-1]["AP"] for e in entries], line, color)
        _points(right, x, [e["rounds"][-1]["collapsed"] for e in entries], line, color)
        judged = [
            (position, differences[arms[line, e["x"]], arms[BN, e["x"]]])
            for position, e in zip(x, entries, strict=True)
            if line != BN and (BN, e["x"]) in arms
        ]
        if judged:
            values = [dict(mean=d["AP"], low=d["low"], high=d["high"]) for _, d in judged]
            _points(middle, [position for position, _ in judged], values, line, color)
    middle.axhline(0, color=COLORS[0], lw=1.2)
    left.set_ylabel("AP after finetuning (points)")
    middle.set_ylabel("AP minus that of BN (points)")
    right.set_ylabel("collapsed filters after finetuning (%)")
    for axes in (left, middle, right):
        axes.set_xlabel("collapsed filters of the pretrained backbone (%)")
    low, high = left.get_ylim()
    left.set_ylim(low - 0.45 * (high - low), high)  # room for the legend
    left.legend(fontsize=8, loc="lower left")


def _draw_revive(figure: Figure, summary: dict[str, Any]) -> None:
    """AP and what is collapsed after finetuning: a row for each start, a color for a method."""
    arms = summary["arms"].values()
    starts = sorted(dict.fromkeys(e["x"] for e in arms), key=lambda x: x.partition(",")[0])
    methods = list(_lines(summary))
    figure.set_size_inches(13, 1.6 + 0.42 * len(starts))
    ap, collapsed = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for i, (color, method) in enumerate(zip(COLORS, methods, strict=False)):
        entries = [e for e in arms if e["line"] == method]
        y = [starts.index(e["x"]) + 0.15 * (i - (len(methods) - 1) / 2) for e in entries]
        for axes, key in ((ap, "AP"), (collapsed, "collapsed")):
            _rows(
                axes, y, [e["rounds"][-1][key] for e in entries], f"finetuned with {method}", color
            )
    before = {e["x"]: e["start"]["collapsed"]["mean"] for e in arms}
    ap.set_yticks(range(len(starts)), [f"{x} ({before[x]:.0f}% collapsed)" for x in starts])
    ap.set_ylim(len(starts) - 0.5, -0.5)
    for axes in (ap, collapsed):
        for i in range(0, len(starts), 2):
            axes.axhspan(i - 0.5, i + 0.5, color="0.95", lw=0, zorder=0)
        axes.grid(axis="y", visible=False)
    ap.set_ylabel("backbone at the start")
    ap.set_xlabel("AP after finetuning (points)")
    collapsed.set_xlabel("collapsed filters after finetuning (%)")
    collapsed.set_xlim(left=-1)
    figure.legend(*ap.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def _rows(axes: Axes, y: list[float], values: list[dict[str, Any]], label: str, color: str) -> None:
    """As :func:`_points`, lying on their side and not joined."""
    mean = np.array([v["mean"] for v in values])
    spread = [(v["low"], v["high"]) if "low" in v else _deviation(v) for v in values]
    low, high = np.array(spread).T
    error = np.maximum([mean - low, high - mean], 0)
    axes.errorbar(
        mean, y, xerr=error, color=color, label=label, marker="o", ms=4, lw=1.2, capsize=2, ls=""
    )


def _draw_rounds(figure: Figure, summary: dict[str, Any]) -> None:
    figure.set_size_inches(14, 4.4)
    panels = dict(
        zip(("AP", "collapsed", "active_probability"), figure.subplots(1, 3), strict=True)
    )
    for i, (color, (arm, entry)) in enumerate(zip(COLORS, summary["arms"].items())):
        x = np.arange(1, len(entry["rounds"]) + 1) + 0.05 * (i - 1)
        for key, axes in panels.items():
            _points(axes, x, [r[key] for r in entry["rounds"]], arm, color)
    for key, axes in panels.items():
        axes.set(xlabel="round", ylabel={"AP": "AP (points)", **FILTERS}[key])
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels["AP"].legend(fontsize=8)


def _draw_alpha(figure: Figure, summary: dict[str, Any]) -> None:
    """Every measure against alpha; BN is the dashed line."""
    keys = ("AP", *(key for key in measured_filters(summary) if key != "idle"))
    columns = math.ceil(len(keys) / 2)
    figure.set_size_inches(5 * columns, 7.5)
    panels = figure.subplots(2, columns).flat
    titles = {"AP": "AP (points)", **FILTERS}
    for key, axes in zip(keys, panels):
        for color, (line, entries) in zip(COLORS, _lines(summary).items()):
            swept = [e for e in entries if e["x"] is not None]
            if swept:
                values = [e["rounds"][-1][key] for e in swept]
                _points(axes, [e["x"] for e in swept], values, f"psBN, {line}", color)
            for entry in (e for e in entries if e["x"] is None):
                value = entry["rounds"][-1][key]["mean"]
                axes.axhline(value, color=color, ls="--", lw=1, label=f"BN, {line}")
        axes.set(xscale="log", xlabel="alpha", ylabel=titles[key])
        if key == "gamma_median":
            axes.set_yscale("log")
    for axes in panels:
        axes.set_axis_off()
    figure.axes[0].legend(fontsize=8)


_DRAW: dict[str, Callable[[Figure, dict[str, Any]], None]] = {
    "transfer": _draw_transfer,
    "revive": _draw_revive,
    "degrees": _draw_revive,
    "rounds": _draw_rounds,
    "alpha": _draw_alpha,
}


def draw(summary: dict[str, Any], path: Path) -> None:
    """The figure of an experiment's JSON as a PNG file."""
    style: dict[Any, Any] = dict(FIGURE_STYLE)
    with mpl.rc_context(style):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        _DRAW[summary["experiment"]](figure, summary)
        figure.suptitle(summary["title"])
        figure.savefig(path)
