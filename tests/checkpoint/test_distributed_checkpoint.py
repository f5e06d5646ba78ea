"""BN and psBN through ``torch.distributed.checkpoint``: what was saved is what is computed."""

import itertools
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from psbn_mmdet import to_psbn
from psbn_mmdet.checkpoint import psbn_state_dict
from tests.helpers.distributed import run

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def network(kind, seed):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*net.parameters(), net[1].running_mean, net[1].running_var):
        tensor.data.uniform_(0.5, 2, generator=generator)
    return (net if kind == "bn" else to_psbn(net, {"psbn": 0.3, "other alpha": 0.1}[kind])).eval()


KINDS = ("bn", "psbn", "other alpha")


@pytest.mark.parametrize(("source", "into"), list(itertools.product(KINDS, ("psbn", "bn"))))
def test_a_full_state_dict_is_taken_by_another_kind(source, into):
    """With torch's default, strict: it adds what the model has and the file has not."""
    saved, model = network(source, 0), network(into, 1)
    state_dict = dict(saved.state_dict())
    if into == "bn":
        state_dict = {k: v for k, v in state_dict.items() if k in model.state_dict()}
    set_model_state_dict(model, state_dict, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(model(X), saved(X))


@pytest.mark.parametrize(("source", "into"), list(itertools.product(KINDS, ("psbn", "bn"))))
def test_a_checkpoint_folder_is_read_by_another_kind(source, into, tmp_path):
    saved, model = network(source, 0), network(into, 1)
    dcp.save(get_model_state_dict(saved), checkpoint_id=tmp_path, no_dist=True)
    state_dict = get_model_state_dict(model)
    planner = DefaultLoadPlanner(allow_partial_load=source == "bn")
    dcp.load(state_dict, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    set_model_state_dict(model, state_dict)
    torch.testing.assert_close(model(X), saved(X))


def sharded(rank, source):
    """A psBN model in shards takes a file, and gives it back whole."""
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    model = network("psbn", 1)
    fully_shard(model)
    options = StateDictOptions(full_state_dict=True)
    state_dict = dict(network(source, 0).state_dict())
    if source == "bn":  # torch cuts up what the model has by name, which bias is not
        state_dict = psbn_state_dict(state_dict)
    set_model_state_dict(model, state_dict, options=options)
    whole = get_model_state_dict(model, options=options)
    return {key: value.tolist() for key, value in whole.items()}, model(X).tolist()


@pytest.mark.parametrize("source", KINDS)
def test_a_model_in_shards_takes_a_full_state_dict(source, tmp_path):
    saved = network(source, 0)
    for whole, out in run(sharded, 2, tmp_path, source):
        torch.testing.assert_close(torch.tensor(out), saved(X).detach())
        plain = network("psbn", 2)
        plain.load_state_dict({key: torch.tensor(value) for key, value in whole.items()})
        torch.testing.assert_close(plain(X), saved(X))
