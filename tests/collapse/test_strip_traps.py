"""Networks in which filters seem to carry nothing and do, or seem to do and do not."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from psbn_mmdet.collapse import StripError, strip
from psbn_mmdet.collapse.calls import compare
from psbn_mmdet.collapse.wiring import trace
from tests.helpers.published import PUBLISHED, CifarResNet20, load
from tests.helpers.strippable import chain, conv_bn, head, kill, kill_at_random, with_statistics

SIZE = (3, 16, 16)


class Net(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def make(forward, **layers):
    return with_statistics(Net(forward, **layers))


def removed(stripped):
    return {
        name: sorted(i for each in kinds.values() for i in each)
        for name, kinds in stripped.record["removed"].items()
    }


def whys(stripped):
    return {each["layer"]: each["why"] for each in stripped.record["kept"]}


def assert_equal_everywhere(model, stripped, shapes=((2, *SIZE),)):
    for shape in shapes:
        for scale in (1, -3, 100, 0.01):
            x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(5))
            with torch.no_grad():
                torch.testing.assert_close(stripped.model(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [-0.9, -5.0, -100.0])
def test_live_filters_beside_a_dead_branch_stay(bias):
    """RepVGG's blocks, ResNets' shortcuts."""
    model = make(
        lambda m, x: m.head(F.relu(m.a(x) + m.b(x))),
        a=conv_bn(3, 8, act=None), b=conv_bn(3, 8, 1, act=None), head=head(8),
    )  # fmt: skip
    kill(model.a[1], [1, 2, 3], bias)
    kill(model.b[1], [3, 4], bias)
    stripped = strip(model, SIZE)
    assert removed(stripped) == {"a.1": [3], "b.1": [3]}
    assert_equal_everywhere(model, stripped)


@pytest.mark.parametrize("act", [nn.Threshold(1, 0), lambda x: F.relu(x - 1), nn.Threshold(20, 0)])
def test_live_filters_behind_a_high_threshold_stay(act):
    model = make(lambda m, x: m.head(act(m.a(x))), a=conv_bn(3, 8, act=None), head=head(8))
    kill(model.a[1], [0, 5], 0.3)
    stripped = strip(model, SIZE)
    assert removed(stripped) == {"a.1": [0, 5]}
    assert_equal_everywhere(model, stripped)


def test_behind_a_channel_shuffle_the_dead_filters_go_and_no_others():
    """What the shuffle pairs goes in pairs; weights behind it follow their channels."""
    model = nn.Sequential(conv_bn(3, 8), nn.ChannelShuffle(2), conv_bn(8, 8), head(8))
    with_statistics(model)
    kill(model[0][1], [0, 1, 6, 7])
    stripped = strip(model, SIZE)
    assert removed(stripped) == {"0.1": [0, 1, 6, 7]}
    assert_equal_everywhere(model, stripped)
    kill(model[0][1], [2])  # 3 of one half, 2 of the other
    stripped = strip(model, SIZE)
    assert len(removed(stripped)["0.1"]) == 4
    assert_equal_everywhere(model, stripped)


def test_a_producer_that_varies_goes_only_if_nobody_else_uses_it():
    """q, k and v are coupled by index, and only v is dead."""

    def forward(m, x):
        q, k, v = (each(x).flatten(2) for each in (m.q, m.k, m.v))
        y = (q.transpose(1, 2) @ k).softmax(2) @ v.transpose(1, 2)
        return m.out(y.transpose(1, 2).reshape(len(x), 8, *x.shape[2:]))

    layers = {n: conv_bn(3, 8) for n in "qkv"}
    model = make(forward, out=conv_bn(8, 4), **layers)
    kill(model.v[1], [1, 2, 3])
    stripped = strip(model, SIZE)
    assert removed(stripped) == {}
    assert "reads it" in whys(stripped)["v.1"]


def test_padding_within_forward_is_seen_at_the_size_where_it_happens():
    class Adaptive(nn.Conv2d):
        """Pads nothing at even sizes."""

        def forward(self, x):
            return super().forward(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))

    model = make(
        lambda m, x: m.out(m.b(m.a(x))), a=conv_bn(3, 8), b=Adaptive(8, 4, 2, 2),
        out=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    kill(model.a[1], [1, 2], 0.8)
    kill(model.a[1], [3], -0.8)
    stripped = strip(model, SIZE)
    assert removed(stripped) == {"a.1": [3]}
    assert_equal_everywhere(model, stripped, [(2, 3, 16, 16), (2, 3, 17, 17)])


class WithAuxiliary(nn.Module):
    """A head that runs while training only; or an early exit, which runs never here."""

    def __init__(self, runs):
        super().__init__()
        self.a, self.b, self.head, self.aux = conv_bn(3, 8), conv_bn(8, 8), head(8), conv_bn(8, 4)
        self.runs = runs

    def forward(self, x, early=False):
        x = self.a(x)
        if (self.training and self.runs == "training") or early:
            return self.head(self.b(x)), self.aux(x)
        return self.head(self.b(x))


@pytest.mark.parametrize("runs", ["training", "never"])
def test_readers_that_did_not_run(runs):
    model = with_statistics(WithAuxiliary(runs))
    kill(model.a[1], [1, 2])
    kill(model.b[1], [3])
    stripped = strip(model, SIZE)
    assert_equal_everywhere(model, stripped)
    if runs == "training":
        assert removed(stripped) == {"a.1": [1, 2], "b.1": [3]}
        assert stripped.model.aux[0].in_channels == 6
    else:
        assert removed(stripped) == {}
        assert "did not run" in whys(stripped)["a.1"]
    x = torch.randn(2, *SIZE)
    for a, b in zip(model(x, early=True), stripped.model(x, early=True), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    stripped.model.train()(x)


def test_differences_are_told_channel_by_channel():
    """A score that is off by .2 beside coordinates of 1000."""
    expected = torch.tensor([[[0.5], [1000.0]]]).double()
    actual = torch.tensor([[[0.7], [1000.0]]]).double()
    found = compare([expected], [actual])
    assert found.relative == pytest.approx(0.4, rel=1e-4)
    assert found.where == "output 0, channel 0"
    infinite = torch.tensor([[1.0, float("inf"), float("nan")]])
    assert compare([infinite], [infinite.clone()]).relative == 0
    assert not compare([infinite], [torch.ones(1, 3)]).relative < 1e9


def test_dead_filters_with_a_small_positive_bias_go():
    """As in a MobileNet, where depthwise convolutions with padding read them."""
    model = nn.Sequential(
        conv_bn(3, 8), conv_bn(8, 8, groups=8), conv_bn(8, 6, 1, act=None), conv_bn(6, 4), head(4)
    )
    with_statistics(model)
    kill(model[0][1], [0, 1, 2], torch.tensor([1e-6, 9e-4, 3e-5]))
    kill(model[2][1], [3], 1e-41)  # no rectifier behind it
    stripped = strip(model, SIZE)
    assert removed(stripped)["0.1"] == [0, 1, 2]
    assert removed(stripped)["2.1"] == [3]
    assert 0 < stripped.record["proof"]["largest_relative_difference"] < 1e-3


def test_bfloat16():
    model = with_statistics(chain())
    killed = kill_at_random(model, 0.5)
    stripped = strip(model.bfloat16(), SIZE)
    assert removed(stripped) == killed
    assert {p.dtype for p in stripped.model.parameters()} == {torch.bfloat16}


def split_in_fixed_pieces(m, x):
    a, b = torch.split(m.a(x), 4, 1)
    return m.head(m.c(m.b(torch.cat([b, a], 1))))


def bilinear(m, x):
    y = m.a(x).flatten(2)
    z = m.b(m.a(x))
    return m.head(m.c(z)), y @ y.transpose(1, 2)


def softmax(m, x):
    return m.head(m.c(m.b(m.a(x).softmax(1))))


def shift(m, x):
    x = m.a(x)
    y = torch.zeros_like(x)
    y[1:, :2], y[:, 2:] = x[:-1, :2], x[:, 2:]
    return m.head(m.c(m.b(y)))


def shuffled_and_flattened(m, x):
    return m.head(m.c(m.b(F.channel_shuffle(m.a(x), 2))))


@pytest.mark.parametrize(
    ("forward", "goes"),
    [
        (split_in_fixed_pieces, None),  # weights behind follow their channels
        (bilinear, False),
        (softmax, False),
        (shift, None),
        (shuffled_and_flattened, None),
    ],
)
def test_what_is_not_understood_holds_what_depends_on_it_alone(forward, goes):
    model = make(forward, a=conv_bn(3, 8), b=conv_bn(8, 8), c=conv_bn(8, 8), head=head(8))
    kill(model.a[1], [1, 5])
    kill(model.b[1], [2, 3])
    stripped = strip(model, SIZE)
    found = removed(stripped)
    assert found["b.1"] == [2, 3]
    if goes is False:
        assert "a.1" not in found
        assert whys(stripped)["a.1"]
    assert_equal_everywhere(model, stripped)


@pytest.mark.parametrize("forward", [bilinear, shuffled_and_flattened])
def test_the_account_grows_with_the_channels_and_not_with_their_products(forward):
    """Products of all pairs of channels would be 16 times as many of 32 as of 8."""
    sizes = []
    for count in (8, 32):
        layers = {name: conv_bn(count, count) for name in "bc"}
        model = make(forward, a=conv_bn(3, count), head=head(count), **layers)
        wiring = trace(model, lambda m: m(torch.randn(2, *SIZE)))
        sizes.append((wiring.size, len(wiring.made)))
    assert sizes[1][0] < 4.5 * sizes[0][0] and sizes[1][1] < 4.5 * sizes[0][1]


def test_prelu_of_one_and_of_many_parameters_before_a_concatenation():
    model = make(
        lambda m, x: m.head(m.c(torch.cat([m.one(m.a(x)), m.many(m.b(x))], 1))),
        a=conv_bn(3, 4, act=None), b=conv_bn(3, 4, act=None), one=nn.PReLU(), many=nn.PReLU(4),
        c=conv_bn(8, 4, 1), head=head(4),
    )  # fmt: skip
    kill(model.a[1], [1], -0.5)
    kill(model.b[1], [0, 2], -0.5)
    stripped = strip(model, SIZE)
    assert removed(stripped) == {"a.1": [1], "b.1": [0, 2]}
    assert (stripped.model.one.num_parameters, stripped.model.many.num_parameters) == (1, 2)
    assert_equal_everywhere(model, stripped)


def test_outputs_in_a_dataclass():
    @dataclasses.dataclass
    class Found:
        scores: torch.Tensor

    model = make(lambda m, x: Found(m.net(x)), net=chain())
    kill_at_random(model, 0.5)
    assert strip(model, SIZE).record["filters"]["kept"] == 0


def test_old_weight_norm_is_refused_in_one_line():
    model = with_statistics(chain())
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[1][0])
    model(torch.randn(2, *SIZE))
    with pytest.raises(StripError, match="cannot be copied") as error:
        strip(model, SIZE)
    assert "\n" not in str(error.value)


# Filters with |gamma| < 1e-3, by plain torch; how many stay, and parts of the reasons.
COUNTS = {
    "akamaster_resnet20-12fca82f.th": (17, 4, {"varies in the same channel", "padding"}),
    "3ddfa_mb05.pth": (247, 0, set()),
    "lprnet.pth": (791, 337, {"MaxPool3d", "mean"}),
    "ultralight_slim-320.pth": (52, 8, {"varies in the same channel"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", COUNTS)
def test_published_networks(file, checkpoints):
    kind, size = PUBLISHED[file]
    model = load(kind(), checkpoints / file)
    collapsed, kept, reasons = COUNTS[file]
    gammas = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(int((g.abs() < 1e-3).sum()) for g in gammas) == collapsed
    stripped = strip(model, size)
    filters = stripped.record["filters"]
    assert filters["dead"] + filters["constant"] + filters["kept"] == collapsed
    assert filters["kept"] == kept
    for each in stripped.record["kept"]:
        assert any(reason in each["why"] for reason in reasons), each
    x = torch.rand(4, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        a, b = model(x), stripped.model(x)
    pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
    for p, q in pairs:
        assert (p - q).abs().max() <= 1e-3 * p.abs().max()


def test_the_residual_stream_of_option_a():
    """Channel i of the first stage is channel 8 + i of the second and 24 + i of the third."""
    model = with_statistics(CifarResNet20())
    for number, shift_by in ((1, 0), (2, 8), (3, 24)):
        for block in getattr(model, f"layer{number}"):
            kill(block.bn2, [shift_by + 3, shift_by + 5], 0.0)
    kill(model.bn1, [3, 5], -1.0)
    stripped = strip(model, (3, 32, 32))
    gone = removed(stripped)
    assert gone["bn1"] == [3, 5]
    assert gone["layer2.1.bn2"] == [11, 13]
    assert gone["layer3.2.bn2"] == [27, 29]
    assert stripped.record["filters"]["kept"] == 0
    assert stripped.model.linear.in_features == 62
    assert_equal_everywhere(model, stripped, [(2, 3, 32, 32)])


def c2f(m, x):
    """As ultralytics' C2f: pieces of a fixed width, each fed to the next, and all joined."""
    parts = list(m.a(x).split((4, 4), 1))
    parts.append(m.b(parts[-1]))
    return m.head(m.c(torch.cat(parts, 1)))


def ibn(m, x):
    """As IBN-Net: half of the channels by InstanceNorm, the others by BatchNorm."""
    one, other = torch.split(m.conv(x), 4, 1)
    return m.head(m.c(F.relu(torch.cat([m.inorm(one), m.bnorm(other)], 1))))


def shufflenet_v2(m, x):
    """As torchvision's: half of the channels pass by, then both halves are shuffled."""
    x = m.a(x)
    for branch in (m.one, m.two):
        left, right = x.chunk(2, 1)
        n, c, h, w = left.shape
        x = torch.cat([left, branch(right)], 1).view(n, 2, c, h, w).transpose(1, 2).flatten(1, 2)
    return m.head(x)


def shuffle_branch():
    return nn.Sequential(conv_bn(4, 4, 1), conv_bn(4, 4, act=None, groups=4), conv_bn(4, 4, 1))


@pytest.mark.parametrize(
    ("forward", "layers", "killed", "gone"),
    [
        (
            c2f,
            {"a": conv_bn(3, 8), "b": conv_bn(4, 4), "c": conv_bn(12, 8), "head": head(8)},
            {"a.1": [1, 5], "b.1": [2], "c.1": [3]},
            {"b.1": [2], "c.1": [3]},
        ),
        (
            ibn,
            {
                "conv": nn.Conv2d(3, 8, 3, padding=1),
                "inorm": nn.InstanceNorm2d(4, affine=True),
                "bnorm": nn.BatchNorm2d(4),
                "c": conv_bn(8, 8),
                "head": head(8),
            },
            {"inorm": [1], "bnorm": [0], "c.1": [3]},
            {"c.1": [3]},
        ),
        (
            shufflenet_v2,
            {
                "a": conv_bn(3, 8),
                "one": shuffle_branch(),
                "two": shuffle_branch(),
                "head": head(8),
            },
            {"one.0.1": [1], "two.0.1": [2, 3], "one.2.1": [0]},
            {"one.0.1": [1], "two.0.1": [2, 3]},
        ),
    ],
)
def test_blocks_by_name(forward, layers, killed, gone):
    """What could go goes, at least; the rest is exact and named, and nothing is refused."""
    model = make(forward, **layers)
    for name, filters in killed.items():
        kill(model.get_submodule(name), filters)
    stripped = strip(model, SIZE)
    found = removed(stripped)
    for name, filters in gone.items():
        assert found[name] == filters
    assert_equal_everywhere(model, stripped)


def test_a_pruned_model_is_refused_in_one_line_until_that_is_made_permanent():
    model = with_statistics(chain())
    prune.l1_unstructured(model[1][0], "weight", 0.3)
    killed = kill_at_random(model, 0.5)
    with pytest.raises(StripError, match="remove functions") as error:
        strip(model, SIZE)
    assert "\n" not in str(error.value)
    prune.remove(model[1][0], "weight")
    stripped = strip(model, SIZE)
    assert removed(stripped) == killed
    assert_equal_everywhere(model, stripped)
