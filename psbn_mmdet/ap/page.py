"""A comparison of AP as one self-contained HTML page that opens from disk."""

import html
import json
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from . import tables
from .coco_files import Annotations, Results, RunFiles
from .compare import BETTER, WORSE, Comparison, Difference
from .evaluate import RECALL, Matches, leave_one_out, match

DRAWN = 24  # images whose boxes are in the page: those that weigh most on the difference
SHOWN_SCORE = 0.3  # boxes below it are left out of the drawings

_COLORS = ("#4c6a92", "#c8553d", "#5b8e7d", "#8d6a9f", "#b8860b", "#444444")
_GAIN, _LOSS, _OPEN = "#2b7a4b", "#b3392f", "#8a8f98"


def page(
    c: Comparison,
    runs: Sequence[RunFiles],
    annotations: Annotations,
    results: Sequence[Results],
    table2: bool = False,
    threads: int = 2,
) -> str:
    """The page: verdict, tables, differences per class, precision-recall curves, images.

    What an image weighs on a difference is exact: the difference of AP with it, minus without
    it. That is one evaluation per image and run, a few seconds per run on COCO val2017.
    """
    compared = {arm for d in c.differences for arm in (d.arm, d.baseline)}
    matches = {i: match(annotations, results[i]) for arm in compared for i in c.runs[arm]}
    without = {i: 100 * leave_one_out(m, threads) for i, m in matches.items()}
    text = tables.markdown(c, runs, len(annotations.image_ids), table2)
    body = [
        f"<section id='pair{n}'>{_pair(n, c, d)}"
        f"{_images(n, c, d, annotations, results, matches, without)}</section>"
        for n, d in enumerate(c.differences)
    ]
    heading = ", ".join(f"{d.arm} against {d.baseline}" for d in c.differences)
    return _PAGE.format(
        title=html.escape(f"AP: {heading}"),
        plotly=get_plotlyjs(),
        table2=_table(text, "## Table 2") if table2 else "",
        body="\n".join(body),
        runs=_table(text, "## Runs"),
    )


def _pair(n: int, c: Comparison, d: Difference) -> str:
    kind = {BETTER: "gain", WORSE: "loss"}.get(d.verdict, "open")
    names, classes = c.measured.names, tables.class_order(c, d)
    overall = np.arange(c.measured.overall)
    rows = "".join(
        f"<tr><td>{names[i]}<td>{tables.cell(c.arms[d.baseline], i)}"
        f"<td>{tables.cell(c.arms[d.arm], i)}<td>{tables.cell(d, i, '+')}"
        f"<td>{d.positive[i]:.3f}"
        for i in overall
        if not np.isnan(d.value[i])
    )
    arm, baseline = html.escape(d.arm), html.escape(d.baseline)
    return f"""
<h2>{arm} against {baseline}: <span class="{kind}">{d.verdict}</span></h2>
<p class="big">{tables.cell(d, 0, "+")} AP, {c.confidence:.0%} interval</p>
<p>{html.escape(d.reason)}</p>
<div class="wide"><table><tr><th><th>{baseline}<th>{arm}<th>difference<th>P(difference &gt; 0)
{rows}</table></div>
{_figure(f"overall{n}", _differences(c, d, overall[::-1], "difference, AP points"))}
<h3>Differences per class, sorted</h3>
<p>{tables.classes_apart(c, d)}. Hover a class for both APs.</p>
{_figure(f"classes{n}", _differences(c, d, classes[::-1], "difference, AP points"))}
<h3>Precision and recall</h3>
<p>Mean over the classes, with {c.confidence:.0%} bands over the resampled images.</p>
{_figure(f"curves{n}", _curves(c, d))}"""


def _differences(c: Comparison, d: Difference, which: np.ndarray, title: str) -> go.Figure:
    """One dot and one interval per name, coloured where the interval is on one side of 0."""
    which = which[~np.isnan(d.value[which])]
    names = [c.measured.names[i] for i in which]
    value, low, high = d.value[which], d.low[which], d.high[which]
    color = np.where(low > 0, _GAIN, np.where(high < 0, _LOSS, _OPEN))
    a, b = c.arms[d.arm].value[which], c.arms[d.baseline].value[which]
    figure = go.Figure()
    for shade in dict.fromkeys(color):
        s = color == shade
        figure.add_scatter(
            x=value[s],
            y=[n for n, chosen in zip(names, s, strict=True) if chosen],
            mode="markers",
            marker=dict(color=shade, size=8),
            error_x=dict(array=(high - value)[s], arrayminus=(value - low)[s], color=shade),
            customdata=np.stack([a, b, low, high], -1)[s],
            hovertemplate=(
                f"%{{y}}: %{{x:+.2f}} (%{{customdata[2]:+.2f}} to %{{customdata[3]:+.2f}})<br>"
                f"{d.arm} %{{customdata[0]:.2f}}, {d.baseline} %{{customdata[1]:.2f}}"
                "<extra></extra>"
            ),
        )
    figure.add_vline(0, line=dict(color="#333", width=1))
    figure.update_layout(
        height=110 + 18 * max(len(which), 3),
        showlegend=False,
        xaxis=dict(title=title, zeroline=False, side="bottom"),
        yaxis=dict(
            categoryorder="array",
            categoryarray=names,
            range=[-0.8, len(names) - 0.2],  # plotly leaves several rows of air otherwise
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


def _images(
    n: int,
    c: Comparison,
    d: Difference,
    annotations: Annotations,
    results: Sequence[Results],
    matches: dict[int, Matches],
    without: dict[int, np.ndarray],
) -> str:
    """The table of images by what they weigh, the look-up by id, the drawings of the first."""
    a, b = c.runs[d.arm], c.runs[d.baseline]
    weight = d.value[0] - np.mean([without[i] for i in a], 0) + np.mean([without[i] for i in b], 0)
    objects = np.bincount(matches[a[0]].object_image, minlength=len(weight))
    found = [np.mean([_found(matches[i]) for i in arm], 0) for arm in (b, a)]
    order = np.argsort(-np.abs(np.nan_to_num(weight)), kind="stable")
    columns = {
        "id": [annotations.image_ids[i] for i in order],
        "file": [annotations.file_names[i] for i in order],
        "weight": np.nan_to_num(weight[order]).round(5).tolist(),
        "objects": objects[order].tolist(),
        "found": [f[order].round(2).tolist() for f in found],
        "arms": [d.baseline, d.arm],
        "boxes": [
            _boxes(i, annotations, [(results[r], matches[r]) for r in (b[0], a[0])])
            for i in order[:DRAWN]
        ],
    }
    data = json.dumps(columns, separators=(",", ":")).replace("</", "<\\/")
    arm, baseline = html.escape(d.arm), html.escape(d.baseline)
    return f"""
<h3>Images that weigh most on the difference</h3>
<p>An image weighs the difference in AP with it, minus the difference without it. <em>Found</em>:
objects matched at IoU 0.50 by any of its boxes, mean over runs. The drawings show the first run of
each arm, boxes with a score of {SHOWN_SCORE} or more.</p>
<p><label>Image id <input id="find{n}" type="text" inputmode="numeric" size="14"></label>
<span id="said{n}"></span></p>
<div class="wide"><table><thead><tr><th>image<th>file<th>weighs, AP<th>objects
<th>{baseline} found<th>{arm} found</thead><tbody id="rows{n}"></tbody></table></div>
<div id="drawn{n}" class="drawn"></div>
<script>showImages({n}, {data});</script>"""


def _found(m: Matches) -> np.ndarray:
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


def _table(markdown: str, heading: str) -> str:
    """The first table below a heading of the report, as HTML."""
    lines = markdown.split(heading, 1)[1].split("\n")
    title = html.escape((heading + lines[0]).lstrip("# "))
    rows = [line for line in lines[1:] if line.startswith("|")]
    end = next((k for k, line in enumerate(lines) if k > 1 and not line), len(lines))
    rows = [line for line in lines[1:end] if line.startswith("|")]
    tags = ["th"] + ["td"] * len(rows)
    cells = [
        "".join(f"<{tag}>{html.escape(x.strip())}" for x in row.strip("|").split(" | "))
        for tag, row in zip(tags, [rows[0], *rows[2:]], strict=False)
    ]
    return f"<h2>{title}</h2><div class='wide'><table><tr>{'<tr>'.join(cells)}</table></div>"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fbfaf8; margin: 0 auto;
  max-width: 1120px; padding: 12px 16px 60px; }}
h2 {{ margin: 1.6em 0 .2em; }}
h3 {{ margin: 1.8em 0 .2em; }}
.big {{ font-size: 1.35em; margin: .2em 0; }}
.gain {{ color: #2b7a4b; }} .loss {{ color: #b3392f; }} .open {{ color: #6a6f78; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }}
th, td {{ text-align: right; padding: 3px 10px; border-bottom: 1px solid #e3e0da;
  white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.can {{ cursor: pointer; }} tr.can:hover, tr.now {{ background: #efece5; }}
.drawn {{ display: flex; flex-wrap: wrap; gap: 12px; margin-top: 12px; }}
.drawn figure {{ flex: 1 1 280px; margin: 0; }}
.drawn svg {{ width: 100%; max-height: 420px; background: #fff; border: 1px solid #e3e0da; }}
input {{ font: inherit; padding: 3px 6px; }}
</style>
<script>{plotly}</script>
<script>
const SHOWN = 12;
function showImages(n, data) {{
  const at = id => document.getElementById(id + n), index = new Map();
  data.id.forEach((id, k) => index.set(String(id), k));
  function cells(k) {{
    return [data.id[k], data.file[k], (data.weight[k] > 0 ? "+" : "") + data.weight[k].toFixed(4),
      data.objects[k], data.found[0][k], data.found[1][k]];
  }}
  function add(k, first) {{
    const row = document.createElement("tr");
    for (const text of cells(k)) row.insertCell().textContent = text;
    if (k < data.boxes.length) {{ row.className = "can"; row.onclick = () => draw(k, row); }}
    first ? at("rows").prepend(row) : at("rows").append(row);
    return row;
  }}
  function draw(k, row) {{
    for (const other of at("rows").children) other.classList.remove("now");
    row.classList.add("now");
    const found = data.boxes[k], all = [found.objects, ...found.models].flat();
    const width = Math.max(1, ...all.map(b => b[0] + b[2]));
    const height = Math.max(1, ...all.map(b => b[1] + b[3]));
    at("drawn").replaceChildren(...found.models.map((boxes, m) => {{
      const figure = document.createElement("figure"), ns = "http://www.w3.org/2000/svg";
      const svg = document.createElementNS(ns, "svg");
      svg.setAttribute("viewBox", `-4 -4 ${{width + 8}} ${{height + 8}}`);
      const rect = (b, color, dash) => {{
        const r = document.createElementNS(ns, "rect"), t = document.createElementNS(ns, "title");
        ["x", "y", "width", "height"].forEach((key, i) => r.setAttribute(key, b[i]));
        r.setAttribute("fill", "transparent"); r.setAttribute("stroke", color);
        r.setAttribute("vector-effect", "non-scaling-stroke");
        r.setAttribute("stroke-width", dash ? 3 : 1.5);
        if (dash) r.setAttribute("stroke-dasharray", "5 4");
        t.textContent = b[4]; r.append(t); svg.append(r);
      }};
      for (const b of found.objects) rect(b, "#999", true);
      for (const b of boxes) rect(b, ["#b3392f", "#2b7a4b", "#8a8f98"][b[5]], false);
      const words = document.createElement("figcaption");
      words.textContent = `${{data.arms[m]}}, image ${{data.id[k]}}: dashed the objects, green ` +
        "true, red false boxes; hover for the class";
      figure.append(svg, words);
      return figure;
    }}));
  }}
  for (let k = 0; k < Math.min(SHOWN, data.id.length); k++) add(k, false);
  if (at("rows").firstChild) draw(0, at("rows").firstChild);
  at("find").oninput = event => {{
    const asked = event.target.value.trim(), k = index.get(asked);
    at("said").textContent = !asked ? "" : k === undefined ? "no such image" :
      `rank ${{k + 1}} of ${{data.id.length}}` + (k < data.boxes.length ? "" :
        "; boxes are drawn for the first " + data.boxes.length);
    if (k !== undefined) {{
      while (at("rows").children.length > SHOWN) at("rows").firstChild.remove();
      const row = add(k, true);
      k < data.boxes.length ? draw(k, row) : at("drawn").replaceChildren();
    }}
  }};
}}
</script>
<h1>Is the difference in AP more than noise?</h1>
{table2}
{body}
{runs}
</html>
"""
