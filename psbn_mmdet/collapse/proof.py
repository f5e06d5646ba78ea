"""Whether two networks are one function: by their wiring, and by their outputs."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calls import ways_to_compare
from .narrow import StripError
from .shadows import tensors_in
from .wiring import Run, Wiring


class Calls:
    """How a network is called, on several inputs.

    Args:
        model: In eval mode.
        inputs: As :func:`strip` takes them.

    Attributes:
        described: The inputs in words.
        samples: How many there are in a call, if that is known.

    Raises:
        StripError: The model cannot be called so.
    """

    def __init__(self, model: nn.Module, inputs: tuple[int, ...] | Tensor | Run) -> None:
        self.images: Tensor | None = None
        self.way = 0
        self.samples = 1
        if callable(inputs) and not isinstance(inputs, Tensor):
            self._own: Run = inputs
            self.described = "the caller's own"
        else:
            reference = next(model.parameters())
            if isinstance(inputs, Tensor):
                images, described = inputs, f"{len(inputs)} given"
            else:
                size = tuple(inputs)
                if not size or any(
                    not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in size
                ):
                    raise StripError(
                        "the size of an image is positive whole numbers, as (3, 800, 1333), got "
                        f"{size}"
                    )
                images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
                described = "2 random"
            self.described = f"{described} of {'x'.join(map(str, images.shape[1:]))}"
            self.samples = len(images)
            self.images = images.to(reference.device)
            if images.is_floating_point():
                self.images = self.images.to(reference.dtype)
        self._find_way(model)

    def _find_way(self, model: nn.Module) -> None:
        error: Exception
        ways = [self._own] if self.images is None else ways_to_compare(model, self.images)
        for number, way in enumerate(ways):
            try:
                with torch.no_grad():
                    outputs = outputs_of(model, way)
            except Exception as caught:  # whatever a forward() raises
                error = caught
            else:
                if not outputs:
                    raise StripError(
                        "the model returns no tensors of floating point, so nothing can be compared"
                    )
                self.way = number
                return
        raise StripError(
            f"the model cannot be called with images {self.described}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error

    def widen(self, model: nn.Module) -> nn.Module:
        """The model, and the images from now on, in float64, if it runs so; else the model."""
        if self.images is None or not self.images.is_floating_point():
            return model
        given, wide = self.images, copy.deepcopy(model).double()
        self.images = given.double()
        try:
            outputs_of(wide, self.first)
        except Exception:  # an operator that has no float64
            self.images = given
            return model
        return wide

    def _on(self, images: Tensor) -> Run:
        return lambda model: ways_to_compare(model, images)[self.way](model)

    @property
    def first(self) -> Run:
        return self._own if self.images is None else self._on(self.images)

    def other_sizes(self) -> list[Run]:
        """Images of more pixels, if that is a thing.

        A network that pads or crops as the size wants it does so at sizes that are odd on some
        level: of these, every level down to 1/32 meets several.
        """
        if self.images is None or self.images.dim() < 4 or not self.images.is_floating_point():
            return []
        return [self._on(self._larger(more)) for more in ((1, 2), (4, 8), (16, 31), (3, 6))]

    def _larger(self, more: tuple[int, int]) -> Tensor:
        x = self.images
        assert x is not None
        twice = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return twice[..., : x.shape[-2] + more[0], : x.shape[-1] + more[1]]

    def variants(self) -> list[Run]:
        """Calls for a comparison: the inputs, others of other scale and sign, another size."""
        if self.images is None:
            return [self._own]
        x = self.images
        if not x.is_floating_point():
            return [self._on(x)]
        scales = [self._on(v) for v in (x, -3 * x, 30 * x, 0.05 * x)]
        return scales + self.other_sizes()


def outputs_of(model: nn.Module, run: Run) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return [t for t in tensors_in(run(model)) if t.is_floating_point()]


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


@dataclass(frozen=True)
class Difference:
    """Of the outputs of two networks.

    Args:
        relative: The largest difference within a channel of an output tensor relative to the
            largest absolute value in it, over all calls. NaN where only one is not finite.
        largest: The largest absolute value of all outputs of the first network.
        outputs: How many tensors a call returned.
        calls: How many calls were compared.
        where: The worst channel in words.
    """

    relative: float
    largest: float
    outputs: int
    calls: int = 1
    where: str = ""


def compare_runs(a: nn.Module, b: nn.Module, runs: list[Run]) -> Difference:
    worst = Difference(0.0, 0.0, 0, 0)
    for number, run in enumerate(runs):
        try:
            expected = outputs_of(a, run)
        except Exception:
            if number == 0:
                raise
            continue  # a network for one size of images
        found = compare(expected, outputs_of(b, run))
        high = found if not found.relative <= worst.relative else worst
        worst = Difference(
            high.relative,
            max(found.largest, worst.largest),
            found.outputs,
            worst.calls + 1,
            high.where,
        )
    return worst


def difference(original: nn.Module, stripped: nn.Module, run: Run) -> Difference:
    """Run two networks on the same inputs."""
    return compare(outputs_of(original, run), outputs_of(stripped, run))


def compare(expected: list[Tensor], actual: list[Tensor]) -> Difference:
    """The difference of two networks' outputs, channel by channel.

    Channels are counted along dimension 1. Equal infinities and two NaNs are equal. What the
    rounding of the tensor's largest value can do is no difference.

    Raises:
        StripError: The outputs are not of the same shapes.
    """
    if [t.shape for t in expected] != [t.shape for t in actual] or not expected:
        raise StripError("the stripped network returns something else than the original")
    relative, largest, where = 0.0, 0.0, ""
    for number, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if not a.numel():
            continue
        rounding = 64 * torch.finfo(a.dtype).eps
        a, b = a.double().cpu(), b.double().cpu()
        same = (a == b) | (a.isnan() & b.isnan())
        apart = torch.where(same, 0.0, (a - b).abs())
        size = torch.where(a.isfinite(), a.abs(), 0.0)
        others = [d for d in range(a.dim()) if d != 1] if a.dim() > 1 else list(range(a.dim()))
        if others:
            apart, size = apart.amax(others), size.amax(others)
        apart = apart - rounding * size.max()
        each = torch.where(apart > 0, apart / torch.where(size > 0, size, 1.0), apart.clamp(min=0))
        worst = float(each.max())
        largest = max(largest, float(size.max()))
        if not worst <= relative:
            relative, where = worst, f"output {number}, channel {int(each.reshape(-1).argmax())}"
    return Difference(relative, largest, len(expected), 1, where)


@torch.no_grad()
def time_in_pairs(
    original: nn.Module, stripped: nn.Module, run: Callable[[nn.Module], Any], rounds: int
) -> list[tuple[float, float]]:
    """Seconds of both networks, one after the other, in turns of alternating order.

    Two rounds to warm up are left out.
    """
    pairs = []
    for i in range(-2, rounds):
        seconds = {}
        order = (original, stripped) if i % 2 else (stripped, original)
        for model in order:
            started = time.perf_counter()
            run(model)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[model] = time.perf_counter() - started
        if i >= 0:
            pairs.append((seconds[original], seconds[stripped]))
    return pairs
