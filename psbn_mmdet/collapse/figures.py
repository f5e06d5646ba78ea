"""PNG files of one run.

The share of collapsed filters over training, the same per layer as a heat map, the L1 norms of a
layer's filters (the paper's Fig. 1a), and their paths in the (gamma, bias) plane with the region in
which ReLU never fires (Fig. 1b).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .criteria import STATES
from .over_training import (
    COLORS,
    MEASURES,
    counted,
    non_trainable,
    percent,
    starts,
    states,
    sum_by_layer,
)
from .trace import Trace, read

FIGURE_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "font.size": 10,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}


def write_figures(
    trace: Trace | str | os.PathLike[str], folder: str | os.PathLike[str]
) -> list[Path]:
    """Draw ``collapse.png``, ``layers.png``, ``norms.png`` and ``paths.png``.

    The last two are of the layer with the largest share of filters that do nothing.
    ``collapse.png`` is left out of a single moment, ``norms.png`` where no convolution is known in
    front of any layer.

    Args:
        trace: A run, its trace file or its work dir.
        folder: Where to; made if need be.

    Raises:
        TraceError: The file is no trace.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trace = trace if isinstance(trace, Trace) else read(trace)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(FIGURE_STYLE):  # type: ignore[arg-type]
        for name, draw in [
            ("collapse", _draw_course),
            ("layers", _draw_heat_map),
            ("norms", _draw_norms),
            ("paths", _draw_paths),
        ]:
            figure = Figure(figsize=(7, 4), layout="constrained")
            FigureCanvasAgg(figure)
            if draw(figure, trace):
                figure.savefig(folder / f"{name}.png")
                written.append(folder / f"{name}.png")
    return written


def _draw_course(figure: Any, trace: Trace) -> bool:
    if len(trace.iterations) < 2:
        return False
    axes = figure.add_subplot()
    shares = percent(*counted(trace))
    for label, share in zip(MEASURES, shares, strict=True):
        known = np.isfinite(share)
        if not known.any() or (label == "not finite" and not share.any()):
            continue
        marker = "o" if known.sum() < 30 else ""
        axes.plot(
            trace.iterations[known], share[known], marker=marker, color=COLORS[label], label=label
        )
    axes.set(ylabel="% of the filters", title=trace.report().summary().splitlines()[0])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("iteration")
    axes.legend(frameon=False)
    return True


def _draw_heat_map(figure: Any, trace: Trace) -> bool:
    sizes = np.diff(starts(trace))
    share = 100 * sum_by_layer(trace, counted(trace)[0][0]) / sizes
    height = min(max(3.0, 0.14 * len(sizes) + 1), 14.0)
    figure.set_size_inches(8, height)
    axes = figure.add_subplot()
    axes.grid(False)
    times = trace.iterations.astype(float)
    middle = (times[1:] + times[:-1]) / 2
    edges = np.concatenate([times[:1] - (not len(middle)), middle, times[-1:] + (not len(middle))])
    # What the run comes to sets the scale, not a start with gamma = 0.
    top = max(float(share[len(share) // 2 :].max()), 1.0)
    image = axes.pcolormesh(
        edges, np.arange(len(sizes) + 1), share.T, cmap="OrRd", vmin=0, vmax=top
    )
    axes.invert_yaxis()
    step = -(-len(sizes) // 90)
    names = [layer.name for layer in trace.layers]
    axes.set_yticks(np.arange(0, len(names), step) + 0.5, names[::step], fontsize=6)
    axes.set_xlabel("iteration")
    axes.set_title("Collapsed filters of each layer")
    figure.colorbar(image, label="% collapsed", extend="max" if share.max() > top else "neither")
    return True


def _most_collapsed(trace: Trace, among: NDArray[np.bool_]) -> int:
    """The layer among some with the largest share of filters that do nothing at the end."""
    state = states(trace, slice(len(trace.iterations) - 1, None))
    well = [STATES.index("live"), STATES.index("carrying")]
    share = sum_by_layer(trace, ~np.isin(state, well))[0] / np.diff(starts(trace))
    return int(np.where(among, share, -1).argmax())


def _draw_norms(figure: Any, trace: Trace) -> bool:
    paired = np.array([layer.conv is not None for layer in trace.layers])
    if not paired.any():
        return False
    layer = _most_collapsed(trace, paired)
    start, end = starts(trace)[layer : layer + 2]
    axes = figure.add_subplot()
    times = sorted({0, len(trace.iterations) - 1})
    first, last = (_finite(trace.norm[t, start:end].astype("<f4")) for t in (times[0], times[-1]))
    labels = [trace.moment(t) for t in times]
    top = np.nanmax(np.concatenate([first, last]), initial=1e-12)
    bins = np.linspace(0, top, 41)
    if len(times) > 1:
        axes.hist(first, bins, color="#c9d1d9", label=labels[0])
    axes.hist(
        last,
        bins,
        histtype="step",
        lw=1.8,
        color=COLORS["collapsed"],
        label=labels[-1],
    )
    axes.set(
        xlabel="L1 norm of the filter",
        ylabel="filters",
        title=f"Filters of {trace.layers[layer].conv}",
    )
    axes.legend(frameon=False)
    return True


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """NaN for what is not finite, which matplotlib leaves out."""
    return np.where(np.isfinite(values), values, np.nan)


def _draw_paths(figure: Any, trace: Trace) -> bool:
    layer = _most_collapsed(trace, np.ones(len(trace.layers), bool))
    start, end = starts(trace)[layer : layer + 2]
    gamma, bias = _finite(trace.gamma[:, start:end]), _finite(trace.bias[:, start:end])
    last = states(trace, slice(len(gamma) - 1, None))[0, start:end]
    axes = figure.add_subplot()
    figure.set_size_inches(7, 5.5)
    width = 1.05 * float(np.nanmax(np.abs(gamma), initial=1e-6))
    low, high = float(np.nanmin(bias, initial=0)), float(np.nanmax(bias, initial=0))
    pad = 0.06 * max(high - low, 1e-6)
    low, high = low - pad, high + pad
    corners = non_trainable(trace, width, low)
    if corners and trace.layers[layer].followed_by == "relu":
        label = f"non-trainable: P(ReLU fires) < {trace.inactive_below:g}"
        axes.fill(*zip(*corners, strict=True), color="#f3d9d6", lw=0, label=label, zorder=0)
    for code, state in enumerate(STATES):
        chosen = last == code
        if chosen.any():
            axes.plot(
                gamma[:, chosen], bias[:, chosen], color=COLORS[state], lw=0.7, alpha=0.5, zorder=1
            )
            axes.plot(
                gamma[-1, chosen],
                bias[-1, chosen],
                "o",
                ms=4,
                color=COLORS[state],
                label=f"{int(chosen.sum())} {state}",
                zorder=2,
            )
    axes.set(
        xlim=(-width, width),
        ylim=(low, high),
        xlabel="gamma",
        ylabel="bias (psBN: beta + alpha)",
        title=f"{trace.layers[layer].name}, {trace.moment(0)} to {trace.moment(-1)}",
    )
    axes.legend(frameon=False, fontsize=8)
    return True
