"""Average precision of COCO result files, and of weighted images, from one matching.

``evaluate`` gives the twelve numbers of pycocotools and the AP of every class, equal to
pycocotools' own. ``match`` is the part that depends on boxes; ``resample`` is what a bootstrap
over images needs on top of it: AP where image i counts ``weights[i]`` times.

Why a resample is cheap. Drawing images with replacement changes no match between boxes, only how
often each image counts. A detection that is no true positive changes precision but never recall,
so the precision-recall curve can only have its corners at true positives. Per class and IoU
threshold we therefore keep just those, and read the number of detections above each from one
running sum of weights that all ten thresholds share.

Why the matching is compiled here. hotcoco evaluates as fast, but hands its matches out as Python
dicts, one per image and class, which at the size of COCO val2017 takes longer than everything
else together. Tests hold these matches to pycocotools, crowds, ties and all.

No torch is needed here: numpy and numba do it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np

from .coco_files import Annotations, Results

AREAS = {"all": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
IOU = np.linspace(0.5, 0.95, 10)
RECALL = np.linspace(0.0, 1.0, 101)
MAX_BOXES = 100  # per image and class, as in pycocotools; AR is also taken at 1 and 10

_FALSE, _TRUE, _IGNORED, _TIED = 0, 1, 2, 3


@dataclass(frozen=True)
class Matches:
    """What one model found in one area range; all that AP depends on, whatever images count.

    Detections (D of them) are sorted by class, then falling score, then image: the order in which
    pycocotools accumulates; those ignored at every IoU threshold are left out. Events are, per
    class and IoU threshold, the detections that are true or ignored, and the ties described at
    ``_weighted_ap``.
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
    counts = np.flatnonzero((status != _IGNORED).any(0))
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
                        status[t, d0 + d] = _IGNORED
                        continue
                    if not nameless[place[m]]:
                        status[t, d0 + d] = _TRUE
                        continue
                area = box[d0 + d, 2] * box[d0 + d, 3]
                if area < low or area > high:
                    status[t, d0 + d] = _IGNORED


@numba.njit(cache=True, nogil=True)
def _events(status, class_start, tied):
    """Lists, per class and threshold, what ``_weighted_ap`` has to stop at."""
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
                        true += status[t, i] == _TRUE
                        false += status[t, i] == _FALSE
                    if true > 0 and false > 0:
                        if fill:
                            event[n], kind[n] = d, _TIED
                        n += 1
                    else:
                        for i in range(d, d + run):
                            if status[t, i] != _FALSE:
                                if fill:
                                    event[n], kind[n] = i, status[t, i]
                                n += 1
                    d += run
                start[k * n_thr + t + 1] = n
        if not fill:
            event = np.empty(n, np.int32)
            kind = np.empty(n, np.uint8)
    return event, kind, start


@numba.njit(cache=True, nogil=True)
def _weighted_ap(
    weight,
    status,
    image,
    class_start,
    tied,
    event,
    event_kind,
    event_start,
    object_image,
    object_start,
    recall,
    classes,
    ap,
    curve,
):
    """AP with image i counted ``weight[i]`` times; ap (K, 3) and curve (3, 101) are filled.

    A true positive of weight w lifts precision and recall w times in a row, so of its w points on
    the curve the last one is the highest and the farthest to the right: one point will do. That
    fails only where one image has boxes of one class with equal scores, some true and some false:
    the copies of the image then alternate between them, and are walked one by one.
    """
    eps = np.finfo(np.float64).eps  # pycocotools' guard against 0 / 0
    n_thr, n_rec = status.shape[0], len(recall)
    above = np.empty(len(image) + 1, np.int64)  # weight of the detections up to here, per class
    need = np.empty(n_rec + 1, np.int64)
    best = np.empty(n_rec)
    curve[:] = 0.0
    present = 0
    for k in classes:
        positives = 0
        for i in range(object_start[k], object_start[k + 1]):
            positives += weight[object_image[i]]
        if positives == 0:
            ap[k] = np.nan
            continue
        present += 1
        d0 = class_start[k]
        above[d0] = 0
        for d in range(d0, class_start[k + 1]):
            above[d + 1] = above[d] + weight[image[d]]
        # need[r]: the fewest true positives with need / positives >= recall[r], in floats
        need[n_rec] = np.iinfo(np.int64).max
        for r in range(n_rec):
            n = np.int64(np.ceil(recall[r] * positives))
            while n > 0 and (n - 1) / positives >= recall[r]:
                n -= 1
            while n / positives < recall[r]:
                n += 1
            need[r] = n
        total = 0.0
        for t in range(n_thr):
            best[:] = 0.0
            true, ignored, reached = 0, 0, 0
            for e in range(event_start[k * n_thr + t], event_start[k * n_thr + t + 1]):
                d = event[e]
                w = weight[image[d]]
                if event_kind[e] == _TRUE:
                    true += w
                    while true >= need[reached + 1]:
                        reached += 1
                    precision = true / ((above[d + 1] - ignored) + eps)
                    if precision > best[reached]:
                        best[reached] = precision
                elif event_kind[e] == _IGNORED:
                    ignored += w
                else:
                    seen = above[d] - ignored
                    for _ in range(w):
                        for i in range(d, d + tied[d]):
                            seen += status[t, i] != _IGNORED
                            if status[t, i] == _TRUE:
                                true += 1
                                while true >= need[reached + 1]:
                                    reached += 1
                                best[reached] = max(best[reached], true / (seen + eps))
                    ignored = above[d] + w * tied[d] - seen
            here = 0.0
            for r in range(n_rec - 1, -1, -1):  # precision: the best at this recall or beyond
                if r < n_rec - 1 and best[r + 1] > best[r]:
                    best[r] = best[r + 1]
                here += best[r]
                curve[0, r] += best[r]
            total += here
            if t == 0 or t == 5:
                which = 1 if t == 0 else 2
                ap[k, which] = here / n_rec
                for r in range(n_rec):
                    curve[which, r] += best[r]
        ap[k, 0] = total / (n_rec * n_thr)
    for r in range(n_rec):
        curve[0, r] /= max(present, 1) * n_thr
        curve[1, r] /= max(present, 1)
        curve[2, r] /= max(present, 1)


@numba.njit(cache=True, nogil=True)
def _weighted_aps(weights, arrays, recall, ap, curve):
    classes = np.arange(ap.shape[1])
    for b in range(len(weights)):
        _weighted_ap(weights[b], *arrays, recall, classes, ap[b], curve[b])


def _arrays(m: Matches) -> tuple[np.ndarray, ...]:
    """The arrays of the matches in the order ``_weighted_ap`` takes them."""
    return (
        m.status,
        m.image,
        m.class_start,
        m.tied,
        m.event,
        m.event_kind,
        m.event_start,
        m.object_image,
        m.object_start,
    )


def weighted_ap(matches: Matches, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AP as if the data set held image i ``weights[b, i]`` times, for every row b.

    Equal to pycocotools on a data set in which the images are physically repeated, the copies of
    an image next to each other in the order of ids.

    Args:
        weights: (B, N) integers, N images.

    Returns:
        AP, AP50 and AP75 per class, (B, K, 3), NaN where a class has no object; and the mean over
        those classes of the precision at the 101 recalls, (B, 3, 101), at IoU 0.50:0.95, 0.50
        and 0.75.
    """
    wanted = f"wanted (any, {matches.images}) integers >= 0"
    if weights.ndim != 2 or weights.shape[1] != matches.images or weights.dtype.kind not in "iu":
        raise ValueError(f"weights: got shape {weights.shape}, {weights.dtype}; {wanted}")
    if (weights < 0).any():
        raise ValueError(f"weights: got {weights.min()}; {wanted}")
    weights = np.ascontiguousarray(weights, np.int32)
    ap = np.empty((len(weights), len(matches.class_start) - 1, 3))
    curve = np.empty((len(weights), 3, len(RECALL)))
    _weighted_aps(weights, _arrays(matches), RECALL, ap, curve)
    return ap, curve


def draw_images(images: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each image comes up in each resample: (resamples, images), rows sum to images."""
    draws = rng.integers(0, images, (resamples, images))
    return np.stack([np.bincount(d, minlength=images) for d in draws])


def resample(
    runs: Sequence[Matches],
    resamples: int = 1000,
    seed: int = 0,
    threads: int = 2,
    progress: Callable[[Iterator], Iterator] = iter,
) -> tuple[np.ndarray, np.ndarray]:
    """Paired bootstrap over images: every run is evaluated on the same resampled images.

    Each resample draws as many images as there are, with replacement; an image that comes up
    three times counts three times.

    Args:
        resamples: 1000 puts the ends of a 95% interval within about 5% of its width.
        progress: wraps the iterator over resamples, e.g. ``tqdm``.

    Returns:
        ``weighted_ap`` of every run in every resample: (B, M, K, 3) and (B, M, 3, 101).
    """
    images = runs[0].images
    if any(m.images != images for m in runs):
        raise ValueError(f"runs on {sorted({m.images for m in runs})} images cannot be paired")
    classes = len(runs[0].class_start) - 1
    ap = np.empty((resamples, len(runs), classes, 3))
    curve = np.empty((resamples, len(runs), 3, len(RECALL)))

    def one(b: int) -> None:
        # a generator per resample: the result does not depend on the number of threads
        weights = draw_images(images, 1, np.random.default_rng([seed, b]))
        for m, run in enumerate(runs):
            a, c = weighted_ap(run, weights)
            ap[b, m], curve[b, m] = a[0], c[0]

    with ThreadPoolExecutor(threads) as pool:  # the compiled code releases the GIL
        for _ in progress(pool.map(one, range(resamples))):
            pass
    return ap, curve


def leave_one_out(matches: Matches, threads: int = 2) -> np.ndarray:
    """AP (mean over classes, in [0, 1]) without image i, for every image i: (N,)."""
    n, k = matches.images, len(matches.class_start) - 1
    cls = np.repeat(np.arange(k), np.diff(matches.class_start))
    object_cls = np.repeat(np.arange(k), np.diff(matches.object_start))
    # an image changes the AP of no class but those it has objects or detections of
    touched = np.unique(np.append(matches.image * k + cls, matches.object_image * k + object_cls))
    start = np.searchsorted(touched, np.arange(n + 1) * k)
    base = weighted_ap(matches, np.ones((1, n), np.int32))[0][0, :, 0]
    out = np.empty(n)
    bounds = np.linspace(0, n, 8 * threads + 1).astype(int)
    shared = _arrays(matches), RECALL, touched % k, start, base, out
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: _leave_out(*part, *shared), itertools.pairwise(bounds)))
    return out


@numba.njit(cache=True, nogil=True)
def _leave_out(first, last, arrays, recall, touched, touched_start, base, out):
    weight = np.ones(len(out), np.int32)
    ap = np.empty((len(base), 3))
    curve = np.empty((3, len(recall)))
    for i in range(first, last):
        classes = touched[touched_start[i] : touched_start[i + 1]]
        weight[i] = 0
        _weighted_ap(weight, *arrays, recall, classes, ap, curve)
        weight[i] = 1
        out[i] = 0.0
        count = 0
        without = base.copy()
        for k in classes:
            without[k] = ap[k, 0]
        for x in without:
            if not np.isnan(x):
                out[i] += x
                count += 1
        out[i] = out[i] / count if count else np.nan


def evaluate(annotations: Annotations, results: Results) -> tuple[dict[str, float], np.ndarray]:
    """The twelve numbers of pycocotools for boxes, and AP per class.

    Returns:
        ``{"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm",
        "ARl"}``, in [0, 1], and (K,) AP in the order of ``annotations.class_ids``. As in
        pycocotools, -1 says that there was no object to measure on.
    """
    stats: dict[str, float] = {}
    per_class = np.empty(0)
    for area in AREAS:
        m = match(annotations, results, area)
        ap = weighted_ap(m, np.ones((1, m.images), int))[0][0]
        if area == "all":
            per_class = np.nan_to_num(ap[:, 0], nan=-1.0)
            for i, name in enumerate(("AP", "AP50", "AP75")):
                stats[name] = mean_over_classes(ap[None, :, i])[0]
            for n in (1, 10, 100):
                stats[f"AR{n}"] = _recall(m, n)
        else:
            stats[f"AP{area}"] = mean_over_classes(ap[None, :, 0])[0]
            stats[f"AR{area}"] = _recall(m, MAX_BOXES)
    order = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    return {k: float(np.nan_to_num(stats[k], nan=-1.0)) for k in order}, per_class


def mean_over_classes(ap: np.ndarray) -> np.ndarray:
    """(..., K) to (...): the mean over the classes that have objects, NaN where none has."""
    present = ~np.isnan(ap)
    count = present.sum(-1)
    return np.where(count, np.where(present, ap, 0).sum(-1) / np.maximum(count, 1), np.nan)


def _recall(m: Matches, boxes: int) -> float:
    """AR: the share of objects found by the first ``boxes`` of each image and class."""
    objects = np.diff(m.object_start)
    classes = len(objects)
    cls = np.repeat(np.arange(classes), np.diff(m.class_start))
    found = [np.bincount(cls[(s == _TRUE) & (m.rank < boxes)], minlength=classes) for s in m.status]
    recall = np.mean(found, axis=0) / np.where(objects, objects, np.nan)
    return float(mean_over_classes(recall))
