"""``--resume`` goes on from the newest whole checkpoint of the run that trained there last."""

import json
import shutil

import pytest
import torch

from psbn_mmdet.checkpoint import load
from tests.helpers.forked import train
from tests.helpers.noisy_training import equal, last, make_config

TEMPLATES = ["epoch_{}.pth", "model-{}.ckpt", "it/{}.pth"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The end of a run of its own, by seed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    ends = {}

    def end(seed):
        if seed not in ends:
            config = make_config(folder / f"{seed}.py", randomness__seed=seed)
            train(config, folder / str(seed))
            ends[seed] = last(folder / str(seed))
        return ends[seed]

    return end


# How a run ends in a work dir: whole, killed after an iteration (4 are an epoch), preempted.
ENDS = {
    "whole": ([], 12),
    "killed before a checkpoint": ([{"type": "Kill", "iteration": 2}], 0),
    "killed in epoch 2": ([{"type": "Kill", "iteration": 6}], 4),
    "preempted in epoch 3": ([{"type": "Terminate", "iteration": 10}], 10),
}


# Each end once as the first and, where there is something to resume, as the second.
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("whole", "killed in epoch 2"),
        ("killed in epoch 2", "killed before a checkpoint"),
        ("killed before a checkpoint", "preempted in epoch 3"),
        ("preempted in epoch 3", "killed in epoch 2"),
    ],
)
def test_of_two_runs_in_a_work_dir_the_second_is_resumed(first, second, uninterrupted, tmp_path):
    """However both ended, and whatever the first has left."""
    for seed, how in [(1, first), (2, second)]:
        hooks, reached = ENDS[how]
        train(make_config(tmp_path / "a.py", hooks=hooks, randomness__seed=seed), tmp_path / "w")
    (ended,) = train(make_config(tmp_path / "b.py", randomness__seed=2), tmp_path / "w", "--resume")
    assert ended.status == 0, ended.text[-800:]
    assert ("starting from scratch" in ended.text) == (reached == 0)
    assert equal(last(tmp_path / "w"), uninterrupted(2))


@pytest.mark.parametrize("template", TEMPLATES)
def test_checkpoints_of_any_name_are_found(template, uninterrupted, tmp_path):
    options = {"default_hooks__checkpoint__filename_tmpl": template, "randomness__seed": 2}
    kill = [{"type": "Kill", "iteration": 6}]
    (tmp_path / "w" / template).parent.mkdir(parents=True)
    train(make_config(tmp_path / "a.py", hooks=kill, **options), tmp_path / "w")
    (ended,) = train(make_config(tmp_path / "b.py", **options), tmp_path / "w", "--resume")
    assert f"resuming from {tmp_path}/w/{template.format(1)}\n" in ended.text
    assert equal(load(tmp_path / "w" / template.format(3))["state_dict"],
                 uninterrupted(2)["state_dict"])  # fmt: skip


def test_a_start_that_fails_leaves_the_run_before(uninterrupted, tmp_path):
    kill = [{"type": "Kill", "iteration": 6}]
    train(make_config(tmp_path / "a.py", hooks=kill, randomness__seed=2), tmp_path / "w")
    wrong = make_config(tmp_path / "b.py", model__type="DropoutNett")
    assert train(wrong, tmp_path / "w")[0].status == 2
    config = make_config(tmp_path / "c.py", randomness__seed=2)
    train(config, tmp_path / "w", "--resume")
    assert equal(last(tmp_path / "w"), uninterrupted(2))


def test_from_a_named_checkpoint_another_run_begins(uninterrupted, tmp_path):
    """One that goes back; --resume is then of that, from the named file where it has none."""
    train(make_config(tmp_path / "a.py", randomness__seed=2), tmp_path / "w")
    shutil.copy(tmp_path / "w" / "epoch_1.pth", tmp_path / "named.pth")
    for iteration, begins in [(5, "named.pth"), (10, "named.pth"), (12, "w/epoch_2.pth")]:
        kill = [{"type": "Kill", "iteration": iteration}]
        how = [tmp_path / "named.pth"] if iteration == 5 else []
        config = make_config(tmp_path / "b.py", hooks=kill, randomness__seed=2)
        (ended,) = train(config, tmp_path / "w", "--resume", *how)
        assert ended.status == -9
        assert how or f"resuming from {tmp_path}/{begins}" in ended.text
    (ended,) = train(make_config(tmp_path / "c.py", randomness__seed=2), tmp_path / "w", "--resume")
    assert ended.status == 0
    assert equal(last(tmp_path / "w"), uninterrupted(2))


def forget(work_dir):
    """Make a work dir one of mmdet's own script, whose checkpoints do not say whose they are."""
    (work_dir / "run.json").unlink()
    for path in work_dir.glob("*.pth"):
        content = load(path)
        content["meta"].pop("run", None)
        torch.save(content, path)


def test_in_a_work_dir_of_mmdets_own_script_last_checkpoint_decides(tmp_path):
    config = make_config(tmp_path / "a.py")
    train(config, tmp_path / "w")
    forget(tmp_path / "w")
    (tmp_path / "w" / "last_checkpoint").write_text("/moved/since/w/epoch_1.pth")  # another run's
    options = ["--resume", "--cfg-options", "train_cfg.max_epochs=1"]
    assert (
        f"resuming from {tmp_path}/w/epoch_1.pth\n"
        in train(config, tmp_path / "w", *options)[0].text
    )
    forget(tmp_path / "w")
    for useless in ("", "/w/gone.pth"):  # a kill while it was written
        (tmp_path / "w" / "last_checkpoint").write_text(useless)
        (ended,) = train(config, tmp_path / "w", "--resume")
        assert f"resuming from {tmp_path}/w/epoch_3.pth\n" in ended.text
        forget(tmp_path / "w")


def test_what_cannot_be_told_is_asked_for(tmp_path):
    config = make_config(tmp_path / "a.py", epochs=1)
    train(config, tmp_path / "w")
    train(config, tmp_path / "b", "--cfg-options", "default_hooks.checkpoint.filename_tmpl=b{}.pth")
    shutil.copy(tmp_path / "b" / "b1.pth", tmp_path / "w")
    (tmp_path / "w" / "run.json").rename(tmp_path / "kept")
    (tmp_path / "w" / "last_checkpoint").unlink()
    (ended,) = train(config, tmp_path / "w", "--resume")
    assert ended.status == 2 and ended.text.count("\n") == 1
    assert "holds checkpoints of several runs" in ended.text and "name the one" in ended.text
    for nonsense in ("", "[]", json.dumps({"id": 1}), "\0"):
        (tmp_path / "w" / "run.json").write_text(nonsense)
        (ended,) = train(config, tmp_path / "w", "--resume")
        assert ended.status == 2 and "run.json: does not name a run; remove it" in ended.text
    away = "default_hooks.checkpoint.out_dir=s3://bucket/x"
    (ended,) = train(config, tmp_path / "w", "--resume", "--cfg-options", away)
    assert ended.status == 2 and "is not on the local disk" in ended.text
