"""Whole models from plain to post-shifted normalization and back, their function preserved."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .activations import without_rectifier
from .layers import (
    PostShift,
    check_alpha,
    lift,
    psBN1d,
    psBN2d,
    psBN3d,
    psBNAct2d,
    psIN1d,
    psIN2d,
    psIN3d,
    rebase,
)
from .recognize import norm_layers
from .sync import psSyncBN

_TO_PS: dict[type[nn.Module], type[PostShift]] = {
    nn.BatchNorm1d: psBN1d,
    nn.BatchNorm2d: psBN2d,
    nn.BatchNorm3d: psBN3d,
    nn.SyncBatchNorm: psSyncBN,
    nn.InstanceNorm1d: psIN1d,
    nn.InstanceNorm2d: psIN2d,
    nn.InstanceNorm3d: psIN3d,
}
_TO_PLAIN = {ps: plain for plain, ps in _TO_PS.items()}
# By name, since neither need be there. mmengine's own (norm_cfg type SyncBN, and what a Runner of
# one process makes of it) are torch's layers but for the check of the number of dimensions.
_TIMM = "timm.layers.norm_act.BatchNormAct2d"
_OTHERS_TO_PS: dict[str, type[PostShift]] = {
    _TIMM: psBNAct2d,
    "mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm": psSyncBN,
    "mmengine.model.utils._BatchNormXd": psSyncBN,
}


def _post_shifted(kind: type[nn.Module]) -> type[PostShift] | None:
    return _TO_PS.get(kind) or _OTHERS_TO_PS.get(f"{kind.__module__}.{kind.__qualname__}")


def _plain(kind: type[nn.Module]) -> type[nn.Module] | None:
    if kind is psBNAct2d:
        module, _, name = _TIMM.rpartition(".")
        return getattr(import_module(module), name)
    return _TO_PLAIN.get(kind)  # type: ignore[arg-type]


def to_psbn(model: nn.Module, alpha: float = 0.1, *, shift: bool = False) -> nn.Module:
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
        alpha: The shift, not negative; 0.1 worked across the tasks of the paper.
        shift: Lift the network by alpha: ``beta = bias`` in the converted layers. This changes
            what it computes; it is a way to start a training.

    Returns:
        The same ``model``.

    Warns:
        UserWarning: Of every converted layer it is known that no rectifier follows (see
            :func:`followed_by`), so there is nothing for psBN to repair.

    Raises:
        TypeError: A layer is a subclass whose own behaviour would be lost, a
            lazy layer, one whose bias is pruned or parametrized, or shares its beta
            with one of another alpha; or the model is scripted or wrapped for
            distributed training. Nothing has been changed then.
        ValueError: A wrong ``alpha``, or no layer to convert.
    """
    alpha = check_alpha(alpha)
    _refuse_wrapped(model)
    layers: dict[str, Any] = {}  # their classes and attributes change below
    for name, module in norm_layers(model).items():
        if isinstance(module, PostShift) or _post_shifted(type(module)):
            if module.weight is not None and module.bias is not None:
                if "beta" not in module._parameters and "bias" not in module._parameters:
                    raise TypeError(
                        f"the bias of {name or 'the model'} is pruned or parametrized; make that "
                        "permanent before to_psbn"
                    )
                layers[name] = module
        # In a frozen layer it is a buffer.
        elif isinstance(getattr(module, "bias", None), nn.Parameter):
            raise TypeError(
                f"{name or 'the model'} is a {type(module).__name__}, a norm layer without "
                "a psBN counterpart; use torch's own layer (and initialize lazy ones) "
                "before to_psbn"
            )
    if not layers:
        raise ValueError("the model has no BatchNorm or InstanceNorm with a trained bias")
    if alpha and layers.keys() <= without_rectifier(model):
        warnings.warn(
            f"no ReLU follows any of the {len(layers)} layers to convert (perhaps SiLU "
            "does): their filters cannot collapse, and psBN has not been tested there",
            stacklevel=2,
        )
    _refuse_tied(layers)
    betas: dict[nn.Parameter, nn.Parameter] = {}  # tied biases become tied betas
    for module in layers.values():
        if isinstance(module, PostShift):
            source, old = module.beta, module.initial_alpha
        else:
            source, old = module._parameters.pop("bias"), 0.0
            module.__class__ = _post_shifted(type(module))
            module.preserved = True
            if isinstance(module, psSyncBN) and not hasattr(module, "process_group"):
                module.process_group = None
        if source not in betas:
            beta = rebase(source.detach(), old, alpha).clone()
            betas[source] = nn.Parameter(beta, source.requires_grad)
        module.beta = betas[source]
        module.register_buffer("alpha", torch.tensor(alpha).to(module.weight))
        module.initial_alpha = alpha
    if shift:
        lift(model)
    return model


def to_bn(model: nn.Module) -> nn.Module:
    """Turn every post-shifted layer of a model into torch's plain one.

    In place, as :func:`to_psbn`; ``bias = beta + alpha``, exactly what the
    layer added. What remains needs nothing of this package. A model without
    post-shifted layers is returned as it is.

    Raises:
        TypeError: A layer is a subclass whose own behaviour would be lost, or
            shares its beta with one of another alpha; or the model is scripted or
            wrapped for distributed training. Nothing has been changed then.
    """
    _refuse_wrapped(model)
    shifted = [(name, m) for name, m in model.named_modules() if isinstance(m, PostShift)]
    for name, module in shifted:
        if _plain(type(module)) is None:
            raise TypeError(
                f"{name or 'the model'} is a {type(module).__name__}, a subclass of a psBN "
                "layer without a BN counterpart; replace it by hand before to_bn"
            )
    _refuse_tied(dict(shifted))
    biases: dict[nn.Parameter, nn.Parameter] = {}
    layer: Any
    for _, layer in shifted:
        bias = (layer.beta + layer.initial_alpha).detach()
        beta = layer._parameters.pop("beta")
        if beta not in biases:
            biases[beta] = nn.Parameter(bias, beta.requires_grad)
        for name in ("initial_alpha", "preserved"):
            delattr(layer, name)
        del layer._buffers["alpha"]
        layer.__class__ = _plain(type(layer))
        layer.bias = biases[beta]
    return model


def _refuse_tied(layers: dict[str, Any]) -> None:
    """One bias cannot be what several layers of one beta and different alphas add."""
    alphas: dict[nn.Parameter, float] = {}
    for name, layer in layers.items():
        if isinstance(layer, PostShift) and (
            alphas.setdefault(layer.beta, layer.initial_alpha) != layer.initial_alpha
        ):
            raise TypeError(
                f"{name} shares its beta with a layer of another alpha; give each its own "
                "beta, or both the same alpha"
            )


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if "ScriptModule" in kinds:
            raise TypeError(
                f"{name or 'the model'} is scripted; convert the model before scripting"
            )
        if kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}:
            raise TypeError(
                f"{name or 'the model'} is a {type(module).__name__}, which keeps "
                "references to its parameters; convert the model before wrapping it"
            )
