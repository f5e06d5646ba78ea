"""A checkpoint is loaded if, and only if, the model's own layers load all of it."""

import copy
import itertools

import pytest
import torch
from torch import nn

from psbn_mmdet import psBN2d, psIN2d, psSyncBN, to_psbn
from psbn_mmdet.checkpoint import CheckpointError, load_weights
from tests.helpers.layers import randomize


def network():
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    return randomize(nn.Sequential(body, nn.GroupNorm(2, 4), nn.BatchNorm2d(4)))


LAYERS = {
    "BN": nn.BatchNorm2d,
    "BN without parameters": lambda c: nn.BatchNorm2d(c, affine=False),
    "BN without statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "SyncBN": nn.SyncBatchNorm,
    "IN": lambda c: nn.InstanceNorm2d(c, affine=True),
    "IN with statistics": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "GN": lambda c: nn.GroupNorm(1, c),
    "psBN": psBN2d,
    "psBN of another alpha": lambda c: psBN2d(c, alpha=0.3),
    "psBN without statistics": lambda c: psBN2d(c, track_running_stats=False),
    "psIN": psIN2d,
    "psIN with statistics": lambda c: psIN2d(c, track_running_stats=True),
    "psSyncBN": psSyncBN,
}


def around(layer):
    return nn.Sequential(nn.Conv2d(3, 4, 1), LAYERS[layer](4))


def changes(state_dict):
    """A state dict, and each with one thing wrong."""
    yield dict(state_dict)
    yield dict(reversed(state_dict.items()))
    for key in state_dict:
        yield {k: v for k, v in state_dict.items() if k != key}
        yield {**state_dict, key: torch.ones(5)}
    yield {**state_dict, "1.bias": torch.ones(4)}
    yield {**state_dict, "1.beta": torch.ones(4), "1.alpha": torch.tensor(0.1)}
    yield {**state_dict, "1.alpha": torch.tensor(float("nan"))}
    yield {**state_dict, "2.weight": torch.ones(4)}
    yield {}


def mismatch(model, state_dict, strict=True):
    """What load_weights says into a copy of a model, without the name; None if it loads."""
    try:
        load_weights(copy.deepcopy(model), state_dict, "a.pth", strict=strict)
    except CheckpointError as error:
        reason = str(error).removeprefix("a.pth: ")
    else:
        return None
    assert "\n" not in reason
    return reason


def loads(model, state_dict):
    try:
        copy.deepcopy(model).load_state_dict(state_dict)
    except RuntimeError:
        return False
    return True


# changes() alters bias alone, too, which psBN says
@pytest.mark.filterwarnings("ignore:1. in 4 of 4 channels of the checkpoint bias is not")
@pytest.mark.parametrize(("into", "source"), list(itertools.product(LAYERS, repeat=2)))
def test_all_is_loaded_if_and_only_if_torch_loads_it_strictly(into, source):
    model = around(into)
    for state_dict in changes(around(source).state_dict()):
        if not state_dict:
            continue
        of_use = dict(state_dict)  # torch refuses a surplus one of the others
        if "1.num_batches_tracked" not in model.state_dict():
            of_use.pop("1.num_batches_tracked", None)
        if "1.beta" not in model.state_dict() and "1.bias" in state_dict:
            of_use.pop("1.beta", None), of_use.pop("1.alpha", None)
        loaded, by_torch = copy.deepcopy(model), copy.deepcopy(model)
        try:
            by_torch.load_state_dict(of_use)
        except RuntimeError:
            assert mismatch(model, state_dict) is not None
        else:
            load_weights(loaded, state_dict)
            for a, b in zip(loaded.state_dict().values(), by_torch.state_dict().values()):
                assert torch.equal(a, b)


def test_the_reason_says_what_would_go_wrong():
    bn, psbn = network(), to_psbn(network())
    assert mismatch(psbn, bn.state_dict(), strict=True) is None
    for strict in (True, False):
        assert mismatch(bn, psbn.state_dict(), strict) is None
        old = {k: v for k, v in psbn.state_dict().items() if k not in ("0.1.bias", "2.bias")}
        reason = mismatch(bn, old, strict)
        assert "psBN checkpoint, and the model's 0.1 is not psBN" in reason
    fewer = {k: v for k, v in bn.state_dict().items() if not k.startswith("2.")}
    assert mismatch(psbn, fewer, strict=False) is None
    assert mismatch(bn, fewer, strict=True).startswith(
        "4 tensors are missing from the checkpoint (e.g. 2.weight)"
    )
    other = {**bn.state_dict(), "2.weight": torch.ones(5)}
    assert mismatch(bn, other, strict=True).startswith(
        "1 tensors cannot be loaded (e.g. size mismatch for 2.weight"
    )
    assert mismatch(bn, other, strict=False) is None
    more = {**bn.state_dict(), "9.weight": torch.ones(5)}
    assert "1 tensors of the checkpoint are not in the model (e.g. 9.weight)" in mismatch(
        bn, more, strict=True
    )
    assert mismatch(bn, more, strict=False) is None
    with pytest.raises(CheckpointError, match=r"^a.pth: 4 tensors are missing"):
        load_weights(bn, {"model": fewer}, "a.pth")


@pytest.mark.parametrize("strict", [True, False])
def test_what_fits_nowhere_is_refused(strict):
    model = network()
    elsewhere = {f"student.{k}": v for k, v in model.state_dict().items()}
    first = next(iter(model.state_dict()))
    why = f"(student.{first} there, {first} here); wrong config?"
    assert f"no tensor of the checkpoint matches the model {why}" in mismatch(
        model, elsewhere, strict
    )
    wider = {k: torch.ones(9) for k in model.state_dict() if "tracked" not in k}
    shape = tuple(model.state_dict()[first].shape)
    assert f"({first} is (9,) there, {shape} here)" in mismatch(model, wider, strict)


class Preprocessed(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.net = network()
        self.preprocessor = nn.Module()
        self.preprocessor.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), False)


def test_tensors_that_mean_nothing_to_the_model_are_passed_over():
    model = Preprocessed([1.0, 2.0, 3.0])
    extra = {
        "preprocessor.mean": torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1),
        "ema_net_0_0_weight": torch.ones(4),  # MMDetection 2
        "net.0.0.num_batches_tracked": torch.tensor(3),
    }
    assert mismatch(model, {**model.state_dict(), **extra}, strict=True) is None


def test_constants_that_differ_from_the_models_are_refused():
    model = Preprocessed([1.0, 2.0, 3.0])
    state_dict = {**model.state_dict(), "preprocessor.mean": torch.tensor([0.5, 2.0, 3.0])}
    reason = mismatch(model, state_dict, strict=True)
    assert (
        reason == "preprocessor.mean is (0.5, 2, 3) in the checkpoint and (1, 2, 3) in the config"
    )


def test_a_shared_layer_and_a_wrapped_model():
    shared = network()
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert mismatch(model, model.state_dict(), strict=True) is None
    assert mismatch(nn.DataParallel(shared), shared.state_dict(), strict=True) is None


def test_a_lazy_model_gets_its_shapes():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    built = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    load_weights(model, built.state_dict())
    assert torch.equal(model[0].weight, built[0].weight)


def test_what_a_models_own_hooks_allow_is_allowed():
    model = network()

    def needs_no_norm(module, keys):
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith("2.")]

    fewer = {k: v for k, v in model.state_dict().items() if not k.startswith("2.")}
    assert mismatch(model, fewer, strict=True) is not None
    model.register_load_state_dict_post_hook(needs_no_norm)
    assert mismatch(model, fewer, strict=True) is None
    assert loads(model, fewer)
