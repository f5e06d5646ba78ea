"""psSyncBN in several processes equals psBN on the concatenated batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from psbn_mmdet import psBN2d, psSyncBN
from tests.helpers.distributed import run
from tests.helpers.layers import assert_together_one_step, one_step, randomize


def sync_step(rank, state_dict, batches, weights, momentum):
    layer = psSyncBN(6, alpha=0.3, momentum=momentum)
    layer.load_state_dict(state_dict)
    return one_step(layer, batches[rank], weights[rank])


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 4, 3), (6, 2, 3, 2)])
@pytest.mark.parametrize(
    ("sizes", "momentum", "offset"),
    [((3, 3), 0.1, 0.0), ((1, 5), 0.1, 0.0), ((4, 0), None, 0.0), ((2, 0, 3), 0.1, 100.0)],
)
def test_equals_psbn_on_the_concatenated_batch(shape, sizes, momentum, offset, tmp_path):
    whole = torch.randn(sum(sizes), *shape) + offset
    weights = torch.randn_like(whole)
    reference = randomize(psBN2d(6, alpha=0.3, momentum=momentum))
    reference._check_input_dim = lambda x: None
    state_dict = {k: v.clone() for k, v in reference.state_dict().items()}
    expected = one_step(reference, whole, weights)
    results = run(
        sync_step,
        len(sizes),
        tmp_path,
        state_dict,
        whole.split(sizes),
        weights.split(sizes),
        momentum,
    )
    # An offset of 100 standard deviations costs float32 two digits.
    close = {"rtol": 1e-4, "atol": 1e-4} if offset else {"rtol": 1e-5, "atol": 1e-5}
    assert_together_one_step(results, expected, **close)


def refusals_and_modes(rank):
    layer = psSyncBN(2)
    # One value per channel over all processes has no variance.
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*got 1 over all"):
        layer(torch.randn(1 - rank, 2))
    layer = randomize(psSyncBN(2)).eval()  # another one in each process
    x = torch.randn(3, 2, 4, 4)
    alone = psBN2d(2).eval()
    alone.load_state_dict(layer.state_dict())
    assert_close(layer(x), alone(x))  # evaluation asks nobody
    # A group of one is psBN.
    groups = [dist.new_group([r]) for r in range(2)]
    layer = psSyncBN(2, process_group=groups[rank])
    assert_close(layer(x), psBN2d(2)(x))
    # What is not on the CPU is left to torch, which names the devices it can do.
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        psSyncBN(2, device="meta")(x.to("meta"))
    bf16 = psSyncBN(2)(x.bfloat16())
    assert bf16.dtype == torch.bfloat16
    from mmengine.model import convert_sync_batchnorm

    with pytest.raises(TypeError, match="psSyncBN is its synchronised form"):
        convert_sync_batchnorm(nn.Sequential(psBN2d(2)), "mmcv")


def test_refusals_and_modes(tmp_path):
    run(refusals_and_modes, 2, tmp_path)


def step_in_a_group(rank, state_dict, batches, weights):
    group = dist.new_group([0, 1])
    if rank == 2:
        return None
    layer = psSyncBN(6, process_group=group)
    layer.load_state_dict(state_dict)
    return one_step(layer, batches[rank], weights[rank])


def test_synchronises_within_its_group_alone(tmp_path):
    reference = psBN2d(6)
    whole, weights = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    state_dict = {k: v.clone() for k, v in reference.state_dict().items()}
    expected = one_step(reference, whole, weights)
    parts = [*whole.split(2), whole], [*weights.split(2), weights]
    results = run(step_in_a_group, 3, tmp_path, state_dict, *parts)[:2]
    assert_close(torch.cat([r["y"] for r in results]), expected["y"], rtol=1e-5, atol=1e-5)
    assert_close(
        torch.cat([r["x.grad"] for r in results]), expected["x.grad"], rtol=1e-5, atol=1e-5
    )


def ddp_training(rank, state_dict, batches):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), psSyncBN(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model.load_state_dict(state_dict)
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for batch in batches:
        loss = ddp(batch[rank * 2 : rank * 2 + 2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def test_training_under_ddp_equals_one_process(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), psSyncBN(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    state_dict = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [torch.randn(4, 3, 6, 6) for _ in range(5)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    for result in run(ddp_training, 2, tmp_path, state_dict, batches):
        for key, value in model.state_dict().items():
            assert_close(result[key], value, rtol=1e-4, atol=1e-5)


def nothing_anywhere(rank):
    layer = psSyncBN(3)
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()  # all ranks take part, as DDP wants
    assert y.shape == x.shape and layer.weight.grad is not None and layer.beta.grad is not None
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert layer.num_batches_tracked == 0


def test_a_batch_without_samples_on_any_process(tmp_path):
    run(nothing_anywhere, 2, tmp_path)
