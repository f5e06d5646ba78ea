"""The hook in mmengine's Runner, and a RetinaNet trained both ways."""

import itertools
from typing import ClassVar

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from test_anchored import ALPHA, as_psbn_computes, batches, norm_biases, randomize, small_net
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from psbn_mmdet import to_psbn
from psbn_mmdet.anchored import AnchoredBiasDecay

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
