"""--check builds what a config names, says what it is, and refuses what would train in silence."""

import re

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.models import DetDataPreprocessor, ResNet, RetinaNet

from psbn_mmdet import launch
from psbn_mmdet.checkpoint import CheckpointError
from psbn_mmdet.errors import PsbnError
from psbn_mmdet.launch import UsageError, load_config
from psbn_mmdet.launch.preview import preview
from tests.helpers.tools import Main

NORM = "model.backbone.norm_cfg."


def told(shapes, **options):
    keys = {key.replace("__", "."): value for key, value in options.items()}
    return "\n".join(preview(load_config("configs/demo/demo_bn.py", keys, shapes), training=True))


def test_what_is_said_of_a_config_that_is_well(shapes):
    boxes = [line["category_id"] for line in annotations(shapes)]
    text = told(shapes, model__backbone__norm_cfg__type="psBN",
                model__backbone__norm_cfg__alpha=0.2, model__backbone__frozen_stages=1)  # fmt: skip
    assert "model: RetinaNet, " in text
    # the stem and four layers of the first stage
    assert re.search(r"psBN: 20 psBN2d; alpha 0.2; 5 frozen \(e.g. backbone.bn1", text)
    assert "weight decay: reaches beta of 15 of 15 psBN layers" in text
    assert f"{len(boxes)} boxes of 3 classes" in text
    for number, name in enumerate(("circle", "square", "triangle"), 1):
        assert f"{name} {boxes.count(number)}" in text
    assert "weights: random" in text


def annotations(shapes):
    import json

    return json.loads((shapes / "annotations/instances_train2017.json").read_text())["annotations"]


WRONG = {
    "a layer's name": ({NORM + "type": "psbm"}, "unknown psbm"),
    "alpha": ({NORM + "type": "psBN", NORM + "alpha": -1}, "alpha must be finite and not negative"),
    "an argument": ({"model.neck.outchannels": 3}, "outchannels"),
    "an optimizer": ({"optim_wrapper.optimizer.type": "SGDD"}, "unknown SGDD"),
    "a wrapper": ({"optim_wrapper.type": "OptimWraper"}, "unknown OptimWraper"),
    "a data set": ({"train_dataloader.dataset.type": "CocDataset"}, "unknown CocDataset"),
    "a class": (
        {"train_dataloader.dataset.metainfo.classes": ["circle", "sqare", "triangle"]},
        "no sqare; what it has: circle, square, triangle",
    ),
    "too many classes": (
        {"train_dataloader.dataset.metainfo.classes": ["circle", "square"]},
        "has num_classes=3, but the data set has 2 classes",
    ),
    "num_classes": (
        {"model.bbox_head.num_classes": 80},
        "bbox_head (RetinaHead) has num_classes=80, but the data set has 3 classes",
    ),
    "a path of weights": ({"load_from": "none.pth"}, "none.pth"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_a_line_before_anything_is_started(what, shapes, tmp_path, capsys):
    options, message = WRONG[what]
    cfg = load_config("configs/demo/demo_bn.py", options, shapes, str(tmp_path))

    def check():
        launch.configure_training(cfg)
        launch.check(cfg, 2, training=True)

    with pytest.raises(PsbnError, match=re.escape(message)) as refused:
        check()
    assert "\n" not in str(refused.value)
    if "class" in what:  # which one process, started without a check, finds as well
        cfg = load_config("configs/demo/demo_bn.py", options, shapes, str(tmp_path))
        cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
        with pytest.raises(UsageError, match=re.escape(message)):
            launch.train(cfg)
    capsys.readouterr()


@pytest.fixture
def new_style(shapes, tmp_path):
    """A config with classes for types, as mmdet's new style has them, without a scope."""
    cfg = load_config("configs/demo/demo_bn.py", {}, shapes, str(tmp_path))
    cfg.default_scope = None
    cfg.model.type, cfg.model.backbone.type = RetinaNet, ResNet
    cfg.model.data_preprocessor.type = DetDataPreprocessor
    for phase in ("train", "val", "test"):
        cfg[f"{phase}_dataloader"].dataset.type = CocoDataset
    return cfg


def test_new_style_configs_need_no_scope(new_style, tmp_path):
    launch.configure_training(new_style)
    assert "model: RetinaNet" in launch.check(new_style, 1, training=True)[1]
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    launch.configure_test(new_style, str(tmp_path / "a.pth"))
    with pytest.raises(CheckpointError, match="no tensor of the checkpoint"):
        launch.check(new_style, 1, training=False)


def test_a_test_wants_no_weights_that_it_does_not_use(new_style, shapes, tmp_path, monkeypatch):
    """It takes all from the checkpoint, offline too; a training starts from them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    cfg = load_config("configs/demo/demo_bn.py", {}, shapes, str(tmp_path))
    from tests.helpers.real_runs import build

    torch.save(build(cfg).state_dict(), tmp_path / "a.pth")
    cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "none.pth")}
    launch.configure_test(cfg, str(tmp_path / "a.pth"))
    assert any("a.pth, whole" in line for line in launch.check(cfg, 1, training=False))
    cfg.load_from = None
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        launch.check(cfg, 1, training=True)


def test_the_tool_says_what_it_checked(shapes, tmp_path, capsys):
    main = Main("train", capsys)
    done = main(
        "configs/demo/demo_bn.py", "--data-root", shapes, "--work-dir", tmp_path, "--check", 2
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("processes: 2\nmodel: RetinaNet")
    assert not list(tmp_path.iterdir())
