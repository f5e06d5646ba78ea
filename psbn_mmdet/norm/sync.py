"""psBN with statistics over all processes of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import _PostShiftBN


class psSyncBN(_PostShiftBN, nn.BatchNorm2d, _BatchNorm):  # type: ignore[misc]
    """psBN with statistics over all processes of a group, for (N, C, ...).

    In training, within an initialised process group of more than one process,
    value, gradients and running statistics are those of psBN on the
    concatenated batch; a process may hold a different number of samples, or
    none (if no process has any, nothing is computed and no statistic changes).
    Otherwise it is psBN. CUDA (and every device that
    ``nn.SyncBatchNorm`` takes) runs torch's fused kernels, CPU a differentiable
    path over any backend, gloo included.

    Not an ``nn.SyncBatchNorm``: ``mmengine.model.revert_sync_batchnorm``, which
    every non-distributed Runner calls, would turn it into plain BN. A BatchNorm2d,
    though it takes any number of dimensions, since precise BN and freezing look for
    that class.

    Args:
        process_group: Whom to synchronise with; default all processes.
        num_features, eps, momentum, affine, track_running_stats: As in :class:`psBN2d`.
        **kwargs: ``device``, ``dtype`` and ``alpha``, as there.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)
        self.process_group = process_group

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, (N, C, ...); see the class."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            assert not self.training, (
                "a scripted psSyncBN cannot synchronize; script it in eval mode"
            )
            bias = self.beta + self.initial_alpha
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, bias, eps=self.eps
            )
        else:  # or the compiler would look into what it cannot compile
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        together = self.training and dist.is_available() and dist.is_initialized()
        if not together or dist.get_world_size(self.process_group) == 1:
            return super().forward(input)
        if input.device.type == "cpu":
            return self._forward_on_cpu(input)
        return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]

    def _forward_on_cpu(self, input: Tensor) -> Tensor:
        """Eq. 6 with mean and variance over the group; two all-reduces each way."""
        self._check_input_dim(input)  # type: ignore[misc]
        self._check_non_zero_input_channels(input)  # type: ignore[misc]
        group = self.process_group or dist.group.WORLD
        x = input if input.dtype == torch.float64 else input.float()
        dims = [d for d in range(x.dim()) if d != 1]
        per_channel = [-1 if d == 1 else 1 for d in range(x.dim())]

        # In float64: the count stays exact, and sums of different processes
        # round as one sum would.
        local = x.sum(dims, dtype=torch.float64)
        count = local.new_full((1,), x.numel() // x.size(1))
        total = _SumOverGroup.apply(torch.cat([local, count]), group)  # type: ignore[no-untyped-call]
        count = total[-1].detach()
        if count == 0:  # no process has a sample; all of them take this way
            return input * self.weight.view(per_channel) + (self.beta + self.initial_alpha).view(
                per_channel
            )
        if count == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got "
                f"{int(count)} over all processes"
            )
        mean = total[:-1] / count
        centred = x - mean.to(x.dtype).view(per_channel)
        squares = centred.square().sum(dims, dtype=torch.float64)
        var = _SumOverGroup.apply(squares, group) / count  # type: ignore[no-untyped-call]

        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            assert self.running_mean is not None and self.running_var is not None
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:  # the average over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
            with torch.no_grad():
                unbiased = var * (count / (count - 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)

        scale = self.weight * torch.rsqrt(var + self.eps).to(x.dtype)
        y = centred * scale.view(per_channel) + (self.beta + self.initial_alpha).view(per_channel)
        return y.to(input.dtype)


class _SumOverGroup(torch.autograd.Function):
    """Sum over the processes of a group; so is the gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = input.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
