"""Which channels go, which stay, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from .coupling import Channel, Coupling, width
from .wiring import is_padded


@dataclass
class Plan:
    """What is to be done with the channels of a network.

    Args:
        gone: Channels to take out.
        kept: (channel, why) of those that stay although some filter of it has collapsed.
        merged: Channel that goes -> the one that carries its constant from now on.
        constants: What arrives in each input channel of each layer, NaN where something varies.
    """

    gone: list[Channel]
    kept: list[tuple[Channel, str]]
    merged: dict[Channel, Channel]
    constants: Mapping[str, Tensor] = field(repr=False)


def plan(
    model: nn.Module,
    coupling: Coupling,
    constants: Mapping[str, Tensor],
    fold_borders: bool,
) -> Plan:
    """Decide on every channel.

    A channel goes if each layer that reads it gets a constant there, and nothing else holds on to
    it. What a constant c != 0 adds to a convolution that pads with zeros differs at the border, so
    that no bias can replace it. Many such channels are *merged* into one, exactly: the one that
    stays carries c_r, and its weights grow by c_k / c_r times those of each channel k that goes.

    Args:
        model: In which the channels are.
        coupling: Of the model.
        constants: As :func:`.wiring.arriving_constants` gives them.
        fold_borders: Whether constants go into the bias although that is not exact at borders.
    """
    modules = dict(model.named_modules())
    gone: list[Channel] = []
    kept: dict[Channel, str] = {}
    bordering: list[Channel] = []
    for channel in coupling.channels:
        if (reason := channel.blocked or _varies(channel, constants)) or (
            reason := _transposed(channel, constants, modules)
        ):
            kept[channel] = reason
        elif not fold_borders and _padded_constants(channel, constants, modules):
            bordering.append(channel)
        else:
            gone.append(channel)
    merged = _merge(bordering, constants, modules, kept)
    gone += merged
    _leave_whole_layers(modules, gone, kept)
    # Who carried constants of others may stay for another reason, but it must not go.
    merged = {channel: into for channel, into in merged.items() if channel in set(gone)}
    return Plan(gone, list(kept.items()), merged, constants)


def restricted(planned: Plan, model: nn.Module, groups: set[str], why: str | None = None) -> Plan:
    """A plan in which only channels of some groups go.

    Args:
        planned: The whole plan.
        model: In which the channels are.
        groups: The groups, as :class:`.coupling.Channel` names them.
        why: What keeps the others.
    """
    gone = [channel for channel in planned.gone if channel.group in groups]
    kept = dict(planned.kept)
    kept.update({c: why or "not asked for" for c in planned.gone if c.group not in groups})
    _leave_whole_layers(dict(model.named_modules()), gone, kept)
    still = set(gone)
    merged = {channel: into for channel, into in planned.merged.items() if channel in still}
    return Plan(gone, list(kept.items()), merged, planned.constants)


def _varies(channel: Channel, constants: Mapping[str, Tensor]) -> str | None:
    for name, index in channel.inputs:
        if name not in constants:
            return f"{name} reads it, which did not run"
        if constants[name][index].isnan():
            return f"{name} reads something that varies in the same channel"
    return None


def _transposed(
    channel: Channel, constants: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> str | None:
    for name, index in channel.inputs:
        if getattr(modules[name], "transposed", False) and constants[name][index] != 0:
            return f"{name} is a transposed convolution, which makes no constant of a constant"
    return None


def _padded_constants(
    channel: Channel, constants: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> list[float]:
    """The constants, other than 0, that this channel brings to convolutions that pad with zeros."""
    return [
        float(constants[name][index])
        for name, index in channel.inputs
        if constants[name][index] != 0 and is_padded(modules[name])
    ]


def _merge(
    channels: list[Channel],
    constants: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    kept: dict[Channel, str],
) -> dict[Channel, Channel]:
    """Channel that goes -> the one of the same readers that carries its constant too."""
    alike: dict[tuple, list[Channel]] = defaultdict(list)
    for channel in channels:
        readers = []
        for name, index in channel.inputs:
            groups = getattr(modules[name], "groups", 1)
            carried = bool(constants[name][index] != 0)  # a 0 needs nobody to carry it
            group = index * groups // width(modules[name], "in") if carried else None
            readers.append((name, group))
        alike[channel.group, tuple(readers)].append(channel)
    merged = {}
    for members in alike.values():
        into = max(members, key=lambda c: min(map(abs, _padded_constants(c, constants, modules))))
        name = into.inputs[0][0]
        kept[into] = (
            f"it brings a constant to {name}, which pads with zeros: no bias has the same effect"
        )
        if len(members) > 1:
            kept[into] += f" (that of {len(members) - 1} others is merged into it)"
        merged.update({channel: into for channel in members if channel is not into})
    return merged


def _leave_whole_layers(
    modules: Mapping[str, nn.Module], gone: list[Channel], kept: dict[Channel, str]
) -> None:
    """Keep, of those to go, what a layer needs: one channel at least, and equal groups."""
    while True:
        lost: dict[tuple[str, str], dict[int, Channel]] = defaultdict(dict)
        for channel in gone:
            for name, side, index in channel.entries:
                lost[name, side][index] = channel
        back: dict[Channel, str] = {}
        for (name, side), channels in lost.items():
            size = width(modules[name], side)
            groups = getattr(modules[name], "groups", 1) if side != "both" else 1
            parts: list[list[Channel]] = [[] for _ in range(groups)]
            for index, channel in sorted(channels.items()):
                parts[index * groups // size].append(channel)
            fewest = min(map(len, parts))
            why = f"{name} is a grouped convolution: each of its groups loses {fewest}"
            if fewest == size // groups:
                fewest -= 1
                why = f"{name} keeps one channel at least"
            for part in parts:
                back.update(dict.fromkeys(part[fewest:], why))
        if not back:
            return
        gone[:] = [channel for channel in gone if channel not in back]
        kept.update(back)
