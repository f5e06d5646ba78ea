"""FLOPs counted by hand, and by torch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from psbn_mmdet.collapse import MeasureError, measure, probe
from tests.helpers.collapsed_net import VARIANTS, Net, collapse_by_hand


@pytest.fixture
def net():
    torch.manual_seed(0)
    return collapse_by_hand(Net())


def conv_bn(c_in, c_out, kernel=3, **kwargs):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False, **kwargs),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


def kill(bn, *filters, bias=-0.3):
    """Collapsed; behind a ReLU dead, or with a positive bias constant."""
    with torch.no_grad():
        for i in filters:
            bn.weight[i] = 1e-6
            bn.bias[i] = bias


class Residual(nn.Module):
    """stem 3->4, then two blocks x + bn(conv(x)) 4->4, the first with a projection."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.project, self.bn0 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.bn0(self.project(x)) + self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.head(x)


class TestFlops:
    """On a 10 x 10 plane (100 positions) unless said; counts are channels in * out * k * k."""

    def remaining(self, model, size=(3, 10, 10)):
        flops = measure(model, inputs=size).flops
        return {row["name"]: row["remaining"] for row in flops.rows}, flops

    def test_plain_chain(self):
        model = nn.Sequential(conv_bn(3, 8), conv_bn(8, 6), nn.Conv2d(6, 2, 1))
        kill(model[0][1], 1, 2, 3)
        kill(model[1][1], 0)
        rows, flops = self.remaining(model)
        assert rows == {"0.0": 3 * 5 * 900, "1.0": 5 * 5 * 900, "2": 5 * 2 * 100}
        assert flops.total == (3 * 8 * 9 + 8 * 6 * 9 + 6 * 2) * 100
        assert flops.sparsity == pytest.approx(100 * (1 - (135 + 225 + 10) / (216 + 432 + 12)))

    def test_nothing_collapsed_saves_nothing_even_if_every_relu_is_silent(self):
        model = nn.Sequential(conv_bn(3, 8), conv_bn(8, 6), nn.Conv2d(6, 2, 1))
        with torch.no_grad():
            for bn in (model[0][1], model[1][1]):
                bn.bias.fill_(-50.0)
        assert self.remaining(model)[1].sparsity == 0

    def test_what_a_constant_makes_at_a_padded_border_is_no_constant(self):
        model = nn.Sequential(*conv_bn(3, 4)[:2], nn.Sigmoid(), conv_bn(4, 5), nn.Conv2d(5, 2, 1))
        kill(model[1], 0, 1, 2, 3)
        rows, _ = self.remaining(model)
        assert rows == {"0": 0, "3.0": 0, "4": 5 * 2 * 100}  # a fixed pattern arrives

    def test_a_constant_times_a_gate_is_no_constant(self):
        class Gate(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.gate = conv_bn(3, 4, 1), nn.Conv2d(3, 4, 1)
                self.out = nn.Conv2d(4, 2, 1)

            def forward(self, x):
                return self.out(self.body(x) * self.gate(x).sigmoid())

        model = Gate()
        kill(model.body[1], 0)
        kill(model.body[1], 1, bias=0.3)
        rows, _ = self.remaining(model)
        assert rows == {"body.0": 3 * 2 * 100, "gate": 3 * 4 * 100, "out": 3 * 2 * 100}

    def test_convolutions_without_a_norm_layer_keep_all_filters_whatever_their_bias(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
        nn.init.constant_(model[0].bias, -100.0)  # ReLU is silent on any input of the probe
        rows, _ = self.remaining(model)
        assert rows == {"0": 3 * 4 * 9 * 64, "2": 4 * 2 * 64}

    def test_stride_and_plane(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
        kill(model[1], 0, 1)
        rows, flops = self.remaining(model, (3, 12, 8))
        assert (rows["0"], flops.total) == (3 * 6 * 9 * 24, 3 * 8 * 9 * 24)

    def test_residual_with_the_shortcut_alive_keeps_the_channel(self):
        model = Residual()
        kill(model.bn1, 0, 1)
        kill(model.bn2, 3)
        rows, _ = self.remaining(model)
        assert rows == {
            "stem.0": 3 * 4 * 900,
            "project": 4 * 4 * 100,
            "conv1": 4 * 2 * 900,
            "conv2": 4 * 3 * 900,
            "head": 4 * 2 * 100,
        }

    def test_residual_with_the_shortcut_collapsed_too_loses_the_channel(self):
        model = Residual()
        kill(model.bn1, 0, 1)
        kill(model.bn0, 0, 2)
        rows, _ = self.remaining(model)
        # Channel 0 is gone from the sum; bn2 brings it back for the head.
        assert (rows["project"], rows["conv1"]) == (4 * 2 * 100, 4 * 2 * 900)
        assert (rows["conv2"], rows["head"]) == (3 * 4 * 900, 4 * 2 * 100)
        kill(model.bn2, 0)
        rows, _ = self.remaining(model)
        assert (rows["conv2"], rows["head"]) == (3 * 3 * 900, 3 * 2 * 100)

    def test_grouped_convolution_counts_each_group(self):
        model = nn.Sequential(conv_bn(3, 8), conv_bn(8, 4, groups=2))
        kill(model[0][1], 0, 1, 2, 7)  # group 0 sees 1 of 4 channels, group 1 sees 3
        kill(model[1][1], 3)  # group 0 has 2 filters, group 1 has 1
        rows, flops = self.remaining(model)
        assert rows["1.0"] == (1 * 2 + 3 * 1) * 900
        assert flops.rows[1]["total"] == 2 * 4 * 2 * 900

    def test_depthwise_convolution_passes_a_dead_channel_on(self):
        model = nn.Sequential(conv_bn(3, 6), conv_bn(6, 6, groups=6), conv_bn(6, 4, 1))
        kill(model[0][1], 0, 1)
        kill(model[1][1], 1, 5)
        rows, _ = self.remaining(model)
        # Depthwise: channels 0, 1 have no input, 5 no output. Pointwise: 2, 3, 4 arrive.
        assert rows == {"0.0": 3 * 4 * 900, "1.0": 3 * 900, "2.0": 3 * 4 * 100}

    def test_concatenation_keeps_positions(self):
        class Concat(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = conv_bn(3, 4, 1), conv_bn(3, 2, 1)
                self.out = nn.Conv2d(6, 6, 1, groups=3)

            def forward(self, x):
                x = torch.cat([self.a(x), F.max_pool2d(self.b(x), 3, 1, 1)], 1)
                return self.out(x)

        model = Concat()
        kill(model.a[1], 1, 2)
        kill(model.b[1], 0, 1)
        rows, _ = self.remaining(model)
        assert (rows["a.0"], rows["b.0"], rows["out"]) == (600, 0, (1 + 1 + 0) * 2 * 100)

    def test_a_filter_that_is_also_read_past_its_norm_stays(self):
        class PreActivation(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv0, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
                self.conv1 = nn.Conv2d(4, 4, 1)

            def forward(self, x):
                x = self.conv0(x)
                return x + self.conv1(F.relu(self.bn(x)))

        model = PreActivation()
        kill(model.bn, 0)
        rows, _ = self.remaining(model)
        assert rows == {"conv0": 3 * 4 * 100, "conv1": 3 * 4 * 100}

    def test_squeeze_and_excitation_sees_what_is_left(self):
        class SE(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = conv_bn(3, 8, 1)
                self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
                self.out = nn.Conv2d(8, 4, 1)

            def forward(self, x):
                x = self.body(x)
                gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
                return self.out(x * gate.sigmoid())

        model = SE()
        kill(model.body[1], 0, 4, 5)
        rows, _ = self.remaining(model)
        assert rows == {"body.0": 1500, "down": 5 * 2, "up": 2 * 8, "out": 5 * 4 * 100}

    def test_linear_layers_and_a_flattened_plane(self):
        model = nn.Sequential(conv_bn(3, 4, 1), nn.MaxPool2d(5), nn.Flatten())
        model += nn.Sequential(nn.Linear(16, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 2))
        kill(model[0][1], 2)
        kill(model[4], 0, 9)
        rows, _ = self.remaining(model)
        assert rows == {"0.0": 3 * 3 * 100, "3": 12 * 8, "6": 8 * 2}

    def test_transposed_convolution_counts_at_its_input(self):
        model = nn.Sequential(conv_bn(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6))
        kill(model[0][1], 0)
        kill(model[2], 0, 1)
        rows, flops = self.remaining(model)
        assert (rows["1"], flops.rows[1]["total"]) == (3 * 4 * 4 * 100, 4 * 6 * 4 * 100)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_every_kind_of_layer_gives_the_same(self, net, variant):
        # 10 x 10: conv1 3->8, block.conv1 8->4, block.conv2 4->8, down 8->8 (1x1), fc 8->5
        rows, _ = self.remaining(VARIANTS[variant](net))
        want = {"conv1": 3 * 5 * 900, "block.conv1": 5 * 3 * 900, "block.conv2": 3 * 7 * 900}
        want.update({"block.down.0": 5 * 5 * 100, "fc": 8 * 5})
        assert rows == want

    def test_the_model_and_the_random_state_stay_as_they_are(self, net):
        net.train()
        net.block.eval()
        before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
        state = torch.get_rng_state()
        measure(net, inputs=(3, 10, 10))
        assert [m.training for m in net.modules()] == modes
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

    def test_a_function_calls_the_model_as_it_likes(self, net):
        by_size = measure(net, inputs=(3, 10, 10)).flops
        by_call = measure(net, inputs=lambda m: m(torch.randn(4, 3, 10, 10))).flops
        assert (by_call.total, by_call.remaining) == (4 * by_size.total, 4 * by_size.remaining)

    def test_a_failing_call_leaves_no_hooks(self, net):
        with pytest.raises(MeasureError):
            measure(net, inputs=(7, 10, 10))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

    def test_a_model_that_runs_no_convolution(self):
        with pytest.raises(ValueError, match="ran no convolution"):
            probe(nn.BatchNorm2d(3), {}, (3, 4, 4))


class TestKinds:
    def test_batch_norm_1d_on_as_many_samples_as_channels(self):
        # (N, C, L) = (2, 2, 5): the channel is the second dimension, whatever the sizes.
        model = nn.Sequential(nn.Conv1d(3, 2, 1), nn.BatchNorm1d(2), nn.Conv1d(2, 7, 1))
        kill(model[1], 0)
        flops = measure(model, inputs=(3, 5)).flops
        assert [row["remaining"] for row in flops.rows] == [3 * 1 * 5, 1 * 7 * 5]

    @pytest.mark.parametrize("batched", [True, False])
    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_instance_norm_with_and_without_a_batch(self, d, batched):
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
        instance_norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[d - 1]
        model = nn.Sequential(conv(3, 2, 1), instance_norm(2, affine=True), conv(2, 7, 1))
        kill(model[1], 1)
        x = torch.randn(2, 3, *[2] * d) if batched else torch.randn(3, *[2] * d)
        flops = measure(model, inputs=lambda m: m(x)).flops
        positions = (1 + batched) * 2**d
        assert [r["remaining"] for r in flops.rows] == [3 * positions, 7 * positions]

    def test_a_convolution_of_a_list_is_counted_for_each(self):
        from mmdet.models.backbones.trident_resnet import TridentConv

        class Trident(nn.Module):
            def __init__(self, test_branch):
                super().__init__()
                self.stem = conv_bn(3, 4, 1)
                self.branches = 3 if test_branch == -1 else 1
                self.conv = TridentConv(4, 6, 3, trident_dilations=(1, 2, 3), bias=False,
                                        test_branch_idx=test_branch)  # fmt: skip
                nn.init.normal_(self.conv.weight)  # mmdet leaves it uninitialised
                self.bn = nn.BatchNorm2d(6)

            def forward(self, x):
                x = self.stem(x)
                return [self.bn(y) for y in self.conv([x] * self.branches)]

        for test_branch, branches in [(-1, 3), (1, 1)]:
            model = Trident(test_branch)
            kill(model.stem[1], 0)
            kill(model.bn, 0, 1)
            flops = measure(model, inputs=(3, 10, 10)).flops
            rows = {row["name"]: (row["total"], row["remaining"]) for row in flops.rows}
            assert rows["conv"] == (branches * 4 * 6 * 900, branches * 3 * 4 * 900)

    def test_a_convolution_given_by_name(self):
        class ByName(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = conv_bn(3, 4, 1), nn.Conv2d(4, 2, 1)

            def forward(self, x):
                return self.head(input=self.body(x))

        model = ByName()
        kill(model.body[1], 0)
        rows = measure(model, inputs=(3, 10, 10)).flops.rows
        assert [row["remaining"] for row in rows] == [3 * 3 * 100, 3 * 2 * 100]

    def test_channels_that_are_constant_anyway_are_not_saved(self):
        class Queries(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.merge = conv_bn(3, 4, 1), nn.Conv2d(6, 2, 1)

            def forward(self, x):
                x = self.body(x)
                return self.merge(torch.cat([x, torch.zeros_like(x[:, :2])], 1))

        model = Queries()
        assert measure(model, inputs=(3, 10, 10)).flops.sparsity == 0
        kill(model.body[1], 0)
        rows = measure(model, inputs=(3, 10, 10)).flops.rows
        assert [row["remaining"] for row in rows] == [3 * 3 * 100, (3 + 2) * 2 * 100]


class TestBadInput:
    @pytest.mark.parametrize("size", [(), (3, 0, 10), (3, 10, -1), (3.0, 10, 10), (True, 9, 9)])
    def test_a_size_that_is_none(self, net, size):
        with pytest.raises(MeasureError, match="positive whole numbers"):
            probe(net, {}, size)

    @pytest.mark.parametrize("size", [(7, 10, 10), (3,)])
    def test_a_size_that_the_model_cannot_take_is_one_line(self, net, size):
        with pytest.raises(MeasureError) as caught:
            measure(net, inputs=size)
        assert "\n" not in str(caught.value)
        assert f"cannot be called with an input of size {size}: RuntimeError" in str(caught.value)

    def test_what_a_function_raises_is_its_own(self, net):
        with pytest.raises(ZeroDivisionError):
            measure(net, inputs=lambda m: 1 / 0)

    def test_weights_that_are_not_finite_cost_what_others_do(self, net):
        want = measure(net, inputs=(3, 10, 10)).flops
        with torch.no_grad():
            net.block.conv1.weight[0, 0, 0, 0] = torch.nan
        assert measure(net, inputs=(3, 10, 10)).flops == want

    def test_weights_that_have_decayed_to_nothing_cost_what_others_do(self, net):
        want = measure(net, inputs=(3, 10, 10)).flops
        with torch.no_grad():
            for conv in (net.conv1, net.block.conv1, net.block.conv2):
                conv.weight *= 1e-41
            net.block.bn1.running_var.zero_()
        assert measure(net, inputs=(3, 10, 10)).flops == want

    def test_a_gamma_that_is_not_finite_is_live(self, net):
        with torch.no_grad():
            net.bn1.weight[1] = torch.nan
        flops = measure(net, inputs=(3, 10, 10)).flops
        assert flops.rows[0]["remaining"] == 3 * 5 * 900


class Attention(nn.Module):
    """Products outside of modules: 2 tokens^2 channels of the attention, and those of its layer."""

    def __init__(self):
        super().__init__()
        self.body, self.head = conv_bn(3, 8, 1), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.body(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_a_module_may_be_given_a_view_of_a_parameter():
    """As Deformable DETR gives its queries to a linear layer."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.queries, self.linear = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 5)

        def forward(self, x):
            return self.bn(self.conv(x)).relu().mean() + self.linear(self.queries[None]).sum()

    model = Queries()
    model.linear.bias.requires_grad = False
    # 3 * 4 for each of 8 * 8 pixels; what does not depend on the image counts whole.
    assert probe(model, {}, (3, 8, 8)).total == 3 * 4 * 64 + 6 * 4 * 5
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["linear.bias"]


def test_what_is_multiplied_outside_of_modules_counts_and_stays():
    model = Attention()
    kill(model.body[1], 0, 1)
    flops = measure(model, inputs=(3, 4, 4)).flops
    tokens = 16
    # Queries, keys, values and output: 4 * 8 * 8 for each token; then two products of the tokens.
    assert flops.elsewhere == tokens * 4 * 8 * 8 + 2 * tokens * tokens * 8
    assert flops.total == tokens * (3 * 8 + 8 * 5) + flops.elsewhere
    assert flops.remaining == tokens * (3 * 6 + 8 * 5) + flops.elsewhere


def as_3d():
    return nn.Sequential(
        nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(),
        nn.ConvTranspose3d(4, 6, 2, 2, groups=2), nn.Flatten(), nn.Linear(6 * 8 * 8 * 8, 3),
    )  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_count_by_hand(layers, bidirectional):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 1)
            self.lstm = nn.LSTM(6, 5, layers, bidirectional=bidirectional, batch_first=True)

        def forward(self, x):
            return self.lstm(self.conv(x).flatten(2).transpose(1, 2))[0]

    ways = 1 + bidirectional
    first, others = 4 * 5 * (6 + 5), 4 * 5 * (5 * ways + 5)
    flops = probe(Recurrent(), {}, (3, 2, 7))
    assert flops.elsewhere == 14 * ways * (first + (layers - 1) * others)
    assert flops.total == flops.elsewhere + 3 * 6 * 14


COUNTED_BY_TORCH = {
    "residual": (Residual, (3, 10, 10)),
    "3d, transposed and grouped": (as_3d, (2, 6, 6, 6)),
    "1d, strided and dilated": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, 2, dilation=2, groups=2), nn.Conv1d(6, 2, 1)),
        (4, 33),
    ),
    "ResNet-18": (lambda: mmdet_backbone("ResNet", depth=18), (3, 64, 96)),
    "MobileNetV2": (lambda: mmdet_backbone("MobileNetV2", widen_factor=0.5), (3, 64, 64)),
    "Swin": (
        lambda: mmdet_backbone(
            "SwinTransformer", embed_dims=24, depths=(2, 2), num_heads=(2, 4), strides=(4, 2),
            out_indices=(0, 1)),
        (3, 64, 64),
    ),
}  # fmt: skip


def mmdet_backbone(kind, **kwargs):
    from mmdet.models import backbones

    return getattr(backbones, kind)(**kwargs)


@pytest.mark.parametrize("network", COUNTED_BY_TORCH)
def test_totals_are_those_of_torch(network):
    build, size = COUNTED_BY_TORCH[network]
    model = build()
    model.eval()  # mmdet's backbones return None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, *size))
    flops = probe(model, {}, size)
    assert flops.total == flops.remaining == counter.get_total_flops() // 2


def test_deformable_convolutions_count_once():
    from mmcv.ops import ModulatedDeformConv2dPack

    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    )
    kill(model[1], 0)
    flops = measure(model, inputs=(3, 10, 10)).flops
    # The offsets and masks are 3 * 9 channels of a 3 x 3 convolution of their own.
    rows = {row["name"]: (row["total"], row["remaining"]) for row in flops.rows}
    assert rows["2"] == (4 * 6 * 900, 4 * 6 * 900)  # an operator of mmcv needs what it gets
    assert rows["2.conv_offset"] == (4 * 27 * 900, 3 * 27 * 900)
    assert (flops.elsewhere, flops.total) == (0, 100 * (12 + 9 * (24 + 108)))
