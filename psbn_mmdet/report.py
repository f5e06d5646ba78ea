"""Pictures of collapse: PNG files of one run, and a page that holds several side by side.

Both draw a :class:`~psbn_mmdet.trace.Trace`: the share of collapsed filters over
training, the same per layer as a heat map, the L1 norms of a layer's filters
(the paper's Fig. 1a), and the way of its filters in the (gamma, bias) plane with
the region in which ReLU never fires (Fig. 1b).
"""

import base64
import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .collapse import activation_probability, collapsed, constant
from .page import TEMPLATE
from .trace import Trace, read

MOMENTS = 300
"""How many moments of a run the page shows as counts; more are thinned evenly."""

PATH_BYTES = 8_000_000
"""What the paths of all filters of all runs may take in the page, in bytes."""

_BYTES_PER_VALUE = 5  # gamma and bias as half floats, the state as a byte
_STATES = ("live", "inactive", "dead", "constant")
_COLORS = {"live": "#8195a8", "inactive": "#e69f00", "dead": "#c1121f", "constant": "#7b2cbf"}
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


def states(trace: Trace, index: slice | NDArray[np.int64] = slice(None)) -> NDArray[np.uint8]:
    """0 live, 1 inactive, 2 dead, 3 constant: (moments, F) for a slice of moments.

    A collapsed filter is dead or constant, whether inactive or not.
    """
    gamma, bias = torch.tensor(trace.gamma[index]), torch.tensor(trace.bias[index])
    found = (activation_probability(gamma, bias) < trace.inactive_below).byte()
    found[collapsed(gamma, trace.threshold)] = 2
    found[constant(gamma, bias, trace.threshold)] = 3
    return found.numpy()


def _evenly(length: int, most: int) -> NDArray[np.int64]:
    """Indices of at most ``most`` of ``length`` moments, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, max(most, 2))).round().astype(int))


def _starts(trace: Trace) -> NDArray[np.int64]:
    return np.cumsum([0, *(filters for _, filters, _ in trace.layers)])


def _sum_by_layer(trace: Trace, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(T, F) -> (T, layers)."""
    return np.add.reduceat(mask, _starts(trace)[:-1], axis=1, dtype=np.int64)


def non_trainable(trace: Trace, half_width: float, bottom: float) -> list[tuple[float, float]]:
    """Corners of the non-trainable region within |gamma| <= half_width, bias >= bottom.

    Phi(bias / |gamma|) < p is bias < Phi^-1(p) |gamma|, a wedge below the origin.
    """
    p = torch.tensor(trace.inactive_below, dtype=torch.float64)
    slope = -float(torch.special.ndtri(p))  # 3.09 for p = 1e-3
    if bottom >= 0 or not np.isfinite(slope) or slope <= 0:
        return []
    reach = min(half_width, -bottom / slope)
    corners = [(-reach, -slope * reach), (0.0, 0.0), (reach, -slope * reach)]
    if reach == half_width:
        corners += [(half_width, bottom), (-half_width, bottom)]
    return corners


# ---------------------------------------------------------------- PNG


def write_figures(trace: Trace | str | os.PathLike, folder: str | os.PathLike) -> list[Path]:
    """Draw ``collapse.png``, ``layers.png``, ``norms.png`` and ``paths.png``.

    The last two are of the layer with the largest share of dead and inactive filters. ``norms.png``
    is left out where no convolution is known in front of any layer.

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
    with mpl.rc_context(FIGURE_STYLE):
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
    axes = figure.add_subplot()
    found = states(trace)
    inactive = _inactive(trace)
    for label, mask, color in [
        ("inactive", inactive, _COLORS["inactive"]),
        ("collapsed", found >= 2, _COLORS["dead"]),
        ("of these constant", found == 3, _COLORS["constant"]),
    ]:
        marker = "o" if len(mask) < 30 else ""
        axes.plot(trace.iterations, 100 * mask.mean(1), marker=marker, color=color, label=label)
    axes.set(ylabel="% of the filters", title=trace.report().summary().splitlines()[0])
    axes.set_ylim(bottom=0)
    _label_time(axes, trace)
    axes.legend(frameon=False)
    return True


def _inactive(trace: Trace) -> NDArray[np.bool_]:
    probability = activation_probability(torch.tensor(trace.gamma), torch.tensor(trace.bias))
    return (probability < trace.inactive_below).numpy()


def _label_time(axes: Any, trace: Trace) -> None:
    if trace.labels is None:
        axes.set_xlabel("iteration")
    else:
        axes.set_xticks(trace.iterations, trace.labels, rotation=20, ha="right")


def _draw_heat_map(figure: Any, trace: Trace) -> bool:
    sizes = np.diff(_starts(trace))
    percent = 100 * _sum_by_layer(trace, states(trace) >= 2) / sizes
    height = min(max(3.0, 0.14 * len(sizes) + 1), 14.0)
    figure.set_size_inches(8, height)
    axes = figure.add_subplot()
    axes.grid(False)
    times = trace.iterations.astype(float)
    middle = (times[1:] + times[:-1]) / 2
    edges = np.concatenate([times[:1] - (not len(middle)), middle, times[-1:] + (not len(middle))])
    # What the run comes to sets the scale, not a start with gamma = 0.
    top = max(float(percent[len(percent) // 2 :].max()), 1.0)
    image = axes.pcolormesh(
        edges, np.arange(len(sizes) + 1), percent.T, cmap="YlOrRd", vmin=0, vmax=top
    )
    axes.invert_yaxis()
    step = -(-len(sizes) // 90)
    names = [name for name, _, _ in trace.layers]
    axes.set_yticks(np.arange(0, len(names), step) + 0.5, names[::step], fontsize=6)
    _label_time(axes, trace)
    axes.set_title("Collapsed filters of each layer")
    figure.colorbar(image, label="% collapsed", extend="max" if percent.max() > top else "neither")
    return True


def _most_collapsed(trace: Trace, among: NDArray[np.bool_]) -> int | None:
    """The layer among some with the largest share of dead and inactive filters at the end."""
    if not among.any():
        return None
    last = slice(len(trace.iterations) - 1, None)
    found = states(trace, last)
    score = _sum_by_layer(trace, found == 2) + _sum_by_layer(trace, _inactive(trace)[last])
    score = (score + 1e-3 * _sum_by_layer(trace, found >= 2))[0] / np.diff(_starts(trace))
    return int(np.where(among, score, -1).argmax())


def _draw_norms(figure: Any, trace: Trace) -> bool:
    paired = np.array([conv is not None for _, _, conv in trace.layers])
    layer = _most_collapsed(trace, paired) if trace.norms else None
    if layer is None:
        return False
    start, end = _starts(trace)[layer : layer + 2]
    axes = figure.add_subplot()
    times = sorted(trace.norms)
    first, last = (_finite(trace.norms[t][start:end]) for t in (times[0], times[-1]))
    labels = [f"iteration {t}" if trace.labels is None else trace.labels[t] for t in times]
    top = np.nanmax(np.concatenate([first, last]), initial=1e-12)
    bins = np.linspace(0, top, 41)
    if len(times) > 1:
        axes.hist(first, bins, color="#c9d1d9", label=labels[0])
    axes.hist(
        last,
        bins,
        histtype="step",
        lw=1.8,
        color=_COLORS["dead"],
        label=labels[-1],
    )
    axes.set(xlabel="L1 norm of the filter", ylabel="filters", title=trace.layers[layer][2])
    axes.legend(frameon=False)
    return True


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """NaN for what is not finite, which matplotlib leaves out."""
    return np.where(np.isfinite(values), values, np.nan)


def _draw_paths(figure: Any, trace: Trace) -> bool:
    layer = _most_collapsed(trace, np.ones(len(trace.layers), bool))
    start, end = _starts(trace)[layer : layer + 2]
    gamma, bias = _finite(trace.gamma[:, start:end]), _finite(trace.bias[:, start:end])
    found = states(trace, slice(len(gamma) - 1, None))[0, start:end]
    axes = figure.add_subplot()
    figure.set_size_inches(7, 5.5)
    width = 1.05 * float(np.nanmax(np.abs(gamma), initial=1e-6))
    low, high = float(np.nanmin(bias, initial=0)), float(np.nanmax(bias, initial=0))
    pad = 0.06 * max(high - low, 1e-6)
    low, high = low - pad, high + pad
    corners = non_trainable(trace, width, low)
    if corners:
        label = f"non-trainable: P(ReLU fires) < {trace.inactive_below:g}"
        axes.fill(*zip(*corners, strict=True), color="#f3d9d6", lw=0, label=label, zorder=0)
    for code, state in enumerate(_STATES):
        chosen = found == code
        if chosen.any():
            axes.plot(
                gamma[:, chosen], bias[:, chosen], color=_COLORS[state], lw=0.7, alpha=0.5, zorder=1
            )
            axes.plot(
                gamma[-1, chosen],
                bias[-1, chosen],
                "o",
                ms=4,
                color=_COLORS[state],
                label=f"{int(chosen.sum())} {state}",
                zorder=2,
            )
    axes.set(
        xlim=(-width, width),
        ylim=(low, high),
        xlabel="gamma",
        ylabel="bias (psBN: beta + alpha)",
        title=f"{trace.layers[layer][0]}, {trace.moment(0)} to {trace.moment(-1)}",
    )
    axes.legend(frameon=False, fontsize=8)
    return True


# ---------------------------------------------------------------- the page


def write_page(
    runs: Mapping[str, Trace | str | os.PathLike],
    out: str | os.PathLike,
    title: str = "Collapsed filters",
    pictures: Mapping[str, Path] | None = None,
) -> Path:
    """Write one self-contained HTML page with one or more runs side by side.

    It opens from disk without a network; plotly's JavaScript is in it (4.8 MB).
    The counts are exact; of the filters' paths only so many moments are kept
    that they fit into :data:`PATH_BYTES`, and the page says how many.

    Args:
        runs: Name -> a run, its trace file or its work dir, in the order of display.
        out: The file, replaced if it is there.
        title: Heading of the page.
        pictures: Caption -> PNG file, put at the end of the page, as those of the
            theory.

    Raises:
        ValueError: There is no run.
        TraceError: A file is no trace.
    """
    from plotly.offline import get_plotlyjs

    if not runs:
        raise ValueError("a page needs at least one run")
    traces = {n: t if isinstance(t, Trace) else read(t) for n, t in runs.items()}
    data = [_page_data(n, t, PATH_BYTES // len(traces)) for n, t in traces.items()]
    # In JSON a "<" can only stand in a string, where its escape means the same.
    packed = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    fill = {
        "title": html.escape(title),
        "pictures": _picture_section(pictures or {}),
        "data": packed,
        "plotly": get_plotlyjs(),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: fill[found[1]], TEMPLATE)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _picture_section(pictures: Mapping[str, Path]) -> str:
    if not pictures:
        return ""
    figures = []
    for caption, path in pictures.items():
        text, png = html.escape(caption), base64.b64encode(path.read_bytes()).decode()
        figures.append(
            f'<figure class="card"><img src="data:image/png;base64,{png}" alt="{text}" '
            f'style="width:100%;height:auto"><figcaption class="soft">{text}</figcaption></figure>'
        )
    body = "\n".join(figures)
    return f'<section aria-labelledby="h-pictures"><h2 id="h-pictures">Theory</h2>{body}</section>'


def _page_data(name: str, trace: Trace, path_bytes: int) -> dict[str, Any]:
    """What the page's script reads of a run; arrays are base64, row by row."""
    shown = _evenly(len(trace.iterations), MOMENTS)
    found, inactive = states(trace)[shown], _inactive(trace)[shown]
    counts = np.stack(
        [_sum_by_layer(trace, mask) for mask in (found >= 2, found == 2, found == 3, inactive)]
    )
    filters = trace.gamma.shape[1]
    kept = _evenly(len(trace.iterations), path_bytes * 3 // 4 // (_BYTES_PER_VALUE * filters))
    norms = trace.norms[max(trace.norms)] if trace.norms else np.full(filters, np.nan)
    probability = activation_probability(torch.tensor(trace.gamma), torch.tensor(trace.bias))
    corner = non_trainable(trace, 1.0, -1e9)
    return {
        "name": name,
        "layers": [[layer, size, conv] for layer, size, conv in trace.layers],
        "summary": trace.report().summary(),
        "moments": len(trace.iterations),
        "times": trace.iterations[shown].tolist(),
        "labels": None if trace.labels is None else list(trace.labels),
        "counts": _base64(counts.astype("<u4")),  # (4, times, layers)
        "probability": [_number(v) for v in probability[shown].nanmean(1).tolist()],
        "pathTimes": trace.iterations[kept].tolist(),
        "gamma": _base64(trace.gamma[kept].astype("<f2")),  # (pathTimes, filters)
        "bias": _base64(trace.bias[kept].astype("<f2")),
        "state": _base64(states(trace, kept)),
        "norms": _base64(norms.astype("<f4")),
        "threshold": trace.threshold,
        "inactiveBelow": trace.inactive_below,
        "slope": -corner[2][1] if corner else None,
    }


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
