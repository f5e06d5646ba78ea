"""What a config must have, and what a command line makes of it, before anything is started."""

import pytest
import torch

from psbn_mmdet import launch
from psbn_mmdet.checkpoint import CheckpointError
from psbn_mmdet.launch import UsageError, load_config
from psbn_mmdet.launch.config import check_data, check_processes, check_weights
from tests.helpers.real_runs import build


def test_data_root_reaches_every_path():
    path = "configs/retinanet/retinanet_psbn_500.py"
    for cfg in (
        load_config(path, data_root="/data/c"),
        load_config(path, cfg_options={"data_root": "/data/c"}),
    ):
        assert "data/coco/" not in cfg.pretty_text
        assert cfg.train_dataloader.dataset.data_root == "/data/c/"
        assert cfg.test_evaluator.ann_file == "/data/c/annotations/instances_val2017.json"


def configured(shapes, tmp_path, **options):
    cfg = load_config("configs/demo/demo_bn.py", data_root=shapes, work_dir=str(tmp_path))
    launch.configure_training(cfg, **options)
    return cfg


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("configs/none.py",), r"configs/none.py: no such config"),
        (("nopackage::a/b.py",), r"package nopackage is not installed"),
        (("README.md",), r"README.md: does not load"),
        (("configs/demo/demo_bn.py", {"a": 1}, None), None),
    ],
)
def test_bad_config(arguments, message):
    if message is None:
        assert load_config(*arguments).a == 1
        return
    with pytest.raises(UsageError, match=message):
        load_config(*arguments)


def test_missing_data_names_the_file_and_the_way_out(shapes, tmp_path):
    cfg = load_config("configs/demo/demo_bn.py", data_root=str(tmp_path / "none"))
    message = r"none/annotations/instances_train2017.json: no such annotation file.*--data-root"
    with pytest.raises(UsageError, match=message):
        check_data(cfg, "train")
    cfg = load_config("configs/demo/demo_bn.py", data_root=str(shapes))
    check_data(cfg, "train", "val", "test")
    cfg.val_evaluator.ann_file = "gone.json"
    with pytest.raises(UsageError, match=r"gone.json: no such annotation file"):
        check_data(cfg, "val")
    cfg.train_dataloader.dataset = {
        "type": "RepeatDataset",
        "dataset": cfg.train_dataloader.dataset,
    }
    cfg.train_dataloader.dataset.dataset.data_prefix.img = "no/"
    with pytest.raises(UsageError, match=r"no/: no such folder of images"):
        check_data(cfg, "train")


def test_wrong_number_of_processes(monkeypatch):
    with pytest.raises(UsageError, match="0 processes asked for"):
        check_processes(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="3 processes asked for, 1 to 2"):
        check_processes(3)
    check_processes(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_amp_needs_a_gpu(shapes, tmp_path):
    with pytest.raises(UsageError, match="--amp needs a GPU"):
        configured(shapes, tmp_path, amp=True)


def test_auto_scale_lr(shapes, tmp_path):
    assert configured(shapes, tmp_path, auto_scale_lr=True).auto_scale_lr.enable
    cfg = load_config("configs/demo/demo_bn.py", {"auto_scale_lr": None}, data_root=shapes)
    with pytest.raises(UsageError, match=r"needs auto_scale_lr\.base_batch_size"):
        launch.configure_training(cfg, auto_scale_lr=True)


def test_resume_takes_the_newest_whole_checkpoint(shapes, tmp_path):
    assert configured(shapes, tmp_path, resume="auto").resume is False
    torch.save({"a": torch.ones(99)}, tmp_path / "epoch_1.pth")
    (tmp_path / "epoch_2.pth").write_bytes((tmp_path / "epoch_1.pth").read_bytes()[:50])
    cfg = configured(shapes, tmp_path, resume="auto")
    assert (cfg.resume, cfg.load_from) == (True, str(tmp_path / "epoch_1.pth"))
    with pytest.raises(CheckpointError, match=r"epoch_2.pth: is cut off"):
        configured(shapes, tmp_path, resume=str(tmp_path / "epoch_2.pth"))
    with pytest.raises(CheckpointError, match=r"epoch_3.pth: no such checkpoint"):
        configured(shapes, tmp_path, resume=str(tmp_path / "epoch_3.pth"))


def test_never_without_a_whole_checkpoint(shapes, tmp_path):
    cfg = load_config(
        "configs/demo/demo_bn.py",
        {"default_hooks.checkpoint.max_keep_ckpts": 1},
        data_root=shapes,
        work_dir=str(tmp_path),
    )
    launch.configure_training(cfg)
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2


@pytest.mark.parametrize(
    ("config", "make", "message"),
    [
        ("bn", lambda p: None, "no such checkpoint"),
        ("bn", lambda p: p.write_text("x"), "is no checkpoint of torch"),
        ("bn", lambda p: torch.save({"a": torch.ones(1)}, p), "tensors are missing"),
        ("bn", lambda p: torch.save(model_of("psbn_finetune"), p), "it is a psBN checkpoint"),
        ("bn", lambda p: torch.save(model_of("bn", depth=34), p), "no place in the model"),
        ("bn", lambda p: torch.save(model_of("bn", base_channels=8), p), "have another shape"),
    ],
)
def test_testing_refuses_a_checkpoint_that_is_not_of_the_config(
    config, make, message, shapes, tmp_path
):
    make(tmp_path / "a.pth")
    cfg = load_config(f"configs/demo/demo_{config}.py", data_root=shapes, work_dir=str(tmp_path))
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)

    def test(how):
        launch.configure_test(cfg, str(tmp_path / "a.pth"))
        how()

    with pytest.raises(CheckpointError, match=message):
        test(lambda: check_weights(cfg, strict=True))  # before processes are started
    with pytest.raises(CheckpointError, match=message):
        test(lambda: launch.evaluate(cfg))


def model_of(config, **backbone):
    cfg = load_config(f"configs/demo/demo_{config}.py")
    cfg.model.backbone.update(backbone)
    if "base_channels" in backbone:
        cfg.model.neck.in_channels = [backbone["base_channels"] * n for n in (1, 2, 4, 8)]
    return build(cfg).state_dict()
