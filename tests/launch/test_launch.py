"""The configs, and what tools/train.py and tools/test.py do with them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from psbn_mmdet import launch, psBN2d, psSyncBN
from psbn_mmdet.checkpoint import CheckpointError, load
from psbn_mmdet.launch import UsageError, load_config
from studies.demo.drawn_shapes import write_shapes
from tests.helpers.layers import randomize
from tests.helpers.paths import ROOT

CONFIGS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/*/*.py"))
RETINANET = [c for c in CONFIGS if "/retinanet_" in c]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=32, val=8)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A file of the name, keys and shapes of torchvision's resnet50, in a hub cache of its own."""
    from mmdet.models import ResNet

    state_dict = randomize(ResNet(50)).state_dict()
    state_dict |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    home = tmp_path_factory.mktemp("torch_home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state_dict, home / "hub" / "checkpoints" / "resnet50-0676ba61.pth")
    return home


def build(cfg):
    init_default_scope("mmdet")
    return MODELS.build(cfg.model)


# -- configs ---------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS)
def test_config_loads_and_builds_its_norm(path):
    cfg = load_config(path)
    model = build(cfg)
    kinds = {type(m).__name__ for m in model.backbone.modules() if hasattr(m, "running_mean")}
    name = Path(path).stem
    expected = {"bn": "BatchNorm2d", "psbn": "psBN2d", "syncbn": "SyncBatchNorm"}
    expected["pssyncbn"] = "psSyncBN"
    assert kinds == {expected[name.split("_")[1]]}
    assert launch.check_processes(2) is None


@pytest.mark.parametrize("path", [c for c in CONFIGS if "_ps" in c])
def test_ps_config_differs_from_its_twin_in_nothing_but_the_norm(path):
    ps, twin = load_config(path), load_config(path.replace("_ps", "_"))
    assert ps.model.backbone.norm_cfg.type == "ps" + twin.model.backbone.norm_cfg.type.replace(
        "ps", ""
    )
    ps.model.backbone.norm_cfg.type = twin.model.backbone.norm_cfg.type
    ps.work_dir = twin.work_dir
    assert ps._cfg_dict == twin._cfg_dict


@pytest.mark.parametrize("path", RETINANET)
def test_the_protocol_of_table_2(path):
    cfg = load_config(path)
    scale = (833, 500) if "_500" in path else (1333, 800)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert [tuple(s.scale) for s in loader.dataset.pipeline if s.type == "Resize"] == [scale]
    flips = [s.prob for s in cfg.train_dataloader.dataset.pipeline if s.type == "RandomFlip"]
    assert flips == [0.5]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.01, 0.9, 1e-4)
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.model.backbone.norm_eval == ("sync" not in path)
    if "_90k" in path:
        assert cfg.train_cfg.max_iters == 90000
        assert cfg.param_scheduler[1].milestones == [60000, 80000]
        assert "max_epochs" not in cfg.train_cfg
    else:
        assert cfg.train_cfg.max_epochs == 12
        assert cfg.param_scheduler[1].milestones == [8, 11]


def test_data_root_reaches_every_path():
    path = "configs/retinanet/retinanet_psbn_500.py"
    for cfg in (
        load_config(path, data_root="/data/c"),
        load_config(path, cfg_options={"data_root": "/data/c"}),
    ):
        assert "data/coco/" not in cfg.pretty_text
        assert cfg.train_dataloader.dataset.data_root == "/data/c/"
        assert cfg.test_evaluator.ann_file == "/data/c/annotations/instances_val2017.json"


# -- the same start ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("norm_eval", [True, False])
def test_bn_and_psbn_start_with_the_same_loss_from_imagenet_weights(
    norm_eval, imagenet, monkeypatch
):
    from mmdet.testing import demo_mm_inputs

    monkeypatch.setenv("TORCH_HOME", str(imagenet))
    losses = []
    for norm in ("bn", "psbn"):
        torch.manual_seed(0)
        cfg = load_config(f"configs/retinanet/retinanet_{norm}_500.py")
        cfg.model.backbone.norm_eval = norm_eval
        model = build(cfg)
        model.init_weights()
        assert model.backbone.frozen_stages == 1
        model.train()
        data = demo_mm_inputs(2, [[3, 96, 128], [3, 96, 128]], num_classes=80)
        data = model.data_preprocessor(data, training=True)
        loss, _ = model.parse_losses(model(**data, mode="loss"))
        losses.append(loss.item())
        norms = [m for m in model.modules() if isinstance(m, psBN2d)]
        assert len(norms) == (53 if norm == "psbn" else 0)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# -- bad input -----------------------------------------------------------------------


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
        launch.check_data(cfg, "train")
    cfg = load_config("configs/demo/demo_bn.py", data_root=str(shapes))
    launch.check_data(cfg, "train", "val", "test")
    cfg.val_evaluator.ann_file = "gone.json"
    with pytest.raises(UsageError, match=r"gone.json: no such annotation file"):
        launch.check_data(cfg, "val")
    cfg.train_dataloader.dataset = {
        "type": "RepeatDataset",
        "dataset": cfg.train_dataloader.dataset,
    }
    cfg.train_dataloader.dataset.dataset.data_prefix.img = "no/"
    with pytest.raises(UsageError, match=r"no/: no such folder of images"):
        launch.check_data(cfg, "train")


def test_wrong_number_of_processes(monkeypatch):
    with pytest.raises(UsageError, match="0 processes asked for"):
        launch.check_processes(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="3 processes asked for, 1 to 2"):
        launch.check_processes(3)
    launch.check_processes(2)


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
        test(lambda: launch.check_weights(cfg, strict=True))  # before processes are started
    with pytest.raises(CheckpointError, match=message):
        test(lambda: launch.evaluate(cfg))


def model_of(config, **backbone):
    cfg = load_config(f"configs/demo/demo_{config}.py")
    cfg.model.backbone.update(backbone)
    if "base_channels" in backbone:
        cfg.model.neck.in_channels = [backbone["base_channels"] * n for n in (1, 2, 4, 8)]
    return build(cfg).state_dict()


# -- real runs ---------------------------------------------------------------------------

TINY = [
    "train_cfg.max_epochs=3",
    "train_cfg.val_interval=3",
    "default_hooks.checkpoint.interval=1",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
]


def command(processes, config, work_dir, *arguments, test=None):
    tool = "test" if test else "train"
    if processes == 1:
        head = [sys.executable, f"tools/{tool}.py", config, *([test] if test else [])]
    else:
        head = [f"tools/dist_{tool}.sh", config, *([test] if test else []), str(processes)]
    return [*head, "--work-dir", str(work_dir), *map(str, arguments)]


def environment(**extra):
    return os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | extra


def run(*args, check=True, env=None, **kwargs):
    result = subprocess.run(
        command(*args, **kwargs), env=env or environment(), capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def weights(work_dir, epoch=3):
    return load(Path(work_dir) / f"epoch_{epoch}.pth")["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(processes, shapes, tmp_path):
    config = "configs/demo/demo_psbn_finetune.py"
    options = ["--data-root", shapes, "--cfg-options", *TINY]
    flip = load_config(config).train_dataloader.dataset.pipeline
    flip = next(i for i, step in enumerate(flip) if step.type == "RandomFlip")
    options.append(f"train_dataloader.dataset.pipeline.{flip}.prob=0.0")
    run(processes, config, tmp_path / "whole", *options)

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(processes, config, killed, *options),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (killed / "epoch_2.pth").exists():  # it is being written just then
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for member in family:
        member.kill()
    process.wait()
    assert not (killed / "epoch_3.pth").exists()
    # Wherever the kill fell, leave the newest file cut off as well.
    newest = killed / "epoch_2.pth"
    newest.write_bytes(newest.read_bytes()[:10000])

    result = run(processes, config, killed, "--resume", *options)
    assert f"resuming from {killed / 'epoch_1.pth'}" in result.stdout
    expected, found = weights(tmp_path / "whole"), weights(killed)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    first = weights(killed, 1)
    assert any(not torch.equal(first[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_a_checkpoint_with_code_is_refused_in_one_line(shapes, tmp_path):
    from tests.helpers.malicious import Malicious

    torch.save({"state_dict": {}, "meta": Malicious(tmp_path / "ran")}, tmp_path / "a.pth")
    for processes in (1, 2):
        arguments = ["--data-root", shapes, "--resume", tmp_path / "a.pth"]
        result = run(processes, "configs/demo/demo_bn.py", tmp_path / "w", *arguments, check=False)
        assert result.returncode != 0
        assert "refused, since it carries posix.mkdir" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_real_images_in_two_processes(shared_data, imagenet, tmp_path):
    """The unmodified config on COCO images: train from ImageNet's file, resume, test."""
    config = "configs/retinanet/retinanet_psbn_500.py"
    # A quarter of the scale and 8 images: what is shown is the path, not the AP.
    small = [o for o in TINY if "max_epochs" not in o and "val_interval" not in o]
    small += [f"{k}_dataloader.dataset.indices=8" for k in ("train", "val", "test")]
    steps = load_config(config).train_dataloader.dataset.pipeline
    resize = next(i for i, step in enumerate(steps) if step.type == "Resize")
    small.append(f"train_dataloader.dataset.pipeline.{resize}.scale=(208,125)")
    steps = load_config(config).test_dataloader.dataset.pipeline
    resize = next(i for i, step in enumerate(steps) if step.type == "Resize")
    small += [f"{k}_dataloader.dataset.pipeline.{resize}.scale=(208,125)" for k in ("val", "test")]
    small.append("model.test_cfg.score_thr=0.0")  # untrained: keep what is found
    options = ["--data-root", shared_data / "coco128", "--cfg-options", *small]
    env = environment(TORCH_HOME=str(imagenet))

    run(2, config, tmp_path, *options, "train_cfg.max_epochs=1", env=env)
    start = load(imagenet / "hub" / "checkpoints" / "resnet50-0676ba61.pth")
    after = weights(tmp_path, 1)
    # The stem is frozen: beta + alpha is still ImageNet's bias.
    total = after["backbone.bn1.beta"] + after["backbone.bn1.alpha"]
    torch.testing.assert_close(total, start["bn1.bias"])
    assert not torch.equal(after["backbone.layer2.0.conv1.weight"], start["layer2.0.conv1.weight"])

    result = run(2, config, tmp_path, "--resume", *options, "train_cfg.max_epochs=2", env=env)
    assert f"resuming from {tmp_path / 'epoch_1.pth'}" in result.stdout
    assert (tmp_path / "epoch_2.pth").exists()

    checkpoint = str(tmp_path / "epoch_2.pth")
    run(2, config, tmp_path / "test", *options, test=checkpoint, env=env)
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert metrics["coco/bbox_mAP"] >= 0
    results = json.loads((tmp_path / "test" / "results.bbox.json").read_text())
    assert {r["image_id"] for r in results} <= {
        i["id"]
        for i in json.loads(
            (shared_data / "coco128" / "annotations" / "instances_val2017.json").read_text()
        )["images"]
    }
    assert len({r["image_id"] for r in results}) == 8


RUN_AND_LIST_THREADS = """
import runpy, sys
from pathlib import Path

sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    threads = [p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")]
    print("left behind:", [name for name in threads if "gloo" in name], flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists threads as Linux does")
def test_no_thread_of_gloo_is_left_that_could_abort_a_finished_job(shapes, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(RUN_AND_LIST_THREADS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", program]
    options = ["--work-dir", tmp_path / "w", "--data-root", shapes, "--launcher", "pytorch"]
    options += ["--cfg-options", *TINY, "train_cfg.max_epochs=1", "model.test_cfg.score_thr=0.0"]
    config = ROOT / "configs/demo/demo_psbn_finetune.py"
    for tool in (["train.py", config], ["test.py", config, tmp_path / "w/epoch_1.pth"]):
        result = subprocess.run(
            [*torchrun, ROOT / "tools" / tool[0], *tool[1:], *options],
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("left behind: []") == 2, result.stdout[-3000:]


FAKE_SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    [[ $1 != --ntasks ]] || tasks=$2
    [[ $1 == *=* ]] && shift || shift 2
done
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=$tasks SLURM_NODELIST=localhost "$@" &
done
wait -n && wait -n
"""


@pytest.mark.slow
def test_slurm_scripts_on_cpu_with_a_stand_in_for_slurm(shapes, tmp_path):
    for name, text in [("srun", FAKE_SRUN), ("scontrol", "#!/bin/sh\necho localhost\n")]:
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", GPUS="2", GPUS_PER_NODE="0")
    config, options = "configs/demo/demo_bn.py", ["--data-root", shapes, "--cfg-options", *TINY]
    options += ["train_cfg.max_epochs=1", "model.test_cfg.score_thr=0.0"]
    train = ["tools/slurm_train.sh", "part", "job", config, tmp_path / "w", *options]
    subprocess.run(train, env=env, check=True, capture_output=True)
    test = ["tools/slurm_test.sh", "part", "job", config, tmp_path / "w" / "epoch_1.pth"]
    test += ["--work-dir", tmp_path / "w", *options]
    subprocess.run(test, env=env, check=True, capture_output=True)
    assert "coco/bbox_mAP" in json.loads((tmp_path / "w" / "metrics.json").read_text())


@pytest.mark.slow
def test_mmdets_own_train_script_takes_psbn_by_one_option(shapes, tmp_path):
    import mmdet

    cfg = load_config("configs/demo/demo_bn.py", data_root=shapes)
    for key in ("custom_imports", "custom_hooks"):  # nothing of this package but the scope
        cfg.pop(key)
    cfg.dump(tmp_path / "plain.py")
    script = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"
    options = ["model.backbone.norm_cfg.type=psbn_mmdet.psBN", *TINY, "train_cfg.max_epochs=1"]
    args = ["--work-dir", str(tmp_path / "w"), "--cfg-options", *options]
    subprocess.run(
        [sys.executable, script, tmp_path / "plain.py", *args],
        cwd=tmp_path,
        env=environment(),
        check=True,
        capture_output=True,
    )
    assert "backbone.bn1.beta" in weights(tmp_path / "w", 1)


@pytest.mark.slow
def test_a_wheel_trains_from_its_installed_config(shapes, tmp_path):
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("psbn_mmdet-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    user = tmp_path / "mine.py"
    user.write_text(
        "_base_ = 'psbn_mmdet::demo/demo_psbn_finetune.py'\n"
        "custom_imports = dict(imports=['psbn_mmdet'], allow_failed_imports=False)\n"
    )
    env = environment(PYTHONPATH=str(site))
    options = ["--data-root", shapes, "--cfg-options", *TINY, "train_cfg.max_epochs=1"]
    for config in (user, "psbn_mmdet::demo/demo_bn.py"):
        args = [str(config), "--work-dir", str(tmp_path / "w"), *map(str, options)]
        script = site / "psbn_mmdet" / ".mim" / "tools" / "train.py"
        result = subprocess.run(
            [sys.executable, script, *args], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
    assert "backbone.bn1.bias" in weights(tmp_path / "w", 1)


def test_sync_configs_are_reverted_only_to_what_they_are():
    from mmengine.model import revert_sync_batchnorm

    model = build(load_config("configs/retinanet/retinanet_pssyncbn_500.py"))
    kinds = {type(m) for m in revert_sync_batchnorm(model).backbone.modules()}
    assert psSyncBN in kinds
