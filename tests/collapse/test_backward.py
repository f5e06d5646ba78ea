"""What each filter does, against true ablation and an independent few lines of autograd."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from psbn_mmdet import norm
from psbn_mmdet.collapse import backward, does, measure, norm_modules
from psbn_mmdet.collapse.criteria import CARRYING, IDLE, ROUNDING, STUCK
from psbn_mmdet.collapse.wiring import tensors_in
from tests.helpers.collapsed_net import VARIANTS, Net, collapse_by_hand
from tests.helpers.published import PUBLISHED, load
from tests.helpers.strippable import detector


def decayed(net, seed):
    """As weight decay leaves networks: some gammas, biases and filters at any magnitude."""
    g = torch.Generator().manual_seed(seed)

    def magnitude(n):
        shrunk = torch.rand(n, generator=g) < 0.5
        return torch.where(shrunk, 10 ** (-44 * torch.rand(n, generator=g)), 1)

    conv = None
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                conv = module
            elif isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                n = module.num_features
                module.running_mean.normal_(0, 0.2, generator=g)
                module.running_var.uniform_(0.5, 1.5, generator=g)
                module.weight.normal_(0, 1, generator=g).mul_(magnitude(n))
                module.bias.normal_(0, 0.5, generator=g).mul_(magnitude(n))
                if len(conv.weight) == n:  # else another one is in front
                    conv.weight.mul_(magnitude(n)[:, None, None, None])
    return net


def plainly(net, x):
    return net(x)


@torch.no_grad()
def ablated(net, x, every=1, call=plainly):
    """Largest change of the outputs in float64 when a filter is set to its mean.

    By layer, then by filter: each ``every``-th, and twice as many of the collapsed.
    """
    net, x = copy.deepcopy(net).double().eval(), x.double()
    before = tensors_in(call(net, x))
    changes = {}
    for name, module in norm_modules(net).items():
        for i in range(module.num_features):
            if i % (every if abs(module.weight[i]) >= 1e-3 else -(-every // 2)):
                continue

            def to_mean(_, __, y, i=i):
                y = y.clone()
                y[:, i] = y[:, i].mean()
                return y

            handle = module.register_forward_hook(to_mean)
            after = tensors_in(call(net, x))
            change = max(
                (a - b).abs().max() / b.square().mean().sqrt()
                for a, b in zip(after, before, strict=True)
            )
            handle.remove()
            changes.setdefault(name, {})[i] = float(change)
    return changes


def gradients(net, x, call=plainly):
    """Independently: whether a gradient arrives at gamma or bias, by layer.

    The numbers that are pulled back are those of the measure: small gradients depend on the draw.
    """
    net = copy.deepcopy(net).double().eval().requires_grad_(True)
    outputs, g = tensors_in(call(net, x.double())), torch.Generator().manual_seed(0)
    torch.autograd.backward(
        outputs,
        [torch.randn(y.shape, generator=g).to(y) / y.square().mean().sqrt() for y in outputs],
    )
    return {
        name: torch.maximum(m.weight.grad.abs(), m.bias.grad.abs())
        for name, m in norm_modules(net).items()
    }


class CutReLUs(TorchFunctionMode):
    """Within it no gradient passes a ReLU; what comes in is kept, as it is."""

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (F.relu, torch.relu):
            return func(*args, **(kwargs or {}))
        self.met.append(args[0])
        return args[0].detach().relu()


def fires(net, x, call=plainly):
    """Independently: the share of positions at which the ReLU right behind, or behind a sum, fires.

    A number for each channel of what comes into a ReLU is pulled back to the norm layers, as far as
    the next ReLU or convolution. Data movement and sums bring it back as it is.
    """
    net, outputs = copy.deepcopy(net).eval().requires_grad_(True), {}
    norms = norm_modules(net)
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(lambda m, args: (args[0].detach(),))
        elif name in norms:
            module.register_forward_hook(lambda m, a, y, name=name: outputs.update({name: y}))
    with CutReLUs() as cut:
        call(net, x)
    found = {name: torch.full(y.shape[1:2], torch.nan) for name, y in outputs.items()}
    for met in cut.met:
        if not met.requires_grad:
            continue
        share = (met > 0).float().mean((0, *range(2, met.dim())))
        numbers = torch.arange(1.0, len(share) + 1).view(-1, *[1] * (met.dim() - 2))
        parts = torch.autograd.grad(
            met, list(outputs.values()), numbers.expand_as(met), True, allow_unused=True
        )
        for name, part in zip(outputs, parts, strict=True):
            if part is not None:
                at = part.flatten(2).amax((0, 2)).long()
                found[name] = torch.fmax(found[name], torch.where(at > 0, share[at - 1], torch.nan))
    return found


def agrees(net, x, every=1, call=plainly):
    """Hold a measure against the truth; how many filters are what."""
    report = measure(net, x)
    changes, arrived = ablated(net, x, every, call), gradients(net, x, call)
    firing = fires(net, x, call)
    largest = max(float(g.max()) for g in arrived.values())
    counts = {STUCK: 0, IDLE: 0, CARRYING: 0}
    for layer in report.layers:
        close = dict(rtol=0, atol=2 / x[:, 0].numel(), equal_nan=True)
        torch.testing.assert_close(layer.firing, firing[layer.name], msg=layer.name, **close)
        for i, what in enumerate(layer.does.tolist()):
            gradient = float(arrived[layer.name][i]) / largest
            change = changes[layer.name].get(i)
            where = (layer.name, i, what, gradient, change)
            counts[what] += 1
            if ROUNDING / 30 < gradient < 30 * ROUNDING:
                continue  # beside the limit
            assert (what == STUCK) == (gradient < ROUNDING), where
            if what != STUCK and change is not None and not ROUNDING / 30 < change < 30 * ROUNDING:
                assert (what == CARRYING) == (change > ROUNDING), where
    return counts


@pytest.mark.parametrize("seed", [*range(6), 8, 32])
def test_a_decayed_network_filter_by_filter(seed):
    counts = agrees(decayed(Net(), seed), torch.randn(4, 3, 10, 10))
    assert sum(counts.values()) == 28
    assert min(counts.values()) > 0


def test_in_front_of_a_sum_a_gamma_of_0_gets_a_gradient():
    net = Net()
    nn.init.zeros_(net.block.bn2.weight)
    report = measure(net, torch.randn(4, 3, 10, 10))
    what = {layer.name: layer.does for layer in report.layers}
    assert what["block.bn2"].tolist() == [IDLE] * 8
    assert what["block.bn1"].tolist() == [STUCK] * 4  # bn2 passes nothing back
    assert what["bn1"].tolist() == what["block.down.1"].tolist() == [CARRYING] * 8


def test_a_filter_without_weights_is_idle_or_stuck_whatever_its_gamma():
    """psBN lifts its bias over the ReLU, so that it is no longer dead, and carries nothing."""
    net = Net()
    with torch.no_grad():
        net.conv1.weight[:4] = 0
        net.bn1.bias[:4] = torch.tensor([-0.2, -0.2, 0.1, 0.1])
    for model in (net, norm.to_psbn(copy.deepcopy(net))):
        (layer, *_) = measure(model, torch.randn(4, 3, 10, 10)).layers
        assert layer.does.tolist() == [STUCK, STUCK, IDLE, IDLE, *[CARRYING] * 4]


def test_firing_is_the_share_of_positions_with_a_gradient():
    net, x = collapse_by_hand(Net()), torch.randn(4, 3, 10, 10)
    seen = {}
    net.eval()
    report = measure(net, x)
    net.bn1.register_forward_hook(lambda m, i, y: seen.update(bn1=y))
    net.block.register_forward_hook(lambda m, i, y: seen.update(block=y))
    net(x)
    firing = {layer.name: layer.firing for layer in report.layers}
    torch.testing.assert_close(firing["bn1"], (seen["bn1"] > 0).float().mean((0, 2, 3)))
    behind_sum = (seen["block"] > 0).float().mean((0, 2, 3))
    torch.testing.assert_close(firing["block.bn2"], behind_sum)
    torch.testing.assert_close(firing["block.down.1"], behind_sum)
    convs = {layer.name: layer.conv for layer in report.layers}
    assert convs == {
        "bn1": "conv1", "block.bn1": "block.conv1", "block.bn2": "block.conv2",
        "block.down.1": "block.down.0",
    }  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_layer_tells_the_same(variant):
    net, x = collapse_by_hand(Net()), torch.randn(4, 3, 10, 10)
    want = torch.cat([layer.does for layer in measure(net, x).layers])
    found = [layer.does for layer in measure(VARIANTS[variant](net), x).layers]
    assert torch.equal(torch.cat(found), want)


def test_frozen_batch_norm_and_instance_norm():
    from mmdet.models.layers import FrozenBatchNorm2d

    net, x = collapse_by_hand(Net()), torch.randn(4, 3, 10, 10)
    want = torch.cat([layer.does for layer in measure(net, x).layers])
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(copy.deepcopy(net))
    assert torch.equal(torch.cat([layer.does for layer in measure(frozen, x).layers]), want)
    net.bn1 = nn.InstanceNorm2d(8, affine=True)
    net.bn1.weight.data[2] = 0
    net.bn1.bias.data[:] = 0.5
    net.bn1.bias.data[3] = -50
    assert measure(net, x).layers[0].does[1:4].tolist() == [CARRYING, IDLE, STUCK]


def test_the_model_stays_as_it_is():
    net, x = collapse_by_hand(Net()), torch.randn(4, 3, 10, 10)
    net.train()
    net.block.eval()
    net.conv1.weight.requires_grad_(False)
    net.bn1.weight.grad = torch.ones(8)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    state = torch.get_rng_state()
    measure(net, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["bn1.weight"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not any(p._backward_hooks for p in net.parameters())


def test_a_loss_of_the_users():
    net, x = collapse_by_hand(Net()), torch.randn(4, 3, 10, 10)
    labels = torch.arange(4)
    report = measure(net, lambda m: F.cross_entropy(m(x), labels))
    for mine, other in zip(report.layers, measure(net, x).layers):
        assert torch.equal(mine.does == STUCK, other.does == STUCK)
        assert (mine.does[mine.gamma.abs() > 0.05] != IDLE).all()
    with pytest.raises(ValueError, match="no output of the model has a gradient"):
        measure(net, lambda m: m(x).argmax())


class TestWatch:
    """On a training step, with the statistics of the batch and ReLUs that write in place."""

    def test_gradient_and_effect_are_those_written_out(self):
        net, x = collapse_by_hand(Net()), torch.randn(4, 3, 10, 10)
        outputs = {}

        def keep(module, inputs, y):
            y.retain_grad()
            outputs[module] = y

        for evaluated in (False, True):  # as mmdet's norm_eval
            net.train(not evaluated)
            layers = [*norm_modules(net).values()]
            handles = [m.register_forward_hook(keep) for m in layers]
            watch = backward.Watch(layers)
            watch.start()
            net.zero_grad()
            F.cross_entropy(net(x), torch.arange(4)).backward()
            watch.stop()
            gradient, effect = watch.seen()
            want_gradient = [torch.maximum(m.weight.grad.abs(), m.bias.grad.abs()) for m in layers]
            want_effect = [
                (y.grad * (y - y.mean((0, 2, 3), keepdim=True))).sum((0, 2, 3)).abs()
                for y in map(outputs.get, layers)
            ]
            torch.testing.assert_close(gradient, torch.cat(want_gradient))
            close = dict(rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(effect, torch.cat(want_effect).detach(), **close)
            for handle in handles:
                handle.remove()

    def test_the_effect_of_filters_that_vary_little_beside_their_mean(self):
        """The gradients of gamma and bias in float32 differ by less than their rounding there."""
        net, x = Net().eval(), torch.randn(4, 3, 10, 10)
        with torch.no_grad():
            net.conv1.weight *= 10 ** -torch.arange(8.0)[:, None, None, None]
            net.bn1.running_mean.uniform_(1, 2).mul_(-1)
        watch = backward.Watch([net.bn1])
        watch.start()
        net(x)[:, 0].sum().backward()
        watch.stop()
        exact, outputs = copy.deepcopy(net).double(), []
        exact.bn1.register_forward_hook(lambda m, i, y: outputs.append(y) or y.retain_grad())
        exact(x.double())[:, 0].sum().backward()
        (y,) = outputs
        want = (y.grad * (y - y.mean((0, 2, 3), keepdim=True))).sum((0, 2, 3)).abs()
        torch.testing.assert_close(watch.seen()[1].double(), want, rtol=0.02, atol=0)

    def test_frozen_layers_and_those_that_do_not_run_are_not_measured(self):
        net, x = Net(), torch.randn(4, 3, 10, 10)
        net.spare = nn.BatchNorm2d(3)
        net.bn1.requires_grad_(False)
        watch = backward.Watch(norm_modules(net).values())
        watch.start()
        net(x).sum().backward()
        watch.stop()
        told = does(*watch.seen())
        assert told.tolist() == [0] * 8 + [CARRYING] * 20 + [0] * 3

    def test_a_scaled_loss_tells_the_same(self):
        net, x = collapse_by_hand(Net()), torch.randn(4, 3, 10, 10)
        found = []
        for scale in (1.0, 65536.0):
            watch = backward.Watch(norm_modules(net).values())
            watch.start()
            (net(x).sum() * scale).backward()
            watch.stop()
            found.append(does(*watch.seen()))
        assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_filter_by_filter(name, shared_data):
    build, shape = PUBLISHED[name]
    path = shared_data / "checkpoints" / name
    if not path.exists():
        pytest.skip(f"no real checkpoint at {path}")
    net = load(build(), path)
    filters = sum(m.weight.numel() for m in norm_modules(net).values())
    counts = agrees(net, torch.randn(2, *shape), every=max(1, filters // 100))
    assert sum(counts.values()) == filters


class Maps(nn.Module):
    """The levels of a backbone, which itself is in training mode whatever it is told."""

    def __init__(self, **settings):
        super().__init__()
        from mmdet.models.backbones import ResNet

        self.backbone = ResNet(norm_eval=False, **settings)

    def forward(self, x):
        return list(self.backbone(x))


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "width"), [(18, 8), (50, 64)])
def test_mmdets_resnets_with_what_decay_leaves(depth, width):
    net = decayed(Maps(depth=depth, base_channels=width), 1)
    counts = agrees(net, torch.randn(2, 3, 64, 64), every=8 if depth == 18 else 512)
    assert min(counts.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "retinanet/retinanet_r50_fpn_1x_coco.py",
        "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
        "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    ],
)
def test_mmdets_detectors_with_what_decay_leaves(config):
    net = decayed(detector(config), 1)
    counts = agrees(net, torch.randn(1, 3, 64, 64), 512, lambda m, x: m(x, mode="tensor"))
    assert min(counts.values()) > 10
