"""Figures and the page, the latter in a real browser, against the truth made by hand."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from psbn_mmdet import norm
from psbn_mmdet.collapse import figures, gather, measure, norm_modules, over_training, trace
from psbn_mmdet.collapse import page as page_module
from psbn_mmdet.collapse.criteria import STATES
from psbn_mmdet.collapse.hook import SparsityLoggerHook
from psbn_mmdet.collapse.page import write_page
from tests.helpers.browser import WHY_NOT, Tab, chromium
from tests.helpers.collapsed_net import CONSTANT, DEAD, VARIANTS, Net, collapse_by_hand
from tests.helpers.tools import Main
from tests.helpers.toy_runner import make_runner

COLLAPSED = {name: sorted(DEAD[name] + CONSTANT[name]) for name in DEAD}
needs_browser = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def by_hand(variant="BN", moments=1):
    """A run that ends in the truth made by hand."""
    torch.manual_seed(0)
    end = measure(VARIANTS[variant](collapse_by_hand(Net())))
    start = measure(Net())
    labels = [f"round {i}" for i in range(moments)]
    return trace.from_reports([start] * (moments - 1) + [end], labels)


def random_run(layers, filters, moments, seed=0):
    rng = np.random.default_rng(seed)
    total = layers * filters
    gamma = rng.normal(1, 0.3, (moments, total)).astype(np.float32)
    bias = rng.normal(-0.5, 0.5, (moments, total)).astype(np.float32)
    names = tuple(
        trace.TracedLayer(f"layer{i}.bn", filters, f"layer{i}.conv") for i in range(layers)
    )
    norm = rng.uniform(1, 2, (moments, total)).astype(np.float16)
    does = rng.integers(0, 4, (moments, total)).astype(np.uint8)
    return trace.Trace(names, np.arange(moments) * 10, gamma, bias, norm, does)


def test_states_are_those_made_by_hand():
    run = by_hand()
    found = np.split(over_training.states(run)[0], np.cumsum([n for _, n, *_ in run.layers])[:-1])
    for (name, *_), codes in zip(run.layers, found, strict=True):
        assert np.flatnonzero(codes == STATES.index("collapsed")).tolist() == COLLAPSED[name]
    assert [np.flatnonzero(c == 1).tolist() for c in found] == [[2], [], [], []]


def test_what_was_measured_goes_before_what_the_weights_tell():
    run = by_hand()
    run.does[0, :5] = [1, 2, 3, 0, 1]
    found = [STATES[code] for code in over_training.states(run)[0, :6]]
    assert found == ["stuck", "idle", "carrying", "live", "stuck", "collapsed"]
    shares = dict(
        zip(over_training.MEASURES, over_training.percent(*over_training.counted(run)), strict=True)
    )
    assert shares["stuck"] == pytest.approx(100 * 2 / 4)  # of the measured
    assert shares["idle"] == pytest.approx(100 * 1 / 4)
    assert shares["collapsed"] == pytest.approx(100 * 8 / 28)
    assert shares["inactive"] == pytest.approx(100 * 1 / 12)  # of those with a ReLU right behind


def test_a_layer_that_has_not_started_is_not_collapsed_at_that_moment():
    run = by_hand(moments=2)
    run.gamma[0, :8] = run.bias[0, :8] = 0
    masks, _ = over_training.counted(run)
    assert masks[0][:, :8].sum(1).tolist() == [0, 3]


def without_relu():
    """gamma 0 or small and bias negative, before a SiLU and before a ReLU; one value is NaN."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.SiLU(),
        torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
    )  # fmt: skip
    for i in (1, 4):
        net[i].weight.data[:] = torch.tensor([0.0, 0.1, 1.0, torch.nan])
        net[i].bias.data[:] = torch.tensor([-1.0, -1.0, 0.0, 0.0])
    return trace.from_reports([measure(net)], ["a"])


def test_states_know_what_follows_a_layer_and_what_is_not_finite():
    run = without_relu()
    found = over_training.states(run)
    assert [STATES[code] for code in found[0]] == [
        "collapsed", "live", "live", "not finite", "collapsed", "inactive", "live", "not finite",
    ]  # fmt: skip
    shares = dict(
        zip(over_training.MEASURES, over_training.percent(*over_training.counted(run)), strict=True)
    )
    assert shares["collapsed"] == pytest.approx([100 * 2 / 6])
    assert shares["inactive"] == pytest.approx([100 * 1 / 3])
    assert np.isnan(shares["stuck"]).all()


def test_the_region_is_where_relu_fires_once_in_a_thousand():
    run = by_hand()
    corners = over_training.non_trainable(run, half_width=1.0, bottom=-10.0)
    # Phi(-3.0902) = 1e-3: the wedge reaches the right edge at bias = -3.0902, then goes down.
    want = [(-1, -3.0902), (0, 0), (1, -3.0902), (1, -10), (-1, -10)]
    np.testing.assert_allclose(corners, want, atol=1e-4)
    corners = over_training.non_trainable(run, half_width=10.0, bottom=-1.0)
    np.testing.assert_allclose(corners, [(-0.3236, -1), (0, 0), (0.3236, -1)], atol=1e-4)
    assert over_training.non_trainable(run, half_width=1.0, bottom=0.1) == []


class TestFigures:
    def test_four_pictures_that_are_not_empty(self, tmp_path):
        from PIL import Image

        written = figures.write_figures(by_hand(moments=3), tmp_path)
        assert [p.name for p in written] == ["collapse.png", "layers.png", "norms.png", "paths.png"]
        for path in written:
            picture = Image.open(path).convert("RGB")
            assert len(picture.getcolors(picture.width * picture.height)) > 20, path

    def test_what_is_drawn_are_the_numbers(self):
        from matplotlib.figure import Figure

        run = by_hand(moments=3)
        figure = Figure()
        figures._draw_course(figure, run)
        lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
        np.testing.assert_allclose(lines["collapsed"], [0, 0, 100 * 8 / 28])
        np.testing.assert_allclose(lines["inactive"], [0, 0, 100 * 1 / 12])
        assert "stuck" not in lines
        assert figure.axes[0].get_title() == "8 of 28 filters collapsed (28.57%)"
        figure = Figure()
        figures._draw_heat_map(figure, run)
        cells = figure.axes[0].collections[0].get_array()
        want = [100 * len(COLLAPSED[name]) / n for name, n, *_ in run.layers]
        cells = np.asarray(cells).reshape(len(want), -1)  # flat below matplotlib 3.8
        np.testing.assert_allclose(cells[:, -1], want)

    def test_a_single_moment_no_convolution_and_values_that_are_not_finite(self, tmp_path):
        single = trace.from_reports([measure(torch.nn.BatchNorm2d(4))], ["a"])
        written = figures.write_figures(single, tmp_path / "a")
        assert [p.name for p in written] == ["layers.png", "paths.png"]
        run = random_run(3, 8, 5)
        run.gamma[2:, 3] = np.nan
        run.bias[4, 5] = np.inf
        run.norm[:, 7] = np.inf
        assert len(figures.write_figures(run, tmp_path / "b")) == 4
        write_page({"a": run}, tmp_path / "b.html")


class TestPageFile:
    def data(self, path):
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>',
                          path.read_text(), re.DOTALL)  # fmt: skip
        return json.loads(found[1])

    def test_it_is_thinned_to_a_budget_and_keeps_both_ends(self, tmp_path, monkeypatch):
        monkeypatch.setattr(page_module, "PATH_BYTES", 100_000)
        run = random_run(5, 40, 900)
        path = write_page({"a": run, "b": run}, tmp_path / "a.html")
        for data in self.data(path):
            times = data["pathTimes"]
            assert (times[0], times[-1]) == (0, 8990)
            size = sum(len(data[k]) for k in ("gamma", "bias", "norms", "state"))
            assert 25_000 < size < 50_000
            assert (len(data["times"]), data["times"][-1]) == (page_module.MOMENTS, 8990)
            assert data["moments"] == 900

    def test_names_cannot_break_out_of_it(self, tmp_path):
        run = random_run(1, 2, 2)
        name = "</script><b>{{plotly}}"
        path = write_page({name: run}, tmp_path / "a.html", title="a < b")
        assert [d["name"] for d in self.data(path)] == [name]
        assert "<title>a &lt; b</title>" in path.read_text()

    def test_pictures_are_in_the_page_itself(self, tmp_path):
        png = tmp_path / "a.png"
        png.write_bytes(b"\x89PNG not really")
        run = random_run(1, 2, 2)
        text = write_page({"a": run}, tmp_path / "a.html", pictures={"a < b": png}).read_text()
        encoded = base64.b64encode(png.read_bytes()).decode()
        assert f'src="data:image/png;base64,{encoded}" alt="a &lt; b"' in text
        assert "h-pictures" not in write_page({"a": run}, tmp_path / "b.html").read_text()

    def test_no_run_and_a_file_that_is_no_trace(self, tmp_path):
        with pytest.raises(ValueError, match="at least one run"):
            write_page({}, tmp_path / "a.html")
        (tmp_path / "a.trace").write_bytes(b"")
        with pytest.raises(trace.TraceError, match="is empty"):
            write_page({"a": tmp_path / "a.trace"}, tmp_path / "a.html")
        assert not (tmp_path / "a.html").exists()


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def browse(browser):
    opened = []

    def start(path, **kwargs):
        opened.append(Tab(browser, path, **kwargs))
        return opened[-1]

    yield start
    for tab in opened:
        tab.close()


PLOTTED_SETS = """
(() => { const found = {};
for (const name of names) {
  choose({layer: name, filter: null});
  const data = document.querySelector("#paths .chart").data.filter(d => d.customdata);
  found[name] = data.filter(d => /collapsed/.test(d.hovertemplate)).flatMap(d => d.customdata);
}
return found; })()"""


@needs_browser
class TestPage:
    @pytest.mark.slow
    @pytest.mark.parametrize("variant", ["BN", "psBN"])  # all others: test_report.py
    def test_it_shows_exactly_the_filters_collapsed_by_hand(self, variant, tmp_path, browse):
        page = browse(write_page({"hand": by_hand(variant, 2)}, tmp_path / "a.html"))
        found = page.js(PLOTTED_SETS)
        assert {name: sorted(filters) for name, filters in found.items()} == COLLAPSED
        assert page.js("document.querySelector('#runs pre').textContent").startswith(
            "8 of 28 filters collapsed (28.57%)"
        )
        assert page.js("document.querySelector('#runs b').textContent") == "28.57%"
        cells = page.js("[...document.querySelectorAll('#table tbody tr')].map(r => r.innerText)")
        assert {c.split()[0]: int(c.split()[2]) for c in cells} == {
            name: len(filters) for name, filters in COLLAPSED.items()
        }
        heat = page.js("document.querySelector('#maps .chart').data[0].z.map(row => row.at(-1))")
        assert heat == pytest.approx([37.5, 25, 12.5, 37.5])
        assert page.js("document.getElementById('course').data[0].y.at(-1)") == pytest.approx(
            100 * 8 / 28
        )

    @pytest.mark.slow
    def test_a_real_run_works_with_keys_alone_and_asks_no_network(self, tmp_path, browse):
        torch.manual_seed(0)
        for name in ("bn", "psbn"):
            net = Net() if name == "bn" else norm.to_psbn(Net())
            # Decay that shows within some iterations.
            optimizer = {"optimizer": {"type": "SGD", "lr": 0.3, "weight_decay": 0.3}}
            hooks = [SparsityLoggerHook(2, figures=False)]
            make_runner(tmp_path / name, hooks, net, 30, optim_wrapper=optimizer).train()
        files = {name: tmp_path / name / "collapse.trace" for name in ("bn", "psbn")}
        page = browse(write_page(files, tmp_path / "a.html"))
        assert page.js("document.querySelectorAll('#maps .js-plotly-plot').length") == 2

        # Everything can be reached with Tab, in order.
        reached = []
        page.js("document.body.focus()")
        for _ in range(14):
            page.press("Tab")
            reached.append(page.js("document.activeElement.id || document.activeElement.type"))
        wanted = ["checkbox", "checkbox", "measure", "layer", "previous", "next", "filter",
                  "silentFilter", "time", "same"]  # fmt: skip
        assert [r for r in reached if r in wanted] == wanted

        # A layer is picked with the arrows, ...
        page.js("document.getElementById('layer').focus()")
        before = page.js("chosen.layer")
        page.js("step(0)")
        page.js("document.getElementById('next').focus()")
        page.press("Enter")
        names = page.js("names")
        assert page.js("chosen.layer") == names[(names.index(before) + 1) % len(names)]
        # ... a filter is followed by typing its number, ...
        page.js("document.getElementById('filter').focus()")
        page.press("2", "Enter")
        assert page.js("chosen.filter") == 2
        assert page.js("document.querySelectorAll('#single .js-plotly-plot').length") == 2
        run = trace.read(files["bn"])
        start = sum(n for name, n, *_ in run.layers[: names.index(page.js("chosen.layer"))])
        shown = page.js("document.querySelector('#single .chart').data[0].y")
        np.testing.assert_allclose(shown, run.gamma[:, start + 2], rtol=1e-3, atol=1e-6)
        # ... time goes back to the start with Home, ...
        page.js("document.getElementById('time').focus()")
        page.press("Home")
        assert page.js("document.getElementById('moment').textContent") == "iteration 0"
        # ... and a run is taken off with the space bar.
        page.js("document.querySelector('#runs input').focus()")
        page.press("Space")
        assert page.js("document.querySelectorAll('#maps .js-plotly-plot').length") == 1
        assert page.js("document.querySelector('#maps h3').textContent") == "psbn"
        assert page.errors == []
        assert [
            url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))
        ] == []

    @pytest.mark.parametrize("width", [320, 420, 1280])
    def test_nothing_sticks_out_of_a_window(self, width, tmp_path, browse):
        run = random_run(20, 16, 12)
        long = "backbone.a_rather_long_name_of_a_stage.and.another_one.bn"
        layers = (trace.TracedLayer(long, 16), *run.layers[1:])
        run = dataclasses.replace(run, layers=layers)
        path = write_page({"BN, trained": run, "psBN, finetuned": run}, tmp_path / "a.html")
        page = browse(path, width=width)
        page.js(f"choose({{layer: {long!r}, filter: 3}})")
        assert page.js("document.documentElement.scrollWidth <= innerWidth")
        out = page.js(
            "[...document.querySelectorAll('.card, select, input, button')]"
            ".filter(e => !e.closest('.scroll') && e.offsetParent)"
            ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
        )
        assert out == []
        assert page.js("document.querySelector('#norms figcaption').textContent").startswith(
            "No convolution was found"
        )
        columns = "getComputedStyle(document.getElementById('maps')).gridTemplateColumns"
        assert len(page.js(columns).replace(" 0px", "").split()) == (2 if width == 1280 else 1)
        assert page.errors == []

    def test_other_layers_one_moment_and_values_that_are_not_finite(self, tmp_path, browse):
        run = random_run(3, 8, 4)
        run.gamma[2:, 3] = np.nan
        run.bias[3, 5] = np.inf
        path = tmp_path / "a.html"
        write_page({"</script>&<i>": run, "one": by_hand()}, path)
        page = browse(path)
        assert page.js("document.querySelector('#runs h3').textContent") == " </script>&<i>"
        page.js("choose({layer: 'block.bn2'})")
        assert page.js("document.querySelectorAll('#paths .js-plotly-plot').length") == 1
        assert page.errors == []

    def test_long_names_of_checkpoints_are_shortened_by_what_they_share(self, tmp_path, browse):
        page = browse(write_page({"a": by_hand(moments=3)}, tmp_path / "a.html"), width=380)
        ticks = "document.getElementById('course').layout.xaxis.ticktext"
        assert page.js(ticks) == ["round 0", "round 1", "round 2"]
        for labels, short, pattern in [
            (["runs/iter_1000.pth", "runs/iter_2000.pth"], ["1000", "2000"], "runs/iter_*.pth"),
            (["a_long_name.pth", "another_name.pth"], ["a_long", "another"], "*_name.pth"),
            (["the_same_name.pth"] * 2, ["the_same_name.pth"] * 2, ""),
            (["the_same_name.pth", "the_same_"], ["the_same_name.pth", "the_same_"], ""),
            (["something_else", "nothing in common"], ["something_else", "nothing in common"], ""),
        ]:
            assert page.js(f"shortened({json.dumps(labels)})") == [short, pattern]

    def test_a_layer_without_relu_and_the_share_of_the_finite_filters(self, tmp_path, browse):
        page = browse(write_page({"a": without_relu()}, tmp_path / "a.html"))
        assert page.js("document.querySelector('#runs b').textContent") == "33.33%"
        bars = page.js("document.querySelector('#maps .chart').data[0].y")
        assert bars == pytest.approx([100 / 3, 100 / 3])
        assert page.js("document.getElementById('h-course').parentElement.hidden")
        legend = "[...document.querySelectorAll('#legend > span')].filter(e => e.offsetParent)"
        assert "not finite" in page.js(f"{legend}.map(e => e.innerText.trim())")
        zones = "document.querySelector('#paths .chart').data.filter(d => d.fill).length"
        for layer, text, zone in [("1", "Something other than a ReLU follows it: gamma", 0),
                                  ("4", "A ReLU stands right behind it.", 1)]:  # fmt: skip
            page.js(f"choose({{layer: '{layer}', filter: null}})")
            assert page.js("document.getElementById('follows').textContent").startswith(text)
            assert page.js(zones) == zone
        caption = "document.querySelector('#paths figcaption').textContent"
        assert page.js(caption) == "Of 4 filters 1 live, 1 inactive, 1 collapsed, 1 not finite."
        assert page.errors == []


class TestTool:
    @pytest.fixture
    def plot(self, capsys):
        return Main("plot_collapse", capsys)

    def work_dir(self, folder):
        folder.mkdir()
        net = collapse_by_hand(Net())
        gamma, bias = gather(norm_modules(net).values())
        trace.Writer(folder, measure(net), 0).write(0, gamma, bias, gamma, gamma.byte() * 0)
        return folder

    def test_work_dirs_and_files_side_by_side(self, tmp_path, plot):
        a, b = self.work_dir(tmp_path / "a"), self.work_dir(tmp_path / "b")
        done = plot(a, f"psBN={b / 'collapse.trace'}", f"psBN={b}", "--html", tmp_path / "p.html")
        assert done.returncode == 0
        assert done.stdout.startswith("a, iteration 0:\n8 of 28 filters collapsed (28.57%)\n")
        assert "\npsBN (2), iteration 0:\n" in done.stdout
        assert (tmp_path / "p.html").stat().st_size > 4_000_000
        assert plot(a, b, "--png", tmp_path / "png").returncode == 0
        assert len(list((tmp_path / "png").glob("*/*.png"))) == 6  # of one moment none over time

    def test_bad_input_is_one_line(self, tmp_path, plot):
        a = self.work_dir(tmp_path / "a")
        assert "nothing to write" in plot.refuses(a)
        taken = tmp_path / "taken.html"
        taken.write_text("mine")
        assert "exists already" in plot.refuses(a, "--html", taken)
        assert taken.read_text() == "mine"
        assert plot(a, "--html", taken, "--overwrite").returncode == 0
        assert taken.stat().st_size > 4_000_000
        assert "there is no folder" in plot.refuses(a, "--html", tmp_path / "none" / "a.html")
        out = ["--html", tmp_path / "p.html"]
        assert "no such file" in plot.refuses(tmp_path / "none", *out)
        (tmp_path / "empty.trace").touch()
        assert "is empty" in plot.refuses(tmp_path / "empty.trace", *out)
        assert not (tmp_path / "p.html").exists()


def test_inspect_writes_the_page(tmp_path, capsys):
    torch.save(collapse_by_hand(Net()).state_dict(), tmp_path / "a.pth")
    inspect = Main("inspect_checkpoint", capsys)
    assert inspect(tmp_path / "a.pth", "--html", tmp_path / "a.html").returncode == 0
    (data,) = TestPageFile().data(tmp_path / "a.html")
    assert data["labels"] == ["a.pth"]
    assert data["summary"].startswith("8 of 28 filters collapsed (28.57%)")
