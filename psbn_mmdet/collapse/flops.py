"""How many FLOPs removing filters saves, in any network, without tracing a graph.

The network is run once, on random input, as a probe of how channels connect:
every normalization layer gives standardised values in its live channels and 0
in its removed ones, and whatever follows (addition, concatenation, pooling)
does with that what it does. A channel that arrives at a convolution constant
over batch and plane carries nothing, so it can go; it is set to 0 there, as its
contribution is one to the bias (at a padded border only about so).

Values are standardised because gamma, bias and running statistics of a trained
network on random input could silence channels that are alive on its data. Only
the wiring counts here.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Flops:
    """Multiply-accumulates of the convolutions and linear layers of a network.

    ``total``, and ``remaining`` when the filters are removed: per sample if the
    input was given by its size, else of the whole call. ``rows`` has ``name``,
    ``total``, ``remaining`` of each convolution in order of its first use.
    """

    total: int
    remaining: int
    rows: tuple[dict[str, Any], ...] = field(repr=False, default=())

    @property
    def sparsity(self) -> float:
        """Percentage saved: the paper's *sparsity*, if collapsed filters are removed."""
        return 100 * (1 - self.remaining / self.total) if self.total else 0.0


def filters_of(module: nn.Module) -> int:
    """Number of filters (output channels) of a convolution or linear layer, else 0.

    A convolution is whatever looks like torch's, mmcv's deformable ones included.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(weight, Tensor) and weight.dim() >= 3 and hasattr(module, "kernel_size"):
        return getattr(module, "out_channels", 0)
    return 0


def probe(
    model: nn.Module,
    live: Mapping[nn.Module, Tensor],
    inputs: tuple[int, ...] | Callable[[nn.Module], Any],
) -> Flops:
    """Count multiply-accumulates with and without some filters.

    Removed are: each filter whose every use is a normalization layer in which it
    is not live, and each input channel that is constant. A live filter that
    only feeds removed ones stays, as the measure is what the collapsed filters
    themselves cost. Convolutions and linear layers that are not called as
    modules are not seen. Nothing of the model is changed, and no global random
    state is used.

    Args:
        model: Any module, on any device.
        live: For normalization layers of the model, which filters stay: (C,)
            bool. Others count as live.
        inputs: Size of one input without the batch, as (3, 800, 1333), with
            which ``model(x)`` is called; or a function that calls the model it
            is given, such as ``lambda m: m(images, samples, mode='tensor')``,
            with at least two different samples.

    Raises:
        ValueError: The model ran no convolution or linear layer.
    """
    training = {module: module.training for module in model.modules()}
    calls: list[_Call] = []
    with ExitStack() as stack:
        stack.callback(_restore, training)
        model.eval()
        depth = [0]
        for name, module in model.named_modules():
            if module in live:
                hooks = _norm_hooks(live[module], depth)
            elif filters_of(module):
                hooks = _conv_hooks(name, module, calls)
            else:
                continue
            stack.callback(module.register_forward_pre_hook(hooks[0], with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(hooks[1]).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_Readers(depth))
        if callable(inputs):
            samples = 1
            inputs(model)
        else:
            samples = 2  # what is 1x1 in the plane must vary over the batch
            reference = next(model.parameters())
            x = torch.randn(samples, *inputs, generator=torch.Generator().manual_seed(0))
            model(x.to(reference.device, reference.dtype))
    if not calls:
        raise ValueError("the model ran no convolution or linear layer, so there are no FLOPs")
    rows: dict[str, dict[str, Any]] = {}
    for call in calls:
        row = rows.setdefault(call.name, {"name": call.name, "total": 0, "remaining": 0})
        total, remaining = call.macs()
        row["total"] += total // samples
        row["remaining"] += remaining // samples
    return Flops(
        sum(row["total"] for row in rows.values()),
        sum(row["remaining"] for row in rows.values()),
        tuple(rows.values()),
    )


class _Call:
    """One call of a convolution: its shape, and who read what it put out."""

    def __init__(self, name: str, conv: nn.Module, inputs: Tensor, active_in: Tensor) -> None:
        self.name = name
        self.groups = getattr(conv, "groups", 1)
        self.kernel = 1 if isinstance(conv, nn.Linear) else conv.weight.shape[2:].numel()
        self.filters = filters_of(conv)
        self.positions = inputs.numel() // max(len(active_in), 1)
        self.counts_output = not getattr(conv, "transposed", False)
        self.active_in = active_in
        self.removed_by: list[Tensor] = []
        self.read_elsewhere = False

    def macs(self) -> tuple[int, int]:
        active_out = torch.ones(self.filters, dtype=torch.bool, device=self.active_in.device)
        if self.removed_by and not self.read_elsewhere:
            active_out = ~torch.stack(self.removed_by).all(0)
        n_in = self.active_in.view(self.groups, -1).sum(1)
        n_out = active_out.view(self.groups, -1).sum(1)
        each = self.positions * self.kernel
        total = len(self.active_in) * self.filters // self.groups
        return each * total, each * int((n_in * n_out).sum())


class _Readers(TorchFunctionMode):
    """Notes which outputs of convolutions are read by anything but a normalization layer."""

    def __init__(self, depth: list[int]) -> None:
        super().__init__()
        self.depth = depth

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.depth[0] == 0 and _holds_tensor(result):
            for tensor in _flat([*args, *kwargs.values()]):
                if call := getattr(tensor, "_probe_call", None):
                    call.read_elsewhere = True
        return result


def _conv_hooks(name: str, conv: nn.Module, calls: list[_Call]) -> tuple[Callable, Callable]:
    linear = isinstance(conv, nn.Linear)
    unbatched = 1 if linear else conv.weight.dim() - 1

    def channel_dim(x: Tensor) -> int:
        return x.dim() - 1 if linear else int(x.dim() > unbatched)

    def before(module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        dim = channel_dim(x)
        active = ~_is_constant(x, dim)
        calls.append(_Call(name, module, x, active))
        module._probe_call = calls[-1]
        x = x * active.view(_along(x, dim))
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): x}

    def after(module, args, output):
        call = module.__dict__.pop("_probe_call")
        dim = channel_dim(output)
        if call.counts_output:
            call.positions = output.numel() // output.shape[dim]
        output = _standardised(output, dim)
        output._probe_call = call
        return output

    return before, after


def _norm_hooks(live: Tensor, depth: list[int]) -> tuple[Callable, Callable]:
    def before(module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        if call := getattr(x, "_probe_call", None):
            call.removed_by.append(~live.to(x.device))
        depth[0] += 1

    def after(module, args, output):
        depth[0] -= 1
        dim = 0 if output.shape[0] == len(live) and output.dim() in (1, 3) else 1
        return _standardised(output, dim) * live.to(output.device).view(_along(output, dim))

    return before, after


def _is_constant(x: Tensor, dim: int) -> Tensor:
    """Which channels are constant; with a single value per channel, which are 0."""
    others = [d for d in range(x.dim()) if d != dim]
    if x.numel() == x.shape[dim]:
        return x.flatten() == 0
    if x.numel() == 0:
        return torch.zeros(x.shape[dim], dtype=torch.bool, device=x.device)
    low, high = x.amin(others), x.amax(others)
    rounding = 16 * torch.finfo(x.dtype).eps
    return high - low <= rounding * torch.maximum(low.abs(), high.abs())


def _standardised(x: Tensor, dim: int) -> Tensor:
    """Mean 0 and variance 1 per channel; 0 where it is constant."""
    if x.numel() <= x.shape[dim]:
        return x.clone()
    others = [d for d in range(x.dim()) if d != dim]
    var, mean = torch.var_mean(x, others, keepdim=True, correction=0)
    varies = ~_is_constant(x, dim).view(_along(x, dim))
    return torch.where(varies, (x - mean) * torch.rsqrt(var), torch.zeros_like(x))


def _along(x: Tensor, dim: int) -> list[int]:
    return [-1 if d == dim else 1 for d in range(x.dim())]


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value)
    )


def _flat(values: list[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def _restore(training: Mapping[nn.Module, bool]) -> None:
    for module, flag in training.items():
        module.training = flag
