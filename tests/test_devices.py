"""Training and measures on each device, with the shapes, precision and memory of real networks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from psbn_mmdet import psBN, psBN2d, psSyncBN, to_psbn
from psbn_mmdet.collapse import measure
from psbn_mmdet.decay import anchor_bias_decay
from psbn_mmdet.launch import load_config
from tests.helpers.anchored import small_net
from tests.helpers.devices import CUDA
from tests.helpers.distributed import run
from tests.helpers.layers import assert_together_one_step, one_step, randomize
from tests.helpers.paths import ROOT

HALF = {"cpu": torch.bfloat16, "cuda": torch.float16}
# Those of ResNet-50's stages at 192 x 320: channels, height and width.
SHAPES = [(64, 96, 160), (256, 48, 80), (512, 24, 40), (1024, 12, 20), (2048, 6, 10)]


@pytest.fixture
def _exact():
    """No TensorFloat-32, whose 10 bits would hide a small difference."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_is_bns(device, shape, autocast):
    """In value, gradients and statistics: it is the same kernel on the same numbers.

    To the bit on the CPU; a GPU may add in another order in every run.
    """
    dtype = HALF[device]
    bn = randomize(nn.BatchNorm2d(shape[0])).to(device)
    psbn = psBN2d(shape[0]).to(device)
    psbn.load_state_dict(bn.state_dict())
    with torch.no_grad():
        psbn.beta.copy_(bn.bias)
        bn.bias += psbn.alpha
    x = torch.randn(2, *shape, device=device)
    results = []
    for layer in (bn, psbn):
        leaf = x.clone().requires_grad_()
        with torch.autocast(device, dtype, enabled=autocast):
            # As behind a convolution, whose output autocast makes half as long.
            y = layer(leaf.to(dtype) if autocast else leaf)
        y.float().square().sum().backward()
        of_beta = layer.bias.grad if layer is bn else layer.beta.grad
        results.append([y, leaf.grad, layer.weight.grad, of_beta, layer.running_var])
    assert results[0][0].dtype == (dtype if autocast else torch.float32)
    for of_bn, of_psbn in zip(*results):
        assert_close(of_psbn, of_bn, **({"rtol": 0, "atol": 0} if device == "cpu" else {}))


def synchronised_step(rank, device, state_dict, batches, weights):
    layer = psSyncBN(6, alpha=0.3)
    layer.load_state_dict(state_dict)
    results = one_step(layer.to(device), batches[rank].to(device), weights[rank].to(device))
    return {name: value.cpu() for name, value in results.items()}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(3, 3), (1, 5)])
def test_pssyncbn_in_two_processes_is_psbn_on_the_concatenated_batch(device, sizes, tmp_path):
    """Over gloo, so that both processes can use the same GPU."""
    reference = randomize(psBN2d(6, alpha=0.3))
    state_dict = {k: v.clone() for k, v in reference.state_dict().items()}
    whole, weights = torch.randn(6, 6, 5, 4), torch.randn(6, 6, 5, 4)
    args = device, state_dict, whole.split(sizes), weights.split(sizes)
    ranks = run(synchronised_step, 2, tmp_path, *args, start_method="spawn")
    expected = one_step(reference, whole, weights)
    assert_together_one_step(ranks, expected, rtol=1e-4, atol=1e-5)


def retinanet(device):
    """RetinaNet-R18 with BN, in training mode, and two random images with boxes."""
    from mmdet.testing import demo_mm_inputs
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope("mmdet")
    cfg = load_config(str(ROOT / "configs/retinanet/retinanet_bn_500.py"))
    cfg.model.backbone.update(depth=18, init_cfg=None, frozen_stages=-1, norm_eval=False)
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).to(device).train()
    data = demo_mm_inputs(2, [[3, 32, 64]] * 2, num_classes=80)
    return model, model.data_preprocessor(data, training=True)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("_exact")
def test_a_step_and_the_boxes_of_retinanet_are_those_with_bn(device, autocast):
    """With mmcv's operators: focal loss and non-maximum suppression."""
    bn, data = retinanet(device)
    psbn = to_psbn(copy.deepcopy(bn))
    assert any(isinstance(m, psBN) for m in psbn.modules())
    losses, norms = [], []
    for model in (bn, psbn):
        with torch.autocast(device, HALF[device], enabled=autocast):
            loss, _ = model.parse_losses(model(**copy.deepcopy(data), mode="loss"))
        loss.backward()
        losses.append(loss.detach())
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]))
    assert losses[0].isfinite()
    # beta + alpha is bias up to its last digit, which half precision turns into its own.
    close = {"rtol": 2e-2, "atol": 1e-2} if autocast else {"rtol": 1e-3, "atol": 1e-4}
    assert_close(losses[1], losses[0], **close)
    if not autocast:
        assert_close(norms[1], norms[0], **close)
    results = []
    for model in (bn, psbn):
        model.bbox_head.test_cfg.update(score_thr=0.0, nms_pre=200)
        with torch.no_grad():
            results.append(model.eval()(**copy.deepcopy(data), mode="predict")[0].pred_instances)
    assert len(results[0]) == 100  # max_per_img
    assert_close(results[1].scores, results[0].scores, **close)


@pytest.mark.parametrize("max_ratio", [None, 0.05])
def test_a_step_of_anchored_bias_decay_is_that_on_the_cpu(device, max_ratio):
    steps = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        model = small_net().to(place)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        anchor_bias_decay(model, optimizer, 0.1, max_ratio=max_ratio, log=None)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.01)
            optimizer.step()
        steps.append([p.detach().cpu() for p in model.parameters()])
    assert_close(steps[1], steps[0])


def test_a_measure_is_that_on_the_cpu(device):
    layers = nn.Conv2d(3, 8, 3, bias=False), psBN(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    model = randomize(nn.Sequential(*layers))
    with torch.no_grad():
        model[1].weight[:3] = model[1].beta[:3] = 0
    expected = measure(model, inputs=(3, 16, 16))
    report = measure(model.to(device), inputs=(3, 16, 16))
    assert expected.totals["collapsed"] == 3
    assert (report.totals, report.flops) == (expected.totals, expected.flops)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_takes_no_more_memory_than_bn(device, shape):
    peaks = []
    for layer in (nn.BatchNorm2d(shape[0]).to(device), psBN2d(shape[0]).to(device)):
        x = torch.randn(16, *shape, device=device, requires_grad=True)
        F.relu(layer(x)).sum().backward()  # what a first step allocates for good
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        F.relu(layer(x)).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # beta + alpha: one more number for each channel and block of the allocator.
    assert peaks[1] <= peaks[0] + 4096 + 4 * shape[0]
