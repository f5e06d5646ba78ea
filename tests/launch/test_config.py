"""What a config must have, and what a command line makes of it, before anything is started."""

import contextlib
import socket

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmengine.config import Config

from psbn_mmdet import launch
from psbn_mmdet.checkpoint import CheckpointError
from psbn_mmdet.launch import UsageError, load_config
from psbn_mmdet.launch.checks import check_data, check_port, check_processes
from psbn_mmdet.launch.config import write_coco_results
from psbn_mmdet.launch.preview import preview
from tests.helpers.real_runs import build

# -- where the data is -----------------------------------------------------------------


def test_data_root_reaches_every_path():
    path = "configs/retinanet/retinanet_psbn_500.py"
    for cfg in (
        load_config(path, data_root="/data/c"),
        load_config(path, cfg_options={"data_root": "/data/c"}),
    ):
        assert "data/coco/" not in cfg.pretty_text
        assert cfg.train_dataloader.dataset.data_root == "/data/c/"
        assert cfg.test_evaluator.ann_file == "/data/c/annotations/instances_val2017.json"


@pytest.mark.parametrize("old", ["data/coco", "data/coco/", "./data//coco/"])
@pytest.mark.parametrize("new", ["/x/y", "/x/y/"])
def test_data_root_moves_what_is_at_or_below_it_and_nothing_else(old, new, tmp_path):
    moved = {
        "data/coco": "/x/y",
        "data/coco/": "/x/y/",
        "./data/coco/a.json": "/x/y/a.json",
        "data/coco/train/": "/x/y/train/",
    }
    kept = ["data/coco_pretrained/a.pth", "data", "my/data/coco/a", "s3://data/coco/a", "coco", ""]
    nested = {"list": [*moved, *kept], "tuple": ({"deep": tuple(moved)}, 3, None, *kept)}
    (tmp_path / "a.py").write_text(f"data_root = {old!r}\nnode = {nested!r}\n")
    cfg = load_config(str(tmp_path / "a.py"), data_root=new)
    assert cfg.data_root == "/x/y/"
    assert cfg.node.list == [*moved.values(), *kept]
    assert cfg.node.tuple == ({"deep": tuple(moved.values())}, 3, None, *kept)


@pytest.mark.parametrize("new", ["s3://bucket/coco", "s3://bucket/coco/"])
def test_data_root_may_be_a_url(new, tmp_path):
    nested = {"img": "data/coco/train/", "ann": "./data//coco/a.json", "all": "data/coco/"}
    (tmp_path / "a.py").write_text(f"data_root = 'data/coco'\nnode = {nested!r}\n")
    cfg = load_config(str(tmp_path / "a.py"), data_root=new)
    assert cfg.data_root == cfg.node["all"] == "s3://bucket/coco/"
    assert cfg.node.img == "s3://bucket/coco/train/"
    assert cfg.node.ann == "s3://bucket/coco/a.json"
    (tmp_path / "b.py").write_text(cfg.pretty_text)
    back = load_config(str(tmp_path / "b.py"), data_root="/x")
    assert back.node.to_dict() == {"img": "/x/train/", "ann": "/x/a.json", "all": "/x/"}


def test_data_root_may_be_the_root_of_the_disk(tmp_path):
    (tmp_path / "a.py").write_text("data_root = 'data/coco/'\nnode = ['data/coco/', 'data/coco/a']")
    cfg = load_config(str(tmp_path / "a.py"), data_root="/")
    assert (cfg.data_root, cfg.node) == ("/", ["/", "/a"])


def test_a_word_that_sounds_like_the_data_root_is_no_path(tmp_path):
    (tmp_path / "a.py").write_text("data_root = 'coco'\nmetric = 'coco'\nfile = 'coco/a'\n")
    cfg = load_config(str(tmp_path / "a.py"), data_root="/x")
    assert (cfg.data_root, cfg.metric, cfg.file) == ("/x/", "coco", "/x/a")


@pytest.mark.parametrize("how", [{"data_root": "/x"}, {"cfg_options": {"data_root": "/x"}}])
def test_without_a_data_root_none_can_be_replaced(how, tmp_path):
    (tmp_path / "a.py").write_text("a = 1\n")
    with pytest.raises(UsageError, match="has no data_root to replace"):
        load_config(str(tmp_path / "a.py"), **how)


@pytest.mark.parametrize(
    ("backend_args", "looked_for"),
    [
        (None, True),
        ({"backend": "local"}, True),
        ({"backend": "petrel", "path_mapping": {"data/": "s3://bucket/"}}, False),
    ],
)
def test_files_are_looked_for_where_the_local_disk_is_read(backend_args, looked_for):
    """Data set, its images and its metric each on their own."""
    cfg = load_config("configs/demo/demo_bn.py", data_root="/none/")
    data, metric = cfg.val_dataloader.dataset, cfg.val_evaluator

    def refused():
        with contextlib.suppress(UsageError):
            return check_data(cfg, "val")
        return True

    data.backend_args = metric.backend_args = data.pipeline[0].backend_args = backend_args
    assert bool(refused()) is looked_for
    if not looked_for:  # one place on the local disk is enough
        metric.backend_args = None
        assert refused()
        metric.backend_args, data.backend_args = backend_args, None
        assert refused()


def test_a_list_of_annotation_files_is_refused_where_mmdet_cannot_read_it(shapes):
    cfg = load_config("configs/demo/demo_bn.py", data_root=str(shapes))
    data = cfg.train_dataloader.dataset
    data.ann_file = [data.ann_file, "annotations/b.json"]
    with pytest.raises(UsageError, match=r"ann_file=.*b.json.*: CocoDataset reads one file"):
        check_data(cfg, "train")
    # a data set that makes its own of it is only checked for the files
    data.type = "tests.launch.test_config.Several"
    with pytest.raises(UsageError, match=r"annotations/b.json: no such annotation file"):
        check_data(cfg, "train")
    data.ann_file = [data.ann_file[0]]
    check_data(cfg, "train")


class Several(CocoDataset):
    def _join_prefix(self):
        """Joins each."""


# -- results ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["CocoMetric", "mmdet.CocoMetric", CocoMetric, "LVISMetric"])
@pytest.mark.parametrize("within", ["alone", "a list", "metrics"])
def test_every_way_to_write_a_coco_metric_gives_a_results_file(kind, within):
    metric = {"type": kind, "ann_file": "a.json"}
    evaluator = {
        "alone": metric,
        "a list": [{"type": "VOCMetric"}, metric],
        "metrics": {"metrics": [metric]},
    }[within]
    cfg = Config({"test_evaluator": evaluator})
    write_coco_results(cfg, "w/results")
    written = str(cfg.to_dict())
    assert written.count("'outfile_prefix': 'w/results'") == written.count("outfile_prefix") == 1


def test_two_metrics_do_not_write_the_same_file_and_a_place_in_the_config_stays():
    kinds = [{"type": "CocoMetric"}, {"type": "CocoMetric", "outfile_prefix": "own"}] * 2
    cfg = Config({"test_evaluator": [dict(kind) for kind in kinds]})
    write_coco_results(cfg, "r")
    assert [m.outfile_prefix for m in cfg.test_evaluator] == ["r", "own", "r_2", "own"]


# -- how many processes ------------------------------------------------------------------


@pytest.fixture(params=[0, 2], ids=["no GPU", "two GPUs"])
def gpus(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    return request.param


NORMS = {
    "BN": ({"norm_cfg": {"type": "BN"}}, None),
    "psSyncBN": ({"norm_cfg": {"type": "psbn_mmdet.psSyncBN"}}, None),
    "SyncBN": ({"norm_cfg": {"type": "SyncBN"}}, "without GPU"),
    "a class": ({"layers": [{"type": torch.nn.SyncBatchNorm}]}, "without GPU"),
    "BN, sync_bn": ({"norm_cfg": {"type": "BN"}, "sync_bn": "torch"}, "without GPU"),
    "psBN, sync_bn": ({"norm_cfg": {"type": "psBN"}, "sync_bn": "torch"}, "always"),
    "psSyncBN, sync_bn": ({"norm_cfg": {"type": "psSyncBN"}, "sync_bn": "torch"}, "always"),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms_that_cannot_be_synchronised_are_refused(norm, gpus):
    model, refused = NORMS[norm]
    model = dict(model)
    sync_bn = model.pop("sync_bn", None)
    cfg = Config({"model": {"backbone": model}, "sync_bn": sync_bn})
    check_processes(1, cfg)  # mmengine turns SyncBN into BN
    if refused == "always" or (refused and not gpus):
        with pytest.raises(UsageError, match="psSyncBN"):
            check_processes(2, cfg)
    else:
        check_processes(2, cfg)


@pytest.mark.parametrize("processes", [-1, 0, 3])
def test_a_number_of_processes_that_cannot_run_is_refused(processes, gpus):
    if processes == 3 and not gpus:
        return check_processes(3, Config({}))  # a CPU runs any number
    with pytest.raises(UsageError, match=f"^{processes} processes requested"):
        check_processes(processes, Config({}))


def test_port(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        monkeypatch.setenv("PORT", port)
        with pytest.raises(UsageError, match=rf"PORT={port}: Address already in use; use another"):
            check_port()
        monkeypatch.setenv("NODE_RANK", "1")
        check_port()  # the first machine listens
        monkeypatch.delenv("NODE_RANK")
    check_port()
    for bad in ("x", "0", "65536"):
        monkeypatch.setenv("PORT", bad)
        with pytest.raises(UsageError, match=f"PORT={bad}: wanted a number from 1"):
            check_port()


def configured(shapes, tmp_path, **options):
    cfg = load_config("configs/demo/demo_bn.py", data_root=shapes, work_dir=str(tmp_path))
    launch.configure_training(cfg, **options)
    return cfg


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("configs/none.py",), r"configs/none.py: no such config"),
        (("nopackage::a/b.py",), r"package nopackage is not installed"),
        (("README.md",), r"README.md: cannot be loaded"),
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
        ("bn", lambda p: p.write_text("x"), "is not a PyTorch checkpoint"),
        ("bn", lambda p: torch.save({"a": torch.ones(1)}, p), "no tensor of the"),
        ("bn", lambda p: torch.save(model_of("bn", depth=34), p), "not in the model"),
        (
            "bn",
            lambda p: torch.save(model_of("bn", base_channels=8), p),
            r"cannot be loaded \(e.g. size mismatch",
        ),
    ],
)
def test_testing_refuses_a_checkpoint_that_is_not_of_the_config(
    config, make, message, shapes, tmp_path
):
    make(tmp_path / "a.pth")
    cfg = load_config(f"configs/demo/demo_{config}.py", data_root=shapes, work_dir=str(tmp_path))
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)

    path = str(tmp_path / "a.pth")

    def before():
        launch.configure_test(cfg, path)
        preview(cfg, training=False)

    with pytest.raises(CheckpointError, match=message):
        before()  # before processes are started
    with pytest.raises(CheckpointError, match=message):
        launch.evaluate(cfg, path)


def model_of(config, **backbone):
    cfg = load_config(f"configs/demo/demo_{config}.py")
    cfg.model.backbone.update(backbone)
    if "base_channels" in backbone:
        cfg.model.neck.in_channels = [backbone["base_channels"] * n for n in (1, 2, 4, 8)]
    return build(cfg).state_dict()
