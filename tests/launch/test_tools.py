"""The command lines at their edges: what is valid works, what is not ends in a line."""

import argparse
import json
from pathlib import Path

import pytest
from mmengine.config import Config

from psbn_mmdet.checkpoint import load
from psbn_mmdet.launch import add_arguments
from tests.helpers.forked import Process, train
from tests.helpers.noisy_training import equal, last, make_config


def changed(path, **keys):
    """Set keys of a written config; ``...`` removes one."""
    cfg = Config.fromfile(path)
    for key, value in keys.items():
        if value is ...:
            cfg._cfg_dict.pop(key, None)
        else:
            cfg[key] = value
    cfg.dump(path)
    return path


def one_line(ended, tool="train"):
    assert ended.status == 2, ended.text
    (line,) = ended.text.strip().splitlines()
    assert line.startswith(f"{tool}.py: ")
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(make_config(folder / "a.py", epochs=1), folder / "w")
    return folder / "w" / "epoch_1.pth"


# -- valid --------------------------------------------------------------------------------


def test_load_from_without_a_resume_key_starts_from_those_weights(trained, tmp_path):
    config = make_config(tmp_path / "a.py", epochs=1, optim_wrapper__optimizer__lr=0.0)
    (ended,) = train(changed(config, load_from=str(trained)), tmp_path / "w")
    assert ended.status == 0, ended.text
    weights = load(tmp_path / "w" / "epoch_1.pth")["state_dict"]
    assert equal(weights["conv.weight"], load(trained)["state_dict"]["conv.weight"])


def test_default_hooks_may_be_none(tmp_path):
    config = changed(make_config(tmp_path / "a.py", epochs=1), default_hooks=None)
    (ended,) = train(config, tmp_path / "w", "--resume")
    assert ended.status == 0, ended.text
    assert (tmp_path / "w" / "epoch_1.pth").exists()  # mmengine's own default


CHAINED = [
    {"type": "LinearLR"},
    {"type": "ConstantLR"},
    {"type": "ExponentialLR", "gamma": 0.9},
    {"type": "MultiStepLR", "milestones": [3, 6]},
    {"type": "StepLR", "step_size": 3},
    {"type": "PolyLR", "eta_min": 0.01},
    {"type": "CosineAnnealingLR", "T_max": 20},
    {"type": "CosineRestartLR", "periods": [4, 8], "restart_weights": [1, 0.5], "eta_min": 0.01},
    {"type": "CosineAnnealingMomentum", "T_max": 20},
]
SCHEDULERS = {
    "chained": [{**s, "by_epoch": False} for s in CHAINED],
    "one cycle": [{"type": "OneCycleLR", "by_epoch": False, "eta_max": 0.1, "total_steps": 12}],
    "plateau": [{"type": "ReduceOnPlateauLR", "monitor": "mean", "patience": 0, "factor": 0.5}],
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_resumes_exactly(kind, tmp_path):
    """The last one looks at validations, of which none may be missed or be counted twice."""
    schedulers, options = SCHEDULERS[kind], {"validate": kind == "plateau"}
    whole = changed(make_config(tmp_path / "a.py", **options), param_scheduler=schedulers)
    (ended,) = train(whole, tmp_path / "whole")
    assert ended.status == 0, ended.text[-800:]
    kill = [{"type": "Kill", "iteration": 9}]
    killed = make_config(tmp_path / "b.py", hooks=kill, **options)
    train(changed(killed, param_scheduler=schedulers), tmp_path / "w")
    assert (tmp_path / "w" / "epoch_2.pth").exists()
    assert not (tmp_path / "w" / "epoch_3.pth").exists()
    (ended,) = train(whole, tmp_path / "w", "--resume")
    assert ended.status == 0, ended.text[-800:]
    assert equal(last(tmp_path / "w"), last(tmp_path / "whole"))


def test_metainfo_of_any_shape_resumes(tmp_path):
    """mmengine puts it into the checkpoint as a ConfigDict."""
    metainfo = {"classes": ("a", "b"), "palette": [(1, 2, 3)], "nested": {"deep": {"x": [1]}}}
    config = {"train_dataloader__dataset__metainfo": metainfo}
    train(make_config(tmp_path / "a.py", epochs=1, **config), tmp_path / "w")
    (ended,) = train(make_config(tmp_path / "b.py", **config), tmp_path / "w", "--resume")
    assert ended.status == 0, ended.text[-800:]
    assert "resuming from" in ended.text


def test_what_has_no_value_is_null_in_the_metrics(trained, tmp_path):
    """NaN is no JSON."""
    config = make_config(tmp_path / "a.py", validate=True)
    cfg = Config.fromfile(config)
    changed(config, **{f"test_{k}": cfg[f"val_{k}"] for k in ("dataloader", "evaluator")})
    changed(config, test_cfg={"type": "TestLoop"})
    process = Process("test", [config, trained, "--work-dir", tmp_path], {}, tmp_path / "log")
    ended = process.end()
    assert ended.status == 0, ended.text[-800:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["no_value"] is None and metrics["inf"] is None
    assert 0 < abs(metrics["mean"]) < 10


def test_a_flexible_runner_trains_and_loads_nothing(tmp_path):
    """mmengine's strategies read checkpoints by themselves."""
    strategy = {"runner_type": "FlexibleRunner", "strategy": {"type": "SingleDeviceStrategy"}}
    strategy["env_cfg"] = {"dist_cfg": {"backend": "nccl"}}
    config = changed(make_config(tmp_path / "a.py", epochs=1, workers=1), **strategy)
    (ended,) = train(config, tmp_path / "w")
    assert ended.status == 0, ended.text[-800:]
    (ended,) = train(config, tmp_path / "w", "--resume")
    assert ended.status == 2 and "runner_type=FlexibleRunner: its strategies read" in ended.text


# -- not valid --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["train_dataloader", "train_cfg", "optim_wrapper"])
@pytest.mark.parametrize("value", [None, ...])
def test_what_training_needs_is_named(key, value, tmp_path):
    config = changed(make_config(tmp_path / "a.py"), **{key: value})
    assert f"a.py: has no {key}" in one_line(train(config, tmp_path / "w")[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["custom_hooks=[dict(type='A',b=1)]"], "holds a dict; write KEY.INNER=VALUE"),
        (["custom_hooks=[dict(type='A')]"], "holds a dict; write KEY.INNER=VALUE"),
        (["a={'type':'A','b':1}"], "holds a dict; write KEY.INNER=VALUE"),
        (["a=1", "b=[{'type':'A'}]"], "holds a dict; write KEY.INNER=VALUE"),
        (["a=1", "b=[1,2"], "wanted KEY=VALUE"),
        (["a"], "wanted KEY=VALUE"),
        (["a=[f(b=1,c)]"], "wanted KEY=VALUE"),
    ],
)
def test_options_that_cannot_be_read(options, message, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--cfg-options", *options])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_options_that_can():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--cfg-options", "a.b=0.1", "c=[x,(1,2)]", "d=/x/dict(1).pth"])
    assert args.cfg_options == {"a.b": 0.1, "c": ["x", (1, 2)], "d": "/x/dict(1).pth"}


@pytest.mark.parametrize("key", ["test_dataloader", "test_evaluator"])
@pytest.mark.parametrize("value", [None, ...])
def test_what_testing_needs_is_named(key, value, trained, tmp_path):
    needed = {"test_dataloader": {"dataset": {}}, "test_evaluator": {"type": "MeanScore"}}
    config = make_config(tmp_path / "a.py")
    changed(config, **needed)
    changed(config, **{key: value})
    process = Process("test", [config, trained, "--work-dir", tmp_path], {}, tmp_path / "log")
    assert f"a.py: has no {key}" in one_line(process.end(), "test")


@pytest.mark.parametrize("where", ["/proc/none/w", "a file/w"])
@pytest.mark.parametrize("check", [(), ("--check", 1)])
@pytest.mark.parametrize("tool", ["train", "test"])
def test_a_work_dir_that_cannot_be_written(tool, check, where, trained, shapes, tmp_path):
    (tmp_path / "a file").touch()
    work_dir = tmp_path / where  # a path from the root stays one
    arguments = ["configs/demo/demo_bn.py", *([trained] if tool == "test" else [])]
    arguments += ["--data-root", shapes, "--work-dir", work_dir, *check]
    ended = Process(tool, arguments, {}, tmp_path / "log").end()
    assert f"{work_dir}: cannot be written: " in one_line(ended, tool)


def test_checking_a_work_dir_leaves_nothing_behind(shapes, tmp_path):
    arguments = ["configs/demo/demo_bn.py", "--data-root", shapes, "--check", 1]
    arguments += ["--work-dir", tmp_path / "deep" / "w"]
    assert Process("train", arguments, {}, tmp_path / "log").end().status == 0
    assert [p.name for p in Path(tmp_path).iterdir()] == ["log"]


def test_a_missing_file_of_any_kind_of_data_set_is_named_in_a_line(tmp_path):
    """Of kinds whose files are not known before they are built, too."""
    config = make_config(tmp_path / "a.py", train_dataloader__dataset__type="ReadsAList")
    (ended,) = train(config, tmp_path / "w")
    assert ended.status == 2 and "Traceback" not in ended.text
    line = ended.text.strip().splitlines()[-1]
    assert line.startswith("train.py: no/such/list.txt: no such file, but a data set")
