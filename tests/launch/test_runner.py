"""Our Runner: a model computes what the saved one did, or the checkpoint is refused in a line."""

import shutil
import subprocess
import sys

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel, BaseModule, BaseTTAModel
from mmengine.runner import CheckpointLoader
from mmengine.runner import Runner as MMEngineRunner
from torch import nn

from psbn_mmdet import psBN2d
from psbn_mmdet.checkpoint import CheckpointError, load, load_weights
from psbn_mmdet.launch.runner import Runner, load_from_disk_or_web, read, resolve
from tests.helpers.distributed import run as run_distributed
from tests.helpers.layers import randomize
from tests.helpers.malicious import EVIL, Malicious
from tests.helpers.paths import ROOT
from tests.helpers.wrapped import PREFIXES, WRAPPINGS

NORMS = {"bn": nn.BatchNorm2d, "psbn": lambda c: psBN2d(c, alpha=0.3)}
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Tiny(BaseModel):
    def __init__(self, norm, **kwargs):
        super().__init__(**kwargs)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[norm](4))
        self.module_list = nn.ModuleList([nn.Conv2d(4, 2, 1)])  # which "^module." matches

    def forward(self, inputs, mode="tensor"):
        return self.module_list[0](self.backbone(inputs))


class TTA(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


def computes(model):
    with torch.no_grad():
        return model.eval()(X)


@pytest.fixture(autouse=True)
def _own_schemes(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))


@pytest.fixture(scope="module")
def runners(tmp_path_factory):
    """One Runner for each kind of norm; making one takes a while, loading into it does not."""
    folder = tmp_path_factory.mktemp("work")
    return {norm: Runner(Tiny(norm), str(folder), experiment_name=norm) for norm in NORMS}


@pytest.fixture
def loads(runners, monkeypatch):
    """Load a file into the Runner of a kind of norm; the model that came out."""

    def load(norm, path, **state):
        runner = runners[norm]
        runner.model.load_state_dict(Tiny(norm).state_dict())
        for name, value in state.items():
            monkeypatch.setattr(runner, name, value)
        runner.load_checkpoint(str(path))
        return runner.model

    return load


# -- into a model ----------------------------------------------------------------------


@pytest.mark.parametrize("state", [{}, {"_whole": True}], ids=["train", "test"])
@pytest.mark.parametrize("into", NORMS)
@pytest.mark.parametrize("source", NORMS)
def test_a_model_computes_what_the_saved_one_did(source, into, state, loads, tmp_path):
    saved = randomize(Tiny(source))
    want = computes(saved)
    path = tmp_path / "a.pth"
    for wrap in WRAPPINGS.values():
        for prefix in PREFIXES.values():
            torch.save(wrap(prefix(saved.state_dict())), path)
            torch.testing.assert_close(computes(loads(into, path, **state)), want)


def test_what_fits_nowhere_is_refused(loads, tmp_path):
    state_dict = {f"student.{k}": v for k, v in Tiny("bn").state_dict().items()}
    torch.save({"state_dict": state_dict}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"a.pth: no tensor of the checkpoint matches the model \(student"
    ):
        loads("bn", tmp_path / "a.pth")


def test_testing_and_resuming_take_all_or_nothing(loads, tmp_path):
    path = tmp_path / "a.pth"
    part = {k: v for k, v in Tiny("bn").state_dict().items() if "module_list" not in k}
    torch.save({"state_dict": part, "meta": {}, "message_hub": {}}, path)
    loads("bn", path)  # finetuning takes a backbone
    for state in ({"_whole": True}, {"_whole": False, "_resume": True}):
        with pytest.raises(CheckpointError, match=r"2 tensors are missing .*module_list"):
            loads("bn", path, **state)
    torch.save(Tiny("bn").state_dict(), path)
    with pytest.raises(CheckpointError, match=r"has no meta.*cannot be resumed"):
        loads("bn", path, _resume=True)
    average = {f"module.{k}": v for k, v in part.items()}
    content = {"state_dict": Tiny("bn").state_dict(), "meta": {}, "message_hub": {}}
    torch.save({**content, "ema_state_dict": average}, path)
    with pytest.raises(
        CheckpointError, match=r"ema_state_dict and state_dict belong to different.*module_list"
    ):
        loads("bn", path, _resume=True)


def test_testing_and_validating_ask_for_all(tmp_path, monkeypatch):
    for name in ("test", "val"):
        runner = Runner(Tiny("bn"), str(tmp_path), experiment_name=name)
        monkeypatch.setattr(MMEngineRunner, name, lambda self: self._whole)
        assert not runner._whole
        assert getattr(runner, name)()


def test_what_did_not_fit_is_logged(runners, tmp_path, caplog):
    state_dict = Tiny("bn").state_dict()
    state_dict["module_list.0.bias"] = torch.ones(7)
    torch.save({**state_dict, "head.weight": torch.ones(1)}, tmp_path / "a.pth")
    logged = []
    runner = runners["bn"]
    runner.logger.addFilter(lambda record: logged.append(record.getMessage()) or True)
    runner.load_checkpoint(str(tmp_path / "a.pth"))
    (amiss,) = [line for line in logged if "does not fit the model completely" in line]
    assert "size mismatch for module_list.0.bias" in amiss
    assert "1 tensors are not in the model: head.weight" in amiss


def test_names_are_revised_as_a_caller_asks(runners, tmp_path):
    saved = randomize(Tiny("bn"))
    renamed = {f"net_{k}": v for k, v in saved.state_dict().items()}
    torch.save(renamed, tmp_path / "a.pth")
    runners["bn"].load_checkpoint(str(tmp_path / "a.pth"), revise_keys=[("^net_", "")], strict=True)
    torch.testing.assert_close(computes(runners["bn"].model), computes(saved))


def test_ema_hook_takes_a_raw_state_dict(tmp_path):
    runner = Runner(Tiny("psbn"), str(tmp_path), experiment_name="ema")
    hook = EMAHook()
    runner.register_hook(hook)
    hook.before_run(runner)
    saved = randomize(Tiny("bn"))
    torch.save(saved.state_dict(), tmp_path / "a.pth")
    runner.load_checkpoint(str(tmp_path / "a.pth"))
    for model in (runner.model, hook.ema_model.module):
        torch.testing.assert_close(computes(model), computes(saved))


def test_wrappers_of_a_model_are_seen_through(tmp_path):
    saved = randomize(Tiny("psbn"))
    model = Tiny("psbn")
    load_weights(TTA(model), saved.state_dict())
    torch.testing.assert_close(computes(model), computes(saved))


class Teacher(BaseModel):
    """As mmdet's SemiBaseDetector takes the checkpoint of a detector: for both of its own."""

    def __init__(self, norm):
        super().__init__()
        self.student, self.teacher = Tiny(norm), Tiny(norm)

    def forward(self, inputs):
        return self.teacher(inputs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in [k for k in state_dict if not k.startswith(("student.", "teacher."))]:
            value = state_dict.pop(key)
            state_dict.update({f"{name}.{key}": value for name in ("student", "teacher")})
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.parametrize("into", NORMS)
@pytest.mark.parametrize("source", NORMS)
def test_a_semi_supervised_detector_takes_a_detector(source, into):
    saved, model = randomize(Tiny(source)), Teacher(into)
    load_weights(model, saved.state_dict())
    for part in (model.student, model.teacher):
        torch.testing.assert_close(computes(part), computes(saved))
    old = {k: v for k, v in saved.state_dict().items() if k != "backbone.1.bias"}  # before 0.2
    if (source, into) == ("psbn", "bn"):
        for strict in (True, False):
            with pytest.raises(CheckpointError, match="would lose its bias"):
                load_weights(Teacher(into), old, strict=strict)


# -- reading -----------------------------------------------------------------------------

STOCK = CheckpointLoader._schemes[""]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("evil", ["array over bytes", "getattr", "class"])
def test_what_a_pretrained_backbone_carries_is_not_run(evil, runners, tmp_path):
    content = {"state_dict": {"a.weight": torch.ones(1)}, "meta": EVIL[evil]()}
    torch.save(content, tmp_path / "a.pth")
    part = BaseModule(dict(type="Pretrained", checkpoint=str(tmp_path / "a.pth")))
    Runner(Tiny("bn"), str(tmp_path), experiment_name=evil)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        part.init_weights()


def test_a_config_within_a_checkpoint_is_not_run(tmp_path):
    """Stock mmengine runs the text of ``meta["config"]`` when it resumes."""
    from tests.helpers.toy_runner import make_runner

    make_runner(tmp_path / "a", [], iterations=4).train()
    (saved, *_) = (tmp_path / "a").glob("iter_*.pth")
    checkpoint = load(saved)
    checkpoint["meta"]["config"] = f"x = __import__('os').mkdir({str(tmp_path / 'ran')!r})"
    torch.save(checkpoint, tmp_path / "evil.pth")
    runner = make_runner(
        tmp_path / "b", [], iterations=4, load_from=str(tmp_path / "evil.pth"), resume=True
    )
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.load_or_resume()
    assert runner.iter == checkpoint["meta"]["iter"]
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A file that every URL leads to, and the URLs that were asked for."""
    urls, path = [], tmp_path / "a.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path))

    def download(url, to, *args):
        urls.append(url)
        shutil.copy(path, to)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return path, urls


TORCHVISION = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
SOURCES = {
    "https://localhost/a.pth": "https://localhost/a.pth",
    "torchvision://resnet50": TORCHVISION,
    "modelzoo://resnet50": TORCHVISION,
    "open-mmlab://detectron/resnet50_caffe": "resnet50_caffe-788b5fa3.pth",
    "open-mmlab://resnet50_caffe": "resnet50_caffe-788b5fa3.pth",  # its name of before
    "openmmlab://detectron/resnet50_caffe": "resnet50_caffe-788b5fa3.pth",
    "mmcls://vgg11": "vgg11_batch256_imagenet_20210208-4271cd6c.pth",
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_name_of_mmengine_is_read_as_data(source, downloads, tmp_path):
    path, urls = downloads
    prefix = "backbone." if source.startswith("mmcls") else ""
    content = {"meta": {"a": 1}, "state_dict": {f"{prefix}a.weight": torch.ones(2)}}
    torch.save(content, path)
    got = read(source)
    assert urls[0].endswith(SOURCES[source])
    assert got["state_dict"].keys() == {"a.weight"}
    assert prefix or got["meta"] == {"a": 1}
    shutil.rmtree(tmp_path / "home")
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Malicious(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        read(source)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_name_is_refused_and_another_scheme_left_alone():
    for unknown in ("torchvision://no", "open-mmlab://no", "mmcls://no"):
        with pytest.raises(CheckpointError, match="does not know this name"):
            resolve(unknown)
    with pytest.raises(CheckpointError, match=r"no\.pth: no such file"):
        read("no.pth")
    with pytest.raises(FileNotFoundError):
        load_from_disk_or_web("no.pth")
    assert CheckpointLoader._get_checkpoint_loader("s3://a").__name__ == "load_from_ceph"


def test_a_loader_that_was_registered_stays(tmp_path):
    def own(filename, map_location):
        return {"state_dict": {"a": torch.ones(1)}}

    CheckpointLoader.register_scheme("", own, force=True)
    Runner(Tiny("bn"), str(tmp_path), experiment_name="own")
    assert CheckpointLoader._schemes[""] is own
    assert read("anything.pth") == own("", "")


def test_the_content_is_what_mmengines_own_loaders_return(tmp_path):
    """Whatever it is: sister libraries look for other keys than state_dict."""
    for content in ({"model": {"a": 1}}, torch.ones(3), {"generator": {}, "epoch": 1}, [1]):
        torch.save(content, tmp_path / "a.pth")
        stock, ours = STOCK(str(tmp_path / "a.pth"), "cpu"), read(str(tmp_path / "a.pth"))
        assert type(stock) is type(ours)
        assert str(stock) == str(ours)


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
        read("https://localhost/a.pth")
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


# -- the plain import ------------------------------------------------------------------

PROGRAM = """
import sys
{imports}
import mmengine.hooks, mmengine.runner.checkpoint as c
from mmengine.runner import CheckpointLoader, runner
for function in (c.load_state_dict, c._load_checkpoint_with_prefix, c._load_checkpoint_to_model,
                 c.load_checkpoint, *CheckpointLoader._schemes.values(),
                 CheckpointLoader.load_checkpoint, runner.Runner.load_checkpoint):
    assert function.__module__.startswith("mmengine."), function
assert not [f for f in sys.meta_path if type(f).__module__.startswith("psbn_mmdet")]
"""


@pytest.mark.parametrize(
    "imports",
    ["import psbn_mmdet", "import mmengine.runner, psbn_mmdet", "import psbn_mmdet.registry",
     "import psbn_mmdet.launch.runner"],
)  # fmt: skip
def test_importing_changes_nothing_of_mmengine(imports):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(imports=imports)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
