"""How a model is called with images, and whether two models answer alike.

Any network takes a batch, a detector of mmdet what it wants.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PsbnError
from .shadows import tensors_in
from .wiring import Run


class CallError(PsbnError, ValueError):
    """A model cannot be called, or two do not return the same kind of thing, in one line."""


def ways_to_call(model: nn.Module, images: Tensor) -> list[Callable[[nn.Module], Any]]:
    """Calls of a model with a batch of images, the best one first.

    Detectors of mmdet get data samples as their own pipeline packs them, without annotations:
    first in the mode ``'tensor'`` (the network without post-processing), then, for those whose
    ``'tensor'`` mode wants annotations (Sparse R-CNN) or does not exist, ``'predict'``.

    Args:
        model: Any module, in eval mode.
        images: (N, C, H, W) for a detector, else as the model wants them.
    """
    if not any(base.__name__ == "BaseDetector" for base in type(model).__mro__):  # mmdet's
        return [lambda m: m(images)]
    proposals = not getattr(model, "with_rpn", False)
    return [
        lambda m: m(images, _data_samples(images, proposals), mode="tensor"),
        lambda m: m(images, _data_samples(images, proposals), mode="predict"),
    ]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it a model is in eval mode and draws the same numbers; all is put back then."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def ways_to_compare(model: nn.Module, images: Tensor) -> list[Callable[[nn.Module], Any]]:
    """As :func:`ways_to_call`, but two networks that compute the same give equal outputs.

    The proposals of a two-stage detector are chosen by score, so that a difference in the last bit
    can reorder them; here they are fixed boxes, and the outputs of its RPN are outputs as well.
    """
    ways = ways_to_call(model, images)
    if len(ways) > 1 and hasattr(model, "rpn_head") and hasattr(model, "roi_head"):
        samples = _data_samples(images, proposals=True)
        proposals = [sample.proposals for sample in samples]

        def two_stage(m: Any) -> Any:
            features = m.extract_feat(images)
            return m.rpn_head(features), m.roi_head.forward(features, proposals, samples)

        ways.insert(0, two_stage)
    return ways


def _data_samples(images: Tensor, proposals: bool) -> list[Any]:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    height, width = images.shape[-2:]
    samples = []
    for i in range(len(images)):
        sample = DetDataSample(
            metainfo={
                "img_id": i,
                "img_path": "",
                "ori_shape": (height, width),
                "img_shape": (height, width),
                "pad_shape": (height, width),
                "batch_input_shape": (height, width),
                "scale_factor": (1.0, 1.0),
                "flip": False,
                "flip_direction": None,
            }
        )
        if proposals:  # Fast R-CNN has no network for them: the image and its quarters
            x, y = width / 2, height / 2
            boxes: list[tuple[float, ...]] = [(0, 0, width, height)]
            boxes += [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
            sample.proposals = InstanceData(bboxes=images.new_tensor(boxes))
        samples.append(sample)
    return samples


class Calls:
    """How a network is called, on several inputs.

    Args:
        model: In eval mode.
        inputs: Images (N, C, H, W); the size (C, H, W) of two random ones; or a function that calls
            the model it is given.

    Attributes:
        described: The inputs in words.
        samples: How many there are in a call, if that is known.

    Raises:
        CallError: The model cannot be called so.
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
                if not isinstance(inputs, (tuple, list)):
                    raise CallError(
                        "images are a tensor, the size of one, or a function that calls the model, "
                        f"got {type(inputs).__name__}"
                    )
                size = tuple(inputs)
                if not size or any(
                    not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in size
                ):
                    raise CallError(
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
                    raise CallError(
                        "the model returns no tensors of floating point, so nothing can be compared"
                    )
                self.way = number
                return
        raise CallError(
            f"the model cannot be called with images {self.described}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error

    def widen(self, model: nn.Module) -> nn.Module:
        """The model, and the images from now on, in float64, if it runs so; else the model."""
        if self.images is None or not self.images.is_floating_point():
            return model
        given = self.images
        try:
            wide = copy.deepcopy(model).double()
            self.images = given.double()
            outputs_of(wide, self.first)
        except Exception:  # a model that cannot be copied, an operator that has no float64
            self.images = given
            return model
        return wide

    def few(self, count: int = 2) -> Calls:
        """The same with the first images alone."""
        fewer = copy.copy(self)
        if self.images is not None:
            fewer.images = self.images[:count]
        return fewer

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
        CallError: The outputs are not of the same shapes.
    """
    if [t.shape for t in expected] != [t.shape for t in actual] or not expected:
        raise CallError("the new network returns something else than the original")
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
