"""How a model is called with images: any network with a batch, a detector of mmdet as it wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
