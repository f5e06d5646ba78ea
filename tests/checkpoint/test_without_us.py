"""A psBN checkpoint, opened where this package cannot be imported, computes what was trained."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from psbn_mmdet import to_psbn
from tests.helpers.layers import randomize

PROGRAM = """
import sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "psbn_mmdet":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nowhere())
import torch
from torch import nn

folder = sys.argv[1]
x = torch.load(f"{folder}/x.pth", weights_only=True)
model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
if sys.argv[2] == "torch":
    checkpoint = torch.load(f"{folder}/a.pth", weights_only=True)
    model.load_state_dict(checkpoint["state_dict"], strict=False)
elif sys.argv[2] == "mmengine":
    from mmengine.runner import load_checkpoint
    load_checkpoint(model, f"{folder}/a.pth", map_location="cpu")
else:
    from mmengine.model import BaseModule
    part = BaseModule(dict(type="Pretrained", checkpoint=f"{folder}/a.pth", prefix="backbone"))
    part.conv, part.norm = model
    part.init_weights()
assert "psbn_mmdet" not in sys.modules
torch.save(model(x).detach(), f"{folder}/out.pth")
"""


@pytest.mark.parametrize("way", ["torch", "mmengine", "init_cfg with prefix"])
def test_a_psbn_checkpoint_computes_the_same(way, tmp_path):
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model = to_psbn(model, alpha=0.3).eval()
    state_dict = model.state_dict()
    if way.startswith("init_cfg"):
        names = {"0": "backbone.conv", "1": "backbone.norm"}
        state_dict = {names[k[0]] + k[1:]: v for k, v in state_dict.items()}
    x = torch.randn(2, 3, 4, 4)
    torch.save({"state_dict": state_dict}, tmp_path / "a.pth")
    torch.save(x, tmp_path / "x.pth")
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), way]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = torch.load(tmp_path / "out.pth", weights_only=True)
    torch.testing.assert_close(out, model(x).detach())
