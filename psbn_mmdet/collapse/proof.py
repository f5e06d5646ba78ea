"""Whether two networks are wired alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from .wiring import Wiring


class UnlikeError(Exception):
    """The narrowed network is wired otherwise, as is first seen in a module."""

    def __init__(self, reason: str, module: str = "") -> None:
        super().__init__(reason)
        self.in_module = module


def match(
    old: Wiring, new: Wiring, kept: Mapping[tuple[str, str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Hold the wiring of a narrowed network against the original's without what went.

    Every channel that is left must arrive where it arrived before, through the same operations.

    Args:
        old, new: Of the same call.
        kept: (tensor, side) -> the old indices of what is left; what is missing is whole.

    Returns:
        Weight or vector -> the old input channel, or element, of each of the new ones, where they
        arrive in another order than the old one (behind a channel shuffle); empty: all is equal.

    Raises:
        UnlikeError: It is not so.
    """
    to_old = np.full(new.size, -1, dtype=np.int64)

    def of_kept(name: str, side: str, size: int) -> np.ndarray:
        found = kept.get((name, side))
        return np.arange(size) if found is None else found

    def named(wiring: Wiring) -> dict[tuple[str, str], Any]:
        return {(b.kind, b.name): b for b in wiring.blocks if b.kind in ("const", "param", "whole")}

    old_named, orders = named(old), {}
    for key, block in named(new).items():
        if key in old_named:
            start = old_named[key].start
            index = of_kept(block.name, "each", block.size)
            if len(index) != block.size:
                raise UnlikeError(f"{block.name} has another size")
            to_old[block.start : block.start + block.size] = start + index
    skip = ("const", "param", "whole")
    old_blocks = [b for b in old.blocks if b.kind not in skip]
    new_blocks = [b for b in new.blocks if b.kind not in skip]
    if [(b.kind, b.name) for b in old_blocks] != [(b.kind, b.name) for b in new_blocks]:
        raise UnlikeError("it runs other operations")
    for before, after in zip(old_blocks, new_blocks, strict=True):
        at = slice(after.start, after.start + after.size)
        if after.kind == "conv":
            index = of_kept(after.name, "out", before.size)
        elif after.kind == "norm":
            weight = f"{after.name}.weight" if after.name else "weight"
            index = of_kept(weight, "each", before.size)
            found = _order(old.norms[before.name].slots, new.norms[after.name].slots, index, to_old)
            if found is None:
                raise UnlikeError(f"other channels arrive at {after.name}", after.name)
            if not np.array_equal(found, index):
                for leaf in ("weight", "bias", "running_mean", "running_var"):
                    orders[f"{after.name}.{leaf}" if after.name else leaf] = found
                index = found
        elif after.kind in ("pointwise", "pool"):
            table = {tuple(row): i for i, row in enumerate(before.inputs)}
            rows = np.where(after.inputs >= 0, to_old[after.inputs], -1)
            index = np.array([table.get(tuple(row), -1) for row in rows], dtype=np.int64)
            if (index < 0).any():
                raise UnlikeError(
                    f"{after.name} in {after.module or 'the model'} joins others", after.module
                )
        else:
            if before.size != after.size:
                raise UnlikeError(
                    f"{after.name} in {after.module or 'the model'} gets another size",
                    after.module,
                )
            index = np.arange(before.size)
        if len(index) != after.size:
            raise UnlikeError(f"{after.name} has another size")
        to_old[at] = before.start + index
    for name, reader in new.readers.items():
        whole = old.readers[name]
        index = of_kept(name, "in", whole.inputs)
        found = _order(whole.slots, reader.slots, index, to_old)
        if found is None:
            raise UnlikeError(f"other channels arrive at {reader.module}", reader.module)
        if not np.array_equal(found, index):
            if reader.depthwise:
                raise UnlikeError(f"{reader.module} gets another order of channels", reader.module)
            size = whole.inputs // whole.groups
            now = len(found) // reader.groups
            if not np.array_equal(found // size, np.arange(len(found)) // now):
                raise UnlikeError(f"channels change groups at {reader.module}", reader.module)
            orders[name] = found
    if len(old.held) != len(new.held):
        raise UnlikeError("other operations read its channels")
    for held, other in zip(old.held, new.held, strict=True):
        if held.why != other.why or not np.array_equal(held.nodes, to_old[other.nodes]):
            raise UnlikeError(other.why)
    return orders


def _order(
    old: np.ndarray, new: np.ndarray, index: np.ndarray, to_old: np.ndarray
) -> np.ndarray | None:
    """Which of the old channels ``index`` arrives in each of the new ones; None: others do."""

    def arriving(slots: np.ndarray, nodes: np.ndarray) -> dict[int, frozenset[int]]:
        sets: dict[int, set[int]] = defaultdict(set)
        for channel, node in zip(slots[:, 0].tolist(), nodes.tolist(), strict=True):
            sets[channel].add(node)
        return {channel: frozenset(each) for channel, each in sets.items()}

    before, after = arriving(old, old[:, 1]), arriving(new, to_old[new[:, 1]])
    if len(after) != len(index):
        return None
    if all(before.get(int(o)) == after.get(n) for n, o in enumerate(index)):
        return index
    places: dict[frozenset[int] | None, list[int]] = defaultdict(list)
    for o in reversed(index.tolist()):
        places[before.get(o)].append(o)
    found = []
    for n in range(len(index)):
        candidates = places.get(after.get(n))
        if not candidates or len(candidates) > 1:
            return None  # none, or pieces of one channel, which nodes do not tell apart
        found.append(candidates.pop())
    return np.array(found)
