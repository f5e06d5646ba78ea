"""Post-shifted normalization layers.

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

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .bias import Bias

# torch < 2.3 has none and breaks the graph at the check instead.
_is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)

_TAKES_THE_PLACE_OF_BN = (
    "it takes the place of a BatchNorm, not of a GroupNorm or LayerNorm; for a network with these "
    "keep its norm_cfg and convert its BatchNorms with to_psbn, in a config with "
    "model.type=psbn_mmdet.ToPsBN model.of=MODEL"
)
LOAD_BN = ("preserve", "shift")


def check_alpha(alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha must be a number, got {alpha!r} ({type(alpha).__name__})")
    value = float(alpha)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"alpha must be finite and not negative (the paper uses 0.1), got {alpha}")
    return value


def check_load_bn(load_bn: Any) -> str:
    if load_bn not in LOAD_BN:
        raise ValueError(f"load_bn must be one of {LOAD_BN}, got {load_bn!r}")
    return load_bn


def rebase(
    beta: Tensor, old: Tensor | float, new: Tensor | float, dtype: torch.dtype | None = None
) -> Tensor:
    """The beta whose sum with the shift ``new`` is what its sum with ``old`` was.

    ``beta + (old - new)``: from BN to psBN ``old`` is 0, from one alpha to another both are theirs.
    The difference is taken in float64 and the sum rounded to the result's dtype, so ``bias = beta +
    new`` is the old one up to a unit in the last place of the largest number involved. Where both
    shifts are equal the bits of beta are kept.

    Args:
        beta: Shape (C,).
        old, new: Shifts as the layers hold them: a 0-dim buffer, rounded to the layer's dtype.
        dtype: Do it in this dtype if it is the wider one; a float16 checkpoint then loads into a
            float32 layer without being rounded again.
    """
    dtype = torch.promote_types(beta.dtype, dtype or beta.dtype)
    shift = float(old) - float(new)
    return beta.to(dtype) + shift if shift else beta


class PostShift(nn.Module):
    """What the layers share: parameters, ``bias``, checkpoints, tracing.

    A mixin in front of one of torch's normalization layers, whose ``forward``
    reads ``weight`` and ``bias``.
    """

    if TYPE_CHECKING:  # TorchScript would read them and knows no annotation that is not evaluated
        weight: nn.Parameter
        beta: nn.Parameter
        alpha: Tensor
        reset_running_stats: Callable[[], None]

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
        **unknown: Any,
    ) -> None:
        name = type(self).__name__
        if unknown:
            raise TypeError(f"{name} does not take {', '.join(unknown)}: {_TAKES_THE_PLACE_OF_BN}")
        if not affine:
            raise ValueError(
                f"{name} needs affine=True: without a trained beta there is nothing for weight "
                f"decay to pull toward alpha; use the plain layer"
            )
        alpha, load_bn = check_alpha(alpha), check_load_bn(load_bn)
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
        """Set gamma = 1, beta = 0, alpha as constructed, running statistics of N(0, 1)."""
        self.reset_running_stats()
        if self.affine:  # not yet when the base class calls
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.beta)
            self.alpha.fill_(self.initial_alpha)

    @property
    def bias(self) -> Tensor:
        """``beta + alpha``, what the layer adds; see :class:`Bias` for writing into it."""
        if torch.jit.is_scripting():
            return self.beta + self.alpha
        else:  # or the compiler would look into what it cannot compile
            return _bias_for_reader(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and isinstance(value, Bias) and value._origin.layer is self:
            return  # the end of `layer.bias += ...`, which has been passed on to beta
        super().__setattr__(name, value)

    def __call__(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return _call_as_leaf(self, input)
        return super().__call__(input)

    def extra_repr(self) -> str:
        alpha = self.initial_alpha if self.alpha.is_meta else round(float(self.alpha), 7)
        return f"{super().extra_repr()}, alpha={alpha}, load_bn={self.load_bn}"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        """Take over a psBN or a plain BN state dict.

        From BN, ``beta = bias - alpha`` (``load_bn='preserve'``: the network
        computes what it computed) or ``beta = bias`` (``'shift'``: every unit
        is lifted by alpha). From psBN with another alpha, beta is rebased so
        that ``beta + alpha`` stays. The layer's own alpha always stays, with ``assign`` in
        the dtype and on the device of the checkpoint, as all other tensors.
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
        alpha, dtype = self.alpha, self.beta.dtype
        if alpha.is_meta:
            alpha = torch.tensor(self.initial_alpha, dtype=alpha.dtype)
        loaded = beta if bias is None else bias
        if loaded is not None and local_metadata.get("assign_to_params_buffers", False):
            alpha, dtype = alpha.to(loaded.device, loaded.dtype), loaded.dtype
        if bias is not None:
            del state_dict[prefix + "bias"]
            beta = bias if self.load_bn == "shift" else rebase(bias, 0, alpha, dtype)
        elif beta is not None:
            if saved.numel() != 1 or not torch.isfinite(saved).all():
                raise RuntimeError(
                    f"{name}: the checkpoint's alpha is {saved.tolist()}, not a finite number"
                )
            beta = rebase(beta, saved, alpha, dtype)
        if beta is not None:
            state_dict[prefix + "beta"] = beta
            state_dict[prefix + "alpha"] = alpha
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


# Where the layers' own forward stands: it reads a plain sum and pays nothing for others' writes.
_FORWARD = {"torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm", f"{__package__}.sync"}


def _bias_for_reader(layer: PostShift) -> Tensor:
    """A plain sum for the layer's forward and whoever records a graph, else a :class:`Bias`.

    Raises:
        TypeError: It is read in order to build a plain SyncBatchNorm from it.
            ``convert_sync_batchnorm`` of torch and mmengine would end in an error that speaks of
            tensors and parameters and says no way out.
    """
    if _is_compiling() or torch.jit.is_tracing():
        return layer.beta + layer.alpha
    reader = sys._getframe(2)
    if reader.f_code.co_name == "convert_sync_batchnorm":
        raise TypeError(
            "a psBN layer cannot become a SyncBatchNorm, which would lose alpha: use psSyncBN "
            "(norm_cfg=dict(type='psSyncBN') instead of sync_bn=..., or "
            "to_psbn(nn.SyncBatchNorm.convert_sync_batchnorm(to_bn(model))))"
        )
    if reader.f_globals.get("__name__") in _FORWARD:
        return layer.beta + layer.alpha
    return Bias.of(layer)


def _call_as_leaf(module: PostShift, proxy: torch.fx.Proxy) -> torch.fx.Proxy:
    """Record a call of the module itself, as fx does with torch's own layers.

    Stepping into it would freeze ``self.training`` as it is while tracing, and
    the traced network would then normalize by batch statistics in eval mode.
    """
    tracer: Any = proxy.tracer
    target = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", target, (proxy,), {})


class psBN1d(PostShift, nn.BatchNorm1d, _BatchNorm):  # type: ignore[misc]
    """Post-shifted batch normalization over (N, C) or (N, C, L); see :class:`psBN2d`."""


# _BatchNorm stands among the direct bases because mmengine's init_cfg with
# layer='_BatchNorm' looks at the names of direct bases only.
class psBN2d(PostShift, nn.BatchNorm2d, _BatchNorm):  # type: ignore[misc]
    r"""Post-shifted batch normalization over (N, C, H, W) (arXiv 2001.11216, Eq. 6).

    .. math::
        y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \alpha

    Parameters ``weight`` (gamma, initially 1) and ``beta`` (initially 0), shape
    (C,); buffers ``alpha`` (0-dim) and BN's own. ``bias`` is the sum ``beta +
    alpha``. Writing into it, as ``m.bias.data.mul_(mask)`` does, sets beta to
    what was written minus alpha; functions of ``torch.nn.init`` initialise beta
    itself, so ``nn.init.constant_(m.bias, 0)`` is the start of psBN. Writes within
    compiled or traced code and through other libraries' kernels are not seen.

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

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            # In the place of a LayerNorm (Swin, PVT) it gets (N, L, C).
            raise ValueError(
                f"expected 4D input (got {input.dim()}D input): a psBN2d takes the place of a "
                "BatchNorm2d, not of a LayerNorm; for a network with LayerNorm keep its norm_cfg "
                "and convert its BatchNorms with to_psbn, in a config with "
                "model.type=psbn_mmdet.ToPsBN model.of=MODEL"
            )


psBN = psBN2d


class psBN3d(PostShift, nn.BatchNorm3d, _BatchNorm):  # type: ignore[misc]
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
