"""Writing into the bias of a post-shifted layer, as code for BatchNorm does it: it counts."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from psbn_mmdet import psBN2d, psIN2d, psSyncBN
from tests.helpers.layers import randomize

MASK = torch.tensor([1.0, 0.0, 1.0, 0.0])
KINDS = [psBN2d, psSyncBN, psIN2d]


def pair(kind=psBN2d):
    """A BN and a post-shifted layer with the same bias."""
    ps = randomize(kind(4, alpha=0.3))
    bn = nn.BatchNorm2d(4)
    bn.bias.data.copy_(ps.bias)
    return bn, ps


def add_in_place(m):
    with torch.no_grad():
        m.bias += 1


def method_of_the_bias(m):
    with torch.no_grad():
        m.bias.mul_(MASK)


def out_argument(m):
    torch.mul(m.bias.detach(), MASK, out=m.bias.data)


def swap_halves(m):
    m.bias.data[:2], m.bias.data[2:] = m.bias.data[2:].clone(), m.bias.data[:2].clone()


def in_inference_mode(m):
    with torch.inference_mode():
        m.bias.mul_(MASK)


WRITES = {
    "a mask": lambda m: m.bias.data.mul_(MASK),
    "a detached mask": lambda m: m.bias.detach().mul_(MASK),
    "a boolean index": lambda m: m.bias.data.__setitem__(MASK == 0, 0.0),
    "a slice": lambda m: m.bias.data[1:3].fill_(7),
    "a view of a view": lambda m: m.bias.data.view(2, 2)[1].zero_(),
    "zero": lambda m: m.bias.data.zero_(),
    "one after the other": lambda m: m.bias.data.mul_(MASK).add_(1).clamp_(max=1.2),
    "other values": lambda m: m.bias.data.copy_(torch.arange(4.0)),
    "index_fill": lambda m: m.bias.data.index_fill_(0, torch.tensor([2]), -1),
    "an assignment to data": lambda m: setattr(m.bias, "data", m.bias.data * MASK),
    "fewer channels": lambda m: setattr(m.bias, "data", m.bias.data[MASK > 0]),
    "foreach": lambda m: torch._foreach_mul_([m.bias.data], 2.0),
    "+=": add_in_place,
    "without data": method_of_the_bias,
    "out=": out_argument,
    "swapped halves": swap_halves,
    "inference mode": in_inference_mode,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_does_what_it_does_to_bn(write, kind):
    bn, ps = pair(kind)
    before, beta = bn.bias.detach().clone(), ps.beta
    WRITES[write](bn)
    WRITES[write](ps)
    assert bn.bias.shape != before.shape or not torch.equal(bn.bias, before)
    assert_close(ps.bias.detach(), bn.bias.detach())
    assert ps.beta is beta and isinstance(beta, nn.Parameter)


def test_what_a_mask_removes_is_exactly_0_and_what_it_keeps_has_the_bits_it_had():
    # (beta + 0.3) - 0.3 has other bits than beta in about half of 1,000 channels.
    ps = randomize(psBN2d(1000, alpha=0.3))
    mask = (torch.arange(1000) % 2).float()
    beta = ps.beta.detach().clone()
    assert not torch.equal((beta + 0.3) - 0.3, beta)
    ps.weight.data.mul_(mask)
    ps.bias.data.mul_(mask)
    assert torch.equal(ps.bias[mask == 0], torch.zeros(500))
    assert torch.equal(ps.beta[mask == 1], beta[mask == 1])
    y = ps.eval()(torch.randn(2, 1000, 3, 3))
    assert torch.equal(y[:, mask == 0], torch.zeros(2, 500, 3, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "zero",
    [
        lambda m: nn.init.zeros_(m.bias),
        lambda m: nn.init.constant_(m.bias, 0),
        lambda m: nn.init.zeros_(m.bias.data),
        lambda m: m.bias.data.zero_(),
    ],
)
def test_a_write_means_the_bias_whoever_does_it(kind, zero):
    layer = randomize(kind(4, alpha=0.3))
    zero(layer)
    assert torch.equal(layer.bias, torch.zeros(4))
    assert_close(layer.beta.detach(), torch.full((4,), -0.3))


def test_a_write_that_records_gradients_is_refused_as_for_a_parameter():
    bn, ps = pair()
    for layer in (bn, ps):
        with pytest.raises(RuntimeError, match=r"requires grad"):
            layer.bias.mul_(2)


def test_a_bias_read_before_beta_changed_is_not_written_back():
    _, ps = pair()
    bias = ps.bias.data
    with torch.no_grad():
        ps.beta.add_(1)
    with pytest.raises(RuntimeError, match=r"read layer\.bias again"):
        bias.mul_(2)


def test_requires_grad_and_grad_are_those_of_beta():
    _, ps = pair()
    ps(torch.randn(2, 4, 3, 3)).square().sum().backward()
    assert torch.equal(ps.bias.grad, ps.beta.grad)
    ps.bias.grad.mul_(0)
    assert not ps.beta.grad.any()
    ps.bias.grad = None
    assert ps.beta.grad is None
    ps.bias.requires_grad_(False)
    assert not ps.beta.requires_grad and not ps.bias.requires_grad
    ps.bias.requires_grad = True
    assert ps.beta.requires_grad and ps.bias.requires_grad


def test_hooks_on_the_gradient_are_betas():
    _, ps = pair()
    seen = []
    handle = ps.bias.register_hook(lambda gradient: seen.append(gradient.clone()))
    ps(torch.randn(2, 4, 3, 3)).square().sum().backward()
    assert_close(seen, [ps.beta.grad])
    handle.remove()


def test_elementwise_python_functions_reach_beta():
    bn, ps = pair()
    for layer in (bn, ps):
        layer.bias.data.apply_(lambda value: value + 1)
        layer.bias.data.map_(torch.ones(4), lambda value, other: value * 2 + other)
    assert_close(ps.bias.detach(), bn.bias.detach())


def test_sharing_its_memory_is_refused():
    _, ps = pair()
    before = ps.beta.detach().clone()
    with pytest.raises(BufferError, match="share beta, or a clone"):
        torch.from_dlpack(ps.bias.data)
    assert torch.equal(ps.beta, before)


def test_within_torch_func_it_reads_as_bns():
    bn, ps = pair()
    for layer, name in ((bn, "bias"), (ps, "beta")):
        layer.eval()
        x = torch.randn(2, 4, 3, 3)

        def added(parameters, layer=layer, x=x):
            def read(module, args, output):
                return output * 0 + module.bias.view(1, 4, 1, 1) ** 2

            handle = layer.register_forward_hook(read)
            try:
                return torch.func.functional_call(layer, parameters, (x,)).sum()
            finally:
                handle.remove()

        gradients = torch.func.grad(added)(dict(layer.named_parameters()))
        assert_close(gradients[name], 2 * layer.bias.detach() * 18)


def test_a_parameter_made_of_it_is_refused_and_one_of_its_copy_is_free():
    _, ps = pair()
    for bias in (ps.bias, ps.bias.data, ps.bias.detach()):
        with pytest.raises(TypeError, match=r"nn\.Parameter\(layer\.bias\.detach\(\)\.clone\(\)\)"):
            nn.Parameter(bias)
    free = nn.Parameter(ps.bias.detach().clone())
    assert type(free) is nn.Parameter
    before = ps.beta.detach().clone()
    free.data.zero_()
    assert torch.equal(ps.beta, before)


def test_reading_gives_plain_tensors_numbers_and_gradients():
    _, ps = pair()
    assert isinstance(ps.bias, torch.Tensor) and not isinstance(ps.bias, nn.Parameter)
    for value in (ps.bias + 1, ps.bias.clone(), ps.bias.double(), torch.cat([ps.bias, ps.bias])):
        assert type(value) is torch.Tensor
    assert ps.bias.sum().item() == (ps.beta + 0.3).sum().item()
    assert ps.bias.shape == (4,) and ps.bias.dtype == torch.float32
    assert "tensor" in repr(ps.bias)
    (gradient,) = torch.autograd.grad((ps.bias**2).sum(), ps.beta)
    assert_close(gradient, 2 * (ps.beta + 0.3).detach())


def test_arrays_of_it_cannot_be_written_to_and_copies_can():
    _, ps = pair()
    array = ps.bias.detach().numpy()
    assert_close(torch.from_numpy(array.copy()), (ps.beta + 0.3).detach())
    with pytest.raises(ValueError, match="read-only"):
        array *= 0
    copied = np.array(ps.bias.detach())
    copied *= 0
    assert ps.bias.all()


def test_it_is_saved_and_copied_as_a_plain_tensor():
    _, ps = pair()
    for bias in (ps.bias.detach(), ps.bias.data):
        file = io.BytesIO()
        torch.save(bias, file)
        file.seek(0)
        for value in (torch.load(file, weights_only=True), pickle.loads(pickle.dumps(bias))):
            assert type(value) is torch.Tensor and torch.equal(value, ps.bias)
        copied = copy.deepcopy(bias)
        assert type(copied) is torch.Tensor
        copied.zero_()
        assert ps.bias.all()


def test_on_meta_it_is_a_plain_sum():
    assert type(psBN2d(3, device="meta").bias) is torch.Tensor
