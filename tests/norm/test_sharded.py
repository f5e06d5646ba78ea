"""FSDP and torch.distributed.checkpoint: whole and sharded state dicts, from psBN and from BN."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from psbn_mmdet import psBN2d
from psbn_mmdet.collapse import MeasureError, measure
from tests.helpers.distributed import run
from tests.helpers.layers import randomize


def network(norm=lambda c: psBN2d(c, alpha=0.3)) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def fsdp2(rank, whole, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = network()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    # of another alpha, which only rank 0 has
    set_model_state_dict(model, copy.deepcopy(whole) if rank == 0 else {}, options=options)

    def bias():
        return model[1].beta.full_tensor().detach() + 0.3

    assert_close(bias(), whole["1.bias"])
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert_close(gathered["1.bias"], whole["1.bias"])
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    with torch.no_grad():
        model[1].beta.zero_()
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    assert_close(bias(), whole["1.bias"])

    bn = randomize(network(nn.BatchNorm2d))
    with pytest.raises(RuntimeError, match=r"convert it first with psbn_mmdet\.checkpoint"):
        set_model_state_dict(
            model, bn.state_dict(), options=StateDictOptions(full_state_dict=True, strict=False)
        )
    with pytest.raises(MeasureError, match="sharded by FSDP"):
        measure(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model.train()(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()


def test_fully_shard_from_meta_and_distributed_checkpoints(tmp_path):
    whole = randomize(network(lambda c: psBN2d(c, alpha=0.1))).state_dict()
    run(fsdp2, 2, tmp_path, whole, str(tmp_path / "dcp"))


def fsdp1(rank, whole, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = network().eval()
    model.load_state_dict(whole)
    x = torch.randn(2, 3, 8, 8)
    y = model(x)
    model = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    assert_close(model(x), y)
    with pytest.raises(MeasureError, match="sharded by FSDP"):
        measure(model)
    state = model.state_dict()
    assert_close(state["1.bias"], whole["1.bias"])
    model.load_state_dict(state)
    assert_close(model(x), y)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_fully_sharded_data_parallel(use_orig_params, tmp_path):
    run(fsdp1, 2, tmp_path, randomize(network()).state_dict(), use_orig_params)


def test_a_whole_bn_state_dict_by_torchs_distributed_checkpoint():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    bn, model = randomize(network(nn.BatchNorm2d)).eval(), network().eval()
    set_model_state_dict(
        model, bn.state_dict(), options=StateDictOptions(full_state_dict=True, strict=False)
    )
    x = torch.randn(2, 3, 8, 8)
    assert_close(model(x), bn(x))
