"""The normalization layers of a model or a state dict, each with the convolution in front."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..norm.recognize import norm_kinds, norm_layers
from .criteria import filter_l1
from .flops import filters_of


@dataclass(frozen=True)
class Layer:
    """A normalization layer, and the convolution that it normalizes if that is known.

    ``gamma``, ``bias`` and ``filter_l1`` are float32 on the CPU, shape (C,).
    """

    name: str
    gamma: Tensor
    bias: Tensor
    conv: str | None = None
    filter_l1: Tensor | None = None


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The normalization layers with a gamma, by name, each once.

    Raises:
        ValueError: There is none, or one has not been materialised.
    """
    found = {}
    for name, module in norm_layers(model).items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if nn.parameter.is_lazy(weight):
            raise ValueError(
                f"{name} is a lazy layer without parameters yet: run the model once first"
            )
        found[name] = module
    if not found:
        raise ValueError(
            "the model has no normalization layer with a gamma (BatchNorm or InstanceNorm, "
            "affine=True), so no filter can collapse"
        )
    return found


@torch.no_grad()
def gather(modules: Iterable[nn.Module]) -> tuple[Tensor, Tensor]:
    """Read gamma and bias of some layers, concatenated, float32 on the CPU, (C,) each.

    They are joined on the device and copied at once: one synchronisation.
    """
    modules = list(modules)
    device = modules[0].weight.device
    gammas = [m.weight.detach() for m in modules]
    biases = [
        torch.zeros_like(g) if m.bias is None else m.bias.detach()
        for m, g in zip(modules, gammas, strict=True)
    ]
    joined = torch.cat([t.to(device, torch.float32) for t in gammas + biases]).cpu()
    gamma, bias = joined.chunk(2)
    return gamma, bias


def layers_of_model(model: nn.Module) -> list[Layer]:
    """The layers of a model as :func:`measure` reads them; one device synchronisation."""
    norms = norm_modules(model)
    convs, order, ids = {}, [], {id(m) for m in norms.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in ids:
            order.append((name, None, module.weight.numel()))
        elif channels := filters_of(module):
            convs[name] = module
            order.append((name, name, channels))
    pairs = _pair(order)
    l1 = {}
    for name in norms:
        if conv := convs.get(pairs.get(name)):
            l1[name] = filter_l1(
                conv.weight.detach(),
                getattr(conv, "transposed", False),
                getattr(conv, "groups", 1),
            )
    gamma, bias = gather(norms.values())
    norms_l1 = torch.cat([v.float() for v in l1.values()]).cpu() if l1 else torch.empty(0)
    sizes = [module.weight.numel() for module in norms.values()]
    l1 = dict(zip(l1, norms_l1.split([v.numel() for v in l1.values()]), strict=True))
    return [
        Layer(name, g, b, pairs.get(name), l1.get(name))
        for name, g, b in zip(norms, gamma.split(sizes), bias.split(sizes), strict=True)
    ]


def layers_of_state_dict(state_dict: Mapping[str, Tensor]) -> list[Layer]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            prefix, _, name = key.rpartition(".")
            groups.setdefault(prefix, {})[name] = value
    kinds, norms, order = norm_kinds(state_dict), {}, []
    for prefix, tensors in groups.items():
        weight, kind = tensors.get("weight"), kinds.get(prefix)
        if weight is None:
            continue
        if kind == "psbn":
            bias = tensors["beta"].float() + tensors["alpha"].float()
        elif kind == "bn":
            bias = tensors["bias"].float()
        else:
            if weight.dim() >= 2:
                order.append((prefix, prefix, weight.shape[0]))
            continue
        norms[prefix] = weight.float(), bias
        order.append((prefix, None, weight.numel()))
    if not norms:
        raise ValueError(
            "no normalization layer found (weight, bias, running_mean, running_var or weight, "
            "beta, alpha side by side); layers without running statistics cannot be recognised "
            "in a state dict: measure the model itself"
        )
    pairs = _pair(order)
    return [
        Layer(
            name,
            gamma.cpu(),
            bias.cpu(),
            pairs.get(name),
            filter_l1(groups[pairs[name]]["weight"]).float().cpu() if name in pairs else None,
        )
        for name, (gamma, bias) in norms.items()
    ]


def _pair(order: Iterable[tuple[str, str | None, int]]) -> dict[str, str]:
    """Which convolution stands in front of which layer.

    Args:
        order: All of them in order of definition: (name, name again for a
            convolution or None for a normalization, channels).

    Returns:
        Normalization -> convolution, where one was found. Each convolution is
        given away once.
    """
    channels_of: dict[str, int] = {}
    last_sibling: dict[str, str] = {}
    pairs, taken = {}, set()
    for name, conv, channels in order:
        parent, _, leaf = name.rpartition(".")
        if conv is not None:
            channels_of[name] = channels
            last_sibling[parent] = name
            continue
        twin = re.sub(r"bn|norm", "conv", leaf, count=1)
        twin = f"{parent}.{twin}" if parent else twin
        candidates = [last_sibling.get(parent)]
        if twin != name:
            candidates = [twin, _last_inside(channels_of, twin), *candidates]
        for candidate in candidates:
            if channels_of.get(candidate) == channels and candidate not in taken:
                pairs[name] = candidate
                taken.add(candidate)
                break
    return pairs


def _last_inside(names: Mapping[str, int], block: str) -> str | None:
    """The last name within a block, as conv1.6 in a ResNet's deep stem conv1."""
    return next((n for n in reversed(names) if n.startswith(block + ".")), None)
