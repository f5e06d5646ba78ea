"""Post-shifted normalization layers, and conversion from and to plain ones.

psBN (Zhou et al., "How Does BN Increase Collapsed Neural Network Filters?",
arXiv 2001.11216, Eq. 6) is batch normalization plus a constant:

    y = gamma * (x - mean) / sqrt(var + eps) + beta + alpha,    alpha > 0

Its functions are those of BN; what differs is where weight decay pulls. It
takes beta, not beta + alpha, to zero, so a filter that ReLU has silenced decays
toward y = alpha > 0 and fires again, where a BN filter decays toward y = 0 and
is lost.

Much of the ecosystem treats whatever is a ``_BatchNorm`` as
``(weight, bias, running_mean, running_var, eps)``: it fuses, freezes, exports
and copies these. ``bias`` is therefore what the layer adds, ``beta + alpha``,
so that every such reader gets the function that the layer computes; the trained
parameter is called ``beta``. A state dict holds ``beta`` and ``alpha`` and no
``bias``, so those of BN and psBN cannot be taken for each other.
"""

import math
import sys
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

# torch < 2.3 has none and breaks the graph at the check instead.
_is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)

LOAD_BN = ("preserve", "shift")


def _check_alpha(alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha must be a number, got {alpha!r} ({type(alpha).__name__})")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be finite and not negative (the paper uses 0.1), got {alpha}")
    return float(alpha)


def _check_load_bn(load_bn: Any) -> str:
    if load_bn not in LOAD_BN:
        raise ValueError(f"load_bn must be one of {LOAD_BN}, got {load_bn!r}")
    return load_bn


class _PostShift(nn.Module):
    """What the layers share: parameters, ``bias``, checkpoints, tracing.

    A mixin in front of one of torch's normalization layers, whose ``forward``
    reads ``weight`` and ``bias``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float = 0.1,
        load_bn: str = "preserve",
    ) -> None:
        name = type(self).__name__
        if not affine:
            raise ValueError(
                f"{name} needs affine=True: without a trained beta there is nothing for weight "
                f"decay to pull toward alpha; use the plain layer"
            )
        alpha, load_bn = _check_alpha(alpha), _check_load_bn(load_bn)
        # Not affine for the base class, which would make `bias` a parameter.
        super().__init__(
            num_features, eps, momentum, False, track_running_stats, device=device, dtype=dtype
        )
        del self._parameters["bias"]
        self.affine = True
        self.initial_alpha = alpha
        self.load_bn = load_bn
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("alpha", torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma = 1, beta = 0, alpha as constructed, running statistics of N(0, 1)."""
        self.reset_running_stats()
        if self.affine:  # not yet when the base class calls
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.beta)
            self.alpha.fill_(self.initial_alpha)

    @property
    def bias(self) -> Tensor:
        """``beta + alpha``, what the layer adds; a new tensor at each reading."""
        if not torch.jit.is_scripting():
            _refuse_sync_conversion()
        return self.beta + self.alpha

    def __call__(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return _call_as_leaf(self, input)
        return super().__call__(input)

    def extra_repr(self) -> str:
        alpha = self.initial_alpha if self.alpha.is_meta else round(float(self.alpha), 7)
        return f"{super().extra_repr()}, alpha={alpha}, load_bn={self.load_bn}"

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Take over a psBN or a plain BN state dict.

        From BN, ``beta = bias - alpha`` (``load_bn='preserve'``: the network
        computes what it computed) or ``beta = bias`` (``'shift'``: every unit
        is lifted by alpha). From psBN with another alpha, beta is rebased so
        that ``beta + alpha`` stays. The layer's own alpha always stays.
        """
        name = prefix.rstrip(".") or type(self).__name__
        bias = state_dict.get(prefix + "bias")
        beta = state_dict.get(prefix + "beta")
        saved = state_dict.get(prefix + "alpha")
        if bias is not None and (beta is not None or saved is not None):
            raise RuntimeError(
                f"{name}: the checkpoint holds both a bias (BN) and a beta or alpha (psBN), so "
                "what it computed is unknown; keep one of the two"
            )
        if (beta is None) != (saved is None):
            raise RuntimeError(
                f"{name}: the checkpoint holds only one of beta and alpha, so what it computed is "
                "unknown; save it with state_dict(), which holds both"
            )
        alpha = self.alpha
        if alpha.is_meta:
            alpha = torch.tensor(self.initial_alpha, dtype=alpha.dtype)
        if bias is not None:
            del state_dict[prefix + "bias"]
            beta = bias if self.load_bn == "shift" else self._rebased(bias, 0, alpha)
        elif beta is not None:
            if not torch.isfinite(saved).all():
                raise RuntimeError(
                    f"{name}: the checkpoint's alpha is {saved}, not a finite number"
                )
            beta = self._rebased(beta, saved, alpha)
        if beta is not None:
            state_dict[prefix + "beta"] = beta
            state_dict[prefix + "alpha"] = alpha
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _rebased(self, beta: Tensor, old: Tensor | float, new: Tensor) -> Tensor:
        """A beta whose sum with ``new`` is what its sum with ``old`` was, rounded once."""
        dtype = torch.promote_types(beta.dtype, self.beta.dtype)
        shift = float(old) - float(new)
        return beta.to(dtype) + shift if shift else beta


def _refuse_sync_conversion() -> None:
    """Raise if ``bias`` is read in order to build a plain SyncBatchNorm from it.

    torch's and mmengine's ``convert_sync_batchnorm`` would end in a TypeError
    that speaks of tensors and parameters and says no way out.
    """
    if _is_compiling():
        return
    if sys._getframe(2).f_code.co_name == "convert_sync_batchnorm":
        raise TypeError(
            "a psBN layer cannot become a SyncBatchNorm, which would lose alpha: use psSyncBN "
            "(norm_cfg=dict(type='psSyncBN') instead of sync_bn=..., or "
            "to_psbn(nn.SyncBatchNorm.convert_sync_batchnorm(to_bn(model))))"
        )


def _call_as_leaf(module: _PostShift, proxy: torch.fx.Proxy) -> torch.fx.Proxy:
    """Record a call of the module itself, as fx does with torch's own layers.

    Stepping into it would freeze ``self.training`` as it is while tracing, and
    the traced network would then normalize by batch statistics in eval mode.
    """
    target = proxy.tracer.path_of_module(module)
    return proxy.tracer.create_proxy("call_module", target, (proxy,), {})


class psBN1d(_PostShift, nn.BatchNorm1d, _BatchNorm):
    """Post-shifted batch normalization over (N, C) or (N, C, L); see :class:`psBN2d`."""


# _BatchNorm stands among the direct bases because mmengine's init_cfg with
# layer='_BatchNorm' looks at the names of direct bases only.
class psBN2d(_PostShift, nn.BatchNorm2d, _BatchNorm):
    r"""Post-shifted batch normalization over (N, C, H, W) (arXiv 2001.11216, Eq. 6).

    .. math::
        y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \alpha

    Parameters ``weight`` (gamma, initially 1) and ``beta`` (initially 0), shape
    (C,); buffers ``alpha`` (0-dim) and BN's own. ``bias`` is the read-only sum
    ``beta + alpha``: writing into it in place, as ``nn.init.constant_(m.bias,
    0)`` does, writes into a temporary and changes nothing.

    Without weight decay on ``beta`` the layer trains as BN does. Rules of
    mmengine that match the name ``bias`` do not see ``beta``;
    ``norm_decay_mult`` does.

    Args:
        num_features: C.
        eps, momentum, track_running_stats, device, dtype: As in
            ``nn.BatchNorm2d``.
        affine: Must be True.
        alpha: The shift. 0.1 worked across the paper's tasks; 0 is BN.
        load_bn: What loading a BN state dict means: ``'preserve'`` (beta =
            bias - alpha, the network computes what it computed) or ``'shift'``
            (beta = bias, every unit lifted by alpha).

    Raises:
        TypeError: ``alpha`` is no number.
        ValueError: ``alpha`` is negative or not finite, ``affine`` is False,
            or ``load_bn`` is unknown.
    """


psBN = psBN2d


class psBN3d(_PostShift, nn.BatchNorm3d, _BatchNorm):
    """Post-shifted batch normalization over (N, C, D, H, W); see :class:`psBN2d`."""


class psSyncBN(_PostShift, _BatchNorm):
    """psBN with statistics over all processes of a group, for (N, C, ...).

    In training, within an initialised process group of more than one process,
    value, gradients and running statistics are those of psBN on the
    concatenated batch; a process may hold a different number of samples, or
    none. Otherwise it is psBN. CUDA (and every device that
    ``nn.SyncBatchNorm`` takes) runs torch's fused kernels, CPU a differentiable
    path over any backend, gloo included.

    Not an ``nn.SyncBatchNorm``: ``mmengine.model.revert_sync_batchnorm``, which
    every non-distributed Runner calls, would turn it into plain BN.

    Args:
        process_group: Whom to synchronise with; default all processes.
        num_features, eps, momentum, affine, track_running_stats, device, dtype,
            alpha, load_bn: As in :class:`psBN2d`.
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
        if torch.jit.is_scripting():
            assert not self.training, "a scripted psSyncBN cannot synchronise: script it in eval()"
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        else:  # or the compiler would look into what it cannot compile
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        together = self.training and dist.is_available() and dist.is_initialized()
        if not together or dist.get_world_size(self.process_group) == 1:
            return _BatchNorm.forward(self, input)
        if input.device.type == "cpu":
            return self._forward_on_cpu(input)
        return nn.SyncBatchNorm.forward(self, input)

    def _forward_on_cpu(self, input: Tensor) -> Tensor:
        """Eq. 6 with mean and variance over the group; two all-reduces each way."""
        # Here, since not every build of torch has the distributed package.
        from torch.distributed.nn.functional import all_reduce

        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        group = self.process_group or dist.group.WORLD
        x = input if input.dtype == torch.float64 else input.float()
        dims = [d for d in range(x.dim()) if d != 1]
        per_channel = [-1 if d == 1 else 1 for d in range(x.dim())]

        # In float64: the count stays exact, and sums of different processes
        # round as one sum would.
        local = x.sum(dims, dtype=torch.float64)
        count = local.new_full((1,), x.numel() // x.size(1))
        total = all_reduce(torch.cat([local, count]), group=group)
        count = total[-1].detach()
        if count <= 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got "
                f"{int(count)} over all processes"
            )
        mean = total[:-1] / count
        centred = x - mean.to(x.dtype).view(per_channel)
        squares = centred.square().sum(dims, dtype=torch.float64)
        var = all_reduce(squares, group=group) / count

        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:  # the average over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
            with torch.no_grad():
                unbiased = var * (count / (count - 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)

        scale = self.weight * torch.rsqrt(var + self.eps).to(x.dtype)
        y = centred * scale.view(per_channel) + self.bias.view(per_channel)
        return y.to(input.dtype)


class _PostShiftIN(_PostShift):
    """The mixin with InstanceNorm's own default: statistics of the instance at all times."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)


class psIN1d(_PostShiftIN, nn.InstanceNorm1d, _InstanceNorm):
    """Post-shifted instance normalization over (N, C, L); see :class:`psIN2d`."""


class psIN2d(_PostShiftIN, nn.InstanceNorm2d, _InstanceNorm):
    """Post-shifted instance normalization over (N, C, H, W).

    Eq. 6 with mean and variance of each sample's plane; the paper's section 3.4
    finds collapse with instance normalization too. Arguments as in
    :class:`psBN2d`, but ``track_running_stats`` is False by default as in
    ``nn.InstanceNorm2d``.
    """


psIN = psIN2d


class psIN3d(_PostShiftIN, nn.InstanceNorm3d, _InstanceNorm):
    """Post-shifted instance normalization over (N, C, D, H, W); see :class:`psIN2d`."""


_TO_PS: dict[type[nn.Module], type[_PostShift]] = {
    nn.BatchNorm1d: psBN1d,
    nn.BatchNorm2d: psBN2d,
    nn.BatchNorm3d: psBN3d,
    nn.SyncBatchNorm: psSyncBN,
    nn.InstanceNorm1d: psIN1d,
    nn.InstanceNorm2d: psIN2d,
    nn.InstanceNorm3d: psIN3d,
}
_TO_PLAIN = {ps: plain for plain, ps in _TO_PS.items()}


def to_psbn(model: nn.Module, alpha: float = 0.1, load_bn: str = "preserve") -> nn.Module:
    """Turn every BatchNorm and InstanceNorm of a model into its post-shifted twin.

    In place: each layer keeps its identity (shared layers stay shared, hooks
    stay), its ``weight`` and running statistics, ``training`` flag, dtype and
    device; ``bias`` becomes ``beta = bias - alpha`` with the same
    ``requires_grad``, so the function is preserved up to one rounding of
    beta + alpha. Convert before an optimizer or DistributedDataParallel is made,
    since both hold on to the old biases. Layers without a trained bias
    (``affine=False``, ``bias=False``) have nothing to shift and stay; layers
    that are post-shifted already are rebased to ``alpha``.

    Args:
        model: Any module; may be a normalization layer itself.
        alpha: The shift, see :class:`psBN2d`.
        load_bn: ``'preserve'``, or ``'shift'`` for ``beta = bias``. Also what
            the new layers do when a BN state dict is loaded later.

    Returns:
        The same ``model``.

    Raises:
        TypeError: A layer is a subclass whose own behaviour would be lost, a
            lazy layer, or the model is scripted or wrapped for distributed
            training. Nothing has been changed then.
        ValueError: A wrong ``alpha`` or ``load_bn``, or no layer to convert.
    """
    alpha, load_bn = _check_alpha(alpha), _check_load_bn(load_bn)
    _refuse_wrapped(model)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, _PostShift) or type(module) in _TO_PS:
            if module.weight is not None and module.bias is not None:
                found.append(module)
        elif isinstance(module, _BatchNorm | _InstanceNorm) and module.bias is not None:
            raise TypeError(
                f"{name or 'the model'} is a {type(module).__name__}, a kind of normalization that "
                "has no post-shifted twin; replace it by torch's own layer (materialised, if lazy) "
                "before to_psbn"
            )
    if not found:
        raise ValueError("the model has no BatchNorm or InstanceNorm with a trained bias")
    betas: dict[nn.Parameter, nn.Parameter] = {}  # tied biases become tied betas
    for module in found:
        new = torch.tensor(alpha, dtype=module.weight.dtype)  # as the layer will hold it
        if isinstance(module, _PostShift):
            source, shift = module.beta, float(module.alpha) - float(new)
        else:
            source, shift = module._parameters.pop("bias"), -float(new)
            module.__class__ = _TO_PS[type(module)]
            if load_bn == "shift":
                shift = 0.0
        if source not in betas:
            betas[source] = nn.Parameter(source.detach() + shift, source.requires_grad)
        module.beta = betas[source]
        module.register_buffer("alpha", new.to(module.weight.device))
        module.initial_alpha = alpha
        module.load_bn = load_bn
    return model


def to_bn(model: nn.Module) -> nn.Module:
    """Turn every post-shifted layer of a model into torch's plain one.

    In place, as :func:`to_psbn`; ``bias = beta + alpha``, exactly what the
    layer added. What remains needs nothing of this package. A model without
    post-shifted layers is returned as it is.

    Raises:
        TypeError: A layer is a subclass whose own behaviour would be lost, or
            the model is scripted or wrapped for distributed training. Nothing
            has been changed then.
    """
    _refuse_wrapped(model)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, _PostShift)]
    for name, module in found:
        if type(module) not in _TO_PLAIN:
            raise TypeError(
                f"{name or 'the model'} is a {type(module).__name__}, a subclass of a post-shifted "
                "layer that has no plain twin; replace it by hand before to_bn"
            )
    biases: dict[nn.Parameter, nn.Parameter] = {}
    for _, module in found:
        bias = module.bias.detach()
        beta = module._parameters.pop("beta")
        if beta not in biases:
            biases[beta] = nn.Parameter(bias, beta.requires_grad)
        for name in ("initial_alpha", "load_bn"):
            delattr(module, name)
        del module._buffers["alpha"]
        module.__class__ = _TO_PLAIN[type(module)]
        module.bias = biases[beta]
    return model


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if "ScriptModule" in kinds:
            raise TypeError(
                f"{name or 'the model'} is scripted: convert the model before scripting"
            )
        if kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}:
            raise TypeError(
                f"{name or 'the model'} is a {type(module).__name__}, which holds on to its "
                "parameters: convert the model before wrapping it"
            )
