"""The layers by their formula, conversion of models, and what is refused."""

import copy
import sys
import types
import warnings

import mmcv.cnn  # noqa: F401  registers SyncBN
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

import psbn_mmdet
from psbn_mmdet import psBN, psBN1d, psBN2d, psBN3d, psIN, psIN1d, psIN3d, psSyncBN, to_bn, to_psbn
from psbn_mmdet.norm import followed_by, lift
from tests.helpers.layers import randomize

TWINS = [
    (nn.BatchNorm1d, psBN1d, (4, 6)),
    (nn.BatchNorm1d, psBN1d, (4, 6, 5)),
    (nn.BatchNorm2d, psBN2d, (4, 6, 5, 3)),
    (nn.BatchNorm3d, psBN3d, (2, 6, 3, 4, 2)),
    (nn.BatchNorm2d, psSyncBN, (4, 6, 5, 3)),
    (nn.InstanceNorm1d, psIN1d, (4, 6, 5)),
    (nn.InstanceNorm2d, psIN, (4, 6, 5, 3)),
    (nn.InstanceNorm3d, psIN3d, (2, 6, 3, 4, 2)),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_eq_6_in_training_and_evaluation(device, memory_format):
    layer = randomize(psBN(3, alpha=0.25, eps=1e-3, momentum=0.3)).to(device)
    x = torch.randn(4, 3, 5, 6).to(device, memory_format=memory_format)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    old_mean, old_var = layer.running_mean.clone(), layer.running_var.clone()

    def expected(mean, var):
        per_channel = [t.view(1, 3, 1, 1) for t in (mean, var, layer.weight, layer.beta)]
        mean, var, gamma, beta = per_channel
        return gamma * (x - mean) / (var + 1e-3).sqrt() + beta + 0.25

    y = layer(x)
    assert y.device.type == device and y.is_contiguous(memory_format=memory_format)
    assert_close(y, expected(mean, var))
    assert_close(layer.running_mean, 0.7 * old_mean + 0.3 * mean)
    assert_close(layer.running_var, 0.7 * old_var + 0.3 * x.var((0, 2, 3), unbiased=True))
    layer.eval()
    assert_close(layer(x), expected(layer.running_mean, layer.running_var))


@pytest.mark.parametrize(("plain", "shifted", "shape"), TWINS)
@pytest.mark.parametrize("training", [True, False])
def test_twin_agrees_in_value_gradients_and_statistics(plain, shifted, shape, training):
    x = torch.randn(shape, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    a = randomize(plain(6, affine=True, track_running_stats=True)).train(training)
    b = shifted(6, alpha=0.1, track_running_stats=True).train(training)
    b.load_state_dict(a.state_dict())
    y, y2 = a(x), b(x2)
    assert_close(y2, y)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (y2 * weights).sum().backward()
    assert_close(x2.grad, x.grad)
    assert_close(b.weight.grad, a.weight.grad)
    assert_close(b.beta.grad, a.bias.grad)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(b, name), getattr(a, name))


def test_from_scratch_the_output_is_lifted_by_alpha():
    x = torch.randn(4, 3, 5, 6)
    assert_close(psBN(3, alpha=0.2)(x), nn.BatchNorm2d(3)(x) + 0.2)


def test_cumulative_average_and_no_running_statistics():
    x = torch.randn(4, 3, 5, 6)
    for kwargs in ({"momentum": None}, {"track_running_stats": False}):
        a, b = nn.BatchNorm2d(3, **kwargs), psBN(3, alpha=0, **kwargs)
        for _ in range(3):
            assert_close(b(x), a(x))
        assert_close(b.eval()(x), a.eval()(x))


def test_collapsed_filter_decays_toward_alpha_and_fires_again():
    # gamma = 0.5, beta = -2 under lr * decay = 0.5: no gradient, so both halve
    # at each step; beta + 0.1 becomes positive when 2 * 0.5^t < 0.1, at t = 5.
    layer = psBN(1, alpha=0.1)
    nn.init.constant_(layer.weight, 0.0)
    nn.init.constant_(layer.beta, -2.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=0.5)
    fires = []
    for _ in range(6):
        y = layer(torch.randn(8, 1, 2, 2)).relu()
        fires.append(bool((y > 0).any()))
        y.sum().mul(0).backward()  # a gradient of 0: only decay moves
        optimizer.step()
        optimizer.zero_grad()
    assert fires == [False] * 5 + [True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_parameters_alpha_and_bias(dtype):
    try:
        nn.BatchNorm2d(3).to(dtype).eval()(torch.randn(2, 3, 4, 4, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(f"needs torch > {torch.__version__}: {error}")  # float16 on the CPU in 2.1
    layer = psBN(3).to(dtype)
    assert {layer.weight.dtype, layer.beta.dtype, layer.alpha.dtype, layer.bias.dtype} == {dtype}
    assert layer.eval()(torch.randn(2, 3, 4, 4, dtype=dtype)).dtype == dtype


def test_reset_parameters_restores_what_meta_construction_left_out():
    layer = psBN(3, alpha=0.3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.alpha == torch.tensor(0.3)
    assert_close(layer.bias, torch.full((3,), 0.3))
    assert_close(layer.weight, torch.ones(3))


def test_bias_cannot_be_assigned():
    layer = psBN(3)
    # Before 3.10 Python does not name the attribute.
    said = "bias" if sys.version_info >= (3, 10) else "^can't set attribute$"
    with pytest.raises((AttributeError, KeyError), match=said):
        layer.bias = torch.zeros(3)
    with pytest.raises((AttributeError, KeyError), match="bias"):
        layer.bias = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("layer", [psBN, psSyncBN, psIN])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"alpha": -0.1}, ValueError, "alpha must be finite and not negative"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"alpha": float("inf")}, ValueError, "alpha must be finite"),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number, got '0.1'"),
        ({"alpha": True}, TypeError, "alpha must be a number"),
        ({"affine": False}, ValueError, "needs affine=True"),
        ({"bias": False}, ValueError, "needs affine=True and a bias"),
        ({"load_bn": "shift"}, TypeError, r"to_psbn\(model, shift=True\)"),
        ({"num_groups": 2}, TypeError, "not a GroupNorm"),
    ],
)
def test_bad_arguments(layer, kwargs, error, message):
    with pytest.raises(error, match=message):
        layer(3, **kwargs)


# -- loading ---------------------------------------------------------------


def test_loading_bn_preserves_the_function():
    bn = randomize(nn.BatchNorm2d(5)).eval()
    x = torch.randn(2, 5, 4, 4)
    layer = psBN(5, alpha=0.2).eval()
    layer.load_state_dict(bn.state_dict())
    assert_close(layer(x), bn(x))
    assert_close(layer.beta, bn.bias - 0.2)


@pytest.mark.parametrize("plain", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_a_reader_of_bn_computes_what_was_saved(plain):
    layer = randomize((psBN if plain is nn.BatchNorm2d else psIN)(5, alpha=0.3)).eval()
    bn = plain(5, affine=True).eval()
    unexpected = bn.load_state_dict(layer.state_dict(), strict=False).unexpected_keys
    assert set(unexpected) == {"beta", "alpha"}
    x = torch.randn(2, 5, 4, 4)
    assert_close(bn(x), layer(x))


def test_the_same_alpha_keeps_the_bits_through_a_file():
    source = randomize(psBN(1000, alpha=0.3))
    assert not torch.equal(source.bias.detach() - 0.3, source.beta)  # the bias alone would not do
    layer = psBN(1000, alpha=0.3)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer.beta, source.beta)


def test_files_of_before_the_bias_was_in_them_load_as_before():
    source = randomize(psBN(5, alpha=0.3)).eval()
    old = {key: value for key, value in source.state_dict().items() if key != "bias"}
    same, other = psBN(5, alpha=0.3), psBN(5, alpha=0.1).eval()
    same.load_state_dict(old)
    assert torch.equal(same.beta, source.beta)
    other.load_state_dict(old)
    x = torch.randn(2, 5, 4, 4)
    assert_close(other(x), source(x))


@pytest.mark.parametrize("alpha", [0.3, 0.1])
def test_a_bias_that_a_tool_has_edited_counts_where_it_did(alpha):
    source = randomize(psBN(1000, alpha=0.3))
    state_dict = source.state_dict()
    state_dict["bias"] = state_dict["bias"].clone()
    state_dict["bias"][:3] = torch.tensor([0.0, 1.0, 2.0])
    layer = psBN(1000, alpha=alpha)
    with pytest.warns(UserWarning, match="in 3 of 1000 channels .* bias is not beta"):
        layer.load_state_dict(state_dict)
    assert_close(layer.bias.detach()[:3], torch.tensor([0.0, 1.0, 2.0]))
    assert_close(layer.bias.detach()[3:], source.bias.detach()[3:])
    if alpha == 0.3:
        assert torch.equal(layer.beta[3:], source.beta[3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_cast_or_an_average_rounds_is_no_edit(dtype):
    a, b = (randomize(psBN(1000, alpha=0.1)).state_dict() for _ in range(2))
    keys = [key for key in a if a[key].is_floating_point()]
    rest = {"num_batches_tracked": a["num_batches_tracked"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        psBN(1000).load_state_dict({**{key: a[key].to(dtype) for key in keys}, **rest})
        psBN(1000).load_state_dict({**{key: 0.3 * a[key] + 0.7 * b[key] for key in keys}, **rest})


@pytest.mark.parametrize("prepare", [prune.random_unstructured, None])
def test_a_pruned_or_parametrized_beta_reloads_its_own_state_dict(prepare):
    def make():
        layer = randomize(psBN(8, alpha=0.3)).eval()
        if prepare:
            prepare(layer, "beta", 0.5)
        else:
            nn.utils.parametrize.register_parametrization(layer, "beta", nn.Tanh())
        return layer

    source, layer = make(), make()
    layer.load_state_dict(source.state_dict())
    x = torch.randn(2, 8, 3, 3)
    assert_close(layer(x), source(x))


def test_lift_raises_what_was_taken_over_from_bn_and_nothing_else():
    model = nn.ModuleDict({name: psBN(4, alpha=0.2) for name in ("made", "bn", "psbn", "written")})
    bn, psbn = randomize(nn.BatchNorm2d(4)), randomize(psBN(4, alpha=0.2))
    model["bn"].load_state_dict(bn.state_dict())
    model["psbn"].load_state_dict(psbn.state_dict())
    nn.init.zeros_(model["written"].bias)  # as mmengine's ConstantInit does
    assert lift(model) == 2
    assert_close(model["bn"].beta, bn.bias)
    assert_close(model["written"].beta.detach(), torch.zeros(4))
    assert torch.equal(model["psbn"].beta, psbn.beta)
    assert torch.equal(model["made"].beta.detach(), torch.zeros(4))
    assert lift(model) == 0  # once


@pytest.mark.parametrize("assign", [True, False])
def test_meta_to_empty_and_loading_keep_the_constructed_alpha(assign):
    source = randomize(psBN(5, alpha=0.3)).eval()
    layer = psBN(5, alpha=0.3, device="meta").eval()
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(layer.beta, source.beta)
    x = torch.randn(2, 5, 4, 4)
    assert_close(layer(x), source(x))


def test_loading_another_alpha_rebases_and_the_same_is_exact():
    source = randomize(psBN(5, alpha=0.3)).eval()
    x = torch.randn(2, 5, 4, 4)
    other, same = psBN(5, alpha=0.1).eval(), psBN(5, alpha=0.3).eval()
    other.load_state_dict(source.state_dict())
    same.load_state_dict(source.state_dict())
    assert_close(other(x), source(x))
    assert other.alpha == torch.tensor(0.1)
    assert torch.equal(same.beta, source.beta)


def test_loading_does_not_change_the_state_dict():
    state_dict = nn.BatchNorm2d(3).state_dict()
    before = {k: v.clone() for k, v in state_dict.items()}
    psBN(3).load_state_dict(state_dict)
    assert list(state_dict) == list(before)
    for key, value in before.items():
        assert torch.equal(state_dict[key], value)


def test_loading_a_half_checkpoint_rounds_only_once():
    bn = randomize(nn.BatchNorm2d(64)).half()
    layer = psBN(64)
    layer.load_state_dict(bn.state_dict())
    assert_close(layer.bias, bn.bias.float(), rtol=0, atol=1e-7)  # float32 rounding of beta + 0.1


def test_loading_with_assign_into_meta():
    bn = randomize(nn.BatchNorm2d(5)).eval()
    layer = psBN(5, device="meta").eval()
    layer.load_state_dict(bn.state_dict(), assign=True)
    x = torch.randn(2, 5, 4, 4)
    assert_close(layer(x), bn(x))


@pytest.mark.parametrize("saved", [nn.BatchNorm2d, psBN])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading_with_assign_takes_the_checkpoints_dtype(saved, device):
    source = randomize(saved(5)).to(torch.bfloat16).eval()
    layer = psBN(5, device=device).eval()
    layer.load_state_dict(source.state_dict(), assign=True)
    kinds = {tensor.dtype for tensor in layer.state_dict().values() if tensor.is_floating_point()}
    assert kinds == {torch.bfloat16}
    x = torch.randn(2, 5, 4, 4, dtype=torch.bfloat16)
    # beta = bias - alpha is rounded: half a unit of 2^-8 in numbers below 4.
    assert_close(layer(x), source(x), rtol=0, atol=4 * 2.0**-8)


def test_what_does_not_tell_what_was_computed_is_refused():
    old = {key: value for key, value in psBN(3).state_dict().items() if key != "bias"}
    for missing in ("beta", "alpha"):
        part = {key: value for key, value in old.items() if key != missing}
        with pytest.raises(RuntimeError, match="only one of beta and alpha and no bias"):
            psBN(3).load_state_dict(part, strict=False)
    for alpha in (torch.tensor(float("nan")), torch.zeros(3)):
        with pytest.raises(RuntimeError, match="not a finite number"):
            psBN(3).load_state_dict({**psBN(3).state_dict(), "alpha": alpha})


def test_loading_another_width_names_the_layer():
    with pytest.raises(RuntimeError, match="size mismatch for beta"):
        psBN(3).load_state_dict(nn.BatchNorm2d(4).state_dict())


# -- conversion --------------------------------------------------------------


def network() -> nn.Sequential:
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Sequential(
                nn.Conv2d(6, 6, 1), nn.InstanceNorm2d(6, affine=True), nn.SyncBatchNorm(6)
            ),
            nn.BatchNorm2d(6, affine=False),
            nn.GroupNorm(2, 6),
            nn.Flatten(),
            nn.Linear(216, 4),
            nn.BatchNorm1d(4),
        )
    )


def test_there_and_back_preserves_function_and_keys():
    model = network().eval()
    x = torch.randn(2, 3, 8, 8)
    y = model(x)
    keys = list(model.state_dict())
    assert to_psbn(model, alpha=0.2) is model
    kinds = [type(m) for m in model.modules()]
    assert [kinds.count(k) for k in (psBN2d, psSyncBN, psIN, psBN1d)] == [1, 1, 1, 1]
    assert kinds.count(nn.BatchNorm2d) == 1  # the one without a bias
    assert_close(model(x), y)
    assert to_bn(model) is model
    assert_close(model(x), y)
    assert list(model.state_dict()) == keys
    assert not any("psbn_mmdet" in type(m).__module__ for m in model.modules())


def test_shift_reading_of_a_bn_model():
    model = randomize(nn.Sequential(nn.BatchNorm2d(3))).eval()
    x = torch.randn(2, 3, 4, 4)
    y = model(x)
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}
    assert_close(to_psbn(model, alpha=0.2, shift=True)(x), y + 0.2)
    model.load_state_dict(state_dict)  # what a checkpoint computes does not depend on it
    assert_close(model(x), y)


def test_conversion_of_a_converted_model_rebases():
    model = to_psbn(network(), alpha=0.1).eval()
    x = torch.randn(2, 3, 8, 8)
    y = model(x)
    to_psbn(model, alpha=0.5)
    assert_close(model(x), y)
    assert model[1].alpha == 0.5


def test_conversion_keeps_identity_flags_and_sharing():
    shared = nn.BatchNorm2d(6, dtype=torch.float64)
    tied = nn.BatchNorm2d(6)
    tied2 = nn.BatchNorm2d(6)
    tied2.bias = tied.bias
    model = nn.ModuleDict({"a": shared, "b": shared, "c": tied, "d": tied2})
    tied.eval()
    tied.weight.requires_grad_(False)
    tied.bias.requires_grad_(False)
    calls = []
    tied.register_forward_hook(lambda *_: calls.append(1))
    weight = tied.weight
    for convert, name in ((to_psbn, "beta"), (to_bn, "bias")):
        convert(model)
        assert model["a"] is model["b"] is shared
        assert model["c"] is tied and tied.weight is weight
        assert getattr(tied, name) is getattr(tied2, name)
        assert not getattr(tied, name).requires_grad and not weight.requires_grad
        assert getattr(shared, name).requires_grad
        assert (tied.training, shared.training) == (False, True)
        assert getattr(shared, name).dtype == torch.float64
    assert model["a"].bias.dtype == torch.float64
    tied(torch.randn(2, 6, 3, 3))
    assert calls == [1]


def test_conversion_keeps_the_memory_format():
    model = network().to(memory_format=torch.channels_last)
    to_psbn(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert model[:2](x).is_contiguous(memory_format=torch.channels_last)


def test_a_layer_itself_can_be_converted():
    layer = nn.BatchNorm2d(3)
    assert type(to_psbn(layer)) is psBN2d
    assert type(to_bn(layer)) is nn.BatchNorm2d


def test_converted_and_constructed_layers_have_the_same_state_and_attributes():
    converted, made = to_psbn(nn.BatchNorm2d(3), alpha=0.2), psBN(3, alpha=0.2)
    assert sorted(converted.__dict__) == sorted(made.__dict__)
    assert sorted(converted.state_dict()) == sorted(made.state_dict())
    assert str(converted) == str(made)


class Custom(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class CustomPS(psBN2d):
    pass


def pruned():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    prune.random_unstructured(model[2], "bias", 0.5)
    return model


def tied():
    model = nn.Sequential(psBN(3, alpha=0.1), nn.ReLU(), psBN(3, alpha=0.3))
    model[2].beta = model[0].beta
    return model


@pytest.mark.parametrize(
    ("convert", "make", "error", "message"),
    [
        (to_psbn, pruned, TypeError, "the bias of 2 is pruned or parametrized"),
        (to_psbn, tied, TypeError, "2 shares its beta with a layer of another alpha"),
        (to_bn, tied, TypeError, "2 shares its beta with a layer of another alpha"),
        (to_psbn, lambda: nn.Sequential(nn.BatchNorm2d(3), Custom(3)), TypeError, "1 is a Custom"),
        (to_psbn, lambda: nn.LazyBatchNorm2d(), TypeError, "LazyBatchNorm2d"),
        (to_psbn, lambda: torch.jit.script(nn.BatchNorm2d(3)), TypeError, "before scripting"),
        (to_psbn, lambda: nn.Conv2d(3, 3, 1), ValueError, "no BatchNorm"),
        (to_bn, lambda: nn.Sequential(psBN(3), CustomPS(3)), TypeError, "1 is a CustomPS"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_left_alone(convert, make, error, message):
    model = make()
    kinds = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        convert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kwargs", [{"alpha": -1}, {"alpha": "x"}])
def test_bad_conversion_arguments(kwargs):
    with pytest.raises((TypeError, ValueError), match="alpha"):
        to_psbn(nn.BatchNorm2d(3), **kwargs)


def test_mmengines_own_synchronised_layers_are_converted():
    """Those of norm_cfg=dict(type='SyncBN'), and what a Runner of one process turns them into."""
    from mmengine.model import revert_sync_batchnorm

    x = torch.randn(2, 6, 4, 4)
    for revert in (lambda model: model, revert_sync_batchnorm):
        bn = MODELS.build({"type": "SyncBN", "num_features": 6})
        model = randomize(nn.Sequential(revert(bn), nn.ReLU()).eval())
        y = model(x)
        to_psbn(model)
        assert type(model[0]) is psSyncBN
        assert_close(model(x), y)
        made = psSyncBN(6)
        assert sorted(model[0].__dict__) == sorted(made.__dict__)
        assert_close(to_bn(model)(x), y)


def test_a_network_without_rectifiers_gets_a_warning():
    def make(activation):
        return nn.Sequential(nn.BatchNorm2d(3), activation, nn.Conv2d(3, 3, 1))

    with pytest.warns(UserWarning, match="no ReLU follows any of the 1 layers"):
        to_psbn(make(nn.SiLU()))
    mixed = nn.Sequential(make(nn.SiLU()), make(nn.ReLU()))
    unknown = nn.Sequential(make(nn.SiLU()), nn.BatchNorm2d(3))  # what follows is elsewhere
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (make(nn.ReLU()), make(nn.LeakyReLU()), mixed, unknown, nn.BatchNorm2d(3)):
            to_psbn(model)


def test_deepcopy_and_names():
    layer = psBN(3, alpha=0.2)
    assert copy.deepcopy(layer).alpha == layer.alpha
    assert psBN is psBN2d and psIN is psbn_mmdet.psIN2d


@pytest.fixture
def batch_norm_act(monkeypatch):
    """A layer as timm's is: BatchNorm2d with dropout and an activation of its own."""

    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, channels, act):
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), act

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    BatchNormAct2d.__module__, BatchNormAct2d.__qualname__ = (
        "timm.layers.norm_act",
        "BatchNormAct2d",
    )
    timm = types.ModuleType("timm.layers.norm_act")
    timm.BatchNormAct2d = BatchNormAct2d
    monkeypatch.setitem(sys.modules, "timm.layers.norm_act", timm)
    return BatchNormAct2d


def test_timms_batch_norm_with_an_activation_keeps_it(batch_norm_act):
    model = randomize(nn.Sequential(batch_norm_act(4, nn.ReLU()), nn.Conv2d(4, 4, 1))).eval()
    x = torch.randn(2, 4, 5, 5)
    y = model(x)
    keys = list(model.state_dict())
    to_psbn(model, alpha=0.2)
    assert isinstance(model[0], psBN2d) and isinstance(model[0].act, nn.ReLU)
    assert_close(model(x), y)
    assert followed_by(model)["0"] == "relu"
    to_bn(model)
    assert type(model[0]) is batch_norm_act
    assert_close(model(x), y)
    assert list(model.state_dict()) == keys
