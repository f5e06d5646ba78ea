"""tools/revive_checkpoint.py, and ReviveFilters in a training of mmdet."""

import json
import shlex

import pytest
import torch
from torch import nn

from psbn_mmdet import launch
from psbn_mmdet.checkpoint import load
from psbn_mmdet.collapse import norm_modules
from psbn_mmdet.collapse.calls import compare
from tests.helpers.strippable import kill_at_random, with_statistics
from tests.helpers.tools import Main

# RetinaNet, narrow; psBN in the neck.
CONFIG = """
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
model = dict(
    backbone=dict(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1, norm_eval=False),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16, norm_cfg=dict(type="psbn_mmdet.psBN")),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, norm_cfg=dict(type="BN")),
)
custom_hooks = [dict(type="psbn_mmdet.ReviveFilters", images=4)]
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(320, 240), keep_ratio=True),  # a minute less than at 1333 x 800
    dict(type="PackDetInputs"),
]))
"""
SMALL = [
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "train_dataloader.dataset.pipeline.2.scale=(128,96)",
    "train_dataloader.dataset.indices=4",
    "train_cfg.max_epochs=1",
    "default_hooks.logger.interval=1",
    "val_cfg=None",
    "val_dataloader=None",
    "val_evaluator=None",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with config.py and checkpoint.pth, whose detector has many collapsed filters."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "config.py").write_text(CONFIG)
    model = build(folder)
    with_statistics(model)
    kill_at_random(model, 0.6)
    nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.3)
    checkpoint = {"meta": {"dataset_meta": {"classes": ("a",)}}, "state_dict": model.state_dict()}
    torch.save(checkpoint, folder / "checkpoint.pth")
    return folder


def build(folder, checkpoint=None):
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(launch.load_config(str(folder / "config.py")).model)
    if checkpoint:
        model.load_state_dict(load(checkpoint)["state_dict"])
    return model.eval()


def collapsed(model):
    return sum(int((norm.weight.abs() < 1e-3).sum()) for norm in norm_modules(model).values())


def test_the_new_checkpoint_is_of_the_same_config_and_function(
    original, shared_data, tmp_path, capsys
):
    tool, out = Main("revive_checkpoint", capsys), tmp_path / "revived.pth"
    files = [original / "config.py", original / "checkpoint.pth", out]
    done = tool(*files, "--data", shared_data / "coco128", "--images", 4)
    assert done.returncode == 0, done.stderr
    assert "collapsed filters revived" in done.stdout
    old, new = build(original, files[1]), build(original, out)
    x = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        a, b = ([t for level in model(x) for t in level] for model in (old, new))
    assert compare(a, b).relative < 1e-3
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["filters"]["collapsed"] == collapsed(old)
    zero = sum(len(c) for c in record["revived"]["gamma 0"].values())
    assert collapsed(new) <= record["filters"]["left"] + zero < collapsed(old)
    assert torch.load(out, weights_only=True)["meta"] == {"dataset_meta": {"classes": ("a",)}}

    lifted = tmp_path / "lifted.pth"
    done = tool(*files[:2], lifted, "--data", shared_data / "coco128", "--lift-gamma")
    assert f"gamma of {collapsed(old)} of" in done.stdout and "outputs: changed by" in done.stdout
    assert collapsed(build(original, lifted)) == 0

    assert "exists already" in tool.refuses(*files)
    with torch.no_grad():
        for norm in norm_modules(old).values():
            norm.weight.fill_(1)
    torch.save({"state_dict": old.state_dict()}, tmp_path / "healthy.pth")
    healthy = [files[0], tmp_path / "healthy.pth", tmp_path / "new.pth"]
    assert "nothing is revived, so nothing is written" in tool.refuses(*healthy)
    assert "at least two" in tool.refuses(*healthy, "--images", 1)
    assert not (tmp_path / "new.pth").exists()


def test_each_step_names_the_command_of_the_next(
    original, shared_data, tmp_path, capsys, monkeypatch
):
    """From a checkpoint alone to a revived one, by what is printed."""
    monkeypatch.chdir(tmp_path)
    ours = {"CONFIG": original / "config.py", "IMAGES": shared_data / "coco128"}

    def follow(said, step):
        (line,) = [x for x in said.splitlines() if x.startswith(step)]
        verb, *words = shlex.split(line[len(step) :])[1:]
        done = Main(f"{verb}_checkpoint", capsys)(*(ours.get(word, word) for word in words))
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = Main("inspect_checkpoint", capsys)(original / "checkpoint.pth").stdout
    said = follow(said, "Which are stuck:")
    assert "filters stuck (" in said
    said = follow(said, "Bring them back:")
    assert "collapsed filters revived" in said
    old, new = (build(original, c) for c in (original / "checkpoint.pth", "revived.pth"))
    assert collapsed(new) < collapsed(old)


def test_a_training_revives_at_its_start(original, shared_data, tmp_path, capsys):
    train = Main("train", capsys)
    load_from = f"load_from={original / 'checkpoint.pth'}"
    options = ["--data-root", shared_data / "coco128", "--work-dir", tmp_path]
    done = train(original / "config.py", *options, "--cfg-options", *SMALL, load_from)
    assert done.returncode == 0, done.stderr
    [log] = tmp_path.glob("*/*.log")
    assert "collapsed filters revived" in log.read_text()
    old = build(original, original / "checkpoint.pth")
    # Those of gamma 0 have moved by two small steps.
    assert collapsed(build(original, tmp_path / "epoch_1.pth")) < 0.7 * collapsed(old)
