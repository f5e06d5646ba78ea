"""The figure of an experiment, drawn from its JSON."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from psbn_mmdet.collapse.figures import FIGURE_STYLE
from studies.runs import RunError

from .experiments import figure_of
from .summary import METRICS

_COLORS = ("#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#66a61e", "#a6761d")


def _line(axes: Any, rounds: list[dict[str, Any]], metric: str, label: str, color: str) -> None:
    mean = np.array([r[metric]["mean"] for r in rounds])
    std = np.array([r[metric]["std"] or 0 for r in rounds])
    x = np.arange(1, len(mean) + 1)
    axes.plot(x, mean, "o-", color=color, label=label, ms=4)
    axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, lw=0)


def _draw_rounds(figure: Figure, summary: dict[str, Any]) -> None:
    """Sparsity above accuracy, a column for each line."""
    lines = list(dict.fromkeys(e["line"] for e in summary["arms"].values()))
    figure.set_size_inches(5 * len(lines) + 0.5, 6.5)
    axes = figure.subplots(2, len(lines), sharex=True, squeeze=False)
    for column, line in enumerate(lines):
        members = [(a, e) for a, e in summary["arms"].items() if e["line"] == line]
        for color, (arm, entry) in zip(_COLORS, members):
            label = arm.removeprefix(f"{line}, ")
            for row, metric in enumerate(("sparsity", "accuracy")):
                _line(axes[row, column], entry["rounds"], metric, label, color)
                axes[row, column].set_ylabel(METRICS[metric])
        axes[0, column].set_title(line)
        axes[0, column].set_ylim(bottom=0)
        axes[1, column].set_xlabel("round")
        axes[0, column].legend(fontsize=8)
        axes[1, column].xaxis.get_major_locator().set_params(integer=True)


def _draw_random_labels(figure: Figure, summary: dict[str, Any]) -> None:
    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    for color, (arm, entry) in zip(_COLORS, summary["arms"].items()):
        losses = np.concatenate([r["epoch_losses"] for r in entry["rounds"]])
        per_round = len(losses) / len(entry["rounds"])
        left.plot(np.arange(1, len(losses) + 1) / per_round, losses, color=color, label=arm, lw=1)
        _line(right, entry["rounds"], "sparsity", arm, color)
    left.set(xlabel="round", ylabel="training loss")
    right.set(xlabel="round", ylabel=METRICS["sparsity"])
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)


def _draw_sweep(figure: Figure, summary: dict[str, Any]) -> None:
    """Sparsity against what was varied, after each round."""
    figure.set_size_inches(6.5, 4.5)
    axes = figure.subplots()
    lines: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for entry in summary["arms"].values():
        for number, row in enumerate(entry["rounds"], 1):
            value = row["sparsity"]
            lines.setdefault((entry["line"], number), []).append(
                (entry["x"], value["mean"], value["std"] or 0)
            )
    for i, ((line, number), values) in enumerate(lines.items()):
        x, mean, std = np.transpose(sorted(values))
        label = f"{line}, after round {number}"
        axes.errorbar(x, mean, std, fmt="o-", color=_COLORS[i % 6], label=label, ms=4, capsize=3)
    axes.set(
        xlabel="initial γ" if summary["experiment"] == "fig5b" else "initial learning rate",
        ylabel=METRICS["sparsity"],
    )
    if summary["experiment"] == "fig5b":
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _draw_finetune(figure: Figure, summary: dict[str, Any]) -> None:
    """Accuracy and collapse after finetuning; a line is a seed, a bar the mean of an arm."""
    arms = {a: e for a, e in summary["arms"].items() if e["line"] == "after"}
    figure.set_size_inches(10, 1.5 + 0.35 * len(arms))
    y = np.arange(len(arms))
    seeds = sorted({seed for entry in arms.values() for seed in entry["seeds"]})
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(panels, ("accuracy", "collapsed"), strict=True):
        values = np.full((len(arms), len(seeds)), np.nan)
        for row, entry in zip(values, arms.values(), strict=True):
            row[[seeds.index(s) for s in entry["seeds"]]] = entry["rounds"][-1][metric]["values"]
        axes.plot(values, y, "o-", color="#8195a8", lw=0.7, ms=3)
        axes.plot(np.nanmean(values, 1), y, "|", color="black", ms=18, mew=2)
        axes.set(xlabel=METRICS[metric])
    panels[0].set_yticks(y, list(arms))
    panels[0].invert_yaxis()


def _draw_alpha(figure: Figure, summary: dict[str, Any]) -> None:
    """Measures after the last round against alpha; BN is the dashed line."""
    lines = list(dict.fromkeys(e["line"] for e in summary["arms"].values()))
    measured = [r for e in summary["arms"].values() for r in e["rounds"][-1:]]
    wanted = ("accuracy", "collapsed", "stuck", "p_active")
    metrics = [m for m in wanted if all(m in row for row in measured)]
    figure.set_size_inches(4 * len(metrics), 4)
    for axes, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
        for color, line in zip(_COLORS, lines):
            points = []
            for entry in summary["arms"].values():
                value = entry["rounds"][-1][metric]
                if entry["line"] == line and entry["x"] is None:
                    axes.axhline(value["mean"], color=color, ls="--", lw=0.8)
                elif entry["line"] == line:
                    points.append((entry["x"], value["mean"], value["std"] or 0))
            x, mean, std = np.transpose(sorted(points))
            axes.errorbar(x, mean, std, fmt="o-", color=color, label=line, ms=4, capsize=3)
        axes.set(xscale="log", ylabel=METRICS[metric])
        if metric in ("collapsed", "stuck"):
            axes.set_ylim(bottom=0)
        axes.set_xlabel("α")
    figure.axes[0].legend(title="dashed: BN", fontsize=8)


def _draw_snapshots(figure: Figure, summary: dict[str, Any]) -> None:
    figure.set_size_inches(10, 4)
    axes = figure.subplots(1, 2)
    for color, (arm, entry) in zip(_COLORS, summary["arms"].items()):
        for panel, metric in zip(axes, ("accuracy", "sparsity"), strict=True):
            _line(panel, entry["rounds"], metric, arm, color)
            printed = (summary["paper"] or {}).get(arm)
            if printed and len(printed[metric]) == len(entry["rounds"]):
                x = np.arange(1, len(printed[metric]) + 1)
                panel.plot(x, printed[metric], "x:", color=color, lw=0.8)
            panel.set(xlabel="snapshot", ylabel=METRICS[metric])
            panel.xaxis.get_major_locator().set_params(integer=True)
        axes[0].axhline(entry["ensemble"]["mean"], color=color, ls="--", lw=0.8)
    axes[0].set_title("crosses: the paper; dashed: our ensembles", fontsize=9)
    axes[1].legend(fontsize=8)  # where there is room


def _draw_histograms(figure: Figure, summary: dict[str, Any]) -> None:
    """Of one layer, all seeds together."""
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    values = {arm: np.concatenate(norms) for arm, norms in summary["filter_norms"].items()}
    bins = np.linspace(0, max(v.max() for v in values.values()), 41)
    for color, (arm, of_arm) in zip(_COLORS, values.items()):
        axes.hist(of_arm, bins.tolist(), color=color, alpha=0.6, label=arm)
    rounds = len(next(iter(summary["arms"].values()))["rounds"])
    axes.set(
        xlabel=f"L1 norm of a filter of {summary['layer']}",
        ylabel="filters",
        title=f"after round {rounds}",
    )
    axes.legend()


def _draw_paths(figure: Figure, summary: dict[str, Any]) -> None:
    """(gamma, beta) of one layer's filters in the second round of the first run."""
    paths = summary["paths"]
    figure.set_size_inches(6, 5)
    axes = figure.subplots()
    for gamma, bias, fell in zip(paths["gamma"], paths["bias"], paths["fell"], strict=True):
        color = "#c1121f" if fell else "#8195a8"
        axes.plot(gamma, bias, color=color, lw=0.8, alpha=0.8)
        axes.plot(gamma[0], bias[0], "o", color=color, ms=3)
    if paths["region"]:
        x, y = zip(*paths["region"], strict=True)
        axes.fill(x, y, color="#e69f00", alpha=0.15, lw=0, label="non-trainable region")
    axes.plot([], [], color="#c1121f", label="collapsed in this round")
    axes.plot([], [], color="#8195a8", label="others")
    axes.plot([], [], "o", color="black", ms=3, label="where they began")
    axes.set(xlabel="γ", ylabel="β", title=f"{paths['layer']}, second round")
    axes.legend(fontsize=8)


def _draw_pruning(figure: Figure, summary: dict[str, Any]) -> None:
    """Accuracy of the pruned network against the FLOPs that it has left."""
    points: dict[str, list[tuple[float, float]]] = {}
    for arm, entry in summary["arms"].items():
        for row in entry["rounds"]:
            left = summary["flops_percent"][arm] * (1 - row["sparsity"]["mean"] / 100)
            points.setdefault(entry["line"], []).append((left, row["pruned_accuracy"]["mean"]))
    for line in ("larger lr", "uniform filter ablation"):
        if line in points and "retrain" in points:
            points[line].insert(0, points["retrain"][0])
    figure.set_size_inches(6.5, 4.5)
    axes = figure.subplots()
    for color, (line, values) in zip(_COLORS, points.items()):
        axes.plot(*np.transpose(sorted(values)), "o-", color=color, label=line, ms=4)
    axes.set(xlabel="FLOPs left (%)", ylabel="accuracy of the pruned network (%)")
    axes.legend(fontsize=8)


def _draw_cuts(figure: Figure, summary: dict[str, Any]) -> None:
    """Accuracy against FLOPs and time: hollow before the training where there was one before."""
    figure.set_size_inches(10, 4)
    panels = figure.subplots(1, 2, sharey=True)
    for color, (arm, entry) in zip(_COLORS, summary["cuts"].items()):
        rounds = summary["arms"][arm]["rounds"]
        after, before = rounds[-1]["accuracy"], entry["accuracy"]["mean"]
        time = entry["time_percent"][1] if entry["time_percent"] else 100
        for axes, x in zip(panels, (entry["flops_percent"]["mean"], time), strict=True):
            axes.errorbar(
                x, after["mean"], after["std"], fmt="o", color=color, capsize=3, label=arm
            )
            if len(rounds) == 1:  # the others start at random
                axes.plot(x, before, "o", mfc="none", color=color, ms=8)
    panels[0].plot([], [], "o", mfc="none", color="black", ms=8, label="before the training")
    panels[0].set(xlabel="FLOPs (% of the collapsed network's)", ylabel=METRICS["accuracy"])
    panels[1].set(xlabel="time of a forward pass (%)")
    panels[0].legend(fontsize=8, loc="lower right")


def _draw_recovery(figure: Figure, summary: dict[str, Any]) -> None:
    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    for color, (arm, entry) in zip(_COLORS, summary["recovery"].items()):
        curves = entry["curves"]
        for panel, key in ((left, "still_collapsed_percent"), (right, "all_collapsed_percent")):
            panel.plot(curves["iterations"], curves[key], color=color, label=arm)
    left.set(xlabel="iteration", ylabel="of those collapsed before: still collapsed (%)")
    right.set(xlabel="iteration", ylabel="of all filters: collapsed (%)")
    left.legend(fontsize=8)


_DRAW: dict[str, Callable[[Figure, dict[str, Any]], None]] = {
    "rounds": _draw_rounds,
    "robustness": _draw_rounds,
    "random_labels": _draw_random_labels,
    "histograms": _draw_histograms,
    "paths": _draw_paths,
    "pruning": _draw_pruning,
    "sweep": _draw_sweep,
    "snapshots": _draw_snapshots,
    "cuts": _draw_cuts,
    "recovery": _draw_recovery,
    "finetune": _draw_finetune,
    "alpha": _draw_alpha,
}


def draw(summary: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """The figure of an experiment, from its JSON alone, as PNG.

    Args:
        summary: What :func:`.summary.summarise` returns, or its JSON.
        path: Where to write.

    Raises:
        RunError: The JSON is older than this code and lacks what its figure shows.
    """
    with mpl.rc_context(FIGURE_STYLE):  # type: ignore[arg-type]
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        try:
            _DRAW[figure_of(summary["experiment"])](figure, summary)
        except KeyError as error:
            raise RunError(
                f"{summary['experiment']}.json: has no {error}, which its figure shows; summarise "
                "the runs again, with --draw"
            ) from None
        figure.suptitle(summary["title"])
        figure.savefig(path)
