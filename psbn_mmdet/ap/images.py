"""Which images a difference in AP comes from, with the boxes that a reader wants to see there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .coco_files import Annotations, Results
from .compare import Comparison
from .evaluate import leave_one_out
from .matching import TRUE, Matches, match

DRAWN = 24
"""Images whose boxes are in the page: those that weigh most on the difference."""

SHOWN_SCORE = 0.3
"""Boxes with a lower score are left out of the drawings."""


def weigh_images(
    c: Comparison, annotations: Annotations, results: Sequence[Results], threads: int = 2
) -> list[dict[str, Any]]:
    """For each difference, the images by falling weight, with the boxes of the first ones.

    What an image weighs on a difference is exact: the difference of AP with it, minus without
    it. That is one evaluation per image and run, a few seconds per run on COCO val2017.

    Returns:
        Per difference the columns ``id``, ``file``, ``weight`` (AP points), ``objects`` and
        ``matched`` (objects matched at IoU 0.50, mean over runs; baseline, arm), all by falling
        absolute weight; ``boxes`` of the first :data:`DRAWN`; ``arms``.
    """
    compared = {arm for d in c.differences for arm in (d.arm, d.baseline)}
    matches = {i: match(annotations, results[i]) for arm in compared for i in c.runs[arm]}
    without = {i: 100 * leave_one_out(m, threads) for i, m in matches.items()}
    weighed = []
    for d in c.differences:
        b, a = c.runs[d.baseline], c.runs[d.arm]
        gap = np.mean([without[i] for i in a], 0) - np.mean([without[i] for i in b], 0)
        weight = np.nan_to_num(d.value[0] - gap)
        objects = np.bincount(matches[a[0]].object_image, minlength=len(weight))
        matched = [np.mean([_matched(matches[i]) for i in arm], 0) for arm in (b, a)]
        order = np.argsort(-np.abs(weight), kind="stable")
        first = [(results[r], matches[r]) for r in (b[0], a[0])]
        weighed.append(
            {
                "id": [annotations.image_ids[i] for i in order],
                "file": [annotations.file_names[i] for i in order],
                "weight": weight[order].round(5).tolist(),
                "objects": objects[order].tolist(),
                "matched": [m[order].round(2).tolist() for m in matched],
                "boxes": [_boxes(i, annotations, first) for i in order[:DRAWN]],
                "arms": [d.baseline, d.arm],
            }
        )
    return weighed


def _matched(m: Matches) -> np.ndarray:
    return np.bincount(m.image[m.status[0] == TRUE], minlength=m.images)


def _boxes(i: int, annotations: Annotations, models: list[tuple[Results, Matches]]) -> dict:
    """Objects and boxes of an image: x, y, w, h, label and, for boxes, whether true at IoU 0.50."""

    def one(box: np.ndarray, label: str, *more) -> list:
        return [*box.round(1).tolist(), label, *more]

    name = annotations.class_names
    objects = np.flatnonzero(annotations.image == i)
    shown = []
    for results, m in models:
        at = np.flatnonzero((m.image == i) & (m.score >= SHOWN_SCORE))
        shown.append(
            [
                one(
                    results.box[m.source[k]],
                    f"{name[results.cls[m.source[k]]]} {m.score[k]:.2f}",
                    int(m.status[0, k]),
                )
                for k in at
            ]
        )
    return {
        "objects": [one(annotations.box[o], name[annotations.cls[o]]) for o in objects],
        "models": shown,
    }
