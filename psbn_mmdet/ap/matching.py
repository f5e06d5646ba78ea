"""Which boxes match which objects: the part of AP that depends on boxes, done once per model.

Greedy by falling score per image, class and IoU threshold, as pycocotools does it. Why the matching
is compiled here: hotcoco evaluates as fast, but hands its matches out as Python dicts, one per
image and class, which at the size of COCO val2017 takes longer than everything else together.
Tests hold these matches to pycocotools, crowds, ties and all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .coco_files import Annotations, Results
from .compiled import compiled

AREAS = {"all": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
SIZES = {"bbox": ("s", "m", "l"), "segm": ("s", "m", "l"), "keypoints": ("m", "l")}
IOU = np.linspace(0.5, 0.95, 10)
MAX_DETS = {"bbox": 100, "segm": 100, "keypoints": 20}
"""Detections that count per image and class, in pycocotools; mmdet takes AP50 and others at 1000.
"""

# COCO's, of nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles: how far people who
# mark a keypoint disagree, in sizes of the object
SIGMAS = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000

FALSE, TRUE, IGNORED = 0, 1, 2


@dataclass(frozen=True)
class Matches:
    """What one model found in one area range; all that AP depends on, whatever images count.

    Detections (D of them) are sorted by class, then falling score, then image: the order in which
    pycocotools accumulates; those ignored at every IoU threshold are left out. Of detections of
    one image and class with equal scores only the first can be an event; an event has, or its
    likes have, a detection that is true or ignored at some threshold.
    """

    images: int
    status: np.ndarray  # (D, 10) false, true or ignored, per IoU threshold
    image: np.ndarray  # (D,)
    score: np.ndarray  # (D,)
    rank: np.ndarray  # (D,) place by score among the boxes of its image and class
    source: np.ndarray  # (D,) index into the Results
    class_start: np.ndarray  # (K + 1,) into the detections
    tied: np.ndarray  # (D,) how many detections of equal score, image and class start here
    event: np.ndarray  # (E,) index of a detection
    event_start: np.ndarray  # (K + 1,) into the events
    object_image: np.ndarray  # (P,) image of each object that counts, sorted by class
    object_start: np.ndarray  # (K + 1,) into the objects


def match(annotations: Annotations, results: Results, area: str = "all") -> Matches:
    """Matches of one area range: see :func:`match_areas`."""
    return match_areas(annotations, results, [area])[area]


def match_areas(
    annotations: Annotations,
    results: Results,
    areas: Iterable[str],
    max_dets: int | None = None,
) -> dict[str, Matches]:
    """Matches detections to objects as pycocotools does: per image, class and IoU threshold.

    Args:
        annotations: The objects.
        results: The detections, of the same kind.
        areas: Of ``"all"``, ``"s"``, ``"m"`` and ``"l"``; objects and unmatched detections outside
            the range are ignored.
        max_dets: Detections that count per image and class; by default :data:`MAX_DETS`.
    """
    max_dets = max_dets or MAX_DETS[annotations.kind]
    n = len(annotations.image_ids)
    # a cell is an (image, class) pair that has detections; sorts here are stable, so that equal
    # scores stay in the order of the file
    key = results.cls * n + results.image
    order = np.lexsort((-results.score, key))
    cell, start = np.unique(key[order], return_index=True)
    rank = np.arange(len(order)) - np.repeat(start, np.diff(np.append(start, len(order))))
    order, rank = order[rank < max_dets], rank[rank < max_dets]
    det_start = np.append(np.flatnonzero(rank == 0), len(order))

    object_key = annotations.cls * n + annotations.image
    objects = np.argsort(object_key, kind="stable")
    sorted_key = object_key[objects]
    obj_from = np.searchsorted(sorted_key, cell, "left")
    obj_to = np.searchsorted(sorted_key, cell, "right")
    iou_start = np.append(0, np.cumsum(np.diff(det_start) * (obj_to - obj_from)))
    iou = _OVERLAPS[annotations.kind](
        annotations, results, order, objects, det_start, obj_from, obj_to, iou_start
    )
    size = _size(annotations.kind, results)[order]
    found = {}
    for area in areas:
        low, high = AREAS[area]
        ignored = annotations.crowd | annotations.unlabelled
        ignored = ignored | (annotations.area < low) | (annotations.area > high)
        status = np.zeros((len(order), len(IOU)), np.uint8)
        _match_cells(
            iou,
            iou_start,
            size,
            det_start,
            obj_from,
            obj_to,
            annotations.crowd[objects],
            ignored[objects],
            annotations.nameless[objects],
            np.minimum(IOU, 1 - 1e-10),
            low,
            high,
            status,
        )
        counted = objects[~ignored[objects]]
        found[area] = _matches(annotations, results, order, rank, status, counted)
    return found


def _size(kind: str, results: Results) -> np.ndarray:
    """(D,) in pixels: what decides whether a detection without an object is in an area range."""
    if kind == "segm":
        from pycocotools.mask import area

        return np.array(area([*results.masks]) if len(results.masks) else [], np.float64)
    return results.box[:, 2] * results.box[:, 3]


@compiled
def _box_iou(
    box: np.ndarray,
    obj_box: np.ndarray,
    crowd: np.ndarray,
    det_start: np.ndarray,
    obj_from: np.ndarray,
    obj_to: np.ndarray,
    iou_start: np.ndarray,
) -> np.ndarray:
    """IoU of all pairs of a detection and an object in a cell; of a crowd, over the detection."""
    iou = np.zeros(iou_start[-1])
    for c in range(len(obj_from)):
        at = iou_start[c]
        for d in range(det_start[c], det_start[c + 1]):
            x, y, w, h = box[d]
            for g in range(obj_from[c], obj_to[c]):
                gx, gy, gw, gh = obj_box[g]
                iw = min(w + x, gw + gx) - max(x, gx)
                ih = min(h + y, gh + gy) - max(y, gy)
                if iw > 0 and ih > 0:
                    inter = iw * ih
                    iou[at] = inter / (w * h if crowd[g] else w * h + gw * gh - inter)
                at += 1
    return iou


def _box_overlaps(
    annotations: Annotations,
    results: Results,
    order: np.ndarray,
    objects: np.ndarray,
    *cells: np.ndarray,
) -> np.ndarray:
    crowd = annotations.crowd[objects]
    return _box_iou(results.box[order], annotations.box[objects], crowd, *cells)


def _per_cell(overlap: Callable[..., Any]) -> Callable[..., Any]:
    """Overlaps cell by cell: ``overlap(annotations, results, detections, objects)``, (d, g)."""

    def overlaps(
        annotations: Annotations,
        results: Results,
        order: np.ndarray,
        objects: np.ndarray,
        det_start: np.ndarray,
        obj_from: np.ndarray,
        obj_to: np.ndarray,
        iou_start: np.ndarray,
    ) -> np.ndarray:
        iou = np.zeros(iou_start[-1])
        for c in np.flatnonzero(np.diff(iou_start)):
            found = order[det_start[c] : det_start[c + 1]]
            there = objects[obj_from[c] : obj_to[c]]
            one = overlap(annotations, results, found, there)
            iou[iou_start[c] : iou_start[c + 1]] = one.ravel()
        return iou

    return overlaps


def _mask_iou(
    annotations: Annotations, results: Results, found: np.ndarray, there: np.ndarray
) -> np.ndarray:
    from pycocotools.mask import iou

    masks = [results.masks[d] for d in found], [annotations.masks[g] for g in there]
    return iou(*masks, annotations.crowd[there].astype(np.uint8))


def _keypoint_similarity(
    annotations: Annotations, results: Results, found: np.ndarray, there: np.ndarray
) -> np.ndarray:
    """COCO's OKS: mean over the labelled keypoints of exp(-d^2 / (2 area (2 sigma)^2)).

    An object without one (it never counts) is compared by how far keypoints lie outside of its
    box, made three times as large.
    """
    x, y = np.moveaxis(results.keypoints[found][:, None], -1, 0)  # (d, 1, 17)
    gx, gy, seen = np.moveaxis(annotations.keypoints[there][None], -1, 0)  # (1, g, 17)
    labelled = seen > 0
    some = labelled.any(-1, keepdims=True)
    left, top, w, h = np.moveaxis(annotations.box[there], -1, 0)[:, None, :, None]
    dx = np.maximum(0, left - w - x) + np.maximum(0, x - left - 2 * w)
    dy = np.maximum(0, top - h - y) + np.maximum(0, y - top - 2 * h)
    dx, dy = np.where(some, x - gx, dx), np.where(some, y - gy, dy)
    area = annotations.area[there][None, :, None] + np.spacing(1)
    similar = np.exp(-(dx**2 + dy**2) / (2 * SIGMAS) ** 2 / area / 2)
    weight = np.where(some, labelled, True)
    return (similar * weight).sum(-1) / weight.sum(-1)


_OVERLAPS = {
    "bbox": _box_overlaps,
    "segm": _per_cell(_mask_iou),
    "keypoints": _per_cell(_keypoint_similarity),
}


def _matches(
    annotations: Annotations,
    results: Results,
    order: np.ndarray,
    rank: np.ndarray,
    status: np.ndarray,
    counted: np.ndarray,
) -> Matches:
    """Sorts what was matched cell by cell into what AP accumulates over."""
    k = len(annotations.class_ids)
    # what is ignored at every threshold, most boxes of a size class, counts for nothing
    counts = np.flatnonzero((status != IGNORED).any(1))
    # cells come by class and image; by class and score it is what AP accumulates over
    resort = counts[np.lexsort((-results.score[order[counts]], results.cls[order[counts]]))]
    order, rank, status = order[resort], rank[resort], status[resort]
    image = results.image[order].astype(np.int32)  # half the memory that a resample walks through
    score, cls = results.score[order], results.cls[order]
    class_start = np.searchsorted(cls, np.arange(k + 1))
    same = (image[1:] == image[:-1]) & (score[1:] == score[:-1]) & (cls[1:] == cls[:-1])
    first = np.flatnonzero(np.append(True, ~same)) if len(order) else np.zeros(0, np.int64)
    tied = np.zeros(len(order), np.int64)
    tied[first] = np.diff(np.append(first, len(order)))
    found = np.logical_or.reduceat((status != FALSE).any(1), first) if len(first) else first
    event = first[found.astype(bool)]
    return Matches(
        images=len(annotations.image_ids),
        status=status,
        image=image,
        score=score,
        rank=rank,
        source=order,
        class_start=class_start,
        tied=tied,
        event=event,
        event_start=np.searchsorted(event, class_start),
        object_image=annotations.image[counted].astype(np.int32),
        object_start=np.searchsorted(annotations.cls[counted], np.arange(k + 1)),
    )


@compiled
def _match_cells(
    iou: np.ndarray,
    iou_start: np.ndarray,
    size: np.ndarray,
    det_start: np.ndarray,
    obj_from: np.ndarray,
    obj_to: np.ndarray,
    crowd: np.ndarray,
    ignored: np.ndarray,
    nameless: np.ndarray,
    iou_min: np.ndarray,
    low: float,
    high: float,
    status: np.ndarray,
) -> None:
    """Greedy matching by falling score: each detection takes the free object of highest IoU.

    Crowds can be taken any number of times and are only taken where no counted object fits. Of
    objects with equal IoU the last one is taken. An object with id 0 is taken but counts as no
    match, because pycocotools writes the object's id where it later asks for truth.
    """
    most = 0
    for c in range(len(obj_from)):
        most = max(most, obj_to[c] - obj_from[c])
    place = np.empty(max(most, 1), np.int64)
    taken = np.empty(max(most, 1), np.bool_)
    for c in range(len(obj_from)):
        d0, n_det = det_start[c], det_start[c + 1] - det_start[c]
        n_obj = 0
        for wanted in (False, True):  # counted objects first, then the ignored
            for g in range(obj_from[c], obj_to[c]):
                if ignored[g] == wanted:
                    place[n_obj] = g
                    n_obj += 1
        for t in range(len(iou_min)):
            taken[:n_obj] = False
            for d in range(n_det):
                at = iou_start[c] + d * n_obj - obj_from[c]  # where this detection's IoUs begin
                best, m = iou_min[t], -1
                for j in range(n_obj):
                    g = place[j]
                    if taken[j] and not crowd[g]:
                        continue
                    if m >= 0 and not ignored[place[m]] and ignored[g]:
                        break
                    if iou[at + g] >= best:
                        best, m = iou[at + g], j
                if m >= 0:
                    taken[m] = True
                    if ignored[place[m]]:
                        status[d0 + d, t] = IGNORED
                        continue
                    if not nameless[place[m]]:
                        status[d0 + d, t] = TRUE
                        continue
                if size[d0 + d] < low or size[d0 + d] > high:
                    status[d0 + d, t] = IGNORED
