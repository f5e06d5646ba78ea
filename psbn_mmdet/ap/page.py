"""A comparison of AP as one self-contained HTML page that opens from disk.

Everything is computed before anything is rendered: the tables are ``tables.Report``, the images
:func:`weigh_images`; ``page.html`` lays them out.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from . import tables
from .coco_files import Annotations, Results
from .compare import Comparison, Difference
from .evaluate import RECALL, Matches, leave_one_out, match

DRAWN = 24
"""Images whose boxes are in the page: those that weigh most on the difference."""

SHOWN_SCORE = 0.3
"""Boxes with a lower score are left out of the drawings."""

_COLORS = ("#4c6a92", "#c8553d")  # baseline, arm
_GAIN, _LOSS, _OPEN = "#2b7a4b", "#b3392f", "#8a8f98"

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def page(
    c: Comparison,
    report: tables.Report,
    annotations: Annotations,
    results: Sequence[Results],
    threads: int = 2,
) -> str:
    """The page: verdict, tables, differences per class, precision-recall curves, images.

    It opens from disk without a network; plotly's JavaScript is in it (4.8 MB).
    """
    images = weigh_images(c, annotations, results, threads)
    title = ", ".join(f"{p.arm} against {p.baseline}" for p in report.pairs)
    pairs = [
        {
            "data": p,
            "rows": [*p.overall],
            "overall": _figure(f"overall{n}", _differences(p, p.overall)),
            "classes": _figure(f"classes{n}", _differences(p, p.sorted_classes)),
            "curves": _figure(f"curves{n}", _curves(c, d)),
            "images": _script_json(weights),
        }
        for n, (p, d, weights) in enumerate(zip(report.pairs, c.differences, images, strict=True))
    ]
    return _TEMPLATES.get_template("page.html").render(
        title=f"AP: {title}",
        report=report,
        pairs=pairs,
        table2=[tables.table2_cells(row) for row in report.table2],
        run_header=tables.RUN_HEADER,
        run_rows=[tables.run_cells(run) for run in report.runs],
        shown_score=SHOWN_SCORE,
        plotly=get_plotlyjs(),
    )


def weigh_images(
    c: Comparison, annotations: Annotations, results: Sequence[Results], threads: int = 2
) -> list[dict[str, Any]]:
    """For each difference, the images by falling weight, with the boxes of the first ones.

    What an image weighs on a difference is exact: the difference of AP with it, minus without
    it. That is one evaluation per image and run, a few seconds per run on COCO val2017.

    Returns:
        Per difference the columns ``id``, ``file``, ``weight`` (AP points), ``objects`` and
        ``matched`` (objects matched at IoU 0.50, mean over runs; baseline, arm), all by falling
        absolute weight; ``boxes`` of the first :data:`DRAWN`; ``arms``.
    """
    compared = {arm for d in c.differences for arm in (d.arm, d.baseline)}
    matches = {i: match(annotations, results[i]) for arm in compared for i in c.runs[arm]}
    without = {i: 100 * leave_one_out(m, threads) for i, m in matches.items()}
    weighed = []
    for d in c.differences:
        b, a = c.runs[d.baseline], c.runs[d.arm]
        gap = np.mean([without[i] for i in a], 0) - np.mean([without[i] for i in b], 0)
        weight = np.nan_to_num(d.value[0] - gap)
        objects = np.bincount(matches[a[0]].object_image, minlength=len(weight))
        matched = [np.mean([_matched(matches[i]) for i in arm], 0) for arm in (b, a)]
        order = np.argsort(-np.abs(weight), kind="stable")
        first = [(results[r], matches[r]) for r in (b[0], a[0])]
        weighed.append(
            {
                "id": [annotations.image_ids[i] for i in order],
                "file": [annotations.file_names[i] for i in order],
                "weight": weight[order].round(5).tolist(),
                "objects": objects[order].tolist(),
                "matched": [m[order].round(2).tolist() for m in matched],
                "boxes": [_boxes(i, annotations, first) for i in order[:DRAWN]],
                "arms": [d.baseline, d.arm],
            }
        )
    return weighed


def _script_json(data: Any) -> str:
    """JSON for a script element: there a "<" can only be in a string, where the escape is equal."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _differences(pair: tables.Pair, rows: Sequence[tables.Row]) -> go.Figure:
    """One dot and one interval per name, coloured where the interval is on one side of 0."""
    rows = [r for r in rows if r.difference.value is not None][::-1]  # plotly starts at the bottom
    figure = go.Figure()
    for color, side in ((_GAIN, 1), (_LOSS, -1), (_OPEN, 0)):
        shown = [r for r in rows if r.difference.apart * np.sign(r.difference.value) == side]
        d = [r.difference for r in shown]
        figure.add_scatter(
            x=[x.value for x in d],
            y=[r.name for r in shown],
            mode="markers",
            marker=dict(color=color, size=8),
            error_x=dict(
                array=[x.high - x.value for x in d],
                arrayminus=[x.value - x.low for x in d],
                color=color,
            ),
            customdata=[[r.arm.value, r.baseline.value, r.difference.text("+")] for r in shown],
            hovertemplate=(
                f"%{{y}}: %{{customdata[2]}}<br>{pair.arm} %{{customdata[0]:.2f}}, "
                f"{pair.baseline} %{{customdata[1]:.2f}}<extra></extra>"
            ),
        )
    figure.add_vline(0, line=dict(color="#333", width=1))
    figure.update_layout(
        height=110 + 18 * max(len(rows), 3),
        showlegend=False,
        xaxis=dict(title="difference, AP points", zeroline=False, side="bottom"),
        yaxis=dict(
            categoryorder="array",
            categoryarray=[r.name for r in rows],
            range=[-0.8, len(rows) - 0.2],  # plotly leaves several rows of air otherwise
            dtick=1,
            automargin=True,
        ),
    )
    return figure


def _curves(c: Comparison, d: Difference) -> go.Figure:
    figure = go.Figure()
    tail = (1 - c.confidence) / 2
    thresholds = ("IoU 0.50:0.95", "IoU 0.50", "IoU 0.75")
    for t in range(len(thresholds)):
        for arm, color in ((d.baseline, _COLORS[0]), (d.arm, _COLORS[1])):
            members = c.runs[arm]
            mean = c.measured.curve[members, t].mean(0)
            draws = c.measured.curve_resampled[:, members, t].mean(1)
            low, high = np.quantile(draws, [tail, 1 - tail], axis=0) - draws.mean(0) + mean
            band = dict(x=[*RECALL, *RECALL[::-1]], y=np.clip([*high, *low[::-1]], 0, 1).round(4))
            figure.add_scatter(
                **band,
                fill="toself",
                fillcolor=color,
                opacity=0.22,
                line=dict(width=0),
                hoverinfo="skip",
                showlegend=False,
                visible=t == 0,
            )
            figure.add_scatter(
                x=RECALL,
                y=mean.round(4),
                name=arm,
                line=dict(color=color, width=2),
                visible=t == 0,
                hovertemplate=f"{arm}: recall %{{x:.2f}}, precision %{{y:.3f}}<extra></extra>",
            )
    buttons = [
        dict(label=name, method="restyle", args=["visible", [i // 4 == t for i in range(12)]])
        for t, name in enumerate(thresholds)
    ]
    figure.update_layout(
        height=420,
        xaxis=dict(title="recall", range=[0, 1]),
        yaxis=dict(title="precision", range=[0, 1.02]),
        legend=dict(x=0.98, y=0.98, xanchor="right", yanchor="top"),
        updatemenus=[
            dict(type="buttons", direction="right", buttons=buttons, x=0, y=1.14, xanchor="left")
        ],
    )
    return figure


def _figure(name: str, figure: go.Figure) -> str:
    figure.update_layout(
        template="simple_white",
        margin=dict(l=50, r=12, t=40, b=50),
        font=dict(family="system-ui, sans-serif", size=12),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config=dict(responsive=True, displaylogo=False, displayModeBar=False),
    )


def _matched(m: Matches) -> np.ndarray:
    return np.bincount(m.image[m.status[0] == 1], minlength=m.images)


def _boxes(i: int, annotations: Annotations, models: list[tuple[Results, Matches]]) -> dict:
    """Objects and boxes of an image: x, y, w, h, label and, for boxes, whether true at IoU 0.50."""

    def one(box: np.ndarray, label: str, *more) -> list:
        return [*box.round(1).tolist(), label, *more]

    name = annotations.class_names
    objects = np.flatnonzero(annotations.image == i)
    shown = []
    for results, m in models:
        at = np.flatnonzero((m.image == i) & (m.score >= SHOWN_SCORE))
        shown.append(
            [
                one(
                    results.box[m.source[k]],
                    f"{name[results.cls[m.source[k]]]} {m.score[k]:.2f}",
                    int(m.status[0, k]),
                )
                for k in at
            ]
        )
    return {
        "objects": [one(annotations.box[o], name[annotations.cls[o]]) for o in objects],
        "models": shown,
    }
