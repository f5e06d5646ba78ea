"""What a checkpoint holds beside weights, so that a run that goes on from it is as if it had not
ended: the state of hooks, modules and transforms of any kind; and what it cannot hold is told."""

import random
from collections import deque

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, TRANSFORMS
from torch import nn

from psbn_mmdet.checkpoint import load
from psbn_mmdet.launch.seeding import own_generators, seed_own
from tests.helpers import noisy_training
from tests.helpers.forked import train
from tests.helpers.noisy_training import equal, last, make_config

# -- state in plain attributes ------------------------------------------------------------


class Threshold:
    """An object that is no module, as mmdet's assigners are."""

    def __init__(self):
        self.value = np.float64(0.5)


class Counting(nn.Module):
    """Keeps what decides on its output in attributes of every plain kind, from its first call."""

    def __init__(self):
        super().__init__()
        self.threshold = Threshold()
        self.objects = [Threshold(), Threshold()]
        self.count, self.flag, self.size, self.history = 0, False, None, []
        self.last, self.table = deque(maxlen=3), {"sum": 0.0}
        self.loose = torch.zeros(2)  # no buffer

    def forward(self, x):
        if self.training:
            self.count += 1
            self.flag = not self.flag
            self.size = (self.count, self.count + 1)
            self.history = [*self.history[-4:], float(x.detach().mean())]
            self.last.append(self.count)
            self.table["sum"] += self.history[-1]
            self.loose = self.loose + x.detach().mean()
            self.threshold.value = np.float64(np.mean(self.history))
            self.objects[1].value = self.threshold.value / 2
        assert self.size is None or isinstance(self.size, tuple)
        parts = [self.count, self.flag, sum(self.size or (0,)), sum(self.history), sum(self.last)]
        parts += [self.table["sum"], self.threshold.value, self.objects[1].value]
        return x * (1 + 0.01 * sum(map(float, parts)) + 0.01 * self.loose.sum())


@MODELS.register_module()
class CountingNet(noisy_training.DropoutNet):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(self.conv, Counting())


@HOOKS.register_module()
class Warming(Hook):
    """A learning rate by a number that only the hook knows, from validations and from steps."""

    def __init__(self):
        self.steps, self.scores = 0, [0.0]

    def after_val_epoch(self, runner, metrics=None):
        self.scores = [*self.scores, metrics["mean"]]

    def before_train_iter(self, runner, *args, **kwargs):
        self.steps += 1
        rate = 0.1 / (1 + self.steps) + 0.01 * abs(sum(self.scores))
        runner.optim_wrapper.param_groups[0]["lr"] = rate


@TRANSFORMS.register_module()
class OwnNoise:
    """Noise of generators that nobody else has, as albumentations 2 draws it."""

    def __init__(self):
        self.rng = np.random.default_rng()
        self.inner = {"a": [random.Random()], "b": np.random.RandomState()}
        self.torch = torch.Generator()

    def __call__(self, results):
        image = results["img"] + 0.5 * torch.randn(results["img"].shape, generator=self.torch)
        shift = self.rng.normal() + self.inner["a"][0].random() + self.inner["b"].uniform()
        return {**results, "img": (image + float(shift)).float()}


@TRANSFORMS.register_module()
class Cached:
    """Mixes in the image before, as CachedMixUp does."""

    before = 0.0

    def __call__(self, results):
        self.before, mixed = results["img"], results["img"] + self.before
        return {**results, "img": mixed}


def noisy(*steps):
    """The pipeline of the noisy training, and more steps."""
    return [{"type": "mmcv.RandomFlip", "prob": 0.5}, {"type": "Noise"}, *steps]


STOP = {"type": "EarlyStoppingHook", "monitor": "mean", "rule": "greater", "patience": 2}
KINDS = {
    "modules": {"model__type": "CountingNet"},
    "hooks": {"hooks": [{"type": "Warming"}]},
    "early stopping": {"hooks": [{**STOP, "min_delta": 10.0}]},
    "early stopping, and the best is saved": {
        "hooks": [{**STOP, "min_delta": 10.0}],
        "default_hooks__checkpoint__save_best": "mean",
        "default_hooks__checkpoint__rule": "less",
    },
    "generators of transforms": {
        "train_dataloader__dataset__pipeline": noisy({"type": "OwnNoise"})
    },
    "DropBlock": {"model__type": "DropBlockNet"},
}


@MODELS.register_module()
class DropBlockNet(noisy_training.DropoutNet):
    def __init__(self):
        from mmdet.models.layers import DropBlock

        super().__init__()
        self.conv = nn.Sequential(self.conv, DropBlock(0.5, 3, warmup_iters=10))


IMPORTS = {
    "custom_imports__imports": ["tests.helpers.noisy_training", "tests.launch.test_position"]
}


def resumed(folder, killed_at, loop="epoch", processes=1, **options):
    """End of an uninterrupted training and of a killed and resumed one, and the latter's text."""
    options = {**IMPORTS, "validate": True, **options}
    hooks = options.pop("hooks", [])
    whole = make_config(folder / "whole.py", loop, hooks, **options)
    ended = train(whole, folder / "whole", processes=processes)
    assert [e.status for e in ended] == [0] * processes, ended[0].text[-1500:]
    kill = [*hooks, {"type": "Kill", "iteration": killed_at}]
    ended = train(
        make_config(folder / "killed.py", loop, kill, **options), folder / "w", processes=processes
    )
    assert [e.status for e in ended] == [-9] * processes, ended[0].text[-1500:]
    (folder / "read.txt").unlink(missing_ok=True)
    ended = train(whole, folder / "w", "--resume", processes=processes)
    assert [e.status for e in ended] == [0] * processes, ended[0].text[-1500:]
    assert "resuming from" in ended[0].text
    names = [(folder / w / "last_checkpoint").read_text()[-8:] for w in ("whole", "w")]
    assert names[0] == names[1]  # neither ends later than the other
    return last(folder / "whole"), last(folder / "w"), ended[0].text


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_every_kind_is_held(kind, tmp_path):
    every = {} if "stopping" in kind else {"every": 3}
    whole, end, text = resumed(tmp_path, 9, epochs=4, **every, **KINDS[kind])
    assert equal(whole, end)
    assert "not to the bit" not in text


def test_each_rank_has_its_own(tmp_path):
    """The histories that modules keep are of the images of a rank."""
    whole, end, _ = resumed(tmp_path, 3, processes=2, every=3, model__type="CountingNet")
    assert equal(whole, end)


def test_what_no_checkpoint_holds_is_told(tmp_path):
    pipeline = noisy({"type": "Cached"})
    *_, text = resumed(tmp_path, 9, every=3, train_dataloader__dataset__pipeline=pipeline)
    assert text.count("not to the bit: the last batch before the interruption") == 1


@pytest.mark.parametrize("loop", ["epoch", "iter"])
def test_another_data_set_is_told(loop, tmp_path):
    kill = [{"type": "Kill", "iteration": 9}]
    train(make_config(tmp_path / "a.py", loop, kill), tmp_path / "w")
    options = {"train_dataloader__dataset__pipeline": noisy({"type": "OwnNoise"}), **IMPORTS}
    (ended,) = train(make_config(tmp_path / "b.py", loop, **options), tmp_path / "w", "--resume")
    assert ended.status == 0, ended.text[-800:]
    assert ended.text.count("not to the bit") == 1


def test_a_setting_of_the_resumed_run_is_not_the_checkpoints(tmp_path):
    """What has not changed in the training is a setting."""
    stop = {**STOP, "min_delta": 10.0, "patience": 9}
    kill = [stop, {"type": "Kill", "iteration": 9}]
    train(make_config(tmp_path / "a.py", hooks=kill, validate=True), tmp_path / "w")
    held = load(tmp_path / "w" / "epoch_2.pth")["held"][0]
    assert "EarlyStoppingHook.1.best_score" in held
    assert not any("patience" in path for path in held)


# -- generators -------------------------------------------------------------------------------


def test_own_generators_are_found_once_in_a_fixed_order_and_seeded_apart():
    shared = np.random.default_rng()

    def drawn(step):
        return [
            g.random() if not isinstance(g, torch.Generator) else torch.rand(1, generator=g).item()
            for g in own_generators(step)
        ]

    steps = [[OwnNoise(), {"again": shared}, (shared, [1, "a", None])] for _ in range(2)]
    values = []
    for step in steps:
        assert len(own_generators(step)) == 5
        for key in ((1, 2), (1, 3)):
            seed_own(own_generators(step), *key)
            values.append(drawn(step))
    assert values[0] == values[2] and values[1] == values[3]
    assert len({*values[0], *values[1]}) == 10
    step = OwnNoise()
    step.me = step  # a circle
    assert len(own_generators(step)) == 4


# -- loops of iterations ----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["InfiniteSampler", "DefaultSampler"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_of_iterations_goes_on_without_reading_what_was_trained_with(
    sampler, workers, tmp_path
):
    """Whether the sampler ends after a pass (of 4 batches) or never; and it goes on exactly."""
    options = {"train_dataloader__sampler__type": sampler, "workers": workers, "validate": False}
    options["train_dataloader__dataset__type"] = "Counted"
    for loops in (3, 9):  # before a pass ends, and in the third
        folder = tmp_path / str(loops)
        folder.mkdir()
        whole, end, _ = resumed(folder, loops, "iter", every=loops, **options)
        assert equal(whole, end)
        read = (folder / "read.txt").read_text()
        ahead = 2 * workers * 4
        # four of each step, and of the batch that is drawn again
        assert 4 * (12 - loops) <= len(read.split()) <= 4 * (12 - loops) + 4 + ahead


@noisy_training.DATASETS.register_module()
class Counted(noisy_training.Stripes):
    """Writes down what is read."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.log = None

    def __getitem__(self, index):
        from mmengine.logging import MMLogger

        if self.log is None:
            folder = MMLogger.get_current_instance()._log_file
            self.log = folder.split("/w")[0] + "/read.txt"
        with open(self.log, "a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)


def test_a_loop_of_iterations_that_is_divided_otherwise_is_refused(tmp_path):
    train(make_config(tmp_path / "a.py", "iter", epochs=1), tmp_path / "w")
    for options, processes, loop, message in [
        ({"train_dataloader__batch_size": 8}, 1, "iter", "now there are batches of 8 images on 1"),
        ({}, 2, "iter", "now there are batches of 4 images on 2 processes"),
        (
            {},
            1,
            "epoch",
            "was saved by a training loop of iterations, but the config has one of epochs",
        ),
    ]:
        config = make_config(tmp_path / "b.py", loop, **options)
        ended = train(config, tmp_path / "w", "--resume", processes=processes)
        assert ended[0].status == 2 and "Traceback" not in ended[0].text
        assert message in ended[0].text
        assert "load_from=" in ended[0].text.splitlines()[-1]
