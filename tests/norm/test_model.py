"""The model type ToPsBN: any model of mmdet's configs with psBN in the place of its BatchNorms."""

import copy
import itertools
import os
from collections import Counter
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.testing import assert_close

from psbn_mmdet import psBN2d, psSyncBN
from psbn_mmdet.norm import PostShift, norm_layers
from tests.helpers import distributed
from tests.helpers.layers import randomize

run_number = itertools.count()
CONFIGS = Path(mmdet.__file__).parent / ".mim/configs"
R18 = {"depth": 18, "init_cfg": None}
# Made small; a norm_cfg of BN in the neck of the transformer, which has LayerNorm.
DETECTORS = {
    "Swin": (
        "swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py",
        {
            "backbone": {
                "embed_dims": 12,
                "depths": (1, 1, 1, 1),
                "num_heads": (1, 1, 1, 1),
                "init_cfg": None,
            },
            "neck": {"in_channels": [24, 48, 96], "norm_cfg": {"type": "BN"}},
        },
    ),
    "PVT": (
        "pvt/retinanet_pvt-t_fpn_1x_coco.py",
        {
            "backbone": {"num_layers": [1, 1, 1, 1], "init_cfg": None},
            "neck": {"norm_cfg": {"type": "BN"}},
        },
    ),
    "GroupNorm head": (
        "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
        {
            "backbone": {**R18, "norm_cfg": {"type": "BN", "requires_grad": True}},
            "neck": {"in_channels": [64, 128, 256, 512]},
        },
    ),
    "SyncBN": (
        "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
        {
            "backbone": {"widen_factor": 0.125, "init_cfg": None},
            "neck": {"in_channels": [32, 64, 128], "out_channels": 32},
            "bbox_head": {"in_channels": 32, "feat_channels": 32},
        },
    ),
}
SEMI = "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py"


def config(name, **options):
    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(CONFIGS / name)
    cfg.merge_from_dict(options)
    return cfg


def converted(cfg, **options):
    """The config after --cfg-options model.type=psbn_mmdet.ToPsBN model.of=THE_TYPE."""
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict({"model.of": cfg.model.type, "model.type": "psbn_mmdet.ToPsBN"})
    cfg.merge_from_dict({f"model.{key}": value for key, value in options.items()})
    return cfg


def train_step(model, cfg):
    """One step; the model's optimizer as the Runner makes it."""
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    data = demo_mm_inputs(2, [[3, 64, 64]] * 2, num_classes=80, num_items=[2, 2])
    model.train()
    losses = model.train_step(data, wrapper)
    assert all(torch.as_tensor(v).isfinite().all() for v in losses.values())
    return {id(p) for group in wrapper.optimizer.param_groups for p in group["params"]}


@pytest.mark.filterwarnings("ignore:no ReLU follows")
@pytest.mark.parametrize("name", DETECTORS)
def test_every_batch_norm_and_nothing_else_is_converted_and_trained(name):
    path, changes = DETECTORS[name]
    cfg = config(path, model=changes)
    torch.manual_seed(0)
    plain = randomize(MODELS.build(cfg.model)).eval()
    model = MODELS.build(converted(cfg, alpha=0.2).model).eval()
    assert type(model) is type(plain)

    counts = [Counter(type(m).__name__ for m in net.modules()) for net in (plain, model)]
    for kind in ("LayerNorm", "GroupNorm", "Conv2d", "Linear"):
        assert counts[0][kind] == counts[1][kind]
    assert (counts[0]["LayerNorm"] > 0) == (name in ("Swin", "PVT"))
    assert (counts[0]["GroupNorm"] > 0) == (name == "GroupNorm head")
    layers = norm_layers(model)
    assert layers.keys() == norm_layers(plain).keys()
    assert {type(m) for m in layers.values()} == {psSyncBN if name == "SyncBN" else psBN2d}
    assert all(m.alpha == torch.tensor(0.2) for m in layers.values())

    # weights of the plain model are loaded into it with their function preserved
    model.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(model.extract_feat(x), plain.extract_feat(x), strict=True):
            assert_close(a, b, rtol=1e-3, atol=1e-4)  # 20 to 80 layers, each with a rounding

    before = {name: m.beta.detach().clone() for name, m in layers.items()}
    trained = train_step(model, cfg)
    free = {name: layer for name, layer in layers.items() if layer.beta.requires_grad}
    assert len(free) > 4
    assert all(id(layer.beta) in trained for layer in free.values())
    # A level of the head to which no box was assigned has neither gradient nor decay in RTMDet.
    moved = [not torch.equal(layer.beta, before[name]) for name, layer in free.items()]
    assert sum(moved) > 0.8 * len(free)


def test_a_model_of_two_detectors():
    cfg = config(
        SEMI,
        model=dict(
            detector=dict(
                backbone={**R18, "norm_cfg": dict(type="BN", requires_grad=True)},
                neck=dict(in_channels=[64, 128, 256, 512]),
            )
        ),
    )
    model = MODELS.build(converted(cfg).model)
    for part in (model.student, model.teacher):
        assert {type(m) for m in norm_layers(part).values()} == {psBN2d}
        assert len(norm_layers(part)) == 20
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    trained = {id(p) for group in wrapper.optimizer.param_groups for p in group["params"]}
    assert id(model.student.backbone.layer4[0].bn1.beta) in trained


def test_distilling_from_a_teacher(tmp_path):
    """The teacher's weights are loaded while the model is built: it keeps its function."""
    student = config("ld/ld_r18-gflv1-r101_fpn_1x_coco.py", **{"model.backbone.init_cfg": None})
    teacher = config("gfl/gfl_r50_fpn_1x_coco.py")
    teacher.merge_from_dict({"model.backbone": R18, "model.neck.in_channels": [64, 128, 256, 512]})
    weights = randomize(MODELS.build(teacher.model)).eval()
    torch.save({"state_dict": weights.state_dict()}, tmp_path / "teacher.pth")
    teacher.dump(tmp_path / "teacher.py")
    student.model.teacher_config = str(tmp_path / "teacher.py")
    student.model.teacher_ckpt = str(tmp_path / "teacher.pth")

    model = MODELS.build(converted(student).model)
    assert {type(m) for m in norm_layers(model).values()} == {psBN2d}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = weights.extract_feat(x)
        for a, b in zip(model.teacher_model.eval().extract_feat(x), expected, strict=True):
            assert_close(a, b, rtol=1e-3, atol=1e-4)
    train_step(model, student)


def test_no_batch_norm_and_no_type_are_said():
    cfg = config("gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py", **{"model.backbone.init_cfg": None})
    with pytest.raises(ValueError, match="no BatchNorm or InstanceNorm with a trained bias"):
        MODELS.build(converted(cfg).model)
    cfg.model.type = "psbn_mmdet.ToPsBN"
    with pytest.raises(TypeError, match="'of'"):
        MODELS.build(cfg.model)


class TestPsbnInThePlaceOfAnotherNorm:
    """A norm_cfg whose type alone was replaced."""

    def test_of_a_group_norm(self):
        cfg = config("gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py")
        cfg.model.backbone.norm_cfg.type = "psbn_mmdet.psBN"
        with pytest.raises(TypeError, match="psBN2d does not take num_groups: it replaces"):
            MODELS.build(cfg.model)

    def test_of_a_layer_norm(self):
        path, changes = DETECTORS["Swin"]
        cfg = config(path, model=changes)
        cfg.merge_from_dict({"model.backbone.norm_cfg": {"type": "psbn_mmdet.psBN"}})
        model = MODELS.build(cfg.model)
        with pytest.raises(ValueError, match=r"got 3D input.*not a LayerNorm.*ToPsBN") as raised:
            model.extract_feat(torch.randn(1, 3, 64, 64))
        assert "\n" not in str(raised.value)


@DATASETS.register_module(force=True)
class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        data = demo_mm_inputs(1, [[3, 64, 64]], num_classes=80, num_items=[2])
        return {key: value[0] for key, value in data.items()}


def run(work_dir, start, **extra):
    """A stock config of mmdet through mmengine's Runner, as mmdet's tools/train.py does it."""
    cfg = config(
        "retinanet/retinanet_r18_fpn_1x_coco.py",
        **{"model.backbone.init_cfg": None, "model.backbone.frozen_stages": -1},
    )
    cfg = converted(cfg)
    cfg.update(
        param_scheduler=[],
        optim_wrapper=dict(clip_grad=dict(max_norm=1.0)),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2)),
        load_from=str(start),
        work_dir=str(work_dir),
        log_level="WARNING",
        experiment_name=f"toPsBN{next(run_number)}",
        **extra,
    )
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=2)
    cfg.train_dataloader = dict(
        batch_size=1,
        dataset=dict(type="Samples"),
        sampler=dict(type="DefaultSampler", shuffle=False),
        collate_fn=dict(type="pseudo_collate"),
    )
    for key in ("val_dataloader", "val_cfg", "val_evaluator"):
        cfg[key] = None
    cfg.custom_hooks = [dict(type="EMAHook")]
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A BN checkpoint."""
    cfg = config("retinanet/retinanet_r18_fpn_1x_coco.py", **{"model.backbone.init_cfg": None})
    path = tmp_path_factory.mktemp("start") / "bn.pth"
    torch.save({"state_dict": randomize(MODELS.build(cfg.model)).state_dict()}, path)
    return path


def check_run(model, work_dir, start):
    layers = norm_layers(model)
    assert len(layers) == 20
    begun = torch.load(start)["state_dict"]
    saved = torch.load(Path(work_dir) / "iter_2.pth", weights_only=False)
    for name, layer in layers.items():
        assert isinstance(layer, PostShift)
        # EMAHook saves the average as the model and the model as the average.
        assert torch.equal(saved["ema_state_dict"][f"module.{name}.beta"], layer.beta)
        assert f"{name}.beta" in saved["state_dict"]
        # Trained from there: two steps of lr 0.01 with gradients of norm 1 at most.
        moved = (layer.bias - begun[f"{name}.bias"]).abs().max()
        assert moved < 2.5 * 0.01
    assert moved > 0


def test_in_mmengines_runner_with_ema_and_a_bn_checkpoint(tmp_path, start):
    runner = run(tmp_path, start)
    check_run(runner.model, tmp_path, start)
    ema = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook").ema_model.module
    assert all(isinstance(m, PostShift) for m in norm_layers(ema).values())


def run_distributed(rank, work_dir, start):
    os.environ["LOCAL_RANK"] = str(rank)  # of this process, which ends here
    wrapper = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    runner = run(work_dir, start, launcher="pytorch", model_wrapper_cfg=wrapper)
    assert type(runner.model).__name__ == "MMDistributedDataParallel"
    return {n: m.beta.detach() for n, m in norm_layers(runner.model.module).items()}


@pytest.mark.slow
def test_within_distributed_data_parallel(tmp_path, start):
    betas = distributed.run(run_distributed, 2, tmp_path, str(tmp_path / "work"), str(start))
    assert len(betas[0]) == 20
    assert all(torch.equal(betas[0][name], betas[1][name]) for name in betas[0])
    saved = torch.load(tmp_path / "work" / "iter_2.pth", weights_only=False)["state_dict"]
    assert "backbone.bn1.beta" in saved
