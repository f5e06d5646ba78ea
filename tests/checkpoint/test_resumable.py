"""Whatever mmengine writes into a checkpoint can be read again, and is what it was."""

import collections

import mmdet.engine  # noqa: F401  registers its schedulers and hooks
import mmengine.hooks  # noqa: F401
import numpy as np
import pytest
import torch
from mmdet.registry import HOOKS as MMDET_HOOKS
from mmdet.registry import PARAM_SCHEDULERS as MMDET_PARAM_SCHEDULERS
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS
from torch import nn

from psbn_mmdet.checkpoint import CheckpointError, load
from tests.helpers.toy_runner import Noise, make_runner


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, (torch.Tensor, np.ndarray)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (a == b).all()
    elif isinstance(a, HistoryBuffer):
        same(a.data, b.data)
        assert a.mean() == b.mean()
    else:
        assert a == b


def comes_back(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    same(content, load(tmp_path / "a.pth"))


def optimizer_of(name="SGD", **arguments):
    weight = nn.Embedding(4, 3, sparse=name == "SparseAdam").weight
    arguments = {"lr": 0.1, **arguments}
    return OPTIMIZERS.build(dict(type=name, params=[weight], **arguments)), weight


# -- schedulers ----------------------------------------------------------------------

LR = dict(begin=0, end=4)
ARGUMENTS = {
    "Constant": dict(factor=0.5, **LR),
    "CosineAnnealing": dict(T_max=4, **LR),
    "CosineRestart": dict(periods=[2, 2], restart_weights=[1, 0.5], eta_min=0, **LR),
    "Exponential": dict(gamma=0.9, **LR),
    "Linear": dict(start_factor=0.1, **LR),
    "MultiStep": dict(milestones=[1, 1, 3], **LR),
    "OneCycle": dict(eta_max=0.5, total_steps=9),
    "Poly": dict(eta_min=0.01, **LR),
    "QuadraticWarmup": LR,
    "ReduceOnPlateau": dict(monitor="loss", **LR),
    "Step": dict(step_size=2, **LR),
}
SCHEDULERS = {
    name: (registry, ARGUMENTS[name.removesuffix(what)], what)
    for registry in (PARAM_SCHEDULERS, MMDET_PARAM_SCHEDULERS)
    for name in registry.module_dict
    for what in ("LR", "Momentum", "ParamScheduler")
    if name.endswith(what)
}


def test_every_registered_scheduler_is_tried():
    assert {*PARAM_SCHEDULERS.module_dict, *MMDET_PARAM_SCHEDULERS.module_dict} == {*SCHEDULERS}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_state_of_every_scheduler(name, tmp_path):
    registry, arguments, what = SCHEDULERS[name]
    optimizer, _ = optimizer_of(momentum=0.9)
    if what == "ParamScheduler":
        arguments = {"param_name": "lr", **arguments}
    for more in [{}, {"anneal_strategy": "linear"}] if "OneCycle" in name else [{}]:
        scheduler = registry.module_dict[name](optimizer, **arguments, **more)
        for step in range(3):
            optimizer.step()
            scheduler.step(*([{"loss": 1.0 + step}] if "Plateau" in name else []))
        comes_back(scheduler.state_dict(), tmp_path)


# -- optimizers ----------------------------------------------------------------------

NOT_TRIED = {
    "Optimizer": "the base class",
    "ZeroRedundancyOptimizer": "gathers the state of one of the others",
    "ApexOptimWrapper": "needs apex; a loss scale besides",
    "AmpOptimWrapper": "needs a GPU; a loss scale besides, see below",
    "DeepSpeedOptimWrapper": "needs deepspeed, which saves by itself",
    "ColossalAIOptimWrapper": "needs colossalai, which saves by itself",
}


def test_every_registered_wrapper_is_tried():
    # That of this package, which tests of launch resume, is there if they came before.
    theirs = {
        name
        for name, kind in OPTIM_WRAPPERS.module_dict.items()
        if not kind.__module__.startswith("psbn_mmdet")
    }
    assert theirs - {*NOT_TRIED} == {"OptimWrapper"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({*OPTIMIZERS.module_dict} - {*NOT_TRIED}))
def test_the_state_of_every_optimizer(name, tmp_path):
    optimizer, weight = optimizer_of(name)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.embedding(torch.tensor([0, 2]), weight, sparse=name == "SparseAdam")
        loss = loss.square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    wrapper = OptimWrapper(optimizer)
    wrapper.initialize_count_status(nn.Linear(1, 1), 0, 9)
    comes_back(wrapper.state_dict(), tmp_path)
    comes_back(OptimWrapperDict(a=wrapper, b=wrapper).state_dict(), tmp_path)


@pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"),
    reason="needs torch >= 2.3 for gradient scaling on the CPU",
)
def test_the_state_of_loss_scaling(tmp_path):
    comes_back(torch.amp.GradScaler("cpu").state_dict(), tmp_path)


# -- message hub, meta, hooks ----------------------------------------------------------

VALUES = [
    None,
    True,
    3,
    0.5,
    "text",
    b"bytes",
    (1, [2, {"a": 3}]),
    {1, 2},
    ConfigDict(classes=("a", "b"), nested=dict(palette=[(1, 2, 3)])),
    collections.OrderedDict(a=1),
    collections.Counter("aab"),
    torch.ones(2),
    torch.float16,
    torch.Size([2]),
    np.str_("text"),
    np.array(["a", "bc"]),
    *(np.array([0, 1]).astype(code) for code in "?bhilBHILefdFD"),
    *(np.array(1).astype(code)[()] for code in "?bhilBHILefdFD"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{type(v).__name__}-{v}")
def test_what_the_message_hub_and_a_data_set_may_hold(value, tmp_path):
    hub = MessageHub.get_instance("resumable")
    hub.update_info("value", value)
    for number in (0.5, np.float32(1), np.float64(2), torch.tensor(3.0)):
        hub.update_scalar("train/loss", number)
    comes_back({"message_hub": hub.state_dict(), "meta": {"dataset_meta": value}}, tmp_path)


def test_of_all_hooks_only_those_tried_write_into_a_checkpoint():
    writers = {
        name
        for registry in (HOOKS, MMDET_HOOKS)
        for name, hook in registry.module_dict.items()
        if isinstance(hook, type) and hook.before_save_checkpoint is not Hook.before_save_checkpoint
    }
    assert writers == {"AnchoredBiasDecay", "EMAHook"}


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_all_of_it_is_resumed(tmp_path, monkeypatch):
    from mmengine.hooks import EMAHook

    monkeypatch.setattr(Noise, "metainfo", ConfigDict(classes=("a",), palette=[(1, 2, 3)]), False)
    schedulers = [
        dict(type="OneCycleLR", eta_max=0.1, total_steps=8, by_epoch=False),
        dict(type="MultiStepMomentum", milestones=[2, 2, 6], gamma=0.9, by_epoch=False),
    ]

    def run(name, **kwargs):
        average = EMAHook()
        runner = make_runner(
            tmp_path / name, [average], iterations=8, param_scheduler=schedulers, **kwargs
        )
        runner.train()
        runner.ema_steps = int(average.ema_model.steps)
        return runner

    whole = run("whole")
    parts = run("parts", load_from=str(tmp_path / "whole" / "iter_4.pth"), resume=True)
    assert (parts.iter, parts.ema_steps) == (8, whole.ema_steps)
    for one, other in zip(whole.param_schedulers, parts.param_schedulers, strict=True):
        # _global_step, which mmengine counts from 0 in each process, serves a warning only
        same(
            *(
                {k: v for k, v in s.state_dict().items() if k != "_global_step"}
                for s in (one, other)
            )
        )
    meta = load(tmp_path / "parts" / "iter_8.pth")["meta"]
    assert type(meta["dataset_meta"]) is ConfigDict


# -- and nothing else ------------------------------------------------------------------


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_getattr_reaches_only_what_mmengine_refers_to(tmp_path):
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

    for content in [
        Calls(getattr, HistoryBuffer, "__init__"),
        Calls(getattr, OneCycleParamScheduler, "load_state_dict"),
        Calls(OneCycleParamScheduler, 1, 2),
    ]:
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="refused: it contains"):
            load(tmp_path / "a.pth")


def test_arrays_of_objects_are_refused(tmp_path):
    torch.save(np.array([Calls(print, "ran")], dtype=object), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="refused"):
        load(tmp_path / "a.pth")
