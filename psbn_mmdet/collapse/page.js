"use strict";
const RUN_COLORS = { light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9"],
                     dark: ["#4aa3df", "#f0803c", "#2bbf95", "#e39ac3", "#d9ac3a", "#8fd0f5"] };
const MEASURES = {{ measures | list | tojson }};
const COLORS = {{ colors.items() | list | tojson }};
const STATES = COLORS.map(c => c[0]), STATE_COLORS = COLORS.map(c => c[1]);
const HEAT = { light: ["#f3f1ec", "#fed98e", "#fe9929", "#d95f0e", "#8c1d04"],
               dark: ["#262a2f", "#6b3d12", "#b85c12", "#f08a24", "#ffe08a"] };
const WELL = new Set(["live", "carrying"].map(s => STATES.indexOf(s)));  // nothing to look after
const MOST_PATHS = 250;
const $ = id => document.getElementById(id);
const escaped = s => String(s).replace(/&/g, "&amp;").replace(/</g, "&lt;");

function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}
const words = (text, Type) => new Type(bytes(text).buffer);
const HALF = new Float32Array(65536);  // every half float
for (let h = 0; h < 65536; h++) {
  const e = h >> 10 & 31, m = h & 1023, s = h & 32768 ? -1 : 1;
  HALF[h] = s * (e === 0 ? m * 2 ** -24 : e === 31 ? (m ? NaN : Infinity) : (1 + m / 1024) * 2 ** (e - 15));
}

const runs = JSON.parse($("data").textContent).map((run, i) => {
  let at = 0;
  const layers = run.layers.map(([name, size, conv, follows]) => {
    const layer = { name, size, conv, follows, start: at };
    at += size;
    return layer;
  });
  return { ...run, layers, filters: at, number: i, on: true,
    byName: new Map(layers.map((l, j) => [l.name, { ...l, index: j }])),
    counts: words(run.counts, Uint32Array), gamma: words(run.gamma, Uint16Array),
    bias: words(run.bias, Uint16Array), state: bytes(run.state), norms: words(run.norms, Uint16Array) };
});
const shown = () => runs.filter(r => r.on);
const countOf = (r, measure, t, layer) => r.counts[(measure * r.times.length + t) * r.layers.length + layer];
const knownOf = (r, measure, t, layer) => countOf(r, measure + MEASURES.length, t, layer);
// Percent of the filters of which it is known, of one layer or of all; null if there are none.
function percentOf(r, measure, t, layer) {
  let sum = 0, known = 0;
  for (const j of layer === undefined ? r.layers.keys() : [layer]) {
    sum += countOf(r, measure, t, j);
    known += knownOf(r, measure, t, j);
  }
  return known ? 100 * sum / known : null;
}
const lastKnown = (r, measure) => { for (let t = r.times.length - 1; t >= 0; t--) if (percentOf(r, measure, t) !== null) return percentOf(r, measure, t); return null; };
const joined = r => !r.labels;  // checkpoints may be of different runs: no line between them
const percentText = value => value === null ? "-" : value.toFixed(2) + "%";
const momentName = (r, time) => r.labels ? r.labels[time] : `iteration ${time}`;

// ------------------------------------------------------------ what is chosen
const names = [...new Set(runs.flatMap(r => r.layers.map(l => l.name)))];
const chosen = { measure: 0, layer: names[0], filter: null, time: 1 };
{
  let best = -1;
  for (const r of runs) r.layers.forEach((l, j) => {
    let other = 0;
    for (let f = l.start; f < l.start + l.size; f++) other += !WELL.has(r.state[(r.pathTimes.length - 1) * r.filters + f]);
    const share = other / l.size;
    if (share > best && l.size > 1) { best = share; chosen.layer = l.name; }
  });
}

// ------------------------------------------------------------ drawing
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let printing = false;
const dark = () => !printing && matchMedia("(prefers-color-scheme: dark)").matches;
const colorOf = r => RUN_COLORS[dark() ? "dark" : "light"][r.number % RUN_COLORS.light.length];
function layout(extra) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--ink") },
    margin: { l: 46, r: 12, t: 8, b: 40 }, showlegend: false, hovermode: "closest", ...extra,
    xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis } };
}
function draw(div, data, extra, label) {
  div.setAttribute("aria-label", label);
  return Plotly.react(div, data, layout(extra), { responsive: true, displayModeBar: false });
}
function cards(id, list, heading) {
  const box = $(id), keys = list.map(r => r.name).join("\n");
  if (box.dataset.keys !== keys) {
    box.querySelectorAll(".chart").forEach(c => Plotly.purge(c));
    box.replaceChildren(...list.map(() => {
      const card = document.createElement("figure"), h = document.createElement("h3");
      const chart = document.createElement("div"), note = document.createElement("figcaption");
      card.className = "card"; chart.className = "chart"; chart.setAttribute("role", "img");
      card.append(h, chart, note);
      return card;
    }));
    box.dataset.keys = keys;
  }
  return list.map((r, i) => {
    const card = box.children[i];
    card.querySelector("h3").textContent = heading(r);
    return { chart: card.querySelector(".chart"), note: card.querySelector("figcaption") };
  });
}
// Long names without what they have in common, up to a mark, and the pattern that this is of.
function shortened(labels) {
  if (labels.length < 2 || labels.every(l => l.length <= 12)) return [labels, ""];
  const common = list => {
    let n = 0;
    while (list.every(l => n < l.length && l[n] === list[0][n])) n++;
    while (n > 0 && /[A-Za-z0-9]/.test(list[0][n - 1])) n--;
    return n;
  };
  const head = common(labels), rest = labels.map(l => l.slice(head));
  const tail = common(rest.map(l => [...l].reverse().join("")));
  const short = rest.map(l => l.slice(0, l.length - tail)), first = labels[0];
  if (short.includes("") || new Set(short).size === 1) return [labels, ""];
  return [short, head + tail ? first.slice(0, head) + "*" + first.slice(first.length - tail) : ""];
}
function timeAxis(r) {
  if (!r.labels) return { title: { text: "iteration", standoff: 6 }, nticks: 6 };
  const [short, pattern] = shortened(r.labels);
  return { tickvals: r.times, ticktext: r.times.map(t => escaped(short[t])), range: [-.5, r.labels.length - .5],
    title: { text: escaped(pattern), standoff: 6 } };
}
const measureName = () => $("measure").selectedOptions[0].textContent;

function drawCourse() {
  $("h-course").parentElement.hidden = shown().every(r => r.times.length < 2);
  const data = shown().map(r => ({
    name: escaped(r.name), x: r.times, mode: !joined(r) ? "markers" : r.times.length < 30 ? "lines+markers" : "lines", connectgaps: true,
    marker: { size: joined(r) ? 6 : 11 },
    y: r.times.map((_, t) => percentOf(r, chosen.measure, t)),
    text: r.times.map(t => escaped(momentName(r, t))),
    hovertemplate: "%{text}<br>%{y:.2f}%<extra>" + escaped(r.name) + "</extra>",
    line: { color: colorOf(r), width: 2.5 } }));
  const labelled = shown().find(r => r.labels);
  draw($("course"), data, { height: 340, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    margin: { l: 46, r: 12, t: 36, b: 44 },
    xaxis: labelled ? timeAxis(labelled) : { title: { text: "iteration", standoff: 6 } },
    yaxis: { rangemode: "tozero", ticksuffix: "%" } },
    `${measureName()} over training: ` + data.map(d => `${d.name} ends at ${percentText(d.y.at(-1))}`).join("; "));
}

function drawMaps() {
  const list = shown();
  const z = list.map(r => r.layers.map((_, j) => r.times.map((_, t) => percentOf(r, chosen.measure, t, j))));
  // What the runs come to sets the scale, not a start with gamma = 0.
  const top = Math.max(1, ...z.flatMap(run => run.flatMap(row => row.slice(row.length >> 1))));
  const colors = HEAT[dark() ? "dark" : "light"];
  cards("maps", list, r => r.name).forEach(({ chart, note }, i) => {
    const r = list[i], many = r.layers.length;
    const note2 = j0 => (j0 === undefined ? "" : ` ${chosen.layer} is layer ${j0}.`);
    if (r.times.length === 1) {
      const j0 = r.byName.get(chosen.layer)?.index, ink = css("--ink"), bar = colorOf(r);
      draw(chart, [{ type: "bar", x: r.layers.map((_, j) => j), y: z[i].map(row => row[0]), marker: { color: r.layers.map((_, j) => j === j0 ? ink : bar) },
        customdata: r.layers.map(l => escaped(l.name)), hovertemplate: "%{customdata}<br>%{y:.1f}%<extra></extra>" }],
        { height: 260, bargap: .15, xaxis: { title: { text: "layer", standoff: 6 }, ...(many < 12 ? { dtick: 1 } : { nticks: 10, tickformat: "d" }) }, yaxis: { rangemode: "tozero", ticksuffix: "%" } },
        `${measureName()} by layer, ${r.name}`);
      note.textContent = note2(j0).trim();
      chart.removeAllListeners?.("plotly_click");
      chart.on("plotly_click", e => choose({ layer: r.layers[e.points[0].x].name, filter: null }));
      return;
    }
    const data = [{ type: "heatmap", x: r.times, y: r.layers.map((_, j) => j), z: z[i], zmin: 0, zmax: top,
      colorscale: colors.map((c, k) => [k / (colors.length - 1), c]),
      colorbar: { thickness: 8, ticksuffix: "%", outlinewidth: 0, len: .9 },
      customdata: r.layers.map(l => r.times.map(t => [escaped(l.name), escaped(momentName(r, t))])),
      hovertemplate: "%{customdata[0]}<br>%{customdata[1]}<br>%{z:.1f}%<extra></extra>" }];
    const j = r.byName.get(chosen.layer)?.index;
    const shapes = j === undefined ? [] : [{ type: "rect", xref: "paper", x0: 0, x1: 1, y0: j - .5, y1: j + .5,
      line: { color: css("--ink"), width: 1.5 } }];
    draw(chart, data, { height: Math.min(560, Math.max(200, 9 * many + 70)), shapes, margin: { l: 46, r: 6, t: 6, b: 40 },
      xaxis: { ...timeAxis(r), showgrid: false }, yaxis: { autorange: "reversed", showgrid: false, nticks: 8, title: { text: "layer", standoff: 4 } } },
      `Heat map of ${measureName()} by layer over training, ${r.name}`);
    note.textContent = `Strongest colour: ${top.toFixed(1)}% or more.` + note2(j);
    chart.removeAllListeners?.("plotly_click");
    chart.on("plotly_click", e => choose({ layer: r.layers[e.points[0].y].name, filter: null }));
  });
}

function views() {
  return shown().filter(r => r.byName.has(chosen.layer)).map(r => ({ r, l: r.byName.get(chosen.layer) }));
}
const lastMoment = r => Math.round(chosen.time * (r.pathTimes.length - 1));

function planeOf({ r, l }) {  // half width in gamma, lowest and highest bias of a layer's filters
  let width = 1e-6, low = 0, high = 0;
  for (let k = 0; k < r.pathTimes.length; k++) for (let f = 0; f < l.size; f++) {
    const at = k * r.filters + l.start + f, g = Math.abs(HALF[r.gamma[at]]), b = HALF[r.bias[at]];
    if (g > width && g < Infinity) width = g;
    if (b < low && b > -Infinity) low = b;
    if (b > high && b < Infinity) high = b;
  }
  const pad = .05 * Math.max(high - low, 1e-6);
  return [width * 1.05, low - pad, high + pad];
}

const hasReLU = l => l.follows === "relu";
const FOLLOWS = { relu: "A ReLU stands right behind it.", unknown: "What follows it is not known", sum: "A sum follows it",
  leaky: "A leaky activation follows it", other: "Something other than a ReLU follows it", none: "No activation follows it" };

function drawPaths() {
  const list = views(), own = list.map(planeOf);
  const all = [Math.max(...own.map(o => o[0])), Math.min(...own.map(o => o[1])), Math.max(...own.map(o => o[2]))];
  let hidden = 0;
  cards("paths", list.map(v => v.r), r => r.name).forEach(({ chart, note }, i) => {
    const { r, l } = list[i], last = lastMoment(r), data = [];
    const [width, low, high] = $("same").checked ? all : own[i];
    const point = (k, f) => [HALF[r.gamma[k * r.filters + l.start + f]], HALF[r.bias[k * r.filters + l.start + f]]];
    const stateNow = f => r.state[last * r.filters + l.start + f];
    if (r.slope !== null && low < 0 && hasReLU(l)) {
      const reach = Math.min(width, -low / r.slope);
      const corners = [[-reach, -r.slope * reach], [0, 0], [reach, -r.slope * reach]];
      if (reach === width) corners.push([width, low], [-width, low]);
      data.push({ x: corners.map(c => c[0]), y: corners.map(c => c[1]), fill: "toself", mode: "lines",
        fillcolor: css("--zone"), line: { width: 0 }, hoverinfo: "skip" });
    }
    // Those that are not live first, then the others evenly.
    const order = [...Array(l.size).keys()].sort((a, b) => WELL.has(stateNow(a)) - WELL.has(stateNow(b)) || (a * 7919) % l.size - (b * 7919) % l.size);
    const drawn = order.slice(0, MOST_PATHS);
    hidden = Math.max(hidden, l.size - drawn.length);
    // The rarest state on top: filters lie on each other where they have come to the same point.
    const howMany = STATES.map((_, code) => { let n = 0; for (let f = 0; f < l.size; f++) n += stateNow(f) === code; return n; });
    [...STATES.keys()].sort((a, b) => howMany[b] - howMany[a]).forEach(code => {
      const state = STATES[code];
      const path = { x: [], y: [], mode: "lines", hoverinfo: "skip", opacity: code ? .55 : .35,
        line: { color: STATE_COLORS[code], width: 1 } };
      if (joined(r)) for (const f of drawn) if (stateNow(f) === code) {
        for (let k = 0; k <= last; k++) { const [g, b] = point(k, f); path.x.push(g); path.y.push(b); }
        path.x.push(null); path.y.push(null);
      }
      const ends = { x: [], y: [], customdata: [], mode: "markers", marker: { color: STATE_COLORS[code], size: 6 },
        hovertemplate: `filter %{customdata}, ${state}<br>gamma %{x:.3g}, bias %{y:.3g}<extra></extra>` };
      for (let f = 0; f < l.size; f++) if (stateNow(f) === code) {
        const [g, b] = point(last, f);
        ends.x.push(g); ends.y.push(b); ends.customdata.push(f);
      }
      data.push(path, ends);
    });
    const f = chosen.filter;
    if (f !== null && f < l.size) {
      const path = [...Array(last + 1).keys()].map(k => point(k, f));
      data.push({ x: path.map(p => p[0]), y: path.map(p => p[1]), mode: "lines", hoverinfo: "skip",
        line: { color: css("--ink"), width: 2.5 } });
      data.push({ x: [path[0][0], path.at(-1)[0]], y: [path[0][1], path.at(-1)[1]], mode: "markers", hoverinfo: "skip",
        marker: { size: 12, symbol: ["circle-open", "circle"], color: [css("--ink"), STATE_COLORS[stateNow(f)]],
          line: { color: css("--ink"), width: 2 } } });
      note.textContent = `Filter ${f} is ${STATES[stateNow(f)]}: gamma ${path.at(-1)[0].toPrecision(3)}, bias ${path.at(-1)[1].toPrecision(3)}.`;
    } else {
      const n = STATES.map((s, code) => [ [...Array(l.size).keys()].filter(x => stateNow(x) === code).length, s]);
      note.textContent = `Of ${l.size} filters ` + n.filter(x => x[0]).map(x => x.join(" ")).join(", ") + ".";
    }
    draw(chart, data, { height: 380, xaxis: { range: [-width, width], title: { text: "gamma", standoff: 6 }, nticks: 7 },
      yaxis: { range: [low, high], title: { text: "bias", standoff: 4 } } },
      `Paths of the filters of ${l.name} in gamma and bias, ${r.name}. ${note.textContent}`);
    chart.removeAllListeners?.("plotly_click");
    chart.on("plotly_click", e => {
      const p = e.points.find(q => q.customdata !== undefined);
      if (p) choose({ filter: p.customdata });
    });
  });
  $("follows").textContent = [...new Set(list.map(v => FOLLOWS[v.l.follows] + (hasReLU(v.l) ? "" :
    ": gamma and bias alone do not tell whether a filter is inactive.")))].join(" ");
  const thin = list.filter(v => v.r.pathTimes.length < v.r.moments).map(v => `${v.r.name} at ${v.r.pathTimes.length} of ${v.r.moments} moments`);
  $("thinned").textContent = "psBN: bias is beta + alpha." + (list.some(v => joined(v.r)) ? " A line ends in a dot at the chosen moment." : "")
    + (hidden ? ` Lines of ${MOST_PATHS} filters, dots of all.` : "")
    + (thin.length ? ` To keep the page small, paths are shown thinned: ${thin.join(", ")}.` : "");
}

function drawSingle() {
  const f = chosen.filter, list = views().filter(v => f !== null && f < v.l.size);
  $("followed").hidden = !list.length;
  if (!list.length) return;
  cards("single", list.map(v => v.r), r => `${r.name}: filter ${f}`).forEach(({ chart, note }, i) => {
    const { r, l } = list[i], at = k => k * r.filters + l.start + f;
    const line = (values, name, dash) => ({ name, x: r.pathTimes, y: r.pathTimes.map((_, k) => HALF[values[at(k)]]),
      mode: !joined(r) ? "markers" : r.pathTimes.length < 30 ? "lines+markers" : "lines", line: { color: colorOf(r), dash, width: 2 },
      marker: { color: colorOf(r), symbol: dash === "dot" ? "circle-open" : "circle" },
      hovertemplate: `%{x}<br>${name} %{y:.3g}<extra></extra>` });
    draw(chart, [line(r.gamma, "gamma", "solid"), line(r.bias, "bias", "dot")], { height: 240, showlegend: true,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, margin: { l: 46, r: 12, t: 30, b: 40 }, xaxis: timeAxis(r) },
      `gamma and bias of filter ${f} over training, ${r.name}`);
    const spans = [];
    r.pathTimes.forEach((t, k) => {
      const s = STATES[r.state[at(k)]];
      if (!spans.length || spans.at(-1)[0] !== s) spans.push([s, momentName(r, t)]);
    });
    note.textContent = spans.slice(0, 6).map(([s, t]) => `${s} from ${t}`).join(", ") + (spans.length > 6 ? ", ..." : ".");
  });
}

function drawNorms() {
  const list = views(), at = v => lastMoment(v.r) * v.r.filters + v.l.start;
  const usable = v => v.l.conv && Number.isFinite(HALF[v.r.norms[at(v)]]);
  const values = v => [...v.r.norms.subarray(at(v), at(v) + v.l.size)].map(h => HALF[h]);
  const top = Math.max(1e-12, ...list.filter(usable).flatMap(values).filter(Number.isFinite)) * 1.0001;
  const BINS = 40;
  cards("norms", list.map(v => v.r), r => r.name).forEach(({ chart, note }, i) => {
    const { r, l } = list[i];
    if (!usable(list[i])) {
      Plotly.purge(chart);
      note.textContent = l.conv ? "The norms were not recorded." : "No convolution was found in front of this layer.";
      return;
    }
    const last = lastMoment(r), bars = STATES.map(() => new Array(BINS).fill(0));
    values(list[i]).forEach((v, f) => { if (Number.isFinite(v)) bars[r.state[last * r.filters + l.start + f]][Math.floor(v / top * BINS)]++; });
    const x = bars[0].map((_, b) => (b + .5) / BINS * top);
    const data = STATES.map((state, code) => ({ type: "bar", name: state, x, y: bars[code], width: top / BINS,
      marker: { color: STATE_COLORS[code] }, hovertemplate: `%{y} ${state}, norm %{x:.3g}<extra></extra>` })).filter(d => d.y.some(Boolean));
    draw(chart, data, { height: 260, barmode: "stack", bargap: .05, xaxis: { title: { text: "L1 norm", standoff: 6 }, range: [0, top] },
      yaxis: { title: { text: "filters", standoff: 4 } } }, `Histogram of the filters' L1 norms, ${r.name}`);
    note.textContent = `${l.conv}, ${momentName(r, r.pathTimes[last])}`;
  });
}

function fillTable() {
  const list = shown();
  const cell = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  const head = document.createElement("tr");
  head.append(cell("th", "layer"), cell("th", "filters"), ...list.map(r => cell("th", r.name)));
  for (const th of head.children) th.scope = "col";
  const last = r => r.times.length - 1;
  const of = (r, name, m) => { const l = r.byName.get(name); return l && knownOf(r, m, last(r), l.index) ? countOf(r, m, last(r), l.index) : null; };
  const text = (r, name) => {
    if (!r.byName.has(name)) return "-";
    const more = MEASURES.slice(1, 4).map((word, m) => of(r, name, m + 1) ? `${of(r, name, m + 1)} ${word}` : "").filter(Boolean);
    return `${of(r, name, 0) ?? "-"}` + (more.length ? ` (${more.join(", ")})` : "");
  };
  const score = n => Math.max(...list.map(r => ((of(r, n, 0) ?? 0) + (of(r, n, 1) ?? 0) / 1e3 + (of(r, n, 3) ?? 0) / 1e6) / (r.byName.get(n)?.size ?? 1)), 0);
  const rows = names.map(n => [score(n), n]).sort((a, b) => b[0] - a[0]).map(([, name]) => {
    const tr = document.createElement("tr"), td = document.createElement("td");
    const button = document.createElement("button");  // a long name may break behind its dots
    name.split(".").forEach((part, i) => button.append(...(i ? [".", document.createElement("wbr"), part] : [part])));
    button.onclick = () => { choose({ layer: name, filter: null }); $("h-layer").scrollIntoView(); };
    td.append(button);
    tr.append(td, cell("td", list.map(r => r.byName.get(name)?.size).find(Boolean) ?? ""),
      ...list.map(r => cell("td", text(r, name))));
    if (name === chosen.layer) tr.setAttribute("aria-current", "true");
    return tr;
  });
  const thead = document.createElement("thead"), tbody = document.createElement("tbody");
  thead.append(head); tbody.append(...rows);
  $("table").replaceChildren(thead, tbody);
}

function choose(change) {
  Object.assign(chosen, change);
  $("layer").value = chosen.layer;
  $("filter").value = chosen.filter ?? "";
  const size = Math.max(...views().map(v => v.l.size), 1);
  $("filter").max = size - 1;
  const r = views()[0]?.r;
  $("moment").textContent = r ? momentName(r, r.pathTimes[lastMoment(r)]) : "";
  if (!("time" in change) && !("filter" in change && !("layer" in change))) { drawMaps(); fillTable(); }
  drawNorms();
  drawPaths();
  drawSingle();
}
function redraw() {
  for (const r of runs) r.card.style.setProperty("--run", colorOf(r));
  drawCourse();
  choose({});
}

// ------------------------------------------------------------ controls
$("intro").textContent = `${runs.length === 1 ? "One run" : runs.length + " runs side by side"}; everything on this page is in this file.`;
$("threshold").textContent = [...new Set(runs.map(r => r.threshold))].join(", ");
$("below").textContent = [...new Set(runs.map(r => r.inactiveBelow))].join(", ");
$("runs").append(...runs.map(r => {
  const label = document.createElement("label"), box = document.createElement("input");
  const name = document.createElement("h3"), big = document.createElement("div"), text = document.createElement("pre");
  label.className = "card run";
  box.type = "checkbox"; box.checked = true; box.hidden = runs.length === 1;
  box.onchange = () => { r.on = box.checked; label.classList.toggle("off", !r.on); redraw(); };
  name.append(box, " " + r.name);
  big.className = "big";
  big.append(...MEASURES.slice(0, 4).map((word, measure) => [word, lastKnown(r, measure)]).filter(([, value]) => value !== null).map(([word, value]) => {
    const item = document.createElement("span"), number = document.createElement("b");
    number.textContent = percentText(value);
    item.append(number, word);
    return item;
  }));
  text.textContent = r.summary;
  r.card = label;
  label.append(name, big, text);
  return label;
}));
document.querySelectorAll("[data-state]").forEach(key => { key.hidden = !runs.some(r => r.state.includes(+key.dataset.state)); });
$("measure").append(...MEASURES.slice(0, 4).map((word, m) => Object.assign(document.createElement("option"), { value: m, textContent: word + " filters", hidden: runs.every(r => lastKnown(r, m) === null) })));
$("layer").append(...names.map(n => Object.assign(document.createElement("option"), { value: n, textContent: n })));
$("measure").onchange = () => { chosen.measure = +$("measure").value; drawCourse(); drawMaps(); };
$("layer").onchange = () => choose({ layer: $("layer").value, filter: null });
const step = by => choose({ layer: names[(names.indexOf(chosen.layer) + by + names.length) % names.length], filter: null });
$("previous").onclick = () => step(-1);
$("next").onclick = () => step(1);
$("filter").onchange = () => {
  const v = $("filter").value === "" ? null : Math.max(0, Math.min(+$("filter").max, Math.round(+$("filter").value)));
  choose({ filter: v });
};
$("silentFilter").onclick = () => {  // at some moment of some run
  const size = Math.max(...views().map(v => v.l.size), 1), from = chosen.filter ?? -1;
  for (let i = 1; i <= size; i++) {
    const f = (from + i + size) % size;
    if (views().some(({ r, l }) => f < l.size && r.pathTimes.some((_, k) => !WELL.has(r.state[k * r.filters + l.start + f]))))
      return choose({ filter: f });
  }
};
$("same").onchange = drawPaths;
$("time").max = Math.max(...runs.map(r => r.pathTimes.length)) - 1;
$("time").value = $("time").max;
$("time").closest("label").hidden = +$("time").max === 0;
$("time").oninput = () => choose({ time: $("time").max > 0 ? $("time").value / $("time").max : 1 });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
const forPrint = on => () => { printing = on; document.documentElement.classList.toggle("printing", on); redraw(); };
addEventListener("beforeprint", forPrint(true));
addEventListener("afterprint", forPrint(false));
redraw();
document.documentElement.dataset.ready = "true";
