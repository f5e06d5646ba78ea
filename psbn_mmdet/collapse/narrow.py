"""A network narrowed to the shapes of a state dict; the model type ``Stripped`` for configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PsbnError


class StripError(PsbnError, ValueError):
    """A network cannot be stripped; the message is one line that says why and what to do."""


def narrow(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Give a network the shapes of a state dict, in place, and its values.

    This is all that loading a stripped checkpoint takes: build the network as it was, convert psBN
    to BN (:func:`psbn_mmdet.to_bn`), narrow. Layers get the numbers of channels that their weights
    have; a layer without a bias gets one where the state dict has one.

    Args:
        model: The network before it was stripped; its weights do not matter.
        state_dict: Of the stripped one.

    Returns:
        The same ``model``.

    Raises:
        StripError: The state dict is of another network.
    """
    missing = model.state_dict().keys() - state_dict.keys()
    if missing:
        raise StripError(f"the weights have no {min(missing)}: they are of another model")
    tied: dict[int, tuple[Any, Any]] = {}  # id of an old tensor -> it and the new one
    for prefix, module in model.named_modules():
        before = {}
        for kind in (module._parameters, module._buffers):
            for name, old in kind.items():
                key = f"{prefix}.{name}" if prefix else name
                saved = state_dict.get(key)
                if saved is None or (old is not None and old.shape == saved.shape):
                    continue
                if (name != "bias") if old is None else (old.dim() != saved.dim()):
                    raise StripError(f"{key} has another kind of shape in these weights")
                before[name] = old
                if id(old) not in tied or old is None:
                    like: Any = module.weight if old is None else old
                    fresh: Any = torch.zeros(saved.shape, dtype=like.dtype, device=like.device)
                    if kind is module._parameters:
                        fresh = nn.Parameter(fresh, like.requires_grad)
                    tied[id(old)] = old, fresh
                kind[name] = tied[id(old)][1]
        if before:
            _count_channels(module, before.get("weight"))
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise StripError(f"the weights are of another model: {reason}") from None
    return model


def _count_channels(module: Any, old: Tensor | None) -> None:
    """Set the numbers of channels of a layer to those of its weight, which was ``old``."""
    weight = module.weight
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif hasattr(module, "in_channels") and hasattr(module, "groups") and old is not None:
        depthwise = module.groups == module.in_channels > 1
        if getattr(module, "transposed", False):
            module.groups = weight.shape[0] if depthwise else module.groups
            module.in_channels = weight.shape[0]
            module.out_channels = weight.shape[1] * module.groups
        else:
            times = old.shape[0] // module.groups
            module.groups = weight.shape[0] // times if depthwise else module.groups
            module.in_channels = weight.shape[1] * module.groups
            module.out_channels = weight.shape[0]
    elif hasattr(module, "num_features"):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]


def stripped_model(original: str | type[nn.Module], checkpoint: str, **model: Any) -> nn.Module:
    """Build a model of a config as narrow as a checkpoint; registered as ``Stripped``.

    The config that tools/strip_checkpoint.py writes inherits the original one and says ::

        model = dict(type="psbn_mmdet.Stripped", original="RetinaNet", checkpoint="DIR/model.pth")

    Pretrained weights that the original config names, of another shape now, are not loaded.

    Args:
        original: The type that the model has in the original config.
        checkpoint: The stripped weights.
        **model: The other keys of the model's config.

    Raises:
        StripError: The checkpoint is of another model.
    """
    from mmengine.registry import MODELS

    from ..checkpoint import load, state_dict_of
    from ..norm import to_bn

    built = to_bn(MODELS.build(dict(type=original, **model)))
    for module in built.modules():
        if hasattr(module, "init_cfg"):
            module.init_cfg = _without_pretrained(module.init_cfg)
    try:
        return narrow(built, state_dict_of(load(checkpoint), checkpoint))
    except StripError as error:
        raise StripError(f"{checkpoint}: {error}") from None


def _without_pretrained(init_cfg: Any) -> Any:
    if isinstance(init_cfg, list):
        return [each for each in init_cfg if each.get("type") != "Pretrained"]
    if isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained":
        return None
    return init_cfg
