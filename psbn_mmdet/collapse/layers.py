"""The normalization layers of a model or a state dict, each with what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..norm import added_bias, alpha_of, followed_by, norm_layers
from .convolutions import natural_order, pair_by_name
from .criteria import MeasureError, collapsed, filter_l1, not_started
from .flops import filters_of
from .wiring import Wiring


@dataclass(frozen=True)
class Layer:
    """A normalization layer, and what is known of it.

    Args:
        name: In the model or state dict.
        gamma, bias: (C,), float32 on the CPU.
        conv: The convolution that it normalizes.
        filter_l1: L1 norms of that convolution's filters, (C,), float32 on the CPU.
        followed_by: As :func:`psbn_mmdet.norm.followed_by` has it without looking through sums:
            ``"relu"``, ``"leaky"``, ``"other"``, ``"none"``, ``"sum"`` or ``"unknown"``.
        alpha: The shift of a psBN layer; None for other layers.
        does: What each filter does (:func:`.criteria.does`), (C,) uint8; UNKNOWN by default.
        firing: The share of positions where the rectifiers behind each filter let a gradient
            through, (C,) float32, NaN where there is none; None where that was not measured.
    """

    name: str
    gamma: Tensor
    bias: Tensor
    conv: str | None = None
    filter_l1: Tensor | None = None
    followed_by: str = "unknown"
    alpha: float | None = None
    does: Tensor = None  # type: ignore[assignment]  # replaced at once
    firing: Tensor | None = None

    def __post_init__(self) -> None:
        if self.does is None:
            object.__setattr__(self, "does", torch.zeros(self.gamma.shape, dtype=torch.uint8))

    @property
    def relu(self) -> Tensor:
        """(C,) bool, whether it is known that a ReLU stands right behind."""
        return torch.full(self.gamma.shape, self.followed_by == "relu")

    @property
    def started(self) -> Tensor:
        """(C,) bool, False in a layer that is as ``zero_init_residual`` made it."""
        return torch.full(self.gamma.shape, not not_started(self.gamma, self.bias, self.alpha))


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which this process holds a part of each tensor.

    Raises:
        MeasureError: A module is wrapped by FSDP, of either kind.
    """
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise MeasureError(
                f"{name or 'the model'} is sharded by FSDP, and a shard does not tell what its "
                "filters do: gather a full state dict and measure that"
            )


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The normalization layers with a gamma, by name, each once.

    Raises:
        MeasureError: There is none, one has not been materialised, or they are sharded.
    """
    refuse_sharded(model)
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
def read_filters(
    modules: Iterable[Any], convs: Iterable[Any] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Read gamma and bias of some layers, and the L1 norms of the filters in front of them.

    They are joined on the device and copied at once: one synchronisation.

    Args:
        modules: The layers.
        convs: For each the convolution in front, or None; by default no norms are read.

    Returns:
        gamma, bias and norm of all layers concatenated, (F,) each, float32 on the CPU; the norm is
        NaN where there is no convolution.
    """
    modules = list(modules)
    device = modules[0].weight.device
    gammas = [m.weight.detach() for m in modules]
    biases = [
        torch.zeros_like(g) if (bias := added_bias(m)) is None else bias
        for m, g in zip(modules, gammas, strict=True)
    ]
    norms = [
        torch.full_like(g, torch.nan) if conv is None else l1_norms(conv)
        for conv, g in zip(convs or [None] * len(gammas), gammas, strict=True)
    ]
    joined = torch.cat([t.to(device, torch.float32) for t in gammas + biases + norms]).cpu()
    gamma, bias, norm = joined.chunk(3)
    return gamma, bias, norm


def gather(modules: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Gamma and bias of some layers as :func:`read_filters` reads them."""
    return read_filters(modules)[:2]


def l1_norms(conv: Any) -> Tensor:
    """Of the filters of a convolution or linear layer, (C,)."""
    return filter_l1(
        conv.weight.detach(), getattr(conv, "transposed", False), getattr(conv, "groups", 1)
    )


def live_filters(model: nn.Module, threshold: float) -> dict[nn.Module, Tensor]:
    """Which filters of each normalization layer have not collapsed, (C,) bool, for `probe`."""
    live = {}
    for module in norm_modules(model).values():
        gamma, bias = gather([module])
        live[module] = ~collapsed(gamma, threshold) | not_started(gamma, bias, alpha_of(module))
    return live


def layers_of_model(model: nn.Module) -> list[Layer]:
    """The layers of a model as :func:`measure` reads them, in order of definition."""
    norms: dict[str, Any] = norm_modules(model)
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    shapes = {name: _shape(module) for name, module in modules.items() if filters_of(module)}
    pairs = pair_by_name({n: m.weight.numel() for n, m in norms.items()}, shapes, modules)
    convs = [modules[pairs[name]] if name in pairs else None for name in norms]
    gamma, bias, norm = read_filters(norms.values(), convs)
    sizes = [module.weight.numel() for module in norms.values()]
    followers = followed_by(model, through_sums=False)
    return [
        Layer(
            name,
            g,
            b,
            pairs.get(name),
            l1 if name in pairs else None,
            followers[name],
            alpha_of(module),
        )
        for (name, module), g, b, l1 in zip(
            norms.items(), *(v.split(sizes) for v in (gamma, bias, norm)), strict=True
        )
    ]


def _shape(conv: Any) -> tuple[int, ...]:
    """Of the weight, filters first."""
    inputs = conv.weight.shape[0] // conv.groups if getattr(conv, "transposed", False) else None
    return filters_of(conv), inputs or conv.weight.shape[1], *conv.weight.shape[2:]


_FOLLOWED_BY = {"leaky": "leaky", "smooth": "other", "sum": "sum", "none": "none", "relu": "relu"}


def layers_as_wired(model: nn.Module, layers: list[Layer], wired: Wiring) -> list[Layer]:
    """The layers with what running the network tells: convolution in front, what is behind.

    ``firing`` is that of the rectifier behind a filter; of several, on several ways, the largest.
    """
    convs: dict[str | None, Any] = dict(model.named_modules())
    found = []
    for layer in layers:
        if layer.name not in wired.norms:  # it did not run
            found.append(layer)
            continue
        channels = wired.channels(layer.name)
        producers = {each for channel in channels for each, _ in channel.producers}
        alike = all([i for _, i in c.producers] == [c.index] for c in channels)
        conv = producers.pop() if len(producers) == 1 and alike else None
        known = conv is not None and filters_of(convs[conv]) > 0
        kinds = {channel.activation for channel in channels}
        kind = kinds.pop() if len(kinds) == 1 else "mixed"
        firing = [max((r.firing for r in c.rectifiers), default=torch.nan) for c in channels]
        found.append(
            dataclasses.replace(
                layer,
                conv=conv if known else None,
                filter_l1=l1_norms(convs[conv]).float().cpu() if known else None,
                followed_by=_FOLLOWED_BY.get(kind, layer.followed_by),
                firing=torch.tensor(firing),
            )
        )
    return found


def layers_of_state_dict(
    state_dict: Mapping[str, Tensor],
) -> tuple[list[Layer], dict[str, str]]:
    """The layers that names and shapes prove, in the natural order of the names.

    A layer has a ``running_mean``, or ``beta`` and ``alpha``. Its gamma is ``weight``, or of a
    pruned one ``weight_orig`` times ``weight_mask``, of shape (C,) or (1, C, 1, 1). A module beside
    it that holds nothing but a one-dimensional ``weight`` is a PReLU.

    Returns:
        The layers, and those whose gamma cannot be read: name -> why. :data:`NO_GAMMA` is the why
        of those that have none (``affine=False``).

    Raises:
        MeasureError: None can be read.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        if isinstance(value, Tensor):
            prefix, _, name = key.rpartition(".")
            groups.setdefault(prefix, {})[name] = value
    gammas: dict[str, Tensor] = {}
    biases, alphas, convs, unread = {}, {}, {}, {}
    for prefix in sorted(groups, key=natural_order):
        tensors = groups[prefix]
        shifted = {"beta", "alpha"} <= {*tensors}
        weight = _masked(tensors)
        if not shifted and not {"running_mean", "running_var"} & {*tensors}:
            if weight is not None and weight.dim() >= 2 and weight.is_floating_point():
                convs[prefix] = weight
            continue
        channels = tensors[
            "beta" if shifted else next(k for k in tensors if "running" in k)
        ].numel()
        parametrized = f"{prefix}.parametrizations.weight".lstrip(".") in groups
        if why := _why_not_gamma(weight, channels, {*tensors}, parametrized):
            unread[prefix] = why
            continue
        assert weight is not None
        gammas[prefix] = weight.flatten().float().cpu()
        if shifted:
            alphas[prefix] = float(tensors["alpha"])
            bias = tensors.get("bias", tensors["beta"] + tensors["alpha"]).float()
        else:
            bias = tensors.get("bias", torch.zeros(channels)).float()
        biases[prefix] = bias.flatten().cpu()
    if not gammas:
        name, why = next(iter(unread.items()), ("", ""))
        raise MeasureError(
            "no normalization layer found (a gamma beside running_mean, or weight, beta, alpha "
            "side by side); layers without running statistics cannot be recognised in a state "
            "dict: measure the model itself"
            + (f". {len(unread)} could not be read, as {name}: {why}" if unread else "")
        )
    pairs = pair_by_name(
        {name: gamma.numel() for name, gamma in gammas.items()},
        {name: tuple(weight.shape) for name, weight in convs.items()},
        groups,
    )
    leaky = _before_prelu(groups, gammas)
    layers = [
        Layer(
            name,
            gamma,
            biases[name],
            pairs.get(name),
            filter_l1(convs[pairs[name]]).float().cpu() if name in pairs else None,
            "leaky" if name in leaky else "unknown",
            alphas.get(name),
        )
        for name, gamma in gammas.items()
    ]
    return layers, unread


NO_GAMMA = "has no gamma (affine=False), so it cannot collapse"


def _masked(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The weight of a module, also of one pruned by ``torch.nn.utils.prune``."""
    if {"weight_orig", "weight_mask"} <= {*tensors}:
        return tensors["weight_orig"] * tensors["weight_mask"]
    return tensors.get("weight")


def _why_not_gamma(
    weight: Tensor | None, channels: int, names: set[str], parametrized: bool
) -> str | None:
    if parametrized:
        return "its gamma is parametrized; remove the parametrization, or measure the model"
    if weight is None:
        others = names - {"running_mean", "running_var", "num_batches_tracked"}
        return f"no gamma under a known name beside {sorted(others)}" if others else NO_GAMMA
    if weight.is_quantized or not weight.is_floating_point():
        return f"its gamma is stored as {weight.dtype}; measure the network before quantization"
    if weight.numel() != channels or max(weight.shape, default=1) != channels:
        return f"its weight has shape {tuple(weight.shape)}, its statistics {channels} channels"
    return None


def _before_prelu(
    groups: Mapping[str, Mapping[str, Tensor]], gammas: Mapping[str, Tensor]
) -> set[str]:
    """The layers with a PReLU behind: the only layer beside it, or the one numbered before it."""
    beside: dict[str, list[str]] = {}
    for name in gammas:
        beside.setdefault(name.rpartition(".")[0], []).append(name)
    found = set()
    for prefix, tensors in groups.items():
        weight = tensors.get("weight")
        if {*tensors} != {"weight"} or weight is None or weight.dim() != 1:
            continue
        parent, _, leaf = prefix.rpartition(".")
        norms = beside.get(parent, [])
        if leaf.isdigit():
            norms = [n for n in norms if n.rpartition(".")[2] == str(int(leaf) - 1)]
        if len(norms) == 1 and weight.numel() in (1, gammas[norms[0]].numel()):
            found.add(norms[0])
    return found
