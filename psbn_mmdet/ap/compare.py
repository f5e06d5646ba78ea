"""Is a difference in AP more than noise? Intervals and a verdict for two or more arms.

An arm is a way to train, a run is one seed of it. What varies is the images of the test set and
the seed of the training; ``compare`` carries both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from warnings import catch_warnings, simplefilter

import numpy as np

from ..python38 import zip_strict
from .coco_files import Annotations, InputError, Results
from .evaluate import mean_over_classes, resample, weighted_ap
from .matching import match

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
    observed: np.ndarray  # (M, Q), NaN where there was no object
    resampled: np.ndarray  # (B, M, Q)
    curve: np.ndarray  # (M, 3, 101) precision in 0..1 at IoU 0.50:0.95, 0.50 and 0.75
    curve_resampled: np.ndarray  # (B, M, 3, 101)


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, for every name of ``Measured``: arrays (Q,)."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    positive: np.ndarray  # share of the draws above 0


@dataclass(frozen=True)
class Difference(Estimate):
    """Arm minus baseline, on the same images.

    Attributes:
        outcome: On AP: better, worse or no difference shown.
        scope: METHODS where both arms have two runs or more, so that the interval carries the
            seeds; else CHECKPOINTS: it carries the images alone and says nothing of other seeds.
        further_seeds: Per arm, for 80% power; 0 when shown, None when unknown or none would do.
        reason: What the interval carries and what would narrow it, in one or two sentences.
    """

    arm: str
    baseline: str
    outcome: str
    scope: str
    further_seeds: int | None
    reason: str

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


def measure(
    annotations: Annotations,
    results: Sequence[Results],
    resamples: int = 1000,
    seed: int = 0,
    sizes: bool = False,
    threads: int = 2,
    progress: Callable[[Iterator], Iterator] = iter,
) -> Measured:
    """Evaluate every run on the images as they are and on every resample of them.

    Args:
        annotations: The data set.
        results: Of every run.
        resamples: 1000 puts the ends of a 95% interval within about 5% of its width.
        seed: Of the resampling.
        sizes: APs, APm and APl too; each costs another matching and another round of resamples.
        threads: The result does not depend on them.
        progress: Wraps the iterator over the resamples of one area range, e.g. ``tqdm``.

    Raises:
        InputError: No object counts, so that there is nothing to measure.
    """
    if annotations.crowd.all():
        raise InputError(
            f"{annotations.path}: nothing to measure: of {len(annotations.image_ids)} images and "
            f"{len(annotations.class_ids)} classes it has no object (crowds do not count)"
        )
    names, observed, resampled = [], [], []
    for area in ("all", "s", "m", "l") if sizes else ("all",):
        runs = [match(annotations, r, area) for r in results]
        once = [weighted_ap(m, np.ones((1, m.images), int)) for m in runs]
        # one seed for all areas: the same images are drawn
        ap, curves = resample(runs, resamples, seed, threads, progress)
        plain = np.stack([a[0] for a, _ in once])  # (M, K, 3)
        if area == "all":
            curve, curve_resampled = np.stack([c[0] for _, c in once]), curves
            class_observed, class_resampled = plain[..., 0], ap[..., 0]
        for i, name in enumerate(("AP", "AP50", "AP75") if area == "all" else (f"AP{area}",)):
            names.append(name)
            observed.append(mean_over_classes(plain[..., i]))
            resampled.append(mean_over_classes(ap[..., i]))
    return Measured(
        names=[*names, *annotations.class_names],
        overall=len(names),
        observed=100 * np.concatenate([np.stack(observed, -1), class_observed], -1),
        resampled=100 * np.concatenate([np.stack(resampled, -1), class_resampled], -1),
        curve=curve,
        curve_resampled=curve_resampled,
    )


@dataclass(frozen=True)
class _Arm:
    """The parts of an arm's variance: arrays (Q,), and the draws (B, Q) they were taken from."""

    runs: int
    mean: np.ndarray
    images: np.ndarray  # mean of the arm's runs on every resample
    seeds: np.ndarray  # what other seeds would add to it; 0 for a single run
    between: np.ndarray  # variance of AP between runs, as measured on these images
    within: np.ndarray  # the part of it that is these images: run by run, over resamples


def _arm(measured: Measured, runs: list[int], rng: np.random.Generator) -> _Arm:
    observed, resampled = measured.observed[runs], measured.resampled[:, runs]
    n, mean, images = len(runs), observed.mean(0), resampled.mean(1)
    if n < 2:
        none = np.zeros_like(mean)
        return _Arm(n, mean, images, np.zeros_like(images), none, none)
    between = observed.var(0, ddof=1)
    own = resampled - images[:, None]  # each run's deviation from its arm, on every resample
    within = np.nanmean(((own - (observed - mean)) ** 2).sum(1) / (n - 1), 0)
    # variance over the weights: the variance between runs on the resample, over n
    weights = rng.normal(0, 1, (len(resampled), n, 1)) / math.sqrt((n - 1) * n)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.maximum(between - within, 0) / (between + within)
    seeds = (weights * own).sum(1) * np.sqrt(np.nan_to_num(scale))
    return _Arm(n, mean, images, seeds, between, within)


def _freedom(arms: Sequence[_Arm], images: np.ndarray) -> np.ndarray:
    """Degrees of freedom of the estimated variance of a sum over arms, by Welch-Satterthwaite.

    ``2 total^2 / var(total)``, where an arm of n runs adds s2/n with variance 2 (s2/n)^2/(n-1).
    With few runs s2 is small by chance in one arm, and the degrees of freedom come out too large,
    the more so the less equal the numbers of runs; they are therefore held to what they would be
    if the arms had one variance, the pooled one. (Equal numbers of runs: no change.)
    """
    several = [a for a in arms if a.runs > 1]
    if not several:
        return np.full(images.shape, np.inf)
    weights = np.array([a.runs - 1.0 for a in several])
    pooled = [
        np.average([getattr(a, k) for a in several], 0, weights) for k in ("between", "within")
    ]
    freedom = np.full(images.shape, np.inf)
    for parts in ([(a.between, a.within) for a in several], [pooled] * len(several)):
        total, doubt = images, np.zeros_like(images)
        for arm, (between, within) in zip_strict(several, parts):
            total = total + np.maximum(between - within, 0) / arm.runs
            doubt = doubt + (between / arm.runs) ** 2 / (arm.runs - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            freedom = np.minimum(freedom, np.where(doubt > 0, total**2 / doubt, np.inf))
    return np.clip(freedom, 1, 1e6)


def _estimate(
    arms: Sequence[_Arm], confidence: float, with_seeds: bool = True
) -> tuple[np.ndarray, ...]:
    """Value, interval ends and the share above 0 of an arm, or of the first minus the second.

    The spread of the draws is stretched by t/z for what few seeds leave open.
    """
    from scipy.special import ndtri, stdtrit

    signs = (1, -1)[: len(arms)]
    value, images, seeds = (
        sum(sign * getattr(a, k) for sign, a in zip_strict(signs, arms))
        for k in ("mean", "images", "seeds")
    )
    tail = (1 - confidence) / 2
    if with_seeds:
        draws = images + seeds
        freedom = _freedom(arms, np.nanvar(images, 0))
        stretch = stdtrit(freedom, 1 - tail) / ndtri(1 - tail)
    else:
        draws, stretch = images, 1.0
    draws = value + stretch * (draws - np.nanmean(draws, 0))
    # at these plotting positions each end leaves its tail outside for any number of draws
    low, high = np.nanquantile(draws, [tail, 1 - tail], axis=0, method="weibull")
    above = np.nanmean(np.where(np.isnan(draws), np.nan, (np.sign(draws) + 1) / 2), 0)
    return value, low, high, above


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
    seed: int = 0,
    warnings: Sequence[str] = (),
) -> Comparison:
    """Intervals of every arm and of the differences between arms: a hierarchical bootstrap.

    What is resampled. Every resample draws the images of the test set with replacement, the same
    for all runs, and evaluates every run on them. On top of it, in each arm on its own, the
    deviations of the runs from their mean are drawn with independent normal weights. (Drawing
    runs with replacement has the same aim, but three runs have ten different draws and no tails.)
    The spread of the draws so carries the test set and the training seeds, and the difference of
    two arms keeps what the pairing by image takes out.

    Two corrections make the intervals as wide as they should be, and no wider:

    - The image noise of every single run, which the images already carry, shows up between the
      runs once more. With s2 the variance of AP between the m runs on these images and v the
      mean variance of a run's deviation from its arm over resamples, the seeds' own variance is
      estimated by max(0, s2 - v), and the weights are scaled to it.
    - A variance from m runs is itself uncertain. The draws are stretched by t/z, where t has
      the Welch-Satterthwaite degrees of freedom of the sum, as in Welch's t-test.

    The draws are centred on the observed value: AP of a resample, in which images repeat, is on
    average higher than AP of the data set, which is no evidence for either arm.

    One run tells nothing of the spread between seeds, and another arm's need not be the same. So
    where an arm of a pair has a single run, the interval of the difference carries the images
    alone, for both arms: it is about these trained models, and its scope says so.

    ``tools/benchmark_ap.py coverage`` measures how often the intervals hold the true difference.

    Args:
        measured: The runs.
        arms: Name -> indices of its runs.
        pairs: (arm, baseline); by default every arm against the first.
        confidence: Of the intervals; the outcome is read off the interval of AP.
        seed: Of the weights.
        warnings: What was noticed on the way here, kept with the result.
    """
    first, *others = arms
    pairs = [(arm, first) for arm in others] if pairs is None else list(pairs)
    rng = np.random.default_rng(seed)
    with catch_warnings():
        # a class without objects is NaN throughout, and is to come out as NaN
        simplefilter("ignore", RuntimeWarning)
        parts = {a: _arm(measured, runs, rng) for a, runs in arms.items()}
        estimates = {a: Estimate(*_estimate([p], confidence)) for a, p in parts.items()}
        curves = {a: _curves(measured, runs, confidence) for a, runs in arms.items()}
        differences = []
        for arm, baseline in pairs:
            a, b = parts[arm], parts[baseline]
            scope = METHODS if min(a.runs, b.runs) > 1 else CHECKPOINTS
            value, low, high, above = _estimate([a, b], confidence, scope == METHODS)
            outcome = BETTER if low[0] > 0 else WORSE if high[0] < 0 else NOT_SHOWN
            further, reason = (
                _what_would_show(a, b, outcome, confidence)
                if scope == METHODS
                else (None, _about_checkpoints(arm, a.runs, baseline, b.runs))
            )
            differences.append(
                Difference(value, low, high, above, arm, baseline, outcome, scope, further, reason)
            )
    return Comparison(measured, estimates, curves, arms, differences, confidence, list(warnings))


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


def _what_would_show(a: _Arm, b: _Arm, outcome: str, confidence: float) -> tuple[int | None, str]:
    """The further seeds per arm that would show the observed difference in AP with 80% power.

    With n runs in both arms the variance of the difference is V0 + (s2_a + s2_b)/n, V0 the part
    of the images' variance that all runs of an arm share; power is that of Welch's t-test.
    """
    if outcome != NOT_SHOWN:
        return 0, "The interval carries the images and the seeds."
    from scipy.special import nctdtr, ndtri, stdtrit

    tail = (1 - confidence) / 2
    difference = abs(a.mean[0] - b.mean[0])
    own = a.within[0] / a.runs + b.within[0] / b.runs
    shared = max(0.0, float(np.nanvar(a.images[:, 0] - b.images[:, 0])) - own)
    if difference <= (ndtri(1 - tail) + ndtri(POWER)) * math.sqrt(shared):
        return None, (
            f"No number of seeds would show a difference of {difference:.2f} with 80% power on "
            "these images: what the images alone leave open is too wide. It takes more images."
        )
    n = np.arange(2, 1001)
    total = shared + (a.between[0] + b.between[0]) / n
    doubt = (a.between[0] ** 2 + b.between[0] ** 2) / n**2 / (n - 1)
    freedom = np.clip(total**2 / np.maximum(doubt, 1e-300), 1, 1e6)
    power = 1 - nctdtr(freedom, difference / np.sqrt(total), stdtrit(freedom, 1 - tail))
    enough = n[power >= POWER]
    if not len(enough):
        return None, f"More than 1000 seeds would be needed to show {difference:.2f} AP."
    further = max(1, int(enough[0]) - min(a.runs, b.runs))
    return further, (
        f"If the true difference is the observed {difference:.2f}, {further} further seeds per arm "
        "would show it with 80% power."
    )
