"""Two networks run beside each other: how much their outputs differ, and their time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...python38 import zip_strict
from ..detectors import ways_to_compare
from .coupling import StripError, tensors_in
from .wiring import Run


def runner(
    model: nn.Module, inputs: tuple[int, ...] | Tensor | Callable[[nn.Module], Any]
) -> tuple[Run, str]:
    """How to call a network, tried once, and in words with what.

    Args:
        model: In eval mode.
        inputs: As :func:`.strip.strip` takes them.

    Raises:
        StripError: The model cannot be called so.
    """
    if callable(inputs) and not isinstance(inputs, Tensor):
        ways, described = [inputs], "the caller's own"
    else:
        reference = next(model.parameters())
        if isinstance(inputs, Tensor):
            images, described = inputs, f"{len(inputs)} given"
            if len(images) < 2:
                raise StripError("one image is too few: constants are told by two different ones")
        else:
            size = tuple(inputs)
            if not size or any(
                not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in size
            ):
                raise StripError(
                    f"the size of an image is positive whole numbers, as (3, 800, 1333), got {size}"
                )
            images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
            described = "2 random"
        described += f" of {'x'.join(map(str, images.shape[1:]))}"
        ways = ways_to_compare(model, images.to(reference.device, reference.dtype))
    error: Exception
    for way in ways:
        try:
            with torch.no_grad():
                outputs = tensors_in(way(model))
        except Exception as caught:  # whatever a forward() raises
            error = caught
        else:
            if not outputs:
                raise StripError(
                    "the model returns no tensors of floating point, so nothing can be compared"
                )
            return way, described
    raise StripError(
        f"the model cannot be called with images {described}: {type(error).__name__}: "
        f"{' '.join(str(error).split())[:200]}"
    ) from error


@dataclass(frozen=True)
class Difference:
    """Of the outputs of two networks.

    Args:
        relative: The largest difference within an output tensor relative to the largest absolute
            value in it; of all output tensors the largest. NaN where something is not finite.
        largest: The largest absolute value of all outputs of the first network.
        outputs: How many tensors were compared.
    """

    relative: float
    largest: float
    outputs: int


class DoesNotRunError(StripError):
    """A stripped network does not run, or returns something of another shape."""


@torch.no_grad()
def difference(original: nn.Module, stripped: nn.Module, run: Run) -> Difference:
    """Run two networks on the same images.

    Raises:
        DoesNotRunError: The second one does not.
    """
    expected = tensors_in(_seeded(original, run))
    try:
        got = tensors_in(_seeded(stripped, run))
    except Exception as error:  # what a wrong trace leads to
        reason = " ".join(str(error).split())[:200]
        raise DoesNotRunError(
            f"the stripped network does not run, so that the model was not traced right: {reason}"
        ) from error
    if [t.shape for t in expected] != [t.shape for t in got] or not expected:
        raise DoesNotRunError("the stripped network returns something else than the original")
    return compare(expected, got)


def compare(expected: list[Tensor], actual: list[Tensor]) -> Difference:
    """The difference of two networks' outputs, tensors of the same shapes in the same order."""
    relative, largest = torch.zeros(()), torch.zeros(())
    for a, b in zip_strict(expected, actual):
        if a.numel():
            a, b = a.double().cpu(), b.double().cpu()
            size = a.abs().max()
            each = (a - b).abs().max() / (size if size > 0 else 1)
            relative = torch.maximum(relative, each)  # of NaN is NaN
            largest = torch.maximum(largest, size)
    return Difference(float(relative), float(largest), len(expected))


def _seeded(model: nn.Module, run: Run) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run(model)


@torch.no_grad()
def time_in_pairs(
    original: nn.Module, stripped: nn.Module, run: Run, rounds: int
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
