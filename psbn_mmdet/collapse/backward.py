"""What one backward pass tells of each filter: whether a gradient arrives, and what it carries.

Let L be a loss, or random numbers on the outputs of a network. Per filter:

    gradient    the larger of |dL/dgamma| and |dL/dbias|
    effect      |sum over all positions of dL/dy (y - mean of y)|,  y the output of the layer

The effect is by how much L changes, to first order, when the filter is set to its mean over the
batch (the Taylor criterion of Molchanov et al., arXiv 1906.10771, for a filter of a normalization
layer). A filter that is constant, or that nobody reads, has the effect 0; one that carries
something has it 0 by a coincidence of all positions only. For small deviations first order is
exact, so that what lies beside the limit is judged rightly, too.

Where a layer normalises with the statistics of the batch, x_hat has mean 0 and the effect is
|gamma dL/dgamma|, which is there anyway. Where it uses its running statistics, y - mean of y is
taken from the layer's input, which autograd keeps anyway: the difference of the gradients of gamma
and bias would tell it, too, but as a small difference of two large sums, wrong by more than what a
filter that varies little carries. Only sums per channel are kept, and in-place ReLUs do no harm.
:func:`.criteria.does` says what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..norm import is_post_shifted
from .calls import in_eval_mode
from .criteria import MeasureError
from .wiring import tensors_in


class Watch:
    """Watches some normalization layers through a forward and a backward pass.

    Between :meth:`start` and :meth:`stop` the passes are made; then :meth:`seen` tells. Several
    passes add up. The network, its weights, its gradients and its output stay as they are.

    Args:
        modules: The layers. Those that do not run, or whose gamma and bias want no gradient (frozen
            ones), are not measured.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._parameters = [_gamma_and_bias(module) for module in self.modules]

    def start(self) -> None:
        self._hooks = ExitStack()
        self._sums: list[_Sums | None] = [None] * len(self.modules)
        self._gammas = [gamma.detach().clone() for gamma, _ in self._parameters]
        self._gradients: list[list[Tensor | None]] = [[None, None] for _ in self.modules]
        self._ran: set[int] = set()
        for i, (module, parameters) in enumerate(zip(self.modules, self._parameters, strict=True)):
            trained = {j: p for j, p in enumerate(parameters) if p is not None and p.requires_grad}
            if trained:
                self._hooks.callback(module.register_forward_hook(self._after(i)).remove)
            for j, parameter in trained.items():
                self._hooks.callback(parameter.register_hook(self._arrived(i, j)).remove)

    def stop(self) -> None:
        self._hooks.close()

    def _after(self, i: int) -> Callable[..., Any]:
        def after(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            self._ran.add(i)
            if inputs and y.requires_grad and _by_running_statistics(module):
                sums = self._sums[i] = self._sums[i] or _Sums()
                x = inputs[0].detach()
                y.register_hook(lambda gradient: sums.add(x, gradient))

        return after

    def _arrived(self, i: int, j: int) -> Callable[..., Any]:
        def arrived(gradient: Tensor) -> None:
            before = self._gradients[i][j]
            self._gradients[i][j] = gradient.detach() + (0 if before is None else before)

        return arrived

    @torch.no_grad()
    def seen(self) -> tuple[Tensor, Tensor]:
        """``gradient`` and ``effect`` of all filters, (F,) float32 on the CPU; NaN if not measured.

        They are joined on the device and copied at once: one synchronisation.
        """
        device = self._gammas[0].device
        parts: list[list[Tensor]] = [[], []]
        for i, gamma in enumerate(self._gammas):
            start = torch.full_like(gamma, 0 if i in self._ran else torch.nan, dtype=torch.float32)
            by_gamma, by_bias = (start if g is None else g.float() for g in self._gradients[i])
            parts[0].append(torch.maximum(by_gamma.abs(), by_bias.abs()))
            sums = self._sums[i]
            by_shape = by_gamma if sums is None else sums.by_x() * _inverse_std(self.modules[i])
            parts[1].append((gamma.float() * by_shape).abs())
        joined = torch.cat([t.to(device) for t in parts[0] + parts[1]]).cpu()
        gradient, effect = joined.chunk(2)
        return gradient, effect


def _gamma_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    bias = module.beta if is_post_shifted(module) else getattr(module, "bias", None)
    return module.weight, bias if isinstance(bias, Tensor) else None


def _by_running_statistics(module: Any) -> bool:
    """Whether a layer normalises with its running statistics, as it is."""
    if getattr(module, "running_mean", None) is None:
        return False
    if isinstance(module, _InstanceNorm):
        return not module.training and module.track_running_stats
    return not (isinstance(module, _BatchNorm) and module.training)  # FrozenBatchNorm2d always


def _inverse_std(module: Any) -> Tensor:
    return torch.rsqrt(module.running_var.float() + getattr(module, "eps", 1e-5))


class _Sums:
    """The sum of dL/dy (x - mean of x) over all positions of all calls of a layer, per channel.

    x is counted from the mean of one call, so that what varies little beside its mean is exact.
    """

    def __init__(self) -> None:
        self._origin: Tensor | None = None
        self._sums: Tensor | float = 0.0  # (3, C): of dL/dy x, of dL/dy, of x
        self._positions = 0

    def add(self, x: Tensor, gradient: Tensor) -> None:
        dims = [d for d in range(x.dim()) if d != 1]
        x, gradient = x.float(), gradient.detach().float()
        if self._origin is None:
            self._origin = x.mean(dims, keepdim=True)
        x = x - self._origin
        self._sums = self._sums + torch.stack([t.sum(dims) for t in (gradient * x, gradient, x)])
        self._positions += x.numel() // max(x.shape[1], 1)

    def by_x(self) -> Tensor:
        """(C,); 0 if no gradient arrived."""
        if not isinstance(self._sums, Tensor):
            return torch.zeros(())
        product, gradient, x = self._sums
        return product - x / max(self._positions, 1) * gradient


def pull_back(
    model: nn.Module, modules: Iterable[nn.Module], call: Callable[[nn.Module], Any]
) -> tuple[Tensor, Tensor]:
    """``gradient`` and ``effect`` of the filters of some layers, of a network in eval mode.

    What is pulled back are random numbers on all outputs that depend on the layers, each output
    divided by its root mean square, so that class scores count beside pixel coordinates, and the
    unit of L is an output. A single number, as a loss, is pulled back itself.

    The model comes out as it was: modes, which parameters are trained, their gradients.

    Args:
        model: Any module.
        modules: Its normalization layers.
        call: Runs it; it may return tensors in lists, tuples, mappings, dataclasses.

    Raises:
        MeasureError: No output depends on a layer in a way that has a gradient.
    """
    watch = Watch(modules)
    tensors = [t for pair in watch._parameters for t in pair if t is not None]
    with ExitStack() as stack:
        stack.enter_context(in_eval_mode(model))
        for tensor in {*model.parameters(), *tensors}:
            stack.callback(_put_back, tensor, tensor.requires_grad, tensor.grad)
            tensor.requires_grad_(False).grad = None
        for tensor in tensors:
            tensor.requires_grad_(True)
        stack.enter_context(torch.enable_grad())
        watch.start()
        stack.callback(watch.stop)
        outputs = [t for t in tensors_in(call(model)) if t.requires_grad and t.numel()]
        if not outputs:
            raise MeasureError(
                "no output of the model has a gradient with respect to its normalization layers; "
                "give a function that calls the model and returns what it computes, or a loss"
            )
        generator = torch.Generator().manual_seed(0)
        numbers = [
            torch.randn(t.shape, generator=generator).to(t) * _inverse_size(t) for t in outputs
        ]
        torch.autograd.backward(outputs, numbers)
        return watch.seen()


def _inverse_size(output: Tensor) -> Tensor:
    size = output.detach().float().square().mean().sqrt()
    return torch.where(torch.isfinite(size) & (size > 0), 1 / size, 1).to(output.dtype)


def _put_back(tensor: Tensor, requires_grad: bool, grad: Tensor | None) -> None:
    tensor.requires_grad_(requires_grad).grad = grad
