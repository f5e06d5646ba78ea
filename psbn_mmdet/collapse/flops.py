"""How many FLOPs removing filters saves, in any network, without tracing a graph.

The network is run on random input, as a probe of how channels connect: every
normalization layer gives standardised values in its live channels and 0 in its
removed ones, and whatever follows (addition, concatenation, pooling) does with
that what it does. A channel that arrives at a convolution constant over batch
and plane carries nothing, so it can go; it is set to 0 there, as its
contribution is one to the bias (at a padded border only about so). A second run
without removed filters shows which channels are constant anyway (as the initial
queries of a DETR are); these stay.

Values are standardised because gamma, bias and running statistics of a trained
network on random input could silence channels that are alive on its data. Only
the wiring counts here.

torch's ``FlopCounterMode`` counts whole operators, so that convolutions and
linear layers are counted here, with the channels that are active in each call;
it gives what is computed outside of these modules (the products of attention).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .criteria import MeasureError
from .detectors import ways_to_call


@dataclass(frozen=True)
class Flops:
    """Multiply-accumulates of a network.

    ``total``, and ``remaining`` when the filters are removed: per sample if the
    input was given by its size, else of the whole call. ``rows`` has ``name``,
    ``total``, ``remaining`` of each convolution and linear layer in order of its
    first use. ``elsewhere``, a part of both, is what is multiplied outside of
    them and stays as it is.
    """

    total: int
    remaining: int
    rows: tuple[dict[str, Any], ...] = field(repr=False, default=())
    elsewhere: int = 0

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
    if not isinstance(weight, Tensor) or nn.parameter.is_lazy(weight):
        return 0
    if weight.dim() >= 3 and hasattr(module, "kernel_size"):
        return getattr(module, "out_channels", 0)
    return 0


def probe(
    model: nn.Module,
    live: Mapping[nn.Module, Tensor],
    inputs: tuple[int, ...] | Callable[[nn.Module], Any],
) -> Flops:
    """Count multiply-accumulates with and without some filters.

    Removed are: each filter whose every use is a normalization layer in which it
    is not live, and each input channel that is constant because of that. A live
    filter that only feeds removed ones stays, as the measure is what the
    collapsed filters themselves cost. Of what is not a convolution or linear
    module that is called, nothing can be removed. Nothing of the model is
    changed, and no global random state is used.

    Where the work depends on the values (the number of proposals of a two-stage
    detector), it is that of the run without removed filters.

    Args:
        model: Any module, on any device.
        live: For normalization layers of the model, which filters stay: (C,)
            bool. Others count as live.
        inputs: Size of one input without the batch, as (3, 800, 1333), with
            which ``model(x)`` is called, or a detector of mmdet with data samples
            of its own; or a function that calls the model it is given, with at
            least two different samples.

    Raises:
        MeasureError: The model cannot be called with that size, ran no
            convolution or linear layer, or computed values that are not finite.
    """
    samples = 1 if callable(inputs) else 2  # what is 1x1 in the plane must vary over the batch
    kept = {module: torch.ones_like(mask) for module, mask in live.items()}
    if callable(inputs):
        call = inputs
        whole = _run(model, kept, call)
    else:
        call, whole = _run_by_size(model, kept, inputs, samples)
    if not whole.calls:
        raise MeasureError("the model ran no convolution or linear layer, so there are no FLOPs")
    pruned = whole if all(mask.all() for mask in live.values()) else _run(model, live, call)
    rows: dict[str, dict[str, Any]] = {}
    for name, calls in whole.calls.items():
        row = rows[name] = {"name": name, "total": 0, "remaining": 0}
        # A call that only the first run made is taken to be like the last of the second.
        others = pruned.calls.get(name, calls)
        for i, each in enumerate(calls):
            total, remaining = each.macs(others[min(i, len(others) - 1)])
            row["total"] += total // samples
            row["remaining"] += remaining // samples
    elsewhere = whole.elsewhere // samples
    return Flops(
        sum(row["total"] for row in rows.values()) + elsewhere,
        sum(row["remaining"] for row in rows.values()) + elsewhere,
        tuple(rows.values()),
        elsewhere,
    )


@dataclass
class _Run:
    """The calls of each convolution in order, and multiply-accumulates outside of them."""

    calls: dict[str, list[_Call]]
    elsewhere: int


def _run_by_size(
    model: nn.Module, live: Mapping[nn.Module, Tensor], size: tuple[int, ...], samples: int
) -> tuple[Callable[[nn.Module], Any], _Run]:
    """The first way to call the model with inputs of a size that works, and that run."""
    if not size or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise MeasureError(
            f"the size of an input is positive whole numbers, as (3, 800, 1333), got {size!r}"
        )
    reference = next(model.parameters())
    x = torch.randn(samples, *size, generator=torch.Generator().manual_seed(0))
    for call in ways_to_call(model, x.to(reference.device, reference.dtype)):
        try:
            return call, _run(model, live, call)
        except MeasureError:
            raise
        except Exception as caught:  # whatever a forward() raises
            error = caught
    reason = " ".join(str(error).split())
    raise MeasureError(
        f"the model cannot be called with an input of size {tuple(size)}: "
        f"{type(error).__name__}: {reason[:200]}; give another size, or a function that calls it"
    ) from error


def _run(
    model: nn.Module, live: Mapping[nn.Module, Tensor], call: Callable[[nn.Module], Any]
) -> _Run:
    training = {module: module.training for module in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    calls: dict[str, list[_Call]] = defaultdict(list)
    counter = FlopCounterMode(display=False, custom_mapping=_FLOPS_OF_OTHERS)
    within = _Within(counter)
    with ExitStack() as stack:
        stack.callback(_restore, training, trained)
        model.eval()
        for parameter in trained:  # a view given to a module: FlopCounterMode would want its graph
            parameter.requires_grad = False
        for name, module in model.named_modules():
            if module in live:
                hooks = _norm_hooks(live[module], within)
            elif filters_of(module):
                hooks = _conv_hooks(name, module, calls[name], within)
            else:
                continue
            stack.callback(module.register_forward_pre_hook(hooks[0], with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(hooks[1]).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(0)  # what the model draws is the same in each run
        stack.enter_context(counter)
        stack.enter_context(_Readers(within))
        call(model)
    return _Run(
        {name: each for name, each in calls.items() if each},
        (counter.get_total_flops() - within.counted) // 2,
    )


def _attention_flops(query, key, value, *args: Any, **kwargs: Any) -> int:
    """Of the two products, for shapes (B, heads, positions, channels)."""
    products = query[2] * key[2] * (query[3] + value[3])
    return 2 * query[0] * query[1] * products


# The attention of the CPU, which FlopCounterMode does not know.
_FLOPS_OF_OTHERS = {
    getattr(torch.ops.aten, name): _attention_flops
    for name in ("_scaled_dot_product_flash_attention_for_cpu",)
    if hasattr(torch.ops.aten, name)
}


class _Within:
    """Whether a normalization layer is being run, and the FLOPs counted in convolutions."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.norms = 0
        self.counted = 0
        self._counter = counter
        self._convs = 0

    def enter_conv(self) -> None:
        if self._convs == 0:
            self._start = self._counter.get_total_flops()
        self._convs += 1

    def leave_conv(self) -> None:
        self._convs -= 1
        if self._convs == 0:
            self.counted += self._counter.get_total_flops() - self._start


class _Call:
    """One call of a convolution: its shape, and who read what it put out."""

    def __init__(self, conv: Any, inputs: Tensor, active_in: Tensor) -> None:
        self.groups = getattr(conv, "groups", 1)
        self.kernel = 1 if isinstance(conv, nn.Linear) else conv.weight.shape[2:].numel()
        self.filters = filters_of(conv)
        self.positions = inputs.numel() // max(len(active_in), 1)
        self.counts_output = not getattr(conv, "transposed", False)
        self.active_in = active_in
        self.removed_by: list[Tensor] = []
        self.read_elsewhere = False

    def macs(self, pruned: _Call) -> tuple[int, int]:
        """Multiply-accumulates of this call, and those left in the same one when pruned."""
        active_in = pruned.active_in | ~self.active_in
        active_out = torch.ones(self.filters, dtype=torch.bool, device=active_in.device)
        if pruned.removed_by and not pruned.read_elsewhere:
            active_out = ~torch.stack(pruned.removed_by).all(0)
        n_in = active_in.view(self.groups, -1).sum(1)
        n_out = active_out.view(self.groups, -1).sum(1)
        each = self.positions * self.kernel
        total = len(active_in) * self.filters // self.groups
        return each * total, each * int((n_in * n_out).sum())


class _Readers(TorchFunctionMode):
    """Notes which outputs of convolutions are read by anything but a normalization layer."""

    def __init__(self, within: _Within) -> None:
        super().__init__()
        self.within = within

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.within.norms == 0 and _tensors(result):
            for value in (*args, *kwargs.values()):
                for tensor in _tensors(value):
                    if call := getattr(tensor, "_probe_call", None):
                        call.read_elsewhere = True
        return result


def _conv_hooks(
    name: str, conv: Any, calls: list[_Call], within: _Within
) -> tuple[Callable, Callable]:
    """Hooks of a convolution of one input or of a list of them (as TridentNet's)."""
    linear = isinstance(conv, nn.Linear)
    unbatched = 1 if linear else conv.weight.dim() - 1
    running: list[list[_Call]] = []

    def channel_dim(x: Tensor) -> int:
        return x.dim() - 1 if linear else int(x.dim() > unbatched)

    def before(module, args, kwargs):
        key = None if args else next(iter(kwargs))
        given = args[0] if args else kwargs[key]
        running.append([])
        masked = []
        for x in _tensors(given):
            dim = channel_dim(x)
            active = ~_is_constant(x, dim)
            running[-1].append(_Call(module, x, active))
            masked.append(x * active.view(_along(x, dim)))
        masked = masked[0] if isinstance(given, Tensor) else type(given)(masked)
        within.enter_conv()
        return ((masked, *args[1:]), kwargs) if args else (args, {**kwargs, key: masked})

    def after(module, args, output):
        within.leave_conv()
        standardised = []
        # A convolution may leave inputs of a list out.
        for call, y in zip(running.pop(), _tensors(output)):
            if not torch.isfinite(y).all():
                raise MeasureError(
                    f"{name} computes values that are not finite, so that FLOPs cannot be "
                    "counted: its weights are damaged or the training has diverged"
                )
            dim = channel_dim(y)
            if call.counts_output:
                call.positions = y.numel() // y.shape[dim]
            y = _standardised(y, dim)
            y._probe_call = call
            calls.append(call)
            standardised.append(y)
        return standardised[0] if isinstance(output, Tensor) else type(output)(standardised)

    return before, after


_UNBATCHED_DIMS = {nn.InstanceNorm1d: 2, nn.InstanceNorm2d: 3, nn.InstanceNorm3d: 4}
"""Dimensions of an input without a batch; other normalization layers take none such."""


def _norm_hooks(live: Tensor, within: _Within) -> tuple[Callable, Callable]:
    outputs: list[Tensor] = []

    def before(module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        if call := getattr(x, "_probe_call", None):
            call.removed_by.append(~live.to(x.device))
        within.norms += 1
        unbatched = [n for kind, n in _UNBATCHED_DIMS.items() if isinstance(module, kind)]
        dim = 0 if x.dim() in unbatched else 1
        outputs.append(_standardised(x, dim) * live.to(x.device).view(_along(x, dim)))

    def after(module, args, output):
        within.norms -= 1
        return outputs.pop()

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


def _tensors(value: Any) -> list[Tensor]:
    """A tensor, or the tensors of a list or tuple."""
    if isinstance(value, Tensor):
        return [value]
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, (tuple, list)) else []


def _restore(training: Mapping[nn.Module, bool], trained: Sequence[nn.Parameter]) -> None:
    for module, flag in training.items():
        module.training = flag
    for parameter in trained:
        parameter.requires_grad = True
