"""State dicts from BN to psBN and back, their function preserved."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..norm.layers import check_alpha, check_load_bn, rebase
from ..norm.recognize import Kind, norm_kinds
from .read import CheckpointError


def prefixes(state_dict: Mapping[str, Tensor], kind: Kind) -> set[str]:
    """What stands in front of the tensors of each layer of a kind, such as ``'layer1.0.bn1.'``."""
    kinds = norm_kinds(state_dict)
    return {f"{name}." if name else "" for name, found in kinds.items() if found == kind}


def _split(key: str) -> tuple[str, str]:
    """``layer.bn1.bias`` -> ``layer.bn1.``, ``bias``."""
    name = key.rpartition(".")[2]
    return key.removesuffix(name), name


def psbn_state_dict(
    state_dict: Mapping[str, Tensor], alpha: float = 0.1, load_bn: str = "preserve"
) -> dict[str, Tensor]:
    """The state dict of ``to_psbn(model, alpha, load_bn)`` from that of ``model``.

    A layer is BN where ``weight, bias, running_mean, running_var`` stand
    together (a normalization without running statistics, as InstanceNorm
    usually is, cannot be told from others and stays), psBN where ``beta`` and
    ``alpha`` do; the latter are rebased to ``alpha``.

    Raises:
        CheckpointError: There is no such layer.
        TypeError, ValueError: A wrong ``alpha`` or ``load_bn``.
    """
    alpha, load_bn = check_alpha(alpha), check_load_bn(load_bn)
    bn, psbn = prefixes(state_dict, "bn"), prefixes(state_dict, "psbn")
    if not bn | psbn:
        raise CheckpointError("the state dict holds no BatchNorm layer")
    converted = {}
    for key, value in state_dict.items():
        prefix, name = _split(key)
        if prefix in bn and name == "bias":
            new = torch.tensor(alpha, dtype=value.dtype, device=value.device)
            converted[prefix + "beta"] = rebase(value, 0, new) if load_bn == "preserve" else value
            converted[prefix + "alpha"] = new
        elif prefix in psbn and name == "beta":
            old = state_dict[prefix + "alpha"]
            new = torch.full_like(old, alpha)
            converted[key] = rebase(value, old, new)
            converted[prefix + "alpha"] = new
        elif not (prefix in psbn and name == "alpha"):
            converted[key] = value
    return converted


def bn_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``to_bn(model)`` from that of ``model``: ``bias = beta + alpha``.

    Raises:
        CheckpointError: There is no psBN layer.
    """
    psbn = prefixes(state_dict, "psbn")
    if not psbn:
        raise CheckpointError("the state dict holds no psBN layer (beta and alpha)")
    converted = {}
    for key, value in state_dict.items():
        prefix, name = _split(key)
        if prefix in psbn and name == "beta":
            converted[prefix + "bias"] = value + state_dict[prefix + "alpha"]
        elif not (prefix in psbn and name == "alpha"):
            converted[key] = value
    return converted
