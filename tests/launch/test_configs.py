"""The shipped configs: they build, hold the paper's protocol, and differ in the norm alone."""

import contextlib
from pathlib import Path

import pytest
import torch

from psbn_mmdet import psBN2d, psSyncBN
from psbn_mmdet.launch import UsageError, load_config
from psbn_mmdet.launch.checks import check_processes
from tests.helpers.paths import ROOT
from tests.helpers.real_runs import build

CONFIGS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/*/*.py"))
RETINANET = [c for c in CONFIGS if "/retinanet_" in c]


@pytest.mark.parametrize("path", CONFIGS)
def test_config_loads_and_builds_its_norm(path):
    cfg = load_config(path)
    model = build(cfg)
    kinds = {type(m).__name__ for m in model.backbone.modules() if hasattr(m, "running_mean")}
    name = Path(path).stem
    expected = {"bn": "BatchNorm2d", "psbn": "psBN2d", "syncbn": "SyncBatchNorm"}
    expected["pssyncbn"] = "psSyncBN"
    assert kinds == {expected[name.split("_")[1]]}


@pytest.mark.parametrize("path", CONFIGS)
def test_without_a_gpu_two_processes_train_all_but_pytorchs_syncbn(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = pytest.raises(UsageError, match="SyncBN needs a GPU for every process")
    with refused if "_syncbn" in path else contextlib.nullcontext():
        check_processes(2, load_config(path))


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


def test_sync_configs_are_reverted_only_to_what_they_are():
    from mmengine.model import revert_sync_batchnorm

    model = build(load_config("configs/retinanet/retinanet_pssyncbn_500.py"))
    kinds = {type(m) for m in revert_sync_batchnorm(model).backbone.modules()}
    assert psSyncBN in kinds


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
