"""A step of every kind of config that mmdet ships: loops, samplers, batch samplers, wrappers.

Images are drawn, and the network is a stand-in that takes any batch: what is tried is the way of
the data through our loaders, as the config's own sampler and wrappers have it.
"""

import functools
import json
import os
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS

from psbn_mmdet.launch import load_config
from psbn_mmdet.launch.checks import check_data, check_synchronised_norm
from tests.helpers.forked import train
from tests.helpers.noisy_training import last

SHIPPED = Path(mmdet.__path__[0], ".mim", "configs")


@MODELS.register_module()
class AnyBatch(BaseModel):
    """A loss of the mean of all images in a batch, in whatever containers they are."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, mode="tensor", **batch):
        images = list(_images(batch))
        assert images and mode == "loss"
        return {"loss": self.weight * sum(i.float().mean() for i in images) / len(images) / 256}


def _images(node):
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, (list, tuple)):
        for inner in node:
            yield from _images(inner)
    elif isinstance(node, dict):
        for inner in node.values():
            yield from _images(inner)


def write_videos(root, videos=4, frames=3):
    """An annotation file of the form that mmdet's video data sets read, over drawn images."""
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    names = [image["file_name"] for image in content["images"]]
    images, annotations = [], []
    for video in range(videos):
        for frame in range(frames):
            number = len(images)
            images.append({"id": number, "video_id": video, "frame_id": frame, "height": 128})
            images[-1].update(width=128, file_name=names[number])
            box = {"id": number, "image_id": number, "video_id": video, "category_id": 1}
            box.update(
                bbox=[8, 8, 40, 40],
                area=1600,
                iscrowd=0,
                instance_id=video,
                visibility=1,
                mot_conf=1,
            )
            annotations.append({**box, "segmentation": [[8, 8, 48, 8, 48, 48, 8, 48]]})
    out = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "circle"}],
    }
    out["videos"] = [{"id": video, "name": str(video), "length": frames} for video in range(videos)]
    (root / "annotations" / "videos.json").write_text(json.dumps(out))


def small(node, root, pack=True):
    """The data set of a config with its wrappers, over the drawn images."""
    node = dict(node)
    if "datasets" in node:
        return {**node, "datasets": [small(inner, root, pack) for inner in node["datasets"]]}
    if "dataset" in node:
        mixes = "pipeline" in node  # images of several, and packs what comes out
        extra = {"pipeline": PACK} if mixes else {}
        return {**node, **extra, "dataset": small(node["dataset"], root, pack and not mixes)}
    video = kind_of(node) in VIDEO
    return {
        "type": "MOTChallengeDataset" if video else "CocoDataset",
        "data_root": str(root),
        "ann_file": "annotations/videos.json" if video else "annotations/instances_train2017.json",
        "data_prefix": {"img_path" if video else "img": "train2017/"},
        "metainfo": {"classes": ["circle"] if video else ["circle", "square", "triangle"]},
        "pipeline": FRAMES if video else [*LOAD, *(PACK if pack else [])],
        **({"visibility_thr": -1} if video else {"indices": 6}),
    }


VIDEO = ("YouTubeVISDataset", "MOTChallengeDataset")
PACK = [{"type": "PackDetInputs", "meta_keys": ("img_id",)}]
LOAD = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "with_bbox": True},
    {"type": "RandomFlip", "prob": 0.5},
]
FRAMES = [
    {"type": "UniformRefFrameSample", "num_ref_imgs": 1, "frame_range": 2},
    {
        "type": "TransformBroadcaster",
        "share_random_params": True,
        "transforms": [
            {"type": "LoadImageFromFile"},
            {"type": "LoadTrackAnnotations"},
            {"type": "RandomFlip", "prob": 0.5},
        ],
    },
    {"type": "PackTrackInputs"},
]


def kind_of(node):
    kind = (node or {}).get("type")
    return kind if isinstance(kind, str) or kind is None else kind.__name__


def signature(cfg):
    """What decides on the way of the data: loop, samplers, and data sets in their wrappers."""
    loader = cfg.train_dataloader

    def of(node):
        inner = node.get("datasets") or ([node["dataset"]] if "dataset" in node else [])
        return (
            (kind_of(node), tuple(sorted({of(i) for i in inner if i}, key=str)))
            if inner
            else leaf(node)
        )

    def leaf(node):
        return "video" if kind_of(node) in VIDEO else "images"

    return (
        kind_of(cfg.train_cfg) or ("epochs" if cfg.train_cfg.by_epoch else "iterations"),
        kind_of(loader.get("sampler")),
        kind_of(loader.get("batch_sampler")),
        of(loader.dataset),
    )


@functools.cache
def shipped():
    """Every config of mmdet that trains, and loads here, by its path."""
    configs = {}
    for path in sorted([*SHIPPED.rglob("*.py"), *Path(mmdet.__path__[0], "configs").rglob("*.py")]):
        if "_base_" in path.parts:
            continue
        try:
            cfg = Config.fromfile(path)
        except (ImportError, FileNotFoundError, AttributeError):  # of another library
            continue
        if cfg.get("train_dataloader") and cfg.get("train_cfg") and cfg.get("model"):
            configs[str(path)] = cfg
    return configs


@pytest.mark.slow
def test_a_step_of_every_kind_and_it_resumes_exactly(shapes, tmp_path):
    write_videos(shapes)
    kinds = {}
    for path, cfg in shipped().items():
        if "ReID" not in str(cfg.train_dataloader) and "DSDL" not in str(cfg.train_dataloader):
            kinds.setdefault(signature(cfg), (path, cfg))
    assert len(kinds) > 15
    failed = {}
    for number, (kind, (path, cfg)) in enumerate(kinds.items()):
        try:
            step(path, cfg, shapes, tmp_path / str(number))
        except (AssertionError, KeyError) as error:
            failed[kind] = f"{os.path.relpath(path, SHIPPED)}: {str(error)[-700:]}"
    assert not failed, "\n\n".join(f"{kind}\n{text}" for kind, text in failed.items())


def step(path, cfg, shapes, folder):
    """Train two steps through, and one and one; the ends are the same."""
    folder.mkdir()
    loader = cfg.train_dataloader.to_dict()
    loader["dataset"] = small(loader["dataset"], shapes)
    if "dataset_size" in loader["sampler"]:  # of more images than are drawn here
        sizes = [4 for _ in loader["sampler"]["dataset_size"]]
        loader["sampler"].update(dataset_size=sizes, ratio_mode=False)
    loader.update(num_workers=0, persistent_workers=False, pin_memory=False)
    loop = dict(cfg.train_cfg)
    by_epoch = not (kind_of(loop) == "IterBasedTrainLoop" or loop.get("by_epoch") is False)
    loop = {"by_epoch": by_epoch, **({"max_epochs": 1} if by_epoch else {"max_iters": 2})}
    if by_epoch:
        loader["num_batch_per_epoch"] = None
    config = {
        "custom_imports": {"imports": ["tests.launch.test_kinds", "tests.helpers.noisy_training"]},
        "default_scope": cfg.get("default_scope"),
        "model": {"type": "AnyBatch"},
        "train_dataloader": loader,
        "train_cfg": loop,
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}},
        "param_scheduler": [{"type": "ConstantLR", "by_epoch": False}],
        "default_hooks": {
            "checkpoint": {"type": "CheckpointHook", "interval": 1, "by_epoch": False}
        },
        "randomness": {"seed": 3},
    }
    Config(config).dump(folder / "whole.py")
    kill = [{"type": "mmengine.Kill", "iteration": 1}]
    Config({**config, "custom_hooks": kill}).dump(folder / "killed.py")
    (ended,) = train(folder / "whole.py", folder / "whole")
    assert ended.status == 0, ended.text[-1500:]
    (ended,) = train(folder / "killed.py", folder / "w")
    assert ended.status == -9, ended.text[-1500:]
    (ended,) = train(folder / "whole.py", folder / "w", "--resume")
    assert ended.status == 0, ended.text[-1500:]
    assert "not to the bit" not in ended.text
    assert torch.equal(
        last(folder / "w")["state_dict"]["weight"], last(folder / "whole")["state_dict"]["weight"]
    )


@pytest.mark.slow
def test_the_checks_refuse_no_config_whose_files_are_there(monkeypatch):
    """They know nothing of most kinds of data sets."""
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    for path in shipped():
        cfg = load_config(path, work_dir="w")
        check_data(cfg, "train", "val", "test")
        check_synchronised_norm(cfg, 1)
