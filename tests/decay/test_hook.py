"""The hook in mmengine's Runner, and a RetinaNet trained both ways."""

import itertools
import logging
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from psbn_mmdet import to_psbn
from psbn_mmdet.decay.anchor import NothingToAnchor
from psbn_mmdet.decay.hook import AnchoredBiasDecay
from psbn_mmdet.launch.runner import Runner
from tests.helpers.anchored import (
    ALPHA,
    as_psbn_computes,
    batches,
    norm_biases,
    randomize,
    small_net,
)
from tests.helpers.paths import ROOT

run_number = itertools.count()


class Toy(BaseModel):
    def __init__(self, post_shifted):
        super().__init__()
        torch.manual_seed(0)
        self.net = as_psbn_computes(randomize(small_net()))
        if post_shifted:
            to_psbn(self.net, ALPHA)

    def forward(self, x, target, mode):
        return {"loss": F.cross_entropy(self.net(x), target)}


class TestHook:
    @staticmethod
    def run(work_dir, iters, post_shifted=False, resume=False, hook=None, **options):
        x, target = map(torch.cat, zip(*batches(20), strict=True))
        dataset = TensorDataset(x, target)
        runner = Runner(
            Toy(post_shifted),
            str(work_dir),
            train_dataloader=dict(
                dataset=dataset,
                batch_size=4,
                sampler=dict(type=DefaultSampler, shuffle=False),
                collate_fn=dict(type="default_collate"),
            ),
            train_cfg=dict(by_epoch=False, max_iters=iters),
            optim_wrapper=dict(
                optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=0.05),
                accumulative_counts=2,
                clip_grad=dict(max_norm=0.5),
                **options,
            ),
            param_scheduler=dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=8),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=8)),
            custom_hooks=[hook] if hook else [],
            resume=resume,
            log_level="WARNING",
            experiment_name=f"run{next(run_number)}",
        )
        runner.train()
        return runner

    hook: ClassVar = dict(type="AnchoredBiasDecay", alpha=ALPHA)

    def test_trains_as_psbn_and_resumes_to_the_bit(self, tmp_path):
        psbn = self.run(tmp_path / "psbn", 20, post_shifted=True)
        whole = self.run(tmp_path / "whole", 20, hook=self.hook)
        assert all(map(torch.equal, norm_biases(whole.model), norm_biases(psbn.model)))
        self.run(tmp_path / "parts", 8, hook=self.hook)
        parts = self.run(tmp_path / "parts", 20, hook=self.hook, resume=True)
        for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
            assert torch.equal(a, b)
        saved = torch.load(tmp_path / "whole" / "iter_16.pth", weights_only=False)["state_dict"]
        assert list(saved) == list(Toy(post_shifted=False).state_dict())

    def test_several_optimizers(self):
        """One has no norm layer; another without decay; the hook goes on, and saves by position."""
        parts = nn.ModuleDict({"a": small_net(), "b": nn.Linear(2, 2), "c": small_net()})
        wrappers = {
            name: OptimWrapper(torch.optim.SGD(part.parameters(), lr=0.1, weight_decay=decay))
            for (name, part), decay in zip(parts.items(), (0.1, 0.1, 0.0), strict=True)
        }
        logger = logging.getLogger("several")
        runner = SimpleNamespace(
            iter=0, model=parts, optim_wrapper=OptimWrapperDict(**wrappers), logger=logger
        )
        hook = AnchoredBiasDecay(ALPHA)
        hook.before_train(runner)
        names = [anchored and anchored.names for anchored in hook.anchored]
        assert names == [["a.1.bias", "a.4.bias"], None, None]
        for p in parts.a.parameters():
            p.grad = torch.zeros_like(p)
        wrappers["a"].optimizer.step()
        checkpoint: dict = {}
        hook.before_save_checkpoint(runner, checkpoint)
        assert [list(state) for state in checkpoint[hook.key]] == [names[0], [], []]
        hook.after_train(runner)
        assert not wrappers["a"].optimizer._optimizer_step_pre_hooks
        resumed = AnchoredBiasDecay(ALPHA)
        resumed.after_load_checkpoint(runner, checkpoint)
        resumed.before_train(runner)
        assert list(resumed.anchored[0].state_dict()) == names[0]
        resumed.after_train(runner)
        for name in "bc":  # what is left then is nothing
            runner.optim_wrapper = wrappers[name]
            with pytest.raises(NothingToAnchor):
                hook.before_train(runner)

    def test_an_optimizer_that_is_refused_leaves_the_others_as_they_were(self):
        parts = nn.ModuleDict({"a": small_net(), "b": small_net()})
        good = torch.optim.SGD(parts.a.parameters(), lr=0.1, weight_decay=0.1)
        bad = torch.optim.ASGD(parts.b.parameters(), lr=0.1, weight_decay=0.1)
        wrappers = OptimWrapperDict(a=OptimWrapper(good), b=OptimWrapper(bad))
        runner = SimpleNamespace(
            iter=0, model=parts, optim_wrapper=wrappers, logger=logging.getLogger("refused")
        )
        with pytest.raises(TypeError, match="ASGD averages the parameters"):
            AnchoredBiasDecay(ALPHA).before_train(runner)
        assert not good._optimizer_step_pre_hooks

    def test_from_scratch_and_its_end(self, tmp_path):
        runner = self.run(tmp_path, 1, hook=dict(self.hook, init="alpha"))
        # removed after the training
        assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks
        assert not runner.model._forward_pre_hooks
        # no full accumulation in one step, so nothing but the start: alpha, and momentum 0
        for bias in norm_biases(runner.model):
            assert (bias - ALPHA).abs().max() < 0.05

    def test_is_found_under_both_registries(self):
        assert isinstance(HOOKS.build(self.hook), AnchoredBiasDecay)
        scoped = dict(self.hook, type="psbn_mmdet.AnchoredBiasDecay")
        assert isinstance(HOOKS.build(scoped), AnchoredBiasDecay)

    def test_no_decay_on_norm_layers_names_the_key(self, tmp_path):
        with pytest.raises(ValueError, match="norm_decay_mult"):
            self.run(tmp_path, 1, hook=self.hook, paramwise_cfg=dict(norm_decay_mult=0.0))


class Losses(Hook):
    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.values.append({key: value.item() for key, value in outputs.items()})


@pytest.mark.slow
class TestRetinaNet:
    """The 500-scale config on real images, at a sixth of its scale, from one BN checkpoint."""

    iters = 3

    def config(self, name, shared_data, work_dir):
        cfg = Config.fromfile(ROOT / f"configs/retinanet/retinanet_{name}.py")
        cfg.model.backbone.init_cfg = None
        loader = cfg.train_dataloader
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f"{shared_data / 'coco128'}/"
        for step in loader.dataset.pipeline:
            if step["type"] == "Resize":
                step["scale"] = (133, 80)
        for key in ("val_dataloader", "val_cfg", "val_evaluator"):
            cfg[key] = None
        cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=self.iters)
        cfg.param_scheduler = []
        cfg.default_hooks.checkpoint = None
        cfg.optim_wrapper.optimizer.weight_decay = 0.05  # a difference that three steps show
        cfg.optim_wrapper.clip_grad = dict(max_norm=5.0)
        cfg.work_dir = str(work_dir)
        cfg.log_level = "WARNING"
        cfg.experiment_name = f"run{next(run_number)}"
        return cfg

    def checkpoint(self, cfg, path):
        register_all_modules(init_default_scope=True)
        model = MODELS.build(cfg.model)
        model.init_weights()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.weight, 0.3, 0.1)
                torch.nn.init.normal_(module.bias, 0, 0.1)
        torch.save({"state_dict": as_psbn_computes(model).state_dict()}, path)

    def test_the_same_losses_with_psbn_layers_and_with_anchored_biases(self, shared_data, tmp_path):
        start = tmp_path / "bn.pth"
        self.checkpoint(self.config("bn_500", shared_data, tmp_path), start)
        runs = {}
        for run, (name, hooks) in {
            "psbn": ("psbn_500", []),
            "anchored": ("bn_500", [dict(type="AnchoredBiasDecay", alpha=ALPHA)]),
            "bn": ("bn_500", []),
        }.items():
            cfg = self.config(name, shared_data, tmp_path / run)
            cfg.load_from = str(start)
            cfg.custom_hooks = hooks
            runner = Runner.from_cfg(cfg)
            losses = Losses()
            runner.register_hook(losses)
            runner.train()
            runs[run] = losses.values, norm_biases(runner.model.backbone)
        assert len(runs["psbn"][0]) == self.iters
        assert runs["anchored"][0] == runs["psbn"][0]
        assert all(map(torch.equal, runs["anchored"][1], runs["psbn"][1]))
        # and not because decay does nothing: the biases of BN went another way
        apart = [(a - b).abs().max() for a, b in zip(runs["bn"][1], runs["psbn"][1], strict=True)]
        assert max(apart) > 1e-4
        assert runs["bn"][0] != runs["psbn"][0]
