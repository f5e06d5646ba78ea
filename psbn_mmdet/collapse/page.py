"""One self-contained HTML page with one or more runs side by side."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from ..errors import written_whole
from .over_training import COLORS, MEASURES, counted, evenly, non_trainable, states, sum_by_layer
from .trace import Trace, read

MOMENTS = 300
"""How many moments of a run the page shows as counts; more are thinned evenly."""

PATH_BYTES = 8_000_000
"""What the paths of all filters of all runs may take in the page, in bytes."""

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
)
_BYTES_PER_VALUE = 7  # gamma, bias and norm as half floats, the state as a byte


def write_page(
    runs: Mapping[str, Trace | str | os.PathLike[str]],
    out: str | os.PathLike[str],
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
        PsbnError: The page cannot be written.
    """
    from plotly.offline import get_plotlyjs

    if not runs:
        raise ValueError("a page needs at least one run")
    traces = {n: t if isinstance(t, Trace) else read(t) for n, t in runs.items()}
    data = [_page_data(n, t, PATH_BYTES // len(traces)) for n, t in traces.items()]
    # In JSON a "<" can only stand in a string, where its escape means the same.
    packed = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    shown = {c: _base64_bytes(path.read_bytes()) for c, path in (pictures or {}).items()}
    page = _TEMPLATES.get_template("page.html").render(
        title=title,
        pictures=shown,
        data=packed,
        colors=COLORS,
        measures=MEASURES,
        plotly=get_plotlyjs(),
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as part:
        part.write_text(page, encoding="utf-8")
    return out


def _page_data(name: str, trace: Trace, path_bytes: int) -> dict[str, Any]:
    """What the page's script reads of a run; arrays are base64, row by row."""
    shown = evenly(len(trace.iterations), MOMENTS)
    masks, bases = counted(trace, shown)
    counts = sum_by_layer(trace, np.concatenate([masks, bases]))
    filters = trace.gamma.shape[1]
    kept = evenly(len(trace.iterations), path_bytes * 3 // 4 // (_BYTES_PER_VALUE * filters))
    corner = non_trainable(trace, 1.0, -1e9)
    return {
        "name": name,
        "layers": [layer[:4] for layer in trace.layers],  # name, filters, conv, followed_by
        "summary": _summary(trace),
        "moments": len(trace.iterations),
        "times": trace.iterations[shown].tolist(),
        "labels": None if trace.labels is None else list(trace.labels),
        "counts": _base64(counts.astype("<u4")),  # (2 * measures, times, layers)
        "pathTimes": trace.iterations[kept].tolist(),
        "gamma": _base64(trace.gamma[kept].astype("<f2")),  # (pathTimes, filters)
        "bias": _base64(trace.bias[kept].astype("<f2")),
        "state": _base64(states(trace, kept)),
        "norms": _base64(trace.norm[kept].astype("<f2")),  # (pathTimes, filters)
        "threshold": trace.threshold,
        "inactiveBelow": trace.inactive_below,
        "slope": -corner[2][1] if corner else None,
    }


def _summary(trace: Trace) -> str:
    lines = [trace.report().summary()]
    alphas = [layer.alpha for layer in trace.layers if layer.alpha is not None]
    if alphas:
        low, high = f"{min(alphas):.4g}", f"{max(alphas):.4g}"
        alpha = low if low == high else f"{low} to {high}"
        lines.append(f"psBN in {len(alphas)} of {len(trace.layers)} layers, alpha {alpha}")
    lines.append(f"written by psbn_mmdet {trace.version}" if trace.version else "")
    return "\n".join(filter(None, lines))


def _base64(values: NDArray[Any]) -> str:
    return _base64_bytes(np.ascontiguousarray(values).tobytes())


def _base64_bytes(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
