"""Which images a difference in AP comes from, with the boxes that a reader wants to see there."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .coco_files import Annotations, InputError, Results
from .compare import Comparison
from .evaluate import leave_one_out
from .matching import TRUE, Matches

DRAWN = 24
"""Images whose boxes are in the page: those that weigh most on the difference."""

SHOWN_SCORE = 0.3
"""Boxes with a lower score are left out of the drawings."""


def weigh_images(
    c: Comparison,
    annotations: Annotations,
    results: Sequence[Results],
    threads: int = 2,
    folder: str | Path | None = None,
) -> list[dict[str, Any]]:
    """For each difference, the images by falling weight, with the boxes of the first ones.

    What an image weighs on a difference is exact: the difference of AP with it, minus without
    it. That is one evaluation per image and run, a few seconds per run on COCO val2017.

    Args:
        c: The comparison.
        annotations: The data set.
        results: Of every run, in the order of ``c.measured``.
        threads: The result does not depend on them.
        folder: Of the image files, to show them, too.

    Returns:
        Per difference the columns ``id``, ``file``, ``weight`` (AP points), ``objects`` and
        ``matched`` (objects matched at IoU 0.50, mean over runs; baseline, arm), all by falling
        absolute weight; ``boxes`` of the first :data:`DRAWN`, with the images themselves as URLs
        if there is a folder; ``arms``.

    Raises:
        InputError: An image file is not in the folder.
    """
    compared = {arm for d in c.differences for arm in (d.arm, d.baseline)}
    matches = {i: c.measured.matches["all"][i] for arm in compared for i in c.runs[arm]}
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
                "boxes": [
                    {
                        **_boxes(i, annotations, first),
                        "size": [None if np.isnan(x) else float(x) for x in annotations.size[i]],
                        "url": folder and _url(Path(folder, annotations.file_names[i])),
                    }
                    for i in order[:DRAWN]
                ],
                "arms": [d.baseline, d.arm],
            }
        )
    return weighed


def _url(path: Path) -> str:
    """The file itself as a URL, so that a page that shows it needs nothing beside it."""
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise InputError(f"--images: {path}: cannot be read ({error.strerror})") from None
    return f"data:{mimetypes.guess_type(path.name)[0] or 'image/jpeg'};base64,{data}"


def _matched(m: Matches) -> np.ndarray:
    return np.bincount(m.image[m.status[:, 0] == TRUE], minlength=m.images)


def _boxes(
    i: int, annotations: Annotations, models: list[tuple[Results, Matches]]
) -> dict[str, Any]:
    """Objects and boxes of an image: x, y, w, h, label and, for boxes, whether true at IoU 0.50."""

    def one(box: np.ndarray, label: str, *more: Any) -> list[Any]:
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
                    int(m.status[k, 0]),
                )
                for k in at
            ]
        )
    return {
        "objects": [one(annotations.box[o], name[annotations.cls[o]]) for o in objects],
        "models": shown,
    }
