"""The experiments end to end at toy size, resumed and drawn; the command line."""

import json
import math
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from psbn_mmdet import psBN2d
from psbn_mmdet.ap.coco_files import read_annotations, read_results
from psbn_mmdet.ap.evaluate import evaluate
from psbn_mmdet.checkpoint import load
from studies.cifar.networks import build_network
from studies.cifar.settings import Settings as CifarSettings
from studies.detection import data, engine, experiments, figures, summary, training
from studies.detection.__main__ import main
from studies.detection.settings import (
    ANCHORED,
    BN,
    METHODS,
    PRESERVE,
    SHIFT,
    Settings,
    learning_rate,
)
from studies.runs import RunError, finished, folder_of, result_of
from tests.helpers.cifar_files import write_cifar
from tests.helpers.paths import ROOT
from tests.helpers.smears import write_smears
from tests.helpers.tools import start_study

TOY = dict(base_channels=8, width=64, height=48, batch_size=2, epochs=4, warmup=1, lr=0.1)
PRETRAINING = dict(width=8 / 64, images=40, test_images=20, batch_size=20, epochs=1)


def toy_rounds(seeds=2, **changes):
    changes = dict(TOY, pretraining=dict(PRETRAINING, rounds=1), **changes)
    return experiments.build("rounds", changes, seeds)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    # Six test images: an interval takes no fewer.
    return write_smears(tmp_path_factory.mktemp("smears") / "data", test=3)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="module")
def rounds(root, cifar, tmp_path_factory):
    """The experiment ``rounds``, done at toy size: the experiment and where it is."""
    out = tmp_path_factory.mktemp("study")
    experiment = toy_rounds(rounds=2)
    engine.execute(experiment, out, root, cifar, lambda line: None)
    return experiment, out


tool = partial(start_study, "detection", stderr=subprocess.STDOUT)


# ---------------------------------------------------------------- what is run


@pytest.mark.parametrize("name", experiments.names())
def test_runs_have_names_and_arms_of_their_own(name):
    experiment = experiments.build(name)
    runs = experiment.runs
    assert len({run.name for run in runs}) == len(runs)
    assert len({run.settings for run in runs}) == len(runs)
    assert len({(run.arm, run.settings.seed) for run in runs}) == len(runs)
    arms = {run.arm for run in runs}
    assert {arm for pair in experiment.pairs for arm in pair} == arms
    # Cut short anywhere, the study has complete seeds.
    assert [run.settings.seed for run in runs] == sorted(run.settings.seed for run in runs)
    assert {run.settings.backbone for run in runs} - {None} == set(experiment.backbones)


def test_transfer_has_every_method_from_every_degree_of_collapse():
    runs = experiments.build("transfer").runs
    assert len({run.settings.seed for run in runs}) >= 5
    for seed in {run.settings.seed for run in runs}:
        mine = [run.settings for run in runs if run.settings.seed == seed]
        collapsed = [s for s in mine if s.backbone == f"bn-seed{seed}"]
        assert {(s.method, s.backbone_round) for s in collapsed} == {
            (method, number) for method in METHODS for number in experiments.DEGREES.values()
        }
        assert {s.backbone for s in mine} == {f"bn-seed{seed}", f"psbn-seed{seed}"}
        one = {replace(s, method=BN, backbone="", backbone_round=1) for s in mine}
        assert len(one) == 1  # one recipe


def test_learning_rate_by_hand():
    s = Settings(lr=0.4, warmup=2, epochs=1)
    rates = [learning_rate(s, i, 4) for i in range(8)]
    half = 0.2 * (1 + math.cos(math.pi / 4))
    late = 0.2 * (1 + math.cos(3 * math.pi / 4))
    assert rates == pytest.approx(2 * [0.2, half, 0.2, late])


def test_wrong_names_and_settings_are_one_line():
    with pytest.raises(RunError, match="no experiment 'fig9'; there are transfer"):
        experiments.build("fig9")
    with pytest.raises(RunError, match="no setting 'depth'; there are method, alpha"):
        experiments.build("transfer", dict(depth=50))
    with pytest.raises(RunError, match=r"no setting 'pretraining\.depth'; there are network"):
        experiments.build("transfer", dict(pretraining=dict(depth=50)))
    with pytest.raises(RunError, match="lr must be positive"):
        experiments.build("transfer", dict(lr=-1))
    with pytest.raises(RunError, match="lr must be a number, got 'big'"):
        experiments.build("transfer", dict(lr="big"))
    with pytest.raises(RunError, match="at least one seed"):
        experiments.build("transfer", seeds=0)
    with pytest.raises(RunError, match="mmdet_resnet18 always has a normalization and ReLU"):
        CifarSettings(network="mmdet_resnet18", norm="none")
    with pytest.raises(RunError, match="method must be one of BN, BN without norm decay"):
        Settings(method="GN")


# ---------------------------------------------------------------- the four methods


@pytest.fixture(scope="module")
def pretrained(cifar, tmp_path_factory):
    """A backbone of the CIFAR-10 study."""
    from studies.cifar.rounds import train_run

    folder = tmp_path_factory.mktemp("backbones") / "bn-seed0"
    wanted = experiments.build("transfer", dict(pretraining=dict(PRETRAINING, rounds=1)), 1)
    train_run(wanted.backbones["bn-seed0"], folder, cifar)
    return folder / "round_1.pth"


def backbone_outputs(method, pretrained, alpha=0.1):
    settings = Settings(method=method, base_channels=8, alpha=alpha)
    model = training.build_model(settings, 2, pretrained)
    x = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    model.eval()
    return model.backbone(x), model


def test_preserve_and_anchored_start_from_the_pretrained_function_and_shift_does_not(pretrained):
    wanted, bn = backbone_outputs(BN, pretrained)
    for method in (PRESERVE, ANCHORED):
        found = backbone_outputs(method, pretrained)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    shifted, model = backbone_outputs(SHIFT, pretrained)
    assert not torch.allclose(shifted[0], wanted[0], atol=1e-3)
    layer = model.backbone.layer1[0].bn1
    torch.testing.assert_close(layer.beta, bn.backbone.layer1[0].bn1.bias)
    assert layer.alpha == torch.tensor(0.1)


def test_backbone_pretrained_with_psbn_becomes_bn_of_the_same_function(tmp_path):
    torch.manual_seed(1)
    network = build_network("mmdet_resnet18", dict(type="psBN", alpha=0.3), None, width=8 / 64)
    for layer in network.modules():
        if isinstance(layer, psBN2d):
            torch.nn.init.normal_(layer.beta)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "round_1.pth")
    network.eval()
    x = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        found, model = backbone_outputs(method, tmp_path / "round_1.pth")
        if method != SHIFT:
            torch.testing.assert_close(found, network.backbone(x), rtol=1e-4, atol=1e-4)
        if method in (BN, ANCHORED):
            assert not any(isinstance(m, psBN2d) for m in model.modules())


def test_revived_backbone_has_its_filters_back_and_the_fresh_neck_as_it_was(
    pretrained, root, tmp_path
):
    checkpoint = torch.load(pretrained, weights_only=False)
    state = checkpoint["state_dict"]
    name = next(key for key in state if key.endswith("layer2.0.bn1.weight"))
    for key in (name, name.replace("weight", "bias")):
        state[key][:3] = 0
    torch.save(checkpoint, tmp_path / "collapsed.pth")
    settings = Settings(base_channels=8, batch_size=2)
    images = data.load(root, data.TRAIN, (64, 48))
    plain = training.build_model(settings, 2, tmp_path / "collapsed.pth")
    for method in (BN, SHIFT):
        settings = replace(settings, method=method, revive=True)
        revived = training.build_model(settings, 2, tmp_path / "collapsed.pth", images)
        gamma = [m.backbone.layer2[0].bn1.weight.detach() for m in (plain, revived)]
        assert torch.equal(gamma[0][:3], torch.zeros(3))
        assert (gamma[1][:3].abs() > 1e-3).all()
        torch.testing.assert_close(gamma[1][3:], gamma[0][3:])
        parts = [torch.cat([p.flatten() for p in m.neck.parameters()]) for m in (plain, revived)]
        assert torch.equal(*parts)


def test_methods_of_a_seed_differ_in_the_backbone_alone(pretrained):
    heads = [
        {k: v for k, v in backbone_outputs(m, pretrained)[1].state_dict().items()
         if not k.startswith("backbone.")}
        for m in METHODS
    ]  # fmt: skip
    for head in heads[1:]:
        assert head.keys() == heads[0].keys()
        assert all(torch.equal(head[k], heads[0][k]) for k in head)


def test_backbone_that_does_not_fit_or_is_missing_is_one_line(pretrained, tmp_path):
    with pytest.raises(RunError, match=r"round_1.pth: \d+ tensors cannot be loaded"):
        training.build_model(Settings(base_channels=16), 2, pretrained)
    with pytest.raises(RunError, match="no such checkpoint, and this run starts from it"):
        training.build_model(Settings(base_channels=8), 2, tmp_path / "round_1.pth")


# ---------------------------------------------------------------- runs


def test_results_are_what_the_checkpoint_detects(rounds, root):
    experiment, out = rounds
    run = experiment.runs[1]
    folder = folder_of(experiment, run, out)
    result = result_of(experiment, run, out)
    assert [row["round"] for row in result["rounds"]] == [1, 2]
    model = training.build_model(run.settings, 2)
    model.load_state_dict(load(folder / "round_2.pth")["state_dict"])
    found = training.detect(model, data.load(root, data.TEST, (64, 48)))
    assert found == json.loads((folder / "round_2.bbox.json").read_text())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, images = torch.get_rng_state(), data.load(root, data.TRAIN, (64, 48))
    assert training.filters_of(model.train(), images) == {
        k: result["rounds"][1][k] for k in summary.FILTERS
    }
    # And training would go on as if nothing had been measured.
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    # In pixels of the original images, which are twice as large.
    assert max(box["bbox"][0] + box["bbox"][2] for box in found) > 64


def test_killed_run_goes_on_to_the_bit(rounds, root, tmp_path):
    experiment, out = rounds
    images = [data.load(root, parts, (64, 48)) for parts in (data.TRAIN, data.TEST)]
    annotations = engine.annotations_of(experiment, out)
    for run in (experiment.runs[0], None):
        if run is None:  # the anchored decay has a state of its own
            settings = replace(experiment.runs[0].settings, method=ANCHORED)
            whole = tmp_path / "whole"
            training.train_run(settings, whole, *images, annotations, "crc")
        else:
            settings, whole = run.settings, folder_of(experiment, run, out)
        cut = tmp_path / f"cut_{settings.method}"
        cut.mkdir()
        for name in ("round_1.pth", "settings.json"):
            shutil.copy(whole / name, cut / name)
        training.train_run(settings, cut, *images, annotations, "crc")
        one, other = (load(f / "round_2.pth")["state_dict"] for f in (whole, cut))
        assert all(torch.equal(one[k], other[k]) for k in one)
        results = [json.loads((f / "result.json").read_text()) for f in (whole, cut)]
        assert results[0]["rounds"] == results[1]["rounds"]
        assert results[0]["start"] == results[1]["start"]


def test_finished_runs_are_skipped_and_other_settings_refused(rounds, root):
    experiment, out = rounds
    said = []
    before = folder_of(experiment, experiment.runs[0], out) / "result.json"
    stamp = before.stat().st_mtime_ns
    engine.execute(experiment, out, root, "no-cifar", said.append)
    assert said == ["rounds: 12 of 12 runs finished"]
    assert before.stat().st_mtime_ns == stamp
    other = toy_rounds(rounds=2, weight_decay=0.5)
    with pytest.raises(RunError, match=r"other settings \(1 differ, as weight_decay"):
        engine.execute(other, out, root, "no-cifar", said.append)


def test_two_processes_share_an_experiment(root, tmp_path):
    experiment = toy_rounds(seeds=1)
    engine.prepare(experiment, tmp_path, root)
    first = folder_of(experiment, experiment.runs[0], tmp_path)
    with engine._lock(first) as mine:
        assert mine
        with engine._lock(first) as also_mine:
            assert not also_mine
    with engine._lock(first) as again:
        assert again


# ---------------------------------------------------------------- what is published


def test_summary_has_ap_of_the_result_files_and_verdicts(rounds):
    experiment, out = rounds
    outcomes = finished(experiment, out)
    compared = summary.compare_rounds(experiment, out, outcomes, resamples=100)
    content = summary.summarise(experiment, out, outcomes, compared, "command")
    assert content["runs_finished"] == content["runs_planned"] == 12
    truth = read_annotations(engine.annotations_of(experiment, out))
    for arm, entry in content["arms"].items():
        members = [run for run in experiment.runs if run.arm == arm]
        for number, row in enumerate(entry["rounds"], 1):
            ap = []
            for run in members:
                file = folder_of(experiment, run, out) / f"round_{number}.bbox.json"
                ap.append(100 * evaluate(truth, read_results(file, truth))[0]["AP"])
            assert row["AP"]["values"] == pytest.approx(ap)
            assert row["AP"]["low"] <= row["AP"]["high"]
    for judged in content["differences"]:
        assert [(d["arm"], d["baseline"]) for d in judged] == list(experiment.pairs)
        for d in judged:
            ap = [content["arms"][d[k]]["rounds"][0]["AP"]["mean"] for k in ("arm", "baseline")]
            if judged is content["differences"][0]:
                assert d["AP"] == pytest.approx(ap[0] - ap[1])
    text = summary.markdown(json.loads(json.dumps(content)))
    assert "12 of 12 runs finished, 2 seeds an arm" in text
    assert text.count("| psBN, alpha 0.1 | BN |") == 2


def test_resampled_aps_give_the_interval_of_an_arm_again(rounds, tmp_path):
    experiment, out = rounds
    outcomes = finished(experiment, out)
    compared = summary.compare_rounds(experiment, out, outcomes, resamples=50)
    summary.write_resampled(outcomes, compared, tmp_path / "resampled.npz")
    kept = np.load(tmp_path / "resampled.npz")
    assert sorted(kept["runs"]) == sorted(run.name for run in experiment.runs)
    assert sorted(kept) == ["round_1", "round_2", "runs"]
    for number, comparison in enumerate(compared, 1):
        kept_ap = kept[f"round_{number}"] / 1000
        assert kept_ap.shape == (50, len(experiment.runs))
        for arm, runs in comparison.runs.items():
            names = {r.name for r in experiment.runs if r.arm == arm}
            assert {str(kept["runs"][i]) for i in runs} == names
        assert np.abs(kept_ap - comparison.measured.draws[:, :, 0]).max() <= 5e-4


@pytest.mark.parametrize("name", experiments.names())
def test_figure_is_drawn_from_the_json_alone(name, tmp_path):
    experiment = experiments.build(name)
    value = dict(mean=2.0, std=0.5, values=[1.5, 2.5])
    row = dict.fromkeys(("AP50", "AP75", "train_loss", *summary.FILTERS), value)
    row["AP"] = {**value, "low": 1.0, "high": 2.8}
    differences = [
        dict(arm=a, baseline=b, AP=1.0, low=-1.0, high=2.0, verdict="better", further_seeds=0)
        for a, b in experiment.pairs
    ]
    rounds = experiment.runs[0].settings.rounds
    content = dict(
        experiment=name,
        title=experiment.title,
        differences=[differences] * rounds,
        arms={
            run.arm: dict(line=run.line, x=run.x, start=row, rounds=[row] * rounds)
            for run in experiment.runs
        },
    )
    figures.draw(json.loads(json.dumps(content)), tmp_path / f"{name}.png")
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_command_does_everything_and_goes_on_after_an_interruption(root, cifar, tmp_path):
    name = "transfer"
    arguments = [name, "--data-root", root, "--cifar-root", cifar, "--out", tmp_path, "--seeds", 1]
    settings = {**TOY, **{f"pretraining.{key}": value for key, value in PRETRAINING.items()}}
    arguments += ["--set", *(f"{key}={value}" for key, value in settings.items())]
    process = tool(*arguments)
    for line in process.stdout:
        if "done" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on from here" in process.communicate()[0]
    process = tool(*arguments)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    content = json.loads((tmp_path / name / f"{name}.json").read_text())
    assert 0 < content["runs_finished"] == content["runs_planned"]
    assert (tmp_path / name / f"{name}.png").exists()
    assert str(tmp_path / name / f"{name}.md") in said
    first = re.search(r"(\d+) of (\d+) runs finished", said)  # by the interrupted command
    assert 0 < int(first[1]) < int(first[2])
    drawn = (tmp_path / name / f"{name}.md").read_text()
    assert "One run per arm" in drawn
    for norm, rounds in content["backbones"].items():  # one of each, by the CIFAR-10 study's word
        folder = tmp_path / "backbones" / f"{norm.lower()}-seed0"
        told = json.loads((folder / "result.json").read_text())["rounds"]
        for row, one in zip(rounds, told, strict=True):
            assert row["accuracy"]["values"] == [one["accuracy"]]
            assert row["collapsed"]["values"] == [one["collapsed"]]
            assert f"| {norm} | {one['round']} | {one['accuracy']:.1f} |" in drawn
    assert list(content["backbones"]) == ["BN", "psBN"]
    of_bn, of_psbn = (rows[-1]["accuracy"]["mean"] for rows in content["backbones"].values())
    assert f"{of_psbn:.1f} | {of_psbn - of_bn:+.2f} (one seed) |" in drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transfer", "--data-root", "nowhere"], "nowhere/annotations/train.json: no such file"),
        (["rounds", "--set", "depth=3"], "no setting 'depth'"),
        (["rounds", "--draw", "--out", "nowhere"], "no run is finished"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


RESULTS = ROOT / "studies" / "detection" / "results"


@pytest.mark.parametrize("name", experiments.names())
def test_published_results_are_of_the_study_as_it_stands(name: str):
    path = RESULTS / f"{name}.json"
    if not path.exists():  # not published: nothing of it may stand there
        assert not list(RESULTS.glob(f"{name}.*"))
        return
    published = json.loads(path.read_text())
    experiment = experiments.build(name)
    planned = {(run.arm, run.settings.seed): run for run in experiment.runs}
    done = {(name, seed) for name, arm in published["arms"].items() for seed in arm["seeds"]}
    assert done <= set(planned)
    assert published["runs_finished"] == len(done)
    assert published["runs_planned"] == len(planned)
    for key in done:
        run, arm = planned[key], published["arms"][key[0]]
        for name, value in arm["settings"].items():
            wanted = getattr(run.settings, name)
            wanted = wanted.partition("-seed")[0] if name == "backbone" and wanted else wanted
            assert value == wanted, name
    assert path.with_suffix(".md").read_text() == summary.markdown(published)
