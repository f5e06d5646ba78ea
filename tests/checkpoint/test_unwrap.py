"""One state dict, with the model's own names, out of whatever a project saves."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from psbn_mmdet.checkpoint import CheckpointError, state_dict_of
from tests.helpers.wrapped import PREFIXES, WRAPPINGS


@pytest.fixture
def state_dict():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).state_dict()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_and_prefix_gives_the_same_state_dict(wrapping, prefix, state_dict):
    found = state_dict_of(WRAPPINGS[wrapping](PREFIXES[prefix](state_dict)))
    assert list(found) == list(state_dict)
    for key, value in state_dict.items():
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("nothing", [{}, {"epoch": 1}, [1, 2], {"state_dict": {}}, None])
def test_no_state_dict(nothing):
    with pytest.raises(CheckpointError, match=r"a\.pth: holds no state dict"):
        state_dict_of(nothing, "a.pth")


A = {"a.weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"model": A, "net": A}, r"holds several state dicts \(model, net\)"),
        ({"generator": A, "critic": A}, "there are tensors under generator, critic"),
        ({"model": A, "b.weight": torch.ones(2)}, "in model and beside it \\(e.g. b.weight"),
        ({**A, "head": {"weight": torch.ones(2)}}, "tensors in head are in a container"),
        ({**A, "parts": [torch.ones(2)]}, "tensors in parts are in a container"),
        ({"model": {"a": A, "b": A}}, "there are tensors under a, b"),
        ({0: torch.ones(2)}, "a tensor is named 0"),
        ({**A, "module.a.weight": torch.ones(2), "a._orig_mod.weight": torch.ones(2)}, "twice"),
    ],
)
def test_what_could_mean_several_things_is_refused_in_one_line(checkpoint, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        state_dict_of(checkpoint, "a.pth")
    assert str(caught.value).startswith("a.pth: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beside", [{}, {"ema": {"a.weight": torch.zeros(2)}}])
@pytest.mark.parametrize("name", ["network", "net_state_dict", "detector"])
def test_one_container_under_an_unknown_name_is_taken(name, beside):
    optimizer = {
        "state": {"a.weight": {"exp_avg": torch.zeros(2)}},
        "by_number": {0: torch.ones(2)},
    }
    found = state_dict_of({"epoch": 3, "optimizer": optimizer, name: A, **beside})
    assert found.keys() == A.keys()
    assert torch.equal(found["a.weight"], A["a.weight"])
    assert state_dict_of({"saved": {name: A, **beside}}).keys() == A.keys()


def test_tensors_without_a_module_in_their_name_are_no_model():
    with pytest.raises(CheckpointError, match="there are tensors under pixels: save one of them"):
        state_dict_of({"pixels": {"mean": torch.zeros(3)}})


def test_a_name_that_only_begins_like_a_prefix_stays():
    names = ["module_list.0.weight", "modules.a", "my_orig_mod.weight"]
    assert list(state_dict_of({name: torch.ones(1) for name in names})) == names
    mixed = ["module.conv.weight", "head.weight"]  # the model has a part that is called so
    assert list(state_dict_of({name: torch.ones(1) for name in mixed})) == mixed


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_versions_of_modules_come_along(prefix, state_dict):
    """Modules convert state dicts of older versions; without its version one counts as old."""
    saved = OrderedDict((prefix + k, v) for k, v in state_dict.items())
    outer = prefix.split(".")[:-1]
    saved._metadata = OrderedDict(
        {
            **{".".join(outer[:depth]): {"version": 1} for depth in range(len(outer))},
            **{
                f"{prefix}{module}".rstrip("."): {"version": version}
                for module, version in [("", 7), ("0", 1), ("1", 2)]
            },
        }
    )
    found = state_dict_of({"state_dict": saved})._metadata
    assert {m: v["version"] for m, v in found.items()} == {"": 7, "0": 1, "1": 2}


def test_arrays_that_are_no_numbers_are_left_out():
    found = state_dict_of({**A, "names": np.array(["a", "b"]), "lr": 0.1})
    assert list(found) == ["a.weight"]
