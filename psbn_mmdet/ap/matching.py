"""Which boxes match which objects: the part of AP that depends on boxes, done once per model.

Greedy by falling score per image, class and IoU threshold, as pycocotools does it. Why the matching
is compiled here: hotcoco evaluates as fast, but hands its matches out as Python dicts, one per
image and class, which at the size of COCO val2017 takes longer than everything else together.
Tests hold these matches to pycocotools, crowds, ties and all.
"""

from dataclasses import dataclass

import numba
import numpy as np

from .coco_files import Annotations, Results

AREAS = {"all": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
IOU = np.linspace(0.5, 0.95, 10)
MAX_BOXES = 100  # per image and class, as in pycocotools; AR is also taken at 1 and 10

FALSE, TRUE, IGNORED, TIED = 0, 1, 2, 3


@dataclass(frozen=True)
class Matches:
    """What one model found in one area range; all that AP depends on, whatever images count.

    Detections (D of them) are sorted by class, then falling score, then image: the order in which
    pycocotools accumulates; those ignored at every IoU threshold are left out. Events are, per
    class and IoU threshold, the detections that are true or ignored, and the ties described at
    ``evaluate._weighted_ap``.
    """

    images: int
    status: np.ndarray  # (10, D) false, true or ignored, per IoU threshold
    image: np.ndarray  # (D,)
    score: np.ndarray  # (D,)
    rank: np.ndarray  # (D,) place by score among the boxes of its image and class
    source: np.ndarray  # (D,) index into the Results
    class_start: np.ndarray  # (K + 1,) into the detections
    tied: np.ndarray  # (D,) how many detections of equal score, image and class start here
    event: np.ndarray  # (E,) index of a detection
    event_kind: np.ndarray  # (E,)
    event_start: np.ndarray  # (K * 10 + 1,) into the events
    object_image: np.ndarray  # (P,) image of each object that counts, sorted by class
    object_start: np.ndarray  # (K + 1,) into the objects


def match(annotations: Annotations, results: Results, area: str = "all") -> Matches:
    """Matches detections to objects as pycocotools does: per image, class and IoU threshold.

    Args:
        area: ``"all"``, ``"s"``, ``"m"`` or ``"l"``; objects and unmatched detections outside the
            range are ignored.
    """
    low, high = AREAS[area]
    n, k = len(annotations.image_ids), len(annotations.class_ids)
    # a cell is an (image, class) pair that has detections; sorts here are stable, so that equal
    # scores stay in the order of the file
    key = results.cls * n + results.image
    order = np.lexsort((-results.score, key))
    cell, start = np.unique(key[order], return_index=True)
    rank = np.arange(len(order)) - np.repeat(start, np.diff(np.append(start, len(order))))
    order, rank = order[rank < MAX_BOXES], rank[rank < MAX_BOXES]
    det_start = np.append(np.flatnonzero(rank == 0), len(order))

    object_key = annotations.cls * n + annotations.image
    objects = np.argsort(object_key, kind="stable")
    ignored = annotations.crowd | (annotations.area < low) | (annotations.area > high)
    sorted_key = object_key[objects]
    status = np.zeros((len(IOU), len(order)), np.uint8)
    _match_cells(
        results.box[order],
        det_start,
        annotations.box[objects],
        np.searchsorted(sorted_key, cell, "left"),
        np.searchsorted(sorted_key, cell, "right"),
        annotations.crowd[objects],
        ignored[objects],
        annotations.nameless[objects],
        np.minimum(IOU, 1 - 1e-10),
        low,
        high,
        status,
    )
    # what is ignored at every threshold, most boxes of a size class, counts for nothing
    counts = np.flatnonzero((status != IGNORED).any(0))
    # cells come by class and image; by class and score it is what AP accumulates over
    resort = counts[np.lexsort((-results.score[order[counts]], results.cls[order[counts]]))]
    order, rank, status = order[resort], rank[resort], np.ascontiguousarray(status[:, resort])
    image = results.image[order].astype(np.int32)  # half the memory that a resample walks through
    score, cls = results.score[order], results.cls[order]
    class_start = np.searchsorted(cls, np.arange(k + 1))
    same = (image[1:] == image[:-1]) & (score[1:] == score[:-1]) & (cls[1:] == cls[:-1])
    first = np.flatnonzero(np.append(True, ~same)) if len(order) else np.zeros(0, np.int64)
    tied = np.zeros(len(order), np.int64)
    tied[first] = np.diff(np.append(first, len(order)))
    event, kind, event_start = _events(status, class_start, tied)
    counted = objects[~ignored[objects]]
    return Matches(
        images=n,
        status=status,
        image=image,
        score=score,
        rank=rank,
        source=order,
        class_start=class_start,
        tied=tied,
        event=event,
        event_kind=kind,
        event_start=event_start,
        object_image=annotations.image[counted].astype(np.int32),
        object_start=np.searchsorted(annotations.cls[counted], np.arange(k + 1)),
    )


@numba.njit(cache=True, nogil=True)
def _match_cells(
    box, det_start, obj_box, obj_from, obj_to, crowd, ignored, nameless, iou_min, low, high, status
):
    """Greedy matching by falling score: each detection takes the free object of highest IoU.

    Crowds can be taken any number of times and are only taken where no counted object fits. Of
    objects with equal IoU the last one is taken. An object with id 0 is taken but counts as no
    match, because pycocotools writes the object's id where it later asks for truth.
    """
    most = 0
    for c in range(len(obj_from)):
        most = max(most, obj_to[c] - obj_from[c])
    iou = np.empty((MAX_BOXES, max(most, 1)))
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
        for d in range(n_det):
            x, y, w, h = box[d0 + d]
            for j in range(n_obj):
                g = place[j]
                gx, gy, gw, gh = obj_box[g]
                iw = min(w + x, gw + gx) - max(x, gx)
                ih = min(h + y, gh + gy) - max(y, gy)
                iou[d, j] = 0.0
                if iw > 0 and ih > 0:
                    inter = iw * ih
                    iou[d, j] = inter / (w * h if crowd[g] else w * h + gw * gh - inter)
        for t in range(len(iou_min)):
            taken[:n_obj] = False
            for d in range(n_det):
                best, m = iou_min[t], -1
                for j in range(n_obj):
                    g = place[j]
                    if taken[j] and not crowd[g]:
                        continue
                    if m >= 0 and not ignored[place[m]] and ignored[g]:
                        break
                    if iou[d, j] >= best:
                        best, m = iou[d, j], j
                if m >= 0:
                    taken[m] = True
                    if ignored[place[m]]:
                        status[t, d0 + d] = IGNORED
                        continue
                    if not nameless[place[m]]:
                        status[t, d0 + d] = TRUE
                        continue
                area = box[d0 + d, 2] * box[d0 + d, 3]
                if area < low or area > high:
                    status[t, d0 + d] = IGNORED


@numba.njit(cache=True, nogil=True)
def _events(status, class_start, tied):
    """Lists, per class and threshold, what ``evaluate._weighted_ap`` has to stop at."""
    n_thr, n_cls = status.shape[0], len(class_start) - 1
    start = np.zeros(n_cls * n_thr + 1, np.int64)
    event = np.empty(0, np.int32)
    kind = np.empty(0, np.uint8)
    for fill in (False, True):
        n = 0
        for k in range(n_cls):
            for t in range(n_thr):
                d = class_start[k]
                while d < class_start[k + 1]:
                    run = tied[d]
                    true = 0
                    false = 0
                    for i in range(d, d + run):
                        true += status[t, i] == TRUE
                        false += status[t, i] == FALSE
                    if true > 0 and false > 0:
                        if fill:
                            event[n], kind[n] = d, TIED
                        n += 1
                    else:
                        for i in range(d, d + run):
                            if status[t, i] != FALSE:
                                if fill:
                                    event[n], kind[n] = i, status[t, i]
                                n += 1
                    d += run
                start[k * n_thr + t + 1] = n
        if not fill:
            event = np.empty(n, np.int32)
            kind = np.empty(n, np.uint8)
    return event, kind, start
