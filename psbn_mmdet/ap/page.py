"""A comparison of AP as one self-contained HTML page that opens from disk.

Nothing is computed here: the numbers are a ``tables.Report`` and the images come from
``images.weigh_images``; ``page.html`` lays them out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from . import tables
from .evaluate import RECALL
from .images import SHOWN_SCORE

_COLORS = ("#4c6a92", "#c8553d")  # baseline, arm
_GAIN, _LOSS, _OPEN = "#2b7a4b", "#b3392f", "#8a8f98"

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def page(report: tables.Report, images: Sequence[Mapping[str, Any]]) -> str:
    """The page: verdict, tables, differences per class, precision-recall curves, images.

    It opens from disk without a network; plotly's JavaScript is in it (4.8 MB).

    Args:
        report: What the comparison says.
        images: :func:`images.weigh_images` of the same comparison.
    """
    title = ", ".join(f"{p.arm} against {p.baseline}" for p in report.pairs)
    pairs = [
        {
            "data": p,
            "header": tables.row_header(p),
            "rows": [tables.row_cells(row) for row in p.overall],
            "overall": _figure(
                f"overall{n}", _differences(p, p.overall), f"{p.headline}; the table above says all"
            ),
            "classes": _figure(
                f"classes{n}",
                _differences(p, p.sorted_classes),
                "differences per class: "
                + "; ".join(f"{r.name} {r.difference.text('+')}" for r in p.sorted_classes),
            ),
            "curves": _figure(
                f"curves{n}", _curves(p), f"precision against recall of {' and '.join(p.curves)}"
            ),
            "images": _script_json(weights),
        }
        for n, (p, weights) in enumerate(zip(report.pairs, images, strict=True))
    ]
    return _TEMPLATES.get_template("page.html").render(
        title=f"AP: {title}",
        report=report,
        pairs=pairs,
        table2=[tables.table2_cells(row) for row in report.table2],
        plans=[(tables.plan_title(p), *tables.plan_cells(p)) for p in report.plans],
        run_header=tables.RUN_HEADER,
        run_rows=[tables.run_cells(run) for run in report.runs],
        shown_score=SHOWN_SCORE,
        plotly=get_plotlyjs(),
    )


def _script_json(data: Any) -> str:
    """JSON for a script element: there a "<" can only be in a string, where the escape is equal."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _differences(pair: tables.Pair, rows: Sequence[tables.Row]) -> go.Figure:
    """One dot and one interval per name, coloured where the interval is on one side of 0."""
    rows = [r for r in rows if r.difference.measured][::-1]  # plotly starts at the bottom
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
                array=np.nan_to_num([x.high - x.value for x in d]),  # no interval: a dot
                arrayminus=np.nan_to_num([x.value - x.low for x in d]),
                color=color,
            ),
            customdata=[[r.arm.value, r.baseline.value, r.difference.text("+")] for r in shown],
            hovertemplate=(
                f"%{{y}}: %{{customdata[2]}}<br>{pair.arm} %{{customdata[0]:.2f}}, "
                f"{pair.baseline} %{{customdata[1]:.2f}}<extra></extra>"
            ),
        )
    figure.add_vline(0, line=dict(color="#888", width=1))
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


def _curves(pair: tables.Pair) -> go.Figure:
    figure = go.Figure()
    thresholds = ("IoU 0.50:0.95", "IoU 0.50", "IoU 0.75")
    for t in range(len(thresholds)):
        for (arm, curves), color in zip(pair.curves.items(), _COLORS, strict=True):
            figure.add_scatter(
                x=[*RECALL, *RECALL[::-1]],
                y=np.append(curves.high[t], curves.low[t, ::-1]).round(4),
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
                y=curves.value[t].round(4),
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
            dict(
                type="buttons",
                direction="right",
                buttons=buttons,
                x=0,
                y=1.14,
                xanchor="left",
                bgcolor="#fff",  # plotly's pressed button is white in the dark, too
                font=dict(color="#222"),
            )
        ],
    )
    return figure


def _figure(name: str, figure: go.Figure, alt: str) -> str:
    """Its HTML, with a text for those who do not see it."""
    figure.update_layout(
        template="simple_white",
        margin=dict(l=50, r=12, t=40, b=50),
        font=dict(family="system-ui, sans-serif", size=12),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config=dict(responsive=True, displaylogo=False, displayModeBar=False),
    )
    return f'<div role="img" aria-label="{escape(alt)}">{html}</div>'
