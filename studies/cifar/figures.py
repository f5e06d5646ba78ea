"""The figure of an experiment, with its table and JSON beside it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from psbn_mmdet.collapse import filter_l1
from psbn_mmdet.collapse.course import non_trainable
from psbn_mmdet.collapse.figures import FIGURE_STYLE
from psbn_mmdet.collapse.trace import Trace, read

from .engine import folder_of, macs
from .experiments import Experiment
from .rounds import network_state
from .settings import Settings, write_json
from .summary import METRICS, by_arm, finished, markdown, spread, summarise

_COLORS = ("#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#66a61e", "#a6761d")


def _line(axes: Any, rounds: list[dict], metric: str, label: str, color: str) -> None:
    mean = np.array([r[metric]["mean"] for r in rounds])
    std = np.array([r[metric]["std"] or 0 for r in rounds])
    x = np.arange(1, len(mean) + 1)
    axes.plot(x, mean, "o-", color=color, label=label, ms=4)
    axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, lw=0)


def _draw_rounds(figure: Figure, summary: dict[str, Any], *_: Any) -> None:
    """Sparsity above accuracy, a column for each line."""
    lines = list(dict.fromkeys(e["line"] for e in summary["arms"].values()))
    figure.set_size_inches(5 * len(lines) + 0.5, 6.5)
    axes = figure.subplots(2, len(lines), sharex=True, squeeze=False)
    for column, line in enumerate(lines):
        members = [(a, e) for a, e in summary["arms"].items() if e["line"] == line]
        for color, (arm, entry) in zip(_COLORS, members, strict=False):
            label = arm.removeprefix(f"{line}, ")
            for row, metric in enumerate(("sparsity", "accuracy")):
                _line(axes[row, column], entry["rounds"], metric, label, color)
                axes[row, column].set_ylabel(METRICS[metric])
        axes[0, column].set_title(line)
        axes[0, column].set_ylim(bottom=0)
        axes[1, column].set_xlabel("round")
        axes[0, column].legend(fontsize=8)
        axes[1, column].xaxis.get_major_locator().set_params(integer=True)


def _draw_random_labels(figure: Figure, summary: dict[str, Any], *_: Any) -> None:
    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    for color, (arm, entry) in zip(_COLORS, summary["arms"].items(), strict=False):
        losses = np.concatenate([r["epoch_losses"] for r in entry["rounds"]])
        per_round = len(losses) / len(entry["rounds"])
        left.plot(np.arange(1, len(losses) + 1) / per_round, losses, color=color, label=arm, lw=1)
        _line(right, entry["rounds"], "sparsity", arm, color)
    left.set(xlabel="round", ylabel="training loss")
    right.set(xlabel="round", ylabel=METRICS["sparsity"])
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)


def conv_norms(settings: Settings, folder: Path) -> dict[str, np.ndarray]:
    """L1 norms of the filters of each convolution at the end of the last round."""
    state = network_state(folder / f"round_{settings.rounds}.pth")
    return {
        k.removesuffix(".weight"): filter_l1(v).numpy() for k, v in state.items() if v.dim() == 4
    }


def near_zero_percent(norms: np.ndarray) -> float:
    """Share of a layer's filters with less than a 20th of the L1 norm of its large ones.

    Large is the 90th percentile: the median would be near 0 itself where half collapsed.
    """
    return 100 * float((norms < np.quantile(norms, 0.9) / 20).mean())


def _draw_histograms(
    figure: Figure, summary: dict[str, Any], experiment: Experiment, out: Path
) -> None:
    """The layer in which most filters of the first arm are near 0, in both arms."""
    arms = by_arm(finished(experiment, out))
    norms = {
        arm: [conv_norms(r.settings, folder_of(experiment, r, out)) for r, _ in members]
        for arm, members in arms.items()
    }
    first = next(iter(norms.values()))[0]
    layer = max(first, key=lambda k: near_zero_percent(first[k]))
    summary["layer"] = layer
    summary["filters_near_zero_percent"] = {
        arm: spread(near_zero_percent(n[layer]) for n in members) for arm, members in norms.items()
    }
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    values = {arm: np.concatenate([n[layer] for n in members]) for arm, members in norms.items()}
    bins = np.linspace(0, max(v.max() for v in values.values()), 41)
    for color, (arm, of_arm) in zip(_COLORS, values.items(), strict=False):
        axes.hist(of_arm, bins, color=color, alpha=0.6, label=arm)
    axes.set(
        xlabel=f"L1 norm of a filter of {layer}",
        ylabel="filters",
        title=f"after round {next(iter(arms.values()))[0][0].settings.rounds}",
    )
    axes.legend()


def _layer_slices(trace: Trace) -> dict[str, slice]:
    slices, start = {}, 0
    for name, filters, *_ in trace.layers:
        slices[name] = slice(start, start + filters)
        start += filters
    return slices


def _draw_paths(figure: Figure, summary: dict[str, Any], experiment: Experiment, out: Path) -> None:
    """(gamma, beta) of one layer's filters in the second round of the first run."""
    run, _ = finished(experiment, out)[0]
    trace = read(folder_of(experiment, run, out) / "collapse.trace")
    length = run.settings.iterations_per_round
    inside = (trace.iterations >= length) & (trace.iterations <= 2 * length)
    gamma, bias = trace.gamma[inside], trace.bias[inside]
    fell = (np.abs(gamma[-1]) < trace.threshold) & (np.abs(gamma[0]) >= trace.threshold)
    slices = _layer_slices(trace)
    name = max(slices, key=lambda k: fell[slices[k]].mean())
    part = slices[name]
    summary["layer"] = name
    summary["collapsed_in_round_2"] = int(fell[part].sum())
    figure.set_size_inches(6, 5)
    axes = figure.subplots()
    for i in range(part.start, part.stop):
        color = "#c1121f" if fell[i] else "#8195a8"
        axes.plot(gamma[:, i], bias[:, i], color=color, lw=0.8, alpha=0.8)
        axes.plot(gamma[0, i], bias[0, i], "o", color=color, ms=3)
    half, bottom = np.abs(axes.get_xlim()).max(), axes.get_ylim()[0]
    corners = non_trainable(trace, half, bottom)
    if corners:
        region = dict(color="#e69f00", alpha=0.15, lw=0, label="non-trainable region")
        axes.fill(*zip(*corners, strict=True), **region)
    axes.plot([], [], color="#c1121f", label="collapsed in this round")
    axes.plot([], [], color="#8195a8", label="others")
    axes.plot([], [], "o", color="black", ms=3, label="where they began")
    axes.set(xlabel="γ", ylabel="β", title=f"{name.removeprefix('network.')}, second round")
    axes.legend(fontsize=8)


def _draw_pruning(figure: Figure, summary: dict[str, Any], *_: Any) -> None:
    """Accuracy of the pruned network against the FLOPs that it has left."""
    points: dict[str, list[tuple[float, float]]] = {}
    full = max(e["settings"]["width"] for e in summary["arms"].values())
    for entry in summary["arms"].values():
        s = entry["settings"]
        size = macs(s["network"], s["width"]) / macs(s["network"], full)
        for row in entry["rounds"]:
            left = 100 * size * (1 - row["sparsity"]["mean"] / 100)
            points.setdefault(entry["line"], []).append((left, row["pruned_accuracy"]["mean"]))
    for line in ("larger lr", "uniform filter ablation"):
        if line in points and "retrain" in points:
            points[line].insert(0, points["retrain"][0])
    summary["flops_left_percent_and_accuracy"] = points
    figure.set_size_inches(6.5, 4.5)
    axes = figure.subplots()
    for color, (line, values) in zip(_COLORS, points.items(), strict=False):
        axes.plot(*np.transpose(sorted(values)), "o-", color=color, label=line, ms=4)
    axes.set(xlabel="FLOPs left (%)", ylabel="accuracy of the pruned network (%)")
    axes.legend(fontsize=8)


def _draw_sweep(figure: Figure, summary: dict[str, Any], experiment: Experiment, out: Path) -> None:
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
        xlabel="initial γ" if experiment.name == "fig5b" else "initial learning rate",
        ylabel=METRICS["sparsity"],
    )
    if experiment.name == "fig5b":
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _draw_snapshots(figure: Figure, summary: dict[str, Any], *_: Any) -> None:
    figure.set_size_inches(10, 4)
    axes = figure.subplots(1, 2)
    for color, (arm, entry) in zip(_COLORS, summary["arms"].items(), strict=False):
        for panel, metric in zip(axes, ("accuracy", "sparsity"), strict=True):
            _line(panel, entry["rounds"], metric, arm, color)
            printed = (summary["paper"] or {}).get(arm)
            if printed and len(printed[metric]) == len(entry["rounds"]):
                x = np.arange(1, len(printed[metric]) + 1)
                panel.plot(x, printed[metric], "x:", color=color, lw=0.8)
            panel.set(xlabel="snapshot", ylabel=METRICS[metric])
        axes[0].axhline(entry["ensemble"]["mean"], color=color, ls="--", lw=0.8)
    axes[0].set_title("crosses: the paper; dashed: our ensembles", fontsize=9)
    axes[0].legend(fontsize=8)


def recovery_of(trace: Trace) -> dict[str, Any]:
    """What became of the filters that were collapsed at the first moment of a trace.

    ``still_collapsed_percent`` and ``inactive_percent`` are of these filters, at
    each of ``iterations``; ``all_collapsed_percent`` is of all filters.
    """
    before = np.abs(trace.gamma[0]) < trace.threshold
    now = np.abs(trace.gamma) < trace.threshold
    count = int(before.sum())
    still = 100 * now[:, before].mean(1) if count else np.zeros(len(now))
    back = np.nonzero(still <= 50)[0]
    return {
        "iterations": trace.iterations.tolist(),
        "collapsed_before": count,
        "still_collapsed_percent": np.round(still, 3).tolist(),
        "all_collapsed_percent": np.round(100 * now.mean(1), 3).tolist(),
        "half_back": int(trace.iterations[back[0]]) if count and len(back) else None,
    }


def _draw_recovery(
    figure: Figure, summary: dict[str, Any], experiment: Experiment, out: Path
) -> None:
    arms = by_arm(o for o in finished(experiment, out) if o[0].line == "after")
    summary["recovery"] = {}
    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    for color, (arm, members) in zip(_COLORS, arms.items(), strict=False):
        curves = [
            recovery_of(read(folder_of(experiment, run, out) / "collapse.trace"))
            for run, _ in members
        ]
        for panel, key in ((left, "still_collapsed_percent"), (right, "all_collapsed_percent")):
            panel.plot(
                curves[0]["iterations"],
                np.mean([c[key] for c in curves], 0),
                color=color,
                label=arm,
            )
        summary["recovery"][arm] = {
            "collapsed_before": [c["collapsed_before"] for c in curves],
            "still_collapsed_percent": [
                c["still_collapsed_percent"][-1] for c in curves if c["collapsed_before"]
            ],
            "half_back": [c["half_back"] for c in curves],
        }
    left.set(xlabel="iteration", ylabel="of those collapsed before: still collapsed (%)")
    right.set(xlabel="iteration", ylabel="of all filters: collapsed (%)")
    left.legend(fontsize=8)


_DRAW: dict[str, Callable[..., None]] = {
    "rounds": _draw_rounds,
    "random_labels": _draw_random_labels,
    "histograms": _draw_histograms,
    "paths": _draw_paths,
    "pruning": _draw_pruning,
    "sweep": _draw_sweep,
    "snapshots": _draw_snapshots,
    "recovery": _draw_recovery,
}


def write_results(
    experiment: Experiment,
    out: str | os.PathLike,
    folder: str | os.PathLike | None = None,
    command: str = "",
) -> list[Path]:
    """``NAME.png``, ``NAME.json`` and ``NAME.md`` from the finished runs.

    Args:
        experiment: What was run.
        out: Where.
        folder: Where to write; by default the experiment's own under ``out``.
        command: That made them, for the record.

    Raises:
        RunError: No run is finished, or one is of other settings.
    """
    summary = summarise(experiment, out, command)
    folder = Path(folder) if folder else Path(out, experiment.name)
    folder.mkdir(parents=True, exist_ok=True)
    png, table, content = (folder / f"{experiment.name}.{end}" for end in ("png", "md", "json"))
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        _DRAW[experiment.figure](figure, summary, experiment, Path(out))
        figure.suptitle(experiment.title)
        figure.savefig(png)
    write_json(content, summary)
    table.write_text(markdown(summary))
    return [png, content, table]
