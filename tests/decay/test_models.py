"""Models of every kind, where the biases start, steps that raise, and bad input."""

import functools
import inspect
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from psbn_mmdet import to_psbn
from psbn_mmdet.decay import anchor_bias_decay
from psbn_mmdet.norm import rectified
from tests.helpers.anchored import (
    ALPHA,
    OPTIMIZERS,
    as_psbn_computes,
    batches,
    norm_biases,
    pair,
    small_net,
    train,
)
from tests.helpers.layers import randomize
from tests.helpers.paths import ROOT


class TestWhenAStepRaises:
    @pytest.fixture
    def broken(self):
        """Biases and gammas are stepped; then the second group raises."""
        model = as_psbn_computes(randomize(small_net()))
        norms = [p for m in model if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        rest = [*model[0].parameters(), *model[3].parameters(), *model[7].parameters()]
        optimizer = torch.optim.SGD(
            [{"params": norms}, {"params": rest}], lr=0.1, weight_decay=0.1, foreach=False
        )
        anchor_bias_decay(model, optimizer, ALPHA, log=None)
        before = norm_biases(model)
        x, target = next(batches())
        F.cross_entropy(model(x), target).backward()
        grads = [model[1].bias.grad.clone(), model[4].bias.grad.clone()]
        optimizer.param_groups[1]["lr"] = "none"
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            optimizer.step()
        expected = [
            (b - ALPHA - 0.1 * (g + 0.1 * (b - ALPHA))) + ALPHA
            for b, g in zip(before, grads, strict=True)
        ]
        for wrong, right in zip(norm_biases(model), expected, strict=True):
            assert (right - wrong).min() > 0.9 * ALPHA  # without help they would stay like this
        return model, optimizer, expected

    @pytest.mark.parametrize("look", ["forward", "state_dict", "part of the state dict", "remove"])
    def test_the_first_look_at_the_model_finds_the_biases(self, broken, look):
        model, optimizer, expected = broken
        if look == "forward":
            model(torch.randn(2, 3, 8, 8))
        elif look == "remove":
            optimizer._optimizer_step_pre_hooks.popitem()[1].__self__.remove()
        else:
            model.state_dict()
        # Three roundings of numbers below 4
        assert_close(norm_biases(model), expected, rtol=0, atol=3 * 4 * 2.0**-24)

    def test_the_next_step_goes_on_from_there(self, broken):
        model, optimizer, expected = broken
        optimizer.param_groups[1]["lr"] = 0.1
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        expected = [b - 0.1 * 0.1 * (b - ALPHA) for b in expected]
        assert_close(norm_biases(model), expected, rtol=0, atol=6 * 4 * 2.0**-24)

    def test_weights_loaded_then_are_the_loaded_ones(self, broken):
        model, _, _ = broken
        other = randomize(small_net())
        model.load_state_dict(other.state_dict())
        model(torch.randn(2, 3, 8, 8))
        assert all(map(torch.equal, norm_biases(model), norm_biases(other)))

    def test_a_closure_that_raises_leaves_the_biases(self):
        model = as_psbn_computes(randomize(small_net()))
        before = norm_biases(model)
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        anchor_bias_decay(model, optimizer, ALPHA, log=None)

        def closure():
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(closure)
        assert all(map(torch.equal, before, norm_biases(model)))


class TestModelsThatAreNotPlainModules:
    def expected(self):
        torch.manual_seed(0)
        _, psbn = pair()
        return train(psbn, OPTIMIZERS["momentum"](psbn.parameters()))[0]

    @pytest.mark.parametrize("anchored_first", [False, True])
    def test_compiled(self, anchored_first):
        """By aot_eager: all of the compiler but the code generator, which rounds otherwise."""
        bn, _ = pair()
        optimizer = OPTIMIZERS["momentum"](bn.parameters())
        if anchored_first:
            anchor_bias_decay(bn, optimizer, ALPHA, log=None)
        model = torch.compile(bn, backend="aot_eager", fullgraph=True)
        if not anchored_first:
            anchor_bias_decay(model, optimizer, ALPHA, log=None)
        losses = train(model, optimizer)[0]
        torch.manual_seed(0)
        # Another order of sums: as in TestState, roundings of 6e-8 grow below 1e3 times.
        assert_close(losses, self.expected(), rtol=0, atol=6e-5)

    @pytest.mark.parametrize(
        ("convert", "known"),
        [
            (lambda bn: torch.export.export(bn.train(), (torch.randn(4, 3, 8, 8),)).module(), True),
            (torch.jit.script, None),  # what follows cannot be told there
        ],
        ids=["exported", "scripted"],
    )
    def test_converted(self, convert, known):
        bn, psbn = pair()
        model = convert(bn)
        assert rectified(model) == {"1.bias": known, "4.bias": known}
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        anchored = anchor_bias_decay(model, optimizer, ALPHA, log=None)
        assert anchored.names == ["1.bias", "4.bias"]
        losses = train(model, optimizer)[0]
        expected = train(psbn, OPTIMIZERS["momentum"](psbn.parameters()))[0]
        assert_close(losses, expected, rtol=0, atol=6e-5)

    def test_distributed_data_parallel(self, tmp_path):
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            bn, psbn = pair()
            model = nn.parallel.DistributedDataParallel(bn)
            optimizer = OPTIMIZERS["momentum"](model.parameters())
            anchored = anchor_bias_decay(model, optimizer, ALPHA, log=None)
            assert anchored.names == ["1.bias", "4.bias"]
            losses = train(model, optimizer)[0]
        finally:
            dist.destroy_process_group()
        assert losses == train(psbn, OPTIMIZERS["momentum"](psbn.parameters()))[0]

    def test_data_parallel(self):
        bn, psbn = pair()
        model = nn.DataParallel(bn)
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        anchored = anchor_bias_decay(model, optimizer, ALPHA, log=None)
        assert anchored.names == ["1.bias", "4.bias"]
        expected = train(psbn, OPTIMIZERS["momentum"](psbn.parameters()))[0]
        assert train(model, optimizer)[0] == expected


def test_without_what_torch_has_only_from_2_5_on():
    """No Adafactor, no public hook for loading; a step that raised is still put right by a load."""
    program = """
import torch
for owner, name in [
    (torch.optim, "Adafactor"),
    (torch.nn.Module, "register_load_state_dict_pre_hook"),
]:
    if hasattr(owner, name):
        delattr(owner, name)
from psbn_mmdet.decay import anchor_bias_decay
model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.ReLU())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
anchored = anchor_bias_decay(model, optimizer, log=None)
anchored._before_step(optimizer, (optimizer,), {})  # as a step that raises leaves it
assert model[0].bias.tolist() == [0, 0]
model.load_state_dict({}, strict=False)
assert torch.equal(model[0].bias, torch.full((2,), 0.1))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


class TestInit:
    def start(self, init, prepare=lambda model: None):
        model = small_net()
        prepare(model)
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        anchor_bias_decay(model, optimizer, 0.25, init=init, log=None)
        return [b.unique().tolist() for b in norm_biases(model)]

    def test_auto_takes_layers_as_constructed_to_alpha(self):
        def seen(model):
            model[1].num_batches_tracked.fill_(3)

        def loaded(model):
            model[1].bias.data[2] = 0.5

        assert self.start("auto") == [[0.25], [0.25]]
        assert self.start("auto", seen) == [[0.0], [0.25]]
        assert self.start("auto", loaded) == [[0.0, 0.5], [0.25]]

    def test_keep_and_alpha(self):
        assert self.start("keep") == [[0.0], [0.0]]
        assert self.start("alpha", lambda model: randomize(model)) == [[0.25], [0.25]]

    def test_frozen_biases_stay(self):
        assert self.start("alpha", lambda m: m[1].requires_grad_(False)) == [[0.0], [0.25]]


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "weight_decay": 0.1, **options})


class OwnSGD(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class TestBadInput:
    def refuses(self, error, match, make=sgd, model=None, **options):
        model = small_net() if model is None else model
        before = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer = make(model)
        with pytest.raises(error, match=match) as raised:
            anchor_bias_decay(model, optimizer, **options)
        assert "\n" not in str(raised.value)
        assert not getattr(optimizer, "_optimizer_step_pre_hooks", None)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])

    @pytest.mark.parametrize("name", ["alpha", "max_ratio"])
    @pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf])
    def test_alpha_and_max_ratio(self, name, value):
        message = f"{name} is {value}: wanted a finite number above 0"
        self.refuses(ValueError, message, **{name: value})

    @pytest.mark.parametrize("name", ["alpha", "max_ratio"])
    def test_types_of_alpha_and_max_ratio(self, name):
        self.refuses(TypeError, f"{name} is '0.1': wanted a number", **{name: "0.1"})
        self.refuses(TypeError, f"{name} is True", **{name: True})

    def test_max_ratio_needs_gamma(self):
        message = "max_ratio needs a gamma beside each bias; there is none at 0.bias, 7.bias"
        self.refuses(ValueError, message, layers=["0.bias", "1.bias", "7.bias"], max_ratio=1)

    def test_options(self):
        self.refuses(ValueError, "init is 'zero': wanted one of", init="zero")
        self.refuses(ValueError, "layers is 'most': wanted 'relu', 'all' or", layers="most")
        self.refuses(ValueError, r"no parameters \['9.bias'\]", layers=["1.bias", "9.bias"])

    def test_no_norm_layers(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.refuses(ValueError, "no BatchNorm or InstanceNorm with a trained bias", model=model)
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.ReLU())
        self.refuses(ValueError, "no BatchNorm or InstanceNorm with a trained bias", model=model)
        self.refuses(ValueError, "psBN layers need no anchor", model=to_psbn(small_net()))

    def test_no_rectifier(self):
        model = nn.Sequential(nn.BatchNorm2d(2), nn.SiLU())
        self.refuses(ValueError, "no ReLU follows any of the 1 norm layers", model=model)

    def test_lazy_layers(self):
        model = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        with pytest.raises(ValueError, match=r"0\.bias has no shape yet; run the model once"):
            anchor_bias_decay(model, optimizer)

    def test_no_decay_on_the_biases(self):
        self.refuses(
            ValueError,
            "weight decay is 0 for all 2 biases in this SGD: nothing to anchor",
            lambda model: sgd(model, weight_decay=0.0),
        )

    def test_no_decay_on_some_biases_is_said(self, capsys):
        model = small_net()
        groups = [{"params": model[:3].parameters(), "weight_decay": 0.0}]
        groups.append({"params": model[3:].parameters()})
        anchor_bias_decay(model, torch.optim.SGD(groups, lr=0.1, weight_decay=0.1))
        assert "no weight decay, so no effect: 1.bias. Taken" in capsys.readouterr().out

    def test_biases_of_another_optimizer(self):
        self.refuses(
            ValueError, "none of the 2 norm-layer biases is in this", lambda m: sgd(small_net())
        )

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (
                lambda m: torch.optim.ASGD(m.parameters(), weight_decay=0.1),
                "ASGD averages the parameters",
            ),
            (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS has no weight decay"),
            (lambda m: torch.optim.Rprop(m.parameters()), "Rprop has no weight decay"),
            (lambda m: sgd(m, differentiable=True), "differentiable=True"),
            (lambda m: OwnSGD(m.parameters(), 0.1, weight_decay=0.1), "OwnSGD is unknown"),
            (lambda m: nn.Identity(), "Identity is not a torch.optim.Optimizer"),
        ],
    )
    def test_optimizers_it_cannot_anchor(self, make, match):
        self.refuses(TypeError, match, make)

    @pytest.mark.parametrize("first", ["the base", "the subclass"])
    def test_a_plain_subclass_is_known_whatever_was_constructed_before(self, first, monkeypatch):
        """torch wraps a class's step when the first optimizer of it is made: start without."""
        hooking = torch.optim.Optimizer.profile_hook_step(lambda *args: None).__code__
        own = inspect.unwrap(torch.optim.SGD.step, stop=lambda f: f.__code__ is not hooking)
        monkeypatch.setattr(torch.optim.SGD, "step", own)

        class Plain(torch.optim.SGD):
            def __init__(self, params):
                super().__init__(params, lr=0.1, weight_decay=0.05)

        class Changed(Plain):
            @functools.wraps(torch.optim.SGD.step)
            def step(self, closure=None):
                return super().step(closure)

        if first == "the base":
            sgd(small_net())
        bn, psbn = pair()
        optimizer = Plain(bn.parameters())
        anchor_bias_decay(bn, optimizer, ALPHA, log=None)
        assert train(bn, optimizer)[0] == train(psbn, OPTIMIZERS["SGD"](psbn.parameters()))[0]
        self.refuses(TypeError, "Changed is unknown", lambda m: Changed(m.parameters()))
        # and the other way round: the base after its subclass
        anchor_bias_decay(model := small_net(), sgd(model), log=None)

    def test_an_unknown_optimizer_on_request(self):
        bn, psbn = pair()
        optimizer = OwnSGD(bn.parameters(), lr=0.1, weight_decay=0.05)
        anchor_bias_decay(bn, optimizer, ALPHA, any_optimizer=True, log=None)
        assert train(bn, optimizer)[0] == train(psbn, OPTIMIZERS["SGD"](psbn.parameters()))[0]

    def test_twice(self):
        model = small_net()
        optimizer = sgd(model)
        anchored = anchor_bias_decay(model, optimizer, log=None)
        with pytest.raises(ValueError, match="biases are anchored already"):
            anchor_bias_decay(model, optimizer, 0.2, log=None)
        anchored.remove()
        anchor_bias_decay(model, optimizer, 0.2, log=None)
