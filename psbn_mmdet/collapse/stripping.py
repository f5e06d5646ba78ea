"""``strip``: a smaller network of the same function, and the proof that it is one.

The wiring (:mod:`.wiring`) tells which channels carry nothing and which go or stay together. What
can go is taken out of the weights, the constants that it carried are folded into what reads them,
and the result is proved twice:

- *its wiring is the original's* without what went: the narrowed network is run again, and every
  channel that is left arrives where it arrived before. That holds for all inputs;
- *its outputs are equal*, channel by channel, in float64, on images of several scales, signs and
  sizes.

Where the first does not hold (code that counts on a number of channels, say), what depends on it is
left whole, and the rest goes.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from ..norm import PostShift, to_bn
from .calls import Calls, compare_runs, difference, outputs_of
from .criteria import (
    THRESHOLD,
    activation_probability,
    check_thresholds,
    collapsed,
    inactive,
    not_finite,
)
from .layers import gather, norm_modules
from .narrow import StripError, narrow
from .proof import UnlikeError, match
from .shadows import Reader
from .wiring import Run, Wiring, connected, trace

TOLERANCE = 1e-3
"""Largest difference of an output channel relative to the largest value in it: that of the
threshold of |gamma|."""

EXACT = 1e-5
"""The same where all that went was exactly dead or constant, and of the surgery itself."""

Borders = Literal["exact", "fold"]


@dataclass(frozen=True)
class Stripped:
    """A network without its collapsed filters.

    Args:
        model: In eval mode, with plain BN in the place of psBN.
        record: What went and why, what stayed and why, and the proof; JSON can hold it.
    """

    model: nn.Module
    record: dict[str, Any]


def strip(
    model: nn.Module,
    inputs: tuple[int, ...] | Tensor | Run,
    *,
    threshold: float = THRESHOLD,
    inactive_below: float | None = None,
    borders: Borders = "exact",
    tolerance: float = TOLERANCE,
) -> Stripped:
    """Take the filters that carry nothing out of a network.

    - *dead* filters (collapsed, nothing comes through the rectifier) go;
    - *constant* ones (collapsed, a constant comes through) go, and what reads them gets the
      constant into its bias, or into the running mean of its BN. At the border of a convolution
      that pads with zeros that is not exact: there, of all constant channels with the same
      readers one stays and carries the constants of the others, which is;
    - *inactive* ones (the ReLU practically never fires) go if ``inactive_below`` is given;
    - so do the channels that only these read: in front of a depthwise convolution, or beside them
      in a product.

    In sums, concatenations, depthwise and grouped convolutions and shared layers a channel goes
    only if all that is coupled to it lets it. What cannot be told stays, and the record says so.

    Args:
        model: Any module, of which nothing is changed. psBN becomes BN in the copy.
        inputs: What to run both networks on: images (N, C, H, W) for ``model(images)`` or a
            detector of mmdet; the size (C, H, W) of two random ones; or a function that calls the
            model it is given. With images and sizes the proof is made on others of another scale,
            sign and size too; a function should give what shows the network's whole range.
        threshold: Of ``|gamma|``.
        inactive_below: Of the activation probability below which a filter is inactive, as
            :data:`INACTIVE_BELOW`; None: they stay.
        borders: ``"fold"``: fold constants into biases although padded borders then differ.
        tolerance: Of the largest difference in an output channel relative to the largest value in
            it.

    Returns:
        The new network and the record.

    Raises:
        CallError: The model cannot be called so.
        StripError: It cannot be copied, it is damaged, or the outputs differ by more than
            ``tolerance``.
        MeasureError: A wrong threshold, or no normalization layer.
    """
    check_thresholds(threshold, 0 if inactive_below is None else inactive_below)
    if borders not in ("exact", "fold"):
        raise StripError(f"borders is 'exact' or 'fold', got {borders!r}")
    original = _copied(model)
    original.eval()  # that of mmdet's backbones returns nothing
    n_psbn = sum(isinstance(m, PostShift) for m in original.modules())
    to_bn(original)
    calls = Calls(original, inputs)
    filters = _Filters(original, threshold, inactive_below)
    wide = calls.widen(original)
    filters.look_behind(trace(wide, calls.first))
    wirings = _all_wirings(wide, calls, filters.constants)
    planned = plan(wide, wirings, filters, borders == "fold")
    wide_twin, planned = _carried_out(wide, planned, calls.first, filters, borders == "exact")
    # The narrow one is written down in the precision that the model has.
    twin = narrow(copy.deepcopy(original), wide_twin.state_dict())

    record: dict[str, Any] = {
        "threshold": threshold,
        "inactive_below": inactive_below,
        "borders": borders,
        "psbn_layers_to_bn": n_psbn,
        **_filters_record(planned, filters),
        "proof": _proof(
            wide, wide_twin, twin, planned, filters, calls, tolerance, borders == "exact"
        ),
        "parameters": {
            name: sum(p.numel() for p in m.parameters())
            for name, m in (("before", original), ("after", twin))
        },
        "macs": {"before": _macs(wide, calls), "after": _macs(wide_twin, calls)},
    }
    if inactive_below is not None:
        record["inactive_bound"] = filters.inactive_bound(record["removed"])
    return Stripped(twin, record)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # of torch.nn.utils.prune and weight_norm: tensors with a history
        raise StripError(
            "the model cannot be copied, so it cannot be stripped: "
            f"{' '.join(str(error).split())[:150]}; make what torch.nn.utils.prune, weight_norm or "
            "spectral_norm added permanent with their remove functions"
        ) from error


# What the filters are -------------------------------------------------------------------

_RECTIFIES = {"relu", "hardtanh", "clamp", "clamp_min", "where", "maximum", "mul", "hardsigmoid"}


class _Filters:
    """Which filters of the normalization layers of a network carry nothing by themselves.

    Attributes:
        kinds: Layer -> of each filter ``dead``, ``constant``, ``inactive`` or ``live``.
        constants: Layer -> (C,), what a filter that is not live puts out, NaN for live ones.
        exact: Whether all that is not live puts out just that already.
    """

    def __init__(self, model: nn.Module, threshold: float, inactive_below: float | None) -> None:
        modules: Any = norm_modules(model)
        sizes = [m.weight.numel() for m in modules.values()]
        gamma, bias = gather(modules.values())
        self.gamma = dict(zip(modules, gamma.double().split(sizes), strict=True))
        self.bias = dict(zip(modules, bias.double().split(sizes), strict=True))
        self.threshold, self.inactive_below = threshold, inactive_below
        for name in modules:
            if not_finite(self.gamma[name], self.bias[name]).any():
                raise StripError(
                    f"{name} has a gamma or bias that is not finite: the weights are damaged or "
                    "the training has diverged"
                )
        self.kinds: dict[str, list[str]] = {}
        self.constants: dict[str, Tensor] = {}

    def look_behind(self, wiring: Wiring) -> None:
        """Decide on each filter, given what is behind it."""
        for name, gamma in self.gamma.items():
            bias = self.bias[name]
            gone = collapsed(gamma, self.threshold)
            constant = torch.where(gone, bias, torch.nan)
            kinds = ["live"] * len(gamma)
            silent = gone.clone()
            if self.inactive_below is not None:
                silent |= inactive(gamma, bias, self.inactive_below)
            for i in silent.nonzero().flatten().tolist():
                behind = "none"
                if name in wiring.norms:
                    behind = wiring.channel(name, i).activation
                if gone[i]:
                    below = self.threshold if behind in _RECTIFIES else 1e-3 * self.threshold
                    if abs(bias[i]) < below:  # nothing of note comes through
                        constant[i] = torch.clamp(bias[i], max=0) if behind in _RECTIFIES else 0
                    dead = constant[i] == 0 or (behind in _RECTIFIES and constant[i] < 0)
                    kinds[i] = "dead" if dead else "constant"
                elif behind == "relu":
                    constant[i], kinds[i] = bias[i].clamp(max=0), "inactive"
            self.kinds[name], self.constants[name] = kinds, constant

    def inactive_bound(self, removed: Mapping[str, Mapping[str, list[int]]]) -> dict[str, float]:
        """Of the inactive filters that went: how often they fire at most, and their mean output.

        For x_hat ~ N(0, 1), z = bias / |gamma|: P(fires) = Phi(z), E[ReLU] = |gamma| phi(z) + bias
        Phi(z).
        """
        fires, mean = 0.0, 0.0
        for name, by_kind in removed.items():
            if gone := by_kind.get("inactive", []):
                gamma, bias = self.gamma[name][gone].abs(), self.bias[name][gone]
                p = activation_probability(gamma, bias)
                density = torch.exp(-((bias / gamma) ** 2) / 2) / (2 * torch.pi) ** 0.5
                fires = max(fires, float(p.max()))
                mean = max(mean, float((gamma * density + bias * p).max()))
        return {"largest_probability": fires, "largest_mean_output": mean}


# What goes ------------------------------------------------------------------------------


def _layers_to_run(model: nn.Module) -> dict[str, int]:
    """Weight -> input channels of each convolution and linear layer; of tied weights the first."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(m.weight)]: m.in_features if isinstance(m, nn.Linear) else m.in_channels
        for m in model.modules()
        if isinstance(m, (nn.Linear, _ConvNd)) and id(m._parameters.get("weight")) in names
    }


def _all_wirings(
    model: nn.Module, calls: Calls, constants: Mapping[str, Tensor]
) -> list[tuple[Wiring, Run | None]]:
    """The wiring on the inputs, on others of another size, and as it is while training.

    Layers that run in none of them may read anything of as many channels as they take.
    """
    first = trace(model, calls.first, constants)
    wirings: list[tuple[Wiring, Run | None]] = [(first, calls.first)]
    for run in calls.other_sizes():
        try:
            found = trace(model, run, constants)
        except Exception:  # a network for one size of images
            continue
        try:
            alike = not match(first, found, {})
        except UnlikeError:
            alike = False
        if not alike:
            wirings.append((found, run))
    weights = _layers_to_run(model)

    def waiting() -> set[str]:
        seen = {n for w, _ in wirings for n in (*w.readers, *w.computed)}
        return weights.keys() - seen

    if waiting():
        twin = copy.deepcopy(model).train()
        try:
            found = trace(twin, calls.first, constants)
        except Exception:  # what wants targets, say
            pass
        else:
            wirings.append((found, calls.first))
            found.training = True
        if left := waiting():
            watch = frozenset(weights[name] for name in left)
            wirings.append((trace(model, calls.first, constants, watch), None))
    return wirings


@dataclass
class Part:
    """Entries of several tensors that are one channel: all of them go, or none.

    Args:
        entries: (tensor, side, index); the side is ``out`` or ``in`` of a weight, ``each`` of a
            vector (bias, gamma, running mean ...).
        reads: (weight, input channel) -> the constant that arrives there, but for depthwise ones.
        filters: (normalization layer, channel).
        why: Why it stays, or None.
        pads: Whether a constant other than 0 arrives at a convolution that pads with zeros.
    """

    entries: list[tuple[str, str, int]] = field(default_factory=list)
    reads: dict[tuple[str, int], float] = field(default_factory=dict)
    filters: list[tuple[str, int]] = field(default_factory=list)
    why: str | None = None
    pads: bool = False


@dataclass
class Plan:
    """What is to be done with a network.

    Args:
        wirings: As it is, with the calls that they are of; None: not to be compared.
        readers: Weight -> how it is read.
        parts: All channels.
        gone: Indices of those that go.
        merged: Those of them whose constant another one carries from now on.
        order: Weight or vector -> which of its old input channels, or elements, stand in which
            place, where that is not their old order (behind a channel shuffle).
    """

    wirings: list[tuple[Wiring, Run | None]]
    readers: dict[str, Reader]
    parts: list[Part]
    gone: list[int]
    merged: dict[int, int]
    order: dict[str, np.ndarray] = field(default_factory=dict)


def plan(
    model: nn.Module,
    wirings: list[tuple[Wiring, Run | None]],
    filters: _Filters,
    fold_borders: bool,
) -> Plan:
    """Decide on every channel.

    A channel goes if each layer that reads it gets a constant there, and nothing else holds on to
    it. What a constant c != 0 adds to a convolution that pads with zeros differs at the border, so
    that no bias can replace it. Many such channels are *merged* into one, exactly: the one that
    stays carries c_r, and its weights grow by c_k / c_r times those of each channel k that goes.
    """
    readers: dict[str, Reader] = {}
    for wiring, _ in wirings:
        for name, reader in wiring.readers.items():
            readers.setdefault(name, reader)
    parts = _parts(model, wirings, readers, filters)
    candidates: list[int] = []
    bordering: list[int] = []
    for number, part in enumerate(parts):
        if part.why is None:
            (bordering if part.pads and not fold_borders else candidates).append(number)
    merged = _merge(parts, bordering, readers)
    gone = candidates + list(merged)
    planned = Plan(wirings, readers, parts, gone, merged)
    _leave_whole_layers(planned)
    return planned


def _parts(
    model: nn.Module,
    wirings: list[tuple[Wiring, Run | None]],
    readers: Mapping[str, Reader],
    filters: _Filters,
) -> list[Part]:
    offsets: dict[tuple[str, str], int] = {}
    slots: list[tuple[str, str, int]] = []

    def at(name: str, side: str, size: int) -> int:
        if (name, side) not in offsets:
            offsets[name, side] = len(slots)
            slots.extend((name, side, i) for i in range(size))
        return offsets[name, side]

    # Slots are numbered first, then the groups of each wiring.
    links: list[tuple[int, np.ndarray, np.ndarray]] = []  # wiring, group, slot
    for number, (wiring, _) in enumerate(wirings):
        group = wiring.group
        for name, reader in wiring.readers.items():
            out = at(name, "out", reader.filters)
            nodes = np.arange(reader.start, reader.start + reader.filters)
            links.append((number, group[nodes], out + np.arange(reader.filters)))
            index, node = reader.slots.T
            varies = ~wiring.free[node]
            into = at(name, "in", reader.inputs)
            links.append((number, group[node[varies]], into + index[varies]))
        for block in wiring.blocks:
            if block.kind == "param" and block.size > 1:
                nodes = np.arange(block.start, block.start + block.size)
                each = at(block.name, "each", block.size)
                links.append((number, group[nodes], each + np.arange(block.size)))
    bases = np.cumsum([len(slots), *(w.size for w, _ in wirings)])
    pairs = [np.stack([bases[n] + g, s], 1) for n, g, s in links]
    label = connected(int(bases[-1]), np.concatenate([np.empty((0, 2), np.int64), *pairs]))
    gammas = {f"{name}.weight" if name else "weight" for name in filters.kinds}
    numbers: dict[int, int] = {}
    parts: list[Part] = []
    for slot, (name, side, _) in enumerate(slots):
        if side == "out" or name in gammas:
            number = numbers.setdefault(int(label[slot]), len(parts))
            if number == len(parts):
                parts.append(Part())
    for slot, entry in enumerate(slots):
        if (number_of := numbers.get(int(label[slot]))) is not None:
            parts[number_of].entries.append(entry)
    part_of_slot = [numbers.get(int(label[slot])) for slot in range(len(slots))]

    def keep(number: int | None, why: str) -> None:
        if number is not None and parts[number].why is None:
            parts[number].why = why

    for name in filters.kinds:
        weight = f"{name}.weight" if name else "weight"
        if (start := offsets.get((weight, "each"))) is not None:
            for i in range(len(filters.kinds[name])):
                if (number_of := part_of_slot[start + i]) is not None:
                    parts[number_of].filters.append((name, i))
    for number, (wiring, _) in enumerate(wirings):
        of_group = {
            int(g): numbers.get(int(label[bases[number] + g])) for g in np.unique(wiring.group)
        }
        for held in wiring.held:
            for g in np.unique(wiring.group[held.nodes]):
                keep(of_group[int(g)], held.why)
        for block in wiring.blocks:
            if block.kind in ("input", "opaque", "whole"):
                why = f"it is combined with {_what(block)}"
                for g in np.unique(wiring.group[block.start : block.start + block.size]):
                    keep(of_group[int(g)], why)
        for name in wiring.computed & readers.keys():
            for side in ("out", "in"):
                for i in range(offsets[name, side], len(slots)):
                    if slots[i][:2] != (name, side):
                        break
                    keep(part_of_slot[i], f"the weight {name} is not its layer's alone")
    seen: set[str] = set()
    for wiring, _ in wirings:
        for name, reader in wiring.readers.items():
            if reader.depthwise or (wiring.training and name in seen):
                continue
            seen.add(name)
            steady, value = wiring.arriving(reader)
            start = offsets[name, "in"]
            for i in range(reader.inputs):
                number_of = part_of_slot[start + i]
                if number_of is None:
                    continue
                part = parts[number_of]
                before = part.reads.get((name, i))
                if not steady[i]:
                    keep(
                        number_of,
                        f"{reader.module} reads something that varies in the same channel",
                    )
                elif np.isnan(value[i]) or before not in (None, value[i]):
                    keep(number_of, f"{reader.module} reads it with padding beside its constant")
                elif value[i] != 0 and reader.transposed:
                    keep(
                        number_of,
                        f"{reader.module} is a transposed convolution, which makes no constant of "
                        "a constant",
                    )
                elif value[i] != 0 and not _takes_bias(model, name, reader):
                    keep(number_of, f"{reader.module} has no place for the constant that it brings")
                part.reads[name, i] = float(value[i])
                part.pads |= bool(value[i] != 0 and reader.pads)
    for part in parts:
        gone = any(filters.kinds[n][i] != "live" for n, i in part.filters)
        if part.why is None and not part.reads and not gone:
            part.why = "nothing was seen to read it"
        if part.why is None and not any(side == "out" for _, side, _ in part.entries):
            part.why = "no layer in front of it is known"
    return parts


def _what(block: Any) -> str:
    if block.kind == "input":
        return "the input of the model"
    if block.kind == "whole":
        return f"the parameter {block.name}"
    return f"what {block.name} in {block.module or 'the model'} puts out"


def _takes_bias(model: nn.Module, name: str, reader: Reader) -> bool:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return leaf == "weight" and hasattr(module, "bias")


def _merge(
    parts: list[Part], bordering: list[int], readers: Mapping[str, Reader]
) -> dict[int, int]:
    """Part that goes -> the one of the same readers that carries its constant too."""
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number in bordering:
        part = parts[number]
        key = []
        for (name, index), value in part.reads.items():
            reader = readers[name]
            group = index * reader.groups // reader.inputs if value != 0 else None
            key.append((name, group, value != 0))
        alike[tuple(sorted(key, key=repr))].append(number)
    merged = {}
    for members in alike.values():

        def smallest(number: int) -> float:
            reads = parts[number].reads.items()
            return min(abs(v) for (n, _), v in reads if v != 0 and readers[n].pads)

        into = max(members, key=smallest)
        name = next(n for (n, _), v in parts[into].reads.items() if v != 0 and readers[n].pads)
        why = (
            f"it brings a constant to {readers[name].module}, which pads with zeros: no bias has "
            "the same effect"
        )
        if len(members) > 1:
            why += f" (that of {len(members) - 1} others is merged into it)"
        parts[into].why = why
        merged.update({number: into for number in members if number != into})
    return merged


def _leave_whole_layers(planned: Plan) -> None:
    """Keep, of those to go, what a layer needs: one channel at least, and equal groups."""
    while True:
        lost: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
        for number in planned.gone:
            for name, side, index in planned.parts[number].entries:
                if side != "each":
                    lost[name, side][index] = number
        back: dict[int, str] = {}
        for (name, side), numbers in lost.items():
            reader = planned.readers[name]
            size = reader.inputs if side == "in" else reader.filters
            groups = 1 if reader.depthwise else reader.groups
            by_group: list[list[int]] = [[] for _ in range(groups)]
            for index, number in sorted(numbers.items()):
                by_group[index * groups // size].append(number)
            fewest = min(map(len, by_group))
            why = f"{reader.module} is a grouped convolution: each of its groups loses {fewest}"
            if fewest == size // groups:
                fewest -= 1
                why = f"{reader.module} keeps one channel at least"
            for each in by_group:
                back.update(dict.fromkeys(each[fewest:], why))
        if not back:
            gone = set(planned.gone)
            planned.merged = {k: v for k, v in planned.merged.items() if k in gone}
            return
        _put_back(planned, back)


def _put_back(planned: Plan, back: Mapping[int, str]) -> None:
    planned.gone = [number for number in planned.gone if number not in back]
    for number, why in back.items():
        planned.parts[number].why = why


# Surgery --------------------------------------------------------------------------------


@torch.no_grad()
def take_out(
    model: nn.Module, planned: Plan
) -> tuple[nn.Module, dict[tuple[str, str], np.ndarray]]:
    """A copy of a network without what goes, in the precision that the network has.

    Args:
        model: Nothing of it is changed.
        planned: What goes.

    Returns:
        The copy; and (tensor, side) -> the old indices of what is left.
    """
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    shared = defaultdict(list)
    for key, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        shared[id(tensor)].append(key)
    names = {keys[0]: keys for keys in shared.values()}
    new = _fold(planned, weights)
    lost: dict[tuple[str, str], set[int]] = defaultdict(set)
    for number in planned.gone:
        for name, side, index in planned.parts[number].entries:
            lost[name, side].add(index)
    for bias in new:
        if out := lost.get((f"{bias[: -len('bias')]}weight", "out")):
            lost[bias, "each"] = out
    kept: dict[tuple[str, str], np.ndarray] = {}
    for (name, side), gone in lost.items():
        reader = planned.readers.get(name)
        tensor = weights[name]
        size = tensor.numel()
        if side != "each" and reader is not None:
            size = reader.inputs if side == "in" else reader.filters
        kept[name, side] = np.array([i for i in range(size) if i not in gone])
    for name, indices in planned.order.items():
        side = "in" if name in planned.readers else "each"
        kept[name, side] = indices
    for (name, side), indices in kept.items():
        weights[name] = _select(
            weights[name], planned.readers.get(name), side, torch.from_numpy(indices)
        )
    for first, keys in names.items():
        for key in keys[1:]:
            if key in weights:
                weights[key] = weights[first]
    return narrow(copy.deepcopy(model), weights), kept


def _select(weight: Tensor, reader: Reader | None, side: str, kept: Tensor) -> Tensor:
    kept = kept.to(weight.device)
    if side == "each" or reader is None:
        return weight.flatten()[kept].reshape([-1 if n > 1 else 1 for n in weight.shape])
    if reader.depthwise:
        # One dimension runs through input channels or filters, the other counts per group.
        along = (side == "in") == reader.transposed
        return weight.index_select(0, kept) if along else weight
    if (side == "out") != reader.transposed:
        return weight.index_select(0, kept)
    if reader.groups == 1:
        return weight.index_select(1, kept)
    each = kept.view(reader.groups, -1) % weight.shape[1]
    parts = weight.unflatten(0, (reader.groups, -1))
    return torch.cat([part[:, rows] for part, rows in zip(parts, each, strict=True)])


def _fold(planned: Plan, weights: dict[str, Tensor]) -> list[str]:
    """Make weights indifferent to what goes: what its constants added is added elsewhere.

    It goes into the weights of the channel that they are merged into if the layer pads with zeros,
    else into the bias of the layer, or into the running mean of the BN behind it if that alone
    reads it and the layer has no bias, or into a new bias. Returned are the new ones.
    """
    new: list[str] = []
    added: dict[str, Tensor] = {}
    exact = {name: weights[name].double() for name in planned.readers}
    for number in planned.gone:
        part, into = planned.parts[number], planned.merged.get(number)
        carriers: dict[tuple[str, int], list[int]] = defaultdict(list)
        if into is not None:
            for name, index in sorted(planned.parts[into].reads):
                reader = planned.readers[name]
                carriers[name, index * reader.groups // reader.inputs].append(index)
        for (name, index), value in sorted(part.reads.items()):
            if value == 0:
                continue
            reader = planned.readers[name]
            taken = _column(exact[name], reader, index)
            group = index * reader.groups // reader.inputs
            if into is not None and reader.pads:
                other = next(
                    i for i in carriers[name, group] if planned.parts[into].reads[name, i] != 0
                )
                carriers[name, group].remove(other)
                share = value / planned.parts[into].reads[name, other]
                _column(exact[name], reader, other).add_(taken, alpha=share)
            else:
                total = added.setdefault(name, taken.new_zeros(reader.filters))
                total.view(reader.groups, -1)[group] += value * taken.flatten(1).sum(1)
    for name in planned.readers:
        weights[name] = exact[name].to(weights[name].dtype)
    for name, total in added.items():
        reader = planned.readers[name]
        bias = f"{name[: -len('weight')]}bias"
        norms = _norms_behind(planned, name)
        if bias in weights:
            weights[bias] = (weights[bias].double() + total).to(weights[bias].dtype)
        elif norms:
            for norm in norms:
                mean = f"{norm}.running_mean"
                weights[mean] = (weights[mean].double() - total).to(weights[mean].dtype)
        else:
            weights[bias] = total.to(weights[name].dtype)
            new.append(bias)
    return new


def _column(weight: Tensor, reader: Reader, index: int) -> Tensor:
    """The weights of an input channel, (filters that read it, ...), as a view."""
    if reader.transposed:
        return weight[index]
    group, at = divmod(index, weight.shape[1])
    return weight.unflatten(0, (reader.groups, -1))[group, :, at].unsqueeze(1)


def _norms_behind(planned: Plan, name: str) -> list[str]:
    """The BN layers, on running statistics, that alone read a layer and read nothing else."""
    norms: dict[str, None] = {}
    for wiring, _ in planned.wirings:
        reader = wiring.readers.get(name)
        if reader is None:
            continue
        nodes = range(reader.start, reader.start + reader.filters)
        if wiring.used_otherwise(reader):
            return []
        for norm in wiring.norms.values():
            inside = [n in nodes for n in norm.slots[:, 1]]
            if any(inside):
                if not all(inside) or (norm.statistics and not wiring.training):
                    return []
                norms[norm.name] = None
    return list(norms)


# Proof ----------------------------------------------------------------------------------


ATTEMPTS = 60
"""How often a narrowed network is tried at most before what is left of a doubt stays whole."""


def _carried_out(
    original: nn.Module, planned: Plan, run: Run, filters: _Filters, exact: bool
) -> tuple[nn.Module, Plan]:
    """Take out what goes, as far as the narrowed network is wired as the original was.

    Where it is not, the layers that the failure points at are put back; in the end these are tried
    again one by one, whole and in equal numbers of each half, third and quarter.
    """
    families = _families(planned)
    good, aside, whys = families, [], {}
    attempts = 0

    def attempt(some: list[list[int]]) -> tuple[nn.Module, Plan] | Exception:
        nonlocal attempts
        attempts += 1
        try:
            found = _attempt(original, planned, [n for family in some for n in family])
            # Nodes do not tell the pieces of one channel apart (of a focus layer), numbers do.
            reference, _ = _reference(original, found[1], filters)
            if exact and not difference(reference, found[0], run).relative <= EXACT:
                raise UnlikeError("its outputs are others")
            return found
        except Exception as error:  # UnlikeError, or whatever a forward() raises
            return error

    while isinstance(result := attempt(good), Exception):
        if not good:
            raise StripError(f"the network does not run twice alike: {_reason(result)}")
        where = getattr(result, "in_module", "")
        blamed = _pointed_at(planned, good, where) if attempts < ATTEMPTS else good
        whys.update({n: _reason(result) for family in blamed for n in family})
        aside += blamed
        good = [family for family in good if family not in blamed]
    for family in aside:
        for fewer in (family, *_balanced(planned, family)):
            if attempts < ATTEMPTS:
                again = attempt([*good, fewer])
                if not isinstance(again, Exception):
                    result, good = again, [*good, fewer]
                    break
                whys.update(dict.fromkeys(family, _reason(again)))
    twin, done = result
    left = {n for family in good for n in family}
    _put_back(done, {n: whys[n] for family in aside for n in family if n not in left})
    return twin, done


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:100]
    if isinstance(error, UnlikeError):
        return f"without it the network is wired otherwise ({text})"
    return f"the network does not run without it ({text})"


def _attempt(original: nn.Module, planned: Plan, numbers: list[int]) -> tuple[nn.Module, Plan]:
    """Take some parts out, and see that what is left is wired as before."""
    some = copy.copy(planned)
    some.parts = [copy.copy(part) for part in planned.parts]
    some.gone, some.order = numbers, {}
    _leave_whole_layers(some)
    for _ in range(2):
        twin, kept = take_out(original, some)
        found: dict[str, np.ndarray] = {}
        for wiring, run in some.wirings:
            if run is not None:
                other = copy.deepcopy(twin).train() if wiring.training else twin
                found.update(match(wiring, trace(other, run), kept))
        if all(k in some.order and (some.order[k] == v).all() for k, v in found.items()):
            return twin, some
        some.order.update(found)
    raise UnlikeError("channels in another order", next(iter(found)).rpartition(".")[0])


def _pointed_at(planned: Plan, families: list[list[int]], where: str) -> list[list[int]]:
    """The families that are read in a module, or near it if none is; of none known all."""
    reads: list[set[str]] = []
    for family in families:
        entries = [e for number in family for e in planned.parts[number].entries]
        reads.append({name.rpartition(".")[0] for name, side, _ in entries if side == "in"})
    found = [f for f, modules in zip(families, reads, strict=True) if where in modules]
    while not found and where:
        where = where.rpartition(".")[0]
        prefix = f"{where}." if where else ""
        found = [
            f
            for f, modules in zip(families, reads, strict=True)
            if any(module.startswith(prefix) for module in modules)
        ]
    return found or families


def _families(planned: Plan) -> list[list[int]]:
    """The parts that go, those of one layer together."""
    pairs: list[tuple[int, int]] = []
    layers: dict[str, int] = {}
    for i, number in enumerate(planned.gone):
        for name, side, _ in planned.parts[number].entries:
            if side == "out":
                pairs.append((i, layers.setdefault(name, i)))
    label = connected(len(planned.gone), np.array(pairs).reshape(-1, 2))
    families: dict[int, list[int]] = defaultdict(list)
    for i, number in enumerate(planned.gone):
        families[int(label[i])].append(number)
    return list(families.values())


def _balanced(planned: Plan, family: list[int]) -> list[list[int]]:
    """Parts of a family of which every half, third or quarter of the channels loses as many."""
    found = []
    entries = {n: planned.parts[n].entries for n in family}
    first = next(name for name, side, _ in entries[family[0]] if side == "out")
    size = planned.readers[first].filters
    index = {
        n: next((i for name, side, i in entries[n] if (name, side) == (first, "out")), None)
        for n in family
    }
    for blocks in (2, 3, 4, 8):
        by_block: dict[int, list[int]] = {b: [] for b in range(blocks)}
        for number in family:
            if size % blocks == 0 and (i := index[number]) is not None:
                by_block[i * blocks // size].append(number)
        fewest = min(map(len, by_block.values()))
        if fewest:
            found.append([n for each in by_block.values() for n in each[:fewest]])
    return found


def _reference(original: nn.Module, planned: Plan, filters: _Filters) -> tuple[nn.Module, bool]:
    """The original with what went put out exactly the constants; and whether it is the original."""
    twin = copy.deepcopy(original)
    modules: Any = dict(twin.named_modules())
    same = True
    with torch.no_grad():
        for number in planned.gone:
            for name, i in planned.parts[number].filters:
                value = float(filters.constants[name][i])
                if filters.kinds[name][i] == "live":
                    continue
                norm = modules[name]
                same &= bool(norm.weight[i] == 0) and float(norm.bias[i]) == value
                norm.weight[i] = 0
                norm.bias[i] = value
    return twin, same


def _proof(
    original: nn.Module,
    twin: nn.Module,
    written: nn.Module,
    planned: Plan,
    filters: _Filters,
    calls: Calls,
    tolerance: float,
    exact: bool,
) -> dict[str, Any]:
    """Compare the outputs, of the surgery and of the ``written`` model, the twin rounded."""
    reference, same = _reference(original, planned, filters)
    precision = next(original.parameters()).dtype
    surgery = compare_runs(reference, twin, calls.variants())
    # What is told from a small gamma or from normal inputs holds for inputs as those given.
    runs = calls.variants() if same else calls.variants()[:1]
    found = compare_runs(original, copy.deepcopy(written).to(precision), runs)
    if exact and not surgery.relative <= EXACT:
        raise StripError(
            f"the outputs of the stripped network differ by {surgery.relative:.2g} of the largest "
            f"value in a channel where only rounding may be ({surgery.where}): please report it"
        )
    if not found.relative <= tolerance:
        raise StripError(
            f"the outputs of the stripped network differ by {found.relative:.2g} of the largest "
            f"value in a channel ({found.where}), more than the tolerance of {tolerance:g}; were "
            f"what went exactly constant, they would by {surgery.relative:.2g}"
        )
    return {
        "images": calls.described,
        "calls": found.calls,
        "wiring": "equal",
        "precision": str(precision)[6:],
        "largest_relative_difference": found.relative,
        "of_the_surgery_alone": surgery.relative,
        "largest_output": found.largest,
        "outputs": found.outputs,
        "tolerance": tolerance,
    }


# Record ---------------------------------------------------------------------------------


def _filters_record(planned: Plan, filters: _Filters) -> dict[str, Any]:
    """``removed``: layer -> kind -> indices; ``kept``: what could not go, and why; counts."""
    gone = set(planned.gone)
    removed: dict[str, dict[str, list[int]]] = {}
    kept: dict[tuple[str, str], list[int]] = defaultdict(list)
    seen = set()
    for number, part in enumerate(planned.parts):
        for name, index in part.filters:
            if (name, index) in seen:
                continue
            seen.add((name, index))
            kind = filters.kinds[name][index]
            if number in gone:
                # A live filter goes where only removed ones read it.
                kind = "unread" if kind == "live" else kind
                removed.setdefault(name, {}).setdefault(kind, []).append(index)
            elif kind != "live":
                kept[name, part.why or "it is coupled to others"].append(index)
    for name, kinds in filters.kinds.items():
        for index, kind in enumerate(kinds):
            if kind != "live" and (name, index) not in seen:
                kept[name, f"{name} did not run"].append(index)
    for by_kind in removed.values():
        for each in by_kind.values():
            each.sort()
    counts = {
        kind: sum(len(by_kind.get(kind, [])) for by_kind in removed.values())
        for kind in ("dead", "constant", "inactive", "unread")
    }
    return {
        "filters": {
            "all": sum(map(len, filters.kinds.values())),
            "removed": sum(counts.values()),
            **counts,
            "kept": sum(map(len, kept.values())),
        },
        "removed": removed,
        "kept": [
            {"layer": name, "filters": sorted(each), "why": why}
            for (name, why), each in kept.items()
        ],
        "merged": len(planned.merged),
    }


def _macs(model: nn.Module, calls: Calls) -> int | None:
    """Multiply-accumulates of the first call per sample; None where they cannot be counted."""
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            outputs_of(model, calls.first)
    except Exception:  # it never keeps a network from being stripped
        return None
    return counter.get_total_flops() // 2 // calls.samples


def summary(record: Mapping[str, Any], limit: int = 10) -> str:
    """A record in a few lines.

    Args:
        record: Of :func:`strip`.
        limit: Reasons for what stays to show.
    """
    filters, macs, proof = record["filters"], record["macs"], record["proof"]
    parameters = record["parameters"]
    lines = [
        f"{filters['removed']} of {filters['all']} filters removed: {filters['dead']} dead, "
        f"{filters['constant']} constant, {filters['inactive']} inactive, "
        f"{filters['unread']} that only these read or feed"
    ]
    if macs["before"] and macs["after"] is not None:
        lines.append(
            f"multiply-accumulates {macs['before']:.4g} -> {macs['after']:.4g} "
            f"({100 * (1 - macs['after'] / macs['before']):.1f}% saved)"
        )
    lines += [
        f"parameters {parameters['before']} -> {parameters['after']}",
        f"largest difference of an output channel {proof['largest_relative_difference']:.2g}, "
        f"relative to the largest value in it ({proof['calls']} calls in {proof['precision']}; "
        f"images: {proof['images']})",
    ]
    if "inactive_bound" in record:
        bound = record["inactive_bound"]
        lines.append(
            f"inactive filters: of normal inputs each fires for {bound['largest_probability']:.2g} "
            f"at most, with a mean output of {bound['largest_mean_output']:.2g} at most"
        )
    if "seconds" in record:
        seconds = record["seconds"]
        lines.append(
            f"time {1000 * seconds['before']:.1f} -> {1000 * seconds['after']:.1f} ms per image: "
            f"{seconds['speedup']:.2f} times as fast (median of {seconds['rounds']} pairs)"
        )
    whys: dict[str, int] = defaultdict(int)
    for each in record["kept"]:
        whys[each["why"]] += len(each["filters"])
    if whys:
        lines.append(f"{sum(whys.values())} filters left whole:")
    ranked = sorted(whys.items(), key=lambda item: -item[1])
    lines += [f"  {n:5d}  {why}" for why, n in ranked[:limit]]
    if len(ranked) > limit:
        lines.append(f"  ... and {len(ranked) - limit} more reasons; the record has them all")
    return "\n".join(lines)
