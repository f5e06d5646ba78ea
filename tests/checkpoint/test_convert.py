"""State dicts convert as models do, all of a file or none, by the tool as by the functions."""

import ast
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from psbn_mmdet import psIN2d, to_bn, to_psbn
from psbn_mmdet.checkpoint import (
    CheckpointError,
    bn_config,
    bn_state_dict,
    convert_all,
    load,
    psbn_state_dict,
    state_dict_of,
)
from psbn_mmdet.norm.recognize import norm_kinds
from tests.helpers.disk import files_no_larger_than
from tests.helpers.layers import randomize
from tests.helpers.tools import Main
from tests.helpers.wrapped import PREFIXES, WRAPPINGS


def network():
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    return randomize(nn.Sequential(body, nn.GroupNorm(2, 4), nn.BatchNorm2d(4)))


def copied(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert_close(a[key], b[key], rtol=0, atol=0)


def test_state_dicts_convert_as_models_do():
    model = network()
    bn = copied(model)
    psbn = psbn_state_dict(bn, alpha=0.3)
    same(psbn, to_psbn(model, alpha=0.3).state_dict())
    same(bn_state_dict(psbn), to_bn(model).state_dict())


def test_a_psbn_state_dict_is_rebased():
    model = to_psbn(network(), alpha=0.3)
    psbn = psbn_state_dict(copied(model), alpha=0.1)
    # A file's alpha is float32(0.3), the model's 0.3: half a unit in the last place of beta.
    assert_close(psbn, dict(to_psbn(model, alpha=0.1).state_dict()))


def test_the_order_of_the_keys_does_not_matter():
    bn = copied(network())
    psbn = psbn_state_dict(bn)
    for seed in range(5):
        keys = random.Random(seed).sample(list(bn), len(bn))
        shuffled = psbn_state_dict({key: bn[key] for key in keys})
        same(shuffled, psbn)
        keys = random.Random(seed).sample(list(psbn), len(psbn))
        same(bn_state_dict({key: psbn[key] for key in keys}), bn_state_dict(psbn))


def test_a_single_layer_without_prefix():
    layer = randomize(nn.BatchNorm2d(3))
    psbn = psbn_state_dict(layer.state_dict())
    assert {"beta", "alpha", "weight"} <= psbn.keys()
    assert_close(bn_state_dict(psbn)["bias"], layer.bias.detach())


def test_nothing_to_convert():
    with pytest.raises(CheckpointError, match="no BatchNorm"):
        psbn_state_dict(nn.Conv2d(2, 3, 1).state_dict())
    with pytest.raises(CheckpointError, match="no psBN layer"):
        bn_state_dict(nn.BatchNorm2d(3).state_dict())


@pytest.mark.parametrize("lost", ["weight", "bias", "running_mean", "running_var"])
def test_a_part_of_a_bn_layer_is_refused(lost):
    shard = {k: v for k, v in copied(network()).items() if k != f"2.{lost}"}
    with pytest.raises(CheckpointError, match=r"layer 2 is incomplete: .*one of several shards"):
        psbn_state_dict(shard)


@pytest.mark.parametrize("lost", ["weight", "beta", "alpha"])
def test_a_part_of_a_psbn_layer_is_refused(lost):
    shard = {k: v for k, v in copied(to_psbn(network())).items() if k != f"2.{lost}"}
    if lost != "beta":
        for change in (psbn_state_dict, bn_state_dict):
            with pytest.raises(CheckpointError, match=r"layer 2 is incomplete: .*several shards"):
                change(shard)
    else:
        with pytest.raises(CheckpointError, match=r"layer 2 is incomplete: .*several shards"):
            psbn_state_dict(shard)


def test_layers_without_parameters_are_no_parts():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, affine=False), nn.PReLU(3)
    )
    assert psbn_state_dict(copied(model)).keys() == to_psbn(model).state_dict().keys()


# -- whole files ---------------------------------------------------------------------


def kinds(content):
    """The kinds of layers in all state dicts of a checkpoint."""
    if isinstance(content, (list, tuple)):
        return set().union(*map(kinds, content)) if content else set()
    if not isinstance(content, dict):
        return set()
    own = {
        k: torch.as_tensor(v)
        for k, v in content.items()
        if isinstance(v, (torch.Tensor, np.ndarray))
    }
    return {*norm_kinds(own).values()}.union(*map(kinds, content.values()))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_state_dict_of_a_file_is_converted(wrapping, prefix):
    model = network()
    checkpoint = WRAPPINGS[wrapping](PREFIXES[prefix](copied(model)))
    assert kinds(checkpoint) == {"bn", "unknown"}  # the latter the GroupNorm
    psbn, there = convert_all(checkpoint, psbn_state_dict, {"bn", "psbn"})
    assert kinds(psbn) == {"psbn", "unknown"}
    assert psbn.keys() == checkpoint.keys() or wrapping in ("nothing", "flags")
    same(state_dict_of(psbn), to_psbn(model).state_dict())
    bn, back = convert_all(psbn, bn_state_dict, {"psbn"})
    assert kinds(bn) == {"bn", "unknown"}
    same(state_dict_of(bn), to_bn(model).state_dict())
    assert there == back
    assert kinds(checkpoint) == {"bn", "unknown"}  # as it was


def test_all_else_of_a_file_stays():
    state_dict = network().state_dict()
    checkpoint = {"state_dict": state_dict, "meta": {"a": [1, (2, 3)]}, "models": [state_dict, 3]}
    changed, places = convert_all(checkpoint, psbn_state_dict, {"bn", "psbn"})
    assert places == ["state_dict", "models[0]"]
    assert changed["meta"] is checkpoint["meta"]
    assert changed["models"][1] == 3
    assert changed["state_dict"]._metadata == state_dict._metadata
    nothing, places = convert_all({"meta": checkpoint["meta"]}, psbn_state_dict, {"bn", "psbn"})
    assert (nothing, places) == ({"meta": checkpoint["meta"]}, [])


# -- the tool ------------------------------------------------------------------------


@pytest.fixture
def convert(capsys):
    return Main("convert_checkpoint", capsys)


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema", "params_ema"])
def test_an_average_beside_the_weights_is_converted_too(average, tmp_path, convert):
    model, other = network(), network()
    torch.save({"model": copied(model), average: copied(other), "epoch": 3}, tmp_path / "a.pth")
    done = convert(tmp_path / "a.pth", tmp_path / "b.pth", "--to=psbn", "--alpha=0.25")
    assert f"converted too: {average}" in done.stdout
    assert "dropped (training state): epoch" in done.stdout
    written = load(tmp_path / "b.pth")
    assert written.keys() == {"model", average}
    same(written["model"], to_psbn(model, 0.25).state_dict())
    same(written[average], to_psbn(other, 0.25).state_dict())


def test_instance_normalization_goes_back_and_says_what_stayed(tmp_path, convert):
    model = nn.Sequential(psIN2d(3), psIN2d(3, track_running_stats=True))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    done = convert(tmp_path / "a.pth", tmp_path / "b.pth", "--to=bn")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 layers are now BN" in done.stdout
    same(load(tmp_path / "b.pth"), to_bn(model).state_dict())
    done = convert(tmp_path / "b.pth", tmp_path / "c.pth", "--to=psbn")
    assert "1 layers are now psBN" in done.stdout
    assert "1 layers without running statistics are unchanged (e.g. 0)" in done.stdout


def test_nothing_is_replaced_unless_asked_for(tmp_path, convert):
    model = network()
    torch.save(copied(model), tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    args = [tmp_path / "a.pth", tmp_path / "a.pth", "--to=psbn"]
    assert "--overwrite" in convert.refuses(*args)
    assert (tmp_path / "a.pth").read_bytes() == before
    assert convert(*args, "--overwrite").returncode == 0
    same(load(tmp_path / "a.pth"), to_psbn(model).state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("name", ["b.pth", "b.safetensors"])
def test_a_full_disk_loses_nothing(name, tmp_path, convert):
    torch.save(copied(network()), tmp_path / "a.pth")
    out = tmp_path / name
    out.write_text("old")
    with files_no_larger_than(100):
        message = convert.refuses(tmp_path / "a.pth", out, "--to=psbn", "--overwrite")
    assert f"{out}: cannot be written (" in message
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.weight": torch.ones(2)}, "holds no BatchNorm layer"),
        ({"model": {"a": torch.ones(2)}, "net": {"a": torch.ones(2)}}, "several state dicts"),
        ({"parts": [{"a": torch.ones(2)}]}, "there are tensors under parts"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(content, message, tmp_path, convert):
    torch.save(content, tmp_path / "a.pth")
    assert message in convert.refuses(tmp_path / "a.pth", tmp_path / "b.pth", "--to=psbn")
    assert not (tmp_path / "b.pth").exists()


CONFIG = """
custom_imports = dict(imports=['psbn_mmdet.registry', 'mine'], allow_failed_imports=False)
custom_hooks = [
    dict(type='SparsityLoggerHook', interval=500),
    dict(type='EMAHook', momentum=0.1),
    dict(shift=True, type='psbn_mmdet.PsBNHook'),
    dict(type='ReviveFilters', interval=9),
]
model = dict(
    type='RetinaNet',
    backbone=dict(norm_cfg=dict(type='psBN', alpha=0.2, requires_grad=True), alpha=3),
    neck={'norm_cfg': {'type': 'psbn_mmdet.psSyncBN'}},
    head=[dict(type='psIN2d', alpha=0.1), ('psBN', 1)])
runner_type = 'psbn_mmdet.Runner'
work_dir = './psbn'
"""
CONVERTED = """
custom_imports = dict(imports=['mine'], allow_failed_imports=False)
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
model = dict(
    type='RetinaNet',
    backbone=dict(norm_cfg=dict(type='BN', requires_grad=True), alpha=3),
    neck={'norm_cfg': {'type': 'SyncBN'}},
    head=[dict(type='IN2d'), ('psBN', 1)])
work_dir = './psbn'
"""


def test_the_config_of_a_checkpoint_becomes_one_of_bn():
    assert ast.dump(ast.parse(bn_config(CONFIG))) == ast.dump(ast.parse(CONVERTED))
    wrapped = "model = dict(type='psbn_mmdet.ToPsBN', of='RetinaNet', alpha=0.2, depth=50)"
    assert bn_config(wrapped) == "model = dict(type='RetinaNet', depth=50)\n"


def test_a_config_without_psbn_keeps_its_text():
    for text in (CONVERTED, "", "a = [1,  2]  # as written\n"):
        assert bn_config(text) == text


def test_a_config_is_not_run(tmp_path):
    text = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nmodel = dict(type='psBN')\n"
    assert "type='BN'" in bn_config(text)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match="not a Python program"):
        bn_config("model = dict(")


def test_frozen_batch_norms_stay():
    bn, frozen = nn.BatchNorm2d(3).state_dict(), nn.BatchNorm2d(3).state_dict()
    del frozen["num_batches_tracked"]
    both = {
        **{f"bn.{k}": v for k, v in bn.items()},
        **{f"frozen.{k}": v for k, v in frozen.items()},
    }
    converted = psbn_state_dict(both)
    assert {k.rpartition(".")[2] for k in converted if k.startswith("bn.")} >= {"beta", "alpha"}
    same({k: v for k, v in converted.items() if k.startswith("frozen.")},
         {k: v for k, v in both.items() if k.startswith("frozen.")})  # fmt: skip
    assert "beta" in psbn_state_dict(frozen)  # where nothing counts batches, it may be an old BN


def test_the_tool_makes_a_checkpoint_of_bn(tmp_path, convert):
    """Opened by a model of the config that it carries, it computes what was trained."""
    model = to_psbn(network(), alpha=0.3)
    checkpoint = {"state_dict": model.state_dict(), "meta": {"cfg": CONFIG, "epoch": 1}}
    torch.save(checkpoint, tmp_path / "psbn.pth")
    done = convert(tmp_path / "psbn.pth", tmp_path / "bn.pth", "--to", "bn")
    assert "meta.cfg, the config, now uses BN" in done.stdout
    converted = load(tmp_path / "bn.pth")
    assert "ps" not in converted["meta"]["cfg"].replace("'psBN', 1", "").replace("./psbn", "")
    assert converted["meta"]["epoch"] == 1
    bn = network()
    bn.load_state_dict(converted["state_dict"])
    x = torch.randn(2, 3, 4, 4)
    assert_close(bn.eval()(x), model.eval()(x))
