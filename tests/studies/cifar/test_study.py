"""The experiments end to end at toy size, the engine that does their runs, the command line."""

import json
import re
import shutil
import signal
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from psbn_mmdet.collapse.trace import Trace, TracedLayer
from studies.cifar import engine, experiments, figure_data
from studies.cifar import summary as summary_module
from studies.cifar.__main__ import main
from studies.cifar.experiments import Run, build
from studies.cifar.rounds import train_run
from studies.cifar.settings import Settings
from studies.cifar.summary import markdown, redraw, summarise, write_results
from studies.runs import RunError, duration, folder_of, result_of, spread, with_defaults, write_json
from tests.helpers.cifar_files import write_cifar
from tests.helpers.paths import ROOT
from tests.helpers.tools import start_study

TOY = dict(width=0.1, images=40, test_images=20, batch_size=20, epochs=1, rounds=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


tool = partial(start_study, "cifar")


def do_here(experiment, out, root):
    for run in experiment.runs:
        folder = folder_of(experiment, run, out)
        train_run(run.settings, folder, root)


# ---------------------------------------------------------------- what is run


def test_paper_preset_is_the_paper():
    experiment = build("fig3")
    assert len(experiment.runs) == 3 * 5 * 5
    for run in experiment.runs:
        s = run.settings
        assert (s.batch_size, s.lr, s.momentum, s.weight_decay) == (128, 0.1, 0.9, 5e-4)
        assert (s.rounds, s.epochs, s.images, s.width) == (9, 100, None, 1.0)
        assert s.iterations == 9 * 100 * 390
    fields = ("network", "norm", "act", "norm_decay", "revive")
    arms = {tuple(getattr(r.settings, f) for f in fields) for r in experiment.runs}
    assert arms == {
        (network, *arm)
        for network in ("resnet20", "resnet56", "vgg16")
        for arm in (
            ("BN", "ReLU", True, False),
            ("BN", "LeakyReLU", True, False),
            ("psBN", "ReLU", True, False),
            ("BN", "ReLU", False, False),  # these two are ours
            ("BN", "ReLU", True, True),
        )
    }
    table = build("table1").runs
    assert {(r.settings.network, r.settings.rounds, r.settings.epochs) for r in table} == {
        ("resnet110", 5, 40)
    }
    assert {(r.settings.lr, r.settings.norm) for r in table} == {
        (lr, norm) for lr in (0.1, 0.2) for norm in ("BN", "psBN")
    }


def test_reduced_fig3_is_what_is_asked_of_it():
    experiment = build("fig3", "reduced")
    assert {r.settings.network for r in experiment.runs} == {"resnet20"}
    assert {r.settings.width for r in experiment.runs} == {1.0}
    assert {r.settings.seed for r in experiment.runs} == {0, 1, 2}
    s = experiment.runs[0].settings
    assert s.images >= 10_000
    assert s.rounds >= 4
    # The decay of a round as REDUCED explains it.
    assert s.iterations_per_round == 1560
    decay = s.iterations_per_round * s.lr / 2 * s.weight_decay / (1 - s.momentum)
    assert decay == pytest.approx(3.1, abs=0.05)


RESULTS = sorted((ROOT / "studies" / "cifar" / "results").glob("*.json"))
RESULTS = [path for path in RESULTS if path.stem != "verdicts"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_published_results_are_of_the_reduced_preset_as_it_stands(path):
    published = json.loads(path.read_text())
    name, _, preset = path.stem.partition("-")
    seeds = max(len(arm["seeds"]) for arm in published["arms"].values())
    experiment = build(name, preset or "reduced", seeds=seeds)
    planned = {(run.arm, run.settings.seed): run for run in experiment.runs}
    done = {(name, seed) for name, arm in published["arms"].items() for seed in arm["seeds"]}
    assert done <= set(planned)
    assert published["runs_finished"] == len(done)
    assert published["runs_planned"] == len(planned)
    for key in done:
        run, arm = planned[key], published["arms"][key[0]]
        for name, value in with_defaults(arm["settings"], Settings).items():
            if name == "seed":
                continue
            wanted = getattr(run.settings, name)
            if name == "parent" and wanted:
                wanted = wanted.partition("-seed")[0]
            assert value == wanted, (run.name, name)


@pytest.mark.parametrize("preset", ["paper", "reduced"])
@pytest.mark.parametrize("name", experiments.names())
def test_runs_have_names_and_arms_of_their_own(name, preset):
    runs = build(name, preset).runs
    assert len({run.name for run in runs}) == len(runs)
    assert len({run.settings for run in runs}) == len(runs)
    assert len({(run.arm, run.settings.seed) for run in runs}) == len(runs)
    assert {run.settings.parent for run in runs} <= {None, *(run.name for run in runs)}


def test_wrong_experiment_preset_and_setting_are_one_line():
    with pytest.raises(RunError, match="no experiment 'fig6'; there are fig1a, fig1b"):
        build("fig6")
    with pytest.raises(RunError, match="one of paper, reduced, medium"):
        build("fig3", "huge")
    arms = {run.arm for run in build("fig3", "medium").runs}
    assert arms == {
        "resnet20, BN + ReLU",
        "resnet20, psBN + ReLU",
        "resnet20, BN + ReLU, no norm decay",
    }
    with pytest.raises(RunError, match="fig2 has no preset medium; fig3 has"):
        build("fig2", "medium")
    with pytest.raises(RunError, match="no setting 'learning_rate'; there are network"):
        build("fig3", "paper", {"learning_rate": 1})
    with pytest.raises(RunError, match="at least one seed"):
        build("fig3", seeds=0)


# ---------------------------------------------------------------- end to end


# fig2, fig5a, large_lr and instance_norm have the figure of another one, and no end of their own.
# strip needs a collapsed network and has a test of its own (test_pruning.py).
ELSEWHERE = {"fig2", "fig5a", "instance_norm", "strip", "large_lr"}
END_TO_END = sorted(set(experiments.names()) - ELSEWHERE)


@pytest.mark.slow
@pytest.mark.parametrize("name", END_TO_END)
def test_experiment_end_to_end(name, root, tmp_path, monkeypatch):
    # A processor without bfloat16 is refused as slow; at this size torch may emulate it.
    monkeypatch.setattr("psbn_mmdet.launch.amp.cpu_has_bfloat16", lambda: True)
    changes = {"fig1b": dict(TOY, images=100), "alpha": dict(TOY, rounds=1)}.get(name, TOY)
    experiment = build(name, "reduced", changes, seeds=1)
    do_here(experiment, tmp_path, root)
    content, table, png = write_results(experiment, tmp_path, command="the command")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 10_000
    # From the JSON alone: elsewhere, without the runs, the same table and the same picture.
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(content, tmp_path / "alone")
    again = redraw(alone)
    assert [path.read_bytes() for path in again] == [table.read_bytes(), png.read_bytes()]
    summary = json.loads(content.read_text())
    assert summary["runs_finished"] == summary["runs_planned"] == len(experiment.runs)
    text = table.read_text()
    for arm, entry in summary["arms"].items():
        assert f"| {arm} |" in text
        for row in entry["rounds"]:
            assert 0 <= row["accuracy"]["mean"] <= 100
            assert row["accuracy"]["std"] is None
    assert "the command" in text
    assert all(choice in text for choice in experiment.choices)
    wanted = {"fig1a": "near_zero_percent", "fig1b": "collapsed_in_round_2",
              "fig4": "flops_percent", "recovery": "recovery"}  # fmt: skip
    assert wanted.get(name, "arms") in summary
    if name == "table1":  # the paper's numbers beside ours
        assert "| lr 0.2, BN, the paper (ResNet-110) | 92.23 | 93.51 | 94.63 |" in text
        assert "| lr 0.1, psBN, the paper (ResNet-110) | 0.2 | 0.2 |" in text
    if name == "linear":
        assert "The paper on BN, no activation: sparsity < 1%" in text


def test_mean_and_deviation_are_over_seeds(tmp_path):
    experiment = build("shuffled", "reduced", TOY, seeds=3)
    values = {}
    for i, run in enumerate(experiment.runs):
        folder = folder_of(experiment, run, tmp_path)
        folder.mkdir(parents=True)
        rows = [
            dict(round=n, train_loss=1.0, epoch_losses=[1.0], accuracy=float(i**2 + n))
            for n in (1, 2)
        ]
        values.setdefault(run.arm, []).append(rows[1]["accuracy"])
        write_json(
            folder / "result.json",
            dict(settings=vars(run.settings), rounds=rows, device="cpu", threads=1, torch="2",
                 data_crc32="0"),
        )  # fmt: skip
    summary = summarise(experiment, tmp_path)
    for arm, expected in values.items():
        found = summary["arms"][arm]["rounds"][1]["accuracy"]
        assert found["mean"] == pytest.approx(sum(expected) / 3)
        variance = sum((v - sum(expected) / 3) ** 2 for v in expected) / 2
        assert found["std"] == pytest.approx(variance**0.5)
        assert f"{found['mean']:.2f} ± {found['std']:.2f}" in markdown(summary)
    # A result of other settings is never mixed in.
    other = build("shuffled", "reduced", dict(TOY, lr=0.5), seeds=3)
    with pytest.raises(RunError, match="result of other settings"):
        summarise(other, tmp_path)


def arm(norm, seeds, accuracies, **settings):
    """An arm of a summary with two rounds."""
    rounds = [{"accuracy": spread([50.0])}, {"accuracy": spread(accuracies)}]
    settings = {"norm": norm, "alpha": 0.1, "load_bn": "preserve", "decay": 1, **settings}
    return {"seeds": seeds, "settings": settings, "rounds": rounds}


def test_post_shifted_arms_are_compared_with_their_plain_twins_by_seed():
    arms = {
        "BN, decay 1": arm("BN", [0, 1, 2], [50.0, 60.0, 70.0]),
        "BN, decay 2": arm("BN", [0, 1, 2], [10.0, 20.0, 30.0], decay=2),
        "psBN, decay 2": arm("psBN", [2, 0, 1], [33.0, 11.0, 22.0], decay=2, alpha=0.3),
        "psIN": arm("psIN", [0, 1, 2], [1.0, 2.0, 3.0]),  # no IN to compare with
        "psBN, decay 1": arm("psBN", [1], [59.0], load_bn="shift"),
    }
    # By hand: differences 1, 2, 3; t of 2 degrees of freedom is 4.303; 4.303 * 1 / sqrt(3) = 2.48.
    assert summary_module._twins_tables({"arms": arms})[-2:] == [
        "| psBN, decay 2 | BN, decay 2 | +2.00 (-0.48 to +4.48) |",
        "| psBN, decay 1 | BN, decay 1 | -1.00 (one seed) |",
    ]
    del arms["BN, decay 1"], arms["BN, decay 2"]
    assert summary_module._twins_tables({"arms": arms}) == []


def test_arms_in_bfloat16_are_compared_with_float32_by_seed():
    arms = {
        "BN": arm("BN", [0, 1], [50.0, 60.0], amp=False),
        "BN, bfloat16": arm("BN", [0, 1], [51.0, 63.0], amp=True),
        "psBN, bfloat16": arm("psBN", [0, 1], [52.0, 66.0], amp=True),
    }
    # By hand: t of one degree of freedom is 12.71; differences 1, 3: 12.71 * 1.414 / 1.414 = 12.7.
    tables = summary_module._twins_tables({"arms": arms})
    plain, single = (tables.index(line) for line in tables if line.startswith("## "))
    assert tables[plain] == "## After the last round, minus the plain norm"
    assert tables[plain + 6 : single - 1] == [
        "| psBN, bfloat16 | BN, bfloat16 | +2.00 (-10.7 to +14.7) |"
    ]
    assert tables[single] == "## After the last round, minus float32"
    assert tables[single + 6 :] == ["| BN, bfloat16 | BN | +2.00 (-10.7 to +14.7) |"]


def test_arms_without_norm_decay_and_revived_ones_are_compared_with_their_twins():
    arms = {
        "BN": arm("BN", [0, 1], [50.0, 60.0]),  # as published before there were such settings
        "no norm decay": arm("BN", [0, 1], [51.0, 63.0], norm_decay=False, revive=False),
        "revived": arm("BN", [0, 1], [52.0, 64.0], norm_decay=True, revive=True),
        "lifted": arm("BN", [0, 1], [53.0, 65.0], norm_decay=True, revive=False, lift="every"),
    }
    arms["BN"]["settings"].update(norm_decay=True, revive=False)
    for name in ("BN", "no norm decay", "revived"):
        arms[name]["settings"]["lift"] = None
    lines = summary_module._twins_tables({"arms": arms})
    assert [line for line in lines if line.startswith(("## ", "| no", "| re", "| li"))] == [
        "## After the last round, minus the same with decay of gamma and beta",
        "| no norm decay | BN | +2.00 (-10.7 to +14.7) |",
        "## After the last round, minus the same not revived",
        "| revived | BN | +3.00 (-9.71 to +15.7) |",
        "## After the last round, minus the same with gamma as it was",
        "| lifted | BN | +4.00 (-8.71 to +16.7) |",
    ]


def test_sign_flips_by_counting():
    # Sums of +-1 +-2 +-3 are as far from 0 as 6 in 2 of 8 cases, as 4 (1 - 2 - 3) in 4 of 8.
    assert figure_data.sign_flips([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert figure_data.sign_flips([1.0, -2.0, -3.0]) == pytest.approx(4 / 8)
    assert figure_data.sign_flips([0.1] * 10) == pytest.approx(2 / 1024)


def test_large_learning_rates_are_told_with_seeds_at_chance(tmp_path):
    experiment = build("large_lr", "reduced", TOY, seeds=2)
    accuracies = {"lr 0.5, BN + ReLU": [10.0, 40.0], "lr 0.5, psBN + ReLU": [41.0, 42.0]}
    for run in experiment.runs:
        if run.arm in accuracies:
            folder = folder_of(experiment, run, tmp_path)
            folder.mkdir(parents=True)
            accuracy = accuracies[run.arm][run.settings.seed - 100]
            row = dict(round=1, train_loss=1.0, epoch_losses=[1.0], accuracy=accuracy)
            write_json(
                folder / "result.json",
                dict(settings=vars(run.settings), rounds=[row], device="cpu", threads=1,
                     torch="2", data_crc32="0"),
            )  # fmt: skip
    table = markdown(summarise(experiment, tmp_path))
    assert "| lr 0.5, BN + ReLU | 1 |  |  |" in table
    # By hand: differences 31, 2; t 12.706 * 20.506 / 1.414 = 184.2; 2 of 4 signs give 33 or more.
    assert "| lr 0.5, psBN + ReLU | 0 | +16.5 (-167.7 to +200.7) | 0.500 |" in table


def test_norms_near_zero_are_told_from_the_large_ones():
    norms = torch.cat([torch.full((60,), 0.04), torch.full((40,), 1.0)]).numpy()
    assert figure_data.near_zero_percent(norms) == pytest.approx(60)
    assert figure_data.near_zero_percent(norms + 0.02) == 0


def test_recovery_counts_those_that_had_collapsed():
    gamma = torch.tensor(
        [[0.0, 5e-4, 0.3, 0.2], [0.0, 2e-3, 0.3, 5e-4], [0.1, 2e-3, 0.3, 0.0]]
    ).numpy()
    states = np.zeros((3, 4), np.uint8)
    layers = (TracedLayer("bn", 4),)
    trace = Trace(layers, np.array([0, 10, 20]), gamma, gamma, gamma, states)
    found = figure_data.recovery_of(trace)
    assert found["collapsed_before"] == 2
    assert found["still_collapsed_percent"] == [100, 50, 0]
    assert found["all_collapsed_percent"] == [50, 50, 25]
    assert found["half_back"] == 10


# ---------------------------------------------------------------- the engine


def runs_of(*names, parents=None):
    parents = parents or {}
    return [Run(n, n, Settings(parent=parents.get(n), seed=i)) for i, n in enumerate(names)]


def test_shares_are_disjoint_whole_and_keep_children_with_parents():
    runs = runs_of("a", "b", "c", "d", "child", parents={"child": "b"})
    shares = [[run.name for run in engine.share(runs, f"{i}/3")] for i in (1, 2, 3)]
    assert shares == [["a", "d"], ["b", "child"], ["c"]]
    assert [r.name for r in engine.share(runs, None)] == ["a", "b", "child", "c", "d"]


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("5/5", "there are only 4 independent runs to share; take n <= 4"),
        ("0/2", "i must be from 1 to n"),
        ("3/2", "i must be from 1 to n"),
        ("a", "must be i/n, as 2/9, got 'a'"),
    ],
)
def test_wrong_share_is_one_line(shard, message):
    runs = runs_of("a", "b", "c", "d", "child", parents={"child": "b"})
    with pytest.raises(RunError, match=re.escape(message)):
        engine.share(runs, shard)


def test_estimate_is_work_by_measured_speed_over_workers(tmp_path):
    """Two runs of 100 s each that have begun, of four, with two workers."""
    base = replace(build("fig3", "reduced", TOY).runs[0].settings, test_images=10)
    runs = tuple(Run(f"r{i}", "arm", replace(base, seed=i)) for i in range(4))
    experiment = experiments.Experiment("e", "", "rounds", runs)
    total = base.iterations
    for i, done in ((0, total // 2), (1, total)):
        folder = folder_of(experiment, runs[i], tmp_path)
        folder.mkdir(parents=True)
        write_json(
            folder / "progress.json",
            dict(iteration=done, iterations=total, iterations_of_process=done,
                 seconds_of_process=100 * done / total),
        )  # fmt: skip
        if done == total:
            (folder / "result.json").write_text("{}")
    clock = engine.Clock(experiment, tmp_path, threads=1)
    # r0 has 50 s left; r2 and r3 100 s each: 50 and 100, then r3 behind r0.
    assert clock.left(runs, workers=2) == pytest.approx(150)
    assert clock.left(runs, workers=3) == pytest.approx(100)
    assert clock.left(runs, workers=1) == pytest.approx(250)


def test_durations_read_well():
    cases = {3.2: "4 s", 600: "10 min", 9000: "2 h 30 min", 9e5: "10 days 10 h"}
    assert {duration(s): text for s, text in cases.items()} == {
        text: text for text in cases.values()
    }


def test_no_workers_is_one_line():
    with pytest.raises(RunError, match="--workers must be at least 1"):
        engine.plan(build("fig3", "reduced", TOY), "nowhere", workers=0)


@pytest.mark.slow
def test_engine_does_each_run_once_children_after_parents(root, tmp_path):
    experiment = build("recovery", "reduced", TOY, seeds=1)
    engine.prepare(experiment, tmp_path, root)
    said = []
    assert engine.execute(experiment, tmp_path, root, workers=2, say=said.append) == []
    assert "8 runs, 0 of them finished; the rest takes about" in said[0]
    stamps = {r.name: r for r in experiment.runs}
    ended = {
        name: (tmp_path / "recovery" / name / "result.json").stat().st_mtime for name in stamps
    }
    assert min(ended, key=ended.get) == "bn-seed0"
    said.clear()
    assert engine.execute(experiment, tmp_path, root, say=said.append) == []
    assert said == ["recovery: 8 runs, 8 of them finished"]
    assert {
        name: (tmp_path / "recovery" / name / "result.json").stat().st_mtime for name in stamps
    } == ended


@pytest.mark.slow
def test_failed_run_is_reported_and_its_children_left(root, tmp_path):
    experiment = build("recovery", "reduced", TOY, seeds=1)
    engine.prepare(experiment, tmp_path, root)
    (tmp_path / "recovery" / "bn-seed0" / "last.pth").write_bytes(b"no checkpoint")
    failed = engine.execute(experiment, tmp_path, root, say=lambda line: None)
    assert failed[0].startswith("bn-seed0: failed (")
    assert failed[0].endswith("output.txt")
    assert sorted(failed[1:]) == sorted(
        f"{r.name}: not done, as bn-seed0 failed" for r in experiment.runs[1:]
    )


@pytest.fixture
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_threads_as_before")
def test_command_is_killed_goes_on_and_ends_as_if_it_had_not(root, tmp_path):
    """SIGKILL in the middle of the runs; the same command again; a second one that has no cut."""
    common = ["linear", "--preset", "reduced", "--data-root", root, "--seeds", 1, "--workers", 2]
    options = [f"{k}={v}" for k, v in {**TOY, "epochs": 20}.items()]
    cut = [*common, "--out", tmp_path / "cut", "--set", *options]
    first = tool(*cut)
    runs = tmp_path / "cut" / "linear"
    deadline = time.monotonic() + 120
    while not list(runs.glob("*/round_1.pth")) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(first.pid).children(recursive=True)
    first.kill()  # without a word, which the workers must notice
    first.communicate()
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert list(runs.glob("*/round_1.pth"))
    assert len(list(runs.glob("*/result.json"))) < 2
    second = tool(*cut)
    output, error = second.communicate(timeout=200)
    assert second.returncode == 0, error
    assert "linear.png" in output
    torch.set_num_threads(1)  # as the workers above: equal to the bit with as many threads only
    experiment = build("linear", "reduced", {**TOY, "epochs": 20}, seeds=1)
    do_here(experiment, tmp_path / "whole", root)
    for run in experiment.runs:
        a, b = (result_of(experiment, run, tmp_path / n) for n in ("cut", "whole"))
        assert a["rounds"] == b["rounds"]


@pytest.fixture
def called(monkeypatch, capsys):
    """Call the command line here: its exit status, standard output and last line of errors."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["__main__.py", *map(str, arguments)])
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        output, error = capsys.readouterr()
        return status, output, error.strip().splitlines()[-1] if error else ""

    yield call
    signal.signal(signal.SIGTERM, before)


def test_bad_command_lines_end_with_one_line(root, tmp_path, called):
    out = ["--out", tmp_path / "out"]
    fig3 = ["fig3", "--preset", "reduced", *out]
    (tmp_path / "list.json").write_text("[]")
    cases = [
        ([*fig3, "--data-root", tmp_path / "none"], "no such file"),
        (["fig1b", "--preset", "reduced", *out, "--shard", "4/4"], "only 3 independent runs"),
        ([*fig3, "--set", "speed=1"], "no setting 'speed'"),
        ([*fig3, "--draw"], "no run is finished, so nothing to draw"),
        (["draw", tmp_path / "list.json"], "is no JSON of an experiment of this study"),
        (["draw", tmp_path / "none.json"], "cannot be read (No such file or directory)"),
        (["verdicts", "--results", tmp_path / "none"], "there is no such folder"),
    ]
    for arguments, message in cases:
        status, output, line = called(*arguments)
        assert (status, output) == (2, "")
        assert line.startswith("studies.cifar: ")
        assert message in line
    # Another experiment's settings in the same place.
    plan = [*fig3, "--data-root", root, "--plan", "--set", *(f"{k}={v}" for k, v in TOY.items())]
    status, output, _ = called(*plan)
    assert status == 0
    assert re.search(r"fig3: 15 runs, 0 of them finished; the rest takes about \d+ s", output)
    status, _, line = called(*plan, "lr=0.5")
    assert status == 2
    assert "holds a run with other settings (1 differ, as lr: 0.2 there, 0.5 now)" in line


def test_json_without_what_its_figure_shows_is_one_line(tmp_path, called):
    """As the published fig1a, which is older than drawing from the JSON alone."""
    old = json.loads((ROOT / "studies/cifar/results/fig1a.json").read_text())
    old.pop("filter_norms", None)
    (tmp_path / "fig1a.json").write_text(json.dumps(old))
    status, _, line = called("draw", tmp_path / "fig1a.json")
    assert status == 2
    assert "has no 'filter_norms', which its figure shows" in line
    assert [path.name for path in tmp_path.iterdir()] == ["fig1a.json"]


def test_other_copy_of_the_data_is_refused(root, tmp_path):
    experiment = build("fig1b", "reduced", dict(TOY, images=100), seeds=1)
    folder = Path(folder_of(experiment, experiment.runs[0], tmp_path))
    engine.prepare(experiment, tmp_path, root)
    (folder / "result.json").write_text(json.dumps({"data_crc32": "00000000"}))
    with pytest.raises(RunError, match="another copy of CIFAR-10"):
        engine.prepare(experiment, tmp_path, root)


def test_spread_is_the_sample_deviation():
    assert spread([1, 2, 4])["std"] == pytest.approx(statistics.stdev([1, 2, 4]))
    assert spread([5])["std"] is None
