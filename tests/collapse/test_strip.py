"""strip: exact on every kind of wiring, what goes is counted, what stays is explained."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from psbn_mmdet import to_psbn
from psbn_mmdet.collapse import CallError, MeasureError, StripError, measure, probe, strip
from tests.helpers.strippable import (
    NETS,
    Dense,
    SharedHead,
    chain,
    conv_bn,
    head,
    kill,
    kill_at_random,
    mobilenet,
    resnet,
    resnext,
    with_statistics,
)

SIZE = (3, 16, 16)


def tensors(outputs):
    return outputs if isinstance(outputs, list) else [outputs]


def relative_difference(a, b, size=SIZE):
    """On images that the proof did not see."""
    x = torch.randn(3, *size, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        pairs = list(zip(tensors(a(x)), tensors(b(x)), strict=True))
    return max(float((p - q).abs().max() / p.abs().max()) for p, q in pairs)


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("name", NETS)
def test_exact_whatever_was_killed(name, share):
    model = with_statistics(NETS[name]())
    killed = kill_at_random(model, share)
    before = copy.deepcopy(model.state_dict())
    stripped = strip(model, SIZE)
    assert relative_difference(model, stripped.model) < 1e-5
    assert stripped.record["proof"]["largest_relative_difference"] < 1e-5
    filters = stripped.record["filters"]
    kept = sum(len(each["filters"]) for each in stripped.record["kept"])
    assert filters["dead"] + filters["constant"] + kept == sum(map(len, killed.values()))
    assert filters["removed"] > 0
    macs = stripped.record["macs"]
    assert macs["before"] == probe(model, {}, SIZE).total
    assert macs["after"] == probe(stripped.model, {}, SIZE).total
    json.dumps(stripped.record)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_chain_loses_all_that_was_killed_and_the_flops_that_measure_predicts():
    model = with_statistics(chain())
    killed = kill_at_random(model, 0.5)
    stripped = strip(model, SIZE)
    assert stripped.record["removed"] == {name: {"dead": each} for name, each in killed.items()}
    assert stripped.record["kept"] == []
    macs = stripped.record["macs"]
    predicted = measure(model, inputs=SIZE).flops
    assert (macs["before"], macs["after"]) == (predicted.total, predicted.remaining)
    widths = [m.out_channels for m in stripped.model.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [4, 6, 4]


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_channel_of_a_residual_stream_goes_only_if_it_is_dead_in_every_block(bottleneck):
    model = with_statistics(resnet(bottleneck))
    stream = [model[1].last[1], model[1].skip[1], model[2].last[1], model[3].last[1]]
    for norm in stream:
        kill(norm, [3, 7], 0.0)
    kill(stream[2], [1], 0.0)
    kill(model[2].first[1], [0, 5])
    stripped = strip(model, SIZE)
    removed = stripped.record["removed"]
    assert {tuple(each["dead"]) for each in removed.values()} == {(3, 7), (0, 5)}
    assert len(removed) == 5
    [kept] = stripped.record["kept"]
    assert (kept["layer"], kept["filters"]) == ("2.last.1", [1])
    assert "varies in the same channel" in kept["why"]
    assert stripped.model[3].last[0].out_channels == 14
    assert relative_difference(model, stripped.model) < 1e-5


def test_what_a_depthwise_convolution_reads_goes_with_its_dead_filters():
    model = with_statistics(mobilenet())
    kill(model[2][1], [2, 9])  # behind the depthwise convolution
    kill(model[1][1], [4])  # in front of it; behind it BN makes a constant of 0
    stripped = strip(model, SIZE)
    assert stripped.record["removed"] == {
        "1.1": {"dead": [4], "unread": [2, 9]},
        "2.1": {"dead": [2, 9], "unread": [4]},
    }
    assert stripped.model[2][0].groups == 13
    assert relative_difference(model, stripped.model) < 1e-5


def test_groups_of_a_convolution_stay_equal():
    model = with_statistics(resnext())
    kill(model[1][1], [0, 3, 6, 7, 9])  # of 4 groups of 3: 1, 1, 2, 1
    stripped = strip(model, SIZE)
    assert stripped.record["filters"]["removed"] == 4
    assert stripped.model[1][0].out_channels == 8
    [kept] = stripped.record["kept"]
    assert "grouped convolution" in kept["why"]
    assert relative_difference(model, stripped.model) < 1e-5


def test_filters_of_a_shared_convolution_go_if_they_are_dead_at_every_level():
    model = with_statistics(SharedHead())
    kill(model.norms[0], [1, 2])
    kill(model.norms[1], [2, 3])
    stripped = strip(model, SIZE)
    assert stripped.record["removed"] == {"norms.0": {"dead": [2]}, "norms.1": {"dead": [2]}}
    assert relative_difference(model, stripped.model) < 1e-5


def test_a_pooled_and_flattened_concatenation():
    model = with_statistics(Dense(pool=2))
    killed = kill_at_random(model, 0.5)
    stripped = strip(model, SIZE)
    assert stripped.record["filters"]["removed"] == sum(map(len, killed.values()))
    assert relative_difference(model, stripped.model) < 1e-5


def test_what_code_counts_on_is_left_whole_and_the_rest_goes():
    class Halves(nn.Module):
        """Fixes a number of channels, which no tracer sees."""

        def forward(self, x):
            return x.view(len(x), 8, *x.shape[2:])

    model = nn.Sequential(conv_bn(3, 8), Halves(), conv_bn(8, 6), conv_bn(6, 4), head(4))
    with_statistics(model)
    killed = kill_at_random(model, 0.5)
    stripped = strip(model, SIZE)
    assert stripped.record["removed"] == {n: {"dead": killed[n]} for n in ("2.1", "3.1")}
    [kept] = stripped.record["kept"]
    assert (kept["layer"], kept["filters"]) == ("0.1", killed["0.1"])
    assert "does not run without it" in kept["why"]
    assert relative_difference(model, stripped.model) < 1e-5


def test_computed_weights_are_left_whole():
    model = nn.Sequential(conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8), conv_bn(8, 8), head(8))
    with_statistics(model)
    nn.utils.parametrizations.weight_norm(model[2][0])
    killed = kill_at_random(model, 0.5)
    stripped = strip(model, SIZE)
    assert stripped.record["removed"] == {n: {"dead": killed[n]} for n in ("0.1", "3.1")}
    whys = {each["layer"]: each["why"] for each in stripped.record["kept"]}
    assert "2.0 reads it" in whys["1.1"]
    assert "2.0 puts out" in whys["2.1"]
    assert relative_difference(model, stripped.model) < 1e-5


def test_tied_weights_stay_tied():
    """Three layers of one stream, two of them with one weight: what is dead in all goes."""
    model = nn.Sequential(conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8), conv_bn(8, 8), head(8))
    with_statistics(model)
    model[2][0].weight = model[1][0].weight
    for layer, dead in ((0, [1, 2]), (1, [2, 3]), (2, [2, 4]), (3, [5])):
        kill(model[layer][1], dead)
    stripped = strip(model, SIZE)
    gone = {f"{i}.1": {"dead": [2]} for i in range(3)}
    assert stripped.record["removed"] == {**gone, "3.1": {"dead": [5]}}
    assert stripped.model[2][0].weight is stripped.model[1][0].weight
    assert relative_difference(model, stripped.model) < 1e-5


def test_a_layer_that_died_altogether_keeps_one_filter():
    model = with_statistics(resnet(False))
    kill(model[2].first[1], range(8))
    stripped = strip(model, SIZE)
    assert stripped.model[2].first[0].out_channels == 1
    assert "at least" in stripped.record["kept"][0]["why"]
    assert relative_difference(model, stripped.model) < 1e-5


@pytest.mark.parametrize("name", NETS)
def test_psbn_becomes_bn_and_its_constants_are_exact_at_borders_too(name):
    """A collapsed psBN filter has the bias alpha: a constant, not dead."""
    model = to_psbn(with_statistics(NETS[name]()), alpha=0.1)
    kill_at_random(model, 0.5)
    for module in model.modules():
        if hasattr(module, "beta"):
            module.beta.data[module.weight == 0] = 0  # decayed
    stripped = strip(model, SIZE)
    assert stripped.record["psbn_layers_to_bn"] > 0
    assert not any(hasattr(m, "beta") for m in stripped.model.modules())
    assert stripped.record["filters"]["constant"] > 0
    assert relative_difference(model, stripped.model) < 1e-5


def test_constants_at_a_padded_border_are_merged_into_one_or_folded_with_the_error_told():
    model = with_statistics(chain())
    kill(model[0][1], [1, 2, 4, 6], torch.tensor([0.5, -1.0, 0.2, 0.9]))  # 2 is dead
    merged = strip(model, SIZE)
    assert merged.record["filters"]["constant"] == 2
    assert merged.record["merged"] == 2
    assert merged.model[0][0].out_channels == 5
    assert merged.record["kept"][0]["filters"] == [6]  # the largest carries the others
    assert relative_difference(model, merged.model) < 1e-5
    folded = strip(model, SIZE, borders="fold", tolerance=1)
    assert folded.record["filters"]["constant"] == 3
    assert folded.model[0][0].out_channels == 4
    error = folded.record["proof"]["largest_relative_difference"]
    assert 1e-3 < error < 1
    # Within the border it is exact.
    x = torch.randn(1, *SIZE)
    with torch.no_grad():
        inner = [m[:2](x)[..., 2:-2, 2:-2] for m in (model, folded.model)]
    torch.testing.assert_close(*inner)
    with pytest.raises(StripError, match="more than the tolerance"):
        strip(model, SIZE, borders="fold")


@pytest.mark.parametrize("biases", [(0.5, -0.5, 0.4, -0.3), (-0.5, 0.5, -0.3, 0.4)])
def test_a_constant_is_merged_only_into_one_that_arrives_wherever_it_does(biases):
    """A negative constant reaches one reader as it is and the other, behind a ReLU, as 0."""

    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv_bn(3, 8, act=None)
            self.a, self.b = (nn.Conv2d(8, 4, 3, padding=1) for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            return [self.a(x.relu()), self.b(x)]

    model = with_statistics(TwoReaders())
    kill(model.stem[1], [0, 1, 2, 3], torch.tensor(biases))
    stripped = strip(model, SIZE)
    assert stripped.record["merged"] == 2
    assert stripped.model.stem[0].out_channels == 6
    assert relative_difference(model, stripped.model) < 1e-5


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_norm", [False, True])
def test_a_constant_goes_into_bias_or_running_mean_by_hand(has_bias, has_norm):
    """y = W x + b with x_1 = c: b' = b + W_1 c, or mean' = mean - W_1 c."""
    reader = nn.Conv2d(3, 2, 1, bias=has_bias)
    model = nn.Sequential(conv_bn(3, 3, 1), reader, *[nn.BatchNorm2d(2)] * has_norm)
    with_statistics(model)
    kill(model[0][1], [1], 0.7)
    added = 0.7 * reader.weight[:, 1, 0, 0].detach()
    bias, mean = reader.bias, model[2].running_mean.clone() if has_norm else None
    stripped = strip(model, SIZE).model
    if has_bias:
        torch.testing.assert_close(stripped[1].bias.detach(), bias.detach() + added)
    elif has_norm:
        assert stripped[1].bias is None
        torch.testing.assert_close(stripped[2].running_mean, mean - added)
    else:
        torch.testing.assert_close(stripped[1].bias.detach(), added)
    assert relative_difference(model, stripped) < 1e-5


def test_inactive_filters_go_on_demand_with_a_bound_and_the_difference():
    model = with_statistics(chain())
    with torch.no_grad():
        model[0][1].weight[[1, 2]] = torch.tensor([0.1, 0.2])
        model[0][1].bias[[1, 2]] = torch.tensor([-0.4, -0.7])  # z = -4, -3.5
    with pytest.raises(StripError, match="tolerance"):  # of a net with a normal x_hat, some fire
        strip(model, SIZE, inactive_below=0.5, tolerance=1e-6)
    assert strip(model, SIZE).record["filters"]["removed"] == 0
    stripped = strip(model, SIZE, inactive_below=1e-3)
    assert stripped.record["removed"] == {"0.1": {"inactive": [1, 2]}}
    bound = stripped.record["inactive_bound"]
    normal = torch.distributions.Normal(0.0, 1.0)
    z = torch.tensor(-3.5, dtype=torch.float64)
    density = torch.exp(normal.log_prob(z))
    assert bound["largest_probability"] == pytest.approx(float(normal.cdf(z)), rel=1e-5)
    assert bound["largest_mean_output"] == pytest.approx(
        float(0.2 * density - 0.7 * normal.cdf(z)), rel=1e-4
    )
    assert stripped.record["proof"]["of_the_surgery_alone"] < 1e-6
    assert relative_difference(model, stripped.model) < 1e-2


@pytest.mark.parametrize("act", [nn.SiLU, nn.LeakyReLU, None])
def test_without_a_rectifier_what_comes_through_is_a_constant(act):
    model = nn.Sequential(conv_bn(3, 6, act=act), nn.Conv2d(6, 4, 1), head(4))
    with_statistics(model)
    kill(model[0][1], [0, 3], -0.8)  # SiLU passes -0.248
    stripped = strip(model, SIZE, inactive_below=0.9)
    assert stripped.record["removed"] == {"0.1": {"constant": [0, 3]}}
    assert relative_difference(model, stripped.model) < 1e-5


def test_what_a_channel_mixing_layer_reads_is_left_whole_and_named():
    model = nn.Sequential(conv_bn(3, 8), nn.GroupNorm(2, 8), conv_bn(8, 8), head(8))
    with_statistics(model)
    kill(model[0][1], [1, 5])
    kill(model[2][1], [1, 5])
    stripped = strip(model, SIZE)
    assert stripped.record["removed"] == {"2.1": {"dead": [1, 5]}}
    [kept] = stripped.record["kept"]
    assert kept["layer"] == "0.1"
    assert "GroupNorm" in kept["why"]


def test_a_transposed_convolution():
    up = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)
    model = nn.Sequential(conv_bn(3, 8), up, nn.BatchNorm2d(6), nn.ReLU(), conv_bn(6, 4), head(4))
    with_statistics(model)
    kill(model[0][1], [1, 2], torch.tensor([-1.0, 0.5]))
    kill(model[2], [0, 5])
    stripped = strip(model, SIZE)
    assert stripped.record["removed"] == {"0.1": {"dead": [1]}, "2": {"dead": [0, 5]}}
    assert "transposed" in stripped.record["kept"][0]["why"]
    assert (stripped.model[1].in_channels, stripped.model[1].out_channels) == (7, 4)
    assert relative_difference(model, stripped.model) < 1e-5


def test_onnx_computes_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    model = with_statistics(resnet(True))
    kill_at_random(model, 0.5)
    stripped = strip(model, SIZE).model
    x, file = torch.randn(2, *SIZE), io.BytesIO()
    torch.onnx.export(stripped, (x,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    [got] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_given_images_and_functions_are_run_too():
    model = with_statistics(chain())
    kill_at_random(model, 0.5)
    images = torch.randn(3, *SIZE)
    widths = []
    for inputs in (images, lambda m: m(images), SIZE):
        stripped = strip(model, inputs)
        widths.append([p.shape for p in stripped.model.parameters()])
    assert widths[0] == widths[1] == widths[2]
    assert strip(model, images).record["proof"]["images"] == "3 given of 3x16x16"
    assert strip(model, SIZE).record["proof"]["images"] == "2 random of 3x16x16"


def test_a_model_whose_eval_returns_nothing_as_of_mmdets_backbones():
    class Backbone(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].requires_grad_(False)  # a frozen stage

    model = Backbone(*chain())
    with_statistics(nn.Sequential(*model))
    kill_at_random(model, 0.5)
    stripped = strip(model, SIZE)
    assert stripped.record["kept"] == []
    model.eval()
    assert relative_difference(model, stripped.model) < 1e-5


def test_training_goes_on_from_the_stripped_network():
    model = with_statistics(resnet(False))
    kill_at_random(model, 0.5)
    stripped = strip(model, SIZE).model.train()
    stripped(torch.randn(4, *SIZE)).sum().backward()
    assert all(p.grad is not None for p in stripped.parameters())


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((4, 16, 16), {}, "cannot be called with images 2 random of 4x16x16"),
        ((3, 0, 16), {}, "positive whole numbers"),
        (SIZE, {"borders": "reflect"}, "borders is 'exact' or 'fold'"),
        (lambda m: m(torch.randn(2, 3, 16, 16)).detach().numpy(), {}, "returns no tensors"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(inputs, options, message):
    model = with_statistics(chain())
    kill_at_random(model, 0.5)
    with pytest.raises((CallError, StripError), match=message) as error:
        strip(model, inputs, **options)
    assert "\n" not in str(error.value)


def test_wrong_models_are_refused_in_one_line():
    with pytest.raises(MeasureError, match="no normalization layer"):
        strip(nn.Sequential(nn.Conv2d(3, 4, 1)), SIZE)

    pruned = with_statistics(chain())
    prune.l1_unstructured(pruned[0][0], "weight", 0.3)
    with pytest.raises(StripError, match=r"cannot be copied.*permanent") as error:
        strip(pruned, SIZE)
    assert "\n" not in str(error.value)
    model = with_statistics(chain())
    with torch.no_grad():
        model[0][1].bias[2] = torch.nan
    with pytest.raises(StripError, match="not finite"):
        strip(model, SIZE)


def test_a_network_in_inference_mode():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = chain()

        def forward(self, x):
            with torch.inference_mode():
                return self.net(x)

    model = with_statistics(Detached())
    killed = kill_at_random(model, 0.5)
    assert strip(model, SIZE).record["filters"]["removed"] == sum(map(len, killed.values()))
