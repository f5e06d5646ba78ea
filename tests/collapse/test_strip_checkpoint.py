"""tools/strip_checkpoint.py: what it writes works in every tool, and what it refuses."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from psbn_mmdet import launch
from psbn_mmdet.collapse import StripError
from psbn_mmdet.collapse.narrow import stripped_model
from tests.helpers.disk import files_no_larger_than
from tests.helpers.paths import ROOT
from tests.helpers.strippable import kill, kill_at_random, with_statistics
from tests.helpers.tools import Main

# RetinaNet, narrow; psBN in the neck; a backbone whose pretrained weights no longer fit.
CONFIG = """
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
model = dict(
    backbone=dict(depth=18, base_channels=8, init_cfg=dict(type="Pretrained", checkpoint="{}")),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16, norm_cfg=dict(type="psbn_mmdet.psBN")),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, norm_cfg=dict(type="BN")),
)
"""
SMALL = [
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "train_dataloader.dataset.pipeline.2.scale=(128,96)",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
    "test_dataloader.dataset.pipeline.1.scale=(128,96)",
    "test_dataloader.dataset.indices=32",
    "train_dataloader.dataset.indices=4",
    "train_cfg.max_epochs=1",
    "default_hooks.logger.interval=1",
]


@pytest.fixture
def tool(capsys):
    return Main("strip_checkpoint", capsys)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with config.py and checkpoint.pth, whose detector has many collapsed filters."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "config.py").write_text(CONFIG.format(folder / "backbone.pth"))
    model = build(folder / "config.py")
    torch.save(model.backbone.state_dict(), folder / "backbone.pth")
    with_statistics(model)
    kill_at_random(model, 0.6)
    # Scores that differ from box to box, as trained ones do.
    nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.3)
    state_dict = model.state_dict()
    meta = {"dataset_meta": {"classes": ("a",)}, "cfg": "the old one"}
    torch.save({"meta": meta, "state_dict": state_dict}, folder / "checkpoint.pth")
    return folder


@pytest.fixture(scope="module")
def stripped(original):
    out = original / "new" / "stripped"
    arguments = [original / "config.py", original / "checkpoint.pth", out]
    text = run_here("strip_checkpoint", *arguments, "--size", 64, 64, "--rounds", 1)
    assert "filters removed" in text
    assert "written to" in text
    return out


def run_here(tool, *arguments):
    """What a tool prints, run in this process."""
    text = io.StringIO()
    capture = SimpleNamespace(readouterr=lambda: (text.getvalue(), ""))
    with redirect_stdout(text):
        done = Main(tool, capture)(*arguments)
    assert done.returncode in (0, None), done
    return text.getvalue()


def build(config):
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope("mmdet")
    torch.manual_seed(0)
    return MODELS.build(launch.load_config(str(config)).model)


def loaded(folder, checkpoint):
    model = build(folder / "config.py").eval()
    model.load_state_dict(torch.load(folder / checkpoint, weights_only=True)["state_dict"])
    return model


@pytest.mark.slow
def test_weights_config_and_record_give_the_same_function(original, stripped):
    assert {p.name for p in stripped.iterdir()} == {"config.py", "model.pth", "record.json"}
    assert [p.name for p in stripped.parent.iterdir()] == ["stripped"]
    assert len((stripped / "config.py").read_text().splitlines()) < 12
    old, new = loaded(original, "checkpoint.pth"), loaded(stripped, "model.pth")
    x = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for a, b in zip(old(x), new(x), strict=True):
            for p, q in zip(a, b, strict=True):
                assert (p - q).abs().max() <= 1e-5 * p.abs().max()
    record = json.loads((stripped / "record.json").read_text())
    assert record["parameters"]["after"] == sum(p.numel() for p in new.parameters())
    assert record["parameters"]["after"] < record["parameters"]["before"]
    assert record["psbn_layers_to_bn"] > 0
    assert set(record["seconds"]) == {"rounds", "before", "after", "speedup"}
    checkpoint = torch.load(stripped / "model.pth", weights_only=True)
    assert checkpoint["meta"] == {"dataset_meta": {"classes": ("a",)}}


@pytest.mark.slow
def test_the_folder_can_be_moved_and_pretrained_weights_are_not_loaded(stripped, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in stripped.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    model = build(moved / "config.py")
    model.init_weights()  # of the original config the backbone's file would not fit
    assert launch.load_config(str(moved / "config.py")).load_from == f"{moved}/model.pth"


@pytest.mark.slow
def test_what_is_stripped_can_collapse_further_and_be_stripped_again(stripped, tmp_path):
    model = loaded(stripped, "model.pth")
    kill_at_random(model, 0.4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "further.pth")
    out = tmp_path / "again"
    small = ["--size", 64, 64, "--rounds", 0]
    run_here("strip_checkpoint", stripped / "config.py", tmp_path / "further.pth", out, *small)
    new = loaded(out, "model.pth")
    assert sum(p.numel() for p in new.parameters()) < sum(p.numel() for p in model.parameters())
    x = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for a, b in zip(model(x), new(x), strict=True):
            for p, q in zip(a, b, strict=True):
                assert (p - q).abs().max() <= 1e-5 * p.abs().max()
    third = tmp_path / "third"
    kill_at_random(new, 0.3)
    torch.save({"state_dict": new.state_dict()}, tmp_path / "further.pth")
    run_here("strip_checkpoint", out / "config.py", tmp_path / "further.pth", third, *small)
    # No chain: the config names the last weights alone, whose shapes are enough.
    cfg = launch.load_config(str(third / "config.py"))
    assert cfg.model == {
        **launch.load_config(str(stripped / "config.py")).model,
        "checkpoint": f"{third}/model.pth",
    }
    assert loaded(third, "model.pth") is not None


@pytest.mark.slow
def test_onnx_of_a_stripped_detector_computes_the_same(stripped, tmp_path):
    import onnxruntime

    model = loaded(stripped, "model.pth")
    x = torch.randn(1, 3, 64, 64)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = [tensor for level in model(x) for tensor in level]
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(torch.from_numpy(b), a, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_boxes_and_ap_on_real_images_are_the_original_ones(
    original, stripped, shared_data, tmp_path, capsys
):
    """Through tools/test.py."""
    metrics = {}
    for folder, checkpoint in [(original, "checkpoint.pth"), (stripped, "model.pth")]:
        work_dir = tmp_path / checkpoint
        options = ["--data-root", shared_data / "coco128", "--work-dir", work_dir]
        test = Main("test", capsys)
        done = test(folder / "config.py", folder / checkpoint, *options, "--cfg-options", *SMALL)
        assert done.returncode == 0, done.stderr
        metrics[checkpoint] = json.loads((work_dir / "metrics.json").read_text())
    assert metrics["model.pth"] == pytest.approx(metrics["checkpoint.pth"], abs=1.1e-3)
    boxes = [
        json.loads((tmp_path / name / "results.bbox.json").read_text())
        for name in ("checkpoint.pth", "model.pth")
    ]
    assert len(boxes[0]) == len(boxes[1]) > 100
    scores = [sorted(box["score"] for box in each) for each in boxes]
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_training_goes_on_from_the_stripped_weights(stripped, shared_data, tmp_path):
    """Two iterations by mmdet's own tool, which knows nothing of this package."""
    import mmdet

    options = [*SMALL, "val_cfg=None", "val_dataloader=None", "val_evaluator=None"]
    options += [f"train_dataloader.dataset.data_root={shared_data / 'coco128'}/"]
    options += ["optim_wrapper.optimizer.lr=1e-5"]
    train = Path(mmdet.__path__[0], ".mim", "tools", "train.py")
    arguments = [stripped / "config.py", "--work-dir", tmp_path, "--cfg-options", *options]
    done = subprocess.run(
        [sys.executable, *map(str, [train, *arguments])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Load checkpoint from {stripped}/model.pth" in done.stdout
    assert "size mismatch" not in done.stdout + done.stderr
    old = torch.load(stripped / "model.pth", weights_only=True)["state_dict"]
    new = torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"]
    assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in old.items()}
    key = "bbox_head.retina_cls.weight"
    assert 0 < (new[key] - old[key]).abs().max() < 0.1
    # tools/train.py takes it, too.
    cfg = launch.load_config(str(stripped / "config.py"), data_root=str(shared_data / "coco128"))
    launch.configure_training(cfg)
    assert cfg.load_from == f"{stripped}/model.pth"


@pytest.mark.slow
def test_images_of_a_folder_are_compared_through_the_test_pipeline(
    original, shared_data, tmp_path, tool
):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((shared_data / "coco128").rglob("*.jpg"))[:2]:
        (images / path.name).symlink_to(path)
    small = tmp_path / "small.py"
    small.write_text(
        f"_base_ = {str(original / 'config.py')!r}\n"
        "test_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), "
        "dict(type='Resize', scale=(128, 96), keep_ratio=True), dict(type='PackDetInputs')]))\n"
    )
    done = tool(small, original / "checkpoint.pth", tmp_path / "out", "--data", images)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["proof"]["images"].startswith("2 given of 3x")
    assert record["proof"]["largest_relative_difference"] < 1e-5


@pytest.mark.slow
def test_what_cannot_be_done_is_one_line_and_nothing_is_written_or_lost(original, tmp_path, tool):
    config, checkpoint = original / "config.py", original / "checkpoint.pth"
    out = tmp_path / "there"
    out.mkdir()
    (out / "mine").write_text("keep me")
    assert "exists already" in tool.refuses(config, checkpoint, out)
    assert (out / "mine").read_text() == "keep me"
    new = tmp_path / "new"
    small = ["--size", 64, 64]
    assert "no such config" in tool.refuses(tmp_path / "no.py", checkpoint, new)
    assert "no such file" in tool.refuses(config, tmp_path / "no.pth", new)
    assert "positive whole numbers" in tool.refuses(config, checkpoint, new, "--size", 0, 64)
    assert "wrong config?" in tool.refuses(
        "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py", checkpoint, new, *small
    )
    assert "tolerance" in tool.refuses(config, checkpoint, new, *small, "--tolerance", 1e-12)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has 0 images" in tool.refuses(config, checkpoint, new, "--data", empty)
    assert "wanted 0 or more" in tool.refuses(config, checkpoint, new, "--rounds", -1)
    assert "at least two" in tool.refuses(config, checkpoint, new, "--images", -1)
    assert "cannot be written (" in tool.refuses(
        config, checkpoint, out / "mine" / "new", *small, "--rounds", 0
    )
    with files_no_larger_than(20_000):  # enough for the config, not for the weights
        message = tool.refuses(config, checkpoint, new, *small, "--rounds", 0)
    assert "cannot be written (" in message
    healthy = tmp_path / "healthy.pth"
    torch.save({"state_dict": with_statistics(build(config)).state_dict()}, healthy)
    assert not new.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "healthy.pth", "there"]


@pytest.mark.slow
def test_where_nothing_can_go_the_record_says_why(original, tmp_path, tool):
    model = with_statistics(build(original / "config.py"))
    kill(model.backbone.layer1[0].bn2, [3], -0.5)  # in a sum
    torch.save({"state_dict": model.state_dict()}, tmp_path / "healthy.pth")
    out = tmp_path / "out"
    done = tool(original / "config.py", tmp_path / "healthy.pth", out, "--size", 64, 64)
    assert done.returncode in (0, None), done.stderr
    assert "nothing to remove" in done.stdout
    assert [p.name for p in out.iterdir()] == ["record.json"]
    [kept] = json.loads((out / "record.json").read_text())["kept"]
    assert (kept["layer"], kept["filters"]) == ("backbone.layer1.0.bn2", [3])
    assert "varies in the same channel" in kept["why"]


def test_weights_of_another_model_are_refused(tmp_path):
    from mmengine.registry import MODELS

    @MODELS.register_module(name="TestStripNet", force=True)
    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))

    file = tmp_path / "model.pth"
    narrow = nn.Sequential(nn.Conv2d(3, 7, 1), nn.BatchNorm2d(7))  # with a new bias
    torch.save({"state_dict": narrow.state_dict()}, file)
    model = stripped_model("TestStripNet", str(file))
    assert (model[0].out_channels, model[1].num_features) == (7, 7)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model.eval()(x), narrow.eval()(x), rtol=0, atol=0)
    for other in (nn.Sequential(nn.Conv2d(3, 7, 1)), nn.Sequential(*narrow, nn.Conv2d(7, 2, 1))):
        torch.save({"state_dict": other.state_dict()}, file)
        with pytest.raises(StripError, match=r"model.pth: .*another model"):
            stripped_model("TestStripNet", str(file))
