"""Files and URLs of every kind are read without running what they carry, or refused in a line."""

import functools
import http.server
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn

from psbn_mmdet.checkpoint import CheckpointError, is_whole, load, state_dict_of
from tests.helpers.malicious import Malicious


@pytest.fixture
def state_dict():
    return nn.Conv2d(2, 3, 1).state_dict()


def test_pth_and_safetensors(state_dict, tmp_path):
    from safetensors.torch import save_file

    torch.save({"state_dict": state_dict}, tmp_path / "a.pth")
    torch.save(state_dict, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    save_file(dict(state_dict), tmp_path / "a.safetensors")
    for name in ("a.pth", "b.pth", "a.safetensors"):
        tensors = state_dict_of(load(tmp_path / name))
        assert tensors.keys() == state_dict.keys()
        assert torch.equal(tensors["weight"], state_dict["weight"])
        on_meta = state_dict_of(load(tmp_path / name, "meta"))
        assert all(tensor.is_meta for tensor in on_meta.values())


# -- files that are none -----------------------------------------------------------


def bad_file(kind, tmp_path, state_dict):
    path = tmp_path / f"{kind}.pth"
    if kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "empty":
        path.touch()
    elif kind == "code":
        torch.save({"state_dict": state_dict, "x": Malicious(tmp_path / "ran")}, path)
    elif kind == "legacy_code":
        torch.save(Malicious(tmp_path / "ran"), path, _use_new_zipfile_serialization=False)
    elif kind == "plain_pickle":
        path.write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    elif kind == "detectron_pickle":
        path.write_bytes(pickle.dumps({"model": {"a.weight": np.ones(3)}}, protocol=2))
    elif kind == "model":
        torch.save(nn.Conv2d(1, 1, 1), path)
    elif kind == "torchscript":
        torch.jit.script(nn.Conv2d(1, 1, 1)).save(str(path))
    elif kind == "directory":
        path.mkdir()
    elif kind == "safetensors":
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"\x00" * 20)
    elif kind == "shard":
        path = tmp_path / "model-00001-of-00002.bin"
        torch.save(state_dict, path)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("directory", "is a folder; name one file"),
        ("text", "is not a PyTorch checkpoint"),
        ("empty", "is cut off or damaged"),
        ("code", r"refused: it contains posix.mkdir.*nothing in it was run"),
        ("legacy_code", r"refused: it contains posix.mkdir"),
        ("plain_pickle", r"refused: it contains posix.mkdir|is not a PyTorch checkpoint"),
        ("detectron_pickle", "is not a PyTorch checkpoint"),
        ("model", r"refused: it contains torch.nn.modules.conv.Conv2d.*state_dict\(\)"),
        ("torchscript", "TorchScript archive"),
        ("safetensors", "not a complete safetensors file"),
        ("shard", "one of several shards; join them"),
    ],
)
def test_bad_files_get_one_line_and_run_nothing(kind, message, tmp_path, state_dict):
    path = bad_file(kind, tmp_path, state_dict)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_is_whole_up_to_its_last_byte(zipped, state_dict, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(state_dict, path, _use_new_zipfile_serialization=zipped)
    assert is_whole(path)
    data = path.read_bytes()
    for length in {0, 1, 5, 20, len(data) - 1, *range(30, len(data), 60)}:
        path.write_bytes(data[:length])
        assert not is_whole(path)
        with pytest.raises(CheckpointError, match="is cut off or damaged") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_what_is_refused_for_its_content_is_whole(tmp_path):
    for zipped in (True, False):
        path = tmp_path / "a.pth"
        torch.save(Malicious(tmp_path / "ran"), path, _use_new_zipfile_serialization=zipped)
        assert is_whole(path)
    cut = tmp_path / "refused.pth"
    cut.write_bytes(path.read_bytes()[:-1])
    assert not is_whole(cut)
    assert not is_whole(tmp_path / "none.pth")
    assert not is_whole(tmp_path)
    assert not (tmp_path / "ran").exists()


# -- URLs and names ------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder, and the address it is served at."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_url_is_kept_in_the_hub_cache(state_dict, server):
    folder, address = server
    torch.save(state_dict, folder / "a.pth")
    assert load(f"{address}/a.pth").keys() == state_dict.keys()
    with pytest.raises(CheckpointError, match=r"no.pth: could not be downloaded.*by hand"):
        load(f"{address}/no.pth")
    (folder / "a.pth").unlink()
    assert load(f"{address}/a.pth").keys() == state_dict.keys()


def test_files_of_one_name_from_different_urls_are_different(server):
    folder, address = server
    for kind, value in [("r50", 50.0), ("r101", 101.0)]:
        (folder / kind).mkdir()
        torch.save({"a.weight": torch.tensor(value)}, folder / kind / "model.pth")
    for _ in range(2):  # downloaded, and from the cache
        assert load(f"{address}/r50/model.pth")["a.weight"] == 50
        assert load(f"{address}/r101/model.pth")["a.weight"] == 101
    torch.save({"a.weight": torch.tensor(1.0)}, folder / "model.pth")
    assert load(f"{address}/model.pth?version=2")["a.weight"] == 1


def test_a_checksum_in_a_name_is_checked(state_dict, server, tmp_path):
    folder, address = server
    torch.save(state_dict, folder / "a-00000000.pth")
    with pytest.raises(CheckpointError, match="invalid hash value") as caught:
        load(f"{address}/a-00000000.pth")
    by_hand = tmp_path / str(caught.value).split("put the file at ")[1].split(" by hand")[0]
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes((folder / "a-00000000.pth").read_bytes())
    assert load(f"{address}/a-00000000.pth").keys() == state_dict.keys()


def test_a_cut_off_download_says_where_it_is_kept(state_dict, server, tmp_path):
    folder, address = server
    torch.save(state_dict, folder / "a.pth")
    (folder / "a.pth").write_bytes((folder / "a.pth").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"kept at .*a\.pth\): is cut off") as caught:
        load(f"{address}/a.pth")
    assert str(tmp_path / "home") in str(caught.value)


def test_a_date_is_no_checksum(state_dict, server):
    folder, address = server
    torch.save(state_dict, folder / "res50-20200709.pth")
    assert load(f"{address}/res50-20200709.pth").keys() == state_dict.keys()


def test_what_torch_hub_has_is_taken_where_nothing_can_be_downloaded(state_dict, server, tmp_path):
    _, address = server
    cached = tmp_path / "home" / "hub" / "checkpoints" / "a.pth"
    cached.parent.mkdir(parents=True)
    torch.save(state_dict, cached)
    with pytest.warns(UserWarning, match=r"could not be downloaded.*using .*a\.pth"):
        assert load(f"{address}/a.pth").keys() == state_dict.keys()


def test_other_schemes_are_refused():
    for source in ("torchvision://resnet50", "s3://a.pth", "ftp://a.pth"):
        with pytest.raises(CheckpointError, match="neither a path nor a URL"):
            load(source)
