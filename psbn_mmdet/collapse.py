"""What a collapsed filter is: measures, a report on a model or a checkpoint, FLOPs saved.

Every measure is read off gamma (``weight``) and the added constant (``bias``)
of a normalization layer y = gamma * x_hat + bias, x_hat of mean 0 and variance
1. BN, SyncBN, InstanceNorm and their post-shifted twins are one case, as the
``bias`` of the latter is beta + alpha.

A filter is *collapsed* when |gamma| < 1e-3, the paper's threshold (arXiv
2001.11216, section 3.1). The filter itself then says nothing; what is left is
the bias, which tells two cases apart behind a ReLU: *dead* (the output is
about 0) and *constant* (a positive bias still comes through). A filter is
*inactive* when its ReLU practically never fires, Phi(bias / |gamma|) < 1e-3
(Eq. 2): the non-trainable region, which a filter enters long before weight
decay has shrunk gamma. Dead, constant and inactive speak of a ReLU right behind
the layer; the last layer of a residual block has the addition in between.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .flops import Flops, filters_of, probe

THRESHOLD = 1e-3
"""|gamma| below which a filter is collapsed (the paper, section 3.1)."""

INACTIVE_BELOW = 1e-3
"""Activation probability below which a filter is inactive: bias < -3.09 |gamma|.

At the coarsest levels of a detector a training step shows a filter about a
thousand positions, of which then less than one lets a gradient through."""


def collapsed(gamma: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """|gamma| < threshold, elementwise."""
    return gamma.abs() < threshold


def constant(gamma: Tensor, bias: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Collapsed, but with a bias of at least ``threshold``, which ReLU lets through.

    The filter is a constant to the layers behind it, not dead.
    """
    return collapsed(gamma, threshold) & (bias >= threshold)


def dead(gamma: Tensor, bias: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Collapsed, and nothing of note comes out of the ReLU behind."""
    return collapsed(gamma, threshold) & ~(bias >= threshold)


def activation_probability(gamma: Tensor, bias: Tensor) -> Tensor:
    """P(gamma * x_hat + bias > 0) = Phi(bias / |gamma|) for x_hat ~ N(0, 1) (Eq. 2).

    For gamma = 0 it is 1 or 0, as the bias is positive or not.
    """
    return torch.where(
        gamma == 0, (bias > 0).to(gamma.dtype), torch.special.ndtr(bias / gamma.abs())
    )


def inactive(gamma: Tensor, bias: Tensor, below: float = INACTIVE_BELOW) -> Tensor:
    """Activation probability < ``below``: the non-trainable region of a ReLU unit."""
    return activation_probability(gamma, bias) < below


def filter_l1(weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """L1 norm of each filter of a convolution or linear layer (the paper's Fig. 1a).

    Args:
        weight: (C_out, C_in / groups, ...), or (C_in, C_out / groups, ...) if
            ``transposed``.
        transposed: Whether it is of a transposed convolution.
        groups: Of a transposed convolution.

    Returns:
        (C_out,).
    """
    if transposed:
        per_group = weight.unflatten(0, (groups, -1)).flatten(3)
        return torch.linalg.vector_norm(per_group, 1, dim=(1, 3)).flatten()
    return torch.linalg.vector_norm(weight.flatten(1), 1, dim=1)


def count(
    gamma: Tensor,
    bias: Tensor,
    threshold: float = THRESHOLD,
    inactive_below: float = INACTIVE_BELOW,
) -> dict[str, float]:
    """How many of some filters are in which state.

    Args:
        gamma, bias: (C,), of one layer or of all of them together.
        threshold: Of |gamma|.
        inactive_below: Of the activation probability.

    Returns:
        ``filters``, ``collapsed`` = ``dead`` + ``constant``, ``inactive``,
        ``not_finite`` (counts), ``collapsed_percent``, and
        ``activation_probability``, the mean over the finite filters.
    """
    probability = activation_probability(gamma, bias)
    finite = torch.isfinite(gamma) & torch.isfinite(bias)
    n_collapsed = int(collapsed(gamma, threshold).sum())
    n_constant = int(constant(gamma, bias, threshold).sum())
    return {
        "filters": gamma.numel(),
        "collapsed": n_collapsed,
        "dead": n_collapsed - n_constant,
        "constant": n_constant,
        "inactive": int((probability < inactive_below).sum()),
        "not_finite": int((~finite).sum()),
        "collapsed_percent": 100 * n_collapsed / max(gamma.numel(), 1),
        "activation_probability": float(probability[finite].mean()) if finite.any() else math.nan,
    }


def check_thresholds(threshold: float, inactive_below: float) -> None:
    """Raise ValueError unless both can be thresholds."""
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(
            f"the threshold of |gamma| must not be negative (the paper's is {THRESHOLD}), "
            f"got {threshold}"
        )
    if not 0 <= inactive_below <= 1:
        raise ValueError(
            f"the threshold of the activation probability must be in [0, 1], got {inactive_below}"
        )


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


@dataclass(frozen=True)
class Report:
    """What :func:`measure` found: rows per layer, totals, JSON, a table as text."""

    layers: tuple[Layer, ...]
    threshold: float = THRESHOLD
    inactive_below: float = INACTIVE_BELOW
    flops: Flops | None = None

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """For each layer in order: ``name``, the numbers of :func:`count`, and the rest.

        ``collapsed_filters`` and ``inactive_filters`` are indices;
        ``filter_l1_median`` is None where no convolution was found in front.
        """
        rows = []
        for layer in self.layers:
            gamma, bias = layer.gamma, layer.bias
            l1 = layer.filter_l1
            rows.append(
                {
                    "name": layer.name,
                    **count(gamma, bias, self.threshold, self.inactive_below),
                    "conv": layer.conv,
                    "filter_l1_median": None if l1 is None else float(l1.median()),
                    "collapsed_filters": _indices(collapsed(gamma, self.threshold)),
                    "constant_filters": _indices(constant(gamma, bias, self.threshold)),
                    "inactive_filters": _indices(inactive(gamma, bias, self.inactive_below)),
                }
            )
        return rows

    @cached_property
    def totals(self) -> dict[str, float]:
        """The numbers of :func:`count` over all layers; with FLOPs, ``sparsity_percent``."""
        gamma = torch.cat([layer.gamma for layer in self.layers])
        bias = torch.cat([layer.bias for layer in self.layers])
        totals = count(gamma, bias, self.threshold, self.inactive_below)
        if self.flops is not None:
            totals["sparsity_percent"] = self.flops.sparsity
        return totals

    def to_json(self) -> str:
        """Thresholds, totals, rows and FLOPs as a JSON object (NaN becomes null)."""
        content = {
            "threshold": self.threshold,
            "inactive_below": self.inactive_below,
            "totals": self.totals,
            "layers": self.rows,
        }
        if self.flops is not None:
            content["macs"] = {
                "total": self.flops.total,
                "remaining": self.flops.remaining,
                "layers": self.flops.rows,
            }
        return json.dumps(_without_nan(content), indent=1, allow_nan=False)

    def table(self, limit: int | None = None) -> str:
        """Layers ranked by the share that collapsed, then inactive; and the totals.

        Args:
            limit: Show so many layers; all by default.
        """
        ranked = sorted(self.rows, key=lambda r: (-r["collapsed_percent"], -_share_inactive(r)))
        shown = ranked[:limit]
        width = max([5, *(len(row["name"]) for row in shown)])
        lines = [
            f"{'layer':<{width}}  filters  collapsed      %   dead  constant  inactive"
            "  P(active)  median L1"
        ]
        for row in shown:
            l1 = row["filter_l1_median"]
            lines.append(
                f"{row['name']:<{width}}  {row['filters']:7d}  {row['collapsed']:9d}"
                f"  {row['collapsed_percent']:5.1f}  {row['dead']:5d}  {row['constant']:8d}"
                f"  {row['inactive']:8d}  {row['activation_probability']:9.3f}"
                f"  {'-' if l1 is None else format(l1, '.3g'):>9}"
            )
        if len(shown) < len(ranked):
            lines.append(f"... and {len(ranked) - len(shown)} more layers")
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """The totals; the first line is ``N of M filters collapsed (P%)``."""
        t = self.totals
        lines = [
            f"{t['collapsed']} of {t['filters']} filters collapsed ({t['collapsed_percent']:.2f}%)",
            f"  |gamma| < {self.threshold:g}; {t['dead']} dead, {t['constant']} constant "
            "(a positive bias comes through ReLU)",
            f"{t['inactive']} of {t['filters']} filters inactive "
            f"({100 * t['inactive'] / t['filters']:.2f}%)",
            f"  P(ReLU fires) < {self.inactive_below:g}; its mean is "
            f"{t['activation_probability']:.3f}",
        ]
        if self.flops is not None:
            lines.append(
                f"{self.flops.sparsity:.2f}% of FLOPs saved by removing the collapsed filters "
                f"({self.flops.total:.4g} -> {self.flops.remaining:.4g} multiply-accumulates)"
            )
        unpaired = sum(layer.conv is None for layer in self.layers)
        if unpaired:
            lines.append(f"{unpaired} of {len(self.layers)} layers: no convolution found in front")
        if t["not_finite"]:
            lines.append(f"{t['not_finite']} filters have a gamma or bias that is not finite")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _share_inactive(row: Mapping[str, Any]) -> float:
    return row["inactive"] / max(row["filters"], 1)


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value


def measure(
    source: nn.Module | Mapping[str, Tensor],
    threshold: float = THRESHOLD,
    inactive_below: float = INACTIVE_BELOW,
    inputs: tuple[int, ...] | Callable[[nn.Module], Any] | None = None,
) -> Report:
    """Find the collapsed filters of a model or a state dict.

    In a model every BatchNorm and InstanceNorm with a gamma counts (subclasses,
    frozen and post-shifted ones too). A state dict has only names: a layer is
    where ``weight, bias, running_mean, running_var`` stand together, or
    ``weight, beta, alpha``. An InstanceNorm without running statistics cannot be
    told from a GroupNorm or LayerNorm there and is not counted.

    The convolution in front of a layer is found by name (``bn1`` - ``conv1``) or
    as the nearest one before it among its siblings, and only if it has as many
    filters. Where that finds none (a layer behind an addition or a
    concatenation, a filter that is parametrised), the row says so.

    Args:
        source: A model, of which nothing is changed, or a state dict.
        threshold: Of |gamma|.
        inactive_below: Of the activation probability.
        inputs: Also count FLOPs: the size (C, H, W) of an input, or a function
            that calls the model it is given; see :func:`psbn_mmdet.flops.probe`.

    Raises:
        ValueError: A wrong threshold, no normalization layer, or ``inputs``
            with a state dict.
        TypeError: ``source`` is neither.
    """
    check_thresholds(threshold, inactive_below)
    flops = None
    if isinstance(source, nn.Module):
        layers = layers_of_model(source)
        if inputs is not None:
            live = {
                m: ~collapsed(m.weight.detach(), threshold) for m in norm_modules(source).values()
            }
            flops = probe(source, live, inputs)
    elif isinstance(source, Mapping):
        layers = _layers_of_state_dict(source)
        if inputs is not None:
            raise ValueError("FLOPs need the model: a state dict does not say how layers connect")
    else:
        raise TypeError(
            f"measure takes a module or a state dict (a mapping of names to tensors), "
            f"got {type(source).__name__}"
        )
    return Report(tuple(layers), threshold, inactive_below, flops)


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The normalization layers with a gamma, by name, each once.

    Raises:
        ValueError: There is none, or one has not been materialised.
    """
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if isinstance(module, _BatchNorm | _InstanceNorm) or all(
            isinstance(getattr(module, a, None), Tensor)
            for a in ("bias", "running_mean", "running_var")  # as FrozenBatchNorm2d
        ):
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
    """gamma and bias of some layers one behind the other, float32 on the CPU, (C,) each.

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


def _layers_of_state_dict(state_dict: Mapping[str, Tensor]) -> list[Layer]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            prefix, _, name = key.rpartition(".")
            groups.setdefault(prefix, {})[name] = value
    norms, order = {}, []
    for prefix, tensors in groups.items():
        weight = tensors.get("weight")
        if weight is None:
            continue
        if {"beta", "alpha"} <= tensors.keys() and weight.dim() == 1:
            bias = tensors["beta"].float() + tensors["alpha"].float()
        elif {"bias", "running_mean", "running_var"} <= tensors.keys():
            bias = tensors["bias"].float()
        else:
            if weight.dim() >= 2:
                order.append((prefix, prefix, weight.shape[0]))
            continue
        norms[prefix] = weight.float().flatten(), bias.flatten()
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
