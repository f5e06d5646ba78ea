"""Is a difference in AP more than noise? Intervals and a verdict for two or more arms.

An arm is a way to train, a run is one seed of it. What varies is the images of the test set and
the seed of the training; ``compare`` carries both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np

from .coco_files import Annotations, InputError, Results
from .evaluate import RECALL, mean_over_classes, resample, weighted_ap
from .matching import SIZES, Matches, match_areas

BETTER, WORSE, NOT_SHOWN = "better", "worse", "no difference shown"
METHODS, CHECKPOINTS = "methods", "checkpoints"
POWER = 0.8

_SAID_OF_CHECKPOINTS = {
    BETTER: "better checkpoint, method not compared",
    WORSE: "worse checkpoint, method not compared",
    NOT_SHOWN: "no difference shown between these checkpoints",
}


@dataclass(frozen=True)
class Measured:
    """Runs on the same images, as they are and on every resample. AP in points, 0 to 100."""

    names: list[str]  # (Q,) AP, AP50, AP75, the size classes if wanted, then the classes
    overall: int  # how many of the names come before the classes
    images: np.ndarray  # (Q,) how many images have an object that counts for it
    observed: np.ndarray  # (M, Q), NaN where there was no object
    draws: np.ndarray  # (B, M, Q), as on B other sets of as many images
    curve: np.ndarray  # (M, 3, 101) precision in 0..1 at IoU 0.50:0.95, 0.50 and 0.75
    curve_resampled: np.ndarray  # (B, M, 3, 101)
    matches: dict[str, list[Matches]] = field(default_factory=dict)  # per area range, per run

    @property
    def classes(self) -> list[str]:
        """The names that are classes."""
        return self.names[self.overall :]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, for every name of ``Measured``: arrays (Q,).

    Low, high and positive are NaN where there are fewer than :func:`fewest_images` with an object.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    end_error: np.ndarray  # standard error of both ends, of the finite number of resamples
    positive: np.ndarray  # 1 - p of the one-sided t-test of value > 0


@dataclass(frozen=True)
class Difference(Estimate):
    """Arm minus baseline, on the same images.

    Attributes:
        outcome: On AP: better, worse or no difference shown.
        scope: METHODS where both arms have two runs or more, so that the interval carries the
            seeds; else CHECKPOINTS: it carries the images alone and says nothing of other seeds.
        further_seeds: Per arm, for 80% power; 0 when shown, None when unknown or none would do.
        reason: What the interval carries and what would narrow it, in one or two sentences.
        spread: What :func:`power` needs of it.
    """

    arm: str
    baseline: str
    outcome: str
    scope: str
    further_seeds: int | None
    reason: str
    spread: Spread

    @property
    def verdict(self) -> str:
        """The outcome, in words that say what it is about."""
        return self.outcome if self.scope == METHODS else _SAID_OF_CHECKPOINTS[self.outcome]


@dataclass(frozen=True)
class Curves:
    """Precision of an arm, mean over classes and runs, with its interval: arrays (3, 101).

    Rows are IoU 0.50:0.95, 0.50 and 0.75, columns the recalls 0, 0.01 ... 1. The interval carries
    the images alone.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """All arms, and the difference of each to the first one."""

    measured: Measured
    arms: dict[str, Estimate]
    curves: dict[str, Curves]
    runs: dict[str, list[int]]  # of each arm, into Measured
    differences: list[Difference]
    confidence: float
    warnings: list[str]
    paired: bool = False


def fewest_images(confidence: float) -> int:
    """The fewest images with an object that an interval is given for: 6 at 95%.

    If n images all favour the same one of two equal models, which comes up with probability
    2^(1 - n), no look at the images can tell that from a difference; it is rarer than 1 -
    ``confidence`` from here on. ``tools/benchmark_ap.py images`` shows that the intervals hold.
    """
    return math.ceil(1 - math.log2(1 - confidence))


def measure(
    annotations: Annotations,
    results: Sequence[Results],
    resamples: int = 500,
    seed: int = 0,
    sizes: bool = False,
    threads: int = 2,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
    max_dets: int | None = None,
) -> Measured:
    """Evaluate every run on the images as they are and on every resample of them.

    Args:
        annotations: The data set.
        results: Of every run.
        resamples: 500 puts the ends of an interval within 3% of half its width, one standard
            error; percentiles of 1000 resamples vary by 4%.
        seed: Of the resampling.
        sizes: APs, APm and APl too; each costs another round of resamples.
        threads: The result does not depend on them.
        progress: Wraps the iterator over the resamples of one area range, e.g. ``tqdm.tqdm``.
        max_dets: Detections that count per image and class; by default 100, of keypoints 20.

    Raises:
        InputError: No object counts, so that there is nothing to measure.
    """
    areas = ["all", *(SIZES[annotations.kind] if sizes else ())]
    of_runs = [match_areas(annotations, r, areas, max_dets) for r in results]
    matches = {area: [run[area] for run in of_runs] for area in areas}
    if not len(matches["all"][0].object_image):
        raise InputError(
            f"{annotations.path}: nothing to measure: of {len(annotations.image_ids)} images and "
            f"{len(annotations.class_ids)} classes it has no object that counts (crowds do not, "
            "nor objects with a negative area)"
        )
    once = {a: [weighted_ap(m, np.ones((1, m.images), int)) for m in matches[a]] for a in areas}
    per_class = {a: np.stack([ap[0] for ap, _ in once[a]]) for a in areas}  # (M, K, 3)
    metrics = _metrics(per_class)
    observed = [mean_over_classes(x) for x in metrics.values()]
    measured = Measured(
        names=[*metrics, *annotations.class_names],
        overall=len(metrics),
        images=np.append(
            [_images(matches[a][0])[0] for a in _areas(metrics)], _images(matches["all"][0])[1]
        ),
        observed=100 * np.concatenate([np.stack(observed, -1), per_class["all"][..., 0]], -1),
        draws=np.empty((0, len(results), len(metrics) + len(annotations.class_names))),
        curve=np.stack([c[0] for _, c in once["all"]]),
        curve_resampled=np.empty((0, len(results), 3, len(RECALL))),
        matches=matches,
    )
    return more_resamples(measured, resamples, seed, threads, progress)


def _metrics(per_class: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """AP, AP50, AP75 and those of sizes, per class, from (..., K, 3) of every area range."""
    metrics = {name: per_class["all"][..., i] for i, name in enumerate(("AP", "AP50", "AP75"))}
    return metrics | {f"AP{a}": ap[..., 0] for a, ap in per_class.items() if a != "all"}


def _areas(metrics: Iterable[str]) -> list[str]:
    """The area range that each metric is of."""
    return [name[2:] if name in ("APs", "APm", "APl") else "all" for name in metrics]


def _images(m: Matches) -> tuple[int, list[int]]:
    """How many images have an object that counts, and how many have one of each class."""
    of_classes = np.split(m.object_image, m.object_start[1:-1])
    return len(np.unique(m.object_image)), [len(np.unique(images)) for images in of_classes]


def more_resamples(
    measured: Measured,
    resamples: int,
    seed: int = 0,
    threads: int = 2,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
) -> Measured:
    """The same runs with as many more resamples; those that are there stay."""
    start = len(measured.draws)
    numbers = range(start, start + resamples)
    # one seed for all areas: the same images are drawn
    drawn = {
        area: resample(runs, numbers, seed, threads, progress)
        for area, runs in measured.matches.items()
    }
    once = {
        area: np.stack([weighted_ap(m, np.ones((1, m.images), int))[0][0] for m in runs])
        for area, runs in measured.matches.items()
    }
    observed, resampled = _metrics(once), _metrics({a: ap for a, (ap, _) in drawn.items()})
    noise = np.stack(
        [np.random.default_rng([seed, b, 1]).normal(size=len(measured.classes)) for b in numbers]
    )
    columns = []
    for name, area in zip(observed, _areas(observed), strict=True):
        of_classes = _draws(
            observed[name], resampled[name], _images(measured.matches[area][0])[1], noise
        )
        if name == "AP":
            classes = of_classes
        columns.append(mean_over_classes(of_classes))
    draws = 100 * np.concatenate([np.stack(columns, -1), classes], -1)
    return replace(
        measured,
        draws=np.concatenate([measured.draws, draws]),
        curve_resampled=np.concatenate([measured.curve_resampled, drawn["all"][1]]),
    )


def _draws(
    observed: np.ndarray, resampled: np.ndarray, images: Sequence[int], noise: np.ndarray
) -> np.ndarray:
    """AP per class that varies as on other sets of images: resampled AP, with its spread mended.

    Resamples vary less than test sets do where a class is on few images:

    - The variance over resamples of n images is (n - 1)/n of that over test sets; deviations are
      multiplied by sqrt(n / (n - 1)).
    - A resample without the class would leave it out of the mean over the classes, and weigh the
      others more. The class keeps its observed AP there.
    - Of a class on one image resamples show no spread at all. How far AP of a class lies from the
      mean over classes stands for it, times a normal number, the same for all runs.

    With 80 classes as frequent as 1/1 to 1/80 on 20 images, the variance of a difference in AP
    comes out 1.04 times the true one, without this 0.62 times.

    Args:
        observed: (M, K), NaN where a class has no object.
        resampled: (B, M, K), NaN where it has none in the resample, too.
        images: (K,) on which it has objects.
        noise: (B, K) normal numbers.

    Returns:
        (B, M, K).
    """
    n = np.array(images)
    off = np.nan_to_num(resampled - observed) * np.sqrt(n / np.maximum(n - 1, 1))
    from_mean = observed - mean_over_classes(observed)[..., None]
    return observed + np.where(n == 1, noise[:, None] * from_mean, off)


@dataclass(frozen=True)
class Spread:
    """The variance of an estimate by where it comes from; numbers, or arrays (Q,).

    The estimate is a sum or difference of parts: of one arm, of two, or of the differences of
    paired runs.

    Attributes:
        value: The estimate.
        images: Its variance over the images of the test set, of these runs.
        count: Images with an object.
        runs: Of each part.
        between: Of each part, the variance between its runs as measured on these images.
        within: Of each part, what of that is the image noise of single runs.
    """

    value: np.ndarray
    images: np.ndarray
    count: np.ndarray
    runs: list[int]
    between: list[np.ndarray]
    within: list[np.ndarray]

    def parts(
        self, further: int | np.ndarray = 0, factor: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The variance that all runs share, that of single runs, and degrees of freedom of these.

        ``further`` runs in each part and ``factor`` times as many images are for planning; by
        default it is what was measured. The docstring of :func:`compare` has the formulas.
        """
        runs = [n + further for n in self.runs]

        def over(runs: Sequence[Any], variances: Sequence[Any]) -> np.ndarray:
            return sum((v / n for v, n in zip(variances, runs, strict=True)), np.zeros(()))

        def freedom(between: Sequence[Any]) -> np.ndarray:
            doubt = sum(
                (b / n) ** 2 / np.maximum(n - 1, 1) for b, n in zip(between, runs, strict=True)
            )
            return np.where(doubt > 0, over(runs, between) ** 2 / np.maximum(doubt, 1e-300), np.inf)

        shared = np.maximum(self.images - over(self.runs, self.within), 0) / factor
        between = [
            np.maximum(b - w, 0) + np.minimum(b, w) / factor
            for b, w in zip(self.between, self.within, strict=True)
        ]
        free = freedom(between)
        if (weights := np.array(self.runs) - 1).any():
            pooled = np.average(between, 0, weights)
            free = np.minimum(free, freedom([pooled] * len(between)))
        return shared, over(runs, between), np.clip(free, 1, 1e6)

    def half_width(
        self,
        quantile: float | np.ndarray,
        further: int | np.ndarray = 0,
        factor: float = 1.0,
    ) -> np.ndarray:
        """Half of the interval between the quantiles 1 - q and q."""
        from scipy.special import stdtrit

        shared, seeds, free = self.parts(further, factor)
        of_images = np.clip(self.count * factor - 1, 1, 1e6)
        t_images, t_seeds = stdtrit(of_images, quantile), stdtrit(free, quantile)
        return np.sqrt(t_images**2 * shared + t_seeds**2 * seeds)

    def of(self, name: int) -> Spread:
        """The same of one name."""
        one = [[x[name] for x in xs] for xs in (self.between, self.within)]
        return Spread(self.value[name], self.images[name], self.count[name], self.runs, *one)


def _spread(
    measured: Measured, parts: Sequence[tuple[np.ndarray, np.ndarray]], seeds: bool
) -> Spread:
    """Of the first part minus the second, if there is one.

    Args:
        measured: For the numbers of images.
        parts: Of each its runs as observed (n, Q) and as drawn (B, n, Q).
        seeds: Whether the seeds are carried, which takes two runs or more in each part.
    """
    value, draws = (
        x[0] if len(x) == 1 else x[0] - x[1]
        for x in ([o.mean(0) for o, _ in parts], [r.mean(1) for _, r in parts])
    )
    between, within, runs = [], [], []
    for observed, drawn in parts:
        n = len(observed)
        runs.append(n if seeds else 1)
        if not (seeds and n > 1):
            between.append(np.zeros_like(value))
            within.append(np.zeros_like(value))
            continue
        # each run's deviation from the mean, in every draw
        own = drawn - drawn.mean(1, keepdims=True)
        off = own - (observed - observed.mean(0))
        within.append(np.nanmean((off**2).sum(1) / (n - 1), 0))
        between.append(observed.var(0, ddof=1))
    images = np.nanvar(draws, 0)
    return Spread(value, images, measured.images, runs, between, within)


def _estimate(spread: Spread, confidence: float, resamples: int, lowest: float) -> Estimate:
    """An estimate of AP from ``lowest`` to 100."""
    value, half = spread.value, spread.half_width((1 + confidence) / 2)
    # of B draws the standard error of their variance v is v sqrt(2 / B)
    z = half / np.sqrt(np.maximum(sum(spread.parts()[:2]), 1e-300))
    end_error = z**2 * spread.images / np.maximum(half, 1e-300) / math.sqrt(2 * resamples)
    # the quantile at which the interval ends at 0, by halving
    low, high = np.full_like(value, 0.5), np.ones_like(value)
    for _ in range(50):
        middle = (low + high) / 2
        inside = spread.half_width(middle) < abs(value)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    positive = np.where(value > 0, low, 1 - low)
    given = (spread.count >= fewest_images(confidence)) & ~np.isnan(value)
    ends = np.maximum(value - half, lowest), np.minimum(value + half, 100)
    shown = [np.where(given, x, np.nan) for x in (*ends, positive)]
    return Estimate(value, shown[0], shown[1], end_error, shown[2])


def _curves(measured: Measured, runs: list[int], confidence: float) -> Curves:
    tail = (1 - confidence) / 2
    mean, draws = measured.curve[runs].mean(0), measured.curve_resampled[:, runs].mean(1)
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0) - draws.mean(0) + mean
    return Curves(mean, low.clip(0, 1), high.clip(0, 1))


def compare(
    measured: Measured,
    arms: dict[str, list[int]],
    pairs: Sequence[tuple[str, str]] | None = None,
    confidence: float = 0.95,
    warnings: Sequence[str] = (),
    paired: bool = False,
) -> Comparison:
    """Intervals of every arm and of the differences between arms: t about the observed value.

    Where the variance comes from:

    - The images. Every resample draws the images of the test set with replacement, the same for
      all runs, and evaluates every run on them; so the difference of two arms keeps what the
      pairing by image takes out. For classes on few images their spread is mended (``_draws``).
    - The seeds. The variance s2 of AP between the m runs of an arm holds the image noise of
      single runs, too. With v the mean variance of a run's deviation from its arm over resamples,
      v/m is taken off the variance over the images.

    A variance from few images or few runs is itself uncertain. The interval is value ±
    sqrt(t_I^2 I + t_S^2 S): I is the variance that all runs of an arm share, over the images, and
    t_I has n - 1 degrees of freedom, n the images with an object. S is the sum of s2/m over the
    arms, and t_S has its Welch-Satterthwaite degrees of freedom, S^2 / sum((s2/m)^2 / (m - 1)).
    With few runs s2 is small by chance in one arm, and the degrees of freedom come out too large,
    the more so the less equal the numbers of runs; they are held to what they would be if the
    arms had one variance, the pooled one. Percentiles of the draws, as they are or bias-corrected
    (BCa), are too narrow where images are few; ``tools/benchmark_ap.py images`` has them side by
    side.

    Why the two are not added up to one variance with its own degrees of freedom: then S, small by
    chance, would take t with it, and the interval of two or three runs would become narrower by
    more image noise. ``P(|x| < c)``, x normal, is concave in c^2, so in quadrature the interval
    holds the true value at least as often as those of either part alone would.

    One run tells nothing of the spread between seeds, and another arm's need not be the same. So
    where an arm of a pair has a single run, the interval of the difference carries the images
    alone, for both arms: it is about these trained models, and its scope says so.

    ``tools/benchmark_ap.py coverage`` measures how often the intervals hold the true difference.

    Args:
        measured: The runs.
        arms: Name -> indices of its runs.
        pairs: (arm, baseline); by default every arm against the first.
        confidence: Of the intervals; the outcome is read off the interval of AP.
        warnings: What was noticed on the way here, kept with the result.
        paired: Run j of an arm and run j of another share a seed (initial weights, order of
            images). Then the seeds are those of the differences, run by run, with one variance
            and m - 1 degrees of freedom. It says more where paired runs are correlated, and less
            where they are not.

    Raises:
        InputError: Paired arms have different numbers of runs or one.
    """
    first, *others = arms
    pairs = [(arm, first) for arm in others] if pairs is None else list(pairs)
    resamples = len(measured.draws)
    of = {a: (measured.observed[runs], measured.draws[:, runs]) for a, runs in arms.items()}
    with catch_warnings():
        # a class without objects is NaN throughout, and is to come out as NaN
        simplefilter("ignore", RuntimeWarning)
        estimates = {
            a: _estimate(_spread(measured, [of[a]], True), confidence, resamples, 0) for a in arms
        }
        curves = {a: _curves(measured, runs, confidence) for a, runs in arms.items()}
        differences = []
        for arm, baseline in pairs:
            n, m = len(arms[arm]), len(arms[baseline])
            if paired and not n == m > 1:
                raise InputError(
                    f"paired runs: {arm} has {n} and {baseline} {m}; wanted as many in both, two "
                    "or more"
                )
            scope = METHODS if min(n, m) > 1 else CHECKPOINTS
            parts = [of[arm], of[baseline]]
            if paired:
                parts = [tuple(x - y for x, y in zip(*parts, strict=True))]
            spread = _spread(measured, parts, scope == METHODS)
            estimate = _estimate(spread, confidence, resamples, -100)
            low, high = estimate.low[0], estimate.high[0]
            outcome = BETTER if low > 0 else WORSE if high < 0 else NOT_SHOWN
            if np.isnan(low):
                further, reason = None, _too_few(measured, confidence)
            elif scope == METHODS:
                further, reason = _what_would_show(spread.of(0), outcome, confidence, paired)
            else:
                further, reason = None, _about_checkpoints(arm, n, baseline, m)
            differences.append(
                Difference(
                    **vars(estimate),
                    arm=arm,
                    baseline=baseline,
                    outcome=outcome,
                    scope=scope,
                    further_seeds=further,
                    reason=reason,
                    spread=spread,
                )
            )
    return Comparison(
        measured, estimates, curves, arms, differences, confidence, list(warnings), paired
    )


def _too_few(measured: Measured, confidence: float) -> str:
    wanted = fewest_images(confidence)
    return (
        f"{measured.images[0]} images with an object are too few for an interval, which takes "
        f"{wanted} at {confidence:.0%}: even if all of them favoured the same one of two equal "
        "models, that would be no rare event. Test on more images."
    )


def _about_checkpoints(arm: str, runs: int, baseline: str, others: int) -> str:
    if runs == others == 1:
        return (
            f"One run per arm: this is about these two checkpoints, not about {arm} and "
            f"{baseline} as methods. The interval carries the images, not the seeds; other seeds "
            "may differ by more. Train two or more per arm."
        )
    single, several, n = (arm, baseline, others) if runs == 1 else (baseline, arm, runs)
    return (
        f"{single} has one run, which tells nothing of the spread between its seeds: this is "
        f"about that checkpoint and the mean of the {n} of {several}, not about the methods. The "
        f"interval carries the images, not the seeds. Train further seeds of {single}."
    )


def power(
    spread: Spread,
    difference: float,
    confidence: float,
    further: int | np.ndarray = 0,
    factor: float = 1.0,
) -> np.ndarray:
    """The probability that a true difference in AP is shown: that of the t-test.

    Args:
        spread: Of one name, from the runs so far; what is uncertain in it is not carried.
        difference: In AP points.
        confidence: Of the interval.
        further: Runs more in every arm.
        factor: Times as many images.
    """
    from scipy.special import nctdtr

    shared, seeds, free = spread.parts(further, factor)
    variance = np.maximum(shared + seeds, 1e-300)
    doubt = shared**2 / np.clip(spread.count * factor - 1, 1, 1e6) + seeds**2 / free
    free = np.clip(variance**2 / np.maximum(doubt, 1e-300), 1, 1e6)
    shift = abs(difference) / np.sqrt(variance)
    wanted = spread.half_width((1 + confidence) / 2, further, factor) / np.sqrt(variance)
    # beyond that many standard errors the function is 0, or NaN for its arguments
    return np.where(shift - wanted > 30, 1.0, 1 - nctdtr(free, np.minimum(shift, 1e3), wanted))


PLANNED_SEEDS = (0, 1, 2, 3, 5, 10, 20)
PLANNED_IMAGES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """The power to show a difference in AP with further seeds per arm and more images."""

    arm: str
    baseline: str
    difference: float
    further_seeds: list[int]
    images: list[int]  # times as many
    power: list[list[float]]  # per number of further seeds, per number of images


def plan(d: Difference, confidence: float, difference: float | None = None) -> Plan:
    """What it would take, from the spread of the runs so far.

    Where an arm has one run nothing is known of seeds, and the plan is of images alone.

    Args:
        d: The comparison so far.
        confidence: Of its interval.
        difference: The true difference in AP to plan for; by default the observed one.

    Raises:
        InputError: There are too few images for a spread.
    """
    if np.isnan(d.low[0]):
        raise InputError(f"--plan: {d.reason}")
    difference = abs(float(d.value[0])) if difference is None else difference
    spread = d.spread.of(0)
    seeds = PLANNED_SEEDS if d.scope == METHODS else PLANNED_SEEDS[:1]
    table = [
        [float(power(spread, difference, confidence, k, f)) for f in PLANNED_IMAGES] for k in seeds
    ]
    return Plan(d.arm, d.baseline, difference, [*seeds], [*PLANNED_IMAGES], table)


def _what_would_show(
    spread: Spread, outcome: str, confidence: float, paired: bool
) -> tuple[int | None, str]:
    """The further seeds per arm that would show the observed difference in AP with 80% power."""
    if outcome != NOT_SHOWN:
        return 0, f"The interval carries the images and the {'paired ' if paired else ''}seeds."
    difference = abs(float(spread.value))
    further = np.arange(1, 1001)
    enough = further[power(spread, difference, confidence, further) >= POWER]
    if len(enough):
        return int(enough[0]), (
            f"If the true difference is the observed {difference:.2f}, {enough[0]} further "
            "seeds per arm would show it with 80% power."
        )
    if power(spread, difference, confidence, 10**6) < POWER:
        return None, (
            f"No number of seeds would show a difference of {difference:.2f} with 80% "
            "power on these images: what the images alone leave open is too wide. It takes more "
            "images."
        )
    return None, f"More than 1000 seeds would be needed to show {difference:.2f} AP."
