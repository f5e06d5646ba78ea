"""ReviveFilters in trainings of mmengine."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.data import DataLoader

from psbn_mmdet import to_psbn
from psbn_mmdet.collapse import norm_modules
from psbn_mmdet.collapse.revive_hook import ReviveFilters
from psbn_mmdet.collapse.reviving import ReviveError
from psbn_mmdet.norm.hook import PsBNHook
from tests.helpers.distributed import run
from tests.helpers.strippable import chain, kill_at_random, with_statistics
from tests.helpers.toy_runner import Noise, Toy, make_runner


def dead_chain():
    torch.manual_seed(0)
    net = with_statistics(chain())
    kill_at_random(net)
    return net.train()


def collapsed(net):
    return sum(int((norm.weight.abs() < 1e-3).sum()) for norm in norm_modules(net).values())


def outputs(net, x):
    mode = net.training
    with torch.no_grad():
        y = net.eval()(x)
    net.train(mode)
    return y


class Watch(ReviveFilters):
    """Takes down the epoch and how many filters are collapsed after each time."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def _revive(self, runner):
        super()._revive(runner)
        self.seen.append((runner.epoch, collapsed(runner.model)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [0]), ({"interval": 2}, [0, 2]), ({"epochs": [1, 3]}, [0, 1, 3])],
)
def test_at_the_start_and_when_it_is_told(tmp_path, options, expected):
    hook = Watch(**options)
    make_runner(tmp_path, [hook], net=dead_chain(), epochs=4).train()
    assert [epoch for epoch, _ in hook.seen] == expected
    assert all(left == 0 for _, left in hook.seen)


def test_not_after_a_resume():
    """A resumed Runner starts at the iteration and epoch that it had reached."""
    runner = FakeRunner(Toy(dead_chain()))
    runner.iter, runner.epoch = 4, 1
    hook = Watch(epochs=[2])
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    assert not hook.seen and collapsed(runner.model) > 0
    runner.epoch = 2
    hook.before_train_epoch(runner)
    assert hook.seen == [(2, 0)]


def test_by_its_name_in_a_config(tmp_path):
    net = dead_chain()
    make_runner(tmp_path, [{"type": "ReviveFilters"}], net=net, iterations=4).train()
    assert collapsed(net) == 0


def test_the_order_of_the_images_is_not_touched(tmp_path):
    """With and without: the training sees the same batches, by the random numbers it draws."""
    seen = []
    for number, hooks in enumerate(([], [ReviveFilters()])):
        runner = make_runner(tmp_path / str(number), hooks, net=dead_chain(), iterations=4)
        labels = []
        forward = runner.model.forward

        def noted(*args, of=runner.model, into=labels, call=forward, **kwargs):
            if of.training and kwargs["mode"] == "loss":
                into.append(torch.stack(kwargs["labels"]).tolist())
            return call(*args, **kwargs)

        runner.model.forward = noted
        runner.train()
        seen.append(labels)
    assert seen[0] == seen[1][-4:]


class FakeRunner:
    """What the hook reads of a Runner."""

    def __init__(self, model, dataset=None, hooks=()):
        self.model, self.iter, self.epoch, self.hooks = model, 0, 0, list(hooks)
        self.logger = logging.getLogger("test of the hook")
        self.train_dataloader = DataLoader(
            dataset or Noise(), batch_size=2, collate_fn=lambda each: {
                "inputs": torch.stack([e["inputs"] for e in each]),
                "labels": [e["labels"] for e in each],
            },
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        self.optim_wrapper = OptimWrapper(optimizer)


def test_the_optimizer_forgets_what_changed_and_the_average_takes_it_over():
    net = dead_chain()
    average = EMAHook()
    runner = FakeRunner(Toy(net), hooks=[average])
    average.before_run(SimpleNamespace(model=runner.model))
    for value in average.ema_model.module.parameters():
        value.data.add_(1)
    optimizer = runner.optim_wrapper.optimizer
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = copy.deepcopy(dict(net.named_parameters()))
    for norm in norm_modules(net).values():  # as they were before the step
        norm.weight.data[norm.weight.abs() < 0.05] = 0
    dead = {name: norm.weight == 0 for name, norm in norm_modules(net).items()}
    assert any(mask.any() for mask in dead.values())
    ReviveFilters().before_train(runner)
    theirs = dict(average.ema_model.module.net.named_parameters())
    for name, mask in dead.items():
        gamma = norm_modules(net)[name].weight
        state = optimizer.state[gamma]
        for key in ("exp_avg", "exp_avg_sq"):
            assert not state[key][mask & (gamma != 0)].any()
            assert state[key][~mask].all()
        revived = mask & (gamma != 0)
        assert revived.any()
        assert_close(theirs[f"{name}.weight"][revived], gamma[revived])
        old = before[f"{name}.weight"]
        assert not torch.isclose(theirs[f"{name}.weight"], old)[~mask].any()


def test_before_the_lift_by_alpha(tmp_path):
    """Dead filters are revived before shift gives them a constant to put out."""
    net = to_psbn(dead_chain())
    hooks = [PsBNHook(shift=True), ReviveFilters()]
    make_runner(tmp_path, hooks, net=net, iterations=1).train()
    assert collapsed(net) == 0


def test_wrong_options():
    for options in ({"interval": -1}, {"epochs": [0]}, {"images": 1}, {"interval": True}):
        with pytest.raises(ReviveError):
            ReviveFilters(**options)


def _train(rank):
    class Other(Noise):  # each rank has images of its own
        def __getitem__(self, index):
            return super().__getitem__(index + 100 * rank)

    net = dead_chain()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    before = outputs(net, x)
    model = DistributedDataParallel(Toy(net))
    runner = FakeRunner(model, Other())
    ReviveFilters().before_train(runner)
    assert_close(outputs(net, x), before)
    for _ in range(3):
        data = next(iter(runner.train_dataloader))
        runner.optim_wrapper.update_params(model(**data, mode="loss")["loss"])
    return collapsed(net), [p.detach() for p in net.parameters()]


def test_every_rank_revives_the_same(tmp_path):
    (left, weights), (left_1, weights_1) = run(_train, 2, tmp_path)
    assert left == left_1 == 0
    for a, b in zip(weights, weights_1, strict=True):
        assert torch.equal(a, b)


def _fail(rank):
    net = dead_chain()
    if rank == 0:
        net[0][1].weight.data[0] = torch.nan
    runner = FakeRunner(nn.Module.train(Toy(net)))
    try:
        ReviveFilters().before_train(runner)
    except ReviveError as error:
        return str(error)
    return None


def test_where_rank_0_fails_all_end(tmp_path):
    for said in run(_fail, 2, tmp_path):
        assert "not finite" in said
