"""Loading runs nothing, conversion of state dicts is that of models, whole files are told apart."""

import functools
import http.server
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from psbn_mmdet import checkpoint, psBN2d, to_bn, to_psbn
from psbn_mmdet.checkpoint import (
    CheckpointError,
    bn_state_dict,
    is_whole,
    latest_whole,
    load,
    mismatch,
    psbn_state_dict,
    state_dict_of,
)
from tests.helpers.layers import randomize
from tests.helpers.malicious import Malicious


@pytest.fixture
def state_dict():
    return nn.Conv2d(2, 3, 1).state_dict()


def test_pth_and_safetensors(state_dict, tmp_path):
    from safetensors.torch import save_file

    torch.save({"state_dict": state_dict}, tmp_path / "a.pth")
    save_file(dict(state_dict), tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        found = state_dict_of(load(tmp_path / name))
        assert found.keys() == state_dict.keys()
        assert torch.equal(found["weight"], state_dict["weight"])


def test_url_is_kept_in_the_hub_cache(state_dict, tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    torch.save(state_dict, served / "a.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.pth"
        assert load(url).keys() == state_dict.keys()
        with pytest.raises(CheckpointError, match=r"no.pth: could not be downloaded.*by hand"):
            load(f"http://127.0.0.1:{server.server_port}/no.pth")
        server.shutdown()
    assert load(url).keys() == state_dict.keys()  # no server any more


def bad_file(kind, tmp_path, state_dict):
    path = tmp_path / f"{kind}.pth"
    if kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "empty":
        path.touch()
    elif kind == "cut_off":
        torch.save(state_dict, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "cut_off_early":
        torch.save(state_dict, path)
        path.write_bytes(path.read_bytes()[:5])
    elif kind == "code":
        torch.save({"state_dict": state_dict, "x": Malicious(tmp_path / "ran")}, path)
    elif kind == "legacy_code":
        torch.save(Malicious(tmp_path / "ran"), path, _use_new_zipfile_serialization=False)
    elif kind == "plain_pickle":
        path.write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    elif kind == "model":
        torch.save(nn.Conv2d(1, 1, 1), path)
    elif kind == "torchscript":
        torch.jit.script(nn.Conv2d(1, 1, 1)).save(str(path))
    elif kind == "directory":
        path.mkdir()
    elif kind == "safetensors":
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"\x00" * 20)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("directory", "no such file"),
        ("text", "is no checkpoint of torch"),
        ("empty", "is cut off or damaged"),
        ("cut_off", "is cut off or damaged"),
        ("cut_off_early", "is cut off or damaged"),
        ("code", r"refused, since it carries posix.mkdir.*nothing in it was run"),
        ("legacy_code", r"refused, since it carries posix.mkdir"),
        ("plain_pickle", r"refused|is no checkpoint"),
        ("model", r"refused, since it carries torch.nn.modules.conv.Conv2d.*state_dict\(\)"),
        ("torchscript", "TorchScript archive"),
        ("safetensors", "no whole safetensors file"),
    ],
)
def test_bad_files_get_one_line_and_run_nothing(kind, message, tmp_path, state_dict):
    path = bad_file(kind, tmp_path, state_dict)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_getattr_reaches_only_the_methods_of_a_log_history(tmp_path):
    from mmengine.logging import HistoryBuffer

    class Reach:
        def __reduce__(self):
            return getattr, (HistoryBuffer, "__init__")

    torch.save(Reach(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="refused"):
        load(tmp_path / "a.pth")
    history = HistoryBuffer([1.0, 3.0], [1, 1])
    torch.save({"a": history, "b": np.float64(2.0)}, tmp_path / "b.pth")
    loaded = load(tmp_path / "b.pth")
    assert loaded["a"].mean() == 2.0
    assert loaded["b"] == 2.0


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "params"])
def test_state_dict_of_finds_the_tensors(key, state_dict):
    wrapped = {"epoch": 3, "optimizer": {"state": {}}, key: state_dict | {"flag": 1}}
    assert state_dict_of(wrapped).keys() == state_dict.keys()
    assert state_dict_of(state_dict).keys() == state_dict.keys()


@pytest.mark.parametrize("nothing", [{}, {"epoch": 1}, [1, 2], {"state_dict": {}}, None])
def test_state_dict_of_nothing(nothing):
    with pytest.raises(CheckpointError, match=r"a\.pth: holds no state dict"):
        state_dict_of(nothing, "a.pth")


# -- conversion ----------------------------------------------------------------


def network():
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    return randomize(nn.Sequential(body, nn.GroupNorm(2, 4), nn.BatchNorm2d(4)))


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert_close(a[key], b[key], rtol=0, atol=0)


@pytest.mark.parametrize("load_bn", ["preserve", "shift"])
def test_state_dicts_convert_as_models_do(load_bn):
    model = network()
    bn = {k: v.clone() for k, v in model.state_dict().items()}
    psbn = psbn_state_dict(bn, alpha=0.3, load_bn=load_bn)
    same(psbn, to_psbn(model, alpha=0.3, load_bn=load_bn).state_dict())
    same(bn_state_dict(psbn), to_bn(model).state_dict())


def test_a_psbn_state_dict_is_rebased():
    model = to_psbn(network(), alpha=0.3)
    psbn = {k: v.clone() for k, v in model.state_dict().items()}
    same(psbn_state_dict(psbn, alpha=0.1), to_psbn(model, alpha=0.1).state_dict())


def test_a_single_layer_without_prefix():
    layer = randomize(nn.BatchNorm2d(3))
    psbn = psbn_state_dict(layer.state_dict())
    assert {"beta", "alpha", "weight"} <= psbn.keys()
    assert_close(bn_state_dict(psbn)["bias"], layer.bias.detach())


def test_nothing_to_convert(state_dict):
    with pytest.raises(CheckpointError, match="no BatchNorm"):
        psbn_state_dict(state_dict)
    with pytest.raises(CheckpointError, match="no psBN layer"):
        bn_state_dict(nn.BatchNorm2d(3).state_dict())


# -- fitting ---------------------------------------------------------------------


def test_mismatch_names_what_would_go_wrong():
    bn, psbn = network(), to_psbn(network())
    assert mismatch(bn, bn.state_dict(), strict=True) is None
    assert mismatch(psbn, psbn.state_dict(), strict=True) is None
    assert mismatch(psbn, bn.state_dict(), strict=True) is None
    for strict in (True, False):
        reason = mismatch(bn, psbn.state_dict(), strict)
        assert "psBN checkpoint" in reason
        assert "0.1 is a BatchNorm2d" in reason
    fewer = {k: v for k, v in bn.state_dict().items() if not k.startswith("2.")}
    assert mismatch(psbn, fewer, strict=False) is None
    assert "6 tensors are missing" not in mismatch(bn, fewer, strict=True)
    assert mismatch(bn, fewer, strict=True).startswith("4 tensors are missing, as 2.weight")
    other = bn.state_dict() | {"2.weight": torch.ones(5)}
    assert "1 tensors have another shape, as 2.weight: (5,) instead of (4,)" in mismatch(
        bn, other, strict=True
    )
    more = bn.state_dict() | {"9.weight": torch.ones(5)}
    assert "1 tensors have no place in the model, as 9.weight" in mismatch(bn, more, strict=True)
    assert mismatch(bn, more, strict=False) is None


def test_latest_whole_checkpoint(tmp_path):
    assert latest_whole(tmp_path) is None
    for number in (2, 9, 10):
        torch.save(nn.Linear(9, 9).state_dict(), tmp_path / f"epoch_{number}.pth")
        os.utime(tmp_path / f"epoch_{number}.pth", (number, number))
    torch.save({}, tmp_path / "best_coco_epoch_11.pth")
    assert latest_whole(tmp_path) == tmp_path / "epoch_10.pth"
    data = (tmp_path / "epoch_10.pth").read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):  # killed while writing
        (tmp_path / "epoch_10.pth").write_bytes(data[:length])
        os.utime(tmp_path / "epoch_10.pth", (10, 10))
        assert not is_whole(tmp_path / "epoch_10.pth")
        assert latest_whole(tmp_path) == tmp_path / "epoch_9.pth"


def test_importing_costs_no_mmdet():
    import subprocess
    import sys

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
    assert checkpoint.load is load
