"""SparsityLoggerHook: on a real Runner, killed and resumed, and against the truth made by hand."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from psbn_mmdet import collapse, norm
from psbn_mmdet.collapse import hook as hooks
from psbn_mmdet.collapse import measure, trace
from psbn_mmdet.collapse.hook import SparsityLoggerHook, responsible_key, undecayed_betas
from tests.helpers import distributed
from tests.helpers.collapsed_net import CONSTANT, DEAD, VARIANTS, Net, collapse_by_hand
from tests.helpers.paths import ROOT
from tests.helpers.toy_runner import make_runner


def log_of(work_dir):
    return "\n".join(p.read_text() for p in sorted(Path(work_dir).glob("*/*.log")))


class TestTraining:
    @pytest.mark.parametrize("kind", ["BN", "psBN", "IN"])
    def test_weights_are_equal_to_the_bit_with_and_without(self, kind, tmp_path):
        def network():
            torch.manual_seed(1)
            net = Net()
            if kind == "psBN":
                norm.to_psbn(net)
            if kind == "IN":
                net.bn1 = nn.InstanceNorm2d(8, affine=True)
            return net

        states = []
        for name in ("with", "without"):
            hook_list = []
            if name == "with":
                hook_list = [SparsityLoggerHook(1, figures=False, input_size=(3, 6, 6))]
            runner = make_runner(tmp_path / name, hook_list, network())
            runner.train()
            states.append((runner.model.state_dict(), torch.get_rng_state()))
        assert (tmp_path / "with" / "collapse.trace").exists()
        (ours, our_rng), (theirs, their_rng) = states
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert torch.equal(our_rng, their_rng)

    def test_the_trace_holds_gamma_and_bias_at_every_interval_exactly(self, tmp_path):
        seen = {}

        class Watch(Hook):
            priority = "LOWEST"

            def before_train(self, runner):
                self.keep(runner, runner.iter)

            def after_train_iter(self, runner, *args, **kwargs):
                self.keep(runner, runner.iter + 1)

            def keep(self, runner, iteration):
                layers = collapse.norm_modules(runner.model).values()
                gamma = torch.cat([m.weight.detach().clone() for m in layers])
                seen[iteration] = gamma, torch.cat([m.bias.detach().clone() for m in layers])

        make_runner(tmp_path, [SparsityLoggerHook(5, figures=False), Watch()]).train()
        got = trace.read(tmp_path / "collapse.trace")
        assert got.iterations.tolist() == [0, 5, 10, 12]
        for row, iteration in enumerate(got.iterations):
            gamma, bias = seen[int(iteration)]
            assert np.array_equal(got.gamma[row], gamma.numpy())
            assert np.array_equal(got.bias[row], bias.numpy())
        assert sorted(got.norms) == [0, 12]
        final = measure(make_runner(tmp_path / "b", [], iterations=1).model)
        assert [layer.name for layer in final.layers] == [name for name, _, _ in got.layers]

    def test_a_log_line_shows_what_was_measured_in_its_own_iteration(self, tmp_path):
        class Collapse(Hook):
            priority = "VERY_HIGH"

            def after_train_iter(self, runner, *args, **kwargs):
                runner.model.net.bn1.weight.data[: runner.iter + 1] = 0  # one more each

        net = norm.to_psbn(Net())
        hook_list = [SparsityLoggerHook(1, figures=False), Collapse()]
        make_runner(tmp_path, hook_list, net, iterations=4).train()
        line = next(x for x in log_of(tmp_path).splitlines() if "Iter(train) [4/4]" in x)
        assert "collapsed_percent: 14.2857" in line  # 4 of 28

    def test_by_epoch(self, tmp_path):
        make_runner(
            tmp_path, [SparsityLoggerHook(2, by_epoch=True, figures=False)], epochs=5
        ).train()
        # 16 samples in batches of 4
        assert trace.read(tmp_path / "collapse.trace").iterations.tolist() == [0, 8, 16, 20]

    def test_totals_reach_the_log_line_and_tensorboard_under_names_that_are_not_averaged(
        self, tmp_path
    ):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        net = collapse_by_hand(Net())
        for parameter in net.parameters():
            parameter.requires_grad_(parameter is net.fc.bias)
        visualizer = {"type": "Visualizer", "vis_backends": [{"type": "TensorboardVisBackend"}]}
        hook = SparsityLoggerHook(1, figures=False)
        runner = make_runner(
            tmp_path, [hook], net, visualizer={**visualizer, "name": str(tmp_path)}
        )
        runner.train()
        runner.visualizer.close()
        line = next(x for x in log_of(tmp_path).splitlines() if "Iter(train) [ 4/12]" in x)
        assert "collapsed_percent: 28.5714" in line  # 8 of 28
        assert "constant_percent: 7.1429" in line  # 2 of 28
        assert "inactive_percent: 14.2857" in line  # 4 of 28
        events = next(tmp_path.glob("**/events.out*"))
        curves = EventAccumulator(str(events.parent)).Reload()
        assert [e.step for e in curves.Scalars("collapsed_percent")] == [4, 8, 12]
        assert curves.Scalars("collapsed_percent")[0].value == pytest.approx(100 * 8 / 28)
        for name in runner.message_hub.log_scalars:
            if name not in ("train/loss", "train/time", "train/data_time"):
                assert not re.search("loss|time|grad_norm", name), name

    def test_one_synchronisation_for_a_measurement(self, monkeypatch):
        layers = collapse.norm_modules(norm.to_psbn(Net())).values()
        transfers = []
        to_cpu = torch.Tensor.cpu
        monkeypatch.setattr(torch.Tensor, "cpu", lambda t: transfers.append(t) or to_cpu(t))
        for name in ("item", "tolist", "numpy", "__float__", "__bool__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a second one"))
        collapse.gather(layers)
        assert len(transfers) == 1

    def test_figures_and_page_are_drawn_into_the_log_folder(self, tmp_path):
        runner = make_runner(tmp_path, [SparsityLoggerHook(4)])
        runner.train()
        drawn = {p.name for p in Path(runner.log_dir, "collapse").iterdir()}
        assert "collapse.html" in drawn
        assert len([name for name in drawn if name.endswith(".png")]) == 4


def everywhere(net, work_dir):
    """The sets that the hook's file reports for a network that does not move."""
    for parameter in net.parameters():
        parameter.requires_grad_(parameter is net.fc.bias)
    make_runner(work_dir, [SparsityLoggerHook(1, figures=False)], net, iterations=1).train()
    rows = trace.read(work_dir / "collapse.trace").report().rows
    return {row["name"].removeprefix("net."): row["collapsed_filters"] for row in rows}


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "Sync" not in v])
def test_the_hook_records_exactly_the_filters_collapsed_by_hand(variant, tmp_path):
    found = everywhere(VARIANTS[variant](collapse_by_hand(Net())), tmp_path)
    assert found == {name: sorted(DEAD[name] + CONSTANT[name]) for name in DEAD}


def test_sync_bn_is_recorded_alike(tmp_path):
    # A non-distributed Runner turns SyncBN into BN, so the hook's parts are used directly.
    for i, variant in enumerate(("SyncBN", "psSyncBN")):
        model = VARIANTS[variant](collapse_by_hand(Net()))
        writer = trace.Writer(tmp_path / f"{i}.trace", measure(model), 0)
        writer.write(0, *collapse.gather(collapse.norm_modules(model).values()))
        rows = trace.read(tmp_path / f"{i}.trace").report().rows
        want = [sorted(DEAD[name] + CONSTANT[name]) for name in DEAD]
        assert [row["collapsed_filters"] for row in rows] == want


class TestResume:
    def run(self, work_dir, kill_at=0, resume=False):
        call = f"program({str(work_dir)!r}, {kill_at}, {resume})"
        code = f"from tests.helpers.toy_runner import program; {call}"
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            timeout=120,
        )

    @pytest.mark.slow
    def test_a_run_killed_and_resumed_has_the_trace_of_an_uninterrupted_one(self, tmp_path):
        assert self.run(tmp_path / "whole").returncode == 0
        # The last checkpoint is of iteration 8; 10 is recorded and a torn record follows.
        assert self.run(tmp_path / "killed", kill_at=11).returncode == -signal.SIGKILL
        torn = trace.read(tmp_path / "killed" / "collapse.trace")
        assert torn.iterations.tolist() == [0, 2, 4, 6, 8, 10]
        assert self.run(tmp_path / "killed", resume=True).returncode == 0
        whole = trace.read(tmp_path / "whole" / "collapse.trace")
        again = trace.read(tmp_path / "killed" / "collapse.trace")
        assert again.iterations.tolist() == whole.iterations.tolist() == [0, 2, 4, 6, 8, 10, 12]
        # Up to the checkpoint to the bit; then mmengine's sampler goes on as it does.
        assert np.array_equal(again.gamma[:5], whole.gamma[:5])
        assert np.array_equal(again.bias[:5], whole.bias[:5])
        assert sorted(again.norms) == [0, 12]


class TestWarnings:
    def warned(self, tmp_path, net, optim_wrapper):
        runner = make_runner(
            tmp_path,
            [SparsityLoggerHook(figures=False)],
            net,
            iterations=1,
            optim_wrapper=optim_wrapper,
        )
        runner.train()
        return [x for x in log_of(tmp_path).splitlines() if "psBN does nothing" in x]

    @pytest.mark.parametrize(
        ("rules", "key"),
        [
            ({"norm_decay_mult": 0, "bias_decay_mult": 0, "bypass_duplicate": True},
             "paramwise_cfg.norm_decay_mult=0"),
            ({"custom_keys": {"block": {"decay_mult": 0}}}, "custom_keys['block']"),
            ({"flat_decay_mult": 0}, "paramwise_cfg.flat_decay_mult=0"),
        ],
    )  # fmt: skip
    def test_a_rule_that_takes_decay_from_beta_is_named(self, rules, key, tmp_path):
        net = norm.to_psbn(Net())
        found = self.warned(tmp_path, net, {"paramwise_cfg": rules})
        assert len(found) == 1
        assert key in found[0]
        assert f"beta of {3 if 'block' in key else 4} layers" in found[0]

    def test_an_optimizer_without_decay_is_named(self, tmp_path):
        optimizer = {"optimizer": {"type": "SGD", "lr": 0.1}}
        (found,) = self.warned(tmp_path, norm.to_psbn(Net()), optimizer)
        assert "set optim_wrapper.optimizer.weight_decay" in found

    @pytest.mark.parametrize("rules", [None, {"bias_decay_mult": 0, "norm_decay_mult": 0.5}])
    def test_nothing_is_said_where_beta_is_decayed(self, rules, tmp_path):
        optim_wrapper = {"paramwise_cfg": rules} if rules else {}
        assert self.warned(tmp_path, norm.to_psbn(Net()), optim_wrapper) == []

    def test_nothing_is_said_of_bn_or_of_frozen_layers(self):
        frozen = norm.to_psbn(Net())
        for parameter in frozen.parameters():
            parameter.requires_grad_(parameter is frozen.bn1.beta)
        optimizer = torch.optim.SGD(frozen.parameters(), 0.1)  # as mmengine's, frozen ones too
        assert undecayed_betas(frozen, optimizer) == ["bn1.beta"]
        bn = Net()
        assert undecayed_betas(bn, torch.optim.SGD(bn.parameters(), 0.1)) == []

    def test_the_longest_custom_key_rules_as_in_mmengine(self):
        keys = {"bn": {"decay_mult": 0}, "block.bn1": {"decay_mult": 0}}
        cfg = {"optimizer": {"weight_decay": 1}, "paramwise_cfg": {"custom_keys": keys}}
        assert "custom_keys['block.bn1']" in responsible_key("block.bn1.beta", cfg)
        assert "custom_keys['bn']" in responsible_key("bn1.beta", cfg)

    def test_a_zero_initialised_layer_is_said_to_be_none_at_step_0_only(self, tmp_path):
        net = Net()
        nn.init.zeros_(net.block.bn2.weight)
        assert list(hooks._zero_gamma_warnings(net, 1)) == []
        (text,) = hooks._zero_gamma_warnings(net, 0)
        assert text.startswith("1 layers (as block.bn2) start with gamma = 0")
        assert list(hooks._zero_gamma_warnings(collapse_by_hand(Net()), 0)) == []


class TestBadInput:
    @pytest.mark.parametrize("interval", [0, -1, 1.5, True, "10"])
    def test_interval(self, interval):
        with pytest.raises(ValueError, match="interval must be a whole number"):
            SparsityLoggerHook(interval)

    def test_threshold(self):
        with pytest.raises(ValueError, match="must not be negative"):
            SparsityLoggerHook(threshold=-1)

    def test_a_model_without_layers_is_said_before_training(self, tmp_path):
        net = nn.Sequential(nn.Conv2d(3, 5, 6), nn.Flatten())
        runner = make_runner(tmp_path, [SparsityLoggerHook()], net)
        with pytest.raises(ValueError, match="no normalization layer"):
            runner.train()


def _train_distributed(rank, work_dir):
    os.environ["LOCAL_RANK"] = str(rank)  # as a launcher does
    model = VARIANTS["psSyncBN"](collapse_by_hand(Net()))
    runner = make_runner(
        work_dir,
        [SparsityLoggerHook(1, figures=False)],
        model,
        iterations=2,
        launcher="pytorch",
    )
    runner.train()
    return rank, "train/collapsed_percent" in runner.message_hub.log_scalars


@pytest.mark.slow
def test_two_processes_leave_one_trace(tmp_path):
    (tmp_path / "ranks").mkdir()
    found = distributed.run(_train_distributed, 2, tmp_path / "ranks", str(tmp_path / "run"))
    assert found == [(0, True), (1, False)]
    assert trace.read(tmp_path / "run" / "collapse.trace").iterations.tolist() == [0, 1, 2]
