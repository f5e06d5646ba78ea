"""The normalization layers of a model or a state dict, each with the convolution in front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..norm import added_bias, followed_by, is_post_shifted, norm_kinds, norm_layers
from ..python38 import zip_strict
from .criteria import MeasureError, collapsed, filter_l1
from .flops import filters_of
from .pairs import natural_order, pair_by_name, pair_in_order


@dataclass(frozen=True)
class Layer:
    """A normalization layer, and what stands in front of it and behind it if that is known.

    Args:
        name: In the model or state dict.
        gamma, bias: (C,), float32 on the CPU.
        conv: The convolution that it normalizes.
        filter_l1: L1 norms of that convolution's filters, (C,), float32 on the CPU.
        followed_by: As :func:`psbn_mmdet.norm.followed_by` has it: ``"relu"``, ``"leaky"``,
            ``"other"``, ``"none"`` or ``"unknown"``.
        alpha: The shift of a psBN layer; None for other layers.
    """

    name: str
    gamma: Tensor
    bias: Tensor
    conv: str | None = None
    filter_l1: Tensor | None = None
    followed_by: str = "unknown"
    alpha: float | None = None

    @property
    def relu(self) -> Tensor:
        """(C,) bool, whether a ReLU follows each filter; assumed where it is not known."""
        return torch.full(self.gamma.shape, judged_as_relu(self.followed_by))


def judged_as_relu(followed_by: str) -> bool:
    """Whether filters of a layer are judged as ones that a ReLU follows: assumed if unknown."""
    return followed_by in ("relu", "unknown")


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The normalization layers with a gamma, by name, each once.

    Raises:
        MeasureError: There is none, or one has not been materialised.
    """
    norms = {}
    for name, module in norm_layers(model).items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if nn.parameter.is_lazy(weight):
            raise MeasureError(
                f"{name} is a lazy layer without parameters yet: run the model once first"
            )
        norms[name] = module
    if not norms:
        raise MeasureError(
            "the model has no normalization layer with a gamma (BatchNorm or InstanceNorm, "
            "affine=True), so no filter can collapse"
        )
    return norms


@torch.no_grad()
def gather(modules: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Read gamma and bias of some layers, concatenated, float32 on the CPU, (C,) each.

    They are joined on the device and copied at once: one synchronisation.
    """
    modules = list(modules)
    device = modules[0].weight.device
    gammas = [m.weight.detach() for m in modules]
    biases = [
        torch.zeros_like(g) if (bias := added_bias(m)) is None else bias
        for m, g in zip_strict(modules, gammas)
    ]
    joined = torch.cat([t.to(device, torch.float32) for t in gammas + biases]).cpu()
    gamma, bias = joined.chunk(2)
    return gamma, bias


def live_filters(model: nn.Module, threshold: float) -> dict[nn.Module, Tensor]:
    """Which filters of each normalization layer have not collapsed, (C,) bool, for `probe`."""
    norms: Any = norm_modules(model).values()
    return {m: ~collapsed(m.weight.detach(), threshold) for m in norms}


def layers_of_model(model: nn.Module) -> list[Layer]:
    """The layers of a model as :func:`measure` reads them, in order of definition."""
    norms: dict[str, Any] = norm_modules(model)
    convs: dict[str | None, Any] = {}
    order, ids = [], {id(m) for m in norms.values()}
    module: Any
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in ids:
            order.append((name, False, module.weight.numel()))
        elif channels := filters_of(module):
            convs[name] = module
            order.append((name, True, channels))
    pairs = pair_in_order(order)
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
    l1 = dict(zip_strict(l1, norms_l1.split([v.numel() for v in l1.values()])))
    followers = followed_by(model)
    return [
        Layer(
            name,
            g,
            b,
            pairs.get(name),
            l1.get(name),
            followers[name],
            float(module.alpha) if is_post_shifted(module) else None,
        )
        for (name, module), g, b in zip_strict(norms.items(), gamma.split(sizes), bias.split(sizes))
    ]


def layers_of_state_dict(state_dict: Mapping[str, Tensor]) -> list[Layer]:
    """The layers that names and shapes prove, in the natural order of the names.

    Raises:
        MeasureError: There is none.
    """
    kinds = norm_kinds(state_dict)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            prefix, _, name = key.rpartition(".")
            groups.setdefault(prefix, {})[name] = value
    norms, convs, alphas = {}, {}, {}
    for prefix in sorted(groups, key=natural_order):
        tensors = groups[prefix]
        weight = tensors.get("weight")
        if weight is None:
            continue
        if kinds.get(prefix) == "psbn":
            alphas[prefix] = float(tensors["alpha"])
            bias = tensors["beta"].float() + tensors["alpha"].float()
        elif kinds.get(prefix) == "bn":
            bias = tensors["bias"].float()
        else:
            if weight.dim() >= 2:
                convs[prefix] = weight
            continue
        norms[prefix] = weight.float().cpu(), bias.cpu()
    if not norms:
        raise MeasureError(
            "no normalization layer found (weight, bias, running_mean, running_var or weight, "
            "beta, alpha side by side); layers without running statistics cannot be recognised "
            "in a state dict: measure the model itself"
        )
    pairs = pair_by_name(
        {name: gamma.numel() for name, (gamma, _) in norms.items()},
        {name: tuple(weight.shape) for name, weight in convs.items()},
        groups,
    )
    return [
        Layer(
            name,
            gamma,
            bias,
            pairs.get(name),
            filter_l1(convs[pairs[name]]).float().cpu() if name in pairs else None,
            alpha=alphas.get(name),
        )
        for name, (gamma, bias) in norms.items()
    ]
