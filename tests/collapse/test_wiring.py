"""The wiring of networks whose channels were followed by hand."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from psbn_mmdet import to_psbn
from psbn_mmdet.collapse.wiring import trace
from tests.helpers.strippable import conv_bn, kill, with_statistics


class Net(nn.Module):
    """Layers by name and a forward as a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, *inputs):
        return self.function(self, *inputs)


def wired(forward, *shapes, killed=(), constants=None, **layers):
    """The wiring of a network on random inputs; ``killed``: (norm, filter, bias)."""
    model = with_statistics(Net(forward, **layers))
    for norm, index, bias in killed:
        kill(model.get_submodule(norm), [index], bias)
    inputs = [torch.randn(2, *shape) for shape in shapes or [(3, 8, 8)]]
    return trace(model, lambda m: m(*inputs), constants)


def frozen(wiring, reader):
    """Which input channels of a layer are frozen."""
    [found] = [name for name, each in wiring.readers.items() if each.module == reader]
    return wiring.frozen_inputs(found).nonzero()[0].tolist()


def group(wiring, norm, index):
    return set(wiring.writers(norm, index))


def test_a_chain():
    """conv a, BN, ReLU, conv b: filter i of a is channel i of the BN and arrives in b at i."""
    w = wired(lambda m, x: m.b(m.a(x)), a=conv_bn(3, 4), b=nn.Conv2d(4, 2, 1))
    channel = w.channel("a.1", 2)
    assert channel.producers == (("a.0", 2),)
    assert channel.readers == (("b", 2),)
    assert channel.activation == "relu"
    assert channel.held == ()
    [relu] = channel.rectifiers
    assert (relu.op, relu.module, relu.after_sum) == ("relu", "a.2", False)


def test_the_firing_share_is_that_of_the_run():
    model = with_statistics(nn.Sequential(conv_bn(3, 4), nn.Conv2d(4, 2, 1)))
    x = torch.randn(5, 3, 8, 8)
    w = trace(model, lambda m: m(x))
    with torch.no_grad():
        expected = (model[0][1](model[0][0](x)) > 0).float().mean((0, 2, 3))
    found = [c.rectifiers[0].firing for c in w.channels("0.1")]
    torch.testing.assert_close(torch.tensor(found), expected)


def test_a_residual_sum_joins_its_channels_and_the_rectifier_is_behind_it():
    def forward(m, x):
        x = m.stem(x)
        return m.out(F.relu(m.branch(x) + x))

    w = wired(
        forward,
        stem=conv_bn(3, 4),
        branch=conv_bn(4, 4, act=None),
        out=nn.Conv2d(4, 2, 1),
        killed=[("stem.1", 0, -1.0), ("branch.1", 0, 0.0), ("branch.1", 1, 0.5)],
    )
    assert group(w, "branch.1", 3) == {("stem.1", 3), ("branch.1", 3)}
    channel = w.channel("branch.1", 3)
    assert channel.activation == "sum"
    assert [r.after_sum for r in channel.rectifiers] == [True]
    assert channel.readers == (("out", 3),)
    stem = w.channel("stem.1", 3)
    assert set(stem.readers) == {("out", 3), ("branch.0", 3)}
    assert [(r.module, r.after_sum) for r in stem.rectifiers] == [("stem.2", False)]
    assert frozen(w, "out") == [0]  # dead on both sides; filter 1 is on one side only
    assert frozen(w, "branch.0") == [0]


@pytest.mark.parametrize("bias", [-0.95, -30.0, 0.0, 3.0])
def test_a_live_channel_beside_a_dead_one_is_live_whatever_the_bias(bias):
    """A probe with numbers up to 0.9 took the sum for dead."""
    w = wired(
        lambda m, x: m.out(F.relu(m.a(x) + m.b(x))),
        a=conv_bn(3, 2, act=None),
        b=conv_bn(3, 2, act=None),
        out=nn.Conv2d(2, 2, 1),
        killed=[("a.1", 0, bias)],
    )
    assert frozen(w, "out") == []


@pytest.mark.parametrize("act", [nn.Threshold(1, 0), nn.Threshold(9, 0), nn.Hardswish()])
def test_a_threshold_that_no_number_reaches_freezes_nothing(act):
    w = wired(
        lambda m, x: m.b(act(m.a(x) - 5)),
        a=conv_bn(3, 3, act=None),
        b=nn.Conv2d(3, 2, 1),
        killed=[("a.1", 1, 0.0)],
    )
    assert frozen(w, "b") == [1]
    assert w.channel("a.1", 0).rectifiers[0].firing < 0.5


def test_concatenation_shuffle_split_and_pad_are_followed():
    """Of cat(a, b), 2 + 4 channels, shuffled in 2 groups: a0 b1 a1 b2 b0 b3."""

    def forward(m, x):
        shuffled = nn.ChannelShuffle(2)(torch.cat([m.a(x), m.b(x)], 1))
        left, right = shuffled.split(2, 1)[0], shuffled[:, 4:]
        return m.whole(shuffled), m.left(left), m.right(F.pad(right, (0, 0, 0, 0, 1, 2)))

    w = wired(
        forward,
        a=conv_bn(3, 2),
        b=conv_bn(3, 4),
        whole=nn.Conv2d(6, 2, 3, padding=1),
        left=nn.Conv2d(2, 2, 1),
        right=nn.Conv2d(5, 2, 1),
        killed=[("a.1", 0, -1.0), ("b.1", 3, -1.0)],
    )
    where = {("a.1", 0): 0, ("a.1", 1): 2, ("b.1", 0): 4, ("b.1", 1): 1, ("b.1", 2): 3}
    for (norm, index), at in where.items():
        assert ("whole", at) in w.channel(norm, index).readers
    assert set(w.channel("b.1", 1).readers) == {("whole", 1), ("left", 1)}
    assert set(w.channel("b.1", 3).readers) == {("whole", 5), ("right", 2)}
    assert frozen(w, "whole") == [0, 5]
    assert frozen(w, "left") == [0]
    assert frozen(w, "right") == [0, 2, 3, 4]  # padding is 0 for ever


def test_the_shortcut_of_option_a():
    """x[:, :, ::2, ::2] padded by 1 channel on both sides, as in ResNets for CIFAR."""

    def forward(m, x):
        x = m.stem(x)
        return m.out(F.relu(m.branch(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))))

    branch = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4))
    w = wired(
        forward,
        stem=conv_bn(3, 2),
        branch=branch,
        out=nn.Conv2d(4, 2, 1),
        killed=[("branch.1", 0, -0.5), ("branch.1", 1, -0.5)],
    )
    assert group(w, "stem.1", 0) == {("stem.1", 0), ("branch.1", 1)}
    assert group(w, "branch.1", 0) == {("branch.1", 0)}
    assert frozen(w, "out") == [0]


def test_a_gate_of_squeeze_and_excitation():
    """x * sigmoid(fc(mean(x))): what is 0 in x is 0 behind; the gate runs along with x."""

    def forward(m, x):
        x = m.stem(x)
        return m.out(x * torch.sigmoid(m.fc(x.mean((2, 3), keepdim=True))))

    w = wired(
        forward,
        stem=conv_bn(3, 3),
        fc=nn.Conv2d(3, 3, 1),
        out=nn.Conv2d(3, 2, 3, padding=1),
        killed=[("stem.1", 1, -1.0)],
    )
    assert frozen(w, "fc") == frozen(w, "out") == [1]
    label = w.group[w.output("stem.1")][1]
    gate = w.readers["fc.weight"].start + 1
    assert w.group[gate] == label


def test_a_gate_that_is_spread_over_channels_is_held_and_joins_none():
    w = wired(
        lambda m, x: m.out(m.stem(x) * m.gate(x)),
        stem=conv_bn(3, 3),
        gate=conv_bn(3, 1),
        out=nn.Conv2d(3, 2, 1),
    )
    assert group(w, "stem.1", 0) == {("stem.1", 0)}
    assert "spreads it" in w.channel("gate.1", 0).held[0]


def test_depthwise_and_grouped_convolutions():
    """A depthwise filter is its input channel; a grouped filter reads its group."""
    w = wired(
        lambda m, x: m.out(m.grouped(m.dw(m.stem(x)))),
        stem=conv_bn(3, 4),
        dw=conv_bn(4, 4, groups=4),
        grouped=conv_bn(4, 4, groups=2),
        out=nn.Conv2d(4, 2, 1),
        killed=[("dw.1", 0, -1.0), ("dw.1", 1, -1.0)],
    )
    assert group(w, "stem.1", 2) == {("stem.1", 2), ("dw.1", 2)}
    assert w.channel("stem.1", 2).readers == (("dw.0", 2),)
    assert frozen(w, "grouped.0") == [0, 1]
    # Filters 0 and 1 of the grouped one read the dead channels alone, with zeros around: frozen.
    assert frozen(w, "out") == [0, 1]


def test_a_constant_that_a_padded_convolution_reads_is_none_behind_it():
    layers = dict(stem=conv_bn(3, 1), out=nn.Conv2d(2, 2, 1))
    dead = [("stem.1", 0, 0.5)]
    for padding in (0, 1):
        middle = nn.Conv2d(1, 2, 3, padding=padding)
        w = wired(lambda m, x: m.out(m.middle(m.stem(x))), middle=middle, killed=dead, **layers)
        assert frozen(w, "middle") == [0]
        assert frozen(w, "out") == ([] if padding else [0, 1])


def test_a_shared_layer_reads_several_channels_at_one_place():
    def forward(m, x):
        fine = m.stem(x)
        coarse = m.down(fine)
        return [m.out(n(m.shared(x)).relu()) for n, x in ((m.n0, fine), (m.n1, coarse))]

    w = wired(
        forward,
        stem=conv_bn(3, 4),
        down=conv_bn(4, 4, stride=2),
        shared=nn.Conv2d(4, 4, 3),
        n0=nn.BatchNorm2d(4),
        n1=nn.BatchNorm2d(4),
        out=nn.Conv2d(4, 2, 1),
        killed=[("stem.1", 1, -1.0), ("down.1", 1, -1.0), ("stem.1", 2, -1.0), ("n0", 3, -1.0)],
    )
    assert group(w, "stem.1", 1) == {("stem.1", 1), ("down.1", 1)}
    assert group(w, "n0", 0) == {("n0", 0), ("n1", 0)}
    assert w.channel("n1", 0).producers == (("shared", 0),)
    assert frozen(w, "shared") == [1]  # 2 varies at the other level
    assert frozen(w, "out") == []


def test_repvgg_sums_of_three_branches():
    w = wired(
        lambda m, x: m.out(F.relu(m.a(m.stem(x)) + m.b(m.stem(x)) + m.c(m.stem(x)))),
        stem=conv_bn(3, 3),
        a=conv_bn(3, 3, act=None),
        b=conv_bn(3, 3, 1, act=None),
        c=nn.BatchNorm2d(3),
        out=nn.Conv2d(3, 2, 1),
        killed=[(n, 2, -2.0) for n in ("a.1", "b.1", "c")] + [("a.1", 1, -5.0)],
    )
    assert frozen(w, "out") == [2]
    assert group(w, "c", 0) == {("stem.1", 0), ("c", 0), ("a.1", 0), ("b.1", 0)}
    assert w.channel("c", 0).producers == ()


@pytest.mark.parametrize(
    ("act", "op"),
    [
        (F.relu, "relu"),
        (F.relu6, "hardtanh"),
        (lambda x: x.clamp(min=0), "clamp"),
        (F.hardswish, "hardswish"),
        (F.hardsigmoid, "hardsigmoid"),
        (lambda x: torch.where(x > 0, x, 0.0), "where"),
        (lambda x: torch.maximum(x, torch.zeros(())), "maximum"),
        (lambda x: x * (x > 0), "mul"),
        (nn.Threshold(0.5, 0), "threshold"),
    ],
)
def test_rectifiers_are_recognised_and_their_firing_is_where_a_gradient_passes(act, op):
    model = with_statistics(
        Net(lambda m, x: m.b(act(m.a(x))), a=conv_bn(3, 4, act=None), b=nn.Conv2d(4, 2, 1))
    )
    with torch.no_grad():
        model.a[1].weight *= 3
    x = torch.randn(4, 3, 8, 8)
    w = trace(model, lambda m: m(x))
    before = model.a(x).detach().requires_grad_()
    [gradient] = torch.autograd.grad(act(before).sum(), before)
    for channel in w.channels("a.1"):
        [found] = channel.rectifiers
        assert (found.op, found.after_sum) == (op, False)
        share = (gradient[:, channel.index] != 0).double().mean()
        assert found.firing == pytest.approx(float(share), abs=1e-6)
        assert channel.activation == op
        assert channel.readers == (("b", channel.index),)


@pytest.mark.parametrize(
    ("act", "nature"), [(nn.PReLU(4), "leaky"), (nn.SiLU(), "smooth"), (nn.Identity(), "none")]
)
def test_other_activations_pass_a_gradient_everywhere(act, nature):
    w = wired(
        lambda m, x: m.b(m.act(m.a(x))),
        a=conv_bn(3, 4, act=None),
        act=act,
        b=nn.Conv2d(4, 2, 1),
        killed=[("a.1", 3, -1.0)],
    )
    channel = w.channel("a.1", 3)
    assert (channel.activation, channel.rectifiers) == (nature, ())
    assert frozen(w, "b") == [3]


def test_what_is_not_understood_is_held_and_named_and_the_rest_is_followed():
    def forward(m, x):
        x = m.b(m.norm(m.a(x)))
        return m.out(x.softmax(1)), m.other(x)

    w = wired(
        forward,
        a=conv_bn(3, 4),
        norm=nn.GroupNorm(2, 4),
        b=conv_bn(4, 4),
        out=nn.Conv2d(4, 2, 1),
        other=nn.Conv2d(4, 2, 1),
    )
    assert "GroupNorm norm" in w.channel("a.1", 0).held[0]
    assert "_softmax" in w.channel("b.1", 0).held[0]
    assert ("other", 1) in w.channel("b.1", 1).readers


def test_attention_does_not_couple_what_it_reads():
    def forward(m, x):
        q, k, v = (each(x).flatten(2) for each in (m.q, m.k, m.v))
        y = (q.transpose(1, 2) @ k).softmax(2) @ v.transpose(1, 2)
        return m.out(y.transpose(1, 2).reshape(x.shape[0], 4, *x.shape[2:]))

    w = wired(
        forward,
        q=conv_bn(3, 4),
        k=conv_bn(3, 4),
        v=conv_bn(3, 4),
        out=nn.Conv2d(4, 2, 1),
        killed=[("v.1", 1, -1.0)],
    )
    assert all(w.channel(f"{n}.1", 1).held for n in "qkv")
    assert group(w, "v.1", 1) == {("v.1", 1)}
    assert frozen(w, "out") == []


def test_several_inputs_and_outputs_of_every_kind():
    @dataclasses.dataclass
    class Outputs:
        first: torch.Tensor
        rest: dict

    def forward(m, x, y):
        x, y = m.a(x), m.b(y)
        return Outputs(x, {"sum": [m.out(x + y)]})

    w = wired(
        forward, (3, 8, 8), (2, 8, 8), a=conv_bn(3, 4), b=conv_bn(2, 4), out=nn.Conv2d(4, 2, 1)
    )
    assert w.channel("a.1", 0).held == ("the model returns it",)
    assert w.channel("b.1", 0).held == ()
    assert group(w, "a.1", 1) == {("a.1", 1), ("b.1", 1)}


def test_writes_into_views_are_seen():
    """y = zeros; y[:, 1:3] = a; y[:, 0] += b."""

    def forward(m, x):
        a, b = m.a(x), m.b(x)
        y = torch.zeros(len(x), 4, 8, 8)
        y[:, 1:3] = a
        y[:, 0] += b[:, 0]
        return m.out(y)

    w = wired(forward, a=conv_bn(3, 2), b=conv_bn(3, 1), out=nn.Conv2d(4, 2, 1))
    assert w.channel("a.1", 1).readers == (("out", 2),)
    assert w.channel("b.1", 0).readers == (("out", 0),)
    assert frozen(w, "out") == [3]


def test_what_an_operator_writes_out_of_sight_is_found():
    class Unseen(nn.Module):
        """As mmcv's own kernels do: out of the dispatcher's sight."""

        def __init__(self, make):
            super().__init__()
            self.make = make

        def forward(self, x):
            y = self.make(x)
            y.numpy()[:] = x.numpy()[:, ::-1]
            return y

    for make in (torch.empty_like, torch.zeros_like):
        w = wired(
            lambda m, x: m.out(m.op(m.a(x))),
            a=conv_bn(3, 2),
            op=Unseen(make),
            out=nn.Conv2d(2, 2, 1),
            killed=[("a.1", 0, -1.0)],
        )
        assert "Unseen op" in w.channel("a.1", 0).held[0]
        assert frozen(w, "out") == []


def test_padding_within_a_subclass_of_a_convolution_is_seen():
    class Adaptive(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    w = wired(
        lambda m, x: m.out(m.b(m.a(x))),
        a=conv_bn(3, 2),
        b=Adaptive(2, 3, 2),
        out=nn.Conv2d(3, 2, 1),
        killed=[("a.1", 0, 0.5), ("a.1", 1, 0.7)],
    )
    assert w.channel("a.1", 0).readers == (("b", 0),)
    assert frozen(w, "b") == [0, 1]
    assert frozen(w, "out") == []  # at the border other numbers


def test_computed_weights_are_not_understood():
    model = nn.Sequential(
        conv_bn(3, 4), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 2, 1)
    )
    with_statistics(model)
    w = trace(model, lambda m: m(torch.randn(2, 3, 8, 8)))
    assert w.channel("0.1", 0).held
    assert [r.module for r in w.readers.values()] == ["0.0", "2"]


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4)])
def test_norm_layers_in_training_mode_and_psbn_are_recognised(norm):
    model = to_psbn(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))).train()
    with torch.no_grad():
        model[1].weight[1] = 0
        model[1].beta[1] = -1.0
    w = trace(model, lambda m: m(torch.randn(2, 3, 8, 8)))
    assert w.channel("1", 2).producers == (("0", 2),)
    assert w.channel("1", 2).readers == (("3", 2),)
    assert frozen(w, "3") == [1]
    # beta goes with its channel; the one number alpha with none.
    assert len({w.group[node] for node in range(*w.output("1").indices(w.size))}) == 4


def test_constants_can_be_supposed():
    """Filters that are told to be constant are frozen, with that number, and nothing is changed."""
    model = with_statistics(nn.Sequential(conv_bn(3, 3), nn.Conv2d(3, 2, 1)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    nan = float("nan")
    x = torch.randn(2, 3, 8, 8)
    w = trace(model, lambda m: m(x), {"0.1": torch.tensor([nan, 0.25, -3.0])})
    assert frozen(w, "1") == [1, 2]
    node = w.readers["1.weight"].slots[:, 1]
    assert w.value[node][1:].tolist() == [0.25, 0.0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_layer_called_on_its_own_output_is_not_frozen_by_itself():
    def forward(m, x):
        x = m.stem(x)
        for _ in range(3):
            x = m.loop(x)
        return m.out(x)

    layers = dict(stem=conv_bn(3, 2), loop=conv_bn(2, 2), out=nn.Conv2d(2, 2, 1))
    assert frozen(wired(forward, **layers), "out") == []
    assert frozen(wired(forward, killed=[("loop.1", 0, -1.0)], **layers), "out") == [0]
