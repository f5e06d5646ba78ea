import pytest
import torch

from studies.demo.drawn_shapes import write_shapes
from tests.helpers import forked
from tests.helpers.layers import randomize
from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def _leave_no_process():
    yield
    forked.kill_all()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=32, val=8)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A file of the name, keys and shapes of torchvision's resnet50, in a hub cache of its own."""
    from mmdet.models import ResNet

    state_dict = randomize(ResNet(50)).state_dict()
    state_dict.update({"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)})
    home = tmp_path_factory.mktemp("torch_home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state_dict, home / "hub" / "checkpoints" / "resnet50-0676ba61.pth")
    return home
