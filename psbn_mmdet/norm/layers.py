"""Post-shifted normalization layers.

psBN (Zhou et al., "How Does BN Increase Collapsed Neural Network Filters?",
arXiv 2001.11216, Eq. 6) is batch normalization plus a constant::

    y = gamma * (x - mean) / sqrt(var + eps) + beta + alpha,    alpha > 0

Its functions are those of BN; what differs is where weight decay pulls. It
takes beta, not beta + alpha, to zero, so a filter that ReLU has silenced decays
toward y = alpha > 0 and fires again, where a BN filter decays toward y = 0 and
is lost.

Much of the ecosystem treats whatever is a ``_BatchNorm`` as
``(weight, bias, running_mean, running_var, eps)``: it fuses, freezes, exports
and copies these. ``bias`` is therefore what the layer adds, ``beta + alpha``, in the
layer and in its state dict, so that every such reader computes what the layer
computes, with or without this package; the trained parameter is called ``beta``.
What is loaded or written as a ``bias`` is likewise what the layer adds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .bias import Bias

_TAKES_THE_PLACE_OF_BN = (
    "it replaces a BatchNorm, not a GroupNorm or LayerNorm. Keep the norm_cfg "
    "of such a network and convert its BatchNorms with to_psbn, in a config "
    "with model.type=psbn_mmdet.ToPsBN model.of=MODEL"
)
_LOAD_BN_IS_GONE = (
    "layers no longer take load_bn: they preserve what they load. To lift a "
    "network by alpha once, at the start of a training, use to_psbn(model, "
    "shift=True), or in a config custom_hooks=[dict(type='PsBNHook', "
    "shift=True)]"
)


def check_alpha(alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha must be a number, got {alpha!r} ({type(alpha).__name__})")
    value = float(alpha)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"alpha must be finite and not negative (the paper uses 0.1), got {alpha}")
    return value


def rebase(beta: Tensor, old: float, new: float, dtype: torch.dtype | None = None) -> Tensor:
    """The beta whose sum with the shift ``new`` is what its sum with ``old`` was.

    ``beta + (old - new)``: from BN to psBN ``old`` is 0, from one alpha to another both are theirs.
    The difference is taken in float64 and the sum rounded to the result's dtype, so ``bias = beta +
    new`` is the old one up to a unit in the last place of the largest number involved. Where both
    shifts are equal the bits of beta are kept.

    Args:
        beta: Shape (C,).
        old, new: The shifts.
        dtype: Do it in this dtype if it is the wider one; a float16 checkpoint then loads into a
            float32 layer without being rounded again.
    """
    dtype = torch.promote_types(beta.dtype, dtype or beta.dtype)
    return beta.to(dtype) + (old - new) if old != new else beta


def saved_alpha(saved: Tensor, alpha: float) -> float:
    """The number that the ``alpha`` of a state dict stands for.

    Args:
        saved: One number, rounded to the dtype of the file.
        alpha: Of the layer; what rounds to ``saved`` is taken for the same.

    Raises:
        ValueError: It is not one finite number.
    """
    if saved.numel() != 1 or not torch.isfinite(saved).all():
        raise ValueError(f"the checkpoint's alpha is {saved.tolist()}, not a finite number")
    value = float(saved)
    return alpha if value == float(torch.tensor(alpha, dtype=saved.dtype)) else value


def agree(bias: Tensor, beta: Tensor, alpha: float) -> Tensor:
    """Where ``bias`` is ``beta + alpha`` up to rounding, elementwise.

    The bound is four units in the last place of the coarser of both dtypes, at the size of the
    summands: averages and casts of a state dict stay below it.
    """
    eps = max(torch.finfo(bias.dtype).eps, torch.finfo(beta.dtype).eps)
    bias, beta = bias.double(), beta.double()
    close = (bias - beta - alpha).abs() <= 4 * eps * (beta.abs() + abs(alpha))
    return close | (bias.isnan() & beta.isnan())


class PostShift(nn.Module):
    """What the layers share: parameters, ``bias``, checkpoints, tracing.

    A mixin in front of one of torch's normalization layers, whose ``forward``
    reads ``weight`` and ``bias``.
    """

    if TYPE_CHECKING:  # TorchScript would read them and knows no annotation that is not evaluated
        weight: nn.Parameter
        beta: nn.Parameter
        alpha: Tensor
        initial_alpha: float
        preserved: bool
        running_mean: Tensor | None
        running_var: Tensor | None
        num_batches_tracked: Tensor | None
        training: bool
        track_running_stats: bool
        momentum: float | None
        eps: float
        reset_running_stats: Callable[[], None]
        _check_input_dim: Callable[[Tensor], None]

    _version = 3  # 1 and 2 are BN's own; up to 2 a state dict had beta and alpha and no bias

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
        bias: bool = True,
        **unknown: Any,
    ) -> None:
        name = type(self).__name__
        if "load_bn" in unknown:
            raise TypeError(f"{name}: {_LOAD_BN_IS_GONE}")
        if unknown:
            raise TypeError(f"{name} does not take {', '.join(unknown)}: {_TAKES_THE_PLACE_OF_BN}")
        if not (affine and bias):
            raise ValueError(
                f"{name} needs affine=True and a bias: without a trained beta, weight "
                "decay has nothing to pull toward alpha; use the plain layer"
            )
        alpha = check_alpha(alpha)
        # Not affine for the base class, which would make `bias` a parameter.
        super().__init__(
            num_features, eps, momentum, False, track_running_stats, device=device, dtype=dtype
        )
        del self._parameters["bias"]
        self.affine = True
        # What is added is this number. The buffer is its place in state dicts and for whoever goes
        # by a module's tensors (FSDP's loading, export): averages and casts round it, and
        # to_empty() leaves it to chance.
        self.initial_alpha = alpha
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("alpha", torch.tensor(alpha, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gamma = 1, beta = 0, alpha as constructed, running statistics of N(0, 1)."""
        self.reset_running_stats()
        # Whether beta is a BN's bias minus alpha, loaded or written into `bias`, so can be lifted.
        self.preserved = False
        if self.affine:  # not yet when the base class calls
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.beta)
            self.alpha.fill_(self.initial_alpha)

    @property
    def bias(self) -> Tensor:
        """``beta + alpha``, what the layer adds; see :class:`Bias` for writing into it."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.beta + self.initial_alpha
        else:  # or the compiler would look into what it cannot compile
            return Bias.of(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and isinstance(value, Bias) and value._origin.layer is self:
            return  # the end of `layer.bias += ...`, which has been passed on to beta
        super().__setattr__(name, value)

    def __call__(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return _call_as_leaf(self, input)
        return super().__call__(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.initial_alpha:g}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        beta = self.beta if keep_vars else self.beta.detach()
        destination[prefix + "bias"] = beta + self.initial_alpha
        destination[prefix + "alpha"] = self._saved(beta)

    def _saved(self, beta: Tensor) -> Tensor:
        """Alpha as a state dict holds it, beside a beta."""
        return torch.tensor(self.initial_alpha, dtype=beta.dtype, device=beta.device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Take over a psBN or a plain BN state dict; what it computed is preserved.

        **``bias`` is what the layer adds; beta keeps its bits where it agrees.** From BN, ``beta =
        bias - alpha``. From psBN of the same alpha, beta is loaded as it is, of another, rebased.
        In channels where ``bias`` is not ``beta + alpha`` up to rounding, a tool that knows BN has
        changed it: ``bias`` counts, with a warning. Files of before version 3, with ``beta`` and
        ``alpha`` alone, load as they did. The layer's own alpha always stays.

        Raises:
            RuntimeError: Only one of ``beta`` and ``alpha`` is there and no ``bias``, or ``alpha``
                is not a finite number.
        """
        name = prefix.rstrip(".") or type(self).__name__
        bias = state_dict.pop(prefix + "bias", None)
        beta, saved = state_dict.get(prefix + "beta"), state_dict.get(prefix + "alpha")
        if "beta" not in self._parameters:  # pruned or parametrized: it is under other keys
            return super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        try:
            old = None if saved is None else saved_alpha(saved, self.initial_alpha)
        except ValueError as error:
            raise RuntimeError(f"{name}: {error}") from None
        if bias is None and (beta is None) != (saved is None):
            raise RuntimeError(
                f"{name}: the checkpoint holds only one of beta and alpha and no bias, so "
                "the layer's bias is unknown; save it with state_dict(), which holds all "
                "three"
            )
        assign = local_metadata.get("assign_to_params_buffers", False)
        new = self.initial_alpha

        def based(tensor: Tensor, old: float) -> Tensor:
            return rebase(tensor, old, new, tensor.dtype if assign else self.beta.dtype)

        # torch.distributed.checkpoint fills in what it does not find from the module itself.
        from_bn = bias is not None and (beta is None or saved is None or saved is self.alpha)
        if from_bn:
            if hasattr(self.beta, "placements") and not hasattr(bias, "placements"):
                raise RuntimeError(
                    f"{name}: the full state dict of a BN cannot be loaded into shards of "
                    "psBN; convert it first with psbn_mmdet.checkpoint.psbn_state_dict"
                )
            beta = based(bias, 0)
        elif beta is not None and old is not None:
            kept = based(beta, old)
            if _comparable(bias, beta) and not (same := agree(bias, beta, old)).all():
                warnings.warn(
                    f"{name}: in {int((~same).sum())} of {same.numel()} channels of the "
                    "checkpoint bias is not beta + alpha; bias is used, as any BN would",
                    stacklevel=2,
                )
                kept = torch.where(same, kept, based(bias, 0))
            beta = kept
        if beta is not None:
            state_dict[prefix + "beta"] = beta
            state_dict[prefix + "alpha"] = self._saved(beta)
        if assign or not self.beta.is_meta:
            self.preserved = from_bn
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _comparable(bias: Any, beta: Tensor) -> bool:
    """Whether both are there with numbers that this process can see (no shards, no meta)."""
    return (
        all(
            type(t) in (Tensor, nn.Parameter) and not t.is_meta and t.layout == torch.strided
            for t in (bias, beta)
        )
        and bias.shape == beta.shape
    )


def lift(model: nn.Module) -> int:
    """Lift by alpha, in place, what layers have taken over from BN: beta becomes BN's bias.

    The reading ``shift`` of a pretrained BN: every unit of the network starts alpha higher. Layers
    whose beta was constructed, trained or loaded from psBN are where psBN starts and stay.

    Args:
        model: A model with post-shifted layers.

    Returns:
        How many layers were lifted.
    """
    layers = [m for m in model.modules() if isinstance(m, PostShift) and m.preserved]
    with torch.no_grad():
        for beta, alpha in {m.beta: m.initial_alpha for m in layers}.items():
            beta.add_(alpha)
    for layer in layers:
        layer.preserved = False
    return len(layers)


def _call_as_leaf(module: PostShift, proxy: torch.fx.Proxy) -> torch.fx.Proxy:
    """Record a call of the module itself, as fx does with torch's own layers.

    Stepping into it would freeze ``self.training`` as it is while tracing, and the traced network
    would then normalize by batch statistics in eval mode. The tracer's own ``call_module`` is used
    since tracers keep account there of where they are; torchvision's names its nodes by that.
    """
    tracer: Any = proxy.tracer

    def record(*args: Any) -> torch.fx.Proxy:
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})

    return tracer.call_module(module, record, (proxy,), {})


class _PostShiftBN(PostShift):
    """The forward of batch normalization with ``beta + alpha`` in the place of ``bias``."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, (N, C, ...); see :class:`psBN2d`."""
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        tracks = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.beta + self.initial_alpha,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
        )


class psBN1d(_PostShiftBN, nn.BatchNorm1d, _BatchNorm):  # type: ignore[misc]
    """Post-shifted batch normalization over (N, C) or (N, C, L); see :class:`psBN2d`."""


# _BatchNorm stands among the direct bases because mmengine's init_cfg with
# layer='_BatchNorm' looks at the names of direct bases only.
class psBN2d(_PostShiftBN, nn.BatchNorm2d, _BatchNorm):  # type: ignore[misc]
    r"""Post-shifted batch normalization over (N, C, H, W) (arXiv 2001.11216, Eq. 6).

    .. math::
        y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \alpha

    Parameters ``weight`` (gamma, initially 1) and ``beta`` (initially 0), shape
    (C,); buffers ``alpha`` (0-dim) and BN's own. ``bias`` is ``beta + alpha``, what
    the layer adds. Writing into it, as ``nn.init.zeros_(m.bias)`` or
    ``m.bias.data.mul_(mask)`` do, sets beta to what was written minus alpha
    (:class:`.bias.Bias`). So a network whose code sets the biases of its
    BatchNorms to 0 starts as its BN twin does, with ``beta = -alpha``;
    :func:`lift` takes it to ``beta = 0``.

    A state dict holds ``weight``, ``bias``, ``beta``, ``alpha`` and BN's buffers.
    Loading preserves the function, from BN and from psBN of any alpha.

    Without weight decay on ``beta`` the layer trains as BN does. Rules of
    mmengine that match the name ``bias`` do not see ``beta``;
    ``norm_decay_mult`` does.

    Args:
        num_features: C.
        eps, momentum, track_running_stats, device, dtype: As in
            ``nn.BatchNorm2d``.
        affine, bias: Must be True.
        alpha: The shift. 0.1 worked across the paper's tasks; 0 is BN.

    Raises:
        TypeError: ``alpha`` is no number.
        ValueError: ``alpha`` is negative or not finite, or ``affine`` is False.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            # In the place of a LayerNorm (Swin, PVT) it gets (N, L, C).
            raise ValueError(
                f"expected 4D input (got {input.dim()}D input): psBN2d replaces a "
                "BatchNorm2d, not a LayerNorm. Keep the norm_cfg of such a network and "
                "convert its BatchNorms with to_psbn, in a config with "
                "model.type=psbn_mmdet.ToPsBN model.of=MODEL"
            )


psBN = psBN2d


class psBNAct2d(psBN2d):
    """psBN in the place of timm's ``BatchNormAct2d``: its ``drop`` and ``act`` behind it.

    Made by ``to_psbn`` alone, which keeps both modules.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, (N, C, H, W), then drop and activate."""
        return self.act(self.drop(super().forward(input)))


class psBN3d(_PostShiftBN, nn.BatchNorm3d, _BatchNorm):  # type: ignore[misc]
    """Post-shifted batch normalization over (N, C, D, H, W); see :class:`psBN2d`."""


class _PostShiftIN(PostShift):
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

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return F.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.beta + self.initial_alpha,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )


class psIN1d(_PostShiftIN, nn.InstanceNorm1d, _InstanceNorm):  # type: ignore[misc]
    """Post-shifted instance normalization over (N, C, L); see :class:`psIN2d`."""


class psIN2d(_PostShiftIN, nn.InstanceNorm2d, _InstanceNorm):  # type: ignore[misc]
    """Post-shifted instance normalization over (N, C, H, W).

    Eq. 6 with mean and variance of each sample's plane; the paper's section 3.4
    finds collapse with instance normalization too. Arguments as in
    :class:`psBN2d`, but ``track_running_stats`` is False by default as in
    ``nn.InstanceNorm2d``.
    """


psIN = psIN2d


class psIN3d(_PostShiftIN, nn.InstanceNorm3d, _InstanceNorm):  # type: ignore[misc]
    """Post-shifted instance normalization over (N, C, D, H, W); see :class:`psIN2d`."""
