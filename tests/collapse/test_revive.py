"""revive: the function stays, a gradient arrives, and what was dead learns."""

import collections
import copy
import json
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from psbn_mmdet import to_psbn
from psbn_mmdet.collapse import MeasureError, norm_modules
from psbn_mmdet.collapse.calls import CallError, compare
from psbn_mmdet.collapse.reviving import revive, summary
from psbn_mmdet.collapse.wiring import tensors_in
from psbn_mmdet.norm import added_bias
from tests.helpers.published import PUBLISHED, load
from tests.helpers.random_nets import RandomNet
from tests.helpers.strippable import (
    NETS,
    chain,
    conv_bn,
    head,
    kill,
    kill_at_random,
    with_statistics,
)

SEEDS = range(int(os.environ.get("PSBN_TEST_NETS", "40")))


def images(n=4, size=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator, dtype=dtype)


def apart(a, b):
    """Of two networks on inputs of other sizes, scales and signs, per channel."""
    worst = 0.0
    for scale, size in ((1, 16), (-20, 16), (300, 17), (0.01, 23)):
        x = scale * images(3, size, seed=size)
        with torch.no_grad():
            try:
                expected = tensors_in(a(x))
            except RuntimeError:  # streams that meet are of one size at even ones alone
                continue
            worst = max(worst, compare(expected, tensors_in(b(x))).relative)
    return worst


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def settled(model):
    """Statistics as after training: those of random images, so that rectifiers fire."""
    with_statistics(model)
    for norm in norm_modules(model).values():
        norm.momentum = None
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        model(images(32, dtype=torch.float32))
    for norm in norm_modules(model).values():
        norm.momentum = 0.1
    return model.eval()


def channels(record, key="revived"):
    """(layer, channel) of all revived filters, or of those that were left."""
    return {
        (layer, i)
        for layers in record[key].values()
        for layer, indices in layers.items()
        for i in indices
    }


def sgd(model, steps, seed=0):
    """Some steps on random targets, in training mode."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    for _ in range(steps):
        loss = sum((t - 1).square().mean() for t in tensors_in(model(images(8))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def carries(model, name, i):
    """Whether an output changes if a filter is set to its mean."""
    x = images(8, seed=3)

    def to_its_mean(module, args, out):
        out = out.clone()
        out[:, i] = out[:, i].mean()
        return out

    with torch.no_grad():
        before = tensors_in(model(x))
        handle = model.get_submodule(name).register_forward_hook(to_its_mean)
        after = tensors_in(model(x))
        handle.remove()
    return compare(before, after).relative > 1e-10


@pytest.mark.parametrize("kind", ["bn", "psbn"])
@pytest.mark.parametrize("bias", [-0.1, 0.5])
@pytest.mark.parametrize("name", NETS)
def test_the_function_stays_and_what_was_dead_learns(name, bias, kind):
    model = settled(NETS[name]())
    kill_at_random(model, bias=bias)
    if kind == "psbn":
        model = to_psbn(model)
    model.double()
    original = copy.deepcopy(model)
    record = revive(model, images(8))
    json.dumps(record)
    assert apart(original, model) < 1e-10
    revived, left = channels(record), channels(record, "left")
    killed = {
        (layer, i)
        for layer, norm in norm_modules(original).items()
        for i in (norm.weight.abs() < 1e-3).nonzero().flatten().tolist()
    }
    assert killed <= revived | left
    assert record["filters"]["collapsed"] == len(killed)
    assert record["filters"]["left"] == len(left)
    # A level of SharedHead has no readers of its own.
    assert len(revived) >= (0.6 if name == "shared" else 0.9) * len(killed)
    assert not any(carries(original, *each) for each in killed)
    sgd(model, 5)
    asleep = [each for each in revived if not carries(model, *each)]
    assert len(asleep) <= 0.05 * len(revived), asleep  # where a ReLU shuts as others learn


def net(**layers):
    class Net(nn.Module):
        def __init__(self, forward):
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)
            self.function = forward

        def forward(self, x):
            return self.function(self, x)

    return Net


def test_what_a_revived_filter_is_made_of():
    """By hand, on conv a, BN, ReLU, conv b of which filters 1 and 4 are dead."""
    model = settled(nn.Sequential(conv_bn(3, 6), nn.Conv2d(6, 5, 1))).double()
    conv, norm, reader = model[0][0], model[0][1], model[1]
    kill(norm, [1, 4], bias=-0.2)
    living = [0, 2, 3, 5]
    before = copy.deepcopy(model)
    x = images(8)
    record = revive(model, x)
    assert record["revived"] == {"zeroed readers": {"0.1": [1, 4]}}
    assert not reader.weight[:, [1, 4]].any()
    size = conv.weight.flatten(1).norm(dim=1)
    assert_close(size[[1, 4]], size[living].median().expand(2))
    assert_close(norm.weight[[1, 4]], norm.weight[living].median().expand(2))
    assert_close(norm.bias[[1, 4]], norm.bias[living].median().expand(2))
    y = conv(x)[:, [1, 4]].transpose(0, 1).flatten(1)
    assert_close(norm.running_mean[[1, 4]], y.mean(1))
    assert_close(norm.running_var[[1, 4]], y.var(1))
    for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        if a.dim() and len(a) == 6:  # the living ones
            assert torch.equal(a[living], b[living])
    assert torch.equal(reader.weight[:, living], before[1].weight[:, living])
    assert torch.equal(reader.bias, before[1].bias)


def test_a_constant_goes_into_the_bias_or_the_running_mean_of_its_readers():
    def forward(m, x):
        y = m.a(x)
        return m.plain(y), m.normed(y)

    model = net(a=conv_bn(3, 4), plain=nn.Conv2d(4, 3, 1), normed=conv_bn(4, 3, 1))(forward)
    settled(model).double()
    kill(model.a[1], [2], bias=0.7)
    before = copy.deepcopy(model)
    record = revive(model, images())
    assert record["revived"] == {"zeroed readers": {"a.1": [2]}}
    gone = 0.7 * before.plain.weight[:, 2].flatten()
    assert_close(model.plain.bias, before.plain.bias + gone, rtol=1e-6, atol=1e-6)
    gone = 0.7 * before.normed[0].weight[:, 2].flatten()
    mean = before.normed[1].running_mean - gone
    assert_close(model.normed[1].running_mean, mean, rtol=1e-6, atol=1e-6)


def test_a_constant_that_a_padded_convolution_reads_stays_with_gamma_0():
    model = settled(nn.Sequential(conv_bn(3, 4), conv_bn(4, 3), head(3))).double()
    kill(model[0][1], [2], bias=0.7)
    before = copy.deepcopy(model)
    record = revive(model, images())
    assert record["revived"] == {"gamma 0": {"0.1": [2]}}
    assert record["proof"]["passes"] == {"1": 1}
    assert model[0][1].weight[2] == 0 and model[0][1].bias[2] == before[0][1].bias[2]
    assert torch.equal(model[1][0].weight, before[1][0].weight)
    assert not torch.equal(model[0][0].weight[2], before[0][0].weight[2])


def residual():
    """Two blocks of one convolution over a stream that ``stem`` writes."""

    def forward(m, x):
        x = F.relu(m.stem(x))
        x = F.relu(x + m.one(x))
        return m.out(F.relu(x + m.two(x)))

    names = ("one", "two")
    return net(
        stem=conv_bn(3, 6, act=None),
        **{name: conv_bn(6, 6, act=None) for name in names},
        out=nn.Conv2d(6, 4, 3, padding=1),
    )(forward)


# Killed -> the layer with zeroed readers, those with gamma 0, which have a bias of 0 or not.
@pytest.mark.parametrize(
    ("dead", "zeroed", "gamma_0"),
    [
        (["two"], [], ["two"]),
        (["one"], [], ["one"]),
        (["one", "two"], [], ["one", "two"]),
        (["stem", "one", "two"], ["stem"], ["one", "two"]),
        (["stem"], [], ["stem"]),
        (["stem", "one"], [], ["stem", "one"]),
        (["stem", "two"], [], ["stem", "two"]),
    ],
)
def test_a_residual_channel(dead, zeroed, gamma_0):
    model = settled(residual()).double()
    for name in dead:
        kill(model.get_submodule(name)[1], [3], bias=-0.3)
    original = copy.deepcopy(model)
    record = revive(model, images(8))
    assert record["filters"]["left"] == 0
    expected = {"zeroed readers": zeroed, "gamma 0": gamma_0}
    assert record["revived"] == {
        way: {f"{name}.1": [3] for name in names} for way, names in expected.items() if names
    }
    assert apart(original, model) < 1e-10
    if not zeroed:  # before a sum with living filters one backward pass is enough
        assert set(record["proof"]["passes"]) == {"1"}


def test_padding_with_channels_fixes_their_number_and_not_what_they_are():
    """The shortcut of option A: a channel of the block that meets zeros gets zeroed readers."""

    def forward(m, x):
        x = m.stem(x)
        return m.out(F.relu(F.pad(x, (0, 0, 0, 0, 2, 2)) + m.block(x)))

    model = net(
        stem=conv_bn(3, 4), block=conv_bn(4, 8, act=None), out=nn.Conv2d(8, 4, 3, padding=1)
    )(forward)
    settled(model).double()
    kill(model.block[1], [0, 3], bias=-0.3)  # 0 meets zeros, 3 a living channel
    original = copy.deepcopy(model)
    record = revive(model, images(8))
    assert record["revived"] == {"zeroed readers": {"block.1": [0]}, "gamma 0": {"block.1": [3]}}
    assert not model.out.weight[:, 0].any()
    assert apart(original, model) < 1e-10


def test_a_shut_rectifier_before_a_sum_is_opened_and_the_living_layer_evens_it_out():
    model = settled(residual()).double()
    kill(model.stem[1], [3], bias=-0.3)
    before = copy.deepcopy(model)
    revive(model, images(8))
    lift = model.stem[1].bias[3]
    assert lift > 0 and model.stem[1].weight[3] == 0
    assert_close(model.one[1].bias[3], before.one[1].bias[3] - lift, rtol=1e-6, atol=1e-6)
    assert not model.one[0].weight[:, 3].any()  # read the shut channel alone
    assert torch.equal(model.two[0].weight[:, 3], before.two[0].weight[:, 3])


SHUT = "the rectifier behind it never fires and must stay shut: "


def test_what_is_left_is_named():
    def forward(m, x):
        m.lost(x)
        return m.seen(m.a(x)), m.group(m.b(x)), m.out(m.frozen(x) + m.started(x))

    model = net(
        a=conv_bn(3, 4),
        seen=nn.Identity(),
        b=conv_bn(3, 4),
        group=nn.GroupNorm(2, 4),
        frozen=conv_bn(3, 4),
        started=conv_bn(3, 4, act=None),
        out=nn.Conv2d(4, 2, 1),
        idle=conv_bn(3, 4),
        lost=conv_bn(3, 4),
    )(forward)
    settled(model).double()
    for name in ("a", "b", "frozen", "idle"):
        kill(model.get_submodule(name)[1], [1])
    kill(model.started[1], [0, 1, 2, 3], bias=0.0)
    kill(model.lost[1], [2])
    model.frozen[1].requires_grad_(False)
    original = copy.deepcopy(model)
    record = revive(model, images())
    assert record["left"] == {
        "its gamma and bias are not trained": {"frozen.1": [1]},
        "its layer did not run": {"idle.1": [1]},
        SHUT + "the model returns it": {"a.1": [1]},
        SHUT + "GroupNorm group reads it (native_group_norm)": {"b.1": [1]},
        "nothing that the model returns depends on it": {"lost.1": [2]},
    }
    assert record["filters"] == {"collapsed": 5, "revived": 0, "left": 5, "behind_them": 0}
    assert apart(original, model) < 1e-10
    assert "1 left: nothing that" in summary(record)


def test_below_the_threshold_but_carrying():
    """gamma of 9e-4 with a reader that multiplies by 1,000: not to be touched."""
    model = settled(nn.Sequential(conv_bn(3, 4), nn.Conv2d(4, 2, 1, bias=False))).double()
    with torch.no_grad():
        model[0][1].weight[1] = 9e-4
        model[1].weight[:, 1] = 1000
        kill(model[0][1], [2])
    original = copy.deepcopy(model)
    record = revive(model, images())
    assert record["left"] == {"it still carries something": {"0.1": [1]}}
    assert record["revived"] == {"zeroed readers": {"0.1": [2]}}
    assert apart(original, model) < 1e-10
    with torch.no_grad():
        model[1].weight[:, 1] = 0.1
    record = revive(model, images())
    assert record["filters"] == {"collapsed": 1, "revived": 1, "left": 0, "behind_them": 0}
    assert 0 < record["proof"]["carried"] < 1e-3


def test_a_failure_changes_nothing():
    model = settled(chain())
    kill_at_random(model)
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CallError, match="cannot be called with images"):
        revive(model, torch.randn(2, 5, 8, 8))
    calls = []

    def fails_late(m):
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("a bad day")
        return m(images(2, dtype=torch.float32))

    with pytest.raises(KeyError):
        revive(model, fails_late)
    with pytest.raises(CallError, match="a tensor, the size of one, or a function"):
        revive(model, "images")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.training and not model[1].training
    model[0][1].weight.data[0] = torch.nan
    with pytest.raises(MeasureError, match="not finite"):
        revive(model, images(2, dtype=torch.float32))


def test_the_seed_decides_and_nobody_elses_random_numbers_are_drawn():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = settled(chain())
        kill_at_random(model)
        torch.manual_seed(5)
        revive(model, images(dtype=torch.float32), seed=seed)
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))
        found.append(model[0][0].weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_sync_bn():
    model = settled(chain())
    kill_at_random(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).double()
    original = copy.deepcopy(model)
    assert revive(model, images())["filters"]["revived"] == 14
    assert apart(original, model) < 1e-10


def check(seed, counts):
    """Of odd seeds in float32, where the surgery is exact and what is written down is rounded."""
    dtype, allowed = (torch.float32, 1e-4) if seed % 2 else (torch.float64, 1e-9)
    model = RandomNet(seed).eval().to(dtype)
    original = copy.deepcopy(model)
    record = revive(model, images(3, seed=seed, dtype=dtype))
    assert record["proof"]["difference"] < 1e-9
    found = apart(original.double(), copy.deepcopy(model).double())
    assert found < allowed + record["proof"]["carried"], model.steps
    counts.update(record["filters"])
    revived = channels(record)
    names = norm_modules(model)
    # A gradient: with the zeros behind it set to something, one arrives at gamma or bias.
    for way, layers in record["revived"].items():
        for name, indices in layers.items():
            bias = added_bias(names[name])
            assert torch.isfinite(bias).all()
            gamma = names[name].weight[indices]
            assert (gamma == 0).all() if way == "gamma 0" else (gamma.abs() >= 1e-3).all()
    assert len(revived) == record["filters"]["revived"] + record["filters"]["behind_them"]
    return record


@pytest.mark.parametrize("seed", SEEDS)
def test_no_random_network_computes_anything_else(seed):
    check(seed, collections.Counter())


# Filters with |gamma| < 1e-3, by plain torch, and how many of them are revived: LPRNet pools over
# channels, behind which nothing is followed.
COLLAPSED = {
    "akamaster_resnet20-12fca82f.th": (17, 17),
    "3ddfa_mb05.pth": (247, 242),
    "lprnet.pth": (791, 457),
    "ultralight_slim-320.pth": (52, 50),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", COLLAPSED)
def test_published_networks(file, checkpoints):
    kind, size = PUBLISHED[file]
    model = load(kind(), checkpoints / file)
    original = copy.deepcopy(model)
    record = revive(model, torch.rand(4, *size))
    collapsed, revived = COLLAPSED[file]
    filters = record["filters"]
    assert filters["collapsed"] == filters["revived"] + filters["left"] == collapsed
    assert filters["revived"] >= revived
    x = torch.rand(4, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert compare(tensors_in(original(x)), tensors_in(model(x))).relative < 1e-3
