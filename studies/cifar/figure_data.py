"""What a figure shows beside means over seeds: norms of filters, paths, points, curves.

Read from the folders of the runs and made ready for JSON, so that a figure can be drawn from the
JSON alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psbn_mmdet.collapse import filter_l1
from psbn_mmdet.collapse.calls import time_in_pairs
from psbn_mmdet.collapse.over_training import non_trainable
from psbn_mmdet.collapse.trace import Trace, read
from studies.runs import folder_of, result_of, spread

from .experiments import BN, Experiment, Run
from .networks import macs
from .pruning import cut, size_of
from .rounds import network_state
from .settings import Settings

Arms = dict[str, list[Run]]
"""Finished runs by arm."""


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


def _norms(experiment: Experiment, arms: Arms, out: Path) -> dict[str, Any]:
    """Of the layer in which most filters of the first arm are near 0, in all arms and seeds."""
    norms = {
        arm: [conv_norms(run.settings, folder_of(experiment, run, out)) for run in runs]
        for arm, runs in arms.items()
    }
    first = next(iter(norms.values()))[0]
    layer = max(first, key=lambda k: near_zero_percent(first[k]))
    return {
        "layer": layer,
        "filter_norms": {a: [_rounded(n[layer]) for n in of] for a, of in norms.items()},
        "near_zero_percent": {
            arm: [near_zero_percent(n[layer]) for n in of] for arm, of in norms.items()
        },
    }


def _layer_slices(trace: Trace) -> dict[str, slice]:
    slices, start = {}, 0
    for name, filters, *_ in trace.layers:
        slices[name] = slice(start, start + filters)
        start += filters
    return slices


def path_of(trace: Trace, iterations_per_round: int) -> dict[str, Any]:
    """(gamma, bias) over the second round, of the layer in which most filters collapse in it.

    Returns:
        ``layer``; ``collapsed``, the number of its filters that did; ``gamma`` and ``bias``, a
        list of moments for each filter; ``fell``, whether it collapsed; ``region``, corners of
        the non-trainable region within the picture.
    """
    inside = (trace.iterations >= iterations_per_round) & (
        trace.iterations <= 2 * iterations_per_round
    )
    gamma, bias = trace.gamma[inside], trace.bias[inside]
    fell = (np.abs(gamma[-1]) < trace.threshold) & (np.abs(gamma[0]) >= trace.threshold)
    slices = _layer_slices(trace)
    name = max(slices, key=lambda k: fell[slices[k]].mean())
    gamma, bias, fell = gamma[:, slices[name]], bias[:, slices[name]], fell[slices[name]]
    return {
        "layer": name.removeprefix("network."),
        "collapsed": int(fell.sum()),
        "fell": fell.tolist(),
        "gamma": [_rounded(path) for path in gamma.T],
        "bias": [_rounded(path) for path in bias.T],
        "region": non_trainable(trace, 1.05 * float(np.abs(gamma).max()), float(bias.min())),
    }


def _paths(experiment: Experiment, arms: Arms, out: Path) -> dict[str, Any]:
    """The paths of the first seed, and how many filters of such a layer collapsed in each."""
    runs = [run for members in arms.values() for run in members]
    found = [
        path_of(
            read(folder_of(experiment, run, out) / "collapse.trace"),
            run.settings.iterations_per_round,
        )
        for run in runs
    ]
    return {"collapsed_in_round_2": [path["collapsed"] for path in found], "paths": found[0]}


def _sizes(experiment: Experiment, arms: Arms, out: Path) -> dict[str, Any]:
    """FLOPs of each arm's network before anything collapses, in percent of the widest one's."""
    sizes = {
        arm: macs(runs[0].settings.network, runs[0].settings.width) for arm, runs in arms.items()
    }
    return {"flops_percent": {a: 100 * size / max(sizes.values()) for a, size in sizes.items()}}


TIMED_IMAGES, TIMED_PAIRS = 500, 15


def _cuts(experiment: Experiment, arms: Arms, out: Path) -> dict[str, Any]:
    """What each network is before it is trained on, in percent of the collapsed one."""
    runs_by_name = {run.name: run for run in experiment.runs}
    found = {}
    for arm, runs in arms.items():
        if runs[0].settings.parent is None:
            continue
        pairs, times = [], []
        for run in runs:
            parent = runs_by_name[run.settings.parent or ""]
            result, before = result_of(experiment, run, out), result_of(experiment, parent, out)
            assert result and before  # finished, and a parent is before its children
            size = parent.settings.image_size
            whole = size_of(parent.settings.network_module(), size)
            whole["accuracy"] = before["rounds"][-1]["accuracy"]
            pairs.append((result.get("start", whole), whole))
            if run.settings.cut:
                folder = folder_of(experiment, parent, out)
                times += time_percent(run.settings, parent.settings, folder)
        found[arm] = {
            "flops_percent": spread(100 * s["macs"] / w["macs"] for s, w in pairs),
            "parameters_percent": spread(100 * s["parameters"] / w["parameters"] for s, w in pairs),
            "accuracy": spread(s["accuracy"] for s, _ in pairs),
            "time_percent": np.percentile(times, [25, 50, 75]).tolist() if times else None,
        }
    return {
        "cuts": found,
        "timed": f"Time: {TIMED_PAIRS} pairs of {TIMED_IMAGES} images for each seed, "
        f"OMP_NUM_THREADS={torch.get_num_threads()}; median and quartiles of all pairs.",
    }


def time_percent(settings: Settings, parent: Settings, folder: Path) -> list[float]:
    """A cut network's time of a forward pass in percent of its parent's, of each pair."""
    whole = parent.network_module()
    whole.load_state_dict(network_state(folder / f"round_{parent.rounds}.pth"))
    smaller = cut(whole, settings)
    for network in (whole, smaller):
        network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(TIMED_IMAGES, 3, parent.image_size, parent.image_size)
    images = images.to(memory_format=torch.channels_last)
    pairs = time_in_pairs(whole, smaller, lambda network: network(images), TIMED_PAIRS)
    return [100 * after / before for before, after in pairs]


def recovery_of(trace: Trace) -> dict[str, Any]:
    """What became of the filters that were collapsed at the first moment of a trace.

    ``still_collapsed_percent`` is of these filters, at each of ``iterations``;
    ``all_collapsed_percent`` is of all filters.
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


def _recovery(experiment: Experiment, arms: Arms, out: Path) -> dict[str, Any]:
    """Means of the curves over seeds, and what is left at their ends."""
    found = {}
    for arm, runs in arms.items():
        if runs[0].line != "after":
            continue
        curves = [
            recovery_of(read(folder_of(experiment, run, out) / "collapse.trace")) for run in runs
        ]
        found[arm] = {
            "collapsed_before": [c["collapsed_before"] for c in curves],
            "still_collapsed_percent": [
                c["still_collapsed_percent"][-1] for c in curves if c["collapsed_before"]
            ],
            "half_back": [c["half_back"] for c in curves],
            "curves": {
                "iterations": curves[0]["iterations"],
                **{
                    key: _rounded(np.mean([c[key] for c in curves], 0))
                    for key in ("still_collapsed_percent", "all_collapsed_percent")
                },
            },
        }
    return {"recovery": found}


CHANCE = 15.0
"""Accuracy in percent, of ten classes, below which a network has learnt nothing."""


def sign_flips(differences: Sequence[float]) -> float:
    """Two-sided p of a paired permutation test, exact: all 2^n ways to flip the signs."""
    values = np.array(differences)
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    means = np.abs(signs @ values)
    return float((means >= abs(values.sum()) * (1 - 1e-12)).mean())


def _robustness(experiment: Experiment, arms: Arms, out: Path) -> dict[str, Any]:
    """Of each arm after its last round: seeds at chance, and accuracy minus that of BN."""
    accuracies: dict[str, dict[int, float]] = {}
    for arm, runs in arms.items():
        results = [(run.settings.seed, result_of(experiment, run, out)) for run in runs]
        accuracies[arm] = {s: r["rounds"][-1]["accuracy"] for s, r in results if r}
    found = {}
    for arm, values in accuracies.items():
        baseline = f"{arms[arm][0].line}, {BN}"
        seeds = [] if arm == baseline else sorted({*values} & {*accuracies.get(baseline, {})})
        differences = [values[seed] - accuracies[baseline][seed] for seed in seeds]
        found[arm] = {
            "at_chance": sum(value < CHANCE for value in values.values()),
            "differences": differences,
            "p": sign_flips(differences) if differences else None,
        }
    return {"robustness": found}


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    """Five digits are more than a picture shows."""
    return [float(f"{value:.5g}") for value in values]


DETAILS: dict[str, Callable[[Experiment, Arms, Path], dict[str, Any]]] = {
    "histograms": _norms,
    "paths": _paths,
    "pruning": _sizes,
    "cuts": _cuts,
    "recovery": _recovery,
    "robustness": _robustness,
}
"""Kind of figure -> what it shows of the finished runs, under the JSON's keys."""
