"""One run: the schedule, checkpoints, resuming to the bit, what is measured."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from torch import nn
from torch.nn import functional as F

from psbn_mmdet import to_bn
from psbn_mmdet.collapse import probe
from psbn_mmdet.collapse.trace import read
from studies.cifar import data, rounds
from studies.cifar.data import Batches, normalise
from studies.cifar.rounds import make_runner, study_data, train_run
from studies.cifar.settings import Settings
from studies.runs import RunError
from tests.helpers.cifar_files import write_cifar

TOY = Settings(
    width=0.25, images=100, test_images=100, batch_size=20, rounds=2, epochs=1, norm="psBN"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


def weights(folder, number):
    return torch.load(Path(folder, f"round_{number}.pth"), weights_only=True)["state_dict"]


class Watch(Hook):
    """Learning rate, loss and number of momenta at each iteration; stops the run at one."""

    priority = "LOWEST"

    def __init__(self, stop_after=None):
        self.stop_after, self.lr, self.loss, self.momenta = stop_after, [], [], []

    def before_train_iter(self, runner, *args, **kwargs):
        self.lr.append(runner.optim_wrapper.get_lr()["lr"][0])
        self.momenta.append(len(runner.optim_wrapper.optimizer.state))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.loss.append(outputs["loss"].item())
        if runner.iter + 1 == self.stop_after:
            raise InterruptedError


def train(settings, root, folder, stop_after=None, checkpoint_seconds=0.0):
    watch = Watch(stop_after)
    splits = study_data(settings, root)
    runner = make_runner(
        settings, *splits, folder, checkpoint_seconds=checkpoint_seconds, hooks=(watch,)
    )
    if stop_after:
        with pytest.raises(InterruptedError):
            runner.train()
    else:
        runner.train()
    return watch, next(h for h in runner.hooks if isinstance(h, rounds.RoundsHook))


def test_same_as_a_bare_loop(root, tmp_path):
    """Weights after two rounds, against torch's own calls and the cosine written out."""
    watch, _ = train(TOY, root, tmp_path / "run")
    torch.manual_seed(TOY.seed)
    network = TOY.network_module().to(memory_format=torch.channels_last)
    split, _ = study_data(TOY, root)
    batches = Batches(split, 20, 10, TOY.seed)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4)
    expected_lr, losses = [], []
    for i in range(10):
        expected_lr.append(0.1 * (1 + math.cos(math.pi * (i % 5) / 5)) / 2)
        optimizer.param_groups[0]["lr"] = watch.lr[i]
        batch = batches[i]
        x = batch["inputs"].contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(x), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert watch.lr == pytest.approx(expected_lr, rel=1e-9)
    assert watch.loss == losses
    saved = weights(tmp_path / "run", 2)
    for key, value in network.state_dict().items():
        assert torch.equal(saved[f"network.{key}"], value), key


@pytest.mark.parametrize(
    "stop_after", [7, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 4, 5))]
)
def test_killed_and_resumed_is_equal_to_the_bit(root, tmp_path, stop_after):
    """In the second round, the first, just before and at its end; with a trace and a shuffle."""
    settings = replace(TOY, trace_interval=2, shuffle_before=2)
    _, whole = train(settings, root, tmp_path / "whole")
    train(settings, root, tmp_path / "cut", stop_after)
    _, resumed = train(settings, root, tmp_path / "cut")
    for number in (1, 2):
        a, b = weights(tmp_path / "whole", number), weights(tmp_path / "cut", number)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert resumed.rounds == whole.rounds
    a, b = (read(tmp_path / name / "collapse.trace") for name in ("whole", "cut"))
    assert a.iterations.tolist() == b.iterations.tolist() == [0, 2, 4, 6, 8, 10]
    assert (a.gamma == b.gamma).all()
    assert (a.bias == b.bias).all()


@pytest.fixture
def _bfloat16_or_as_if(monkeypatch):
    """torch emulates bfloat16 where the processor has none."""
    monkeypatch.setattr("psbn_mmdet.launch.amp.cpu_has_bfloat16", lambda: True)


@pytest.mark.usefixtures("_bfloat16_or_as_if")
def test_amp_computes_in_bfloat16_and_keeps_everything_else_in_float32(root, tmp_path):
    """The first loss is torch's own autocast; killed and resumed it is equal to the bit."""
    settings = replace(TOY, amp=True, image_size=16)
    watch, whole = train(settings, root, tmp_path / "whole")
    torch.manual_seed(settings.seed)
    network = settings.network_module().to(memory_format=torch.channels_last)
    seen = []
    network.layer1[0].conv1.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    batch = Batches(study_data(settings, root)[0], 20, 10, settings.seed)[0]
    assert batch["inputs"].shape == (20, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(batch["inputs"].contiguous(memory_format=torch.channels_last))
    assert watch.loss[0] == F.cross_entropy(logits.float(), batch["labels"]).item()
    assert seen == [torch.bfloat16]
    floats, _ = train(replace(settings, amp=False), root, tmp_path / "float32")
    assert floats.loss != watch.loss
    assert floats.loss[0] == pytest.approx(watch.loss[0], rel=0.02)  # 8 bits of mantissa

    train(settings, root, tmp_path / "cut", stop_after=7)
    _, resumed = train(settings, root, tmp_path / "cut")
    assert resumed.rounds == whole.rounds
    a, b = (torch.load(tmp_path / n / "round_2.pth", weights_only=True) for n in ("whole", "cut"))
    momenta = [s["momentum_buffer"] for s in a["optimizer"]["state"].values()]
    tensors = [v for v in a["state_dict"].values() if v.is_floating_point()] + momenta
    assert {t.dtype for t in tensors} == {torch.float32}
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])


def test_amp_without_bfloat16_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr("psbn_mmdet.launch.amp.cpu_has_bfloat16", lambda: False)
    settings = replace(TOY, amp=True)
    with pytest.raises(RunError, match=r"does not compute in bfloat16 .* say --set amp=False"):
        train_run(settings, tmp_path, root)


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_costs_only_that(root, tmp_path):
    _, whole = train(TOY, root, tmp_path / "whole")
    train(TOY, root, tmp_path / "cut", 7)
    (tmp_path / "cut" / "last.pth.new").write_bytes(b"half")
    _, resumed = train(TOY, root, tmp_path / "cut")
    assert resumed.rounds == whole.rounds


@pytest.mark.slow
def test_rounds_are_measured(root, tmp_path):
    settings = replace(TOY, epochs=2, evaluate_pruned=True, ensemble=2)
    result = train_run(settings, tmp_path / "run", root)
    assert [row["round"] for row in result["rounds"]] == [1, 2]
    network = settings.network_module()
    _, test = study_data(settings, root)
    average = 0
    for row in result["rounds"]:
        state = weights(tmp_path / "run", row["round"])
        network.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
        network.eval()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
        with torch.no_grad():
            scores = network((test.images.float() - mean) / std).softmax(1)
        average = average + scores / 2
        assert row["accuracy"] == pytest.approx(percent(scores, test.labels), abs=1)
        assert len(row["epoch_losses"]) == 2
        assert row["train_loss"] == row["epoch_losses"][-1]
        assert row["filters"] == 172  # 4 + 6 * (4 + 8 + 16)
        assert row["sparsity"] == row["collapsed"] == 0
        assert row["pruned_accuracy"] == row["accuracy"]
    assert result["ensemble_accuracy"] == pytest.approx(percent(average, test.labels), abs=1)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


def percent(scores, labels):
    return 100 * float((scores.argmax(1) == labels).float().mean())


@pytest.mark.slow
def test_epoch_losses_are_means_over_the_epoch(root, tmp_path):
    watch, hook = train(replace(TOY, epochs=2), root, tmp_path / "run")
    expected = [sum(watch.loss[i : i + 5]) / 5 for i in range(0, 20, 5)]
    found = [loss for row in hook.rounds for loss in row["epoch_losses"]]
    assert found == pytest.approx(expected, rel=1e-12)


def test_collapse_is_seen_and_pruned_accuracy_leaves_the_network_as_it_was(root):
    torch.manual_seed(0)
    network = TOY.network_module()
    _, test = study_data(TOY, root)
    network.layer1[0].bn1.weight.data[:2] = 9e-4
    network.layer1[0].bn1.beta.data[:2] = -0.2
    before = {k: v.clone() for k, v in network.state_dict().items()}
    found = rounds.collapse_of(network, test)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert found["collapsed"] == pytest.approx(100 * 2 / 172)
    twin = to_bn(deepcopy(network)).eval()
    F.cross_entropy(twin(normalise(test.images)), test.labels).backward()
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    grads = torch.cat([torch.maximum(m.weight.grad.abs(), m.bias.grad.abs()) for m in norms])
    assert grads[grads > 0].min() > 1e-6 * grads.max()  # none near the limit
    assert found["stuck"] == pytest.approx(100 * (grads == 0).double().mean().item())
    assert (twin.layer1[0].bn1.weight.grad[:2] == 0).all()
    # Half of the 4 filters of one convolution, and half of the inputs of the next.
    macs_of_two = 2 * 4 * 4 * 9 * 32**2
    total = probe(network, {}, (3, 32, 32)).total
    assert found["sparsity"] == pytest.approx(100 * (macs_of_two / 2) / total)
    rounds.pruned_accuracy(network, test)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_shuffle_keeps_the_entries_of_each_tensor():
    network = TOY.network_module()
    before = {k: v.clone() for k, v in network.named_parameters()}
    rounds.shuffle_parameters(network, 0)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values)
    assert not torch.equal(network.conv1.weight, before["conv1.weight"])


def test_momentum_is_kept_over_a_restart_but_not_over_a_shuffle(root, tmp_path):
    kept, _ = train(TOY, root, tmp_path / "kept")
    shuffled, _ = train(replace(TOY, shuffle_before=2), root, tmp_path / "shuffled")
    parameters = len(list(TOY.network_module().parameters()))
    assert kept.momenta == [0] + [parameters] * 9
    assert shuffled.momenta == [0] + [parameters] * 4 + [0] + [parameters] * 4
    assert shuffled.loss[:5] == kept.loss[:5]
    assert shuffled.loss[5] != kept.loss[5]


@pytest.mark.slow
def test_child_goes_on_from_its_parent(root, tmp_path):
    parent = replace(TOY, norm="BN")
    train_run(parent, tmp_path / "bn", root)
    for load_bn, shift in (("preserve", 0.0), ("shift", 0.1)):
        child = replace(TOY, parent="bn", load_bn=load_bn, trace_interval=100)
        train_run(child, tmp_path / load_bn, root)
        start = read(tmp_path / load_bn / "collapse.trace").bias[0]
        state = weights(tmp_path / "bn", 2)
        bias = torch.cat([v for k, v in state.items() if "bn" in k and k.endswith("bias")])
        torch.testing.assert_close(torch.tensor(start), bias + shift)


def test_child_waits_for_its_parent(root, tmp_path):
    with pytest.raises(RunError, match="is not finished, and this run starts from its weights"):
        train_run(replace(TOY, parent="bn"), tmp_path / "child", root)


@pytest.mark.slow
def test_parent_of_another_shape_is_refused(root, tmp_path):
    train_run(replace(TOY, rounds=1), tmp_path / "parent", root)
    with pytest.raises(RunError, match="tensors cannot be loaded"):
        train_run(replace(TOY, width=0.5, parent="parent"), tmp_path / "child", root)


@pytest.mark.slow
def test_finished_run_is_not_done_again(root, tmp_path):
    settings = replace(TOY, rounds=1)
    first = train_run(settings, tmp_path / "run", root)
    stamp = (tmp_path / "run" / "round_1.pth").stat().st_mtime_ns
    assert train_run(settings, tmp_path / "run", root) == first
    assert (tmp_path / "run" / "round_1.pth").stat().st_mtime_ns == stamp


def test_folder_of_other_settings_is_refused(root, tmp_path):
    rounds.check_settings(TOY, tmp_path / "run")
    before = (tmp_path / "run" / "settings.json").read_text()
    with pytest.raises(RunError, match=r"\(1 differ, as lr: 0.1 there, 0.3 now\)"):
        train_run(replace(TOY, lr=0.3), tmp_path / "run", root)
    assert (tmp_path / "run" / "settings.json").read_text() == before


def test_folder_from_before_a_setting_was_added_is_still_that_run(tmp_path):
    rounds.check_settings(TOY, tmp_path)
    path = tmp_path / "settings.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("amp", "image_size")}
    path.write_text(json.dumps(old))
    rounds.check_settings(TOY, tmp_path)
    with pytest.raises(RunError, match="as image_size: 32 there, 16 now"):
        rounds.check_settings(replace(TOY, image_size=16), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(network="resnet18"), "network must be one of resnet20"),
        (dict(norm="GN"), "norm must be one of BN, psBN, IN, psIN, none, got 'GN'"),
        (dict(act="GELU"), "act must be one of"),
        (dict(optimizer="Lion"), "optimizer must be one of SGD, Adam"),
        (dict(lr=0), "lr must be positive"),
        (dict(image_size=20), "image_size must be 8, 16 or 32, got 20"),
        (dict(network="vgg11", image_size=16), "image_size must be 32"),
        (dict(rounds=2, ensemble=3), "an ensemble of 3 needs as many rounds: 2"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(RunError, match=message):
        Settings(**change)


def test_random_labels_differ_from_the_true_ones_and_stay(root):
    true, _ = study_data(TOY, root)
    one, test = study_data(replace(TOY, random_labels=True), root)
    two, _ = study_data(replace(TOY, random_labels=True, seed=3), root)
    assert torch.equal(one.images, true.images)
    assert not torch.equal(one.labels, true.labels)
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(test.labels, study_data(TOY, root)[1].labels)


def test_adam_is_adam(root, tmp_path):
    settings = replace(TOY, optimizer="Adam", lr=1e-3)
    runner = make_runner(settings, *study_data(settings, root), tmp_path)
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert type(wrapper.optimizer) is torch.optim.Adam
    assert wrapper.optimizer.defaults["weight_decay"] == 5e-4


def test_without_norm_decay_gamma_and_beta_alone_do_not_decay(root, tmp_path):
    settings = replace(TOY, norm_decay=False)
    runner = make_runner(settings, *study_data(settings, root), tmp_path)
    optimizer = runner.build_optim_wrapper(runner.optim_wrapper).optimizer
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    network = runner.model.network
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    spared = {id(p) for norm in norms for p in norm.parameters()}
    assert len(spared) == 2 * len(norms) > 0
    for parameter in network.parameters():
        wanted = 0 if id(parameter) in spared else settings.weight_decay
        assert decays[id(parameter)] == wanted


@pytest.mark.parametrize("lift", ["collapsed", "every"])
def test_gamma_is_lifted_before_the_first_step(root, tmp_path, lift):
    """By hand: 1e-4 becomes 0.1, or 0.6e-4 + 0.1; 0.5 stays, or becomes 0.3 + 0.1."""
    train_run(replace(TOY, norm="BN"), tmp_path / "bn", root)
    path = tmp_path / "bn" / "round_2.pth"
    checkpoint = torch.load(path, weights_only=False)
    name = next(key for key in checkpoint["state_dict"] if key.endswith("bn1.weight"))
    gamma = checkpoint["state_dict"][name]
    gamma[0], gamma[1] = 1e-4, 0.5
    torch.save(checkpoint, path)
    settings = replace(TOY, norm="BN", parent="bn", lift=lift, lr=1e-6)
    train_run(settings, tmp_path / "lifted", root)
    after = weights(tmp_path / "lifted", 1)[name]
    wanted = [0.1, 0.5] if lift == "collapsed" else [0.10006, 0.4]
    assert after[:2].tolist() == pytest.approx(wanted, abs=1e-4)


def test_filters_are_revived_before_each_round_and_a_killed_run_goes_on_to_the_bit(root, tmp_path):
    """Collapsed by hand in the parent; the child's first step finds them with weights again."""
    train_run(replace(TOY, norm="BN"), tmp_path / "bn", root)
    path = tmp_path / "bn" / "round_2.pth"
    checkpoint = torch.load(path, weights_only=False)
    state = checkpoint["state_dict"]
    name = next(key for key in state if key.endswith("bn1.weight") and "layer" in key)
    for key in (name, name.replace("weight", "bias")):
        state[key][:2] = 0
    torch.save(checkpoint, path)
    settings = replace(TOY, norm="BN", parent="bn", revive=True, trace_interval=1)
    train_run(settings, tmp_path / "revived", root)
    before = read(tmp_path / "revived" / "collapse.trace").gamma[0]  # before the first round
    assert (np.abs(before) < 1e-3).sum() >= 2
    after = weights(tmp_path / "revived", 1)[name]
    assert (after[:2].abs() > 1e-3).all()
    train(settings, root, tmp_path / "cut", stop_after=settings.iterations - 1)
    train(settings, root, tmp_path / "cut")
    one, other = (weights(tmp_path / folder, settings.rounds) for folder in ("revived", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)
