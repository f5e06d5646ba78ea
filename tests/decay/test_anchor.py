"""A BN model with anchored biases against a real psBN model, step for step and bit for bit."""

import copy
import io
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from psbn_mmdet import to_psbn
from psbn_mmdet.decay import anchor_bias_decay
from tests.helpers.anchored import (
    ALPHA,
    OPTIMIZERS,
    STEPS,
    batches,
    norm_biases,
    pair,
    plain_step,
    small_net,
    train,
)
from tests.helpers.layers import randomize


def assert_same_run(make_optimizer, step_of=lambda: None, build=small_net, steps=STEPS):
    """The run of BN with anchored biases is that of psBN; that of BN without is another."""
    bn, psbn = pair(build)
    free = copy.deepcopy(bn)
    optimizer = make_optimizer(bn)
    anchor_bias_decay(bn, optimizer, ALPHA, log=None)
    losses, biases = train(bn, optimizer, steps, step_of())
    expected_losses, expected = train(psbn, make_optimizer(psbn), steps, step_of())
    assert losses == expected_losses
    for a, b in zip(biases, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    _, unanchored = train(free, make_optimizer(free), steps, step_of())
    assert not torch.equal(unanchored[-1][0], biases[-1][0])
    return losses


class TestTrainsAsPsbn:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_under_each_optimizer(self, name):
        assert_same_run(lambda model: OPTIMIZERS[name](model.parameters()))

    def test_with_groups_of_their_own_decay_and_lr(self):
        def make(model):
            norms = [p for m in model if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
            return torch.optim.SGD(
                [
                    {"params": norms[:2], "weight_decay": 0.2, "lr": 0.05},
                    {"params": norms[2:], "weight_decay": 0.01, "momentum": 0.5},
                    {"params": [*model[0].parameters(), *model[7].parameters()]},
                ],
                lr=0.1,
                weight_decay=0.05,
            )

        assert_same_run(make)

    def test_under_a_schedule_of_lr_and_decay(self):
        def step(model, optimizer, i):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (i + 1) if i < 3 else 0.05 * (1 + math.cos(i / STEPS * 3))
                group["weight_decay"] = 0.01 * i
            plain_step(model, optimizer, i)

        assert_same_run(lambda model: OPTIMIZERS["momentum"](model.parameters()), lambda: step)

    @pytest.mark.parametrize("name", ["momentum", "AdamW"])
    def test_under_torchs_own_scheduler(self, name):
        def make_step():
            schedulers = {}

            def step(model, optimizer, i):
                if not schedulers:
                    schedulers[0] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
                plain_step(model, optimizer, i)
                schedulers[0].step()

            return step

        assert_same_run(lambda model: OPTIMIZERS[name](model.parameters()), make_step)

    @pytest.mark.parametrize("by", ["norm", "value"])
    def test_with_gradient_clipping(self, by):
        norms = []

        def step(model, optimizer, i):
            if by == "norm":
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            else:
                nn.utils.clip_grad_value_(model.parameters(), 0.05)
            plain_step(model, optimizer, i)

        assert_same_run(lambda model: OPTIMIZERS["momentum"](model.parameters()), lambda: step)
        if by == "norm":
            assert min(norms) > 0.5  # it did clip
            # ... by the norm of the gradient alone, without decay: that of psBN
            assert norms[:STEPS] == norms[STEPS : 2 * STEPS]

    def test_with_accumulation(self):
        def step(model, optimizer, i):
            if i % 3 == 2:
                plain_step(model, optimizer, i)

        assert_same_run(lambda model: OPTIMIZERS["momentum"](model.parameters()), lambda: step)

    @pytest.mark.parametrize("name", ["momentum", "AdamW", "AdamW fused"])
    def test_with_steps_that_amp_skips(self, name):
        """Overflow at steps 3 and 4: GradScaler leaves the step out, or its kernel does."""
        if name not in OPTIMIZERS:
            pytest.skip("needs torch >= 2.4 for fused optimizers on the CPU")
        skipped = []

        def make_step():
            if not hasattr(torch.amp, "GradScaler"):
                pytest.skip("needs torch >= 2.3 for gradient scaling on the CPU")
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)

            def step(model, optimizer, i):
                for p in model.parameters():
                    p.grad.mul_(scaler.get_scale())
                if i in (3, 4):
                    next(model.parameters()).grad.view(-1)[0] = torch.inf
                before = norm_biases(model)
                scaler.scale(torch.zeros(()))  # makes its state, as scaler.scale(loss) does
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                same = all(map(torch.equal, before, norm_biases(model)))
                assert same == (i in (3, 4))
                skipped.append(same)

            return step

        assert_same_run(lambda model: OPTIMIZERS[name](model.parameters()), make_step)
        assert sum(skipped) == 3 * 2

    @pytest.mark.parametrize("as_keyword", [True, False])
    def test_with_a_closure_which_sees_the_biases(self, as_keyword):
        def make_step():
            data = list(batches())

            def step(model, optimizer, i):
                optimizer.zero_grad()

                def closure():
                    x, target = data[i]
                    loss = F.cross_entropy(model(x), target)
                    loss.backward()
                    return loss

                if as_keyword:
                    optimizer.step(closure=closure)
                else:
                    optimizer.step(closure)
                optimizer.zero_grad()

            return step

        assert_same_run(lambda model: OPTIMIZERS["momentum"](model.parameters()), make_step)

    def test_with_instance_norm_and_a_subclass_of_batch_norm(self):
        class Custom(nn.BatchNorm2d):
            pass

        for norm in (lambda c: nn.InstanceNorm2d(c, affine=True), nn.BatchNorm2d):
            assert_same_run(
                lambda model: OPTIMIZERS["SGD"](model.parameters()),
                build=lambda n=norm: small_net(n),
            )
        # to_psbn refuses a subclass, so its run is compared with that of BN itself
        runs = []
        for norm in (nn.BatchNorm2d, Custom):
            torch.manual_seed(0)
            model = randomize(small_net(norm))
            optimizer = OPTIMIZERS["SGD"](model.parameters())
            anchor_bias_decay(model, optimizer, ALPHA, log=None)
            runs.append(train(model, optimizer)[0])
        assert runs[0] == runs[1]

    def test_from_scratch_starts_at_alpha(self):
        torch.manual_seed(0)
        bn = small_net()
        psbn = to_psbn(copy.deepcopy(bn), ALPHA, shift=True)
        optimizer = OPTIMIZERS["momentum"](bn.parameters())
        anchor_bias_decay(bn, optimizer, ALPHA, log=None)
        assert train(bn, optimizer)[0] == train(psbn, OPTIMIZERS["momentum"](psbn.parameters()))[0]

    def test_small_steps_are_not_lost_to_the_larger_number(self):
        """beta = 1e-9 decays by 1e-11 a step; half a unit in the last place of 0.1 is 4e-9.

        100 steps take it to 1e-9 * 0.99^100, with one rounding of 2^-24 in each.
        """
        layer = nn.Sequential(nn.BatchNorm1d(1), nn.ReLU())
        nn.init.constant_(layer[0].bias, ALPHA)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, weight_decay=1.0)
        anchored = anchor_bias_decay(layer, optimizer, ALPHA, log=None)
        anchored.load_state_dict({"0.bias": torch.tensor([1e-9])})
        for _ in range(100):
            layer[0].bias.grad = torch.zeros(1)
            optimizer.step()
        beta = anchored.state_dict()["0.bias"]
        assert_close(beta, torch.tensor([1e-9 * 0.99**100]), rtol=2 * 100 * 2.0**-24, atol=0)


class TestIsBnPulledTowardAlpha:
    """The rules of the docstring written out, for a BN whose gradient or decay is changed by hand.

    In float64. Both runs do the same arithmetic but for a handful of roundings of numbers below 4
    in each step; these are multiplied by what the network makes of them in 12 steps: below 1e4.
    """

    atol = 4 * 2.0**-52 * 10 * 1e4

    @pytest.mark.parametrize(
        "name", ["SGD", "momentum", "Nesterov", "dampening", "Adam", "RMSprop"]
    )
    def test_l2_sees_bias_minus_alpha(self, name):
        self.compare(
            name,
            lambda optimizer, p: p.grad.sub_(optimizer.param_groups[0]["weight_decay"] * ALPHA),
        )

    def test_decoupled_decay_shrinks_bias_minus_alpha(self):
        """b - eta lambda (b - alpha) = (1 - eta lambda) b + eta lambda alpha."""
        self.compare("AdamW", after=lambda optimizer, p: p.data.add_(0.01 * 0.5 * ALPHA))

    def compare(self, name, before=None, after=None):
        torch.manual_seed(0)
        model = randomize(small_net().double())
        by_hand = copy.deepcopy(model)

        def make_optimizer(model):
            optimizer = OPTIMIZERS[name](model.parameters())
            for group in optimizer.param_groups:
                if "eps" in group:  # a gradient near 0, divided by its own size, is all rounding
                    group["eps"] = 1e-3
            return optimizer

        optimizer = make_optimizer(model)
        anchor_bias_decay(model, optimizer, ALPHA, log=None)

        def step(model, optimizer, i):
            for layer in (model[1], model[4]):
                if before:
                    before(optimizer, layer.bias)
            optimizer.step()
            for layer in (model[1], model[4]):
                if after:
                    after(optimizer, layer.bias)
            optimizer.zero_grad()

        data = list(batches(dtype=torch.float64))
        _, biases = train(model, optimizer, data=data)
        _, expected = train(by_hand, make_optimizer(by_hand), step=step, data=data)
        for a, b in zip(biases, expected, strict=True):
            assert_close(a, b, rtol=0, atol=self.atol)


class TestMaxRatio:
    """alpha of a layer is min(alpha, max_ratio * rms(gamma))."""

    def layers(self):
        model = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(), nn.BatchNorm1d(2), nn.ReLU())
        for layer, gamma in ((model[0], (0.03, -0.04)), (model[2], (1.0, 2.0))):
            layer.weight.data = torch.tensor(gamma)
            nn.init.constant_(layer.bias, 0.2)
        return model

    def test_by_hand(self):
        """lr * decay = 0.5 and no gradient: gamma halves, and so does bias - alpha."""
        model = self.layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
        anchor_bias_decay(model, optimizer, 0.1, max_ratio=2, log=None)
        rms = math.sqrt((0.03**2 + 0.04**2) / 2)
        small = large = 0.2
        for gamma_left in (1, 0.5, 0.25):  # 2 rms = 0.071, 0.035, 0.018
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            small = (small + 2 * rms * gamma_left) / 2
            large = (large + 0.1) / 2  # 2 rms = 3.2, 1.6, 0.8
            assert_close(model[0].bias.detach(), torch.full((2,), small))
            assert_close(model[2].bias.detach(), torch.full((2,), large))

    def test_starts_there(self):
        model = self.layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
        anchor_bias_decay(model, optimizer, 0.1, max_ratio=2, init="alpha", log=None)
        rms = math.sqrt((0.03**2 + 0.04**2) / 2)
        assert_close(model[0].bias.detach(), torch.full((2,), 2 * rms))
        assert torch.equal(model[2].bias.detach(), torch.full((2,), 0.1))

    def test_is_psbn_to_the_bit_where_gamma_is_large(self):
        bn, psbn = pair()
        limited = copy.deepcopy(bn)
        for model in (bn, psbn, limited):
            for i in (1, 4):
                model[i].weight.data.abs_().add_(0.5)
        runs = [train(psbn, OPTIMIZERS["momentum"](psbn.parameters()))]
        for model, max_ratio in ((bn, 1), (limited, 0.01)):
            optimizer = OPTIMIZERS["momentum"](model.parameters())
            anchor_bias_decay(model, optimizer, ALPHA, max_ratio=max_ratio, log=None)
            runs.append(train(model, optimizer))
        assert runs[0][0] == runs[1][0]
        assert runs[0][0] != runs[2][0]

    @pytest.mark.parametrize("lr", [1e-6, 1e-5])
    def test_small_steps_are_not_lost_while_alpha_changes(self, lr):
        """2000 steps of lr * 1e-3, at 1e-6 less than half a unit in the last place of the bias.

        What the layer adds is beta + rms(gamma), gamma 0.05 and shrinking; float64 loses nothing.
        """
        ends = []
        for dtype in (torch.float32, torch.float64):
            model = nn.Sequential(nn.BatchNorm1d(2, dtype=dtype), nn.ReLU())
            nn.init.constant_(model[0].weight, 0.05)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=0.1)
            anchored = anchor_bias_decay(model, optimizer, 0.1, max_ratio=1, log=None)
            for _ in range(2000):
                model[0].weight.grad = torch.zeros(2, dtype=dtype)
                model[0].bias.grad = torch.full((2,), 1e-3, dtype=dtype)
                optimizer.step()
            beta = anchored.state_dict()["0.bias"]
            ends.append(beta.double() + model[0].weight.detach().double())
        assert_close(ends[1], torch.full((2,), 0.05 - 2000 * lr * 1e-3).double(), atol=2e-7, rtol=0)
        assert_close(ends[0], ends[1], rtol=0, atol=1e-8)

    def test_of_layers_that_share_a_gamma(self):
        model = self.layers()
        model[2].weight = model[0].weight
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
        anchored = anchor_bias_decay(model, optimizer, 0.1, max_ratio=1, log=None)
        anchored.load_state_dict({})
        state = anchored.state_dict()
        assert list(state) == ["0.bias", "2.bias"]
        rms = math.sqrt((0.03**2 + 0.04**2) / 2)
        for beta in state.values():
            assert not beta.requires_grad
            assert_close(beta, torch.full((2,), 0.2 - rms))

    def test_says_what_it_is(self):
        said = []
        model = self.layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
        anchor_bias_decay(model, optimizer, 0.1, max_ratio=2, log=said.append)
        assert "decay toward 0.1, or 2 times gamma's RMS if that is less; " in said[0]


class TestState:
    def run(self, steps, resume_at=None, keep_beta=True, max_ratio=None):
        torch.manual_seed(0)
        data = list(batches(steps))
        model = randomize(small_net())
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        anchored = anchor_bias_decay(model, optimizer, ALPHA, max_ratio=max_ratio, log=None)
        first = data[:resume_at]
        losses, _ = train(model, optimizer, data=first)
        if resume_at:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), anchored.state_dict()], file)
            file.seek(0)
            states = torch.load(file, weights_only=True)
            model = small_net()
            optimizer = OPTIMIZERS["momentum"](model.parameters())
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
            anchored = anchor_bias_decay(model, optimizer, ALPHA, max_ratio=max_ratio, log=None)
            if keep_beta:
                anchored.load_state_dict(states[2])
            losses += train(model, optimizer, data=data[resume_at:])[0]
        return losses, norm_biases(model)

    # The RMS of these gammas is near 1, so that 0.05 of it is less than alpha.
    @pytest.mark.parametrize("max_ratio", [None, 0.05])
    def test_resumes_to_the_bit(self, max_ratio):
        losses, biases = self.run(30, max_ratio=max_ratio)
        resumed, resumed_biases = self.run(30, resume_at=17, max_ratio=max_ratio)
        assert resumed == losses
        assert all(map(torch.equal, biases, resumed_biases))

    def test_without_saved_betas_resumes_to_rounding(self):
        losses, _ = self.run(30)
        resumed, _ = self.run(30, resume_at=17, keep_beta=False)
        # Half a unit in the last place of the bias, 6e-8, times what 13 steps make of it: below 1e3
        assert_close(resumed, losses, rtol=0, atol=6e-5)

    @pytest.mark.parametrize("keep_beta", [True, False])
    def test_saved_betas_hold_what_the_rounded_bias_has_lost(self, keep_beta):
        """Each step adds 1e-9 to beta; the bias, near 0.1, has units of 2^-27 = 7.5e-9.

        After three steps beta is 3e-9, below half a unit, so the bias is still alpha to the bit.
        Three steps later beta is 6e-9, above it, and the bias one unit higher; but only if the
        first 3e-9 were saved. All of it is exact to a few times 2^-24 of these numbers, the weight
        decay included, so no processor can round across the half of 3.7e-9.
        """

        def make():
            layer = nn.Sequential(nn.BatchNorm1d(1), nn.ReLU())
            optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=1e-9)
            return layer, optimizer

        def three_steps(layer, optimizer):
            for _ in range(3):
                layer[0].bias.grad = torch.tensor([-1e-9])
                optimizer.step()

        layer, optimizer = make()
        anchored = anchor_bias_decay(layer, optimizer, ALPHA, init="alpha", log=None)
        three_steps(layer, optimizer)
        alpha = torch.tensor([ALPHA])
        assert torch.equal(layer[0].bias, alpha)
        saved = copy.deepcopy((layer.state_dict(), anchored.state_dict()))

        layer, optimizer = make()
        layer.load_state_dict(saved[0])
        anchored = anchor_bias_decay(layer, optimizer, ALPHA, init="keep", log=None)
        if keep_beta:
            anchored.load_state_dict(saved[1])
        three_steps(layer, optimizer)
        one_higher = torch.nextafter(alpha, torch.ones(1))
        assert torch.equal(layer[0].bias, one_higher if keep_beta else alpha)

    def test_another_alpha_or_other_weights_take_beta_from_the_bias(self):
        bn, psbn = pair()
        optimizer = OPTIMIZERS["SGD"](bn.parameters())
        anchored = anchor_bias_decay(bn, optimizer, ALPHA, log=None)
        anchored.load_state_dict({name: torch.full((8,), 7.0) for name in anchored.names})
        assert train(bn, optimizer)[0] == train(psbn, OPTIMIZERS["SGD"](psbn.parameters()))[0]

    def test_betas_of_another_shape_are_refused(self):
        bn, _ = pair()
        anchored = anchor_bias_decay(bn, OPTIMIZERS["SGD"](bn.parameters()), ALPHA, log=None)
        with pytest.raises(ValueError, match=r"beta of 1.bias has shape \(3,\), expected \(8,\)"):
            anchored.load_state_dict({"1.bias": torch.zeros(3)})

    def test_weights_loaded_between_steps_count(self):
        bn, psbn = pair()
        other, _ = pair()
        runs = []
        for model in (bn, psbn):
            optimizer = OPTIMIZERS["momentum"](model.parameters())
            if model is bn:
                anchor_bias_decay(bn, optimizer, ALPHA, log=None)
            losses = train(model, optimizer)[0]
            model.load_state_dict(other.state_dict())
            runs.append(losses + train(model, optimizer)[0])
        assert runs[0] == runs[1]

    def test_state_dict_stays_plain_bn(self):
        model = small_net()
        keys = list(model.state_dict())
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        anchor_bias_decay(model, optimizer, log=None)
        train(model, optimizer, 2)
        assert list(model.state_dict()) == keys
        small_net().load_state_dict(model.state_dict())

    def test_a_bias_that_is_not_stepped_keeps_its_bits(self):
        model = randomize(small_net())
        model[1].bias.requires_grad_(False)
        before = norm_biases(model)
        assert not torch.equal((before[0] - ALPHA) + ALPHA, before[0])  # else this shows nothing
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        anchor_bias_decay(model, optimizer, ALPHA, init="alpha", log=None)
        train(model, optimizer, 3)
        after = norm_biases(model)
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])

    def test_remove_makes_it_plain_bn_again(self):
        model = randomize(small_net())
        plain = copy.deepcopy(model)
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        anchor_bias_decay(model, optimizer, ALPHA, log=None).remove()
        assert not model._forward_pre_hooks
        expected = train(plain, OPTIMIZERS["SGD"](plain.parameters()))[0]
        assert train(model, optimizer)[0] == expected

    def test_a_copy_or_pickle_of_the_model_is_on_its_own(self):
        model = randomize(small_net())
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        anchor_bias_decay(model, optimizer, ALPHA, log=None)
        file = io.BytesIO()
        torch.save(model, file)
        twin = copy.deepcopy(model)
        train(model, optimizer, 2)
        x = torch.randn(4, 3, 8, 8)
        assert not torch.equal(twin.eval()(x), model.eval()(x))
        assert all(hook.anchored is None for hook in twin._forward_pre_hooks.values())


def test_hooks_that_the_compiler_took_from_the_optimizer_are_given_back():
    """As torch.compile does in torch 2.1: the class gets its step without what calls hooks."""
    hooking = torch.optim.Optimizer.profile_hook_step(lambda *args: None).__code__
    kind = type("Bare", (torch.optim.SGD,), {})
    bn = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    optimizer = kind(bn.parameters(), lr=0.1, weight_decay=0.5)
    step = kind.step
    while step.__code__ is hooking:
        step = step.__wrapped__
    kind.step = step
    anchor_bias_decay(bn, optimizer, ALPHA, init="alpha", log=None)
    bn[0].bias.grad = torch.zeros(4)
    optimizer.step()
    assert_close(bn[0].bias.detach(), torch.full((4,), ALPHA))  # its own anchor does not pull it


def test_anchored_before_and_after_the_first_compilation():
    """In a process of its own: the compiler changes the optimizers once, when it starts."""
    script = """
import torch
from psbn_mmdet.decay import anchor_bias_decay
for i in range(2):
    bn = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    optimizer = torch.optim.SGD(bn.parameters(), lr=0.1, weight_decay=0.5)
    anchor_bias_decay(bn, optimizer, 0.1, init="alpha", log=None)
    if i == 0:
        torch.compile(bn, backend="eager")
    bn[0].bias.grad = torch.zeros(4)
    optimizer.step()
    torch.testing.assert_close(bn[0].bias.detach(), torch.full((4,), 0.1))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
