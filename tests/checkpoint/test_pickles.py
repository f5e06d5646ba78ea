"""What checkpoints hold is read as it was saved, and what they must not hold does nothing."""

import io
import math
import pickle
import random
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from torch import nn

from psbn_mmdet.checkpoint import CheckpointError, load
from psbn_mmdet.checkpoint.read import RefusedError
from tests.helpers.malicious import EVIL
from tests.helpers.paths import ROOT

NAMES = """bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128
uint16 float8_e4m3fn float8_e5m2"""
DTYPES = {name: getattr(torch, name) for name in NAMES.split() if hasattr(torch, name)}
BASE = torch.arange(24.0)


def odd_tensor():
    tensor = torch.ones(2)
    tensor.said = "something"  # saved by another function than other tensors
    return tensor


def state_dict():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).state_dict()


VALUES = {
    "plain": lambda: {
        "none": None, "flags": [True, False], "numbers": [0, -1, 255, 65536, -(2**40), 2**100, 0.1],
        "text": ["", "a", "ä", "\U0001f600" * 300], "more": [b"", b"a\xff", bytearray(b"b"), 1j],
        "inf": [math.inf, -math.inf], 3: {"a": (1, (2, 3), [4])}, ("a", 1): {1, 2},
        "sets": [set(), {"a"}, frozenset({1})], "counts": Counter("aab"),
    },
    "state_dict": state_dict,
    "ordered": lambda: OrderedDict(a=OrderedDict(b=1)),
    "parameter": lambda: [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), False)],
    "needs gradient": lambda: torch.ones(2, requires_grad=True),
    "attributes": odd_tensor,
    "views": lambda: [BASE, BASE[3:9], BASE.view(4, 6).t(), BASE[::5], BASE[:0]],
    "scalar and empty": lambda: [torch.tensor(3), torch.empty(0), torch.empty(2, 0, 3)],
    "expanded": lambda: torch.ones(1).expand(10, -1),
    **{name: lambda d=d: (torch.arange(6) / 5).to(d) for name, d in DTYPES.items()},
    "types": lambda: [torch.float16, torch.int64, torch.device("cuda:1"), torch.Size([2, 3])],
    "arrays": lambda: [np.arange(6.0).reshape(2, 3), np.arange(6).reshape(2, 3).T, np.zeros((0, 4)),
                       np.array(3), np.array(["a", "bc"]), np.array([b"a"]), np.array([True]),
                       np.arange(3, dtype=">i4"), np.float32(2), np.int64(3), np.bool_(True),
                       np.str_("x"), np.ones(2, np.complex64), np.ones(2, np.float16)],
    "long log": lambda: [HistoryBuffer(np.zeros(9000), np.ones(9000, int)) for _ in range(9)],
    "log": lambda: {"loss": HistoryBuffer([1.0, 2.0], [1, 3])},
    "config": lambda: ConfigDict(a=1, b=[ConfigDict(c=2)]),
    "one-cycle": lambda: {"anneal": OneCycleParamScheduler._annealing_cos},
}  # fmt: skip
WAYS = {"zip": {}, **{f"protocol {p}": {"pickle_protocol": p} for p in (3, 4, 5)}}
WAYS["legacy"] = {"_use_new_zipfile_serialization": False}


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert a.requires_grad == b.requires_grad
        bytes_of = [t.detach().contiguous().view(-1).view(torch.uint8).tolist() for t in (a, b)]
        assert a.shape == b.shape
        assert bytes_of[0] == bytes_of[1]
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.flags.writeable
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, HistoryBuffer):
        assert_same({k: v for k, v in vars(a).items() if k != "statistics_methods"},
                    {k: v for k, v in vars(b).items() if k != "statistics_methods"})  # fmt: skip
        assert a.mean() == b.mean()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
    elif isinstance(a, (list, tuple)) and not isinstance(a, torch.Size):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", VALUES)
def test_what_is_saved_is_read(value, way, tmp_path):
    saved = VALUES[value]()
    torch.save({"x": saved}, tmp_path / "a.pth", **WAYS[way])
    assert_same(load(tmp_path / "a.pth")["x"], saved)
    on_meta = load(tmp_path / "a.pth", "meta")["x"]
    if isinstance(saved, torch.Tensor):
        assert on_meta.is_meta
        assert on_meta.stride() == saved.stride()


def test_tensors_that_share_memory_still_do(tmp_path):
    for way in WAYS.values():
        torch.save({"a": BASE, "b": BASE[3:]}, tmp_path / "a.pth", **way)
        read = load(tmp_path / "a.pth")
        read["a"][3] = 77
        assert read["b"][0] == 77


def test_a_log_with_methods_of_its_own_is_read(tmp_path, monkeypatch):
    """By mmengine's ``register_statistics``; what the file names is not called."""
    monkeypatch.setattr(
        HistoryBuffer, "_statistics_methods", dict(HistoryBuffer._statistics_methods)
    )
    HistoryBuffer.register_statistics(state_dict)
    torch.save({"loss": HistoryBuffer([1.0], [1])}, tmp_path / "a.pth")
    monkeypatch.setattr(HistoryBuffer, "_statistics_methods", {})
    assert load(tmp_path / "a.pth")["loss"].current() == 1.0
    assert state_dict not in HistoryBuffer._statistics_methods.values()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["zip", "legacy", "protocol 4"])
@pytest.mark.parametrize("evil", EVIL)
def test_what_is_evil_is_refused_and_takes_no_memory(evil, way, tmp_path):
    content = {"state_dict": {"w": torch.zeros(1)}, "meta": EVIL[evil]()}
    torch.save(content, tmp_path / "evil.pth", **WAYS[way])
    del content
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "evil.pth")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 100 * (tmp_path / "evil.pth").stat().st_size + 1_000_000


@pytest.mark.parametrize(
    "code", [b"(S'id'\nios\nsystem\n.", b"(cos\nsystem\nS'id'\no.", b"\x82\x01."]
)
def test_other_ways_to_call_are_refused(code, tmp_path):
    """Opcodes that torch.save does not write: INST, OBJ, EXT."""
    path = tmp_path / "a.pth"
    torch.save({}, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + code)
    with pytest.raises(RefusedError):
        load(path)


def test_a_zip_bomb_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps("a" * 10**7))
    with pytest.raises(CheckpointError, match="is a zip archive that"):
        load(path)


def test_torchs_list_for_the_process_stays_as_it_was():
    """Also what others read by ``torch.load`` after importing us."""
    program = """
import numpy as np, io, pickle, torch, os
before, environment = set(torch.serialization.get_safe_globals()), dict(os.environ)
import psbn_mmdet, psbn_mmdet.checkpoint
file = io.BytesIO()
torch.save({"meta": np.ones(1)}, file)
psbn_mmdet.checkpoint.load.__module__
assert set(torch.serialization.get_safe_globals()) == before
assert dict(os.environ) == environment
file.seek(0)
try:
    torch.load(file, weights_only=True)
except pickle.UnpicklingError:
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("refused\n", 0), done.stderr


def test_reading_does_not_depend_on_the_environment(tmp_path, monkeypatch):
    file = io.BytesIO()
    torch.save({"meta": EVIL["getattr"]()}, file)
    (tmp_path / "a.pth").write_bytes(file.getvalue())
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(RefusedError):
        load(tmp_path / "a.pth")


def fuzz(first, count):
    """A process of limited memory; it ends with 0 if none of the pickles did harm."""
    command = [sys.executable, "-m", "tests.helpers.pickle_programs", str(count), str(first)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_random_pickles_of_allowed_names_do_no_harm():
    done = fuzz(first=0, count=4000)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "'read'" in done.stdout  # not all of them are refused


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_in_a_line(tmp_path):
    rng, reasons = random.Random(0), set()
    content = {"state_dict": state_dict(), "meta": {"log": HistoryBuffer([1.0], [1]), "s": {"a"}}}
    for way in WAYS.values():
        torch.save(content, tmp_path / "whole.pth", **way)
        whole = (tmp_path / "whole.pth").read_bytes()
        for _ in range(300):
            damaged = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            (tmp_path / "a.pth").write_bytes(damaged)
            try:
                load(tmp_path / "a.pth")
            except CheckpointError as error:
                reasons.add(str(error))
    assert reasons
    assert not any("\n" in reason for reason in reasons)
