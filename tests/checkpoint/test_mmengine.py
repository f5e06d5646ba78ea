"""What mmengine loads, by every way into a model, is what was checked, or it is refused."""

import os
import pickle
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel, BaseModule, BaseTTAModel
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint, load_state_dict
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn

from psbn_mmdet import psBN2d
from psbn_mmdet.checkpoint import CheckpointError
from psbn_mmdet.checkpoint.loaders import CheckpointGuard
from tests.helpers.distributed import run as run_distributed
from tests.helpers.layers import randomize
from tests.helpers.malicious import Malicious
from tests.helpers.paths import ROOT
from tests.helpers.wrapped import PREFIXES, WRAPPINGS

NORMS = {"bn": nn.BatchNorm2d, "psbn": lambda c: psBN2d(c, alpha=0.3)}


class Tiny(BaseModel):
    def __init__(self, norm, **kwargs):
        super().__init__(**kwargs)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[norm](4))
        self.module_list = nn.ModuleList([nn.Conv2d(4, 2, 1)])  # which "^module." matches

    def forward(self, inputs, mode="tensor"):
        return self.module_list[0](self.backbone(inputs))


X = torch.randn(2, 3, 4, 4)


def computes(model):
    with torch.no_grad():
        return model.eval()(X)


# -- ways in -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runners(tmp_path_factory):
    """One Runner for each kind of norm; making one takes a while, loading into it does not."""
    folder = tmp_path_factory.mktemp("work")
    return {
        (norm, strict): guarded(
            Runner(Tiny(norm), str(folder), experiment_name=norm + str(strict)), strict
        )
        for norm in NORMS
        for strict in (False, True, None)
    }


def guarded(runner, strict):
    if strict is not None:
        runner.register_hook(CheckpointGuard(strict), priority="VERY_HIGH")
    return runner


def by_runner(strict):
    def load(norm, path, runners):
        runner = runners[norm, strict]
        runner.model.load_state_dict(Tiny(norm).state_dict())
        runner.load_checkpoint(path)
        return runner.model

    return load


def by_function(norm, path, runners):
    """init_detector, and the detectors of mmdet that take a checkpoint."""
    model = Tiny(norm)
    load_checkpoint(model, path)
    return model


def by_init_cfg(norm, path, runners):
    model = Tiny(norm, init_cfg=dict(type="Pretrained", checkpoint=path))
    model.init_weights()
    return model


def by_init_cfg_of_parts(norm, path, runners):
    model = Tiny(norm)
    for name in ("backbone", "module_list"):
        part = BaseModule(dict(type="Pretrained", checkpoint=path, prefix=name))
        for key, child in getattr(model, name).named_children():
            part.add_module(key, child)
        part.init_weights()
    return model


def by_hand(norm, path, runners):
    """Backbones that read by the loader and load by themselves (Swin, PVT)."""
    model = Tiny(norm)
    load_state_dict(model, CheckpointLoader.load_checkpoint(path, "cpu")["state_dict"])
    return model


def by_test_time_augmentation(norm, path, runners):
    model = Tiny(norm)

    class TTA(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            return data_samples_list

    load_checkpoint(TTA(model), path)
    return model


WAYS_IN = {
    "mmdet's own script": by_runner(None),
    "tools/train.py": by_runner(False),
    "tools/test.py": by_runner(True),
    "load_checkpoint": by_function,
    "init_cfg": by_init_cfg,
    "init_cfg with prefix": by_init_cfg_of_parts,
    "by hand": by_hand,
    "test-time augmentation": by_test_time_augmentation,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way_in", WAYS_IN)
@pytest.mark.parametrize("into", NORMS)
@pytest.mark.parametrize("source", NORMS)
def test_a_model_computes_what_the_saved_one_did_or_is_refused(
    source, into, way_in, runners, tmp_path
):
    saved = randomize(Tiny(source))
    want = computes(saved)
    path = str(tmp_path / "a.pth")
    for wrap in WRAPPINGS.values():
        for prefix in PREFIXES.values():
            torch.save(wrap(prefix(saved.state_dict())), path)
            if (source, into) == ("psbn", "bn"):
                with pytest.raises(CheckpointError, match=r"a.pth: it is a psBN checkpoint") as e:
                    WAYS_IN[way_in](into, path, runners)
                assert "\n" not in str(e.value)
            else:
                model = WAYS_IN[way_in](into, path, runners)
                torch.testing.assert_close(computes(model), want)


@pytest.mark.parametrize("way_in", WAYS_IN)
def test_what_fits_nowhere_is_refused_by_every_way_in(way_in, runners, tmp_path):
    state_dict = {f"student.{k}": v for k, v in Tiny("bn").state_dict().items()}
    torch.save({"state_dict": state_dict}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a.pth: (none of its|no tensor's name begins)"):
        WAYS_IN[way_in]("bn", str(tmp_path / "a.pth"), runners)


def test_testing_and_resuming_take_all_or_nothing(runners, tmp_path):
    part = {k: v for k, v in Tiny("bn").state_dict().items() if "module_list" not in k}
    torch.save({"state_dict": part, "meta": {}, "message_hub": {}}, tmp_path / "a.pth")
    by_runner(False)("bn", str(tmp_path / "a.pth"), runners)  # finetuning takes a backbone
    with pytest.raises(CheckpointError, match="2 tensors are missing, as module_list"):
        by_runner(True)("bn", str(tmp_path / "a.pth"), runners)
    resumed = runners["bn", False]
    resumed._resume = True
    try:
        with pytest.raises(CheckpointError, match="2 tensors are missing, as module_list"):
            by_runner(False)("bn", str(tmp_path / "a.pth"), runners)
        torch.save(Tiny("bn").state_dict(), tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=r"has no meta.*cannot be resumed"):
            by_runner(False)("bn", str(tmp_path / "a.pth"), runners)
        wrong = {f"module.{k}": v for k, v in Tiny("psbn").state_dict().items()}
        content = {"state_dict": Tiny("bn").state_dict(), "meta": {}, "message_hub": {}}
        torch.save({**content, "ema_state_dict": wrong}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="its ema_state_dict: it is a psBN checkpoint"):
            by_runner(False)("bn", str(tmp_path / "a.pth"), runners)
    finally:
        resumed._resume = False


def test_ema_hook_takes_a_raw_state_dict(tmp_path):
    from mmengine.hooks import EMAHook

    runner = guarded(Runner(Tiny("psbn"), str(tmp_path), experiment_name="ema"), False)
    hook = EMAHook()
    runner.register_hook(hook)
    hook.before_run(runner)
    saved = randomize(Tiny("bn"))
    torch.save(saved.state_dict(), tmp_path / "a.pth")
    runner.load_checkpoint(str(tmp_path / "a.pth"))
    for model in (runner.model, hook.ema_model.module):
        torch.testing.assert_close(computes(model), computes(saved))


# -- schemes -------------------------------------------------------------------------


def retrying(filename, map_location=None):
    """As onedl-mmengine reads: without code first, and then with it."""
    path = filename.partition("://")[2]
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        return torch.load(path, map_location=map_location, weights_only=False)


SCHEMES = {
    "": "{path}",
    "http://": "http://localhost/a.pth",
    "https://": "https://localhost/a.pth",
    "torchvision://": "torchvision://resnet50",
    "modelzoo://": "modelzoo://resnet50",
    "open-mmlab://": "open-mmlab://detectron/resnet50_caffe",
    "openmmlab://": "openmmlab://detectron/resnet50_caffe",
    "mmcls://": "mmcls://vgg11",
    "pavi://": "pavi://a.pth",
    r"(\S+\:)?s3://": "s3://bucket/a.pth",
    r"(\S+\:)?petrel://": "petrel://bucket/a.pth",
    "retrying://": "retrying://{path}",
}


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A file that every scheme leads to."""
    path = tmp_path / "a.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, to, *args: shutil.copy(path, to)
    )
    storage = SimpleNamespace(get=lambda name: path.read_bytes())
    monkeypatch.setattr(mmengine_checkpoint, "get_file_backend", lambda *args, **kwargs: storage)
    pavi = ModuleType("pavi")
    stored = SimpleNamespace(name="a.pth", download=lambda to: shutil.copy(path, to))
    pavi.modelcloud = SimpleNamespace(get=lambda name: stored)
    monkeypatch.setitem(sys.modules, "pavi", pavi)
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    CheckpointLoader.register_scheme("retrying://", retrying)
    return path


def test_every_scheme_of_mmengine_is_in_the_table():
    assert CheckpointLoader._schemes.keys() | {"retrying://"} == SCHEMES.keys()


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loading_by_every_scheme_runs_no_code(scheme, forced, remote, tmp_path, monkeypatch):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    source = SCHEMES[scheme].format(path=remote)
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Malicious(tmp_path / "ran")}, remote)
    before = dict(os.environ)
    with pytest.raises(CheckpointError, match="nothing in it was run") as caught:
        CheckpointLoader.load_checkpoint(source)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert dict(os.environ) == before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_loads_what_is_there(scheme, remote):
    prefix = "backbone." if scheme == "mmcls://" else ""
    torch.save({"model": {f"{prefix}a.weight": torch.ones(2)}}, remote)
    source = SCHEMES[scheme].format(path=remote)
    loaded = CheckpointLoader.load_checkpoint(source, map_location="cpu")
    assert loaded.keys() == {"state_dict"}
    assert torch.equal(loaded["state_dict"]["a.weight"], torch.ones(2))


def test_an_unknown_scheme_is_refused():
    with pytest.raises(CheckpointError, match="the scheme mmpose:// is unknown"):
        CheckpointLoader.load_checkpoint("mmpose://a.pth")


def download(rank, fails):
    """Rank 0 downloads for all on one disk; what each process ends with."""
    calls = []

    def save(url, to, *args):
        calls.append(rank)
        if fails:
            raise OSError("no route")
        torch.save({"a.weight": torch.ones(2)}, to)

    torch.hub.download_url_to_file = save  # in this process, which ends here
    try:
        CheckpointLoader.load_checkpoint("https://localhost/a.pth")
    except CheckpointError as error:
        return calls, str(error)
    return calls, None


@pytest.mark.parametrize("fails", [True, False])
def test_of_two_processes_one_downloads_and_both_end_alike(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (first, error), (second, other) = run_distributed(download, 2, tmp_path, fails)
    assert (first, second) == ([0], [])
    assert error == other
    assert (error is not None) == fails
    assert not fails or "https://localhost/a.pth: could not be downloaded (no route)" in error


# -- from the plain import on ----------------------------------------------------------

PROGRAM = """
import sys
{imports}
from mmengine.runner import CheckpointLoader, load_state_dict, runner
from tests.helpers.malicious import Malicious
import mmengine.runner.checkpoint as c, torch
for function in (load_state_dict, c.load_state_dict, c._load_checkpoint_with_prefix,
                 c._load_checkpoint_to_model, runner._load_checkpoint_to_model,
                 CheckpointLoader.load_checkpoint):
    assert function.__module__ == "psbn_mmdet.checkpoint.install", function
torch.save(Malicious(sys.argv[1] + "/ran"), sys.argv[1] + "/a.pth")
try:
    CheckpointLoader.load_checkpoint(sys.argv[1] + "/a.pth")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "imports",
    ["import psbn_mmdet", "import mmengine.runner, psbn_mmdet"],
)
def test_whatever_is_imported_first(imports, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(imports=imports), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing in it was run" in done.stdout
    assert not (tmp_path / "ran").exists()


def test_importing_costs_no_mmdet():
    code = "import psbn_mmdet, sys; print([m for m in ('mmdet', 'mmcv', 'mmengine.runner', \
'mmengine.hooks', 'matplotlib', 'plotly', 'numba') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_importing_twice_is_harmless():
    import importlib

    import psbn_mmdet
    from psbn_mmdet.registry import MODELS

    before = MODELS.get("psbn_mmdet.psBN")
    importlib.reload(psbn_mmdet)
    assert MODELS.get("psbn_mmdet.psBN") is before is psBN2d
