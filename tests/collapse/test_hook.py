"""SparsityLoggerHook: on a real Runner, killed and resumed, and against the truth made by hand."""

import errno
import io
import json
import math
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
from psbn_mmdet.collapse import measure, trace
from psbn_mmdet.collapse.hook import SparsityLoggerHook
from psbn_mmdet.decay.hook import AnchoredBiasDecay
from psbn_mmdet.norm.hook import decay_warnings, responsible_key
from tests.helpers import distributed
from tests.helpers.collapsed_net import CONSTANT, DEAD, VARIANTS, Net, collapse_by_hand
from tests.helpers.disk import files_no_larger_than
from tests.helpers.paths import ROOT
from tests.helpers.toy_runner import make_runner, program

STANDSTILL = {"type": "SGD", "lr": 0.0, "weight_decay": 1e-2}


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
        assert np.isfinite(got.norm).all()
        assert not got.does[0].any()  # before the first iteration there is no pass to measure by
        assert got.does[1:].all()
        final = measure(make_runner(tmp_path / "b", [], iterations=1).model)
        assert [layer.name for layer in final.layers] == [layer.name for layer in got.layers]

    def test_a_log_line_shows_what_was_measured_in_its_own_iteration(self, tmp_path):
        class Collapse(Hook):
            priority = "VERY_HIGH"

            def after_train_iter(self, runner, *args, **kwargs):
                runner.model.net.bn1.weight.data[: runner.iter + 1] = 0  # one more each

        net = norm.to_psbn(Net())
        hook_list = [SparsityLoggerHook(1, figures=False), Collapse()]
        make_runner(tmp_path, hook_list, net, iterations=4).train()
        lines = [x for x in log_of(tmp_path).splitlines() if "collapse at iteration" in x]
        assert [re.search(r"iteration (\d): ([.\d]+)%", x).groups() for x in lines] == [
            (str(n), f"{100 * n / 28:.2f}") for n in range(5)
        ]

    def test_by_epoch(self, tmp_path):
        make_runner(
            tmp_path, [SparsityLoggerHook(2, by_epoch=True, figures=False)], epochs=5
        ).train()
        # 16 samples in batches of 4
        assert trace.read(tmp_path / "collapse.trace").iterations.tolist() == [0, 8, 16, 20]

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
    return {(row["name"]).removeprefix("net."): row["collapsed_filters"] for row in rows}


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "Sync" not in v])
def test_the_hook_records_exactly_the_filters_collapsed_by_hand(variant, tmp_path):
    found = everywhere(VARIANTS[variant](collapse_by_hand(Net())), tmp_path)
    assert found == {name: sorted(DEAD[name] + CONSTANT[name]) for name in DEAD}


def test_sync_bn_is_recorded_alike(tmp_path):
    # A non-distributed Runner turns SyncBN into BN, so the hook's parts are used directly.
    for i, variant in enumerate(("SyncBN", "psSyncBN")):
        model = VARIANTS[variant](collapse_by_hand(Net()))
        folder = tmp_path / str(i)
        folder.mkdir()
        gamma, bias = collapse.gather(collapse.norm_modules(model).values())
        trace.Writer(folder, measure(model), 0).write(0, gamma, bias, gamma, gamma.byte())
        rows = trace.read(folder).report().rows
        want = [sorted(DEAD[name] + CONSTANT[name]) for name in DEAD]
        assert [row["collapsed_filters"] for row in rows] == want


class TestResume:
    def killed(self, work_dir, kill_at):
        code = (
            f"from tests.helpers.toy_runner import program; program({str(work_dir)!r}, {kill_at})"
        )
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            timeout=120,
        ).returncode

    @pytest.fixture(autouse=True)
    def one_thread(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.mark.slow
    def test_a_run_killed_and_resumed_has_the_trace_of_an_uninterrupted_one(self, tmp_path):
        program(tmp_path / "whole")
        # The last checkpoint is of iteration 8; 10 is recorded and a torn record follows.
        assert self.killed(tmp_path / "killed", kill_at=11) == -signal.SIGKILL
        torn = trace.read(tmp_path / "killed" / "collapse.trace")
        assert torn.iterations.tolist() == [0, 2, 4, 6, 8, 10]
        program(tmp_path / "killed", resume=True)
        whole = trace.read(tmp_path / "whole" / "collapse.trace")
        again = trace.read(tmp_path / "killed" / "collapse.trace")
        assert again.iterations.tolist() == whole.iterations.tolist() == [0, 2, 4, 6, 8, 10, 12]
        # Up to the checkpoint to the bit; then mmengine's sampler goes on as it does.
        assert np.array_equal(again.gamma[:5], whole.gamma[:5])
        assert np.array_equal(again.bias[:5], whole.bias[:5])
        assert np.array_equal(again.does[:5], whole.does[:5])


def rows_of(work_dir):
    """iteration -> what the hook logged, from mmengine's own backend."""
    rows = [json.loads(x) for p in work_dir.glob("*/vis_data/scalars.json") for x in p.open()]
    return {row["iter"]: row for row in rows if "collapse/not_finite" in row}


def local(work_dir):
    """A visualizer of mmengine that writes a file; Runner changes the dict."""
    backends = [{"type": "LocalVisBackend"}]
    return {"type": "Visualizer", "vis_backends": backends, "name": str(work_dir)}


class Damage(Hook):
    """Change gamma of the first layer after some iterations."""

    priority = "VERY_HIGH"

    def __init__(self, at, value):
        self.at, self.value = at, value

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.at:
            self.change(runner.model.net)

    def change(self, net):
        net.bn1.weight.data[:] = self.value


class TestAveragedWeights:
    def test_both_are_measured_each_under_its_name(self, tmp_path):
        # Registered behind the hook; the averaged gamma moves by a hundredth at a time.
        averaging = {"type": "EMAHook", "momentum": 0.01}
        hook_list = [SparsityLoggerHook(4, figures=False), averaging, Damage(8, 0)]
        runner = make_runner(tmp_path, hook_list, visualizer=local(tmp_path))
        runner.train()
        rows = rows_of(tmp_path)
        for at in (4, 8, 12):
            saved = torch.load(tmp_path / f"iter_{at}.pth", weights_only=False)
            evaluated = measure(saved["state_dict"]).totals
            trained = measure({k.removeprefix("module."): v
                               for k, v in saved["ema_state_dict"].items()}).totals  # fmt: skip
            for name in ("collapsed_percent",):
                assert rows[at][f"collapse/{name}"] == pytest.approx(trained[name])
                assert rows[at][f"collapse/ema_{name}"] == pytest.approx(evaluated[name])
        assert rows[8]["collapse/collapsed_percent"] == pytest.approx(100 * 8 / 28)
        assert rows[8]["collapse/ema_collapsed_percent"] == 0
        text = log_of(tmp_path)
        assert "which are evaluated and saved" in text
        assert "averaged weights: 0.00% of 28 filters collapsed" in text

    def test_without_averaging_nothing_of_it_is_said(self, tmp_path):
        runner = make_runner(
            tmp_path, [SparsityLoggerHook(figures=False)], iterations=1,
            visualizer=local(tmp_path),
        )  # fmt: skip
        runner.train()
        assert not [name for name in rows_of(tmp_path)[1] if "ema" in name]
        assert "averaged" not in log_of(tmp_path)


class TestLoud:
    def test_values_that_are_not_finite_are_never_zero_percent(self, tmp_path):
        hook_list = [SparsityLoggerHook(1, figures=False), Damage(2, math.nan)]
        runner = make_runner(tmp_path, hook_list, iterations=4, visualizer=local(tmp_path))
        runner.train()
        rows = rows_of(tmp_path)
        assert [rows[i]["collapse/not_finite"] for i in range(3)] == [0, 0, 8]
        # One step of training carries it to all other layers.
        assert rows[3]["collapse/not_finite"] == 28
        assert "collapse/collapsed_percent" not in rows[3]
        for path in tmp_path.glob("*/vis_data/scalars.json"):
            for line in path.open():  # LoggerHook's own loss is NaN, ours never
                ours = [x for x in line.split(",") if "collapse/" in x]
                assert not [x for x in ours if "NaN" in x]
        text = log_of(tmp_path)
        warnings = [x for x in text.splitlines() if "not finite: the training has diverged" in x]
        assert len(warnings) == 1
        assert "WARNING" in warnings[0]
        assert "at iteration 2 8 of 28 filters (the first in net.bn1)" in warnings[0]
        assert "iteration 3: none of 28 filters has a finite gamma and bias" in text

    @pytest.mark.parametrize("how", ["psBN", "AnchoredBiasDecay"])
    def test_an_alpha_that_makes_the_network_linear(self, how, tmp_path):
        # P(active) = Phi((beta + alpha) / |gamma|)
        # Phi(0.1 / 0.06) = 0.952, Phi(0.1 / 0.061) = 0.949
        found = {}
        for gamma in (0.061, 0.06):
            net, more = Net(), [AnchoredBiasDecay(0.1)]
            if how == "psBN":
                net, more = norm.to_psbn(net, shift=True), []
            for layer in (net.bn1, net.block.bn1):  # those that a ReLU follows
                nn.init.constant_(layer.weight, gamma)
                nn.init.zeros_(layer.beta if how == "psBN" else layer.bias)
            work_dir = tmp_path / str(gamma)
            make_runner(
                work_dir, [SparsityLoggerHook(1, figures=False), *more], net, iterations=2,
                visualizer=local(work_dir), optim_wrapper={"optimizer": STANDSTILL},
            ).train()  # fmt: skip
            lines = log_of(work_dir).splitlines()
            found[gamma] = (
                rows_of(work_dir)[2]["collapse/nearly_linear_layers"],
                [x for x in lines if "WARNING" in x and "nearly linear" in x],
            )
        assert found[0.061] == (0, [])
        layers, (warning,) = found[0.06]  # once, not at each measurement
        assert layers == 2
        assert "at iteration 0: 2 layers (e.g. net.bn1) are nearly linear" in warning

    def test_flops_that_cannot_be_counted_end_no_training(self, tmp_path):
        runner = make_runner(tmp_path, [SparsityLoggerHook(figures=False, input_size=(4, 6, 6))])
        runner.train()
        assert runner.iter == 12
        lines = [x for x in log_of(tmp_path).splitlines() if "no FLOPs of the collapsed" in x]
        assert len(lines) == 1
        assert "cannot be called with an input of size (4, 6, 6)" in lines[0]
        assert trace.read(tmp_path).iterations.tolist() == [0, 12]


class TestDisk:
    """What the trace itself does is in test_trace.py; here, that the training goes on."""

    def test_a_page_that_does_not_fit_ends_no_training(self, tmp_path):
        runner = make_runner(tmp_path, [SparsityLoggerHook(4)])
        with files_no_larger_than(1_000_000):  # enough for the figures; plotly alone is larger
            runner.train()
        assert runner.iter == 12
        assert "no figures of the collapsed filters: " in log_of(tmp_path)
        assert "collapse.html: cannot be written (File too large)" in log_of(tmp_path)

    def trained(self, work_dir, *hook_list):
        runner = make_runner(work_dir, [SparsityLoggerHook(1, figures=False), *hook_list])
        runner.train()
        assert runner.iter == 12
        lines = log_of(work_dir).splitlines()
        return [x for x in lines if "WARNING" in x and " trac" in x.replace("collapse.", " ")]

    def test_a_files_no_larger_than(self, tmp_path, monkeypatch):
        class SmallDisk(io.FileIO):
            def write(self, content):
                if self.tell() >= 2500:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(content[: 2500 - self.tell()])

        monkeypatch.setattr(trace, "open", lambda *args, **_: SmallDisk(*args[:2]), raising=False)
        (warning,) = self.trained(tmp_path)
        assert "the trace misses a record" in warning
        assert "No space left on device" in warning
        written = trace.read(tmp_path).iterations.tolist()
        assert 1 < len(written) < 13
        assert written == list(range(len(written)))

    def test_a_file_that_cannot_be_opened(self, tmp_path, monkeypatch):
        def closed(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(trace, "open", closed, raising=False)
        (warning,) = self.trained(tmp_path)
        assert "no trace of the filters in this run" in warning

    def test_another_run_on_the_same_file(self, tmp_path):
        class Other(Hook):
            priority = "LOWEST"

            def after_train_iter(self, runner, *args, **kwargs):
                if runner.iter + 1 == 5:  # as on a file system without locks
                    writer = trace.Writer(runner.work_dir, measure(runner.model), 5)
                    gamma, bias = collapse.gather(collapse.norm_modules(runner.model).values())
                    writer.write(6, gamma, bias, gamma, gamma.byte())

        (warning,) = self.trained(tmp_path, Other())
        assert "are two runs going on in one work dir" in warning
        assert trace.read(tmp_path).iterations.tolist() == [0, 1, 2, 3, 4, 5, 6]

    def test_a_second_run_leaves_the_first_ones_file_alone(self, tmp_path):
        self.trained(tmp_path)
        content = (tmp_path / "collapse.trace").read_bytes()
        self.trained(tmp_path)
        assert (tmp_path / "collapse.trace").read_bytes() == content
        assert len(trace.files_of(tmp_path)) == 2


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
        assert f"beta of {3 if 'block' in key else 4} psBN layers" in found[0]

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
        (warning,) = decay_warnings(frozen, [optimizer], {})
        assert "beta of 1 psBN layers (e.g. bn1.beta)" in warning
        bn = Net()
        assert not [*decay_warnings(bn, [torch.optim.SGD(bn.parameters(), 0.1)], {})]

    def test_the_longest_custom_key_rules_as_in_mmengine(self):
        keys = {"bn": {"decay_mult": 0}, "block.bn1": {"decay_mult": 0}}
        cfg = {"optimizer": {"weight_decay": 1}, "paramwise_cfg": {"custom_keys": keys}}
        assert "custom_keys['block.bn1']" in responsible_key("block.bn1.beta", cfg)
        assert "custom_keys['bn']" in responsible_key("bn1.beta", cfg)


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
    logged = []
    runner.visualizer.add_scalars = lambda scalars, **_: logged.extend(scalars)
    runner.train()
    return rank, "collapse/collapsed_percent" in logged


@pytest.mark.slow
def test_two_processes_leave_one_trace(tmp_path):
    (tmp_path / "ranks").mkdir()
    found = distributed.run(_train_distributed, 2, tmp_path / "ranks", str(tmp_path / "run"))
    assert found == [(0, True), (1, False)]
    assert trace.read(tmp_path / "run" / "collapse.trace").iterations.tolist() == [0, 1, 2]
