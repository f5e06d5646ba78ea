"""Average precision from matches, also with every image counted as often as a weight says.

:func:`evaluate` gives the twelve numbers of pycocotools and the AP of every class, equal to
pycocotools' own. :func:`resample` is what a bootstrap over images needs: AP where image i counts
``weights[i]`` times.

Why a resample is cheap. Drawing images with replacement changes no match between boxes, only how
often each image counts. A detection that is no true positive changes precision but never recall,
so the precision-recall curve can only have its corners at true positives. Between those of a class
only weights are summed up, once for all ten IoU thresholds, and behind the last one nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .coco_files import Annotations, Results
from .compiled import compiled
from .matching import FALSE, IGNORED, MAX_DETS, SIZES, TRUE, Matches, match_areas

RECALL = np.linspace(0.0, 1.0, 101)
_BLOCK = 8  # resamples that a thread takes at a time


@compiled
def _weighted_ap(
    weight: np.ndarray,
    status: np.ndarray,
    image: np.ndarray,
    tied: np.ndarray,
    class_start: np.ndarray,
    event: np.ndarray,
    event_start: np.ndarray,
    object_image: np.ndarray,
    object_start: np.ndarray,
    recall: np.ndarray,
    classes: np.ndarray,
    ap: np.ndarray,
    curve: np.ndarray,
) -> None:
    """AP with image i counted ``weight[i]`` times; ap (K, 3) and curve (3, 101) are filled.

    A true positive of weight w lifts precision and recall w times in a row, so of its w points on
    the curve the last one is the highest and the farthest to the right: one point will do. That
    fails only where one image has boxes of one class with equal scores, some true and some false:
    the copies of the image then alternate between them, and are walked one by one.
    """
    eps = np.finfo(np.float64).eps  # pycocotools' guard against 0 / 0
    n_thr, n_rec = status.shape[1], len(recall)
    need = np.empty(n_rec + 1, np.int64)
    true, ignored = np.empty(n_thr, np.int64), np.empty(n_thr, np.int64)
    reached = np.empty(n_thr, np.int64)  # the last recall of which there were enough
    best = np.empty((n_thr, n_rec))
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
        # need[r]: the fewest true positives with need / positives >= recall[r], in floats
        need[n_rec] = np.iinfo(np.int64).max
        for r in range(n_rec):
            n = np.int64(np.ceil(recall[r] * positives))
            while n > 0 and (n - 1) / positives >= recall[r]:
                n -= 1
            while n / positives < recall[r]:
                n += 1
            need[r] = n
        true[:], ignored[:], reached[:], best[:] = 0, 0, 0, 0.0
        above = 0  # weight of the detections so far
        d = class_start[k]
        for e in range(event_start[k], event_start[k + 1]):
            while d < event[e]:
                above += weight[image[d]]
                d += 1
            w = weight[image[d]]
            run = tied[d]
            if w > 0:
                for t in range(n_thr):
                    if run == 1 and status[d, t] == FALSE:
                        continue
                    if run > 1 and _mixed(status, d, run, t):
                        seen = above - ignored[t]
                        for _ in range(w):
                            for i in range(d, d + run):
                                seen += status[i, t] != IGNORED
                                if status[i, t] == TRUE:
                                    true[t] += 1
                                    while true[t] >= need[reached[t] + 1]:
                                        reached[t] += 1
                                    precision = true[t] / (seen + eps)
                                    if precision > best[t, reached[t]]:
                                        best[t, reached[t]] = precision
                        ignored[t] = above + w * run - seen
                        continue
                    for i in range(run):
                        if status[d + i, t] == TRUE:
                            found = true[t] + w
                            true[t] = found
                            r = reached[t]
                            while found >= need[r + 1]:
                                r += 1
                            reached[t] = r
                            precision = found / ((above + (i + 1) * w - ignored[t]) + eps)
                            best[t, r] = max(best[t, r], precision)
                        elif status[d + i, t] == IGNORED:
                            ignored[t] += w
            above += w * run
            d += run
        total = 0.0
        for t in range(n_thr):
            here = 0.0
            for r in range(n_rec - 1, -1, -1):  # precision: the best at this recall or beyond
                if r < n_rec - 1 and best[t, r + 1] > best[t, r]:
                    best[t, r] = best[t, r + 1]
                here += best[t, r]
                curve[0, r] += best[t, r]
            total += here
            if t == 0 or t == 5:
                which = 1 if t == 0 else 2
                ap[k, which] = here / n_rec
                for r in range(n_rec):
                    curve[which, r] += best[t, r]
        ap[k, 0] = total / (n_rec * n_thr)
    for r in range(n_rec):
        curve[0, r] /= max(present, 1) * n_thr
        curve[1, r] /= max(present, 1)
        curve[2, r] /= max(present, 1)


@compiled
def _mixed(status: np.ndarray, first: int, run: int, threshold: int) -> bool:
    true, false = False, False
    for i in range(first, first + run):
        true |= status[i, threshold] == TRUE
        false |= status[i, threshold] == FALSE
    return true and false


@compiled
def _weighted_aps(
    weights: np.ndarray,
    arrays: tuple[np.ndarray, ...],
    recall: np.ndarray,
    ap: np.ndarray,
    curve: np.ndarray,
) -> None:
    classes = np.arange(ap.shape[1])
    for b in range(len(weights)):
        _weighted_ap(weights[b], *arrays, recall, classes, ap[b], curve[b])


def _arrays(m: Matches) -> tuple[np.ndarray, ...]:
    """The arrays of the matches in the order ``_weighted_ap`` takes them."""
    return (
        m.status,
        m.image,
        m.tied,
        m.class_start,
        m.event,
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
    resamples: int | range = 500,
    seed: int = 0,
    threads: int = 2,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
) -> tuple[np.ndarray, np.ndarray]:
    """Paired bootstrap over images: every run is evaluated on the same resampled images.

    Each resample draws as many images as there are, with replacement; an image that comes up
    three times counts three times.

    Args:
        resamples: How many, or the numbers of those to draw: each has a generator of its own.
        progress: wraps the iterator over resamples, e.g. ``tqdm.tqdm``.

    Returns:
        ``weighted_ap`` of every run in every resample: (B, M, K, 3) and (B, M, 3, 101).
    """
    images = runs[0].images
    if any(m.images != images for m in runs):
        raise ValueError(f"runs on {sorted({m.images for m in runs})} images cannot be paired")
    numbers = resamples if isinstance(resamples, range) else range(resamples)
    classes = len(runs[0].class_start) - 1
    ap = np.empty((len(numbers), len(runs), classes, 3))
    curve = np.empty((len(numbers), len(runs), 3, len(RECALL)))

    def some(part: range) -> range:
        # a generator per resample: the result does not depend on the number of threads
        weights = np.concatenate(
            [draw_images(images, 1, np.random.default_rng([seed, numbers[b]])) for b in part]
        )
        for m, run in enumerate(runs):
            ap[part.start : part.stop, m], curve[part.start : part.stop, m] = weighted_ap(
                run, weights
            )
        return part

    starts = range(0, len(numbers), _BLOCK)
    blocks = [range(b, min(b + _BLOCK, len(numbers))) for b in starts]
    with ThreadPoolExecutor(threads) as pool:  # the compiled code releases the GIL
        for _ in progress(b for part in pool.map(some, blocks) for b in part):
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
        list(pool.map(lambda a, b: _leave_out(a, b, *shared), bounds[:-1], bounds[1:]))
    return out


@compiled
def _leave_out(
    first: int,
    last: int,
    arrays: tuple[np.ndarray, ...],
    recall: np.ndarray,
    touched: np.ndarray,
    touched_start: np.ndarray,
    base: np.ndarray,
    out: np.ndarray,
) -> None:
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


def evaluate(
    annotations: Annotations, results: Results, max_dets: int | None = None
) -> tuple[dict[str, float], np.ndarray]:
    """The numbers of pycocotools, twelve for boxes and masks, ten for keypoints; AP per class.

    Args:
        annotations: The data set.
        results: Of the same kind.
        max_dets: Detections that count per image and class; by default 100, of keypoints 20.

    Returns:
        ``{"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm",
        "ARl"}``, in [0, 1], and (K,) AP in the order of ``annotations.class_ids``. As in
        pycocotools, -1 says that there was no object to measure on. Of keypoints there are
        ``"AR", "AR50", "AR75"`` for ``"AR1", "AR10", "AR100"`` and neither ``"APs"`` nor
        ``"ARs"``. With another ``max_dets`` than 100, ``"AR100"`` is named by it.
    """
    most = max_dets or MAX_DETS[annotations.kind]
    areas = SIZES[annotations.kind]
    matches = match_areas(annotations, results, ["all", *areas], most)
    aps = {a: weighted_ap(m, np.ones((1, m.images), int))[0][0] for a, m in matches.items()}
    stats = {
        name: mean_over_classes(aps["all"][None, :, i])[0]
        for i, name in enumerate(("AP", "AP50", "AP75"))
    }
    stats |= {f"AP{a}": mean_over_classes(aps[a][None, :, 0])[0] for a in areas}
    whole = matches["all"]
    if annotations.kind == "keypoints":
        at = {"AR": slice(None), "AR50": slice(0, 1), "AR75": slice(5, 6)}
        stats |= {name: _recall(whole, most, thresholds) for name, thresholds in at.items()}
    else:
        stats |= {f"AR{n}": _recall(whole, n) for n in (1, 10, most)}
    stats |= {f"AR{a}": _recall(matches[a], most) for a in areas}
    per_class = np.nan_to_num(aps["all"][:, 0], nan=-1.0)
    return {k: float(np.nan_to_num(v, nan=-1.0)) for k, v in stats.items()}, per_class


def mean_over_classes(ap: np.ndarray) -> np.ndarray:
    """(..., K) to (...): the mean over the classes that have objects, NaN where none has."""
    present = ~np.isnan(ap)
    count = present.sum(-1)
    return np.where(count, np.where(present, ap, 0).sum(-1) / np.maximum(count, 1), np.nan)


def _recall(m: Matches, dets: int, thresholds: slice = slice(None)) -> float:
    """AR: the share of objects found by the first ``dets`` of each image and class."""
    objects = np.diff(m.object_start)
    classes = len(objects)
    cls = np.repeat(np.arange(classes), np.diff(m.class_start))
    found = [
        np.bincount(cls[(s == TRUE) & (m.rank < dets)], minlength=classes)
        for s in m.status.T[thresholds]
    ]
    recall = np.mean(found, axis=0) / np.where(objects, objects, np.nan)
    return float(mean_over_classes(recall))
