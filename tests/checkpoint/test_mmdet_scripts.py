"""mmdet's own tools, unmodified, which know of this package by ``custom_imports`` alone."""

import json
import runpy
import sys
from pathlib import Path

import mmcv.cnn  # noqa: F401  registers BN
import mmdet
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn
from torch.utils.data import Dataset

from psbn_mmdet import to_psbn
from psbn_mmdet.checkpoint import CheckpointError, load
from tests.helpers.layers import randomize

X = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))


class OneConv(BaseModel):
    def __init__(self, norm_cfg, **kwargs):
        super().__init__(**kwargs)
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = MODELS.build(dict(num_features=4, **norm_cfg))

    def forward(self, inputs, mode="tensor"):
        out = self.norm(self.conv(torch.stack(inputs)))
        return {"loss": out.mean()} if mode == "loss" else [out.mean(dim=(0, 2, 3))]


class Images(Dataset):
    metainfo = {}  # noqa: RUF012

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"inputs": X[index]}


class Output(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return {f"channel_{i}": float(value) for i, value in enumerate(results[0])}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    for registry, cls in ((MODELS, OneConv), (DATASETS, Images), (METRICS, Output)):
        registry.register_module(module=cls, force=True)
    yield
    for registry, cls in ((MODELS, OneConv), (DATASETS, Images), (METRICS, Output)):
        registry.module_dict.pop(cls.__name__)


CONFIG = """
custom_imports = dict(imports="psbn_mmdet")
model = dict(type="mmengine.OneConv", norm_cfg=dict(type={norm!r}))
loader = dict(batch_size=4, dataset=dict(type="mmengine.Images"), drop_last=False,
              sampler=dict(type="DefaultSampler", shuffle=False),
              collate_fn=dict(type="pseudo_collate"))
train_dataloader = test_dataloader = loader
test_evaluator = dict(type="mmengine.Output")
test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.0))
default_hooks = dict(checkpoint=dict(type="CheckpointHook"))
experiment_name = {name!r}
"""


def script(name, norm, tmp_path, monkeypatch, *args):
    """mmdet's tools/NAME.py, as the command line runs it."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(norm=norm, name=f"{tmp_path.name}-{name}"))
    path = Path(mmdet.__path__[0], ".mim", "tools", f"{name}.py")
    work_dir = tmp_path / "work"
    monkeypatch.setattr(sys, "argv", [path.name, str(config), *args, "--work-dir", str(work_dir)])
    monkeypatch.setenv("LOCAL_RANK", "0")
    runpy.run_path(str(path), run_name="__main__")
    return work_dir


def saved(kind, path, save=torch.save):
    model = randomize(OneConv(dict(type="BN")))
    if kind == "psbn":
        to_psbn(model, alpha=0.3)
    save({"state_dict": model.state_dict()}, path)
    return model.eval()


def save_wrapped(content, path):
    """As another project does, with a log that mmengine cannot read under torch >= 2.6."""
    wrapped = {f"module._orig_mod.{k}": v for k, v in content["state_dict"].items()}
    torch.save({"model": wrapped, "message_hub": {"loss": HistoryBuffer([1.0], [1])}}, path)


ASKED = ("--cfg-options", "runner_type=psbn_mmdet.Runner")
"""What a command line adds for our Runner in mmdet's own scripts."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("asked", [(), ASKED], ids=["stock", "our Runner"])
@pytest.mark.parametrize("norm", ["BN", "psBN"])
@pytest.mark.parametrize("source", ["bn", "psbn"])
def test_what_was_saved_is_tested_and_trained(source, norm, asked, tmp_path, monkeypatch):
    model = saved(source, tmp_path / "a.pth", save_wrapped if asked else torch.save)
    with torch.no_grad():
        want = model(list(X))[0].tolist()
    work_dir = script("test", norm, tmp_path, monkeypatch, str(tmp_path / "a.pth"), *asked)
    (metrics,) = work_dir.glob("*/*.json")
    got = json.loads(metrics.read_text().splitlines()[-1])
    assert [got[f"channel_{i}"] for i in range(4)] == pytest.approx(want, abs=1e-4)

    options = (*(asked or ["--cfg-options"]), f"load_from={tmp_path / 'a.pth'}")
    trained = load(script("train", norm, tmp_path, monkeypatch, *options) / "epoch_1.pth")
    for key in ("conv.weight", "conv.bias", "norm.weight", "norm.bias"):
        torch.testing.assert_close(trained["state_dict"][key], model.state_dict()[key])


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_resumed_by_mmdets_script_where_the_config_asks_for_it(tmp_path, monkeypatch):
    script("train", "psBN", tmp_path, monkeypatch)
    more = (*ASKED, "train_cfg.max_epochs=2")
    resumed = script("train", "psBN", tmp_path, monkeypatch, "--resume", *more)
    assert load(resumed / "epoch_2.pth")["meta"]["epoch"] == 2
    assert (
        len(load(resumed / "epoch_2.pth")["message_hub"]["log_scalars"]["train/loss"]._log_history)
        == 2
    )


@pytest.mark.filterwarnings("ignore")
def test_testing_half_a_checkpoint_is_refused_where_the_config_asks_for_it(tmp_path, monkeypatch):
    torch.save({"conv.weight": torch.ones(4, 3, 1, 1)}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError,
        match=r"a.pth: 5 tensors are missing .*\(e.g. conv.bias\)",
    ):
        script("test", "BN", tmp_path, monkeypatch, str(tmp_path / "a.pth"), *ASKED)
